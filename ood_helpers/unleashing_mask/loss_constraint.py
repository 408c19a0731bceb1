"""The loss constraint of Unleashing Mask: how it is estimated, and the loss that is kept at it.

Source: Zhu et al., "Unleashing Mask: Explore the Intrinsic Out-of-Distribution Detection Capability", ICML 2023, arXiv
2306.03715. The loss |beta c - u| + u is the flooding of Ishida et al., ICML 2020, arXiv 2002.08709.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ood_helpers.backbones.base import Classifier
from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.transforms import Transform
from ood_helpers.errors import InputError
from ood_helpers.progress import track
from ood_helpers.training.batches import check_labels, evaluate, percent_correct
from ood_helpers.unleashing_mask.recipe import CrossEntropyLoss, Estimate, UMLoss
from ood_helpers.unleashing_mask.weight_masks import random_masks


@dataclass(frozen=True)
class LossConstraint:
    """The mean cross-entropy of a network on its training images: under each draw of random masks, and without any.

    Attributes
    ----------
    draws : mean cross-entropy in nats, one per draw
    unmasked : mean cross-entropy of the network as it is
    keep_rate : share of each layer's weights that the masks keep
    """

    draws: tuple[float, ...]
    unmasked: float
    keep_rate: float

    @property
    def mean(self) -> float:
        """The mean over the draws, in nats."""
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

    def __init__(self, loss: UMLoss | CrossEntropyLoss, constraint: float | None) -> None:
        if (loss.kind == "um") != (constraint is not None):
            found = "no loss constraint" if constraint is None else f"the loss constraint {constraint:g}"
            raise InputError(
                f"Found {found} with id_loss: {loss.kind}, expected a constraint with um and none without; change one."
            )
        self.loss, self.constraint = loss, constraint

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of logits [B, C] and labels [B]; and the unflooded cross_entropy, the accuracy in percent and, with UM,
        whether the batch is in ascent, 100 or 0, to be logged."""
        cross_entropy = F.cross_entropy(logits, labels)
        values = {"cross_entropy": cross_entropy.detach(), "accuracy": percent_correct(logits, labels)}
        if self.constraint is None:
            return cross_entropy, values
        values["ascending"] = 100 * (self.loss.beta * values["cross_entropy"] < self.constraint).float()
        return um_loss(cross_entropy, self.constraint, self.loss.beta), values


def estimate_constraint(
    network: Classifier,
    image_set: ImageSet,
    transform: Transform,
    estimate: Estimate,
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
    generator = torch.Generator().manual_seed(estimate.seed)

    def mean_loss() -> float:
        loss = evaluate(network, image_set, transform, batch_size, device)["loss"]
        if not math.isfinite(loss):
            raise InputError(
                f"The mean cross-entropy of {image_set.name} is {loss}, expected a finite number; check the network's weights."
            )
        return loss

    draws = []
    for _ in track(range(estimate.draws), description="Loss constraint", unit="draw"):
        with random_masks(network, estimate.keep_rate, generator, estimate.rounding):
            draws.append(mean_loss())
    return LossConstraint(tuple(draws), mean_loss(), estimate.keep_rate)
