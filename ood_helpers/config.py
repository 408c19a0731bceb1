"""An experiment as data: the pydantic models of configs/*.yaml.

A config names the in-distribution (ID) sets, the out-of-distribution (OOD) sets, the transform, the
backbone and the detectors. Unknown keys are errors that name the key and the nearest valid one.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ood_helpers.errors import InputError, nearest

PROJECT_ROOT = Path(__file__).resolve().parents[1]
CONFIG_DIRECTORY = PROJECT_ROOT / "configs"


class Model(BaseModel):
    """A frozen pydantic model that refuses unknown keys, naming the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}; {nearest(str(key), cls.model_fields)}")
        return data


class Subset(Model):
    """Which images of a set are used: the first n, those after the first n (all, or the `first` of them), the first n
    of each class in file order, or n drawn by seed."""

    first: PositiveInt | None = None
    after: PositiveInt | None = None
    per_class: PositiveInt | None = None
    random: PositiveInt | None = None
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _one_rule(self) -> "Subset":
        rules = [self.first or self.after, self.per_class, self.random]
        if sum(rule is not None for rule in rules) != 1:
            raise ValueError("a subset takes exactly one of first (and after), per_class and random")
        if self.random is None and "seed" in self.model_fields_set:
            raise ValueError("seed has no effect without random; remove it")
        return self


class Images(Model):
    """What every source of images has in common."""

    subset: Subset | None = None


class EmbeddedImages(Images):
    """The sets that come with the kit: scikit-learn's digits and the OOD sets made for them."""

    source: Literal["embedded"]
    set: Literal["digits", "letters", "chimeras", "jigsaw", "photographs", "textures", "noise"]
    split: Literal["train", "validation", "test"] | None = Field(None, description="digits only")
    count: PositiveInt = Field(1000, description="number of images; not for digits")
    seed: NonNegativeInt = Field(0, description="seed of the generator; not for digits")

    @model_validator(mode="after")
    def _options_with_an_effect(self) -> "EmbeddedImages":
        if self.set == "digits":
            if self.split is None:
                raise ValueError("the digits need a split: train, validation or test")
            for name in ("count", "seed"):
                if name in self.model_fields_set:
                    raise ValueError(f"{name} has no effect on the digits, whose splits are fixed; remove it")
        elif self.split is not None:
            raise ValueError(f"split has no effect on {self.set}; remove it")
        return self


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
    """A text file with an image path (below `root`) and, with `labelled`, a class number a line.

    `class_numbering: ilsvrc2012_devkit` says that the numbers are ImageNet's devkit ids minus 1, as in the lists of MOS;
    they become places in the sorted WordNet ids.
    """

    source: Literal["list"]
    path: str
    root: str
    labelled: bool = True
    class_numbering: ClassNumbering = "as_is"


class NpzImages(Images):
    """A numpy .npz file: `images` uint8 [N, H, W, 3], optional `labels` [N] and `class_names`."""

    source: Literal["npz"]
    path: str


class ArchiveImages(Images):
    """A .tar, .tar.gz, .tgz or .zip to download, verify and unpack; then read like a folder.

    The archive is kept in `directory`, its content goes to `directory`/<archive stem>, and `folder` is
    the place of the images inside.
    """

    source: Literal["archive"]
    url: str
    directory: str = "${data_root}"
    folder: str = "."
    size: PositiveInt | None = Field(None, description="bytes")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    md5: str | None = Field(None, pattern="^[0-9a-f]{32}$")


ImageSource = Annotated[
    EmbeddedImages | TorchvisionImages | FolderImages | ListImages | NpzImages | ArchiveImages,
    Field(discriminator="source"),
]


class InDistribution(Model):
    """The in-distribution data: images to fit on, optional images to tune on, images to evaluate on."""

    name: str
    num_classes: PositiveInt
    class_names: tuple[str, ...] | None = None
    train: ImageSource
    validation: ImageSource | None = None
    test: ImageSource

    @model_validator(mode="after")
    def _names_for_all(self) -> "InDistribution":
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class_names for num_classes={self.num_classes}")
        return self


class OutOfDistribution(Model):
    """One OOD set and its distance from the ID data."""

    name: str
    group: Literal["near", "far"]
    images: ImageSource


class TransformConfig(Model):
    """How an image becomes network input: resize, centre crop, scale to [0, 1], normalise per channel."""

    resize: PositiveInt | tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="an integer for the shorter side, or [height, width], which squashes"
    )
    crop: PositiveInt | None = Field(None, description="side of the centre crop")
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class TrainingConfig(Model):
    """Training a classifier from scratch: SGD with Nesterov momentum, cross-entropy."""

    epochs: PositiveInt
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 0.1
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 5e-4
    schedule: Literal["one_cycle", "cosine"] = "cosine"
    crop_padding: NonNegativeInt = Field(
        0, description="pixels of zero padding before a random crop; 0 = none"
    )
    flip: bool = Field(False, description="random horizontal flip")
    save_every: PositiveInt | None = Field(
        None,
        description="epochs between saved weights; the first, the last and, with validation images, the best are always saved",
    )


class Backbone(Model):
    """What every backbone has in common: where its weights come from and the accuracy they must reach."""

    checkpoint: str | None = None
    training: TrainingConfig | None = None
    expected_accuracy: float | None = Field(None, ge=0, le=100, description="percent on the ID test set")
    tolerance: NonNegativeFloat = Field(0.5, description="percentage points")

    @model_validator(mode="after")
    def _one_origin_of_weights(self) -> "Backbone":
        origins = [
            name for name in ("checkpoint", "training", "weights") if getattr(self, name, None) is not None
        ]
        if len(origins) != 1:
            found = " and ".join(origins) or "none"
            raise ValueError(
                f"a backbone takes its weights from one of checkpoint, training or weights; found {found}"
            )
        return self


def _depth_of_three_stages(backbone: Any) -> Any:
    if (backbone.depth - 4) % 6:
        raise ValueError(
            f"depth {backbone.depth} of {backbone.architecture} is not 6 n + 4 (three stages of n two-layer units)"
        )
    return backbone


