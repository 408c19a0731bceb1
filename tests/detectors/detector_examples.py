"""Banks and heads for the tests of detectors."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ood_helpers.banks import FeatureBank, Head
from ood_helpers.rows import make_rows


@dataclass(frozen=True)
class Shards:
    """A bank that comes in pieces, as one on disk does."""

    pieces: tuple[FeatureBank, ...]
    key: str | None = None

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


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def bank_of_logits(logits, labels=None):
    """A bank with features of ones."""
    return FeatureBank(torch.ones(len(logits), 4, dtype=logits.dtype), logits, labels)


def logsumexp(logits):
    return np.logaddexp.reduce(np.asarray(logits, dtype=float), axis=-1)


def assert_certain(logits):
    """Their softmax is 1 but for rounding: in this dtype it cannot tell the samples apart."""
    rounding = 2 * torch.finfo(logits.dtype).eps
    assert (1 - logits.softmax(dim=1).amax(dim=1)).abs().max() <= rounding


class LargestArray(TorchDispatchMode):
    """Notes the number of elements of the largest array that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def score_of(detector, features):
    """The score with a head that leaves the features alone: the logsumexp of what they become, for energies."""
    size = features.shape[1]
    head = Head(torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64))
    bank = FeatureBank(features, features)
    return detector.fit(bank, head).score_samples(bank)


class AnyNetwork:
    """What a row asks of its network: by which recipe it was trained."""

    def __init__(self, name):
        self.name, self.recipe = name, None


def rows_of(detectors):
    """The rows of a config, on networks that have a flat softmax and no background."""
    config = SimpleNamespace(detectors=detectors, tuning=None)
    return make_rows(config, AnyNetwork)
