"""MaxLogit against the vectors."""

from numpy.testing import assert_allclose

from ood_helpers.detectors.max_logit import MaxLogit


def test_vectors(train_bank, head, bank):
    scores = MaxLogit().fit(train_bank, head).score_samples(bank)
    assert_allclose(scores, [1.56, 1.23, 1.39, 1.29], atol=1e-6)


def test_logits_of_the_example(bank):
    expected = [[1.56, -0.28, 0.75], [0.04, 1.23, -0.01], [1.39, 1.04, 1.14], [1.03, -0.48, 1.29]]
    assert_allclose(bank.logits, expected, atol=1e-12)