class DenseNetBackbone(Backbone):
    """DenseNet-BC for 32 x 32 (or smaller) images; depth 100, growth rate 12 is the papers' DenseNet-101."""

    architecture: Literal["densenet_bc"]
    depth: PositiveInt = 100
    growth_rate: PositiveInt = 12
    dropout: float = Field(0.0, ge=0, lt=1)

    _check_depth = model_validator(mode="after")(_depth_of_three_stages)


class WideResNetBackbone(Backbone):
    """WideResNet for 32 x 32 images: 40-2, 40-4, ..."""

    architecture: Literal["wide_resnet"]
    depth: PositiveInt = 40
    widen_factor: PositiveInt = 2
    dropout: float = Field(0.0, ge=0, lt=1)

    _check_depth = model_validator(mode="after")(_depth_of_three_stages)


class CifarResNet18Backbone(Backbone):
    """ResNet-18 with a 3 x 3 stem for 32 x 32 images."""

    architecture: Literal["resnet18_cifar"]


class TorchvisionBackbone(Backbone):
    """A torchvision network; `weights` names one of its weight enums, for example IMAGENET1K_V1."""

    architecture: Literal["resnet50", "mobilenet_v2"]
    weights: str | None = None


class BiTBackbone(Backbone):
    """BiT's ResNet-v2 for ImageNet; depth 101, width 1 is BiT-S-R101x1 of MOS.

    A checkpoint is one of Google's .npz files, or one that the code of MOS or BiT has fine-tuned.
    """

    architecture: Literal["bit"]
    depth: Literal[50, 101, 152] = 101
    width: int = Field(1, ge=1, le=4, description="factor of the number of channels")
    half_stride: bool = Field(
        False,
        description="a last feature map of twice the height and width: 8 x 8 instead of 4 x 4 at 128 pixels",
    )


BackboneConfig = Annotated[
    DenseNetBackbone | WideResNetBackbone | CifarResNet18Backbone | TorchvisionBackbone | BiTBackbone,
    Field(discriminator="architecture"),
]


class GroupsConfig(Model):
    """How the classes are divided into the groups of a group softmax; the three strategies of MOS."""

    strategy: Literal["taxonomy", "kmeans", "random"] = Field(
        description="groups by meaning, from a file; k-means of the classes' mean training features; random and even"
    )
    file: str | None = Field(
        None, description="taxonomy: a name in configs/groups/ or the path of a YAML file"
    )
    number: PositiveInt | None = Field(None, description="kmeans and random: how many groups")
    seed: NonNegativeInt = Field(0, description="kmeans and random")

    @model_validator(mode="after")
    def _options_with_an_effect(self) -> "GroupsConfig":
        needed, useless = (
            ("file", ("number", "seed")) if self.strategy == "taxonomy" else ("number", ("file",))
        )
        if getattr(self, needed) is None:
            raise ValueError(f"groups by {self.strategy} need a {needed}; add {needed}")
        for name in useless:
            if name in self.model_fields_set:
                raise ValueError(f"{name} has no effect on groups by {self.strategy}; remove it")
        return self


class NetworkRecipe(Model):
    """What every network made from the backbone has in common."""

    of_checkpoints: ClassVar[set[str]] = {"checkpoint", "expected_accuracy", "tolerance"}

    checkpoint: str | None = Field(
        None, description="weights of a network made elsewhere, to use as they are"
    )
    expected_accuracy: float | None = Field(None, ge=0, le=100, description="percent on the ID test set")
    tolerance: NonNegativeFloat = Field(0.5, description="percentage points")

    @model_validator(mode="after")
    def _used_as_it_is(self) -> "NetworkRecipe":
        if self.checkpoint is not None:
            for name in sorted(self.model_fields_set - self.of_checkpoints):
                raise ValueError(
                    f"{name} has no effect on a checkpoint, which is used as it is; remove one of the two"
                )
        return self

    @property
    def softmax_groups(self) -> GroupsConfig | None:
        """The groups of a group softmax; None for a flat one."""
        return None

    @property
    def background(self) -> bool:
        """Whether the last of K + 1 outputs is of background or outliers."""
        return False


class FineTuningConfig(NetworkRecipe):
    """A network made from the backbone with a new head, zero at the start, and the recipe of MOS: SGD with momentum,
    a linear warm-up and three drops of the learning rate to a tenth.

    With `depth` 0 and no mixup, crops or flips the head is trained on the features in the bank, which is exact. With
    mixup `inputs: features` mixes features instead of images, an approximation.
    """

    of_checkpoints: ClassVar[set[str]] = NetworkRecipe.of_checkpoints | {"groups", "class_numbering"}

    groups: GroupsConfig | None = Field(None, description="None = a flat softmax over all classes")
    depth: int = Field(
        0, ge=-1, description="how many of the backbone's last blocks are trained, too; -1 = all of it"
    )
    inputs: Literal["features", "images"] = "features"
    batch_size: PositiveInt = 512
    micro_batch_size: PositiveInt | None = Field(
        None, description="images in a pass; the gradients of a batch are summed up; None = batch_size"
    )
    learning_rate: PositiveFloat = 0.003
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 0.0
    schedule: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt] | None = Field(
        None,
        description="steps: the warm-up ends, three drops, the end; None = by the number of training images, "
        "[100, 200, 300, 400, 500], from 20,000 [500, 3000, 6000, 9000, 10000], from 500,000 "
        "[500, 6000, 12000, 18000, 20000]",
    )
    mixup: NonNegativeFloat | None = Field(
        None, description="alpha of mixup; 0 = off; None = 0.1 from 20,000 training images, else off"
    )
    resize: tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        description="[height, width] of training images before a random crop to the size of the transform",
    )
    crop_padding: NonNegativeInt = Field(0, description="pixels of zero padding before a random crop")
    flip: bool = Field(False, description="random horizontal flip")
    class_numbering: ClassNumbering = Field(
        "as_is",
        description="of the columns of a checkpoint's flat head, where they are not in the order of the labels",
    )

    @model_validator(mode="after")
    def _options_with_an_effect(self) -> "FineTuningConfig":
        if self.class_numbering != "as_is" and (self.checkpoint is None or self.groups is not None):
            raise ValueError("class_numbering is for the flat head of a checkpoint; remove it")
        if self.inputs == "images":
            return self
        if self.depth != 0:
            raise ValueError(f"depth {self.depth} trains more than the head; set inputs: images")
        for name in ("resize", "crop_padding", "flip", "micro_batch_size"):
            if getattr(self, name):
                raise ValueError(f"{name} has no effect on features; turn it off, or set inputs: images")
        return self

    @model_validator(mode="after")
    def _steps_in_order(self) -> "FineTuningConfig":
        if self.schedule is not None and any(a >= b for a, b in zip(self.schedule, self.schedule[1:])):
            raise ValueError(f"the steps of schedule {list(self.schedule)} do not rise; put them in order")
        return self

    @property
    def softmax_groups(self) -> GroupsConfig | None:
        return self.groups


