"""The networks of Unleashing Mask, and those of other methods that continue the training of the backbone."""

from typing import Any, ClassVar

from ood_helpers.backbones.base import Classifier
from ood_helpers.backbones.checkpoints import weights_fingerprint
from ood_helpers.errors import InputError
from ood_helpers.networks.backbone import Backbone
from ood_helpers.networks.base import NETWORKS, DerivedNetwork, once
from ood_helpers.storage import Entry
from ood_helpers.unleashing_mask.loss_constraint import LossConstraint, estimate_constraint
from ood_helpers.unleashing_mask.recipe import Estimate, UnleashingMaskRecipe
from ood_helpers.unleashing_mask.training import prepare_masks, unleash
from ood_helpers.unleashing_mask.weight_masks import apply_masks, detach_masks

CONSTRAINT = "ood_helpers.unleashing_mask.loss_constraint"


def loss_constraint(backbone: Backbone, estimate: Estimate, start: str | int = "last") -> LossConstraint:
    """The loss of a start network under random masks, on the ID training images; estimated on first use.

    Raises
    ------
    InputError : see estimate_constraint
    """
    run, network = backbone.context, backbone.start(start)
    image_set, settings = run.image_sets["train"], estimate.model_dump(exclude={"factor"})
    entry = run.store.entry(
        "estimates",
        code=[CONSTRAINT, type(network)],
        weights=weights_fingerprint(network),
        estimate=settings,
        images=image_set.fingerprint,
        transform=run.transform.fingerprint,
        device=run.device.type,
    )

    def compute() -> dict[str, Any]:
        found = estimate_constraint(
            network, image_set, run.transform, estimate, batch_size=run.batch_size, device=run.device
        )
        return {"draws": found.draws, "unmasked": found.unmasked}

    stored = entry.json("loss_constraint", compute, ("draws", "unmasked"))
    return LossConstraint(tuple(stored["draws"]), stored["unmasked"], estimate.keep_rate)


class ContinuedNetwork(DerivedNetwork):
    """A network obtained by continuing to train the backbone, head included; a subclass names the module that does it."""

    backbone: Backbone
    training_module: ClassVar[str]

    def settings(self) -> dict[str, Any]:
        constraint = self.constraint()
        return super().settings() | ({} if constraint is None else {"loss_constraint": constraint})

    @once
    def constraint(self) -> float | None:
        """u in nats, given or estimated; None where the loss has none, and of a checkpoint."""
        if not self.trained_here or self.recipe.id_loss.kind != "um":
            return None
        constraint = self.recipe.id_loss.constraint
        if not isinstance(constraint, Estimate):
            return constraint
        return constraint.factor * loss_constraint(self.backbone, constraint, self.recipe.start).mean

    @once
    def training_entry(self) -> Entry:
        dropout = getattr(self.context.config.backbone, "dropout", 0.0)
        start = self.backbone.start(self.recipe.start)
        return self._training_entry([self.training_module, CONSTRAINT], start, dropout=dropout)

    def _make(self) -> Classifier:
        network = super()._make()
        apply_masks(network)
        return network

    def _untrained(self) -> Classifier:
        return self.backbone.start(getattr(self.recipe, "start", "last"))

    def _classifier_of(self, network: Classifier) -> Classifier:
        apply_masks(network)
        return super()._classifier_of(network)


@NETWORKS.register("unleashing_mask")
class UnleashedNetwork(ContinuedNetwork):
    """A network of Unleashing Mask, whose weights (UM) or masks over them (UMAP) are trained; with masks `model` has the
    masked weights."""

    recipe: UnleashingMaskRecipe
    training_module = "ood_helpers.unleashing_mask.training"

    def _train(self, network: Classifier) -> None:
        sets, options = self._id_sets(), self._training_options()
        unleash(network, *sets, self.context.transform, self.recipe, self.constraint(), **options)

    def _untrained(self) -> Classifier:
        network = super()._untrained()
        if self.trained_here:
            prepare_masks(network, self.recipe, self.context.seed)
        return network

    def detached(self) -> Classifier:
        """The network without its masks, which is the one it was made from, bit for bit: to classify ID images as before.

        Raises
        ------
        InputError : no masks, or weights that were trained with them
        """
        masks = self.recipe.masks if self.trained_here else None
        if masks is None or not masks.freeze_weights:
            raise InputError(
                f"{self.title} has no masks over frozen weights, expected some to detach; set masks.keep_rate and leave "
                "masks.freeze_weights true."
            )
        self.model()
        network = self._with_weights(self.training_entry().directory / "weights.safetensors")
        detach_masks(network)
        return network
