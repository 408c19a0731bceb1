"""DICE: directed sparsification of the head."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from ood_helpers.banks import Bank, FeatureBank
from ood_helpers.detectors.base import DETECTORS, Detector
from ood_helpers.kernels.shaped_energy import Shaping, shaped_energy
from ood_helpers.statistics import order_statistics


@DETECTORS.register("dice")
@dataclass
class DICE(Detector):
    """Score S = logsumexp(f (W * M)^T + b): only the head weights that contribute most on ID data are kept.

    Contribution V[c, d] = mean training feature d * W[c, d], signed; M = V > its percentile over the whole
    C x D matrix, strictly.

    Hyper-parameters
    ----------------
    percentile : in [0, 100]; 90 keeps 10 % of the weights (90 for CIFAR, 70 for ImageNet in the paper)

    Learned
    -------
    contributions_ : V [C, D] float64
    """

    percentile: float = 90.0

    title: ClassVar[str] = "DICE"
    source: ClassVar[str] = "Sun and Li, ECCV 2022, arXiv 2111.09805"
    float32_on_cuda: ClassVar[bool] = True
    clip: ClassVar[float | None] = None  # a hyper-parameter of `DICEReAct`

    def _check(self) -> None:
        self._check_number("percentile", 0, 100)

    @torch.no_grad()
    def _fit(self, train_bank: Bank) -> None:
        total = sum(shard.features.sum(dim=0, dtype=torch.float64).cpu() for shard in train_bank.shards())
        if not total.isfinite().all():
            self._check_training_features(train_bank)
        self.contributions_ = total / len(train_bank) * self.head_.weight.detach().cpu().double()

    def mask(self) -> Tensor:
        """M, the head weights that are kept: bool [C, D]. Raises InputError if not fitted or out of range."""
        self._check_fitted()
        q = self.percentile
        lower, _ = self._cached(q, lambda: order_statistics(self.contributions_, q))
        return self.contributions_ > lower

    def _score(self, shard: FeatureBank) -> Tensor:
        head = self.head_.to(shard.features)
        sparse = head.weight * self.mask().to(head.weight)
        return shaped_energy(shard.features, sparse, head.bias, Shaping(self.clip))


@DETECTORS.register("dice_react")
@dataclass
class DICEReAct(DICE):
    """Score S = logsumexp(min(f, c) (W * M)^T + b): ReAct's clipping before DICE's head, whose mask is that of `DICE`.

    Hyper-parameters
    ----------------
    percentile : in [0, 100]; 10 for ImageNet in DICE's code
    clip : c, above 0; 1.0 there
    """

    percentile: float = 10.0
    clip: float = 1.0

    title: ClassVar[str] = "DICE + ReAct"

    def _check(self) -> None:
        super()._check()
        self._check_number("clip", 0, inf, open_low=True)
