"""MSP: the maximum softmax probability."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ood_helpers.banks import FeatureBank
from ood_helpers.detectors.base import DETECTORS, Detector


@DETECTORS.register("msp")
@dataclass
class MSP(Detector):
    """Score S = max_c softmax(z)_c, in [1 / C, 1].

    In float32 every sample that is classified with a margin above about 17 would get the same score, 1.
    """

    title: ClassVar[str] = "MSP"
    source: ClassVar[str] = "Hendrycks and Gimpel, ICLR 2017, arXiv 1610.02136"

    def _score(self, shard: FeatureBank) -> Tensor:
        return shard.logits.softmax(dim=1).amax(dim=1)
