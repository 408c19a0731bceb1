"""GradNorm: the size of the gradient that would make the prediction uniform."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from torch import Tensor

from ood_helpers.banks import FeatureBank
from ood_helpers.detectors.base import DETECTORS, Detector


@DETECTORS.register("gradnorm")
@dataclass
class GradNorm(Detector):
    """Score S = sum_d |f_d| * sum_c |1 / C - p_c| / T with p = softmax(z / T).

    That is the L1 norm of the gradient of the cross-entropy between the uniform distribution and p by the head's
    weights, [C, D]: the gradient is (p - 1 / C) f^T / T, and the norm of an outer product the product of the norms, so no
    backward pass is needed.

    Hyper-parameters
    ----------------
    temperature : T, above 0
    """

    temperature: float = 1.0

    title: ClassVar[str] = "GradNorm"
    source: ClassVar[str] = "Huang, Geng and Li, NeurIPS 2021, arXiv 2110.00218"

    def _check(self) -> None:
        self._check_number("temperature", 0, inf, open_low=True)

    def _score(self, shard: FeatureBank) -> Tensor:
        probabilities = (shard.logits / self.temperature).softmax(dim=1)
        from_uniform = (probabilities - 1 / probabilities.shape[1]).abs().sum(dim=1)
        return shard.features.abs().sum(dim=1) * from_uniform / self.temperature
