"""What the recipes of several training methods share: fine-tuning with BiT's schedule, and continuing by epochs."""

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ood_helpers.config.base import Model
from ood_helpers.config.networks import NetworkRecipe

MANY, VERY_MANY = 20_000, 500_000  # training images from which BiT's recipe takes more steps


class TrainingImages(Model):
    """Training that passes images through the network, instead of features that are kept."""

    depth: int = Field(
        0, ge=-1, description="last blocks of the backbone trained with the head; -1 = all of it"
    )
    resize: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="[height, width] of training images before a random crop to the transform's size"
    )
    crop_padding: NonNegativeInt = Field(0, description="pixels of zero padding before a random crop")
    flip: bool = Field(False, description="random horizontal flip")
    micro_batch_size: PositiveInt | None = Field(
        None, description="images in a pass; the gradients of a batch are summed; None = batch_size"
    )


class FineTuningRecipe(NetworkRecipe):
    """A new head, zero at the start, and the recipe of BiT: SGD with momentum, a linear warm-up and three drops of the
    learning rate to a tenth.

    Source: Kolesnikov et al., ECCV 2020, arXiv 1912.11370, section 3.3.
    """

    images: TrainingImages | None = Field(
        None, description="None = the head alone, on features that are kept"
    )
    batch_size: PositiveInt = 512
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

    @model_validator(mode="after")
    def _steps_in_order(self) -> "FineTuningRecipe":
        if self.schedule is not None and any(a >= b for a, b in zip(self.schedule, self.schedule[1:])):
            raise ValueError(f"the steps of schedule {list(self.schedule)} do not rise; put them in order")
        return self

    @property
    def depth(self) -> int:
        """How many of the backbone's last blocks are trained; -1 = all."""
        return 0 if self.images is None else self.images.depth

    def check(self, experiment: Any) -> None:
        architecture, blocks = experiment.backbone.architecture, experiment.backbone.blocks
        if self.depth > blocks:
            raise ValueError(
                f"images.depth is {self.depth}, expected -1 to {blocks}, the number of blocks of {architecture}; lower it"
            )

    def steps(self, images: int) -> tuple[int, ...]:
        """The steps at which the warm-up ends, the learning rate drops (three times) and the training ends."""
        if self.schedule is not None:
            return self.schedule
        if images >= VERY_MANY:
            return 500, 6000, 12000, 18000, 20000
        return (500, 3000, 6000, 9000, 10000) if images >= MANY else (100, 200, 300, 400, 500)

    def mixup_alpha(self, images: int) -> float:
        """The alpha of mixup, 0 for none."""
        return (0.1 if images >= MANY else 0.0) if self.mixup is None else self.mixup

    def exact_on_features(self, images: int) -> bool:
        """Whether a training on features gives the head that a training on images gives: only the head is trained, on
        images that are always the same."""
        options = self.images or TrainingImages()
        changed = options.resize or options.crop_padding or options.flip
        return self.depth == 0 and not changed and not self.mixup_alpha(images)


class EpochTrainingRecipe(NetworkRecipe):
    """The backbone continues to train, with SGD and a cosine schedule that moves once per epoch."""

    start: PositiveInt | str = Field(
        "last",
        description="weights to start from: `last` = the backbone's own; `best` = its epoch of highest validation accuracy, "
        "or the number of an epoch it has saved; else the path of a checkpoint of the same network",
    )
    epochs: PositiveInt
    steps_per_epoch: PositiveInt | None = Field(None, description="batches in an epoch; None = all images")
    batch_size: PositiveInt = Field(256, ge=2)
    learning_rate: PositiveFloat
    warmup_epochs: NonNegativeInt = Field(0, description="epochs in which the learning rate rises linearly")
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = Field(False, description="the paper's text has it, its code has not")
    weight_decay: NonNegativeFloat = Field(1e-4, description="of all that is trained, scores of masks too")
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

    @field_validator("start", "scored_epoch", mode="before")
    @classmethod
    def _epoch_or_word(cls, value: Any, info: ValidationInfo) -> Any:
        words, path = ("last", "best"), info.field_name == "start" and "." in str(value)
        number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if value in words or number or path:
            return value
        other = ", or the path of a checkpoint with its ending" if info.field_name == "start" else ""
        raise ValueError(f"found {value!r}, expected last, best or the number of an epoch from 1{other}")

    @model_validator(mode="after")
    def _epochs_in_range(self) -> "EpochTrainingRecipe":
        epochs, warmup, scored = self.epochs, self.warmup_epochs, self.scored_epoch
        if isinstance(scored, int) and scored > epochs:
            raise ValueError(f"scored_epoch is {scored}, expected at most the {epochs} epochs")
        if warmup >= epochs:
            raise ValueError(f"warmup_epochs is {warmup}, expected less than the {epochs} epochs")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum; raise it, or set nesterov: false")
        return self

    @property
    def files(self) -> list[str]:
        is_path = isinstance(self.start, str) and self.start not in ("last", "best")
        return [self.start] if is_path else []

    def check(self, experiment: Any) -> None:
        for key in ("scored_epoch", "start"):
            if getattr(self, key) == "best" and experiment.id.validation is None:
                raise ValueError(
                    f"{key}: best needs ID images of its own; add id.validation, or take the last"
                )
        training = experiment.backbone.training
        if self.start == "last" or self.files:
            return
        if training is None:
            raise ValueError(
                f"start is {self.start}, but the backbone is not trained here and has no epochs; take last or a path"
            )
        if isinstance(self.start, int) and self.start not in training.saved_epochs():
            raise ValueError(
                f"start is {self.start}, but the backbone saves the epochs {training.saved_epochs()}; take one of them, or "
                "change backbone.training.save_every"
            )
