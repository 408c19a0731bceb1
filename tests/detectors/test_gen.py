"""GEN against the vectors and loops, and on confident samples."""

import numpy as np
import pytest
import torch
from detector_examples import assert_certain, bank_of_logits, random_problem, tensor
from numpy.testing import assert_allclose, assert_array_equal

from ood_helpers.detectors.gen import GEN


def test_vectors(train_bank, head, bank):
    expected = [-2.501937, -2.520770, -2.577520, -2.514106]
    assert_allclose(GEN(top=3).fit(train_bank, head).score_samples(bank), expected, atol=1e-6)


@pytest.mark.parametrize(("gamma", "top"), [(0.1, 1), (0.1, 3), (0.5, 7), (1.0, None)])
def test_loops(gamma, top):
    train, head, bank = random_problem(7, 9, 12)
    expected = [
        -sum((p * (1 - p)) ** gamma for p in sorted(row, reverse=True)[:top])
        for row in bank.logits.softmax(1).tolist()
    ]
    assert_allclose(GEN(gamma=gamma, top=top).fit(train, head).score_samples(bank), expected, atol=1e-12)


def test_a_hundred_classes_are_taken_unless_told():
    train, head, bank = random_problem(130, 4, 6)
    default = GEN().fit(train, head).score_samples(bank)
    assert_array_equal(GEN(top=100).fit(train, head).score_samples(bank), default)
    assert (GEN(top=101).fit(train, head).score_samples(bank) < default).all()
    everything = GEN(top=130).fit(train, head).score_samples(bank)
    assert_array_equal(GEN(top=500).fit(train, head).score_samples(bank), everything)


def test_confident_samples_are_kept_apart(train_bank, head):
    """In float32 the softmax of each of these is 1, so that any score of it would be the same for all."""
    logits = torch.tensor([[18.0, 0, 0], [20, 0, 0], [25, 0, 0], [30, 0, 0]])
    assert_certain(logits)
    scores = GEN().fit(train_bank, head).score_samples(bank_of_logits(logits))
    assert scores.dtype == torch.float64 and (scores.diff() > 0).all()


def test_predictions_that_float64_rounds_to_certain(train_bank, head):
    """Here 1 - p is rounding even in float64; only the sum of the others tells the samples apart."""
    logits = tensor([[40.0, 0, 0], [60, 0, 0], [100, 0, 0], [300, 0, 0]])
    assert_certain(logits)
    scores = GEN(top=1).fit(train_bank, head).score_samples(bank_of_logits(logits))
    assert (scores.diff() > 0).all()
    assert_allclose(scores, -((2 * np.exp(-logits[:, 0].numpy())) ** 0.1), rtol=1e-9)
