"""KL matching: the vectors of its sheet, its templates, and the leak."""

import numpy as np
import pytest
import torch
from detector_examples import assert_certain, bank_of_logits, split, tensor
from numpy.testing import assert_allclose, assert_array_equal

from ood_helpers.detectors.kl_matching import KLMatching, kl_matching_score
from ood_helpers.errors import InputError

ROWS = tensor(
    [[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8], [0, 0.25, 0.75]]
)
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
TEMPLATES = tensor([[0.75, 0.15, 0.1], [0.15, 0.7, 0.15], [0.05, 0.175, 0.775]])
QUERIES = torch.cat([ROWS, tensor([[1 / 3, 1 / 3, 1 / 3], [0.45, 0.45, 0.1]])])
SCORES = [-0.011084, -0.009241, -0.025732, -0.022582, -0.038752, -0.064576, -0.285026, -0.255004]


def test_vectors():
    assert_allclose(kl_matching_score(QUERIES, TEMPLATES), SCORES, atol=1e-6)


@pytest.mark.parametrize("templates", ["train", "test_leak"])
def test_the_templates_are_fitted_by_label(templates, head):
    """A probability of 0 stands in the logits as one that is far below the others."""
    train = bank_of_logits(ROWS.clamp(min=1e-300).log(), LABELS)
    detector = KLMatching(templates=templates).fit(split(train, 1, 3, 2), head)
    assert_allclose(detector.templates_, TEMPLATES, atol=1e-12)
    queries = bank_of_logits(QUERIES.clamp(min=1e-300).log())
    assert_allclose(detector.score_samples(queries), SCORES, atol=1e-6)


def test_the_label_counts_not_the_prediction(head):
    """Every image is predicted as class 2, but each class has its own."""
    logits = tensor([[0.0, 1, 5], [1, 0, 5], [0, 0, 5]])
    detector = KLMatching().fit(bank_of_logits(logits, torch.tensor([0, 1, 2])), head)
    assert_allclose(detector.templates_, logits.softmax(1), atol=1e-12)


def test_the_score_is_the_smallest_divergence():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(9, 6, generator=generator, dtype=torch.float64).softmax(1)
    d = torch.randn(4, 6, generator=generator, dtype=torch.float64).softmax(1)
    expected = [-min(sum(a * np.log(a / b) for a, b in zip(x, y)) for y in d.numpy()) for x in p.numpy()]
    assert_allclose(kl_matching_score(p, d), expected, atol=1e-12)


def test_zeros_in_a_template():
    """KL is infinite there: the score is finite, far below all others, and ordered by the mass on the zero."""
    templates = tensor([[1, 0, 0], [0, 1, 0]])
    scores = kl_matching_score(tensor([[1, 0, 0], [0.9, 0, 0.1], [0, 0, 1]]), templates)
    assert scores[0] == pytest.approx(0, abs=1e-12)
    assert scores.isfinite().all()
    assert scores[2] < 5 * scores[1] < -300


def test_confident_samples_are_kept_apart(train_bank, head):
    """In float32 the softmax of each of these is 1, so that any score of it would be the same for all."""
    logits = torch.tensor([[18.0, 0, 0], [20, 0, 0], [25, 0, 0], [30, 0, 0]])
    assert_certain(logits)
    scores = KLMatching().fit(train_bank, head).score_samples(bank_of_logits(logits))
    assert scores.dtype == torch.float64 and (scores.diff() < 0).all()


def test_the_leak_shows_in_label_and_set():
    detectors = KLMatching(), KLMatching(templates="test_leak")
    assert [detector.label for detector in detectors] == ["KL matching", "KL matching (test leak)"]
    assert [detector.fit_set for detector in detectors] == ["train", "test"]


def test_templates_of_another_set_are_not_used(train_bank, head, bank):
    detector = KLMatching().fit(train_bank, head)
    before = detector.score_samples(bank)
    detector.templates = "test_leak"
    with pytest.raises(InputError, match=r"'test_leak' after a fit with 'train'.*fit again"):
        detector.score_samples(bank)
    detector.templates = "train"
    assert_array_equal(detector.score_samples(bank), before)
    detector.templates = "test_leak"
    assert detector.fit(train_bank, head).score_samples(bank).shape == (4,)