class MasksConfig(Model):
    """Pseudo masks of DFB: which part of a training image is foreground, from class activation maps (CAM) of the backbone."""

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


class DenseConfig(FineTuningConfig):
    """A network of DFB, made from the backbone: K + 1 outputs at each position of the feature map, for the classes and,
    last, the background of ID images, trained on pseudo masks.

    The recipe is that of a fine-tuned network but for the defaults. With `depth` 0 and no mixup, crops or flips the head
    can be trained on feature maps held in memory (`inputs: features`), which is exact.
    """

    of_checkpoints: ClassVar[set[str]] = FineTuningConfig.of_checkpoints | {
        "method",
        "background_column",
        "masks",
    }

    method: Literal["dense"] = "dense"
    masks: MasksConfig = MasksConfig()
    loss: Literal["cross_entropy", "focal"] = Field(
        "cross_entropy",
        description="mean over the pixels; focal = (1 - exp(-L))^2 L / 2 of each image's mean L",
    )
    loss_resolution: Literal["full", "reduced"] = Field(
        "full",
        description="logits enlarged to the images' size, or masks reduced to the feature map's: another loss, and faster",
    )
    balanced: bool = Field(False, description="weigh foreground and background so that they count equally")
    depth: int = Field(-1, ge=-1, description="as for a fine-tuned network")
    inputs: Literal["features", "images"] = "images"
    batch_size: PositiveInt = 128
    mixup: NonNegativeFloat | None = Field(0.0, description="alpha of mixup of images and losses; 0 = off")
    flip: bool = Field(True, description="random horizontal flip, of image and mask")
    background_column: Literal["last", "first"] = Field(
        "last", description="of the head of a `checkpoint`; here it is always the last"
    )

    @property
    def background(self) -> bool:
        return True

    @model_validator(mode="after")
    def _no_groups(self) -> "DenseConfig":
        if self.groups is not None:
            raise ValueError("groups have no effect on a dense network; remove them")
        if self.class_numbering != "as_is":
            raise ValueError("class_numbering is for a flat head; remove it")
        if self.background_column != "last" and self.checkpoint is None:
            raise ValueError("background_column is for a checkpoint; remove it")
        return self

    def plain(self) -> FineTuningConfig:
        """The recipe of a flat classifier by the same budget: what dense training is held against."""
        return FineTuningConfig(
            **self.model_dump(
                include=set(FineTuningConfig.model_fields) - {"checkpoint", "expected_accuracy", "tolerance"}
            )
        )


class LossConstraintConfig(Model):
    """How the loss constraint of Unleashing Mask is estimated: the mean cross-entropy of the start network on the ID
    training images, without augmentation, while random masks keep a share of the weights of every layer."""

    keep_rate: float = Field(
        0.965, gt=0, le=1, description="share of each convolution's and linear layer's weights"
    )
    draws: PositiveInt = Field(5, description="of the masks; the constraint is their mean")
    seed: NonNegativeInt = 0
    rounding: Literal["nearest", "truncated"] = Field(
        "nearest", description="of the number of weights that a mask drops; `truncated` is the public code's"
    )


