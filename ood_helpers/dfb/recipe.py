"""The recipe of DFB: pseudo masks of the training images, and dense training on them.

Source: Ding and Pang, ACM MM 2024, arXiv 2303.08727.
"""

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from ood_helpers.config.base import Model
from ood_helpers.config.networks import RECIPES, CheckpointRecipe, NetworkRecipe
from ood_helpers.mos.recipe import ClassifierRecipe
from ood_helpers.training.recipes import FineTuningRecipe, TrainingImages


class MasksRecipe(Model):
    """Pseudo masks: which part of a training image is foreground, from class activation maps (CAM) of the backbone."""

    scales: tuple[PositiveFloat, ...] = Field(
        (1.0, 0.5, 1.5, 2.0), min_length=1, description="of the network's input; their maps are added up"
    )
    label: Literal["ground_truth", "predicted"] = Field(
        "ground_truth", description="whose map: the class of the image, or the one the backbone predicts"
    )
    sigma: NonNegativeFloat | None = Field(
        None,
        description="of the Gaussian, in pixels; None = 1/32 of the image's height, the paper's 4 of 128 pixels",
    )
    threshold: float = Field(
        0.5, ge=0, lt=1, description="foreground is above it, of the map between its minimum 0 and maximum 1"
    )


class DenseImages(TrainingImages):
    """Dense training on images; crops and flips are those of image and mask."""

    depth: int = Field(-1, ge=-1, description="as for a fine-tuned network")
    flip: bool = Field(True, description="random horizontal flip")


class _Dense(NetworkRecipe):
    """What a dense network that is trained here and one of a checkpoint have in common."""

    method: Literal["dense"] = "dense"
    masks: MasksRecipe = MasksRecipe()

    @property
    def background(self) -> bool:
        return True


class DenseCheckpoint(_Dense, CheckpointRecipe):
    """A dense network that was trained elsewhere."""

    background_column: Literal["last", "first"] = Field(
        "last", description="of its head; here it is always the last"
    )


@RECIPES.register("dense")
class DenseRecipe(_Dense, FineTuningRecipe):
    """K + 1 outputs at each position of the feature map, for the classes and, last, the background of ID images.

    The recipe is that of a fine-tuned network except for the defaults. Without `images` the head alone is trained on
    feature maps held in memory, which is exact.
    """

    from_checkpoint: ClassVar[type[CheckpointRecipe]] = DenseCheckpoint

    images: DenseImages | None = DenseImages()
    batch_size: PositiveInt = 128
    mixup: NonNegativeFloat | None = Field(0.0, description="alpha of mixup of images and losses; 0 = off")
    loss: Literal["cross_entropy", "focal"] = Field(
        "cross_entropy",
        description="mean over the pixels; focal = (1 - exp(-L))^2 L / 2 of each image's mean L",
    )
    loss_resolution: Literal["full", "reduced"] = Field(
        "full",
        description="logits enlarged to the images' size, or masks reduced to the feature map's: another loss, and faster",
    )
    balanced: bool = Field(False, description="weigh foreground and background so that they count equally")

    @classmethod
    def defaults(cls, num_classes: int) -> dict[str, NetworkRecipe]:
        return {"dfb": cls()}

    def plain(self) -> ClassifierRecipe:
        """The recipe of a flat classifier with the same budget: what dense training is compared with."""
        shared = set(FineTuningRecipe.model_fields) - {"method", "expected_accuracy", "tolerance"}
        return ClassifierRecipe(**self.model_dump(include=shared))
