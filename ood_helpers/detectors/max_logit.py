"""MaxLogit: the largest logit."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ood_helpers.banks import FeatureBank
from ood_helpers.detectors.base import DETECTORS, Detector


@DETECTORS.register("max_logit")
@dataclass
class MaxLogit(Detector):
    """Score S = max_c z_c."""

    title: ClassVar[str] = "MaxLogit"
    source: ClassVar[str] = "Hendrycks et al., ICML 2022, arXiv 1911.11132"

    def _score(self, shard: FeatureBank) -> Tensor:
        return shard.logits.amax(dim=1)
