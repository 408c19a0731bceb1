"""How does the cost of the kernels grow with the number of samples N, of classes C and of features D?

    python benchmarks/bench_growth.py

Times, in one run, in float32 and on random features, the kernels of ood_helpers.kernels while one of N, C, D and, for KNN, the
number of training features M is doubled and the others keep the values of --n, --c, --d and --m. The exponent is the slope of a straight line
through log(seconds) against log(value): 1 where twice as many take twice the time. Cost that does not grow, such as that of
a call, lowers it. Writes benchmarks/results/growth.csv and .png with machine, versions and command.
"""

import ood_helpers  # noqa: F401 - first: it says how threads wait, which is read when torch is loaded

# isort: split
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from recording import experiment_options, record, record_figure, repeated

from ood_helpers.backbones.precision import resolve_device
from ood_helpers.kernels.group_score import group_score
from ood_helpers.kernels.kth_cosine import kth_cosine
from ood_helpers.kernels.largest_entries import largest_entries
from ood_helpers.kernels.line_head import line_head
from ood_helpers.kernels.prototype_cosine import prototype_cosine
from ood_helpers.kernels.shaped_energy import Shaping, shaped_energy
from ood_helpers.plots import COLOURS, ID_COLOUR, MARKERS

VALUES = {
    "N": [512, 1024, 2048, 4096, 8192, 16384],
    "C": [16, 32, 64, 128, 256, 512, 1024],
    "D": [64, 128, 256, 512, 1024, 2048],
    "M": [1024, 2048, 4096, 8192, 16384],
}
TITLES = {"N": "samples N", "C": "classes C", "D": "features D", "M": "training features M"}
# What each kernel's cost depends on; a group of MOS has 16 classes, KNN looks for the 50th neighbour.
VARIABLES = {
    "LINe head": "NCD",
    "HIMPLoS energy": "NCD",
    "largest entries": "ND",
    "group score": "NC",
    "k-th cosine": "NDM",
}
NEIGHBOUR = 50


def step_of(kernel: str, n: int, c: int, d: int, m: int, device: torch.device) -> Callable[[], object]:
    """The kernel on random input: a function without arguments."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    if kernel == "group score":
        logits = random(n, c + c // 16)
        return lambda: group_score(logits, [(first, first + 17) for first in range(0, logits.shape[1], 17)])
    features = random(n, d).abs()
    if kernel == "k-th cosine":
        train = random(m, d).abs()
        return lambda: kth_cosine(features, [train], [NEIGHBOUR])
    if kernel == "largest entries":
        return lambda: largest_entries(features, d // 10)
    # Weights without a mean, as otherwise most samples would be in the class of the largest.
    weight, bias, prototypes = random(c, d), random(c), random(c, d).abs()
    weight = weight - weight.mean(dim=1, keepdim=True)
    if kernel == "LINe head":
        importance = (weight * prototypes).abs()
        kept = importance > importance.median(dim=1, keepdim=True).values
        floors = random(c).abs()
        return lambda: line_head(features, weight, bias, importance, kept, floors, 1.0)
    predicted = (features @ weight.T).argmax(dim=1)
    kept = weight > 0

    def himplos() -> torch.Tensor:
        cosines = prototype_cosine(features, prototypes, predicted)
        return shaped_energy(features, weight, bias, Shaping(1.0, kept, predicted, scale=cosines))

    return himplos


def draw(figure: Figure, table: pd.DataFrame) -> None:
    """A panel a variable, with the exponent behind each kernel's name."""
    looks = dict(zip(VARIABLES, zip([ID_COLOUR, *COLOURS], MARKERS)))
    all_axes = figure.subplots(2, 2, sharey=True).ravel()
    for axes, (variable, rows) in zip(all_axes, table.groupby("variable", sort=False)):
        for kernel, points in rows.groupby("kernel", sort=False):
            colour, marker = looks[kernel]
            label = f"{kernel}: {points.exponent.iloc[0]:.2f}"
            line = {"color": colour, "marker": marker, "markersize": 4, "label": label}
            axes.plot(points.value, 1000 * points.seconds, **line)
        axes.set(xscale="log", yscale="log", xlabel=f"{TITLES[variable]}, log scale")
        ticks = sorted(set(rows.value))[::2]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.grid(True)
        axes.legend(title="exponent", title_fontsize=7, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in all_axes[::2]:
        axes.set_ylabel("time (ms), log scale")


def main() -> None:
    parser = experiment_options(__doc__, used=False)
    for name, value in {"N": 4096, "C": 128, "D": 512, "M": 4096}.items():
        parser.add_argument(
            f"--{name.lower()}", type=int, default=value, help=f"{TITLES[name]}; default {value}"
        )
    parser.add_argument("--largest", type=int, default=2**20, help="leave out values above it")
    arguments = parser.parse_args()
    device, rows = resolve_device(arguments.device), []
    base = {name: getattr(arguments, name.lower()) for name in VALUES}
    for variable, values in VALUES.items():
        for kernel in (kernel for kernel, variables in VARIABLES.items() if variable in variables):
            for value in (value for value in values if value <= arguments.largest):
                shape = base | {variable: value}
                step = step_of(kernel, *shape.values(), device)
                step()  # warm-up
                rows.append({"variable": variable, "kernel": kernel, "value": value, **shape})
                rows[-1]["seconds"] = repeated(step, device)
    table = pd.DataFrame(rows)
    for _, points in table.groupby(["variable", "kernel"]):
        slope = np.polyfit(np.log(points.value), np.log(points.seconds), 1)[0] if len(points) > 1 else np.nan
        table.loc[points.index, "exponent"] = slope
    shown = table.groupby(["variable", "kernel"], sort=False)
    print(shown.agg({"value": ["min", "max"], "seconds": ["min", "max"], "exponent": "first"}).round(5))
    sizes = " ".join(f"--{name.lower()} {value}" for name, value in base.items())
    command = f"bench_growth.py {sizes} --largest {arguments.largest}"
    versions = {"torch": torch.__version__}
    record(table, "growth", device, versions, command)
    record_figure(lambda figure: draw(figure, table), "growth", device, versions, height=4.4)


if __name__ == "__main__":
    main()
