"""Networks with a new head, fine-tuned from the backbone: those of MOS and of DFB."""

import copy
from typing import Any

import torch

from ood_helpers.backbones.base import Classifier
from ood_helpers.banks import Bank, HeadBank
from ood_helpers.networks.base import DerivedNetwork, once
from ood_helpers.training.fine_tuning import zero_head


class FineTunedNetwork(DerivedNetwork):
    """The backbone with a new head, zero at the start, fine-tuned by the recipe of BiT."""

    def _num_logits(self) -> int:
        return self.context.config.id.num_classes

    def _untrained(self) -> Classifier:
        network = copy.deepcopy(self.backbone.model())
        network.head = zero_head(network.feature_dim, self._num_logits())
        return network

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        if not self.trained_here:
            return settings
        images = len(self.context.image_sets["train"])
        settings |= {"schedule": self.recipe.steps(images), "mixup": self.recipe.mixup_alpha(images)}
        return settings | ({"approximation": self.approximation()} if self.approximation() else {})

    def approximation(self) -> str:
        images = len(self.context.image_sets["train"])
        if not self.trained_here or self.recipe.images or self.recipe.exact_on_features(images):
            return ""
        return "mixup of features instead of images"

    @once
    def shares_features(self) -> bool:
        """Whether its features are the backbone's, bit for bit."""
        if self.trained_here:
            return self.recipe.depth == 0
        ours, theirs = self.model().state_dict(), self.backbone.model().state_dict()
        return all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("head."))

    @once
    def bank(self, name: str) -> Bank:
        if self.shares_features():
            return HeadBank(self.backbone.bank(name), self._whole_head(), self.key(name))
        return super().bank(name)
