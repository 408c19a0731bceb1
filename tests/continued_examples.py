"""A small experiment on the digits whose backbone has epochs to continue from, for networks that continue its training."""

from pathlib import Path

import torch
from torch import nn

from ood_helpers.experiment import Experiment

OOD_SETS = ("letters", "chimeras", "photographs", "textures", "noise")
SMALL = [
    "backbone.training={epochs: 5, batch_size: 64, learning_rate: 0.1, schedule: one_cycle, save_every: 2}",
    "backbone.depth=10",
    "backbone.growth_rate=12",
    "backbone.expected_accuracy=null",
    "metrics.bootstrap_resamples=20",
    "tuning=null",
    "outliers=null",
    "ablations={}",
    *(f"ood.{name}.images.count=60" for name in OOD_SETS),
]


def small(folder: Path, *overrides: str, **options) -> Experiment:
    folders = {"run_dir": str(folder / "runs"), "figures_dir": str(folder / "figures")}
    return Experiment.open("digits", **folders, overrides=[*SMALL, *overrides], device="cpu", **options)


def same_state(one: nn.Module | dict, other: nn.Module | dict) -> bool:
    """Whether two networks, or their state dicts, have the same weights and statistics, bit for bit."""
    one, other = (network if isinstance(network, dict) else network.state_dict() for network in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def kept_files(folder: Path) -> dict[Path, int]:
    """Path -> time of the last change of all that an experiment in a folder has kept."""
    return {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
