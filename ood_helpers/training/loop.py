"""The training loop that every training method shares: SGD, a schedule a step, resumable bit for bit."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ood_helpers.config import EpochTrainingConfig, FineTuningConfig, TrainingConfig
from ood_helpers.errors import InputError
from ood_helpers.files import atomic_path, write_json, write_text
from ood_helpers.progress import track

Batch = tuple[Tensor, ...]
EpochBatches = Callable[[int, torch.Generator], Iterable[Batch]]
LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, Mapping[str, Tensor | float]]]
Validation = Callable[[nn.Module], Mapping[str, float]]
LearningRate = Callable[[int], float]
Step = Callable[[nn.Module, Batch, torch.optim.Optimizer], tuple[Tensor, Mapping[str, Tensor | float]]]
Config = TrainingConfig | FineTuningConfig | EpochTrainingConfig

TRAINING_VERSION = 1  # raise it when the same settings and images give other weights
STEPS_BETWEEN_CHECKS = 50  # looking at the loss waits for the GPU


class Stateful(Protocol):
    """What a training remembers beside network, optimizer and schedule: tensors and plain values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def finished(directory: Path) -> bool:
    """Whether a training in this directory has ended, so that its weights would be loaded."""
    return (directory / "weights.safetensors").exists() and (directory / "history.csv").exists()


