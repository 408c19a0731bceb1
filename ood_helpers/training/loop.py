"""The training loop that every training method shares: SGD, a schedule that moves with every step, resumable bit for bit."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from ood_helpers.errors import InputError
from ood_helpers.files import atomic_path, sha256_of_file, write_json, write_text
from ood_helpers.progress import track
from ood_helpers.storage import notice
from ood_helpers.training.tracking import Track, Tracking, load_weights, restore, save_weights

Batch = tuple[Tensor, ...]
EpochBatches = Callable[[int, torch.Generator], Iterable[Batch]]
Values = Mapping[str, Tensor | float]
LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, Values]]
Validation = Callable[[nn.Module], Mapping[str, float]]
Step = Callable[[nn.Module, Batch, Optimizer], tuple[Tensor, Values]]

STEPS_BETWEEN_CHECKS = 50  # looking at the loss waits for the GPU


@dataclass(frozen=True)
class Schedule:
    """SGD: its steps, and the learning rate of each.

    learning_rate : the base rate; weight decay is on all parameters that are trained
    steps_per_epoch : batches between two validations and saved states
    steps : where the training ends, in the middle of an epoch if need be
    shape : `cosine` from learning_rate to 0, `one_cycle` up from learning_rate / 25 and down to nearly 0, or a function
        step (from 0) -> learning rate
    nesterov : Nesterov momentum; without effect at momentum 0
    """

    learning_rate: float
    momentum: float
    weight_decay: float
    steps_per_epoch: int
    steps: int
    shape: Literal["cosine", "one_cycle"] | Callable[[int], float] = "cosine"
    nesterov: bool = True

    @classmethod
    def of(cls, recipe: Any, steps_per_epoch: int, steps: int, **more: Any) -> "Schedule":
        """The learning rate, momentum and weight decay of a recipe."""
        return cls(recipe.learning_rate, recipe.momentum, recipe.weight_decay, steps_per_epoch, steps, **more)

    @property
    def epochs(self) -> int:
        return math.ceil(self.steps / self.steps_per_epoch)

    def optimizer(self, network: nn.Module) -> Optimizer:
        """SGD for the parameters with requires_grad.

        Raises
        ------
        InputError : there are none
        """
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if not trainable:
            raise InputError(
                "The network has no parameter with requires_grad, so there is nothing to train; unfreeze some."
            )
        options = {"weight_decay": self.weight_decay, "nesterov": self.nesterov and self.momentum > 0}
        return torch.optim.SGD(trainable, lr=self.learning_rate, momentum=self.momentum, **options)

    def scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """Moves the learning rate of an optimizer."""
        if callable(self.shape):
            return LambdaLR(optimizer, lambda step: self.shape(step) / self.learning_rate)
        if self.shape == "cosine":
            return CosineAnnealingLR(optimizer, self.steps)
        # The momentum stays what the config says.
        return OneCycleLR(optimizer, self.learning_rate, self.steps, cycle_momentum=False)


def finished(directory: Path) -> bool:
    """Whether a training in this directory has ended, and its weights and history are as it left them."""
    try:
        return json.loads((directory / "record.json").read_text()) == _record(directory)
    except (OSError, ValueError):
        return False


def _record(directory: Path) -> dict[str, str]:
    return {name: sha256_of_file(directory / name) for name in ("weights.safetensors", "history.csv")}


def train(
    network: nn.Module,
    epoch_batches: EpochBatches,
    step: Step,
    schedule: Schedule,
    *,
    seed: int,
    device: str | torch.device,
    directory: Path,
    train_mode: Callable[[nn.Module], Any] = nn.Module.train,
    validate: Validation | None = None,
    state: Any = None,
    tracking: Tracking | None = None,
    settings: Mapping[str, Any] | None = None,
    description: str = "Training",
    unit: str = "epoch",
) -> pd.DataFrame:
    """Train `network` with SGD and leave it on `device`, in eval mode, with the final weights.

    The state after each epoch is kept in `directory`. A training that was killed resumes after the last one and ends in
    the weights of an uninterrupted training, bit for bit on the same machine, because all random numbers of an epoch
    depend on (seed, epoch) alone. In the end weights.safetensors, history.csv and record.json, which has the hashes of
    both, are in `directory`; where they agree, weights and history are loaded and nothing is trained. Damaged files are
    replaced by training again, with a notice.

    Parameters
    ----------
    network : start weights; parameters with requires_grad are trained
    epoch_batches : called once per epoch with its number (from 1) and a seeded CPU generator for all its random choices;
        gives `schedule.steps_per_epoch` tuples of tensors on `device`, each with one row per sample
    step : (network, batch, optimizer) -> loss and values to log, does all passes and steps of a batch; see `descent`.
        Random numbers of torch in it (and of dropout) are seeded too
    train_mode : puts the network into the mode it is trained in; nn.Module.eval keeps the statistics of batch norm
    validate : called after each epoch with the network in eval mode and without gradients; gives values to log
    state : what else changes during the training and is kept with an interrupted one: has `state_dict` (tensors and plain
        values) and `load_state_dict`
    tracking : what is kept beside it to look back; None = nothing
    settings : what else (JSON values) the result depends on; a directory with other settings is refused
    unit : what the progress bar calls an epoch

    Returns
    -------
    One row per epoch: epoch (from 1), step (number of steps so far), learning_rate (of its last step), train_loss and
    train_<value>, means over the samples, and validation_<value>.

    Raises
    ------
    InputError : the loss is not finite, nothing to train, no validation to choose the best epoch by, or the directory
        holds another training
    """
    directory, device = Path(directory), torch.device(device)
    weights_path, history_path = directory / "weights.safetensors", directory / "history.csv"
    state_path, record_path = directory / "training_state.pt", directory / "record.json"
    shape = schedule.shape if isinstance(schedule.shape, str) else "its own"
    facts = {**asdict(schedule), "shape": shape, "seed": seed, **(settings or {})}
    signature = json.dumps(facts, sort_keys=True)
    network.to(device=device, memory_format=torch.channels_last)
    if finished(directory):
        load_weights(network, weights_path, signature)
        state_path.unlink(missing_ok=True)
        network.eval()
        return pd.read_csv(history_path)
    if record_path.exists():
        notice(directory)
        record_path.unlink()

    if tracking is not None and tracking.scored_epoch == "best" and validate is None:
        raise InputError(
            "Found no validation images to choose the best epoch by, expected some; add id.validation, or score the last."
        )
    optimizer = schedule.optimizer(network)
    scheduler = schedule.scheduler(optimizer)
    parts = {"network": network, "optimizer": optimizer, "scheduler": scheduler, "state": state}
    parts = {name: part for name, part in parts.items() if part is not None}
    kept = None if tracking is None else Track(directory, tracking, signature)
    if kept is not None and not kept.readable():
        state_path.unlink(missing_ok=True)
    history: list[dict[str, float]] = restore(parts, state_path, signature)
    if kept is not None and not history:
        kept.begin(network)

    with (
        track(description=description, total=schedule.epochs, unit=unit) as bar,
        torch.enable_grad(),  # a network is trained when it is first asked for, perhaps where there are no gradients
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        bar.initial = bar.n = len(history)
        for epoch in range(len(history) + 1, schedule.epochs + 1):
            epoch_seed = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])
            torch.manual_seed(epoch_seed)
            batches = epoch_batches(epoch, torch.Generator().manual_seed(epoch_seed))
            last_step = min(epoch * schedule.steps_per_epoch, schedule.steps)
            steps = last_step - (epoch - 1) * schedule.steps_per_epoch
            train_mode(network)
            learning_rate, trained = _train_epoch(network, batches, step, scheduler, steps, epoch)
            network.eval()
            with torch.no_grad():
                validated = validate(network) if validate is not None else {}
            line = {"epoch": epoch, "step": last_step, "learning_rate": learning_rate}
            line |= {f"train_{name}": value for name, value in trained.items()}
            line |= {f"validation_{name}": float(value) for name, value in validated.items()}
            history.append(line)
            if kept is not None:
                kept.add(network, history)
            states = {name: part.state_dict() for name, part in parts.items()}
            with atomic_path(state_path) as temporary:
                torch.save({**states, "history": history, "signature": signature}, temporary)
            bar.set_postfix(trained, refresh=False)
            bar.update()

    if kept is not None:
        kept.end(network)
    write_text(history_path, pd.DataFrame(history).to_csv(index=False))
    save_weights(network, weights_path, signature)
    write_json(record_path, _record(directory))
    state_path.unlink(missing_ok=True)
    network.eval()
    return pd.read_csv(history_path)


def descent(loss_function: LossFunction, micro_batch_size: int | None = None) -> Step:
    """One step down the gradient of a mean loss.

    Parameters
    ----------
    loss_function : (network, batch) -> scalar loss, a mean over the samples, and values to log
    micro_batch_size : samples in a forward and backward pass; the gradients of a batch are summed before its one
        step. None = whole batches
    """

    def step(network: nn.Module, batch: Batch, optimizer: Optimizer) -> tuple[Tensor, dict[str, Tensor]]:
        optimizer.zero_grad(set_to_none=True)
        logged: dict[str, Tensor] = {}
        parts = [batch]
        if micro_batch_size is not None:
            parts = zip(*(tensor.split(micro_batch_size) for tensor in batch), strict=True)
        for part in parts:
            loss, values = loss_function(network, part)
            share = len(part[0]) / len(batch[0])
            (loss * share).backward()
            for name, value in {"loss": loss, **values}.items():
                logged[name] = logged.get(name, 0) + share * torch.as_tensor(value).detach()
        optimizer.step()
        return logged.pop("loss"), logged

    return step


def _train_epoch(
    network: nn.Module, batches: Iterable[Batch], step: Step, scheduler: LRScheduler, steps: int, epoch: int
) -> tuple[float, dict[str, float]]:
    """One epoch: the learning rate of its last step, and the means of the loss and the logged values."""
    optimizer, samples = scheduler.optimizer, []
    logged: dict[str, list[Tensor]] = {}
    for number, batch in zip(range(1, steps + 1), batches, strict=True):
        learning_rate = float(optimizer.param_groups[0]["lr"])
        loss, values = step(network, batch, optimizer)
        for name, value in {"loss": loss, **values}.items():
            logged.setdefault(name, []).append(torch.as_tensor(value).detach())
        samples.append(len(batch[0]))
        scheduler.step()
        if number % STEPS_BETWEEN_CHECKS == 0:
            _check_finite(float(loss.detach()), epoch)
    columns = {name: torch.stack(column).cpu() for name, column in logged.items()}
    means = {name: float(np.average(column, weights=samples)) for name, column in columns.items()}
    _check_finite(means["loss"], epoch)
    return learning_rate, means


def _check_finite(loss: float, epoch: int) -> None:
    if not np.isfinite(loss):
        raise InputError(
            f"The training loss became {loss} in epoch {epoch}, expected a finite number; lower learning_rate, "
            "or look for broken images."
        )
