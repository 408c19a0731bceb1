"""Training with auxiliary outliers: outlier exposure (OE), energy margins, POEM, DOE and an output for outliers (NTOM).

A batch of ID images and one of outliers pass the network together. With a loss constraint, the loss of the ID images is
that of Unleashing Mask; the outliers' loss is the same with and without.

Sources: Hendrycks et al., "Deep Anomaly Detection with Outlier Exposure", ICLR 2019, arXiv 1812.04606; Liu et al.,
"Energy-based Out-of-distribution Detection", NeurIPS 2020, arXiv 2010.03759; Wang et al., "Out-of-distribution Detection
with Implicit Outlier Transformation" (DOE), ICLR 2023, arXiv 2303.05033; Zhu et al., "Unleashing Mask", ICML 2023, arXiv
2306.03715. For NTOM and POEM see `ood_helpers.training.outliers`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ood_helpers.backbones import Classifier
from ood_helpers.config import DOEConfig, EnergyMargins, OutlierExposureConfig
from ood_helpers.data import ImageSet, Transform
from ood_helpers.errors import InputError
from ood_helpers.training.classifier import (
    augment,
    augmented_batches,
    check_labels,
    evaluate_logits,
    load_images,
    percent_correct,
    to_network,
)
from ood_helpers.training.outliers import OutlierSampler, to_inputs
from ood_helpers.training.unleashing import IDLoss, epoch_steps, train_epochs

Batch = tuple[Tensor, Tensor, Tensor]
Losses = Callable[[nn.Module, Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]


def uniform_cross_entropy(logits: Tensor) -> Tensor:
    """Cross-entropy to the uniform distribution over the outputs, logsumexp(o) - mean_c o_c: logits o [N, C] -> [N].

    At least log C. Source: Hendrycks et al., arXiv 1812.04606.
    """
    return logits.logsumexp(dim=1) - logits.mean(dim=1)


def energy_margin_losses(
    id_logits: Tensor, outlier_logits: Tensor, margins: EnergyMargins
) -> tuple[Tensor, Tensor]:
    """Squared hinges of the energy E(z) = -logsumexp(z), both scalars, at least 0.

    inside = mean relu(E - m_in)^2 of the ID logits [N, C], outside = mean relu(m_out - E)^2 of the outliers' [M, C].

    Source: Liu et al., arXiv 2010.03759.
    """
    inside = F.relu(-id_logits.logsumexp(dim=1) - margins.inside).square().mean()
    outside = F.relu(margins.outside + outlier_logits.logsumexp(dim=1)).square().mean()
    return inside, outside


def scaling_penalty(logits: Tensor) -> Tensor:
    """Squared derivative at s = 1 of the mean of mean_c(s o_c) - logsumexp(s o), a scalar, of outliers' logits o [N, C].

    The derivative is mean_c o_c - sum_c softmax(o)_c o_c. Source: Wang et al. (DOE), arXiv 2303.05033.
    """
    return (logits.mean(dim=1) - (logits.softmax(dim=1) * logits).sum(dim=1)).mean().square()


def direction(weight: Tensor, change: Tensor) -> Tensor:
    """A change of a weight tensor, scaled to the tensor's norm: ||w|| / (||change|| + 1e-20) change."""
    return weight.norm() / (change.norm() + 1e-20) * change


