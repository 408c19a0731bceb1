"""Two labelled examples of two features each, for the tests of both Mahalanobis detectors."""

import torch
from detector_examples import make_bank, tensor

from ood_helpers.banks import Head
from ood_helpers.detectors.mahalanobis import Mahalanobis

TWO_CLASSES = [[0, 0], [2, 1], [1, 2], [5, 4], [8, 6], [5, 5]], [0, 0, 0, 1, 1, 1]
TWO_CLASSES_UNEVEN = [[0, 0], [2, 0], [1, 3], [3, 5], [5, 4]], [0, 0, 1, 1, 1]


def labelled(example):
    """(bank, head) of an example, with logits that are the features."""
    features, labels = example
    head = Head(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    return make_bank(tensor(features), head, torch.tensor(labels)), head


def gaussians_of(example):
    bank, head = labelled(example)
    return Mahalanobis().fit(bank, head).gaussians_
