"""HIMPLoS: head-informed feature masking and prototype-based logit smoothing."""

from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from ood_helpers.banks import Bank, FeatureBank
from ood_helpers.detectors.base import DETECTORS, Detector
from ood_helpers.kernels.prototype_cosine import prototype_cosine
from ood_helpers.kernels.shaped_energy import Shaping, shaped_energy, shaped_features
from ood_helpers.statistics import order_statistics


@DETECTORS.register("himplos")
@dataclass
class HIMPLoS(Detector):
    """Score S = T logsumexp(z' / T) of logits without the features the head hardly uses, scaled by the prototype's cosine.

    1. k = argmax of the logits of the unmodified feature f
    2. masking (HIM): m[k, d] = 1 where W[k, d] >= the percentile of row W[k, :], signed weights
    3. g = min(f * m[k], clip)
    4. z = g W^T + b
    5. smoothing (PLoS): z' = z * cos(mu[k], f), where mu[k] is the mean training feature of class k and f is
       neither masked nor clipped

    Hyper-parameters
    ----------------
    percentile : in [0, 100]; the authors use 60 for CIFAR, 30 for ImageNet
    clip : above 0, or None for no clipping; 1.6 for CIFAR, 0.8 for ImageNet; the authors call it the threshold,
        which here is the one that `predict` takes
    masking : False leaves out step 2 ("PLoS only")
    smoothing : False leaves out step 5 ("HIM only")
    temperature : T, above 0

    Learned
    -------
    prototypes_ : mu [C, D] float64

    Memory of a score: see the kernels `prototype_cosine` and `shaped_energy`.
    """

    percentile: float = 60.0
    clip: float | None = 1.6
    masking: bool = True
    smoothing: bool = True
    temperature: float = 1.0

    title: ClassVar[str] = "HIMPLoS"
    source: ClassVar[str] = (
        "Head-Informed feature Masking and Prototype-based Logit Smoothing, arXiv 2310.18104"
    )
    float32_on_cuda: ClassVar[bool] = True

    def _check(self) -> None:
        self._check_number("percentile", 0, 100)
        self._check_number("clip", 0, inf, optional=True, open_low=True)
        self._check_flag("masking")
        self._check_flag("smoothing")
        self._check_number("temperature", 0, inf, open_low=True)

    def _fit(self, train_bank: Bank) -> None:
        self.prototypes_ = self._class_means(train_bank)

    def mask(self) -> Tensor:
        """m [C, D] bool, the features that each predicted class keeps; all True with masking off. Raises InputError
        if not fitted or out of range."""
        self._check_fitted()
        weight = self.head_.weight.detach()
        if not self.masking:
            return torch.ones_like(weight, dtype=torch.bool)
        _, upper = self._cached(self.percentile, lambda: order_statistics(weight, self.percentile, dim=1))
        return weight >= upper[:, None]

    def masked_logits(self, bank: Bank) -> Tensor:
        """z [N, C], the logits after masking and clipping (steps 1 to 4); raises like `score_samples`."""
        return self._over_shards(bank, self._masked_logits, "masked logits")

    def prototype_cosines(self, bank: Bank) -> Tensor:
        """cos(mu[k], f) [N], the factor of step 5 whether or not smoothing is on; raises like `score_samples`."""
        return self._over_shards(bank, self._prototype_cosines, "cosines")

    def smoothed_logits(self, bank: Bank) -> Tensor:
        """z' [N, C], the logits the score is made of (z with smoothing off); raises like `score_samples`."""
        return self._over_shards(bank, self._smoothed_logits, "smoothed logits")

    def _shaping(self, shard: FeatureBank) -> Shaping:
        """Steps 1 to 3."""
        if not self.masking:
            return Shaping(self.clip)
        return Shaping(self.clip, self.mask().to(shard.features.device), shard.logits.argmax(dim=1))

    def _masked_logits(self, shard: FeatureBank) -> Tensor:
        features = shaped_features(shard.features, self._shaping(shard))
        return self.head_.to(features).logits(features)

    def _prototype_cosines(self, shard: FeatureBank) -> Tensor:
        prototypes = self.prototypes_.to(shard.features)
        return prototype_cosine(shard.features, prototypes, shard.logits.argmax(dim=1))

    def _smoothed_logits(self, shard: FeatureBank) -> Tensor:
        logits = self._masked_logits(shard)
        return logits * self._prototype_cosines(shard)[:, None] if self.smoothing else logits

    def _score(self, shard: FeatureBank) -> Tensor:
        head, scale = self.head_.to(shard.features), None
        if self.smoothing:
            scale = self._prototype_cosines(shard)
        shaping = replace(self._shaping(shard), scale=scale, temperature=self.temperature)
        return shaped_energy(shard.features, head.weight, head.bias, shaping)
