"""Small networks and image sets for the tests of banks and of the forward pass."""

import numpy as np
import torch
from torch import nn

from ood_helpers.backbones import Classifier
from ood_helpers.banks import FeatureBank
from ood_helpers.config import FeaturesConfig
from ood_helpers.data import ImageSet, Transform

TRANSFORM = Transform(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
OPTIONS = FeaturesConfig(batch_size=4, shard_size=8)


class Tiny(Classifier):
    """A convolution, pooling and a head; counts the images that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)
        self.images_seen = 0

    def feature_map(self, images):
        self.images_seen += len(images)
        return self.convolution(images).relu()


class Staged(Classifier):
    """Modules whose output changes in place, or which run twice; counts the passes that reach the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.activation = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 5, 3, padding=1)
        self.last = nn.Conv2d(5, 6, 3, stride=2)
        self.head = nn.Linear(6, 3)
        self.whole_passes = 0

    def feature_map(self, images):
        x = self.activation(self.second(self.activation(self.first(images))))
        self.whole_passes += 1
        return self.last(x)


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def random_images(count=21, seed=0, labels=True) -> ImageSet:
    generator = np.random.default_rng(seed)
    array = generator.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return ImageSet(
        "made", "made by the test", array=array, labels=generator.integers(0, 3, count) if labels else None
    )


def bytes_of(images: ImageSet) -> torch.Tensor:
    """The images, uint8 [N, 3, H, W]."""
    return torch.from_numpy(images.array).permute(0, 3, 1, 2)


class Sharded:
    """A bank in memory that is read in pieces, as one on disk."""

    key = "sharded"
    record = {"images": 7, "seconds": 3.0}  # noqa: RUF012

    def __init__(self, bank: FeatureBank, pieces: int = 3) -> None:
        self.bank, self.pieces = bank, pieces

    def __len__(self) -> int:
        return len(self.bank)

    def shards(self):
        for rows in torch.arange(len(self.bank)).chunk(self.pieces):
            yield self.bank.take(rows)

    def load(self) -> FeatureBank:
        return self.bank
