"""Percentiles of tensors, by numpy's linear interpolation, and comparisons with them that no rounding upsets."""

from fractions import Fraction
from math import ceil, floor

import numpy as np
import torch
from torch import Tensor


def order_statistics(values: Tensor, q: float, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """The two sorted values between which the q-th percentile interpolates (the same one twice if it hits one).

    value > percentile holds exactly where value > the first of them, and value >= percentile exactly where
    value >= the second, so masks compare with these and keep values of float32 apart from a rounded percentile.

    Parameters
    ----------
    values : any shape, any size (torch.quantile stops at 16 million)
    q : in [0, 100]
    dim : the dimension to reduce; None = over all values

    Returns
    -------
    lower, upper : `values` without `dim`, in its dtype and on its device
    """
    values = values.flatten() if dim is None else values.movedim(dim, -1)
    position = _position(q, values.shape[-1])
    ranks = [floor(position), ceil(position)]
    if values.is_cuda:
        lower, upper = values.sort(dim=-1).values[..., ranks].unbind(-1)
    else:
        # One rank at a time: NumPy takes several times as long for two of many values. Behind the first the second is the smallest.
        ordered = np.partition(values.detach().numpy(), ranks[0], axis=-1)
        lower = upper = ordered[..., ranks[0]].copy()  # a view would keep all of them
        if ranks[1] > ranks[0]:
            upper = np.fmin.reduce(ordered[..., ranks[1] :], axis=-1)
    return torch.as_tensor(lower), torch.as_tensor(upper)


def percentile(values: Tensor, q: float, dim: int | None = None) -> Tensor:
    """The q-th percentile by linear interpolation, lower + (upper - lower) * fraction, in float64.

    Parameters as for `order_statistics`.
    """
    lower, upper = (bound.double() for bound in order_statistics(values, q, dim))
    position = _position(q, values.numel() if dim is None else values.shape[dim])
    return lower + (upper - lower) * float(position - floor(position))


def _position(q: float, count: int) -> Fraction:
    """Where the percentile lies among `count` sorted values, exact for the decimal number that was written."""
    return Fraction(repr(float(q))) * (count - 1) / 100
