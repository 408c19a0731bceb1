"""GradNorm against the vectors and the gradient of each sample."""

import pytest
import torch
from detector_examples import assert_certain, bank_of_logits, make_bank, random_problem
from numpy.testing import assert_allclose
from torch.nn.functional import log_softmax

from ood_helpers.detectors.gradnorm import GradNorm


def test_vectors(train_bank, head, bank):
    expected = [1.625312, 1.353203, 0.623934, 1.178858]
    assert_allclose(GradNorm().fit(train_bank, head).score_samples(bank), expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_the_score_is_the_norm_of_the_gradient(temperature):
    """Features of both signs, and the gradient of each sample by autograd."""
    train, head, bank = random_problem(6, 11, 8)
    bank = make_bank(bank.features - 0.5, head)
    expected = []
    for feature in bank.features:
        weight = head.weight.clone().requires_grad_()
        logits = weight @ feature + head.bias
        loss = -log_softmax(logits / temperature, dim=0).mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        expected.append(float(gradient.abs().sum()))
    detector = GradNorm(temperature=temperature).fit(train, head)
    assert_allclose(detector.score_samples(bank), expected, rtol=1e-12)


def test_confident_samples_are_kept_apart(train_bank, head):
    """In float32 the softmax of each of these is 1, so that any score of it would be the same for all."""
    logits = torch.tensor([[18.0, 0, 0], [20, 0, 0], [25, 0, 0], [30, 0, 0]])
    assert_certain(logits)
    scores = GradNorm().fit(train_bank, head).score_samples(bank_of_logits(logits))
    assert scores.dtype == torch.float64 and (scores.diff() > 0).all()
