"""An experiment as data: the model of configs/*.yaml, which names the in-distribution (ID) sets, the
out-of-distribution (OOD) sets, the transform, the backbone, the networks and the detectors."""

from collections.abc import Hashable, Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator, model_validator

from ood_helpers.config.backbones import BackboneConfig
from ood_helpers.config.base import Model
from ood_helpers.config.images import ImageSource, TransformConfig
from ood_helpers.config.networks import RECIPES, NetworkRecipe, Recipe
from ood_helpers.errors import nearest

ID_SETS = ("train", "validation", "test")
RESERVED = (*ID_SETS, "tuning", "outliers")  # names of image sets that no OOD set may have


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


class FeaturesConfig(Model):
    """The forward pass that fills the feature banks."""

    batch_size: PositiveInt | None = Field(None, description="None = 32 on the CPU (its caches), else 256")
    shard_size: PositiveInt = Field(2048, description="images per file; an interrupted pass resumes at one")
    workers: NonNegativeInt = Field(0, description="processes that decode image files; arrays need none")
    taps: tuple[str, ...] = Field((), description="modules whose pooled outputs are kept beside the features")
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="of the network's arithmetic, the head's is always float32: full float32; tf32 = 10 bits "
        "of mantissa in convolutions and products on CUDA; bfloat16 = 7 bits where torch.autocast allows it",
    )
    compile: bool = Field(False, description="torch.compile: a minute, then a tenth faster on two cores")


class OutliersConfig(Model):
    """Auxiliary outliers, for networks that are trained with some."""

    name: str = Field(description="for tables")
    images: ImageSource
    related: tuple[str, ...] = Field(
        (), description="OOD sets with images like these, on which what has learned from them is not reported"
    )


class TuningConfig(OutliersConfig):
    """Choosing hyper-parameters: every combination of a grid is scored on the ID validation images against
    images of a set that is not reported, and the best one becomes a row of its own beside the default."""

    metric: Literal["auroc", "fpr95"] = "auroc"
    grids: dict[str, dict[str, list[Any]]] = Field(
        description="row of detectors -> hyper-parameter -> values; where several are best, the first is taken"
    )


class WatchedConfig(Model):
    """What is looked at along a training: the detection after each epoch that it has saved."""

    images: PositiveInt = Field(500, description="of each set")
    from_scratch: BackboneConfig | None = Field(
        None, description="a small network that is trained to be watched, where the backbone is a checkpoint"
    )

    @model_validator(mode="after")
    def _trained(self) -> "WatchedConfig":
        if self.from_scratch is not None and self.from_scratch.training is None:
            raise ValueError("from_scratch is a network to be trained; give it training instead of weights")
        return self


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


class Ablation(Model):
    """Networks that a notebook trains beside those of the config: one recipe with one setting varied."""

    network: str = Field(description="whose recipe is varied")
    vary: str = Field(description="dotted path of the setting, for example masks.threshold")
    values: tuple[Any, ...] = Field(min_length=1)
    changes: dict[str, Any] = Field({}, description="what else differs: dotted path -> value")

    def recipes(self, networks: Mapping[str, NetworkRecipe]) -> dict[Any, NetworkRecipe]:
        """Value (as text where it is a list or a mapping) -> recipe, of which no accuracy is expected.

        Raises
        ------
        ValueError : no such network, or a setting that its recipe does not have or refuses
        """
        if self.network not in networks:
            raise ValueError(f"network names {self.network!r}; {nearest(self.network, networks)}")
        recipe = networks[self.network]
        if not recipe.trained_here:
            raise ValueError(f"network names {self.network!r}, a checkpoint; name one that is trained here")
        changes = {"expected_accuracy": None, **self.changes}
        return {
            value if isinstance(value, Hashable) else str(value): recipe.changed(changes | {self.vary: value})
            for value in self.values
        }


