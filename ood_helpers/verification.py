"""Comparing the tables of a run with the committed ones, cell by cell."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ood_helpers.config.base import PROJECT_ROOT
from ood_helpers.experiment import Experiment

COMMITTED = PROJECT_ROOT / "figures"
TOLERANCES = {
    "fpr95": 0.1,
    "auroc": 0.02,
}  # points: rounding of another processor moves single images over a threshold


@dataclass(frozen=True)
class Compared:
    """A committed table beside that of a run.

    cells : numbers in the committed table
    out : those that are further apart than the tolerance, or in one of the two tables only
    largest : difference in points, over the cells that both have
    where : row and column of the largest difference
    held : whether the run's tables must agree; not with networks that were trained on another machine
    """

    table: str
    cells: int
    out: int
    largest: float
    where: str
    tolerance: float
    held: bool

    def __str__(self) -> str:
        text = f"{self.table:34}{self.cells:5} cells, largest difference {self.largest:.4f} points"
        if self.largest:
            text += f" ({self.where})"
        if not self.held:
            return text + ": networks trained on this machine, not held"
        return text + (
            f": {self.out} beyond {self.tolerance}" if self.out else f": all within {self.tolerance}"
        )


def verify(run: Experiment, only: tuple[str, ...] = ()) -> list[Compared]:
    """Compare every committed table of an experiment with that of a run.

    Parameters
    ----------
    only : notebooks whose tables are compared; none = all, and a table that the run has not made counts as out
    """
    return list(_compared(run, only))


def _compared(run: Experiment, only: tuple[str, ...]) -> Iterator[Compared]:
    trained = {
        row.label for row in run.rows().values() if row.network.trained_here and not row.network.shipped()
    }
    paths = [
        path
        for metric in TOLERANCES
        for path in sorted((COMMITTED / run.config.name).glob(f"*_{metric}.csv"))
        if not only or path.name.startswith(only)
    ]
    for path in sorted(paths):
        tolerance = TOLERANCES[path.stem.rpartition("_")[2]]
        committed, own = _cells(path), run.figures_directory / path.name
        found = _cells(own) if own.exists() else committed.iloc[:0]
        both = pd.DataFrame({"committed": committed, "found": found})
        difference = (both.committed - both.found).abs()
        beyond = difference.isna() | (difference > tolerance * (1 + 1e-9))
        largest = difference.max() if difference.notna().any() else 0.0
        where = ", ".join(map(str, difference.idxmax())) if largest else ""
        held = run.config.weights is not None or not trained.intersection(committed.index.get_level_values(0))
        yield Compared(path.stem, len(committed), int(beyond.sum()), largest, where, tolerance, held)


def _cells(path: Path) -> pd.Series:
    """The numbers of a table, by row and column."""
    return pd.read_csv(path, index_col=0).stack().dropna()


def update_figures(run: Experiment, outputs: list[str]) -> Path:
    """Put the figures and tables that a run has written in place of the committed ones; the folder.

    Parameters
    ----------
    outputs : paths below the run's figures, as the manifest names them; those in seconds are left out
    """
    target = COMMITTED / run.config.name
    kept = [name for name in outputs if not name.endswith(".svg") and "_cost." not in name]
    target.mkdir(parents=True, exist_ok=True)
    for path in target.iterdir():
        if path.is_file():
            path.unlink()
    for name in [*kept, "manifest.json"]:
        shutil.copyfile(run.figures_directory / name, target / name)
    return target
