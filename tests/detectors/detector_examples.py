"""Banks and heads for the tests of detectors."""

from dataclasses import dataclass, replace

import torch

from ood_helpers.features import FeatureBank, Head


@dataclass(frozen=True)
class Shards:
    """A bank that comes in pieces, as one on disk does."""

    pieces: tuple[FeatureBank, ...]

    def __len__(self):
        return sum(map(len, self.pieces))

    def shards(self):
        yield from self.pieces


def make_bank(features, head, labels=None):
    """A bank with the head's own logits."""
    return FeatureBank(features, head.logits(features), labels)


def spread(bank, head):
    """Two samples for each of a bank, so that its class means stay and there is a covariance."""
    shift = 0.1 * torch.eye(*bank.features.shape, dtype=bank.features.dtype)
    return make_bank(torch.cat([bank.features - shift, bank.features + shift]), head, bank.labels.repeat(2))


def split(bank, *sizes):
    """The same samples in shards of the given sizes."""
    pieces, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        labels = None if bank.labels is None else bank.labels[rows]
        pieces.append(FeatureBank(bank.features[rows], bank.logits[rows], labels))
        start += size
    assert start == len(bank)
    return Shards(tuple(pieces))


def cast(bank, dtype):
    """A bank in another dtype."""
    return replace(bank, features=bank.features.to(dtype), logits=bank.logits.to(dtype))


def random_problem(num_classes, feature_dim, samples, seed=0, train=None):
    """(training bank, head, bank): ReLU-like features, half of them 0; every class has training images."""
    generator = torch.Generator().manual_seed(seed)
    weight = (
        torch.randn(num_classes, feature_dim, generator=generator, dtype=torch.float64) / feature_dim**0.5
    )
    head = Head(weight, torch.randn(num_classes, generator=generator, dtype=torch.float64) / 10)
    train = train or 5 * num_classes
    labels = torch.arange(train) % num_classes
    draw = torch.randn(train + samples, feature_dim, generator=generator, dtype=torch.float64)
    features = (1.5 * draw).clamp(min=0)
    return make_bank(features[:train], head, labels), head, make_bank(features[train:], head)
