"""Unleashing Mask: fine-tuning a trained classifier until its loss is back at a constraint, so that it forgets the atypical
images that it had memorised; by its weights (UM) or by a mask over them (UMAP, "UM adopts pruning").

Source: Zhu et al., "Unleashing Mask: Explore the Intrinsic Out-of-Distribution Detection Capability", ICML 2023, arXiv
2306.03715. The loss |beta c - u| + u is the flooding of Ishida et al., ICML 2020, arXiv 2002.08709.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ood_helpers.backbones import Classifier
from ood_helpers.config import EpochTrainingConfig, LossConstraintConfig, UnleashingMaskConfig
from ood_helpers.data import ImageSet, Transform
from ood_helpers.errors import InputError
from ood_helpers.progress import track
from ood_helpers.training import loop
from ood_helpers.training.classifier import (
    augmented_batches,
    check_labels,
    evaluate,
    percent_correct,
    steps_per_epoch,
)
from ood_helpers.training.weight_masks import attach_masks, freeze_weights, masks_of, random_masks

ESTIMATE_VERSION = 1  # raise it when the same network and images give another loss constraint


@dataclass(frozen=True)
class LossConstraint:
    """The mean cross-entropy of a network on its training images: under each draw of random masks, and without any.

    Attributes
    ----------
    draws : mean cross-entropy in nats, one a draw
    unmasked : mean cross-entropy of the network as it is
    keep_rate : share of each layer's weights that the masks keep
    """

    draws: tuple[float, ...]
    unmasked: float
    keep_rate: float

    @property
    def mean(self) -> float:
        """u, the loss constraint."""
        return float(np.mean(self.draws))

    @property
    def std(self) -> float:
        """Standard deviation over the draws; NaN of a single one."""
        return float(np.std(self.draws, ddof=1)) if len(self.draws) > 1 else math.nan


def um_loss(cross_entropy: Tensor, constraint: float, beta: float = 1.0) -> Tensor:
    """|beta c - u| + u of a batch's mean cross-entropy c: descent on c above the constraint u, ascent below it.

    The gradient is sign(beta c - u) beta dc, with sign(0) = 0. Of the batch mean, not of each sample.

    Parameters
    ----------
    cross_entropy : c, a scalar in nats
    constraint : u, in nats; with 0 the loss is beta c

    Source: arXiv 2306.03715, section 3.3
    """
    return (beta * cross_entropy - constraint).abs() + constraint


class IDLoss:
    """The loss of a batch of ID images as a recipe has it: mean cross-entropy c, or with UM |beta c - u| + u.

    Parameters
    ----------
    constraint : u in nats; None without UM

    Raises
    ------
    InputError : a constraint without the objective of UM, which it would not act on, or UM without a constraint
    """

    def __init__(self, config: EpochTrainingConfig, constraint: float | None) -> None:
        if (config.id_loss == "um") != (constraint is not None):
            found = "no loss constraint" if constraint is None else f"the loss constraint {constraint:g}"
            raise InputError(
                f"Found {found} with id_loss: {config.id_loss}, expected a constraint with um and none without; change one."
            )
        self.config, self.constraint = config, constraint

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of logits [B, C] and labels [B]; and the unflooded cross_entropy, the accuracy in percent and, with UM,
        whether the batch is in ascent, 100 or 0, to be logged."""
        cross_entropy = F.cross_entropy(logits, labels)
        values = {"cross_entropy": cross_entropy.detach(), "accuracy": percent_correct(logits, labels)}
        if self.constraint is None:
            return cross_entropy, values
        values["ascending"] = 100 * (self.config.beta * values["cross_entropy"] < self.constraint).float()
        return um_loss(cross_entropy, self.constraint, self.config.beta), values


def estimate_constraint(
    network: Classifier,
    image_set: ImageSet,
    transform: Transform,
    config: LossConstraintConfig,
    *,
    batch_size: int,
    device: str | torch.device,
) -> LossConstraint:
    """The mean cross-entropy of a trained network on a labelled set while random masks drop some of every layer's weights.

    All images count equally; batch norm uses its statistics, images are not augmented, the draws are seeded.

    Raises
    ------
    InputError : no labels, labels outside 0 .. C - 1, or a loss that is not finite

    Source: arXiv 2306.03715, section 3.2. The public code takes one unseeded draw, on augmented images.
    """
    check_labels(image_set, network.num_classes)
    generator = torch.Generator().manual_seed(config.seed)

    def mean_loss() -> float:
        loss = evaluate(network, image_set, transform, batch_size, device)["loss"]
        if not math.isfinite(loss):
            raise InputError(
                f"The mean cross-entropy of {image_set.name} is {loss}, expected a finite number; check the network's weights."
            )
        return loss

    draws = []
    for _ in track(range(config.draws), description="Loss constraint", unit="draw"):
        with random_masks(network, config.keep_rate, generator, config.rounding):
            draws.append(mean_loss())
    return LossConstraint(tuple(draws), mean_loss(), config.keep_rate)


