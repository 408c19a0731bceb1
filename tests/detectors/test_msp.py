"""MSP against the vectors, and on confident samples."""

import pytest
import torch
from detector_examples import assert_certain, bank_of_logits, tensor
from numpy.testing import assert_allclose

from ood_helpers.detectors.msp import MSP


def test_vectors(train_bank, head, bank):
    expected = [0.623568, 0.627508, 0.402659, 0.515096]
    assert_allclose(MSP().fit(train_bank, head).score_samples(bank), expected, atol=1e-6)


@pytest.mark.parametrize(("logits", "expected"), [([2, 0.5, -1], 0.785597), ([0.1, 1.2, 0.3], 0.574897)])
def test_scores_of_logits(logits, expected, train_bank, head):
    scores = MSP().fit(train_bank, head).score_samples(bank_of_logits(tensor([logits])))
    assert float(scores) == pytest.approx(expected, abs=1e-6)


def test_confident_samples_are_kept_apart(train_bank, head):
    """In float32 the softmax of each of these is 1."""
    logits = torch.tensor([[18.0, 0, 0], [20, 0, 0], [25, 0, 0], [30, 0, 0]])
    assert_certain(logits)
    scores = MSP().fit(train_bank, head).score_samples(bank_of_logits(logits))
    assert (scores.diff() > 0).all()
