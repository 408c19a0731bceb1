"""The recipes of outlier exposure: OE, energy margins, POEM, DOE and NTOM. Defaults are those of the code of Unleashing
Mask; the energy objective with `sample: poem` is POEM.

Sources: Hendrycks et al. (OE), ICLR 2019, arXiv 1812.04606; Liu et al. (energy margins), NeurIPS 2020, arXiv 2010.03759;
Wang et al. (DOE), ICLR 2023, arXiv 2303.05033; Chen et al. (NTOM), ECML PKDD 2021, arXiv 2006.15207; Ming, Fan and Li
(POEM), ICML 2022, arXiv 2206.13687.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ood_helpers.config.base import Model
from ood_helpers.config.networks import RECIPES, CheckpointRecipe, NetworkRecipe
from ood_helpers.training.recipes import EpochTrainingRecipe
from ood_helpers.unleashing_mask.recipe import CrossEntropyLoss, IDLossRecipe, named

Weight = Annotated[PositiveFloat, Field(description="factor of the outliers' loss")]
PoolSize = Annotated[
    PositiveInt, Field(description="outliers from which an epoch chooses; at most all there are")
]


class UniformObjective(Model):
    """OE: cross-entropy of the outliers to the uniform distribution."""

    kind: Literal["oe"]
    weight: Weight = 0.5


class EnergyObjective(Model):
    """Squared hinges of the energy E(z) = -logsumexp(z): ID images below one margin, outliers above the other."""

    kind: Literal["energy"]
    weight: Weight = 0.1
    inside: float = Field(-25.0, description="m_in: ID images with a higher energy are penalised")
    outside: float = Field(-7.0, description="m_out: outliers with a lower energy are penalised")

    @model_validator(mode="after")
    def _apart(self) -> "EnergyObjective":
        if self.inside >= self.outside:
            raise ValueError(
                f"inside is {self.inside:g} and outside {self.outside:g}, expected the energy of ID images below that of outliers"
            )
        return self


class DOEObjective(Model):
    """DOE: the uniform objective under the worst-case perturbation of the weights."""

    kind: Literal["doe"]
    weight: Weight = 1.0
    unperturbed_epochs: NonNegativeInt = Field(5, description="epochs of plain outlier exposure before")
    strengths: tuple[PositiveFloat, ...] = Field(
        (0.1, 0.01, 0.001, 0.0001), min_length=1, description="gamma, drawn for each step"
    )
    kept: float = Field(0.6, ge=0, lt=1, description="share of the earlier direction in the running mean")
    max_norm: PositiveFloat = Field(1.0, description="to which gradients are clipped")


class ClassObjective(Model):
    """NTOM: a class of their own for the outliers, the last of K + 1 outputs."""

    kind: Literal["ntom"]
    weight: Weight = 1.0


Objective = Annotated[
    Annotated[
        UniformObjective | EnergyObjective | DOEObjective | ClassObjective, Field(discriminator="kind")
    ],
    BeforeValidator(named),
]


class RandomSample(Model):
    """Any outliers."""

    kind: Literal["random"]


class HardSample(Model):
    """Hard outliers, which the network takes for ID."""

    kind: Literal["ntom"]
    pool_size: PoolSize = 400_000
    quantile: float = Field(0.125, ge=0, lt=1, description="share of the hardest of the pool that is skipped")


class PosteriorSample(Model):
    """POEM: outliers near a boundary that is drawn from the posterior of a Bayesian linear regression."""

    kind: Literal["poem"]
    pool_size: PoolSize = 400_000
    prior_variance: PositiveFloat = Field(20.0, description="sigma")
    noise_variance: PositiveFloat = Field(0.5, description="sigma_n")
    confidence: PositiveFloat = Field(
        3.9, description="targets: -confidence for ID images, +confidence for outliers"
    )
    buffer_epochs: PositiveInt = Field(4, description="for how many epochs the chosen outliers are kept")


Sample = Annotated[
    Annotated[RandomSample | HardSample | PosteriorSample, Field(discriminator="kind")],
    BeforeValidator(named),
]


class _Exposed(NetworkRecipe):
    """What a network that is trained here with outliers and one of a checkpoint have in common."""

    method: Literal["outlier_exposure"] = "outlier_exposure"
    objective: Objective = UniformObjective(kind="oe")

    @property
    def background(self) -> bool:
        return self.objective.kind == "ntom"

    def unreported(self, experiment: Any) -> tuple[str, ...]:
        return () if experiment.outliers is None else experiment.outliers.related


class OutlierExposureCheckpoint(_Exposed, CheckpointRecipe):
    """A network that was trained with outliers elsewhere."""

    has_notebook: ClassVar[bool] = False  # it compares trainings


@RECIPES.register("outlier_exposure")
class OutlierExposureRecipe(_Exposed, EpochTrainingRecipe):
    """A network fine-tuned with auxiliary outliers (`outliers` of the experiment)."""

    from_checkpoint: ClassVar[type[CheckpointRecipe]] = OutlierExposureCheckpoint

    sample: Sample = Field(RandomSample(kind="random"), description="which of the pool an epoch takes")
    id_loss: IDLossRecipe = Field(
        CrossEntropyLoss(), description="as for Unleashing Mask; the outliers' loss is not touched by it"
    )
    epochs: PositiveInt = 10
    learning_rate: PositiveFloat = 0.01
    outlier_factor: PositiveFloat = Field(
        1.0, description="outliers for each ID image, of an epoch and of a batch"
    )

    @property
    def image_sets(self) -> tuple[str, ...]:
        return ("outliers",)

    @model_validator(mode="after")
    def _perturbed_at_all(self) -> "OutlierExposureRecipe":
        unperturbed = getattr(self.objective, "unperturbed_epochs", 0)
        if unperturbed >= self.epochs:
            raise ValueError(
                f"objective.unperturbed_epochs is {unperturbed}, expected less than the {self.epochs} epochs, so that "
                "the weights are perturbed at all"
            )
        return self

    def check(self, experiment: Any) -> None:
        if experiment.outliers is None:
            raise ValueError("method needs auxiliary outliers, but there are none; add outliers")
        super().check(experiment)
