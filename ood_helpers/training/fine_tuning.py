"""Fine-tuning a backbone with a new head, a flat or a group softmax: the training of MOS.

Source: Huang and Li, "MOS", CVPR 2021, arXiv 2105.01879, section 3; the recipe is that of BiT (Kolesnikov et al., ECCV
2020, arXiv 1912.11370, section 3.3) for data sets of this size.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ood_helpers.backbones import Classifier
from ood_helpers.config import FineTuningConfig
from ood_helpers.data import ImageSet, Transform
from ood_helpers.errors import InputError
from ood_helpers.features import Bank
from ood_helpers.groups import Groups, classify
from ood_helpers.training import loop
from ood_helpers.training.classifier import (
    augment,
    check_labels,
    evaluate,
    evaluate_logits,
    load_images,
    softmax_losses,
    to_network,
)

MANY, VERY_MANY = 20_000, 500_000  # training images from which BiT's recipe takes more steps
EVALUATIONS = 20  # validations and saved states of a fine-tuning

Load = Callable[[Tensor, torch.Generator], tuple[Tensor, ...]]
Logits = Callable[[nn.Module, Tensor], Tensor]
Losses = Callable[[Tensor, Tensor], Tensor]
Values = Callable[..., dict[str, Tensor]]
Evaluate = Callable[[nn.Module], dict[str, float]]


def default_schedule(images: int) -> tuple[int, ...]:
    """The steps at which the warm-up ends, the learning rate drops (three times) and the training ends."""
    if images >= VERY_MANY:
        return 500, 6000, 12000, 18000, 20000
    return (500, 3000, 6000, 9000, 10000) if images >= MANY else (100, 200, 300, 400, 500)


def mixup_alpha(config: FineTuningConfig, images: int) -> float:
    """The alpha of mixup, 0 for none: the config's, else 0.1 from 20,000 training images."""
    return (0.1 if images >= MANY else 0.0) if config.mixup is None else config.mixup


def exact_on_features(config: FineTuningConfig, images: int) -> bool:
    """Whether a training on features gives the head that a training on images gives: only the head is trained, on
    images that are always the same."""
    changed = config.resize or config.crop_padding or config.flip or mixup_alpha(config, images)
    return config.depth == 0 and not changed


def approximation(config: FineTuningConfig, images: int) -> str:
    """What makes a training on features another one than on images; empty where nothing does."""
    exact = config.checkpoint is not None or config.inputs == "images" or exact_on_features(config, images)
    return "" if exact else "mixup of features instead of images"


def learning_rate_at(step: int, base: float, schedule: tuple[int, ...]) -> float:
    """Learning rate of a step (from 0): base * step / warm-up before the warm-up ends, then base, a tenth of it after
    each drop. A drop acts on the steps after it.

    schedule [5]: end of the warm-up, three drops, end of the training; in steps
    """
    warm_up, *drops, _ = schedule
    return base * step / warm_up if step < warm_up else base * 0.1 ** sum(step > drop for drop in drops)


