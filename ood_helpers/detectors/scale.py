"""SCALE: features scaled by how much of them lies in few entries."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ood_helpers.banks import FeatureBank
from ood_helpers.detectors.ash import energy_gain, kept_count
from ood_helpers.detectors.base import DETECTORS, Detector
from ood_helpers.kernels.largest_entries import largest_entries
from ood_helpers.kernels.shaped_energy import Shaping, shaped_energy


@DETECTORS.register("scale")
@dataclass
class Scale(Detector):
    """Score S = energy of the head on f * exp(s1 / s2), s1 = the sum of f, s2 that of its largest entries.

    The largest entries are the k = D - round(D p / 100) that `ASH` keeps, at least one; nothing is set to 0. Features
    are non-negative, as behind a ReLU. The factor ends at e^88 on CUDA, in float32, and at e^709 elsewhere; beyond that is an
    error.

    Hyper-parameters
    ----------------
    percentile : p, in [0, 100]; 85 for ImageNet in the paper
    """

    percentile: float = 85.0

    title: ClassVar[str] = "SCALE"
    source: ClassVar[str] = "Xu et al., ICLR 2024, arXiv 2310.00227"
    float32_on_cuda: ClassVar[bool] = True

    def _check(self) -> None:
        self._check_number("percentile", 0, 100)

    def _score(self, shard: FeatureBank) -> Tensor:
        features, head = shard.features, self.head_.to(shard.features)
        entries = largest_entries(features, kept_count(features.shape[1], self.percentile))
        return shaped_energy(features, head.weight, head.bias, Shaping(gain=energy_gain(entries)))
