"""A small training for the tests of the loop and of its tracking."""

from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from ood_helpers.training.loop import Schedule, descent, train

STEPS, EPOCHS = 3, 4


class Killed(Exception):
    """Stands for the end of the process."""


def make_network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 3)
    )


def batches(epoch, generator):
    for _ in range(STEPS):
        images = torch.rand(8, 3, 8, 8, generator=generator)
        yield images, (images.mean(dim=(1, 2, 3)) * 30).long() % 3


def loss_function(network, batch):
    images, labels = batch
    # The noise comes from torch's global random state, as dropout's does.
    logits = network(images + 0.01 * torch.randn_like(images))
    return F.cross_entropy(logits, labels), {"accuracy": 100 * (logits.argmax(1) == labels).float().mean()}


def run(
    directory: Path, network=None, *, epoch_batches=batches, loss=loss_function, step=None, **changes
) -> pd.DataFrame:
    """Train for four epochs of three steps; `changes` are of the schedule or of `train`."""
    schedule = {
        "learning_rate": 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "steps_per_epoch": STEPS,
        "steps": STEPS * EPOCHS,
        "shape": "one_cycle",
    }
    schedule |= {name: changes.pop(name) for name in list(changes) if name in schedule}
    options = {"seed": 3, "device": "cpu", "directory": directory} | changes
    network = make_network() if network is None else network
    return train(network, epoch_batches, step or descent(loss), Schedule(**schedule), **options)


def weights_of(directory: Path) -> bytes:
    """The file of the final weights."""
    return (directory / "weights.safetensors").read_bytes()


def accuracy_by_epoch(values):
    """A validation whose accuracy is the next of `values`."""
    values = iter(values)
    return lambda network: {"accuracy": next(values)}
