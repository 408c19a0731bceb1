"""Percentiles against numpy's."""

import numpy as np
import pytest
import torch

from ood_helpers.detectors.percentile import order_statistics, percentile

LEVELS = [0, 1, 7, 12.5, 50, 60, 90, 99.9, 100]


@pytest.mark.parametrize("q", LEVELS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (7, 342), (5, 101)])
def test_as_numpy(q, shape):
    values = np.random.default_rng(0).normal(size=shape)
    tensor = torch.from_numpy(values)
    np.testing.assert_allclose(percentile(tensor, q), np.percentile(values, q), rtol=0, atol=1e-12)
    for dim in (0, 1):
        np.testing.assert_allclose(
            percentile(tensor, q, dim), np.percentile(values, q, axis=dim), rtol=0, atol=1e-12
        )


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
    assert float(percentile(values, 25)) == pytest.approx(0.25 * 16_999_999)
