"""What the benchmarks share: the options of an experiment, and the table that is kept with machine, versions and command."""

import argparse
import platform
from collections.abc import Mapping

import pandas as pd
import torch

from ood_helpers.config import PROJECT_ROOT
from ood_helpers.files import write_text


def experiment_options(description: str) -> argparse.ArgumentParser:
    """A parser with --config, --data-root and --device."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="digits")
    parser.add_argument("--data-root", default="")
    parser.add_argument("--device", default="auto")
    return parser


def record(
    table: pd.DataFrame, name: str, device: str | torch.device, versions: Mapping[str, str], command: str
) -> None:
    """Write benchmarks/results/<name>.csv: the table, the machine, the versions of python and these packages, the command."""
    versions = {"python": platform.python_version(), **versions}
    table = table.assign(
        machine=f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {device}",
        versions=", ".join(f"{package} {version}" for package, version in versions.items()),
        command=f"python benchmarks/{command}",
    )
    path = PROJECT_ROOT / "benchmarks" / "results" / f"{name}.csv"
    write_text(path, table.to_csv(index=False, float_format="%.4g", lineterminator="\n"))
