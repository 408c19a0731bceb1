"""Fine-tuning with a flat or a group softmax: the training of MOS.

Source: Huang and Li, "MOS", CVPR 2021, arXiv 2105.01879, section 3.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ood_helpers.backbones.base import Classifier
from ood_helpers.banks import Bank
from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.transforms import Transform
from ood_helpers.mos.groups import Groups
from ood_helpers.mos.recipe import ClassifierRecipe
from ood_helpers.training import batches
from ood_helpers.training.fine_tuning import Evaluate, Load, freeze_but, train_by_recipe, training_geometry


def train_head(
    head: nn.Linear,
    train: Callable[[], Bank],
    validation: Callable[[], Bank] | None,
    images: int,
    recipe: ClassifierRecipe,
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
        return features[rows.to(device)], labels[rows.to(device)]

    def validate(head: nn.Module) -> dict[str, float]:
        shards = validation().shards()
        pairs = ((head(shard.features.to(device)), shard.labels.to(device)) for shard in shards)
        return batches.evaluate_logits(pairs, groups or batches.FLAT)

    where = {"seed": seed, "device": device, "directory": directory}
    validate = None if validation is None else validate
    return _train_softmax(head, load, validate, images, recipe, groups, **where)


def fine_tune(
    network: Classifier,
    train: ImageSet,
    validation: ImageSet | None,
    transform: Transform,
    recipe: ClassifierRecipe,
    groups: Groups | None,
    *,
    seed: int,
    device: str | torch.device,
    directory: Path,
) -> pd.DataFrame:
    """Train the head of `network` and its last `recipe.images.depth` blocks on images; see `ood_helpers.training.loop.train`.

    All of the network stays in eval mode, so that the statistics of batch norm are those of the backbone at every depth
    and for every micro-batch.

    Parameters
    ----------
    network : the backbone with a head of C outputs, or C + K with `groups`; all other parameters are frozen
    groups : of a group softmax; None = flat

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
        batches.check_labels(image_set, network.head.out_features if groups is None else groups.num_classes)
    freeze_but(network, recipe.depth)
    geometry, size = training_geometry(transform, recipe)
    options = recipe.images

    def load(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images = batches.load_images(train, geometry, rows)
        images = batches.augment(images, options.crop_padding, options.flip, generator, size)
        return batches.to_network(images, train, rows, transform, device)

    def validate(network: nn.Module) -> dict[str, float]:
        batch_size = options.micro_batch_size or recipe.batch_size
        return batches.evaluate(network, validation, transform, batch_size, device, groups or batches.FLAT)

    where = {"seed": seed, "device": device, "directory": directory}
    validate = None if validation is None else validate
    history = _train_softmax(network, load, validate, len(train), recipe, groups, **where)
    network.requires_grad_(True)
    return history


def _train_softmax(
    network: nn.Module,
    load: Load,
    validate: Evaluate | None,
    images: int,
    recipe: ClassifierRecipe,
    groups: Groups | None,
    **options: Any,
) -> pd.DataFrame:
    softmax = groups or batches.FLAT
    options |= {"description": f"Fine-tuning a {'flat' if groups is None else 'group'} softmax"}

    def accuracy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"accuracy": 100 * (softmax.classify(logits) == labels).float().mean()}

    return train_by_recipe(
        network, load, nn.Module.__call__, softmax.losses, accuracy, validate, images, recipe, **options
    )
