"""The networks of outlier exposure."""

from typing import Any

from ood_helpers.backbones.base import Classifier
from ood_helpers.networks.background import BackgroundOutput
from ood_helpers.networks.base import NETWORKS, Context, Network
from ood_helpers.outlier_exposure.recipe import OutlierExposureCheckpoint, OutlierExposureRecipe
from ood_helpers.outlier_exposure.training import expose, with_outlier_output
from ood_helpers.unleashing_mask.network import ContinuedNetwork


class ExposedNetwork(ContinuedNetwork):
    """A network trained with auxiliary outliers."""

    recipe: OutlierExposureRecipe | OutlierExposureCheckpoint
    training_module = "ood_helpers.outlier_exposure.training"

    def settings(self) -> dict[str, Any]:
        outliers = self.context.config.outliers
        return super().settings() | ({"outliers": outliers.name} if self.trained_here else {})

    def _train(self, network: Classifier) -> None:
        run, sets, options = self.context, self._id_sets(), self._training_options()
        sets += run.image_sets["outliers"], run.transform
        expose(network, *sets, self.recipe, self.constraint(), **options)


class OutlierClassNetwork(BackgroundOutput, ExposedNetwork):
    """A network trained with auxiliary outliers as a class of their own, its last output, which starts from zero."""

    def _untrained(self) -> Classifier:
        return with_outlier_output(super()._untrained())


@NETWORKS.register("outlier_exposure")
def exposed_network(
    context: Context, recipe: OutlierExposureRecipe | OutlierExposureCheckpoint, name: str, backbone: Network
) -> ExposedNetwork:
    """With an output of their own for the outliers where the objective has one."""
    return (OutlierClassNetwork if recipe.background else ExposedNetwork)(context, recipe, name, backbone)
