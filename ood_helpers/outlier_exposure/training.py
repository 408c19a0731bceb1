"""Training with auxiliary outliers: outlier exposure (OE), energy margins, POEM, DOE and an output for outliers (NTOM).

A batch of ID images and one of outliers pass the network together. With a loss constraint, the loss of the ID images is
that of Unleashing Mask (Zhu et al., arXiv 2306.03715); the outliers' loss is the same with and without.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ood_helpers.backbones.base import Classifier
from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.transforms import Transform
from ood_helpers.errors import InputError
from ood_helpers.outlier_exposure.objectives import DOE, Batch, energy_margin_losses, uniform_cross_entropy
from ood_helpers.outlier_exposure.recipe import OutlierExposureRecipe
from ood_helpers.outlier_exposure.selection import OutlierSampler
from ood_helpers.training import loop
from ood_helpers.training.batches import (
    augment,
    augmented_batches,
    check_labels,
    evaluate_logits,
    load_images,
    percent_correct,
    to_inputs,
    to_network,
)
from ood_helpers.training.epochs import epoch_steps, train_epochs
from ood_helpers.unleashing_mask.loss_constraint import IDLoss


def with_outlier_output(network: Classifier) -> Classifier:
    """The network with one more output, the last, whose weights and bias are 0."""
    old = network.head
    with torch.random.fork_rng(devices=[]):
        network.head = nn.Linear(old.in_features, old.out_features + 1).to(old.weight)
    with torch.no_grad():
        for new, known in ((network.head.weight, old.weight), (network.head.bias, old.bias)):
            new.zero_()[:-1] = known
    return network


def expose(
    network: Classifier,
    train: ImageSet,
    validation: ImageSet | None,
    outliers: ImageSet,
    transform: Transform,
    recipe: OutlierExposureRecipe,
    constraint: float | None,
    *,
    seed: int,
    device: str | torch.device,
    directory: Path,
) -> pd.DataFrame:
    """Continue the training of a classifier with auxiliary outliers; see `ood_helpers.training.loop.train`.

    The loss is c + weight U of a batch of ID images and `outlier_factor` as many outliers, which are cropped and flipped
    alike: c is that of `IDLoss`; U is the mean `uniform_cross_entropy` of the outliers (oe, doe), the sum of the
    `energy_margin_losses` (energy), or the outliers' cross-entropy to the last output (ntom). For doe see `DOE`, for the
    choice of the outliers `OutlierSampler`.

    Parameters
    ----------
    network : trained already, with K outputs, for the objective ntom with K + 1
    outliers : labels are not used
    constraint : u in nats; None without UM

    Returns
    -------
    One row per epoch: epoch, step, learning_rate, train_loss, train_cross_entropy (of the ID images), train_accuracy,
    train_outlier_loss (U), with UM train_ascending (percent of the images, in batches that ascend), and with a validation
    set validation_loss and validation_accuracy. Accuracies are in percent, and like the validation's loss those of the K
    classes.

    Raises
    ------
    InputError : no labels, labels without an output of their own, no outliers, outliers of another size than the ID images
        after the transform, a constraint without UM or the reverse, or a loss that is not finite
    """
    training = Exposure(network, train, validation, outliers, transform, recipe, constraint, device)
    return train_epochs(
        network,
        training.epoch_batches,
        loop.descent(training.loss) if training.doe is None else training.doe.step,
        recipe,
        len(train),
        None if validation is None else training.validate,
        state=training,
        seed=seed,
        device=device,
        directory=directory,
        description=f"Outlier exposure ({recipe.objective.kind}, {recipe.sample.kind} outliers)",
        settings={"constraint": constraint, "outliers": len(outliers)},
    )


class Exposure:
    """The batches, the loss and the state of a training with outliers; parameters as for `expose`."""

    def __init__(
        self,
        network: Classifier,
        train: ImageSet,
        validation: ImageSet | None,
        outliers: ImageSet,
        transform: Transform,
        recipe: OutlierExposureRecipe,
        constraint: float | None,
        device: str | torch.device,
    ) -> None:
        self.network, self.train, self.validation, self.outliers = network, train, validation, outliers
        self.transform, self.recipe, self.device = transform, recipe, device
        self.classes = network.num_classes - recipe.background
        self._check()
        self.id_loss = IDLoss(recipe.id_loss, constraint)
        # As the batches of ID images are, of which the last may be smaller.
        batches = torch.arange(len(train)).split(recipe.batch_size)[: epoch_steps(recipe, len(train))]
        self.sizes = [max(1, round(recipe.outlier_factor * len(batch))) for batch in batches]
        self.sampler = OutlierSampler(train, outliers, transform, recipe, sum(self.sizes), device)
        self.doe: DOE | None = None
        if recipe.objective.kind == "doe":
            self.doe = DOE(recipe.objective, self.losses, recipe.weight_decay)

    def epoch_batches(self, epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        """(normalised images [B, 3, h, w], labels [B], normalised outliers [M, 3, h, w])."""
        if self.doe is not None:
            self.doe.epoch = epoch
        rows = self.sampler.rows(epoch, self.network, generator)
        images_and_labels = augmented_batches(self.train, self.transform, self.recipe, generator, self.device)
        for part, (images, labels) in zip(rows.split(self.sizes), images_and_labels):
            outliers = load_images(self.outliers, self.transform, part)
            outliers = augment(outliers, self.recipe.crop_padding, self.recipe.flip, generator)
            yield images, labels, to_inputs(outliers, self.transform, self.device)

    def losses(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """c and U of a batch, and values to log."""
        images, labels, outliers = batch
        id_logits, outlier_logits = network(torch.cat([images, outliers])).split([len(images), len(outliers)])
        id_loss, values = self.id_loss(id_logits, labels)
        objective = self.recipe.objective
        match objective.kind:
            case "oe" | "doe":
                outlier_loss = uniform_cross_entropy(outlier_logits).mean()
            case "energy":
                outlier_loss = sum(energy_margin_losses(id_logits, outlier_logits, objective))
            case "ntom":
                outlier_loss = F.cross_entropy(
                    outlier_logits, labels.new_full((len(outliers),), self.classes)
                )
        accuracy = percent_correct(id_logits[:, : self.classes], labels)
        return id_loss, outlier_loss, {**values, "accuracy": accuracy, "outlier_loss": outlier_loss.detach()}

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """c + weight U, and values to log."""
        id_loss, outlier_loss, values = self.losses(network, batch)
        return id_loss + self.recipe.objective.weight * outlier_loss, values

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Mean loss and accuracy (percent) of the K classes on the validation set."""
        images, transform = self.validation, self.transform
        batches = (
            to_network(load_images(images, transform, rows), images, rows, transform, self.device)
            for rows in torch.arange(len(images)).split(self.recipe.batch_size)
        )
        return evaluate_logits((network(inputs)[:, : self.classes], labels) for inputs, labels in batches)

    def state_dict(self) -> dict[str, Any]:
        """What POEM and DOE remember."""
        return {"buffer": self.sampler.buffer, "directions": {} if self.doe is None else self.doe.directions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the state of an interrupted training."""
        self.sampler.buffer = state["buffer"].clone()
        if self.doe is not None:
            self.doe.directions = dict(state["directions"])

    def _check(self) -> None:
        """Raise InputError where labels and outputs, or the sizes of images and outliers, do not fit."""
        outputs, classes, outliers, train = self.network.num_classes, self.classes, self.outliers, self.train
        for image_set in (train, *([] if self.validation is None else [self.validation])):
            if image_set.labels is not None and image_set.labels.max(initial=0) == classes < outputs:
                raise InputError(
                    f"The network has {outputs} outputs for the labels 0 to {classes} of {image_set.name}, expected "
                    "one more, for outliers; give it another output, or take another objective than ntom."
                )
            check_labels(image_set, classes)
        if not len(outliers):
            raise InputError(
                f"The set of outliers {outliers.name} has no images, expected at least one; choose another set or limit."
            )
        first = torch.zeros(1, dtype=torch.int64)
        size, expected = (
            load_images(images, self.transform, first).shape[1:3] for images in (outliers, train)
        )
        if size != expected:
            raise InputError(
                f"The outliers of {outliers.name} are {size[0]} x {size[1]} pixels after the transform, expected "
                f"{expected[0]} x {expected[1]} as those of {train.name}; give the transform a resize [height, width] or a crop."
            )
