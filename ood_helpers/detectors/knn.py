"""KNN: the distance to the k-th nearest training feature."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ood_helpers.banks import Bank, FeatureBank
from ood_helpers.detectors.base import DETECTORS, Detector
from ood_helpers.errors import InputError
from ood_helpers.kernels.kth_cosine import BLOCK, CHUNK, kth_cosine

QUERIES = 4096  # samples whose largest cosines are kept at once


@DETECTORS.register("knn")
@dataclass
class KNN(Detector):
    """Score S = -(distance of f / ||f|| to the k-th nearest f' / ||f'|| of the ID training features f').

    Exact: for unit vectors the distance is sqrt(2 - 2 cos), and the k largest cosines are kept while the training
    features pass block by block. A feature of zeros has the cosine 0 with all others.

    Memory, in float64 numbers beside the bank's shard and one training shard: QUERIES * 4 k for the cosines that are kept,
    BLOCK * D for a block of training features, CHUNK * (BLOCK + 4 k) for the samples compared with it at once, 8 times
    that on CUDA; nothing grows with the number of images.

    Hyper-parameters
    ----------------
    k : at least 1, at most the number of training images; 50 for CIFAR-10, 200 for CIFAR-100, 1000 for ImageNet

    `fit` keeps a reference to the training bank (`train_bank_`). The variants of one grid compare a bank on disk with the
    training features once for all values of k, and keep N numbers for each value as long as the variants live.
    """

    k: int = 50

    title: ClassVar[str] = "KNN"
    source: ClassVar[str] = "Sun et al., ICML 2022, arXiv 2204.06507"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._grid: list[int] = []

    def _check(self) -> None:
        self._check_integer("k", 1)

    def _fit(self, train_bank: Bank) -> None:
        self._check_training_features(train_bank)
        self.train_bank_ = train_bank
        self._check_neighbours()

    def _check_neighbours(self) -> None:
        if self.k > len(self.train_bank_):
            raise InputError(
                f"KNN: k is {self.k}, expected at most the number of training images, {len(self.train_bank_)}; lower it."
            )

    @staticmethod
    def _share(variants: Sequence["KNN"]) -> None:
        ks, shared = sorted({variant.k for variant in variants}), {}
        for variant in variants:
            # Not the cache of the original, so that the cost of its own score shows.
            variant._grid, variant._cache = ks, shared

    def score_samples(self, bank: Bank) -> Tensor:
        """Scores [N], see `Detector`; a variant of a grid takes those of all its k from one comparison."""
        if bank.key is None or self.k not in self._grid:
            return super().score_samples(bank)
        self._check_fitted()
        self._check_neighbours()
        ks = [k for k in self._grid if k <= len(self.train_bank_)]
        cosines = self._cached(
            bank.key,
            lambda: self._over_shards(bank, lambda shard: self._cosines(shard, ks), "cosines"),
        )
        return _score_of(cosines[:, ks.index(self.k)])

    def _score(self, shard: FeatureBank) -> Tensor:
        self._check_neighbours()
        return _score_of(self._cosines(shard, [self.k])[:, 0])

    def _cosines(self, shard: FeatureBank, ks: list[int]) -> Tensor:
        block, found = min(BLOCK, len(self.train_bank_)), []
        for queries in shard.features.split(QUERIES):
            train = (piece.features for piece in self.train_bank_.shards())
            found.append(kth_cosine(queries, train, ks, chunk=CHUNK, block=block))
        return torch.cat(found)


def _score_of(cosines: Tensor) -> Tensor:
    return -(2 - 2 * cosines).clamp(min=0).sqrt()
