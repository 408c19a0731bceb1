"""SCALE: the vectors, its factor, ties and zeros."""

import numpy as np
import pytest
import torch
from detector_examples import cast, logsumexp, make_bank, score_of, tensor
from numpy.testing import assert_allclose

from ood_helpers.detectors.scale import Scale
from ood_helpers.errors import InputError


def test_vectors(train_bank, head, bank):
    expected = [5.692653, 4.339756, 5.069124, 4.489468]
    assert_allclose(Scale(percentile=50).fit(train_bank, head).score_samples(bank), expected, atol=1e-6)


@pytest.mark.parametrize(("percentile", "ratio"), [(65, 7.8 / 5.6), (50, 7.8 / 6.5)])
def test_every_entry_has_the_factor_of_ash_s(percentile, ratio):
    feature = tensor([[0.2, 1.5, 0, 0.9, 3, 0.4, 0.7, 1.1]])
    expected = logsumexp(feature * np.exp(ratio))
    assert_allclose(score_of(Scale(percentile=percentile), feature), expected, atol=1e-12)


def test_ties_at_the_border():
    """Two of four equal entries count as the largest; all four are scaled alike."""
    features = tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    assert_allclose(score_of(Scale(percentile=75), features), np.log(4 * np.exp(np.exp(2)) + 4), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_feature_of_zeros_scores_as_the_bias(dtype, train_bank, head):
    bank = cast(make_bank(torch.zeros(2, 4, dtype=torch.float64), head), dtype)
    scores = Scale().fit(train_bank, head).score_samples(bank)
    assert_allclose(scores, [logsumexp(head.bias)] * 2, rtol=1e-6)


def test_a_factor_beyond_float32_is_finite():
    """exp(200), of a float32 bank; beyond exp(709) float64 ends, too, and that is an error."""
    assert score_of(Scale(percentile=100), torch.ones(1, 200)).isfinite().all()
    with pytest.raises(InputError, match="1 of samples 0 to 0 have NaN or infinite scores"):
        score_of(Scale(percentile=100), torch.ones(1, 800))
