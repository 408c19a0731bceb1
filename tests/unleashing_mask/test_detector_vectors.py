"""Hand-made vectors of the scores that Unleashing Mask is evaluated with: ReAct's clip, DICE's mask, MSP's one softmax and
the gradient of Mahalanobis."""

import numpy as np
import pytest
import torch
from detector_examples import make_bank
from numpy.testing import assert_allclose

from ood_helpers.banks import FeatureBank, Head
from ood_helpers.detectors.dice import DICE
from ood_helpers.detectors.mahalanobis import Mahalanobis
from ood_helpers.detectors.msp import MSP
from ood_helpers.detectors.react import ReAct

WEIGHT = torch.tensor(
    [[0.5, -1, 2, 0.1], [1.5, 0.3, -0.7, 0.2], [-0.4, 0.8, 0.6, -1.2]], dtype=torch.float64
)  # V3
MEAN_FEATURES = torch.tensor([[0.5, 1, 0.2, 0.8]], dtype=torch.float64)  # V11


def head_of(weight, bias) -> Head:
    return Head(weight, torch.tensor(bias, dtype=torch.float64))


@pytest.mark.parametrize(
    ("features", "clipped"),
    [([0.2, 1.5, 0, 0.9, 3, 0.4, 0.7, 1.1], [0.2, 1, 0, 0.9, 1, 0.4, 0.7, 1])],
)
def test_react_at_a_constant(features, clipped):  # V11
    features = torch.tensor([features], dtype=torch.float64)
    head = head_of(torch.eye(8, dtype=torch.float64), [0.0] * 8)
    bank = make_bank(features, head)
    expected = np.logaddexp.reduce(clipped)
    assert_allclose(ReAct(clip=1.0).fit(bank, head).score_samples(bank), [expected], atol=1e-12)


@pytest.mark.parametrize(
    ("percentile", "threshold", "mask", "logits"),
    [
        (90, 0.715, [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]], [0.1, 1.5, 1.5]),
        (50, 0.14, [[1, 0, 1, 0], [1, 1, 0, 1], [0, 1, 0, 0]], [-1.4, 2.2, 1.5]),
    ],
)
def test_dice(percentile, threshold, mask, logits):  # V11
    head = head_of(WEIGHT, [0.1, 0, -0.1])
    detector = DICE(percentile=percentile).fit(make_bank(MEAN_FEATURES, head, torch.tensor([0])), head)
    assert np.percentile(detector.contributions_, percentile) == pytest.approx(threshold)
    assert_allclose(detector.mask(), mask)
    bank = make_bank(torch.tensor([[1, 2, -1, 0.5]], dtype=torch.float64), head)
    assert_allclose(detector.score_samples(bank), [np.logaddexp.reduce(logits)], atol=1e-12)


def test_msp_is_of_one_softmax():  # V4
    """A second one would score the first of these rows below the second."""
    head = head_of(torch.eye(3, 4, dtype=torch.float64), [0.0] * 3)
    train_bank = make_bank(torch.eye(3, 4, dtype=torch.float64), head, torch.arange(3))
    probabilities = torch.tensor([[0.5, 0.5, 1e-9], [0.48, 0.26, 0.26]], dtype=torch.float64)
    bank = FeatureBank(torch.zeros(2, 4, dtype=torch.float64), probabilities.log())
    found = MSP().fit(train_bank, head).score_samples(bank)
    assert_allclose(found, [0.5, 0.48], atol=1e-6)
    twice = probabilities.softmax(1).amax(1)
    assert_allclose(twice, [0.383652, 0.383872], atol=1e-6)


def test_gradient_of_half_the_squared_distance():  # V12
    features = torch.tensor([[0, 0], [2, 0], [1, 3], [3, 5], [5, 4]], dtype=torch.float64)
    head = head_of(torch.eye(2, dtype=torch.float64), [0.0, 0.0])
    gaussians = Mahalanobis().fit(make_bank(features, head, torch.tensor([0, 0, 1, 1, 1])), head).gaussians_
    query = torch.tensor([[3, 3]], dtype=torch.float64, requires_grad=True)
    gaussians.log_densities(query)[0, 1].neg().backward()
    assert_allclose(query.grad, [[0.625, -3.125]], atol=1e-9)
    with torch.no_grad():
        moved = gaussians.log_densities(query - 0.01 * query.grad.sign())
    assert float(moved[0, 1]) == pytest.approx(-1.525250, abs=1e-6)
