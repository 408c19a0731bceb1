"""Fine-tuning a backbone with a new head by the recipe of BiT; MOS and DFB share it.

Source: Kolesnikov et al., ECCV 2020, arXiv 1912.11370, section 3.3.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ood_helpers.backbones.base import Classifier
from ood_helpers.data.transforms import Transform
from ood_helpers.errors import InputError
from ood_helpers.training import loop
from ood_helpers.training.recipes import FineTuningRecipe

EVALUATIONS = 20  # validations and saved states of a fine-tuning

Load = Callable[[Tensor, torch.Generator], tuple[Tensor, ...]]
Evaluate = Callable[[nn.Module], dict[str, float]]
Size = tuple[int, int]


def learning_rate_at(step: int, base: float, schedule: tuple[int, ...]) -> float:
    """Learning rate of a step (from 0): base * step / warm-up before the warm-up ends, then base, a tenth of it after
    each drop. A drop acts on the steps after it.

    schedule [5]: end of the warm-up, three drops, end of the training; in steps
    """
    warm_up, *drops, _ = schedule
    return base * step / warm_up if step < warm_up else base * 0.1 ** sum(step > drop for drop in drops)


def zero_head(feature_dim: int, num_logits: int) -> nn.Linear:
    """A linear layer with weight and bias 0; torch's random state stays as it is."""
    head = nn.utils.skip_init(nn.Linear, feature_dim, num_logits)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def reorder(head: nn.Linear, columns: Tensor) -> None:
    """Move output i of a head to column columns[i]."""
    with torch.no_grad():
        for values in (head.weight, head.bias):
            values[columns] = values.clone()


def mixup(
    inputs: Tensor, labels: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lambda x + (1 - lambda) x[partner], with one lambda ~ Beta(alpha, alpha) for the batch.

    Source: Zhang et al., ICLR 2018, arXiv 1710.09412.

    Returns
    -------
    mixed inputs [B, ...], labels [B] or of each pixel [B, H, W], those of the partners, lambda [B] (the same for all)
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    partner = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    mixed = share * inputs + (1 - share) * inputs[partner]
    return mixed, labels, labels[partner], torch.full((len(inputs),), share, device=inputs.device)


def freeze_but(network: Classifier, depth: int) -> None:
    """Freeze all of a network but its head and its last `depth` blocks."""
    network.requires_grad_(False)
    for parameter in (*network.last_parameters(depth), *network.head.parameters()):
        parameter.requires_grad_(True)


def training_geometry(transform: Transform, recipe: FineTuningRecipe) -> tuple[Transform, Size | None]:
    """The transform of training images before the random crop, and the size [height, width] of that crop."""
    resize = None if recipe.images is None else recipe.images.resize
    if resize is None:
        return transform, None
    if not transform.fixes_size():
        raise InputError(
            f"Found resize {list(resize)} for training but a transform that does not fix the size of the images, "
            "expected one to crop to; give the transform a crop or a resize [height, width]."
        )
    size = (transform.crop, transform.crop) if transform.crop else tuple(transform.resize)
    if any(side < cropped for side, cropped in zip(resize, size)):
        raise InputError(
            f"Training images are resized to {list(resize)}, expected at least the size of the transform, "
            f"{list(size)}, which is cropped from them; enlarge resize."
        )
    return transform.model_copy(update={"resize": resize, "crop": None}), size


def train_by_recipe(
    network: nn.Module,
    load: Load,
    logits_of: Callable[[nn.Module, Tensor], Tensor],
    losses_of: Callable[[Tensor, Tensor], Tensor],
    values_of: Callable[..., dict[str, Tensor]],
    validate: Evaluate | None,
    images: int,
    recipe: FineTuningRecipe,
    *,
    seed: int,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """The recipe's order of images, mixup, schedule and evaluations for any loss; further options as of
    `ood_helpers.training.loop.train`.

    Parameters
    ----------
    load : (rows, generator) -> inputs [B, ...], labels [B, ...] and further tensors [B, ...], all on `device`
    logits_of : (network, inputs) -> logits [B, L, ...]
    losses_of : (logits, labels) -> loss of each image [B]; with mixup called for the labels of both
    values_of : (detached logits, labels, *further tensors) -> values to log, with mixup for the first image's
    images : number of training images
    settings : what the result depends on beside the recipe's own
    """
    schedule, alpha = recipe.steps(images), recipe.mixup_alpha(images)
    steps, batches = schedule[-1], math.ceil(images / recipe.batch_size)
    between = math.ceil(steps / EVALUATIONS)

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(images))

    def epoch_batches(number: int, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        """The batches between two evaluations; the last, short batch of the training images is kept."""
        for step in range((number - 1) * between, min(number * between, steps)):
            epoch, batch = divmod(step, batches)
            rows = order(epoch)[batch * recipe.batch_size : (batch + 1) * recipe.batch_size]
            inputs, labels, *further = load(rows, generator)
            mixed = mixup(inputs, labels, alpha, generator) if alpha else (inputs, labels)
            yield *mixed, *further

    def loss_function(network: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, labels, *further = batch
        logits = logits_of(network, inputs)
        losses = losses_of(logits, labels)
        if alpha:
            partners, share, *further = further
            losses = share * losses + (1 - share) * losses_of(logits, partners)
        return losses.mean(), values_of(logits.detach(), labels, *further)

    rate = functools.partial(learning_rate_at, base=recipe.learning_rate, schedule=schedule)
    facts = {"images": images, "mixup": alpha, "schedule": schedule, **(settings or {})}
    return loop.train(
        network,
        epoch_batches,
        loop.descent(loss_function, None if recipe.images is None else recipe.images.micro_batch_size),
        loop.Schedule.of(recipe, between, steps, shape=rate, nesterov=False),
        train_mode=nn.Module.eval,
        seed=seed,
        validate=validate,
        settings=recipe.settings() | facts,
        unit="evaluation",
        **options,
    )