class EpochTrainingConfig(NetworkRecipe):
    """What Unleashing Mask and outlier exposure share: the backbone goes on training, with SGD and a cosine schedule that
    moves once an epoch, on its own loss or on one that is kept at a constraint."""

    of_checkpoints: ClassVar[set[str]] = NetworkRecipe.of_checkpoints | {"method"}

    id_loss: Literal["um", "cross_entropy"] = Field(
        "um",
        description="of a batch of ID images with mean cross-entropy c: |beta c - u| + u, with u the loss constraint, or c",
    )
    loss_constraint: PositiveFloat | None = Field(None, description="u; None = estimated as `estimate` says")
    estimate: LossConstraintConfig | None = Field(
        LossConstraintConfig(), description="how u is estimated; null where loss_constraint is given"
    )
    beta: PositiveFloat = 1.0
    start: PositiveInt | str = Field(
        "last",
        description="weights to start from: `last` = the backbone's own; `best` = its epoch of highest validation accuracy, "
        "or the number of an epoch it has saved; else the path of a checkpoint of the same network",
    )
    epochs: PositiveInt
    steps_per_epoch: PositiveInt | None = Field(
        None, description="batches after which an epoch ends early; None = all training images"
    )
    batch_size: PositiveInt = Field(256, ge=2)
    learning_rate: PositiveFloat
    warmup_epochs: NonNegativeInt = Field(0, description="epochs in which the learning rate rises linearly")
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = Field(False, description="the paper's text has it, its code has not")
    weight_decay: NonNegativeFloat = Field(
        1e-4, description="of everything that is trained, scores of masks, too"
    )
    crop_padding: NonNegativeInt = Field(0, description="pixels of zero padding before a random crop")
    flip: bool = Field(False, description="random horizontal flip")
    scored_epoch: Literal["last", "best"] | PositiveInt = Field(
        "last",
        description="whose weights are scored; `best` = of highest accuracy on the ID validation images",
    )
    save_every: PositiveInt | None = Field(
        None,
        description="epochs between saved weights; the first, the last and, with validation images, the best are always saved",
    )

    @model_validator(mode="after")
    def _constraint_with_an_effect(self) -> "EpochTrainingConfig":
        names = ("loss_constraint", "estimate", "beta")
        if self.id_loss != "um":
            for name in names:
                if name in self.model_fields_set:
                    raise ValueError(
                        f"{name} has no effect on plain cross-entropy; set id_loss: um, or remove it"
                    )
        elif self.loss_constraint is not None and "estimate" in self.model_fields_set and self.estimate:
            raise ValueError(
                "estimate has no effect where loss_constraint is given; remove one of the two, or set it to null"
            )
        elif self.loss_constraint is None and self.estimate is None:
            raise ValueError("estimate is null and loss_constraint, too, expected one of them; give one")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov has no effect without momentum; remove it")
        if isinstance(self.scored_epoch, int) and self.scored_epoch > self.epochs:
            raise ValueError(
                f"scored_epoch is {self.scored_epoch}, expected at most the {self.epochs} epochs"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs}, expected less than the {self.epochs} epochs"
            )
        return self

    @field_validator("start", "scored_epoch", mode="before")
    @classmethod
    def _epoch_or_word(cls, value: Any, info: ValidationInfo) -> Any:
        words, path = ("last", "best"), info.field_name == "start" and "." in str(value)
        number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if value in words or number or path:
            return value
        other = ", or the path of a checkpoint with its ending" if info.field_name == "start" else ""
        raise ValueError(f"found {value!r}, expected last, best or the number of an epoch from 1{other}")

    @property
    def without_effect(self) -> set[str]:
        """Fields that nothing depends on, by the values of the others."""
        if self.id_loss != "um":
            return {"loss_constraint", "estimate", "beta"}
        return {"estimate"} if self.loss_constraint is not None else set()

    def in_force(self) -> dict[str, Any]:
        """What the trained weights depend on, ready for JSON."""
        unused = self.without_effect | {"checkpoint", "expected_accuracy", "tolerance"}
        return self.model_dump(mode="json", exclude_none=True, exclude=unused)

    def trained_by(self) -> Self:
        """The recipe without what the trained weights do not depend on."""
        return self.changed(expected_accuracy=None, tolerance=0.5)

    def changed(self, **changes: Any) -> Self:
        """The same recipe with some fields changed and checked anew, without those that lose their effect by it.

        Raises
        ------
        ValueError : a change that has no effect, or a value out of range
        """
        draft = self.model_copy(update=changes)
        lost = draft.without_effect - {name for name, value in changes.items() if value is not None}
        kept = draft.model_dump(include=draft.model_fields_set - lost, warnings=False)
        return type(self)(**kept)


class UnleashingMaskConfig(EpochTrainingConfig):
    """A network of Unleashing Mask (UM), fine-tuned until its loss rises to the constraint, or, with a `keep_rate`, of
    UM Adopts Pruning (UMAP), which gets there by a learned mask of each layer's weights.

    Defaults are those of the paper's code but for augmentation, which is off, and dropout, which is the backbone's.
    """

    method: Literal["unleashing_mask"] = "unleashing_mask"
    epochs: PositiveInt = 100
    learning_rate: PositiveFloat = 0.1
    keep_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of each convolution's and linear layer's weights that a mask keeps; None = no masks",
    )
    freeze_weights: bool = Field(True, description="only the scores of the masks are trained; with keep_rate")
    initial_scores: Literal["random", "magnitude"] = Field(
        "random",
        description="of the masks, with keep_rate: uniform in +-1 / sqrt(fan_in), or the weights themselves, so that the smallest "
        "are dropped first",
    )
    rounding: Literal["nearest", "truncated"] = Field(
        "nearest", description="of the number of weights that a mask drops; `truncated` is the public code's"
    )

    @model_validator(mode="after")
    def _masks_with_an_effect(self) -> "UnleashingMaskConfig":
        if self.keep_rate is None:
            for name in ("freeze_weights", "initial_scores", "rounding"):
                if name in self.model_fields_set:
                    raise ValueError(f"{name} has no effect without masks; set keep_rate, or remove it")
        elif self.keep_rate == 1 and self.freeze_weights:
            raise ValueError(
                "keep_rate 1 drops nothing, so that frozen weights leave nothing to learn; lower it"
            )
        return self

    @property
    def without_effect(self) -> set[str]:
        masks = {"freeze_weights", "initial_scores", "rounding"} if self.keep_rate is None else set()
        return super().without_effect | masks

    def plain(self) -> "UnleashingMaskConfig":
        """The same budget with plain cross-entropy and no masks: what UM and UMAP are held against."""
        return self.changed(id_loss="cross_entropy", keep_rate=None, expected_accuracy=None)


class EnergyMargins(Model):
    """Of the energy E(z) = -logsumexp(z), squared hinges: ID images below one margin, outliers above the other."""

    inside: float = Field(-25.0, description="m_in: ID images with a higher energy are penalised")
    outside: float = Field(-7.0, description="m_out: outliers with a lower energy are penalised")

    @model_validator(mode="after")
    def _apart(self) -> "EnergyMargins":
        if self.inside >= self.outside:
            raise ValueError(
                f"inside is {self.inside:g} and outside {self.outside:g}, expected the energy of ID images below that of outliers"
            )
        return self


class PosteriorConfig(Model):
    """The Bayesian linear regression of POEM, from which the boundary is drawn anew each epoch."""

    prior_variance: PositiveFloat = Field(20.0, description="sigma")
    noise_variance: PositiveFloat = Field(0.5, description="sigma_n")
    confidence: PositiveFloat = Field(
        3.9, description="targets: -confidence for ID images, +confidence for outliers"
    )
    buffer_epochs: PositiveInt = Field(4, description="of how many epochs the chosen outliers are kept")


