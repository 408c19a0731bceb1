"""Banks and heads of networks with a background class."""

import torch
from detector_examples import random_problem

from ood_helpers.banks import BackgroundBank, FeatureBank, Head
from ood_helpers.networks.background import foreground_head


def dense_problem(
    classes: int = 4, dimension: int = 12, samples: int = 23, seed: int = 0
) -> tuple[FeatureBank, Head, FeatureBank]:
    """(training bank, head, bank) of a head with K + 1 outputs, the training labels those of K classes."""
    train, head, bank = random_problem(classes + 1, dimension, samples, seed, train=40)
    return FeatureBank(train.features, train.logits, torch.arange(40) % classes), head, bank


def foreground_problem(**settings: int) -> tuple[BackgroundBank, Head, BackgroundBank]:
    """The same as a detector sees it."""
    train, head, bank = dense_problem(**settings)
    return BackgroundBank(train), foreground_head(head), BackgroundBank(bank)
