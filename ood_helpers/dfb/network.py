"""The network of DFB: trained on pseudo masks at every position, then read as a classifier of images."""

from functools import cache, partial

import torch
from torch import Tensor, nn

from ood_helpers.backbones.base import Classifier
from ood_helpers.dfb.activation_maps import ClassMaps, StoredMaps, stored_maps
from ood_helpers.dfb.pseudo_masks import PseudoMasks, stored_masks
from ood_helpers.dfb.recipe import DenseCheckpoint, DenseRecipe
from ood_helpers.dfb.training import MaskedSet, dense_logits, evaluate_dense, on_map, train_dense
from ood_helpers.networks.backbone import pass_to_maps
from ood_helpers.networks.background import BackgroundOutput
from ood_helpers.networks.base import NETWORKS
from ood_helpers.networks.fine_tuned import FineTunedNetwork
from ood_helpers.storage import Entry
from ood_helpers.training.batches import load_images
from ood_helpers.training.fine_tuning import reorder


@NETWORKS.register("dense")
class DenseNetwork(BackgroundOutput, FineTunedNetwork):
    """A network of DFB.

    Parameters
    ----------
    recipe : how; see `ood_helpers.dfb.recipe`
    """

    recipe: DenseRecipe | DenseCheckpoint

    def _num_logits(self) -> int:
        return super()._num_logits() + 1

    def _order_columns(self, head: nn.Linear) -> None:
        if self.recipe.background_column == "first":
            reorder(head, torch.arange(len(head.bias)).roll(1))

    def approximation(self) -> str:
        reduced = self.trained_here and self.recipe.loss_resolution == "reduced"
        parts = [super().approximation(), "loss at the resolution of the feature map" if reduced else ""]
        return " and ".join(filter(None, parts))

    def training_entry(self) -> Entry:
        return self._training_entry(["ood_helpers.dfb.training", pass_to_maps], self.backbone.model())

    def _train(self, network: Classifier) -> None:
        train, validation = map(self._masked, ("train", self._held_out()))
        options = self._training_options()
        train_dense(network, train, validation, self.context.transform, self.recipe, **options)

    def _masked(self, name: str | None) -> MaskedSet | None:
        if name is None:
            return None
        masks, maps = cache(partial(self.masks, name)), partial(self.backbone.feature_maps, name)
        return MaskedSet(self.context.image_sets[name], masks, maps)

    def masks(self, name: str) -> PseudoMasks:
        """The pseudo masks of an image set, from the class activation maps of the backbone."""
        run = self.context
        return stored_masks(self._stored_maps(name), self.recipe.masks, run.store, run.device)

    def maps(self, name: str) -> ClassMaps:
        """The class activation maps that the masks are made of."""
        return self._stored_maps(name).load(self.recipe.masks.label)

    def _stored_maps(self, name: str) -> StoredMaps:
        run = self.context
        sets = run.image_sets[name], run.transform, run.store
        return stored_maps(self.backbone.model(), *sets, self.recipe.masks.scales, run.device, run.batch_size)

    def segmentation(self, name: str) -> dict[str, float]:
        """Pixel accuracy, mean class accuracy and miou against the pseudo masks of a labelled image set, and the accuracy
        of the classifier of images, in percent."""
        run = self.context
        sets = run.image_sets[name], self.masks(name), run.transform
        values = evaluate_dense(self.model(), *sets, run.batch_size, run.device)
        return {key: value for key, value in values.items() if key != "loss"}

    @torch.no_grad()
    def position_accuracy(self, name: str) -> float:
        """Percent of images classified correctly by the probabilities of the classes, averaged over the positions, of
        which those of the background have little: what the mean of the logits loses shows beside the ID accuracy."""
        votes = [
            on_map(self.model().head, maps).softmax(dim=1)[:, :-1].mean(dim=(2, 3)).argmax(dim=1).cpu()
            for maps in pass_to_maps(self, name)
        ]
        labels = torch.as_tensor(self.context.image_sets[name].labels)
        return 100 * int((torch.cat(votes) == labels).sum()) / len(labels)

    def images(self, name: str, rows: Tensor) -> Tensor:
        """Images of a set as the network is shown them, uint8 [n, H, W, 3]."""
        return load_images(self.context.image_sets[name], self.context.transform, rows)

    @torch.no_grad()
    def probabilities(self, name: str, rows: Tensor) -> Tensor:
        """Probabilities [n, K + 1, H, W] of the classes and, last, the background at each pixel of some images."""
        run, images = self.context, self.images(name, rows)
        inputs = run.transform.normalise(images.to(run.device).permute(0, 3, 1, 2))
        return dense_logits(self.model(), inputs, size=tuple(images.shape[1:3])).softmax(dim=1).cpu()