class DOEConfig(Model):
    """The worst-case perturbation of the weights in DOE."""

    unperturbed_epochs: NonNegativeInt = Field(5, description="epochs of plain outlier exposure before")
    strengths: tuple[PositiveFloat, ...] = Field(
        (0.1, 0.01, 0.001, 0.0001), min_length=1, description="gamma, drawn for each step"
    )
    kept: float = Field(0.6, ge=0, lt=1, description="share of the earlier direction in the running mean")
    max_norm: PositiveFloat = Field(1.0, description="to which gradients are clipped")


class OutlierExposureConfig(EpochTrainingConfig):
    """A network fine-tuned with auxiliary outliers (`outliers` of the experiment). Defaults are those of the code of
    Unleashing Mask; the energy loss with `sample: poem` is POEM."""

    of_checkpoints: ClassVar[set[str]] = EpochTrainingConfig.of_checkpoints | {"objective"}
    belongs: ClassVar[dict[str, tuple[str, set[str]]]] = {
        "margins": ("objective", {"energy"}),
        "doe": ("objective", {"doe"}),
        "posterior": ("sample", {"poem"}),
        "quantile": ("sample", {"ntom"}),
        "pool_size": ("sample", {"ntom", "poem"}),
    }

    method: Literal["outlier_exposure"] = "outlier_exposure"
    objective: Literal["oe", "energy", "doe", "ntom"] = Field(
        "oe",
        description="loss of the outliers: cross-entropy to the uniform distribution; energy margins of both; uniform under "
        "perturbed weights; a class of their own, the last of K + 1",
    )
    sample: Literal["random", "ntom", "poem"] = Field(
        "random",
        description="which of the pool an epoch takes: any; hard ones, taken for ID; those near a boundary drawn from a posterior",
    )
    id_loss: Literal["um", "cross_entropy"] = Field(
        "cross_entropy", description="as for Unleashing Mask; the outliers' loss is not touched by it"
    )
    epochs: PositiveInt = 10
    learning_rate: PositiveFloat = 0.01
    outlier_weight: PositiveFloat | None = Field(
        None,
        description="factor of the outliers' loss; None = 0.5 for oe, 0.1 for energy, 1 for doe and ntom",
    )
    outlier_factor: PositiveFloat = Field(
        1.0, description="outliers for each ID image, of an epoch and of a batch"
    )
    pool_size: PositiveInt = Field(
        400_000,
        description="sample ntom and poem: outliers from which an epoch chooses; at most all there are",
    )
    margins: EnergyMargins = Field(EnergyMargins(), description="objective energy")
    doe: DOEConfig = Field(DOEConfig(), description="objective doe")
    posterior: PosteriorConfig = Field(PosteriorConfig(), description="sample poem")
    quantile: float = Field(
        0.125, ge=0, lt=1, description="sample ntom: share of the hardest of the pool that is skipped"
    )

    @model_validator(mode="after")
    def _exposure_with_an_effect(self) -> "OutlierExposureConfig":
        for name, (key, values) in self.belongs.items():
            if name in self.model_fields_set and getattr(self, key) not in values:
                raise ValueError(
                    f"{name} has no effect without {key}: {' or '.join(sorted(values))}; remove it"
                )
        if self.objective == "doe" and self.doe.unperturbed_epochs >= self.epochs:
            raise ValueError(
                f"doe.unperturbed_epochs is {self.doe.unperturbed_epochs}, expected less than the {self.epochs} epochs, so that "
                "the weights are perturbed at all"
            )
        return self

    @property
    def without_effect(self) -> set[str]:
        unused = {name for name, (key, values) in self.belongs.items() if getattr(self, key) not in values}
        return super().without_effect | unused

    @property
    def background(self) -> bool:
        return self.objective == "ntom"

    @property
    def weight(self) -> float:
        """The factor of the outliers' loss that is in force."""
        defaults = {"oe": 0.5, "energy": 0.1, "doe": 1.0, "ntom": 1.0}
        return defaults[self.objective] if self.outlier_weight is None else self.outlier_weight


RECIPES: dict[str, type[NetworkRecipe]] = {
    "classifier": FineTuningConfig,
    "dense": DenseConfig,
    "unleashing_mask": UnleashingMaskConfig,
    "outlier_exposure": OutlierExposureConfig,
}


def training_method(recipe: Any) -> str:
    """How a network is made: `classifier` where its recipe names no `method`."""
    given = recipe.get("method") if isinstance(recipe, Mapping) else getattr(recipe, "method", None)
    return "classifier" if given is None else str(given)


NetworkConfig = Annotated[
    Annotated[FineTuningConfig, Tag("classifier")]
    | Annotated[DenseConfig, Tag("dense")]
    | Annotated[UnleashingMaskConfig, Tag("unleashing_mask")]
    | Annotated[OutlierExposureConfig, Tag("outlier_exposure")],
    Discriminator(training_method),
]


class MOSAblations(Model):
    """What 13_mos trains beside the networks: heads with other groups, and networks fine-tuned to several depths."""

    numbers: tuple[PositiveInt, ...] = Field((), description="numbers of k-means and of random groups")
    draws: PositiveInt = Field(3, description="of random groups")
    depths: tuple[Annotated[int, Field(ge=-1)], ...] = Field(
        (), description="0 = the head, n = the last n blocks, too, -1 = everything"
    )
    depth_recipe: FineTuningConfig = Field(
        FineTuningConfig(inputs="images"),
        description="of all depths, with a flat head and the groups of `mos`; each step passes through the network",
    )

    @model_validator(mode="after")
    def _options_with_an_effect(self) -> "MOSAblations":
        for name in ("groups", "depth", "checkpoint"):
            if name in self.depth_recipe.model_fields_set:
                raise ValueError(f"{name} has no effect in depth_recipe; remove it")
        if self.depth_recipe.inputs != "images":
            raise ValueError("depths beyond the head need images; set depth_recipe.inputs: images")
        return self


