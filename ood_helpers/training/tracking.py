"""What a training leaves behind: its weights, and with tracking those of earlier epochs and its curves."""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from ood_helpers.errors import InputError
from ood_helpers.files import atomic_path, write_json
from ood_helpers.storage import notice


class DamagedWeights(InputError):
    """A file of weights that cannot be read."""


@dataclass(frozen=True)
class Tracking:
    """Keep checkpoints/first.safetensors (before the training), best.safetensors (the earliest epoch of highest
    validation_accuracy), last.safetensors and, with `save_every`, epoch_<number>.safetensors; settings.json; and the history
    as events that TensorBoard reads, in tensorboard/.

    scored_epoch : whose weights the network ends with: `last`, `best`, or a number
    """

    save_every: int | None = None
    scored_epoch: str | int = "last"


class Track:
    """Writes what a Tracking asks for."""

    def __init__(self, directory: Path, tracking: Tracking, signature: str) -> None:
        self.directory, self.tracking, self.signature = directory, tracking, signature
        self.events: SummaryWriter | None = None

    def begin(self, network: nn.Module) -> None:
        """Before the first epoch."""
        write_json(self.directory / "settings.json", json.loads(self.signature))
        self._save(network, "first")

    def add(self, network: nn.Module, history: list[dict[str, float]]) -> None:
        """After an epoch."""
        epoch, every = int(history[-1]["epoch"]), self.tracking.save_every
        if (every and epoch % every == 0) or epoch == self.tracking.scored_epoch:
            self._save(network, epoch)
        accuracies = [line.get("validation_accuracy", math.nan) for line in history]
        if accuracies[-1] > max(accuracies[:-1], default=-math.inf):
            self._save(network, "best")
        if self.events is None:
            self.events = SummaryWriter(str(self.directory / "tensorboard"), purge_step=epoch)
        for name, value in history[-1].items():
            if name != "epoch":
                self.events.add_scalar(name, value, epoch)
        self.events.flush()

    def end(self, network: nn.Module) -> None:
        """After the last epoch."""
        self._save(network, "last")
        if self.tracking.scored_epoch != "last":
            load_weights(network, checkpoint_path(self.directory, self.tracking.scored_epoch), self.signature)
        if self.events is not None:
            self.events.close()

    def readable(self) -> bool:
        """Whether all checkpoints so far can be read; a notice names one that cannot."""
        for path in self.directory.glob("checkpoints/*.safetensors"):
            try:
                with safetensors.safe_open(path, "pt"):
                    pass
            except (OSError, safetensors.SafetensorError):
                notice(path)
                return False
        return True

    def _save(self, network: nn.Module, which: str | int) -> None:
        save_weights(network, checkpoint_path(self.directory, which), self.signature)


def checkpoint_path(directory: Path, which: str | int) -> Path:
    """Where a tracked training keeps the weights of `first`, `best`, `last` or an epoch by its number."""
    name = f"epoch_{which}" if isinstance(which, int) else which
    return Path(directory) / "checkpoints" / f"{name}.safetensors"


def saved_epochs(directory: Path) -> dict[int, Path]:
    """Epoch (0 = before the training) -> weights, of those that a tracked training has saved, in order."""
    found = {0: checkpoint_path(directory, "first")}
    for path in Path(directory).glob("checkpoints/epoch_*.safetensors"):
        found[int(path.stem.removeprefix("epoch_"))] = path
    history = Path(directory) / "history.csv"
    if history.exists():
        found[int(pd.read_csv(history).epoch.iloc[-1])] = checkpoint_path(directory, "last")
    return {epoch: path for epoch, path in sorted(found.items()) if path.exists()}


def save_weights(network: nn.Module, path: Path, signature: str) -> None:
    """Write the state dict of a training, atomically."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(weights, temporary, metadata={"training": signature})


def load_weights(network: nn.Module, path: Path, signature: str | None = None) -> None:
    """Load weights that a training has saved, with `signature` those of this training alone.

    Raises
    ------
    DamagedWeights : the file cannot be read
    InputError : weights of another training, or of another network
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("training", "{}")
        weights = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError):
        raise DamagedWeights(
            f"The weights {path} are damaged, expected those of a training; delete the file to train again."
        ) from None
    if signature not in (None, found):
        _refuse_other_training(found, signature, path)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} holds the weights of another network ({reason}); use another directory."
        ) from None


def restore(parts: Mapping[str, Any], path: Path, signature: str) -> list[dict[str, float]]:
    """Load the state of an interrupted training into its parts; its history, empty where there is none or it is damaged.

    Raises
    ------
    InputError : the state of another training
    """
    if not path.exists():
        return []
    fresh = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["signature"] == signature:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            return list(state["history"])
    except Exception:  # a damaged file shows up as nearly any type
        notice(path)
        for name, part in parts.items():
            part.load_state_dict(fresh[name])
        return []
    _refuse_other_training(state["signature"], signature, path)


def _refuse_other_training(found: str, expected: str, path: Path) -> NoReturn:
    """Raise the error of a file that belongs to a training with other settings, naming what differs."""
    there, here = json.loads(found), json.loads(expected)
    different = [
        f"{name} {there.get(name)} instead of {here.get(name)}"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    raise InputError(
        f"{path} belongs to a training with {', '.join(different)}; use another directory or delete this file."
    )
