"""LINe: leveraging important neurons."""

from dataclasses import dataclass
from functools import partial
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ood_helpers.banks import Bank, FeatureBank
from ood_helpers.detectors.base import DETECTORS, Detector
from ood_helpers.errors import InputError
from ood_helpers.kernels.line_head import line_head
from ood_helpers.statistics import order_statistics


@DETECTORS.register("line")
@dataclass
class LINe(Detector):
    """Score S = logsumexp(z'), logits of the clipped features and head weights that matter for the predicted class.

    1. contributions A[c, d] = mean over the training images of class c of f_d * d(logit_c) / d(f_d); the head is
       linear, so A = W * (class-mean features) without any backward pass
    2. g = min(f, delta)
    3. k = argmax of the logits of g
    4. activation pruning: feature d is kept where A[k, d] > the activation percentile of row A[k, :]
    5. weight pruning: weight (c, d) is kept where |A[k, d]| * W[c, d] > the weight percentile of that C x D
       matrix; W is signed, so negative weights go first
    6. z'_c = sum over the kept features and weights of g_d * W[c, d], plus b_c

    Hyper-parameters
    ----------------
    delta : above 0, or None for no clipping; the authors use 1.0 for CIFAR, 0.8 for ImageNet
    activation_percentile : in [0, 100], 90 keeps 10 %, None = no activation pruning; 90 for CIFAR-10, 10 for
        CIFAR-100 and ImageNet
    weight_percentile : in [0, 100], None = no weight pruning; 90 for CIFAR, 10 for ImageNet

    Learned
    -------
    contributions_ : A [C, D] float64

    Samples are grouped by predicted class, at one masked [C, D] matrix product per class. Hence the shards of a bank are
    scored together, up to 2^26 features at once: with their copy in float64 about 1.5 GB. The first score after a change
    of `weight_percentile` computes C thresholds over C x D numbers each.
    """

    delta: float | None = 1.0
    activation_percentile: float | None = 90.0
    weight_percentile: float | None = 90.0

    title: ClassVar[str] = "LINe"
    source: ClassVar[str] = "Ahn, Park and Kim, CVPR 2023, arXiv 2303.13995"
    float32_on_cuda: ClassVar[bool] = True
    joined_features: ClassVar[int] = 2**26

    def _check(self) -> None:
        self._check_number("delta", 0, inf, optional=True, open_low=True)
        self._check_number("activation_percentile", 0, 100, optional=True)
        self._check_number("weight_percentile", 0, 100, optional=True)

    @torch.no_grad()
    def _fit(self, train_bank: Bank) -> None:
        self.contributions_ = self.head_.weight.detach().cpu().double() * self._class_means(train_bank)

    def activation_mask(self) -> Tensor:
        """The features that each predicted class keeps: bool [C, D]; all True with activation pruning off. Raises
        InputError if not fitted or out of range."""
        self._check_fitted()
        if self.activation_percentile is None:
            return torch.ones_like(self.contributions_, dtype=torch.bool)
        lower, _ = order_statistics(self.contributions_, self.activation_percentile, dim=1)
        return self.contributions_ > lower[:, None]

    def weight_mask(self, k: int) -> Tensor:
        """The head weights that are kept for samples predicted as class k: bool [C, D]. Raises InputError if not
        fitted, if there is no class k, or out of range."""
        self._check_fitted()
        if not 0 <= k < self.head_.num_classes:
            raise InputError(
                f"LINe: there is no class {k}, expected one of 0 to {self.head_.num_classes - 1}."
            )
        weight = self.head_.weight.detach()
        if self.weight_percentile is None:
            return torch.ones_like(weight, dtype=torch.bool)
        importance = self.contributions_[k].to(weight).abs()
        return importance * weight > self._weight_floors(weight)[k]

    def pruned_logits(self, bank: Bank) -> Tensor:
        """z' [N, C], the logits the score is made of; raises like `score_samples`."""
        return self._over_shards(bank, partial(self._through_head, output="logits"), "pruned logits")

    def _weight_floors(self, weight: Tensor) -> Tensor:
        """For each predicted class the value that a kept |A[k]| * W exceeds: [C], in the head's dtype as used."""

        def compute() -> Tensor:
            importance, products = self.contributions_.to(weight).abs(), torch.empty_like(weight)
            each = (torch.mul(row, weight, out=products) for row in importance)
            return torch.stack([order_statistics(product, q)[0] for product in each])

        q = self.weight_percentile
        return self._cached((q, weight.dtype, weight.device), compute)

    def _through_head(self, shard: FeatureBank, output: Literal["energy", "logits"]) -> Tensor:
        head = self.head_.to(shard.features)
        feature_mask = weight_floors = None
        if self.activation_percentile is not None:
            feature_mask = self.activation_mask().to(head.weight.device)
        if self.weight_percentile is not None:
            weight_floors = self._weight_floors(head.weight)
        importance = self.contributions_.to(head.weight).abs()
        tables = head.weight, head.bias, importance, feature_mask, weight_floors
        return line_head(shard.features, *tables, self.delta, output=output)

    def _score(self, shard: FeatureBank) -> Tensor:
        return self._through_head(shard, "energy")
