"""What the benchmarks share: their options, the clock, and the table and figure that are kept with machine and versions."""

import argparse
import platform
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import style
from matplotlib.figure import Figure

from ood_helpers.config import PROJECT_ROOT
from ood_helpers.files import atomic_path, write_text
from ood_helpers.plots import COLOURS, ID_COLOUR, SAVED_DPI, STYLE, WIDTH

RESULTS = PROJECT_ROOT / "benchmarks" / "results"


def experiment_options(description: str, *, used: bool = True) -> argparse.ArgumentParser:
    """A parser with --config, --data-root and --device; `used` says whether the benchmark opens an experiment."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    unused = None if used else "not used: `make bench` gives it to every benchmark"
    parser.add_argument("--config", default="digits", help=unused)
    parser.add_argument("--data-root", default="", help=unused)
    parser.add_argument("--device", default="auto")
    return parser


def seconds(step: Callable[[], object], device: str | torch.device) -> float:
    """How long a step takes, until the device has done it."""
    synchronise(device)
    begin = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - begin


def repeated(step: Callable[[], object], device: str | torch.device) -> float:
    """The median time of a step that has run before: of few repeats where it takes long, several at once where it is short,
    as a GPU is given the next before it has done the last."""
    first = seconds(step, device)
    at_once, repeats = min(100, max(1, int(0.02 / first))), min(9, max(1, int(2 / first)))

    def several() -> None:
        for _ in range(at_once):
            step()

    times = [seconds(several, device) / at_once for _ in range(repeats)]
    return float(np.median(times if at_once > 1 else [first, *times]))


def synchronise(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: str | torch.device) -> str:
    """System, processor, threads and device."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    threads, device = torch.get_num_threads(), torch.device(device)
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"{platform.system()} {platform.machine()}, {processor}, {threads} threads, {device}{gpu}"


def record(
    table: pd.DataFrame, name: str, device: str | torch.device, versions: Mapping[str, str], command: str
) -> None:
    """Write benchmarks/results/<name>.csv: the table, the machine, the versions of python and these packages, the command.
    Of another device than the CPU it is <name>_<device>.csv."""
    table = table.assign(
        machine=machine(device), versions=_listed(versions), command=f"python benchmarks/{command}"
    )
    write_text(
        _path(name, device, "csv"), table.to_csv(index=False, float_format="%.4g", lineterminator="\n")
    )


def record_figure(
    draw: Callable[[Figure], None],
    name: str,
    device: str | torch.device,
    versions: Mapping[str, str],
    height: float,
) -> None:
    """Write benchmarks/results/<name>.png, named as by `record`: what `draw` puts on a figure of `height` inches in the kit's style, over a
    line with the machine and the versions."""
    caption = textwrap.fill(f"{machine(device)}; {_listed(versions)}", 130)
    strip = 0.08 + 0.13 * len(caption.splitlines())
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, height + strip), layout="constrained")
        figure.get_layout_engine().set(rect=(0, strip / (height + strip), 1, height / (height + strip)))
        figure.text(0.01, 0.04 / (height + strip), caption, fontsize=7, color="0.4", va="bottom")
        draw(figure)
        with atomic_path(_path(name, device, "png")) as temporary:
            figure.savefig(temporary, format="png", dpi=SAVED_DPI, metadata={"Software": None})


def draw_bars(
    figure: Figure,
    names: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    label: str,
    ours: Sequence[str],
    log: bool = True,
) -> None:
    """One horizontal bar a name, its text beside it; those of `ours` in the colour of ID images."""
    axes = figure.subplots()
    for row, (name, value, text) in enumerate(zip(names, values, texts, strict=True)):
        axes.barh(row, value, height=0.6, color=ID_COLOUR if name in ours else COLOURS[0])
        axes.annotate(text, (value, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    low, high = min(values), max(values)
    if log:  # either way with room for the text
        axes.set_xscale("log")
        axes.set_xlim(low / 3, (high / low) ** 0.8 * high)
    else:
        axes.set_xlim(0, 1.7 * high)
    axes.set_xlabel(f"{label}{', log scale' * log}, lower is better")
    axes.grid(True, axis="x")


def short(value: float, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded >= 10 ** (digits - 1) else f"{rounded:g}"


def _path(name: str, device: str | torch.device, ending: str) -> Path:
    kind = torch.device(device).type
    return RESULTS / f"{name}{'' if kind == 'cpu' else f'_{kind}'}.{ending}"


def _listed(versions: Mapping[str, str]) -> str:
    versions = {"python": platform.python_version(), **versions}
    return ", ".join(f"{package} {version}" for package, version in versions.items())
