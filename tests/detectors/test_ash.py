"""ASH: the vectors, its three shapes, ties and zeros."""

import numpy as np
import pytest
import torch
from detector_examples import cast, logsumexp, make_bank, score_of, tensor
from numpy.testing import assert_allclose, assert_array_equal

from ood_helpers.detectors.ash import ASH, kept_count
from ood_helpers.errors import InputError
from ood_helpers.kernels.largest_entries import largest_entries

FEATURE = tensor([[0.2, 1.5, 0, 0.9, 3, 0.4, 0.7, 1.1]])


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("p", [2.065090, 1.702140, 2.164326, 1.839056]),
        ("b", [2.436900, 1.827411, 2.360607, 1.790497]),
        ("s", [5.784654, 4.641977, 4.641151, 4.210406]),
    ],
)
def test_vectors(variant, expected, train_bank, head, bank):
    detector = ASH(variant=variant, percentile=50).fit(train_bank, head)
    assert_allclose(detector.score_samples(bank), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "percentile", "shaped"),
    [
        ("p", 65, [0, 1.5, 0, 0, 3, 0, 0, 1.1]),
        ("b", 65, [0, 2.6, 0, 0, 2.6, 0, 0, 2.6]),
        ("s", 65, [0, 6.039506, 0, 0, 12.079012, 0, 0, 4.428971]),
        ("s", 50, [0, 4.980175, 0, 2.988105, 9.960351, 0, 0, 3.652129]),
        ("p", 0, FEATURE[0]),
        ("p", 100, [0, 0, 0, 0, 3, 0, 0, 0]),
    ],
)
def test_shapes(variant, percentile, shaped):
    detector = ASH(variant=variant, percentile=percentile)
    assert_allclose(score_of(detector, FEATURE), logsumexp([shaped]), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "percentile", "count"),
    [
        (342, 90, 34),  # 307.8 removed
        (342, 75, 86),  # 256.5: a half goes to the even number
        (10, 35, 6),  # 3.5
        (10, 45, 6),  # 4.5
        (500, 65.1, 174),  # 325.5, but 325.49999999999994 in floating point
        (7, 0, 7),
        (7, 99.9, 1),
        (7, 100, 1),
    ],
)
def test_number_of_entries_kept(size, percentile, count):
    features = torch.rand(3, size, generator=torch.Generator().manual_seed(0))
    assert kept_count(size, percentile) == count
    kept = features[largest_entries(features, count).mask(features)].reshape(3, count)
    assert_array_equal(kept.sort(1).values, features.sort(1).values[:, size - count :])


def test_ties_at_the_border_keep_exactly_k():
    features = tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    pruned, binarised, scaled = (score_of(ASH(variant=variant, percentile=75), features) for variant in "pbs")
    assert_allclose(pruned, np.log(2 * np.exp(1) + 6), atol=1e-12)
    assert_allclose(binarised, np.log(2 * np.exp(2) + 6), atol=1e-12)
    assert_allclose(scaled, np.log(2 * np.exp(np.exp(2)) + 6), atol=1e-12)


@pytest.mark.parametrize("variant", ["p", "b", "s"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_feature_of_zeros_scores_as_the_bias(variant, dtype, train_bank, head):
    bank = cast(make_bank(torch.zeros(2, 4, dtype=torch.float64), head), dtype)
    scores = ASH(variant=variant).fit(train_bank, head).score_samples(bank)
    assert_allclose(scores, [logsumexp(head.bias)] * 2, rtol=1e-6)


def test_a_factor_beyond_float32_is_finite():
    """exp(200), of a float32 bank; beyond exp(709) float64 ends, too, and that is an error."""
    assert score_of(ASH(percentile=100), torch.ones(1, 200)).isfinite().all()
    with pytest.raises(InputError, match="1 of samples 0 to 0 have NaN or infinite scores"):
        score_of(ASH(percentile=100), torch.ones(1, 800))


def test_the_label_names_the_variant():
    assert [ASH(variant=variant).label for variant in "pbs"] == ["ASH-P", "ASH-B", "ASH-S"]
    assert ASH().label == "ASH-S"