def train(
    network: nn.Module,
    epoch_batches: EpochBatches,
    loss_function: LossFunction | None,
    config: Config,
    *,
    steps_per_epoch: int,
    seed: int,
    device: str | torch.device,
    directory: Path,
    steps: int | None = None,
    learning_rate: LearningRate | None = None,
    micro_batch_size: int | None = None,
    train_mode: Callable[[nn.Module], Any] = nn.Module.train,
    validate: Validation | None = None,
    step: Step | None = None,
    state: Stateful | None = None,
    tracked: bool = False,
    save_every: int | None = None,
    scored_epoch: str | int = "last",
    nesterov: bool = True,
    settings: Mapping[str, Any] | None = None,
    description: str = "Training",
    unit: str = "epoch",
) -> pd.DataFrame:
    """Train `network` with SGD and leave it on `device`, in eval mode, with the final weights.

    After each epoch the whole state goes to directory/training_state.pt. A training that was killed goes on
    behind the last epoch in it and ends in the weights of an uninterrupted one, bit for bit on the same
    machine, because all random numbers of an epoch depend on (seed, epoch) alone. At the end the weights are
    in directory/weights.safetensors and the history in directory/history.csv; where both exist they are
    loaded and nothing is trained.

    Parameters
    ----------
    network : start weights; parameters with requires_grad are trained, weight decay is on all of them
    epoch_batches : called once an epoch with its number (from 1) and a seeded CPU generator that all its random
        choices come from; gives `steps_per_epoch` tuples of tensors on `device`, each with one row a sample
    loss_function : (network, batch) -> scalar loss, a mean over the samples, and values to log; logged is their mean
        over all samples. Random numbers of torch in it (and of dropout) are seeded too.
    config : epochs, learning rate, momentum, weight decay and schedule, which moves with every step:
        `cosine` from learning_rate to 0, or `one_cycle` up from learning_rate / 25 and down to nearly 0
    steps : where the training ends, in the middle of an epoch if need be; None = after config.epochs
    learning_rate : step (from 0) -> learning rate, in place of the config's schedule
    micro_batch_size : samples in a forward and backward pass; the gradients of a batch are summed before its one
        step. None = whole batches
    unit : what the progress bar calls an epoch
    train_mode : puts the network into the mode it is trained in; nn.Module.eval keeps the statistics of batch norm
    validate : called after each epoch with the network in eval mode and without gradients; gives values to log
    step : (network, batch, optimizer) -> loss and values to log, in place of `loss_function`, for trainings with more
        than one pass or step a batch: it does all of them
    state : what else changes during the training, kept with an interrupted one
    tracked : keep what lets one look back: checkpoints/first.safetensors (before the training), best.safetensors (the
        earliest epoch of highest validation_accuracy), last.safetensors and, with `save_every`, epoch_<number>.safetensors;
        settings.json; and the history as events that TensorBoard reads, in tensorboard/
    scored_epoch : whose weights the network ends with: `last`, `best`, or a number; other than `last` for tracked ones
    nesterov : Nesterov momentum; without effect at momentum 0
    settings : what else (JSON values) the result depends on; a directory with other settings is refused

    Returns
    -------
    One row an epoch: epoch (from 1), step (number of steps so far), learning_rate (of its last step), train_loss and
    train_<value>, validation_<value>.

    Raises
    ------
    InputError : the loss is not finite, nothing to train, no validation to choose the best epoch by, or the directory
        holds unreadable files or another training
    """
    directory, device = Path(directory), torch.device(device)
    weights_path, history_path = directory / "weights.safetensors", directory / "history.csv"
    state_path = directory / "training_state.pt"
    signature = json.dumps(
        {
            **config.model_dump(),
            "seed": seed,
            "steps_per_epoch": steps_per_epoch,
            "nesterov": nesterov,
            **(settings or {}),
        },
        sort_keys=True,
    )
    network.to(device=device, memory_format=torch.channels_last)
    if finished(directory):
        load_weights(network, weights_path, signature)
        state_path.unlink(missing_ok=True)
        network.eval()
        return pd.read_csv(history_path)

    if not tracked and (save_every or scored_epoch != "last"):
        raise InputError(
            f"Found save_every {save_every} and scored_epoch {scored_epoch} for a training that is not tracked, expected "
            "None and last; set tracked."
        )
    if scored_epoch == "best" and validate is None:
        raise InputError(
            "Found no validation images to choose the best epoch by, expected some; add id.validation, or score the last."
        )
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trainable:
        raise InputError(
            "The network has no parameter with requires_grad, so there is nothing to train; unfreeze some."
        )
    optimizer = torch.optim.SGD(
        trainable,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=nesterov and config.momentum > 0,
    )
    steps = config.epochs * steps_per_epoch if steps is None else steps
    epochs = math.ceil(steps / steps_per_epoch)
    scheduler = _schedule(optimizer, config, steps, learning_rate)
    parts = {"network": network, "optimizer": optimizer, "scheduler": scheduler}
    if state is not None:
        parts["state"] = state
    history: list[dict[str, float]] = _restore(parts, state_path, signature) if state_path.exists() else []
    track_record = _Track(directory, save_every, scored_epoch, signature) if tracked else None
    if track_record is not None and not history:
        track_record.begin(network)

    with (
        track(description=description, total=epochs, unit=unit) as bar,
        torch.enable_grad(),  # a network is trained when it is first asked for, perhaps where there are no gradients
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        bar.initial = bar.n = len(history)
        for epoch in range(len(history) + 1, epochs + 1):
            epoch_seed = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])
            torch.manual_seed(epoch_seed)
            batches = epoch_batches(epoch, torch.Generator().manual_seed(epoch_seed))
            last_step = min(epoch * steps_per_epoch, steps)
            train_mode(network)
            trained = _train_epoch(
                network,
                batches,
                step or _plain_step(loss_function, micro_batch_size),
                optimizer,
                scheduler,
                steps=last_step - (epoch - 1) * steps_per_epoch,
                epoch=epoch,
            )
            network.eval()
            with torch.no_grad():
                validated = validate(network) if validate is not None else {}
            history.append(
                {
                    "epoch": epoch,
                    "step": last_step,
                    **trained,
                    **{f"validation_{name}": float(value) for name, value in validated.items()},
                }
            )
            if track_record is not None:
                track_record.add(network, history)
            states = {name: part.state_dict() for name, part in parts.items()}
            with atomic_path(state_path) as temporary:
                torch.save({**states, "history": history, "signature": signature}, temporary)
            shown = {
                name.removeprefix("train_"): history[-1][name]
                for name in trained
                if name.startswith("train_")
            }
            bar.set_postfix(shown, refresh=False)
            bar.update()

    if track_record is not None:
        track_record.end(network)
    write_text(history_path, pd.DataFrame(history).to_csv(index=False))
    save_weights(network, weights_path, signature)
    state_path.unlink(missing_ok=True)
    network.eval()
    return pd.read_csv(history_path)


def _schedule(
    optimizer: torch.optim.Optimizer,
    config: Config,
    steps: int,
    learning_rate: LearningRate | None,
) -> torch.optim.lr_scheduler.LRScheduler:
    if learning_rate is not None:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(step) / config.learning_rate
        )
    if config.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # The momentum stays what the config says.
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=steps, cycle_momentum=False
    )


def _plain_step(loss_function: LossFunction, micro_batch_size: int | None) -> Step:
    """One step down the gradient of a mean loss, whose batch may be passed in parts."""

    def step(
        network: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer
    ) -> tuple[Tensor, dict[str, Tensor]]:
        optimizer.zero_grad(set_to_none=True)
        logged: dict[str, Tensor] = {}
        for part in _parts(batch, micro_batch_size):
            loss, values = loss_function(network, part)
            share = len(part[0]) / len(batch[0])
            (loss * share).backward()
            for name, value in {"loss": loss, **values}.items():
                logged[name] = logged.get(name, 0) + share * torch.as_tensor(value).detach()
        optimizer.step()
        return logged.pop("loss"), logged

    return step


