"""The recipe of Unleashing Mask (UM), and of UM Adopts Pruning (UMAP).

Source: Zhu et al., "Unleashing Mask: Explore the Intrinsic Out-of-Distribution Detection Capability", ICML 2023, arXiv
2306.03715.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from ood_helpers.config.base import Model
from ood_helpers.config.networks import RECIPES, CheckpointRecipe, NetworkRecipe
from ood_helpers.training.recipes import EpochTrainingRecipe

Rounding = Annotated[
    Literal["nearest", "truncated"],
    Field(description="of the number of weights that a mask drops; `truncated` is the public code's"),
]


class Estimate(Model):
    """How the loss constraint is estimated: the mean cross-entropy of the start network on the ID training images,
    without augmentation, while random masks keep a share of the weights of every layer."""

    keep_rate: float = Field(
        0.965, gt=0, le=1, description="share of each convolution's and linear layer's weights"
    )
    draws: PositiveInt = Field(5, description="of the masks; the constraint is their mean")
    seed: NonNegativeInt = 0
    rounding: Rounding = "nearest"
    factor: PositiveFloat = Field(1.0, description="u = factor times the mean over the draws")


Constraint = Annotated[
    Annotated[PositiveFloat, Tag("number")] | Annotated[Estimate, Tag("estimate")],
    Discriminator(lambda value: "estimate" if isinstance(value, Mapping | Estimate) else "number"),
]


class UMLoss(Model):
    """|beta c - u| + u of a batch's mean cross-entropy c, with u the loss constraint."""

    kind: Literal["um"] = "um"
    constraint: Constraint = Field(Estimate(), description="u in nats, or how it is estimated")
    beta: PositiveFloat = 1.0


class CrossEntropyLoss(Model):
    """c, the mean cross-entropy of a batch."""

    kind: Literal["cross_entropy"] = "cross_entropy"


def named(value: Any) -> Any:
    """A loss, objective or sampling by its name alone: `um` is {kind: um}."""
    return {"kind": value} if isinstance(value, str) else value


def _um_unless_named(value: Any) -> Any:
    value = named(value)
    return {"kind": "um", **value} if isinstance(value, Mapping) else value


IDLossRecipe = Annotated[
    Annotated[UMLoss | CrossEntropyLoss, Field(discriminator="kind")], BeforeValidator(_um_unless_named)
]


class MaskTraining(Model):
    """UMAP: masks over the weights of every convolution and linear layer are trained."""

    keep_rate: float = Field(gt=0, le=1, description="share of each layer's weights that a mask keeps")
    freeze_weights: bool = Field(True, description="only the scores of the masks are trained")
    initial_scores: Literal["random", "magnitude"] = Field(
        "random",
        description="uniform in +-1 / sqrt(fan_in), or the weights themselves, so that the smallest are dropped first",
    )
    rounding: Rounding = "nearest"

    @model_validator(mode="after")
    def _something_to_learn(self) -> "MaskTraining":
        if self.keep_rate == 1 and self.freeze_weights:
            raise ValueError(
                "keep_rate 1 drops nothing, so that frozen weights leave nothing to learn; lower it"
            )
        return self


class UnleashingMaskCheckpoint(CheckpointRecipe):
    """A network of Unleashing Mask that was trained elsewhere."""

    method: Literal["unleashing_mask"] = "unleashing_mask"


@RECIPES.register("unleashing_mask")
class UnleashingMaskRecipe(EpochTrainingRecipe):
    """UM, or with `masks` UMAP.

    Defaults are those of the paper's code except for augmentation, which is off, and dropout, which is the backbone's.
    """

    from_checkpoint: ClassVar[type[CheckpointRecipe]] = UnleashingMaskCheckpoint

    method: Literal["unleashing_mask"] = "unleashing_mask"
    id_loss: IDLossRecipe = UMLoss()
    epochs: PositiveInt = 100
    learning_rate: PositiveFloat = 0.1
    masks: MaskTraining | None = Field(None, description="None = the weights are trained")

    def plain(self) -> NetworkRecipe:
        """The same budget with plain cross-entropy and no masks: what UM and UMAP are compared with."""
        return self.changed({"id_loss": "cross_entropy", "masks": None, "expected_accuracy": None})
