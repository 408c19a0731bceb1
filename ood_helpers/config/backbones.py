"""The backbone: its architecture, where its weights come from, and the accuracy they must reach."""

from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from ood_helpers.config.base import DownloadedFile, Model


class TrainingConfig(Model):
    """Training a classifier from scratch: SGD with Nesterov momentum, cross-entropy."""

    epochs: PositiveInt
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 0.1
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 5e-4
    schedule: Literal["one_cycle", "cosine"] = "cosine"
    crop_padding: NonNegativeInt = Field(0, description="pixels of zero padding before a random crop")
    flip: bool = Field(False, description="random horizontal flip")
    save_every: PositiveInt | None = Field(
        None,
        description="epochs between saved weights; first, last and, with validation images, best are kept",
    )

    def saved_epochs(self) -> list[int]:
        """The numbers of the epochs whose weights are saved, without the first and the best."""
        every = self.save_every or self.epochs
        return sorted({self.epochs, *range(every, self.epochs + 1, every)})


class ArchitectureConfig(Model):
    """What every backbone has in common: where its weights come from and the accuracy they must reach."""

    blocks: ClassVar[int]  # how many parts `images.depth` of a network counts

    checkpoint: str | DownloadedFile | None = None
    training: TrainingConfig | None = None
    expected_accuracy: float | None = Field(None, ge=0, le=100, description="percent on the ID test set")
    tolerance: NonNegativeFloat = Field(0.5, description="percentage points")

    @model_validator(mode="after")
    def _one_origin_of_weights(self) -> "ArchitectureConfig":
        names = ("checkpoint", "training", "weights")
        found = [name for name in names if getattr(self, name, None) is not None]
        if len(found) != 1:
            raise ValueError(
                "a backbone takes its weights from one of checkpoint, training or weights; found "
                + (" and ".join(found) or "none")
            )
        return self


def _three_stages(depth: int) -> int:
    if (depth - 4) % 6:
        raise ValueError(f"depth {depth} is not 6 n + 4 (three stages of n two-layer units)")
    return depth


Depth = Annotated[PositiveInt, AfterValidator(_three_stages)]


class DenseNetBackbone(ArchitectureConfig):
    """DenseNet-BC for 32 x 32 (or smaller) images; depth 100, growth rate 12 is the papers' DenseNet-101."""

    blocks: ClassVar[int] = 3

    architecture: Literal["densenet_bc"]
    depth: Depth = 100
    growth_rate: PositiveInt = 12
    dropout: float = Field(0.0, ge=0, lt=1)


class WideResNetBackbone(ArchitectureConfig):
    """WideResNet for 32 x 32 images: 40-2, 40-4, ..."""

    blocks: ClassVar[int] = 3

    architecture: Literal["wide_resnet"]
    depth: Depth = 40
    widen_factor: PositiveInt = 2
    dropout: float = Field(0.0, ge=0, lt=1)


class CifarResNet18Backbone(ArchitectureConfig):
    """ResNet-18 with a 3 x 3 stem for 32 x 32 images."""

    blocks: ClassVar[int] = 4

    architecture: Literal["resnet18_cifar"]


class TorchvisionBackbone(ArchitectureConfig):
    """A torchvision network; `weights` names one of its weight enums, for example IMAGENET1K_V1."""

    architecture: Literal["resnet50", "mobilenet_v2"]
    weights: str | None = None

    @property
    def blocks(self) -> int:
        return {"resnet50": 4, "mobilenet_v2": 5}[self.architecture]


class BiTBackbone(ArchitectureConfig):
    """BiT's ResNet-v2 for ImageNet; depth 101, width 1 is BiT-S-R101x1 of MOS.

    A checkpoint is one of Google's .npz files, or one that the code of MOS or BiT has fine-tuned.
    """

    blocks: ClassVar[int] = 4

    architecture: Literal["bit"]
    depth: Literal[50, 101, 152] = 101
    width: int = Field(1, ge=1, le=4, description="factor of the number of channels")
    half_stride: bool = Field(False, description="a last feature map of twice the height and width")


BackboneConfig = Annotated[
    DenseNetBackbone | WideResNetBackbone | CifarResNet18Backbone | TorchvisionBackbone | BiTBackbone,
    Field(discriminator="architecture"),
]