class ExperimentConfig(Model):
    """One experiment: one file in configs/."""

    name: str = Field(pattern="^[A-Za-z0-9_-]+$")
    description: str = ""
    id: InDistribution
    ood: tuple[OutOfDistribution, ...] = Field(min_length=1)
    transform: TransformConfig
    backbone: BackboneConfig
    features: FeaturesConfig = FeaturesConfig()
    weights: str | None = Field(
        None,
        description="folder of trainings that come with the kit, used where they have the settings of this config",
    )
    networks: dict[str, Recipe] = Field({}, description="derived from the backbone, which rows may name")
    ablations: dict[str, Ablation] = Field({}, description="for the notebooks that compare trainings")
    watched: WatchedConfig = WatchedConfig()
    outliers: OutliersConfig | None = Field(None, description="for networks with method: outlier_exposure")
    detectors: dict[str, dict[str, Any]] = Field(description="row -> hyper-parameters; see rows.make_row")
    tuning: TuningConfig | None = None
    metrics: MetricsConfig = MetricsConfig()
    published: PublishedConfig | None = None

    @field_validator("networks", "ablations", "detectors", mode="before")
    @classmethod
    def _empty_entry_means_defaults(cls, entries: Any, info: ValidationInfo) -> Any:
        if entries is None:
            return {}
        if not isinstance(entries, Mapping):
            return entries
        if info.field_name == "ablations":  # which have none: so they are left out
            return {name: entry for name, entry in entries.items() if entry is not None}
        return {name: {} if entry is None else entry for name, entry in entries.items()}

    def all_networks(self) -> dict[str, NetworkRecipe]:
        """The networks of the config, and the defaults of those that it leaves out."""
        defaults: dict[str, NetworkRecipe] = {}
        for recipe in RECIPES.values():
            defaults |= recipe.defaults(self.id.num_classes)
        return defaults | self.networks

    def sources(self) -> dict[str, ImageSource]:
        """Name -> source of every image set that the experiment needs."""
        sources = {name: getattr(self.id, name) for name in ID_SETS if getattr(self.id, name) is not None}
        if self.tuning is not None:
            sources["tuning"] = self.tuning.images
        if any("outliers" in recipe.image_sets for recipe in self.networks.values()):
            sources["outliers"] = self.outliers.images
        return sources | {ood.name: ood.images for ood in self.ood}

    @model_validator(mode="after")
    def _names_are_known(self) -> "ExperimentConfig":
        names, networks = [ood.name for ood in self.ood], self.all_networks()
        for name in names:
            if names.count(name) > 1 or name in RESERVED:
                raise ValueError(f"the OOD set name {name!r} is taken; give every set its own name")
        references = [
            ("published.ood_sets", getattr(self.published, "ood_sets", ()), names),
            ("outliers.related", getattr(self.outliers, "related", ()), names),
            ("tuning.related", getattr(self.tuning, "related", ()), names),
            ("tuning.grids", getattr(self.tuning, "grids", ()), self.detectors),
        ]
        for row, settings in self.detectors.items():
            if settings.get("network") is not None:
                references.append((f"detectors.{row}.network", [settings["network"]], networks))
        for key, found, valid in references:
            for name in found:
                if name not in valid:
                    raise ValueError(f"{key} names {name!r}; {nearest(str(name), valid)}")
        return self

    @model_validator(mode="after")
    def _networks_fit(self) -> "ExperimentConfig":
        for name, recipe in self.networks.items():
            try:
                recipe.check(self)
            except ValueError as error:
                raise ValueError(f"networks.{name}.{error}") from None
        for name, ablation in self.ablations.items():
            try:
                for recipe in ablation.recipes(self.all_networks()).values():
                    recipe.check(self)
            except ValueError as error:
                text = str(error).rstrip(".")
                raise ValueError(
                    f"ablations.{name}: {text} (or leave this ablation out: ablations.{name}=null)"
                ) from None
        return self

    @model_validator(mode="after")
    def _tuning_is_possible(self) -> "ExperimentConfig":
        if self.tuning is None:
            return self
        if self.id.validation is None:
            raise ValueError("tuning needs ID images of its own; add id.validation")
        for row, grid in self.tuning.grids.items():
            if not grid or not all(grid.values()):
                raise ValueError(f"tuning.grids.{row} has no values; give a list for each hyper-parameter")
        if {ood.name for ood in self.ood} <= set(self.tuning.related):
            raise ValueError("tuning.related names every OOD set, so that nothing is left to report")
        return self
