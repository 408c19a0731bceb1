"""KNN: the distance to the k-th nearest training feature."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ood_helpers.detectors.base import Detector
from ood_helpers.errors import InputError
from ood_helpers.features import Bank, FeatureBank

CHUNK = 1024  # samples compared at once with a block of training features
BLOCK = 8192  # training features in a block


@dataclass
class KNN(Detector):
    """Score S = -(distance of f / ||f|| to the k-th nearest f' / ||f'|| of the ID training features f').

    Exact: for unit vectors the distance is sqrt(2 - 2 cos), and the k largest cosines are kept while the training
    features pass block by block. A feature of zeros has the cosine 0 with all others.

    Memory, in float64 numbers beside the bank's shard and one training shard: BLOCK * D for a block of training
    features, CHUNK * (BLOCK + 2 k + D) for the samples compared with it at once; nothing grows with the number of images.

    Hyper-parameters
    ----------------
    k : at least 1, at most the number of training images; 50 for CIFAR-10, 200 for CIFAR-100, 1000 for ImageNet

    `fit` keeps a reference to the training bank (`train_bank_`).
    """

    k: int = 50

    title: ClassVar[str] = "KNN"
    source: ClassVar[str] = "Sun et al., ICML 2022, arXiv 2204.06507"

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

    def _score(self, shard: FeatureBank) -> Tensor:
        self._check_neighbours()
        kth = torch.cat([self._kth_cosine(normalize(chunk, dim=1)) for chunk in shard.features.split(CHUNK)])
        return -(2 - 2 * kth).clamp(min=0).sqrt()

    def _kth_cosine(self, queries: Tensor) -> Tensor:
        nearest = queries.new_empty(len(queries), 0)
        for train in self.train_bank_.shards():
            for block in train.features.split(BLOCK):
                cosines = queries @ normalize(block.to(queries), dim=1).T
                best = cosines.topk(min(self.k, len(block)), dim=1).values
                nearest = torch.cat([nearest, best], dim=1)
                nearest = nearest.topk(min(self.k, nearest.shape[1]), dim=1).values
        return nearest[:, -1]