def zero_head(feature_dim: int, num_classes: int, groups: Groups | None) -> nn.Linear:
    """A linear layer of C outputs, or C + K for a group softmax, with weight and bias 0."""
    head = nn.Linear(feature_dim, num_classes if groups is None else groups.num_logits)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def mixup(
    inputs: Tensor, labels: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lambda x + (1 - lambda) x[partner], with one lambda ~ Beta(alpha, alpha) for the batch.

    Source: Zhang et al., ICLR 2018, arXiv 1710.09412.

    Returns
    -------
    mixed inputs [B, ...], labels [B] or of each pixel [B, H, W], those of the partners, lambda [B] (the same for all)
    """
    beta = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    share = float(beta.beta(alpha, alpha))
    partner = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    mixed = share * inputs + (1 - share) * inputs[partner]
    return mixed, labels, labels[partner], torch.full((len(inputs),), share, device=inputs.device)


def train_head(
    head: nn.Linear,
    train: Callable[[], Bank],
    validation: Callable[[], Bank] | None,
    images: int,
    config: FineTuningConfig,
    groups: Groups | None,
    *,
    seed: int,
    device: str | torch.device,
    directory: Path,
) -> pd.DataFrame:
    """Train a head on the features of a bank; parameters and history as `fine_tune`.

    `train` and `validation` give the banks and are not called when the training is finished; else all features of the
    `images` training images are held in memory.
    """

    @functools.cache
    def samples() -> tuple[Tensor, Tensor]:
        shards = list(train().shards())
        features = torch.cat([shard.features for shard in shards])
        return features.to(device), torch.cat([shard.labels for shard in shards]).to(device)

    def load(rows: Tensor, _generator: torch.Generator) -> tuple[Tensor, Tensor]:
        features, labels = samples()
        rows = rows.to(device)
        return features[rows], labels[rows]

    def validate(head: nn.Module) -> dict[str, float]:
        shards = validation().shards()
        return evaluate_logits(
            ((head(shard.features.to(device)), shard.labels.to(device)) for shard in shards), groups
        )

    return _train_softmax(
        head,
        load,
        None if validation is None else validate,
        images,
        config,
        groups,
        seed=seed,
        device=device,
        directory=directory,
    )


def fine_tune(
    network: Classifier,
    train: ImageSet,
    validation: ImageSet | None,
    transform: Transform,
    config: FineTuningConfig,
    groups: Groups | None,
    *,
    seed: int,
    device: str | torch.device,
    directory: Path,
) -> pd.DataFrame:
    """Train the head of `network` and its last `config.depth` blocks on images; see `ood_helpers.training.loop.train`.

    All of the network stays in eval mode, so that the statistics of batch norm are those of the backbone at every depth
    and for every micro-batch. Resumed where it was interrupted, and not repeated when it is finished.

    Parameters
    ----------
    network : the backbone with a head of C outputs, or C + K with `groups`; all other parameters are frozen
    groups : of a group softmax; None = flat
    directory : for weights.safetensors and history.csv

    Returns
    -------
    One row for each of about 20 evaluations: epoch (its number), step, learning_rate, train_loss, train_accuracy,
    validation_loss, validation_accuracy (without a validation set neither); accuracies in percent. The training's
    accuracy is that of the mixed inputs, of their first label.

    Raises
    ------
    InputError : no labels, more blocks than there are, a crop larger than the images, or a loss that is not finite
    """
    for image_set in (train, *([] if validation is None else [validation])):
        check_labels(image_set, network.head.out_features if groups is None else groups.num_classes)
    freeze_but(network, config.depth)
    geometry, size = training_geometry(transform, config)

    def load(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images = load_images(train, geometry, rows)
        images = augment(images, config.crop_padding, config.flip, generator, size)
        return to_network(images, train, rows, transform, device)

    def validate(network: nn.Module) -> dict[str, float]:
        batch_size = config.micro_batch_size or config.batch_size
        return evaluate(network, validation, transform, batch_size, device, groups)

    history = _train_softmax(
        network,
        load,
        None if validation is None else validate,
        len(train),
        config,
        groups,
        seed=seed,
        device=device,
        directory=directory,
    )
    network.requires_grad_(True)
    return history


def freeze_but(network: Classifier, depth: int) -> None:
    """Freeze all of a network but its head and its last `depth` blocks."""
    network.requires_grad_(False)
    for parameter in (*network.last_parameters(depth), *network.head.parameters()):
        parameter.requires_grad_(True)


def training_geometry(
    transform: Transform, config: FineTuningConfig
) -> tuple[Transform, tuple[int, int] | None]:
    """The transform of training images before the random crop, and the size [height, width] of that crop."""
    if config.resize is None:
        return transform, None
    if not transform.fixes_size():
        raise InputError(
            f"Found resize {list(config.resize)} for training but a transform that does not fix the size of the images, "
            "expected one to crop to; give the transform a crop or a resize [height, width]."
        )
    size = (transform.crop, transform.crop) if transform.crop else tuple(transform.resize)
    if any(side < cropped for side, cropped in zip(config.resize, size)):
        raise InputError(
            f"Training images are resized to {list(config.resize)}, expected at least the size of the transform, "
            f"{list(size)}, which is cropped from them; enlarge resize."
        )
    return transform.model_copy(update={"resize": config.resize, "crop": None}), size


def _train_softmax(
    network: nn.Module,
    load: Load,
    validate: Evaluate | None,
    images: int,
    config: FineTuningConfig,
    groups: Groups | None,
    **options: Any,
) -> pd.DataFrame:
    def accuracy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"accuracy": 100 * (classify(logits, groups) == labels).float().mean()}

    return train_by_recipe(
        network,
        load,
        nn.Module.__call__,
        lambda logits, labels: softmax_losses(logits, labels, groups),
        accuracy,
        validate,
        images,
        config,
        description=f"Fine-tuning a {'flat' if groups is None else 'group'} softmax",
        **options,
    )


def train_by_recipe(
    network: nn.Module,
    load: Load,
    logits_of: Logits,
    losses_of: Losses,
    values_of: Values,
    validate: Evaluate | None,
    images: int,
    config: FineTuningConfig,
    *,
    seed: int,
    device: str | torch.device,
    directory: Path,
    description: str,
    settings: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """The recipe's order of images, mixup, schedule and evaluations for any loss; see `ood_helpers.training.loop.train`.

    Parameters
    ----------
    load : (rows, generator) -> inputs [B, ...], labels [B, ...] and further tensors [B, ...], all on `device`
    logits_of : (network, inputs) -> logits [B, L, ...]
    losses_of : (logits, labels) -> loss of each image [B]; with mixup called for the labels of both
    values_of : (detached logits, labels, *further tensors) -> values to log, with mixup for the first image's
    images : number of training images
    settings : what the result depends on beside the recipe's own
    """
    schedule, alpha = config.schedule or default_schedule(images), mixup_alpha(config, images)
    steps, batches = schedule[-1], math.ceil(images / config.batch_size)
    between = math.ceil(steps / EVALUATIONS)

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(images))

    def epoch_batches(number: int, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        """The batches between two evaluations; the last, short batch of the training images is kept."""
        for step in range((number - 1) * between, min(number * between, steps)):
            epoch, batch = divmod(step, batches)
            rows = order(epoch)[batch * config.batch_size : (batch + 1) * config.batch_size]
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

    return loop.train(
        network,
        epoch_batches,
        loss_function,
        config,
        steps_per_epoch=between,
        steps=steps,
        learning_rate=lambda step: learning_rate_at(step, config.learning_rate, schedule),
        micro_batch_size=config.micro_batch_size,
        train_mode=nn.Module.eval,
        seed=seed,
        device=device,
        directory=directory,
        validate=validate,
        nesterov=False,
        settings={"images": images, "mixup": alpha, "schedule": schedule, **(settings or {})},
        description=description,
        unit="evaluation",
    )
