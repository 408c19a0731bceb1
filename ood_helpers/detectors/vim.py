"""ViM: virtual-logit matching."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ood_helpers.banks import Bank, FeatureBank
from ood_helpers.detectors.base import DETECTORS, Detector
from ood_helpers.detectors.energy import energy_score
from ood_helpers.errors import InputError


@DETECTORS.register("vim")
@dataclass
class ViM(Detector):
    """Score S = logsumexp_c(z_c) - alpha * ||R^T (f - u)||: what lies outside the principal space of ID features counts against.

    u = -pinv(W) b is the origin at which the head gives zero logits; R the eigenvectors of the second-moment matrix
    (1 / N) sum (f - u)(f - u)^T of the training features beyond the `dimension` largest eigenvalues; alpha = mean largest
    logit / mean residual norm over the training images, which brings the virtual logit to the scale of the others.

    Hyper-parameters
    ----------------
    dimension : of the principal space, from 1 to D - 1; None = 1000 for D >= 2048, 512 for D >= 768, else D // 2

    Learned
    -------
    origin_ : u [D] float64
    eigenvalues_ : [D] float64, ascending
    eigenvectors_ : [D, D] float64, in columns
    """

    dimension: int | None = None

    title: ClassVar[str] = "ViM"
    source: ClassVar[str] = "Wang et al., CVPR 2022, arXiv 2203.10807"

    def _check(self) -> None:
        self._check_integer("dimension", 1, optional=True)

    @property
    def dimension_(self) -> int:
        """The dimension of the principal space in use. Raises InputError if not fitted or not below D."""
        self._check_fitted()
        size = self.head_.feature_dim
        if self.dimension is None:
            return 1000 if size >= 2048 else 512 if size >= 768 else max(1, size // 2)
        if self.dimension >= size:
            raise InputError(
                f"ViM: dimension is {self.dimension}, expected less than the {size} features, so that a residual is left."
            )
        return self.dimension

    @torch.no_grad()
    def _fit(self, train_bank: Bank) -> None:
        self._check_training_features(train_bank)
        self.train_bank_ = train_bank
        weight, bias = self.head_.weight.detach().cpu().double(), self.head_.bias.detach().cpu().double()
        self.origin_ = -torch.linalg.pinv(weight) @ bias
        moment = torch.zeros(len(self.origin_), len(self.origin_), dtype=torch.float64)
        for shard in train_bank.shards():
            centred = shard.features.cpu().double() - self.origin_
            moment += centred.T @ centred
        self.eigenvalues_, self.eigenvectors_ = torch.linalg.eigh(moment / len(train_bank))

    def alpha(self) -> float:
        """alpha of the present dimension. Raises InputError if not fitted or without a residual."""
        return self._cached(self.dimension_, self._alpha)

    def _alpha(self) -> float:
        # Eigenvalues of 0 come out of the eigensolver as rounding errors of the largest; ascending order.
        rounding = len(self.eigenvalues_) * torch.finfo(torch.float64).eps * self.eigenvalues_[-1]
        if self.eigenvalues_[-1 - self.dimension_] <= rounding:
            raise InputError(
                f"ViM: the training features span {int((self.eigenvalues_ > rounding).sum())} dimensions, expected more than "
                f"the {self.dimension_} of the principal space, so that a residual is left; lower dimension or take more "
                "training images."
            )
        logits = norms = 0.0
        for shard in self.train_bank_.shards():
            logits += float(shard.logits.double().amax(dim=1).sum())
            norms += float(self._norms(shard).sum())
        return logits / norms

    @property
    def learned(self) -> dict[str, Any]:
        return {"dimension": self.dimension_, "alpha": self.alpha()}

    def residual_norms(self, bank: Bank) -> Tensor:
        """||R^T (f - u)|| [N] of a bank, float64; raises like `score_samples`."""
        return self._over_shards(bank, self._norms, "residual norms")

    def _norms(self, shard: FeatureBank) -> Tensor:
        device = shard.features.device
        residual = self.eigenvectors_[:, : self.head_.feature_dim - self.dimension_].to(device)
        return ((shard.features.double() - self.origin_.to(device)) @ residual).norm(dim=1)

    def _score(self, shard: FeatureBank) -> Tensor:
        return energy_score(shard.logits) - self.alpha() * self._norms(shard)