class DFBAblations(Model):
    """What 14_dfb trains beside the network `dfb`: heads on other pseudo masks."""

    thresholds: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (0.3, 0.5, 0.7), description="of the masks"
    )
    recipe: DenseConfig = Field(
        DenseConfig(depth=0, inputs="features", flip=False),
        description="of all: by default the head alone, on feature maps held in memory; the masks are those of `dfb` but for "
        "what is varied",
    )

    @field_validator("recipe", mode="before")
    @classmethod
    def _of_the_head_alone(cls, data: Any) -> Any:
        head_alone = {"depth": 0, "inputs": "features", "flip": False}
        return head_alone | dict(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _options_with_an_effect(self) -> "DFBAblations":
        for name in ("masks", "checkpoint"):
            if name in self.recipe.model_fields_set:
                raise ValueError(f"{name} has no effect in recipe; remove it")
        return self


class UnleashingAblations(Model):
    """What 15_unleashing_mask trains and looks at beside the networks `um` and `umap`."""

    factors: tuple[PositiveFloat, ...] = Field((), description="loss constraints, in units of the estimate")
    keep_rates: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((), description="of UMAP's masks")
    epochs: tuple[PositiveInt, ...] = Field((), description="lengths of UM's training")
    estimate_keep_rates: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (), description="at which the loss under random masks is drawn, beside the one in use"
    )
    changes: dict[str, Any] = Field(
        {},
        description="what the recipes of the first two have otherwise than `um` and `umap`, such as fewer epochs",
    )
    images: PositiveInt = Field(500, description="of each set, for the detection along a training")
    from_scratch: BackboneConfig | None = Field(
        None,
        description="a small network to be watched from its first epoch, where the backbone is a checkpoint",
    )

    @model_validator(mode="after")
    def _known_changes(self) -> "UnleashingAblations":
        for name in self.changes:
            if name not in EpochTrainingConfig.model_fields:
                raise ValueError(f"changes names {name!r}; {nearest(name, EpochTrainingConfig.model_fields)}")
        if self.from_scratch is not None and self.from_scratch.training is None:
            raise ValueError("from_scratch is a network to be trained; give it training instead of weights")
        return self


class FeaturesConfig(Model):
    """The forward pass that fills the feature banks."""

    batch_size: PositiveInt | None = Field(
        None, description="None = 32 on the CPU, whose caches it fits, else 256"
    )
    shard_size: PositiveInt = Field(
        2048, description="images a shard file; an interrupted pass goes on at a shard"
    )
    workers: NonNegativeInt = Field(0, description="processes that decode image files; arrays need none")
    taps: tuple[str, ...] = Field((), description="modules whose pooled outputs are kept beside the features")
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="of the network's arithmetic, the head's is always float32: full float32; tf32 = 10 bits of mantissa "
        "in convolutions and products on CUDA; bfloat16 = 7 bits where PyTorch's autocast allows it",
    )
    compile: bool = Field(
        False,
        description="torch.compile the network: takes a minute and saves about a tenth of a pass on two cores",
    )


class TuningConfig(Model):
    """Choosing hyper-parameters: every combination of a grid is scored on the ID validation images against images
    of a set that is not reported, and the best one becomes a row of its own beside the default."""

    name: str = Field(description="of the outliers, for tables")
    images: ImageSource
    related: tuple[str, ...] = Field(
        (), description="OOD sets with images like these; tuned rows leave them out"
    )
    metric: Literal["auroc", "fpr95"] = "auroc"
    grids: dict[str, dict[str, list[Any]]] = Field(
        description="row of detectors -> hyper-parameter -> values; where several are best, the first is taken"
    )


class OutliersConfig(Model):
    """Auxiliary outliers for networks that are trained with some."""

    name: str = Field(description="for tables")
    images: ImageSource
    related: tuple[str, ...] = Field(
        (), description="OOD sets with images like these; networks trained with them are not reported there"
    )


class MetricsConfig(Model):
    """The 95 % confidence intervals."""

    bootstrap_resamples: PositiveInt = 1000
    bootstrap_seed: NonNegativeInt = Field(
        0, description="the same for every seed of an experiment: resamples are of images, which seeds share"
    )


class PublishedConfig(Model):
    """Which rows of published.csv stand beside the measured ones, and why they may differ."""

    id_set: str
    architecture: str
    ood_sets: dict[str, str] = Field(description="name here -> name in published.csv")
    note: str = Field(description="what makes the two comparable or not")


