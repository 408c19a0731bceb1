"""Class means, accuracy and percentiles, the latter against numpy's."""

import numpy as np
import pytest
import torch
from bank_examples import Sharded

from ood_helpers.banks import FeatureBank
from ood_helpers.errors import InputError
from ood_helpers.statistics import activation_percentile, class_means, order_statistics

LEVELS = [0, 1, 7, 12.5, 50, 60, 90, 99.9, 100]


def sharded(features, labels=None, pieces=3):
    return Sharded(FeatureBank(features, features, labels), pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", [0, 10, 37.5, 90, 99.9, 100])
def test_the_activation_percentile_is_numpys(dtype, q):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(101, 7, dtype=dtype, generator=generator) * 10 ** torch.randn(
        101, 1, generator=generator
    ).to(dtype)
    features[::5] = 0.0
    features[1, 0] = -0.0
    expected = np.percentile(features.double().numpy(), q)
    assert activation_percentile(sharded(features), q) == pytest.approx(expected, rel=1e-12, abs=1e-300)


def test_class_means_stream_over_shards():
    features, labels = torch.randn(50, 4), torch.arange(50) % 3
    means, counts = class_means(sharded(features, labels), 4)
    assert means.dtype == torch.float64 and counts.tolist() == [17, 17, 16, 0]
    for label in range(3):
        torch.testing.assert_close(means[label], features[labels == label].double().mean(0))
    assert means[3].isnan().all()


def test_class_means_need_labels_in_range():
    with pytest.raises(InputError, match="no labels"):
        class_means(sharded(torch.randn(5, 2)), 2)
    with pytest.raises(InputError, match=r"expected 0 to 2"):
        class_means(sharded(torch.randn(5, 2), torch.arange(5), 1), 3)


@pytest.mark.parametrize("q", LEVELS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (7, 342), (5, 101)])
def test_numpys_percentile_lies_between_the_order_statistics_and_no_value_does(q, shape):
    values = np.random.default_rng(0).normal(size=shape)
    for dim in (None, 0, 1):
        lower, upper = (bound.numpy() for bound in order_statistics(torch.from_numpy(values), q, dim))
        expected = np.percentile(values, q, axis=dim)
        assert (lower <= expected + 1e-12).all() and (expected <= upper + 1e-12).all()
        if dim is not None:
            lower, upper = (np.expand_dims(bound, dim) for bound in (lower, upper))
        assert not ((lower < values) & (values < upper)).any()


@pytest.mark.parametrize("q", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_order_statistics_decide_comparisons_with_the_percentile(q, dtype):
    values = np.random.default_rng(1).integers(-3, 4, size=(6, 51)).astype(dtype) / 4
    lower, upper = order_statistics(torch.from_numpy(values), q, dim=1)
    exact = np.percentile(values.astype(np.float64), q, axis=1, keepdims=True)
    np.testing.assert_array_equal(values > lower.numpy()[:, None], values > exact)
    np.testing.assert_array_equal(values >= upper.numpy()[:, None], values >= exact)
    assert lower.dtype == upper.dtype == torch.from_numpy(values).dtype


def test_more_values_than_torch_quantile_takes():
    values = torch.arange(17_000_000, dtype=torch.float64)
    assert [float(bound) for bound in order_statistics(values, 25)] == [4_249_999, 4_250_000]
