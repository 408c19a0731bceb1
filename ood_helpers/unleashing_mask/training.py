"""Unleashing Mask: fine-tuning a trained classifier until its loss is back at a constraint, so that it forgets the atypical
images that it had memorised; by its weights (UM) or by a mask over them (UMAP, "UM adopts pruning").

Source: Zhu et al., "Unleashing Mask: Explore the Intrinsic Out-of-Distribution Detection Capability", ICML 2023, arXiv
2306.03715.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from ood_helpers.backbones.base import Classifier
from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.transforms import Transform
from ood_helpers.errors import InputError
from ood_helpers.training import loop
from ood_helpers.training.batches import augmented_batches, check_labels, evaluate
from ood_helpers.training.epochs import train_epochs
from ood_helpers.unleashing_mask.loss_constraint import IDLoss
from ood_helpers.unleashing_mask.recipe import UnleashingMaskRecipe
from ood_helpers.unleashing_mask.weight_masks import attach_masks, freeze_weights, masks_of


def prepare_masks(network: nn.Module, recipe: UnleashingMaskRecipe, seed: int) -> None:
    """Give a network the masks that a recipe trains, with seeded scores; none where it trains weights."""
    masks = recipe.masks
    if masks is None:
        return
    options = {"initial_scores": masks.initial_scores, "rounding": masks.rounding}
    attach_masks(network, masks.keep_rate, torch.Generator().manual_seed(seed), **options)
    if masks.freeze_weights:
        freeze_weights(network)


def unleash(
    network: Classifier,
    train: ImageSet,
    validation: ImageSet | None,
    transform: Transform,
    recipe: UnleashingMaskRecipe,
    constraint: float | None,
    *,
    seed: int,
    device: str | torch.device,
    directory: Path,
) -> pd.DataFrame:
    """Continue the training of a classifier by UM, or learn masks by UMAP; see `ood_helpers.training.loop.train`.

    Dropout and batch norm are in train mode. Resumed where it was interrupted, and not repeated when it is finished.

    Parameters
    ----------
    network : trained already; for UMAP it has the masks of `prepare_masks`
    constraint : u in nats; None without UM

    Returns
    -------
    One row per epoch: epoch, step, learning_rate, train_loss (with UM the flooded one), train_cross_entropy,
    train_accuracy, with UM train_ascending (percent of the images, in batches that ascend), and with a validation set
    validation_loss (cross-entropy) and validation_accuracy; accuracies in percent.

    Raises
    ------
    InputError : no labels, labels outside 0 .. C - 1, a constraint without UM or the reverse, masks that the recipe does not
        have or the reverse, or a loss that is not finite
    """
    for image_set in (train, *([] if validation is None else [validation])):
        check_labels(image_set, network.num_classes)
    id_loss = IDLoss(recipe.id_loss, constraint)
    if bool(masks_of(network)) != (recipe.masks is not None):
        raise InputError(
            f"Found a network {'with' if masks_of(network) else 'without'} masks for a recipe "
            f"{'without' if recipe.masks is None else 'with'} masks, expected both or none; call prepare_masks."
        )

    def epoch_batches(_epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        return augmented_batches(train, transform, recipe, generator, device)

    def loss_function(network: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch
        return id_loss(network(images), labels)

    def validate(network: nn.Module) -> dict[str, float]:
        return evaluate(network, validation, transform, recipe.batch_size, device)

    objective = "UM" if constraint is not None else "cross-entropy"
    return train_epochs(
        network,
        epoch_batches,
        loop.descent(loss_function),
        recipe,
        len(train),
        None if validation is None else validate,
        seed=seed,
        device=device,
        directory=directory,
        settings={"constraint": constraint},
        description=f"Fine-tuning {'weights' if recipe.masks is None else 'masks'} with {objective}",
    )