def learning_rate_of_epoch(epoch: int, config: EpochTrainingConfig) -> float:
    """Learning rate of an epoch (from 0): lr (1 + cos(pi e / E)) / 2, the same for all its steps.

    In W warm-up epochs lr (e + 1) / W, and then the cosine over the other E - W.
    """
    warm_up = config.warmup_epochs
    if epoch < warm_up:
        return config.learning_rate * (epoch + 1) / warm_up
    done = (epoch - warm_up) / (config.epochs - warm_up)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def epoch_steps(config: EpochTrainingConfig, images: int) -> int:
    """Batches in an epoch: all of the training images, or the first `steps_per_epoch` of them."""
    steps = steps_per_epoch(images, config.batch_size)
    return steps if config.steps_per_epoch is None else min(config.steps_per_epoch, steps)


def prepare_masks(network: nn.Module, config: UnleashingMaskConfig, seed: int) -> None:
    """Give a network the masks that a recipe trains, with seeded scores; none without a keep rate."""
    if config.keep_rate is None:
        return
    options = {"initial_scores": config.initial_scores, "rounding": config.rounding}
    attach_masks(network, config.keep_rate, torch.Generator().manual_seed(seed), **options)
    if config.freeze_weights:
        freeze_weights(network)


def unleash(
    network: Classifier,
    train: ImageSet,
    validation: ImageSet | None,
    transform: Transform,
    config: UnleashingMaskConfig,
    constraint: float | None,
    *,
    seed: int,
    device: str | torch.device,
    directory: Path,
) -> pd.DataFrame:
    """Train a classifier on, by UM, or with a keep rate by UMAP; see `ood_helpers.training.loop.train`.

    Dropout and batch norm are in train mode. Resumed where it was interrupted, and not repeated when it is finished.

    Parameters
    ----------
    network : trained already; with a keep rate it has the masks of `prepare_masks`
    constraint : u in nats; None without UM

    Returns
    -------
    One row an epoch: epoch, step, learning_rate, train_loss (with UM the flooded one), train_cross_entropy,
    train_accuracy, with UM train_ascending (percent of the images, in batches that ascend), and with a validation set validation_loss
    (cross-entropy) and validation_accuracy; accuracies in percent.

    Raises
    ------
    InputError : no labels, labels outside 0 .. C - 1, a constraint without UM or the reverse, masks without a keep rate or
        the reverse, or a loss that is not finite
    """
    for image_set in (train, *([] if validation is None else [validation])):
        check_labels(image_set, network.num_classes)
    id_loss = IDLoss(config, constraint)
    if bool(masks_of(network)) != (config.keep_rate is not None):
        raise InputError(
            f"Found a network {'with' if masks_of(network) else 'without'} masks and keep_rate {config.keep_rate}, expected masks "
            "where there is a keep rate; call prepare_masks."
        )

    def epoch_batches(_epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        return augmented_batches(train, transform, config, generator, device)

    def loss_function(network: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch
        return id_loss(network(images), labels)

    def validate(network: nn.Module) -> dict[str, float]:
        return evaluate(network, validation, transform, config.batch_size, device)

    objective = "UM" if constraint is not None else "cross-entropy"
    return train_epochs(
        network,
        epoch_batches,
        config,
        len(train),
        None if validation is None else validate,
        constraint=constraint,
        loss_function=loss_function,
        seed=seed,
        device=device,
        directory=directory,
        description=f"Fine-tuning {'weights' if config.keep_rate is None else 'masks'} with {objective}",
    )


def train_epochs(
    network: nn.Module,
    epoch_batches: loop.EpochBatches,
    config: EpochTrainingConfig,
    images: int,
    validate: loop.Validation | None,
    *,
    constraint: float | None,
    loss_function: loop.LossFunction | None = None,
    step: loop.Step | None = None,
    state: loop.Stateful | None = None,
    seed: int,
    device: str | torch.device,
    directory: Path,
    description: str,
    settings: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """The schedule and the tracking of an EpochTrainingConfig for any loss or step; see `ood_helpers.training.loop.train`.

    Parameters
    ----------
    epoch_batches : may give more batches than an epoch has steps
    images : number of ID training images
    constraint : u, on which the weights depend, too
    """
    steps = epoch_steps(config, images)

    def limited(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        return islice(epoch_batches(epoch, generator), steps)

    def learning_rate(number: int) -> float:
        return learning_rate_of_epoch(number // steps, config)

    return loop.train(
        network,
        limited,
        loss_function,
        config,
        steps_per_epoch=steps,
        learning_rate=learning_rate,
        step=step,
        state=state,
        tracked=True,
        save_every=config.save_every,
        scored_epoch=config.scored_epoch,
        nesterov=config.nesterov,
        seed=seed,
        device=device,
        directory=directory,
        validate=validate,
        settings={"images": images, "constraint": constraint, **(settings or {})},
        description=description,
    )
