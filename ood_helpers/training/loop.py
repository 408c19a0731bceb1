"""The training loop that every training method shares: SGD, a schedule a step, resumable bit for bit."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ood_helpers.config import FineTuningConfig, TrainingConfig
from ood_helpers.errors import InputError
from ood_helpers.files import atomic_path, write_text
from ood_helpers.progress import track

Batch = tuple[Tensor, ...]
EpochBatches = Callable[[int, torch.Generator], Iterable[Batch]]
LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, Mapping[str, Tensor | float]]]
Validation = Callable[[nn.Module], Mapping[str, float]]
LearningRate = Callable[[int], float]

TRAINING_VERSION = 1  # raise it when the same settings and images give other weights
STEPS_BETWEEN_CHECKS = 50  # looking at the loss waits for the GPU


def finished(directory: Path) -> bool:
    """Whether a training in this directory has ended, so that its weights would be loaded."""
    return (directory / "weights.safetensors").exists() and (directory / "history.csv").exists()


def train(
    network: nn.Module,
    epoch_batches: EpochBatches,
    loss_function: LossFunction,
    config: TrainingConfig | FineTuningConfig,
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
    nesterov : Nesterov momentum; without effect at momentum 0
    settings : what else (JSON values) the result depends on; a directory with other settings is refused

    Returns
    -------
    One row an epoch: epoch (from 1), step (number of steps so far), learning_rate (of its last step), train_loss and
    train_<value>, validation_<value>.

    Raises
    ------
    InputError : the loss is not finite, nothing to train, or the directory holds unreadable files or
        another training
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
        _load_weights(network, weights_path, signature)
        state_path.unlink(missing_ok=True)
        network.eval()
        return pd.read_csv(history_path)

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
    history: list[dict[str, float]] = _restore(parts, state_path, signature) if state_path.exists() else []

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
            step = min(epoch * steps_per_epoch, steps)
            train_mode(network)
            trained = _train_epoch(
                network,
                batches,
                loss_function,
                optimizer,
                scheduler,
                steps=step - (epoch - 1) * steps_per_epoch,
                micro_batch_size=micro_batch_size,
                epoch=epoch,
            )
            network.eval()
            with torch.no_grad():
                validated = validate(network) if validate is not None else {}
            history.append(
                {
                    "epoch": epoch,
                    "step": step,
                    **trained,
                    **{f"validation_{name}": float(value) for name, value in validated.items()},
                }
            )
            state = {name: part.state_dict() for name, part in parts.items()}
            with atomic_path(state_path) as temporary:
                torch.save({**state, "history": history, "signature": signature}, temporary)
            shown = {
                name.removeprefix("train_"): history[-1][name]
                for name in trained
                if name.startswith("train_")
            }
            bar.set_postfix(shown, refresh=False)
            bar.update()

    write_text(history_path, pd.DataFrame(history).to_csv(index=False))
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with atomic_path(weights_path) as temporary:
        safetensors.torch.save_file(weights, temporary, metadata={"training": signature})
    state_path.unlink(missing_ok=True)
    network.eval()
    return pd.read_csv(history_path)


def _schedule(
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig | FineTuningConfig,
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


def _train_epoch(
    network: nn.Module,
    batches: Iterable[Batch],
    loss_function: LossFunction,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    *,
    steps: int,
    micro_batch_size: int | None,
    epoch: int,
) -> dict[str, float]:
    """One epoch: the learning rate of its last step, and the means of the loss and the logged values."""
    logged: dict[str, list[float | Tensor]] = {}
    samples = []
    for step, batch in zip(range(1, steps + 1), batches, strict=True):
        optimizer.zero_grad(set_to_none=True)
        for part in _parts(batch, micro_batch_size):
            loss, values = loss_function(network, part)
            (loss * (len(part[0]) / len(batch[0]))).backward()
            for name, value in {"loss": loss, **values}.items():
                logged.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)
            samples.append(len(part[0]))
        learning_rate = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
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


def _load_weights(network: nn.Module, path: Path, signature: str) -> None:
    """Load the weights of a finished training."""
    problem = f"The weights of a finished training {path} are unreadable; delete this file to train again."
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("training", "{}")
        weights = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError):
        raise InputError(problem) from None
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
