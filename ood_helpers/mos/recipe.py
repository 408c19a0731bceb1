"""The recipe of MOS: a head with a softmax in each group of classes, and the flat head of its baselines.

Source: Huang and Li, "MOS", CVPR 2021, arXiv 2105.01879, sections 3 and 4.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from ood_helpers.config.base import CONFIG_DIRECTORY, Model, yaml_path
from ood_helpers.config.images import ClassNumbering
from ood_helpers.config.networks import RECIPES, CheckpointRecipe, NetworkRecipe
from ood_helpers.training.recipes import FineTuningRecipe

GROUP_DIRECTORY = CONFIG_DIRECTORY / "groups"


def group_path(file: str | Path) -> Path:
    """The path of a group file: `file` is a name in configs/groups/ (without .yaml), or a path to a YAML file.

    Raises
    ------
    InputError : there is none
    """
    return yaml_path(file, GROUP_DIRECTORY, "group file")


class TaxonomyGroups(Model):
    """Groups by meaning, from a file."""

    strategy: Literal["taxonomy"]
    file: str = Field(description="a name in configs/groups/ or the path of a YAML file")


class KMeansGroups(Model):
    """k-means of the classes' mean training features."""

    strategy: Literal["kmeans"]
    number: PositiveInt = Field(description="how many groups")
    seed: NonNegativeInt = 0


class RandomGroups(Model):
    """Random groups whose sizes differ by one at most."""

    strategy: Literal["random"]
    number: PositiveInt = Field(description="how many groups")
    seed: NonNegativeInt = 0


GroupsRecipe = Annotated[TaxonomyGroups | KMeansGroups | RandomGroups, Field(discriminator="strategy")]


class _Head(NetworkRecipe):
    """What a head that is trained here and one of a checkpoint have in common."""

    method: Literal["classifier"] = "classifier"
    groups: GroupsRecipe | None = Field(None, description="None = a flat softmax over all classes")

    @property
    def softmax(self) -> str:
        return "flat" if self.groups is None else "group"

    @property
    def scored_by(self) -> str:
        return "msp" if self.groups is None else "mos"

    @property
    def other_files(self) -> list[Path]:
        return [group_path(self.groups.file)] if isinstance(self.groups, TaxonomyGroups) else []

    def check(self, experiment: Any) -> None:
        number, classes = getattr(self.groups, "number", 1), experiment.id.num_classes
        if number > classes:
            raise ValueError(f"groups.number is {number}, expected at most the {classes} classes")
        super().check(experiment)


class ClassifierCheckpoint(_Head, CheckpointRecipe):
    """A network with a flat or a group softmax that was trained elsewhere."""

    class_numbering: ClassNumbering = Field(
        "as_is", description="of the columns of a flat head, where they are not in the order of the labels"
    )

    @model_validator(mode="after")
    def _flat(self) -> "ClassifierCheckpoint":
        if self.groups is not None and self.class_numbering != "as_is":
            raise ValueError("class_numbering is of a flat head; remove it or the groups")
        return self


@RECIPES.register("classifier")
class ClassifierRecipe(_Head, FineTuningRecipe):
    """A flat or a group softmax. The head alone is trained on the features in the bank, which is exact without mixup;
    with mixup, features are mixed instead of images, an approximation."""

    from_checkpoint: ClassVar[type[CheckpointRecipe]] = ClassifierCheckpoint

    @classmethod
    def defaults(cls, num_classes: int) -> dict[str, NetworkRecipe]:
        number = max(2, round(num_classes**0.5))
        return {"group": cls(groups=KMeansGroups(strategy="kmeans", number=number)), "flat": cls()}
