"""Comparing the tables of a run with the committed ones, cell by cell."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ood_helpers.config.base import PROJECT_ROOT
from ood_helpers.experiment import Experiment
from ood_helpers.networks.base import Network
from ood_helpers.results import tuned_label

COMMITTED = PROJECT_ROOT / "figures"
TOLERANCES = {
    "fpr95": 0.1,
    "auroc": 0.02,
}  # points: rounding of another processor moves single images over a threshold


@dataclass(frozen=True)
class Compared:
    """A committed table beside that of a run.

    cells : numbers in the committed table that must agree; those of networks trained on this machine need not
    free : the others
    out : cells that are further apart than the tolerance, or in one of the two tables only
    largest : difference in points, over the cells that both have
    where : row and column of the largest difference
    made : whether the run has the table
    """

    table: str
    cells: int
    free: int
    out: int
    largest: float
    where: str
    tolerance: float
    made: bool

    def __str__(self) -> str:
        if not self.made:
            return f"{self.table:34}{self.cells:5} cells, not made by this run"
        where = f" ({self.where})" if self.largest else ""
        text = f"{self.table:34}{self.cells:5} cells, largest difference {self.largest:.4f} points{where}: "
        text += f"{self.out} beyond {self.tolerance}" if self.out else f"all within {self.tolerance}"
        return text + (f"; {self.free} of networks trained on this machine, not held" if self.free else "")


def verify(run: Experiment, only: tuple[str, ...] = (), every_row: bool = False) -> list[Compared]:
    """Compare every committed table of an experiment with that of a run.

    Parameters
    ----------
    only : notebooks whose tables are compared; none = all, and a table that the run has not made counts as out
    every_row : also those of networks trained on this machine
    """
    networks = [run.backbone, *map(run.network, run.config.networks)]
    everything = every_row or all(_repeatable(network) for network in networks)
    of_row = {row.label: every_row or _repeatable(row.network) for row in run.rows().values()}
    of_row |= {tuned_label(label): repeatable for label, repeatable in of_row.items()}
    folder = COMMITTED / run.config.name
    paths = sorted(path for metric in TOLERANCES for path in folder.glob(f"*_{metric}.csv"))
    return [
        _compared(run, path, of_row, everything) for path in paths if not only or path.name.startswith(only)
    ]


def _compared(run: Experiment, path: Path, of_row: dict[str, bool], everything: bool) -> Compared:
    tolerance = TOLERANCES[path.stem.rpartition("_")[2]]
    committed, own = _cells(path), run.figures_directory / path.name
    found = _cells(own) if own.exists() else committed.iloc[:0]
    both = pd.DataFrame({"committed": committed, "found": found})
    held = np.array([of_row.get(name, everything) for name in both.index.get_level_values(0)], dtype=bool)
    difference = (both.committed - both.found).abs()[held]
    beyond = difference.isna() | (difference > tolerance * (1 + 1e-9))
    largest = difference.max() if difference.notna().any() else 0.0
    where = ", ".join(map(str, difference.idxmax())) if largest else ""
    counts = len(difference), int((~held).sum()), int(beyond.sum())
    return Compared(path.stem, *counts, largest, where, tolerance, own.exists())


def _repeatable(network: Network) -> bool:
    """Whether its weights are the same on every machine."""
    return not network.trained_here or network.shipped()


def _cells(path: Path) -> pd.Series:
    """The numbers of a table, by row and column."""
    return pd.read_csv(path, index_col=0).stack().dropna()


def update_figures(run: Experiment) -> Path:
    """Put the figures and tables that the manifest of a run lists, which leaves out those in seconds, in place of the
    committed ones; the folder."""
    target = COMMITTED / run.config.name
    outputs = json.loads((run.figures_directory / "manifest.json").read_text())["outputs"]
    kept = [name for name in outputs if not name.endswith(".svg")]
    target.mkdir(parents=True, exist_ok=True)
    for name in [*kept, "manifest.json"]:
        shutil.copyfile(run.figures_directory / name, target / name)
    for path in target.iterdir():  # what is no longer made
        if path.suffix in (".png", ".csv", ".md", ".tex") and path.name not in kept:
            path.unlink()
    return target
