"""The hand-made example of the vectors: three classes, four features, four samples; and a small network."""

import pytest
import torch
from detector_examples import make_bank
from pixel_examples import SmallNetwork

from ood_helpers.banks import Head


@pytest.fixture
def head():
    weight = [[0.8, -0.3, 0.5, 0.1], [-0.2, 0.9, -0.4, 0.6], [0.3, 0.2, 0.7, -0.5]]
    return Head(
        torch.tensor(weight, dtype=torch.float64), torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)
    )


@pytest.fixture
def train_bank(head):
    """One training image a class, so that the class means are its features."""
    means = [[1.2, 0.1, 0.9, 0.4], [0.2, 1.5, 0.3, 0.8], [0.6, 0.5, 1.1, 0.2]]
    return make_bank(torch.tensor(means, dtype=torch.float64), head, torch.arange(3))


@pytest.fixture
def bank(head):
    features = [[1.4, 0.2, 0.7, 0.5], [0.1, 1.1, 0.2, 0.9], [2, 1.8, 0.4, 0.3], [0.3, 0.4, 1.6, 0.1]]
    return make_bank(torch.tensor(features, dtype=torch.float64), head)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return SmallNetwork()
