"""Where images come from, and how an image becomes network input."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeInt, PositiveFloat, PositiveInt, Tag, model_validator

from ood_helpers.config.base import Download, Model


class RangeSubset(Model):
    """The first n images of a set, those after the first n, or `first` of those after `after`."""

    first: PositiveInt | None = None
    after: PositiveInt | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> "RangeSubset":
        if self.first is None and self.after is None:
            raise ValueError("a subset takes exactly one of first (and after), per_class, random and runs")
        return self


class PerClassSubset(Model):
    """The first n images of each class in file order."""

    per_class: PositiveInt


class RandomSubset(Model):
    """n images drawn by seed."""

    random: PositiveInt
    seed: NonNegativeInt = 0


class RunsSubset(Model):
    """Runs of neighbours: those from `start` up to, without, `stop`. They make up a set of their own, numbered from 0."""

    runs: tuple[tuple[NonNegativeInt, PositiveInt], ...] = Field(
        min_length=1, description="[start, stop], ascending"
    )

    @model_validator(mode="after")
    def _ascending(self) -> "RunsSubset":
        places = [place for run in self.runs for place in run]
        if any(start >= stop for start, stop in self.runs) or places != sorted(places):
            raise ValueError("runs are [start, stop] with start < stop, each after the one before")
        return self


def _subset_kind(data: Any) -> str:
    keys = data if isinstance(data, Mapping) else getattr(type(data), "model_fields", ())
    kinds = {"random": "drawn", "per_class": "by_class", "runs": "pieces"}
    return next((kind for key, kind in kinds.items() if key in keys), "range")


Subset = Annotated[
    Annotated[RangeSubset, Tag("range")]
    | Annotated[RunsSubset, Tag("pieces")]
    | Annotated[PerClassSubset, Tag("by_class")]
    | Annotated[RandomSubset, Tag("drawn")],
    Discriminator(_subset_kind),
]


class Images(Model):
    """What every source of images has in common."""

    subset: Subset | None = Field(None, description="which images of the set are used")


class EmbeddedDigits(Images):
    """scikit-learn's handwritten digits, in three fixed splits."""

    source: Literal["embedded"]
    set: Literal["digits"]
    split: Literal["train", "validation", "test"]


class GeneratedImages(Images):
    """The OOD sets that are made for the digits."""

    source: Literal["embedded"]
    set: Literal["letters", "chimeras", "jigsaw", "photographs", "textures", "noise"]
    count: PositiveInt = Field(1000, description="number of images")
    seed: NonNegativeInt = Field(0, description="seed of the generator")


class TorchvisionImages(Images):
    """A torchvision data set below `root`, downloaded there (unless `download` is false) when missing."""

    source: Literal["torchvision"]
    dataset: Literal["CIFAR10", "CIFAR100", "SVHN", "DTD", "Places365"]
    split: str = Field(description="as torchvision names it: train, test, val, extra, train-standard, ...")
    root: str = "${data_root}"
    download: bool = True


class FolderImages(Images):
    """A folder of class folders (labels in sorted order of their names) or of images (no labels)."""

    source: Literal["folder"]
    path: str


ClassNumbering = Literal["as_is", "ilsvrc2012_devkit"]


class ListImages(Images):
    """A text file with one image path (below `root`) and, with `labelled`, one class number per line, which
    are ImageNet's devkit ids minus 1 with ilsvrc2012_devkit; they become places in the sorted WordNet ids."""

    source: Literal["list"]
    path: str
    root: str
    labelled: bool = True
    class_numbering: ClassNumbering = "as_is"


class NpzImages(Images):
    """A numpy .npz file: `images` uint8 [N, H, W, 3], optional `labels` [N] and `class_names`."""

    source: Literal["npz"]
    path: str


class ArchiveImages(Images, Download):
    """A .tar, .tar.gz, .tgz or .zip downloaded to `directory`, verified, unpacked to `directory`/<archive
    stem>, and read like a folder, from `folder` inside."""

    source: Literal["archive"]
    directory: str = "${data_root}"
    folder: str = "."
    shrink: PositiveInt | None = Field(
        None,
        description="side of the square images, an array, that those of the subset become; see ImageSet.shrunk",
    )


ImageSource = Annotated[
    Annotated[EmbeddedDigits | GeneratedImages, Field(discriminator="set")]
    | TorchvisionImages
    | FolderImages
    | ListImages
    | NpzImages
    | ArchiveImages,
    Field(discriminator="source"),
]


class TransformConfig(Model):
    """How an image becomes network input: resize, centre crop, scale to [0, 1], normalise per channel."""

    resize: PositiveInt | tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="an integer for the shorter side, or [height, width], which squashes"
    )
    crop: PositiveInt | None = Field(None, description="side of the centre crop")
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