class DOE:
    """The training steps of distributional-agnostic outlier exposure (DOE).

    In the first `unperturbed_epochs` a step descends c + weight U, with c the loss of the ID images and U that of the
    outliers. Afterwards each batch makes two steps, with gamma drawn anew from `strengths`:

    1. A copy of the network without dropout makes one SGD step of learning rate 1 down the `scaling_penalty` of the
       outliers. Its change of each weight tensor of two or more dimensions gives a `direction`, and those a running mean D.
    2. One step down weight U alone, whose gradient is taken at the weights + gamma D (and with it the statistics of batch
       norm move).
    3. One step down c alone.

    All gradients are clipped to `max_norm`; those of the copy are its own, without momentum from earlier batches (in the
    public code those of the network are clipped in their place, and the momentum is kept). Weight decay acts in all three.

    Parameters
    ----------
    losses : (network, batch) -> c, U, values to log
    weight : of U
    weight_decay : of the copy's step

    Attributes
    ----------
    epoch : from 1, to be set before an epoch's first step
    directions : D by the name of the parameter; empty before the first perturbed step

    Source: Wang et al., "Out-of-distribution Detection with Implicit Outlier Transformation", arXiv 2303.05033.
    """

    def __init__(self, config: DOEConfig, losses: Losses, weight: float, weight_decay: float) -> None:
        self.config, self.losses, self.weight, self.weight_decay = config, losses, weight, weight_decay
        self.epoch = 1
        self.directions: dict[str, Tensor] = {}

    def step(
        self, network: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Train on a batch (images [B, 3, h, w], labels [B], outliers [M, 3, h, w]): c + weight U and values to log."""
        if self.epoch <= self.config.unperturbed_epochs:
            id_loss, outlier_loss, values = self.losses(network, batch)
            loss = id_loss + self.weight * outlier_loss
            self._descend(loss, optimizer)
            return loss, values
        self._update_directions(network, batch)
        strength = self.config.strengths[int(torch.randint(len(self.config.strengths), ()))]
        self._move(network, strength)
        _, outlier_loss, _ = self.losses(network, batch)
        self._descend(self.weight * outlier_loss, optimizer)
        self._move(network, -strength)
        id_loss, _, values = self.losses(network, batch)
        self._descend(id_loss, optimizer)
        return id_loss + self.weight * outlier_loss, {**values, "outlier_loss": outlier_loss.detach()}

    def _descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.config.max_norm)
        optimizer.step()

    def _update_directions(self, network: nn.Module, batch: Batch) -> None:
        """Step 1, without a copy: the gradient at the network's own weights says how the copy would change."""
        images, _, outliers = batch
        parameters = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        # Copies of the statistics of batch norm take the pass's changes.
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        dropouts = [module for module in network.modules() if isinstance(module, nn.Dropout)]
        for module in dropouts:
            module.eval()
        logits = torch.func.functional_call(network, buffers, (torch.cat([images, outliers]),))
        for module in dropouts:
            module.train()
        penalty = scaling_penalty(logits[len(images) :])
        gradients = torch.autograd.grad(penalty, list(parameters.values()))
        norm = nn.utils.get_total_norm(gradients)
        scale = (self.config.max_norm / (norm + 1e-6)).clamp(max=1)  # as clip_grad_norm_
        for (name, weight), gradient in zip(parameters.items(), gradients, strict=True):
            if weight.ndim >= 2:
                weight = weight.detach()
                new = direction(weight, -(scale * gradient + self.weight_decay * weight))
                old = self.directions.get(name, new).to(new)
                self.directions[name] = self.config.kept * old + (1 - self.config.kept) * new

    @torch.no_grad()
    def _move(self, network: nn.Module, strength: float) -> None:
        for name, change in self.directions.items():
            network.get_parameter(name).add_(change, alpha=strength)

    def state_dict(self) -> dict[str, Any]:
        """The running mean of directions."""
        return {"directions": self.directions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of an interrupted training."""
        self.directions = dict(state["directions"])


def expose(
    network: Classifier,
    train: ImageSet,
    validation: ImageSet | None,
    outliers: ImageSet,
    transform: Transform,
    config: OutlierExposureConfig,
    constraint: float | None,
    *,
    seed: int,
    device: str | torch.device,
    directory: Path,
) -> pd.DataFrame:
    """Train a classifier on with auxiliary outliers; see `ood_helpers.training.loop.train`.

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
    One row an epoch: epoch, step, learning_rate, train_loss, train_cross_entropy (of the ID images), train_accuracy,
    train_outlier_loss (U), with UM train_ascending (percent of the images, in batches that ascend), and with a validation set validation_loss and
    validation_accuracy. Accuracies are in percent, and like the validation's loss those of the K classes.

    Raises
    ------
    InputError : no labels, labels without an output of their own, no outliers, outliers of another size than the ID images
        after the transform, a constraint without UM or the reverse, or a loss that is not finite
    """
    classes = network.num_classes - (config.objective == "ntom")
    _check(classes, network, train, validation, outliers, transform)
    training = _Exposure(network, train, outliers, transform, config, constraint, classes, device)

    def validate(network: nn.Module) -> dict[str, float]:
        batches = (
            to_network(load_images(validation, transform, rows), validation, rows, transform, device)
            for rows in torch.arange(len(validation)).split(config.batch_size)
        )
        return evaluate_logits((network(images)[:, :classes], labels) for images, labels in batches)

    doe = config.objective == "doe"
    return train_epochs(
        network,
        training.epoch_batches,
        config,
        len(train),
        None if validation is None else validate,
        constraint=constraint,
        loss_function=None if doe else training.loss,
        step=training.doe.step if doe else None,
        state=training,
        seed=seed,
        device=device,
        directory=directory,
        description=f"Outlier exposure ({config.objective}, {config.sample} outliers)",
        settings={"outliers": len(outliers)},
    )


class _Exposure:
    """The batches, the loss and the state of `expose`."""

    def __init__(
        self,
        network: Classifier,
        train: ImageSet,
        outliers: ImageSet,
        transform: Transform,
        config: OutlierExposureConfig,
        constraint: float | None,
        classes: int,
        device: str | torch.device,
    ) -> None:
        self.network, self.train, self.outliers, self.transform = network, train, outliers, transform
        self.config, self.classes, self.device = config, classes, device
        self.id_loss = IDLoss(config, constraint)
        # As the batches of ID images are, of which the last may be smaller.
        batches = torch.arange(len(train)).split(config.batch_size)[: epoch_steps(config, len(train))]
        self.sizes = [max(1, round(config.outlier_factor * len(batch))) for batch in batches]
        self.sampler = OutlierSampler(train, outliers, transform, config, sum(self.sizes), device)
        self.doe = DOE(config.doe, self.losses, config.weight, config.weight_decay)

    def epoch_batches(self, epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        """(normalised images [B, 3, h, w], labels [B], normalised outliers [M, 3, h, w])."""
        self.doe.epoch = epoch
        rows = self.sampler.rows(epoch, self.network, generator)
        images_and_labels = augmented_batches(self.train, self.transform, self.config, generator, self.device)
        for part, (images, labels) in zip(rows.split(self.sizes), images_and_labels):
            outliers = load_images(self.outliers, self.transform, part)
            outliers = augment(outliers, self.config.crop_padding, self.config.flip, generator)
            yield images, labels, to_inputs(outliers, self.transform, self.device)

    def losses(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """c and U of a batch, and values to log."""
        images, labels, outliers = batch
        id_logits, outlier_logits = network(torch.cat([images, outliers])).split([len(images), len(outliers)])
        id_loss, values = self.id_loss(id_logits, labels)
        match self.config.objective:
            case "oe" | "doe":
                outlier_loss = uniform_cross_entropy(outlier_logits).mean()
            case "energy":
                outlier_loss = sum(energy_margin_losses(id_logits, outlier_logits, self.config.margins))
            case "ntom":
                outlier_loss = F.cross_entropy(
                    outlier_logits, labels.new_full((len(outliers),), self.classes)
                )
        accuracy = percent_correct(id_logits[:, : self.classes], labels)
        return id_loss, outlier_loss, {**values, "accuracy": accuracy, "outlier_loss": outlier_loss.detach()}

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """c + weight U, and values to log."""
        id_loss, outlier_loss, values = self.losses(network, batch)
        return id_loss + self.config.weight * outlier_loss, values

    def state_dict(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state_dict(), "doe": self.doe.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.doe.load_state_dict(state["doe"])


def _check(
    classes: int,
    network: Classifier,
    train: ImageSet,
    validation: ImageSet | None,
    outliers: ImageSet,
    transform: Transform,
) -> None:
    for image_set in (train, *([] if validation is None else [validation])):
        if (
            image_set.labels is not None
            and len(image_set)
            and image_set.labels.max() == classes < network.num_classes
        ):
            raise InputError(
                f"The network has {network.num_classes} outputs for the labels 0 to {classes} of {image_set.name}, expected "
                "one more, for outliers; give it another output, or take another objective than ntom."
            )
        check_labels(image_set, classes)
    if not len(outliers):
        raise InputError(
            f"The set of outliers {outliers.name} has no images, expected at least one; choose another set or limit."
        )
    first = torch.zeros(1, dtype=torch.int64)
    size, expected = (load_images(images, transform, first).shape[1:3] for images in (outliers, train))
    if size != expected:
        raise InputError(
            f"The outliers of {outliers.name} are {size[0]} x {size[1]} pixels after the transform, expected "
            f"{expected[0]} x {expected[1]} as those of {train.name}; give the transform a resize [height, width] or a crop."
        )
