"""Mahalanobis: the distance to the nearest class mean, at the last layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ood_helpers.banks import Bank, FeatureBank
from ood_helpers.detectors.base import DETECTORS, Detector
from ood_helpers.errors import InputError


@dataclass(frozen=True)
class ClassGaussians:
    """Gaussians with a mean for each class and one covariance for all, ready to score features.

    centre : global mean [D], subtracted first so that far means do not cost digits
    whitening : W [D, R] with W W^T = P, the (pseudo-)inverse of the covariance of rank R
    means : class means, centred and whitened [C, R]; everything float64
    """

    centre: Tensor
    whitening: Tensor
    means: Tensor

    @classmethod
    @torch.no_grad()
    def fit(cls, train_bank: Bank, means: Tensor) -> "ClassGaussians":
        """Tied covariance (1 / N) sum_i (f_i - mu_y_i)(f_i - mu_y_i)^T of a labelled bank with class means [C, D].

        Eigenvalues up to D * 2.2e-16 times the largest count as zero: features that are constant within the
        classes, or a sum of others, have no part in the distance.
        """
        scatter = torch.zeros(means.shape[1], means.shape[1], dtype=torch.float64)
        total = torch.zeros(means.shape[1], dtype=torch.float64)
        for shard in train_bank.shards():
            features = shard.features.cpu().double()
            residuals = features - means[shard.labels.cpu()]
            scatter += residuals.T @ residuals
            total += features.sum(dim=0)
        variances, axes = torch.linalg.eigh(scatter / len(train_bank))
        kept = variances > len(variances) * torch.finfo(torch.float64).eps * variances[-1]
        if not kept.any():
            raise InputError(
                "Mahalanobis: the features do not vary within the classes, expected a covariance; take more training images."
            )
        whitening = axes[:, kept] / variances[kept].sqrt()
        centre = total / len(train_bank)
        return cls(centre, whitening, (means - centre) @ whitening)

    def to(self, device: torch.device) -> "ClassGaussians":
        return ClassGaussians(self.centre.to(device), self.whitening.to(device), self.means.to(device))

    def log_densities(self, features: Tensor) -> Tensor:
        """G_c = -(f - mu_c)^T P (f - mu_c) / 2 of features [N, D] -> [N, C] float64; differentiable."""
        whitened = (features.double() - self.centre) @ self.whitening
        squares = whitened.square().sum(dim=1, keepdim=True) + self.means.square().sum(dim=1)
        return whitened @ self.means.T - squares / 2


@DETECTORS.register("mahalanobis")
@dataclass
class Mahalanobis(Detector):
    """Score S = max_c -(f - mu_c)^T P (f - mu_c) / 2.

    mu_c is the mean training feature of class c, P the (pseudo-)inverse of the covariance that all classes
    share, (1 / N) sum over the training images of (f - mu_y)(f - mu_y)^T. This is the plain form, at the
    last layer and without input noise; `MahalanobisEnsemble` is the tuned one.

    Learned
    -------
    gaussians_ : ClassGaussians, from which the features are whitened, so that a shard costs one [N, D] x [D, D]
        and one [N, D] x [D, C] product
    """

    title: ClassVar[str] = "Mahalanobis"
    source: ClassVar[str] = "Lee et al., NeurIPS 2018, arXiv 1807.03888"

    def _fit(self, train_bank: Bank) -> None:
        self.gaussians_ = ClassGaussians.fit(train_bank, self._class_means(train_bank))

    def _score(self, shard: FeatureBank) -> Tensor:
        gaussians = self.gaussians_.to(shard.features.device)
        return gaussians.log_densities(shard.features).amax(dim=1)
