"""ASH: activation shaping."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from ood_helpers.banks import FeatureBank
from ood_helpers.detectors.base import DETECTORS, Detector
from ood_helpers.kernels.largest_entries import LargestEntries, largest_entries
from ood_helpers.kernels.shaped_energy import Shaping, shaped_energy


@DETECTORS.register("ash")
@dataclass
class ASH(Detector):
    """Score S = energy of the head on a feature of which the k = D - round(D p / 100) largest entries are kept.

    With s1 = the sum of all entries and s2 = that of the kept ones, an entry that is kept

    - stays as it is (variant p),
    - becomes s1 / k (variant b),
    - is multiplied by exp(s1 / s2) (variant s);

    all others become 0. Features are non-negative, as behind a ReLU. Of equal entries at the border just as many
    are kept as make k, the first ones; at least one entry is. A feature of zeros stays zero. The factor of variant s ends
    at e^88 on CUDA, in float32, and at e^709 elsewhere; beyond that is an error.

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
    float32_on_cuda: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return f"ASH-{self.variant.upper()}"

    def _check(self) -> None:
        self._check_choice("variant", ("p", "b", "s"))
        self._check_number("percentile", 0, 100)

    def _score(self, shard: FeatureBank) -> Tensor:
        features, head = shard.features, self.head_.to(shard.features)
        count = kept_count(features.shape[1], self.percentile)
        entries = largest_entries(features, count)
        binary = self.variant == "b"
        gain = {"p": None, "b": entries.total / count, "s": energy_gain(entries)}[self.variant]
        return shaped_energy(
            features, head.weight, head.bias, Shaping(largest=entries, binary=binary, gain=gain)
        )


def kept_count(feature_dim: int, percentile: float) -> int:
    """k = max(1, D - round(D percentile / 100)), with D percentile / 100 exact and a half rounded to the even number."""
    return max(1, feature_dim - round(feature_dim * Fraction(repr(float(percentile))) / 100))


def energy_gain(entries: LargestEntries) -> Tensor:
    """exp(s1 / s2) [N] with s1 the sum of a feature and s2 that of its kept entries; e where s2 is 0."""
    ratio = entries.total / entries.kept_total
    return torch.where(entries.kept_total == 0, torch.ones_like(ratio), ratio).exp()