def _train_epoch(
    network: nn.Module,
    batches: Iterable[Batch],
    train_step: Step,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    *,
    steps: int,
    epoch: int,
) -> dict[str, float]:
    """One epoch: the learning rate of its last step, and the means of the loss and the logged values."""
    logged: dict[str, list[float | Tensor]] = {}
    samples = []
    for step, batch in zip(range(1, steps + 1), batches, strict=True):
        learning_rate = float(optimizer.param_groups[0]["lr"])
        loss, values = train_step(network, batch, optimizer)
        for name, value in {"loss": loss, **values}.items():
            logged.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)
        samples.append(len(batch[0]))
        scheduler.step()
        if step % STEPS_BETWEEN_CHECKS == 0:
            _check_finite(float(loss.detach()), epoch)
    columns = {
        name: torch.stack([torch.as_tensor(value) for value in column]).cpu()
        for name, column in logged.items()
    }
    means = {f"train_{name}": float(np.average(column, weights=samples)) for name, column in columns.items()}
    _check_finite(means["train_loss"], epoch)
    return {"learning_rate": learning_rate, **means}


class _Track:
    """What a tracked training leaves behind; see `train`."""

    def __init__(
        self, directory: Path, save_every: int | None, scored_epoch: str | int, signature: str
    ) -> None:
        self.directory, self.signature = directory, signature
        self.save_every, self.scored_epoch = save_every, scored_epoch
        self.events: SummaryWriter | None = None

    def begin(self, network: nn.Module) -> None:
        write_json(self.directory / "settings.json", json.loads(self.signature))
        self._save(network, "first")

    def add(self, network: nn.Module, history: list[dict[str, float]]) -> None:
        epoch = int(history[-1]["epoch"])
        if (self.save_every and epoch % self.save_every == 0) or epoch == self.scored_epoch:
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
        self._save(network, "last")
        if self.scored_epoch != "last":
            load_weights(network, checkpoint_path(self.directory, self.scored_epoch), self.signature)
        if self.events is not None:
            self.events.close()

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
    if (Path(directory) / "history.csv").exists():
        found[int(pd.read_csv(Path(directory) / "history.csv").epoch.iloc[-1])] = checkpoint_path(
            directory, "last"
        )
    return {epoch: path for epoch, path in sorted(found.items()) if path.exists()}


def _parts(batch: Batch, size: int | None) -> Iterable[Batch]:
    return [batch] if size is None else zip(*(tensor.split(size) for tensor in batch), strict=True)


def _check_finite(loss: float, epoch: int) -> None:
    if not np.isfinite(loss):
        raise InputError(
            f"The training loss became {loss} in epoch {epoch}, expected a finite number; lower learning_rate, "
            "or look for broken images."
        )


def _restore(parts: Mapping[str, Any], path: Path, signature: str) -> list[dict[str, float]]:
    """Put an interrupted training's state into network, optimizer and scheduler; its history."""
    problem = f"The state of an interrupted training {path} is unreadable; delete this file to start the training again."
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["signature"]
    except Exception:  # a damaged file shows up as nearly any type
        raise InputError(problem) from None
    _refuse_other_training(found, signature, path)
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return list(state["history"])
    except (KeyError, ValueError, RuntimeError, TypeError):
        raise InputError(problem) from None


def save_weights(network: nn.Module, path: Path, signature: str) -> None:
    """Write the state dict of a training, atomically."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(weights, temporary, metadata={"training": signature})


def load_weights(network: nn.Module, path: Path, signature: str | None = None) -> None:
    """Load weights that a training has saved; with `signature` those of this training alone.

    Raises
    ------
    InputError : unreadable, of another training, or of another network
    """
    problem = f"The weights of a training {path} are unreadable; delete this file to train again."
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("training", "{}")
        weights = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError):
        raise InputError(problem) from None
    if signature is not None:
        _refuse_other_training(found, signature, path)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} holds the weights of another network ({reason}); use another directory."
        ) from None


def _refuse_other_training(found: str, expected: str, path: Path) -> None:
    if found != expected:
        there, here = json.loads(found), json.loads(expected)
        different = [
            f"{name} {there.get(name)} instead of {here.get(name)}"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        raise InputError(
            f"{path} belongs to a training with {', '.join(different)}; use another directory or delete this file."
        )
