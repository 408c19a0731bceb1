"""Networks derived from the backbone: what all recipes have in common, and the registry that holds them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, NonNegativeFloat, SerializeAsAny

from ood_helpers.config.base import Model
from ood_helpers.errors import nearest
from ood_helpers.registry import Registry

RECIPES = Registry("recipe")  # training method -> recipe


class NetworkRecipe(Model):
    """How a network is derived from the backbone. A subclass is registered in RECIPES by its training method;
    its `from_checkpoint` is the model of a network of this kind that was trained elsewhere."""

    from_checkpoint: ClassVar[type["CheckpointRecipe"]]
    trained_here: ClassVar[bool] = True  # or the checkpoint of a network trained elsewhere
    files: ClassVar[list[str]] = []  # weights that have to be there before the network can be made
    other_files: ClassVar[list[Path]] = []  # that its outputs depend on, too
    image_sets: ClassVar[tuple[str, ...]] = ()  # with which it is trained beside the ID images
    softmax: ClassVar[str] = "flat"  # over all classes, or "group"
    scored_by: ClassVar[str] = "msp"  # the detector that networks are compared by
    has_notebook: ClassVar[bool] = True  # whether the notebook of its method has something to show of it
    background: ClassVar[bool] = False  # whether the last of K + 1 outputs is of background or outliers

    method: str
    expected_accuracy: float | None = Field(None, ge=0, le=100, description="percent on the ID test set")
    tolerance: NonNegativeFloat = Field(0.5, description="percentage points")

    @classmethod
    def defaults(cls, num_classes: int) -> dict[str, "NetworkRecipe"]:
        """The networks that exist where a config has none of this name."""
        return {}

    def unreported(self, experiment: Any) -> tuple[str, ...]:
        """OOD sets of an ExperimentConfig on which it is not reported, as it knows images like these."""
        return ()

    def check(self, experiment: Any) -> None:
        """Raise ValueError where the recipe does not fit the ExperimentConfig that it stands in."""

    def settings(self) -> dict[str, Any]:
        """What the weights depend on, ready for JSON."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"expected_accuracy", "tolerance"})


class CheckpointRecipe(NetworkRecipe):
    """A network trained elsewhere, used as it is."""

    trained_here: ClassVar[bool] = False

    checkpoint: str = Field(description="the file with its weights")

    @property
    def files(self) -> list[str]:
        return [self.checkpoint]


def parse_recipe(data: Any) -> NetworkRecipe:
    """The recipe of the training method that the data name, `classifier` where they name none."""
    if isinstance(data, NetworkRecipe):
        return data
    if not isinstance(data, Mapping):
        raise ValueError(f"found {data!r}, expected a mapping of settings")
    method = str(data.get("method", "classifier"))
    if method not in RECIPES:
        raise ValueError(f"unknown method {method!r}; {nearest(method, RECIPES)}")
    settings = {key: value for key, value in data.items() if (key, value) != ("checkpoint", None)}
    model = RECIPES[method]
    return (model.from_checkpoint if "checkpoint" in settings else model).model_validate(settings)


Recipe = Annotated[SerializeAsAny[NetworkRecipe], BeforeValidator(parse_recipe)]