class ExperimentConfig(Model):
    """One experiment: one file in configs/."""

    name: str = Field(pattern="^[A-Za-z0-9_-]+$")
    description: str = ""
    id: InDistribution
    ood: tuple[OutOfDistribution, ...] = Field(min_length=1)
    transform: TransformConfig
    backbone: BackboneConfig
    features: FeaturesConfig = FeaturesConfig()
    networks: dict[str, NetworkConfig] = Field(
        {},
        description="networks made from the backbone; a row of detectors names the one it scores as `network`. Where there "
        "is no `group`, no `flat` or no `dfb`, these are heads with k-means groups and with a flat softmax, and the paper's "
        "recipe of DFB",
    )
    mos_ablations: MOSAblations | None = Field(
        None, description="for 13_mos, where training some twenty heads is affordable"
    )
    dfb_ablations: DFBAblations | None = Field(None, description="for 14_dfb")
    unleashing_ablations: UnleashingAblations | None = Field(None, description="for 15_unleashing_mask")
    outliers: OutliersConfig | None = Field(
        None, description="auxiliary outliers, for networks with method: outlier_exposure"
    )
    detectors: dict[str, dict[str, Any]] = Field(
        description="row name -> hyper-parameters; see ood_helpers.detectors"
    )
    tuning: TuningConfig | None = None
    metrics: MetricsConfig = MetricsConfig()
    published: PublishedConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _empty_entry_means_defaults(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            if "networks" in data and data["networks"] is None:
                data = {**data, "networks": {}}
            for name in {"detectors", "networks"} & data.keys():
                if isinstance(data[name], Mapping):
                    data = {**data, name: {key: value or {} for key, value in data[name].items()}}
            made = data.get("networks")
            if isinstance(made, Mapping) and isinstance(made.get("dfb"), Mapping):
                data = {**data, "networks": {**made, "dfb": {"method": "dense", **made["dfb"]}}}
        return data

    @model_validator(mode="after")
    def _distinct_names(self) -> "ExperimentConfig":
        names = [ood.name for ood in self.ood]
        for name in names:
            if names.count(name) > 1 or name in ("train", "validation", "test", "tuning", "outliers"):
                raise ValueError(f"the OOD set name {name!r} is taken; give every set its own name")
        if self.published is not None:
            for name in self.published.ood_sets:
                if name not in names:
                    raise ValueError(
                        f"published.ood_sets names {name!r}, which is no OOD set; {nearest(name, names)}"
                    )
        return self

    @model_validator(mode="after")
    def _known_networks(self) -> "ExperimentConfig":
        for name, recipe in self.networks.items():
            groups = recipe.softmax_groups
            number = None if groups is None else groups.number
            if number is not None and number > self.id.num_classes:
                raise ValueError(
                    f"networks.{name}.groups.number is {number}, expected at most the {self.id.num_classes} classes"
                )
        for row, settings in self.detectors.items():
            name, known = settings.get("network"), {*self.networks, "group", "flat", "dfb"}
            if name is not None and name not in known:
                raise ValueError(f"detectors.{row}.network names {name!r}; {nearest(str(name), known)}")
        return self

    @model_validator(mode="after")
    def _training_is_possible(self) -> "ExperimentConfig":
        for name, recipe in self.networks.items():
            if not isinstance(recipe, EpochTrainingConfig) or recipe.checkpoint is not None:
                continue
            if isinstance(recipe, OutlierExposureConfig) and self.outliers is None:
                raise ValueError(
                    f"networks.{name} is trained with auxiliary outliers, but there are none; add outliers"
                )
            if recipe.scored_epoch == "best" and self.id.validation is None:
                raise ValueError(
                    f"networks.{name}.scored_epoch: best needs ID images of its own; add id.validation, or score the last"
                )
            self._start_is_possible(name, recipe.start)
        names = [ood.name for ood in self.ood]
        if self.outliers is not None and not any(
            isinstance(recipe, OutlierExposureConfig) for recipe in self.networks.values()
        ):
            raise ValueError(
                "outliers have no effect without a network trained with them; add one with method: outlier_exposure"
            )
        for name in () if self.outliers is None else self.outliers.related:
            if name not in names:
                raise ValueError(f"outliers.related names {name!r}; {nearest(name, names)}")
        return self

    def _start_is_possible(self, name: str, start: str | int) -> None:
        training = self.backbone.training
        if start == "last" or (isinstance(start, str) and start != "best"):
            return
        if training is None:
            raise ValueError(
                f"networks.{name}.start is {start}, but the backbone is not trained here and has no epochs; take last or a path"
            )
        if start == "best" and self.id.validation is None:
            raise ValueError(
                f"networks.{name}.start: best needs ID images of its own; add id.validation, or start from the last"
            )
        saved = {training.epochs, *range(0, training.epochs + 1, training.save_every or training.epochs)} - {
            0
        }
        if isinstance(start, int) and start not in saved:
            raise ValueError(
                f"networks.{name}.start is {start}, but the backbone saves the epochs {sorted(saved)}; take one of them, or "
                "change backbone.training.save_every"
            )

    @model_validator(mode="after")
    def _ablations_have_an_effect(self) -> "ExperimentConfig":
        ablations = self.unleashing_ablations
        if ablations is None:
            return self
        recipes = [
            recipe
            for recipe in self.networks.values()
            if isinstance(recipe, UnleashingMaskConfig) and recipe.checkpoint is None
        ]
        um = [recipe for recipe in recipes if recipe.keep_rate is None and recipe.id_loss == "um"]
        umap = [recipe for recipe in recipes if recipe.keep_rate is not None]
        for names, of_kind, kind in (
            (("factors", "epochs"), um, "weights (UM)"),
            (("keep_rates",), umap, "masks (UMAP)"),
        ):
            for name in names:
                if getattr(ablations, name) and not of_kind:
                    raise ValueError(
                        f"unleashing_ablations.{name} varies a training of {kind}, but there is none; add one, or set unleashing_ablations to null"
                    )
        if ablations.from_scratch is not None and self.backbone.training is not None:
            raise ValueError(
                "unleashing_ablations.from_scratch has no effect, as the backbone is trained here and watched itself; remove it"
            )
        if ablations.changes and not (ablations.factors or ablations.keep_rates):
            raise ValueError(
                "unleashing_ablations.changes has no effect without factors or keep_rates; remove it"
            )
        for recipe in (*um[:1], *umap[:1]) if ablations.changes else ():
            recipe.changed(**ablations.changes)
        return self

    @model_validator(mode="after")
    def _tuning_is_possible(self) -> "ExperimentConfig":
        if self.tuning is None:
            return self
        if self.id.validation is None:
            raise ValueError("tuning needs ID images of its own; add id.validation")
        names = [ood.name for ood in self.ood]
        for key, found, valid in (
            ("grids", self.tuning.grids, self.detectors),
            ("related", self.tuning.related, names),
        ):
            for name in found:
                if name not in valid:
                    raise ValueError(f"tuning.{key} names {name!r}; {nearest(name, valid)}")
        for row, grid in self.tuning.grids.items():
            if f"{row}_tuned" in self.detectors:
                raise ValueError(f"the row {row}_tuned is taken by the tuned {row}; give it another name")
            if not grid or not all(grid.values()):
                raise ValueError(f"tuning.grids.{row} has no values; give a list for each hyper-parameter")
        if all(name in self.tuning.related for name in names):
            raise ValueError("tuning.related names every OOD set, so that nothing is left to report")
        return self


def config_names() -> list[str]:
    """Names of the experiments in configs/."""
    return sorted(path.stem for path in CONFIG_DIRECTORY.glob("*.yaml"))


def resolve_path(path: str | Path) -> Path:
    """An absolute path: as given, below the working directory if it exists there, else below the project.

    Notebooks run from notebooks/ in JupyterLab and from the project in papermill; `../shared` means the
    folder beside the project in both.
    """
    path = Path(path).expanduser()
    if not path.is_absolute():
        path = path if path.exists() else PROJECT_ROOT / path
    return path.resolve()


def yaml_path(name: str | Path, directory: Path, kind: str) -> Path:
    """The path of a YAML file: `name` is that of a file in one of the project's folders (without .yaml), or a path.

    Raises
    ------
    InputError : there is none
    """
    path = Path(name).expanduser()
    names = sorted(found.stem for found in directory.glob("*.yaml"))
    if path.suffix not in (".yaml", ".yml"):
        path = directory / f"{name}.yaml"
        if not path.exists():
            folder = directory.relative_to(PROJECT_ROOT).as_posix()
            raise InputError(f"No {kind} {str(name)!r} in {folder}/; {nearest(str(name), names)}")
        return path
    path = resolve_path(path)
    if not path.exists():
        raise InputError(f"No {kind} {path}; give a path to a YAML file or a name: {', '.join(names)}.")
    return path


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises
    ------
    InputError : it is not valid YAML
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def load_config(
    experiment: str | Path, data_root: str | Path | None = None, overrides: Iterable[str] = ()
) -> ExperimentConfig:
    """Read and validate an experiment.

    Parameters
    ----------
    experiment : name of a file in configs/ (without .yaml), or a path to a YAML file
    data_root : folder that replaces `${data_root}`; None = data/ in the project
    overrides : settings such as "himplos.percentile=50", "backbone.training.epochs=3" or
        "ood.SVHN.images.subset.first=256"; the value is YAML

    Raises
    ------
    InputError : unknown experiment, unreadable YAML, unknown key, invalid value
    """
    path = yaml_path(experiment, CONFIG_DIRECTORY, "experiment")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise InputError(f"{path} holds {type(data).__name__}, expected a mapping of experiment settings.")
    for override in overrides:
        _apply_override(data, override)
    root = resolve_path(data_root or "data")
    try:
        return ExperimentConfig.model_validate(_substitute(data, str(root)))
    except ValidationError as error:
        raise InputError(f"{path.name}: {_describe(error)}") from None


def _substitute(value: Any, data_root: str) -> Any:
    """Replace `${data_root}` in every string; the fields' own defaults contain it too."""
    if isinstance(value, dict):
        defaults = {"torchvision": "root", "archive": "directory"}
        folder = defaults.get(value.get("source"))
        filled = {folder: "${data_root}", **value} if folder else value
        return {key: _substitute(item, data_root) for key, item in filled.items()}
    if isinstance(value, list):
        return [_substitute(item, data_root) for item in value]
    return value.replace("${data_root}", data_root) if isinstance(value, str) else value


def _apply_override(data: dict, override: str) -> None:
    """Set one value of the raw config: KEY.KEY=VALUE; lists are entered by the `name` of their item."""
    match = re.fullmatch(r"\s*([^=\s]+)\s*=(.*)", override, flags=re.DOTALL)
    if not match:
        raise InputError(
            f"The setting {override!r} is not of the form KEY=VALUE, for example himplos.percentile=50."
        )
    path = match[1]
    try:
        value = yaml.safe_load(match[2])
    except yaml.YAMLError:
        raise InputError(
            f"The value of the setting {override!r} is not valid YAML; put text with brackets in quotes."
        ) from None
    detectors = data.get("detectors", {})
    first, _ = _split_path(path, data)
    if first not in ExperimentConfig.model_fields:
        row, _ = _split_path(path, detectors)
        if row not in detectors:
            raise InputError(
                f"The setting {override!r} starts with {row!r}, neither a setting nor a detector of this experiment; "
                + nearest(row, [*ExperimentConfig.model_fields, *detectors])
            )
        path = f"detectors.{path}"
    place: Any = data
    walked: list[str] = []
    while True:
        named = place
        if isinstance(place, list):
            named = {item.get("name"): item for item in place if isinstance(item, dict)}
        key, path = _split_path(path, named)
        if path is None:
            break
        if isinstance(place, list) and key not in named:
            raise InputError(f"The setting {override!r} names {key!r}; {nearest(key, map(str, named))}")
        if named.get(key) is None:
            named[key] = {}
        place = named[key]
        walked.append(key)
        if not isinstance(place, dict | list):
            raise InputError(
                f"The setting {override!r} goes below {'.'.join(walked)}, which is a plain value."
            )
    if isinstance(place, list):
        raise InputError(f"The setting {override!r} ends in a list; name one of its items and a key of it.")
    place[key] = value


def _split_path(path: str, names: Iterable[str]) -> tuple[str, str | None]:
    """The first name of a dotted path and what follows it (None: nothing): the longest of `names` that the path starts
    with, for names such as pytorch_ood.KNN have dots themselves, else everything up to the first dot."""
    fitting = [name for name in names if f"{path}.".startswith(f"{name}.")]
    first = max(fitting, key=len, default=path.partition(".")[0])
    return first, path[len(first) + 1 :] if len(path) > len(first) else None


def _describe(error: ValidationError) -> str:
    """All problems of a config as one sentence."""
    problems = []
    for problem in error.errors():
        parts = list(problem["loc"])
        if parts[:1] == ["networks"] and parts[2:3] and parts[2] in RECIPES:
            del parts[2]  # pydantic names the kind of network, too
        place = ".".join(map(str, parts))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "union_tag_invalid" and parts[:1] == ["networks"]:
            message = f"unknown method {problem['ctx']['tag']!r}; {nearest(problem['ctx']['tag'], list(RECIPES)[1:])}"
        if (
            "input" in problem
            and not isinstance(problem["input"], dict | list)
            and problem["type"] != "value_error"
        ):
            message = f"found {problem['input']!r}, expected: {message}"
        problems.append(f"{place}: {message}" if place else message)
    return "; ".join(problems)
