"""ASH: activation shaping."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from ood_helpers.detectors.base import Detector
from ood_helpers.detectors.energy import energy_score
from ood_helpers.features import FeatureBank


@dataclass
class ASH(Detector):
    """Score S = energy of the head on a feature of which the k = D - round(D p / 100) largest entries are kept.

    With s1 = the sum of all entries and s2 = that of the kept ones, an entry that is kept

    - stays as it is (variant p),
    - becomes s1 / k (variant b),
    - is multiplied by exp(s1 / s2) (variant s);

    all others become 0. Features are non-negative, as behind a ReLU. Of equal entries at the border just as many
    are kept as make k, the first ones; at least one entry is. A feature of zeros stays zero.

    Hyper-parameters
    ----------------
    variant : "p", "b" or "s"
    percentile : p, in [0, 100]; 90 drops 90 % of the entries. The paper has S 90, B 65 and P 60 for ImageNet; its code
        has S 95 for CIFAR-10
    """

    variant: str = "s"
    percentile: float = 90.0

    title: ClassVar[str] = "ASH"
    source: ClassVar[str] = "Djurisic et al., ICLR 2023, arXiv 2209.09858"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.label = f"ASH-{self.variant.upper()}"

    def _check(self) -> None:
        self._check_choice("variant", ("p", "b", "s"))
        self._check_number("percentile", 0, 100)

    def _score(self, shard: FeatureBank) -> Tensor:
        features = shard.features
        kept, places = largest_entries(features, self.percentile)
        if self.variant == "b":
            kept = (features.sum(dim=1, keepdim=True) / kept.shape[1]).expand_as(kept)
        elif self.variant == "s":
            kept = kept * energy_gain(features, kept)
        shaped = torch.zeros_like(features).scatter(1, places, kept)
        return energy_score(self.head_.to(shaped).logits(shaped))


def largest_entries(features: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The k = max(1, D - round(D percentile / 100)) largest entries of each feature [N, D], and their places: two [N, k].

    Of equal entries the first ones are taken, on every device.
    """
    dropped = round(features.shape[1] * Fraction(repr(float(percentile))) / 100)
    ordered = features.sort(dim=1, descending=True, stable=True)
    kept = slice(max(1, features.shape[1] - dropped))
    return ordered.values[:, kept], ordered.indices[:, kept]


def energy_gain(features: Tensor, kept: Tensor) -> Tensor:
    """exp(s1 / s2) [N, 1] with s1 the sum of a feature and s2 that of its kept entries; e where both are 0."""
    before, after = features.sum(dim=1, keepdim=True), kept.sum(dim=1, keepdim=True)
    return torch.where(after == 0, torch.ones_like(after), before / after).exp()
