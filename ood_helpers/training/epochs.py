"""Continuing the training of the backbone by epochs, as Unleashing Mask and outlier exposure do."""

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

import pandas as pd
from torch import nn

from ood_helpers.training import loop
from ood_helpers.training.batches import steps_per_epoch
from ood_helpers.training.recipes import EpochTrainingRecipe


def learning_rate_of_epoch(epoch: int, recipe: EpochTrainingRecipe) -> float:
    """Learning rate of an epoch (from 0): lr (1 + cos(pi e / E)) / 2, the same for all its steps.

    In W warm-up epochs lr (e + 1) / W, and then the cosine over the other E - W.
    """
    warm_up = recipe.warmup_epochs
    if epoch < warm_up:
        return recipe.learning_rate * (epoch + 1) / warm_up
    done = (epoch - warm_up) / (recipe.epochs - warm_up)
    return recipe.learning_rate * (1 + math.cos(math.pi * done)) / 2


def epoch_steps(recipe: EpochTrainingRecipe, images: int) -> int:
    """Batches in an epoch: all of the training images, or the first `steps_per_epoch` of them."""
    steps = steps_per_epoch(images, recipe.batch_size)
    return steps if recipe.steps_per_epoch is None else min(recipe.steps_per_epoch, steps)


def train_epochs(
    network: nn.Module,
    epoch_batches: loop.EpochBatches,
    step: loop.Step,
    recipe: EpochTrainingRecipe,
    images: int,
    validate: loop.Validation | None,
    *,
    settings: Mapping[str, Any],
    **options: Any,
) -> pd.DataFrame:
    """The schedule and the tracking of a recipe for any step; further options as of `ood_helpers.training.loop.train`.

    Parameters
    ----------
    epoch_batches : may give more batches than an epoch has steps
    images : number of ID training images
    settings : what the result depends on beside the recipe's own
    """
    steps = epoch_steps(recipe, images)

    def rate(step: int) -> float:
        return learning_rate_of_epoch(step // steps, recipe)

    return loop.train(
        network,
        lambda epoch, generator: islice(epoch_batches(epoch, generator), steps),
        step,
        loop.Schedule.of(recipe, steps, recipe.epochs * steps, shape=rate, nesterov=recipe.nesterov),
        validate=validate,
        tracking=loop.Tracking(recipe.save_every, recipe.scored_epoch),
        settings={**recipe.settings(), "images": images, **settings},
        **options,
    )
