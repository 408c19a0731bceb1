"""GEN: generalised entropy of the softmax probabilities."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from ood_helpers.banks import FeatureBank
from ood_helpers.detectors.base import DETECTORS, Detector


@DETECTORS.register("gen")
@dataclass
class GEN(Detector):
    """Score S = -sum over the M largest p_c of (p_c (1 - p_c))^gamma with p = softmax(z).

    Hyper-parameters
    ----------------
    gamma : above 0
    top : M, at least 1; None = min(C, 100), as is any larger number than C
    """

    gamma: float = 0.1
    top: int | None = None

    title: ClassVar[str] = "GEN"
    source: ClassVar[str] = "Liu, Lochman and Zach, CVPR 2023"

    def _check(self) -> None:
        self._check_number("gamma", 0, inf, open_low=True)
        self._check_integer("top", 1, optional=True)

    def _score(self, shard: FeatureBank) -> Tensor:
        count = min(shard.logits.shape[1], 100 if self.top is None else self.top)
        probabilities = shard.logits.softmax(dim=1).sort(dim=1, descending=True).values
        # of the largest, 1 - p is the sum of the others: a difference would round to 0 for a confident image
        rest = torch.cat([probabilities[:, 1:].sum(dim=1, keepdim=True), 1 - probabilities[:, 1:]], dim=1)
        return -(probabilities * rest)[:, :count].pow(self.gamma).sum(dim=1)
