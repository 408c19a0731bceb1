"""Statistics of banks and tensors: class means, accuracy, exact percentiles.

Percentiles interpolate linearly as numpy's do, and comparisons with them are not upset by rounding.
"""

from fractions import Fraction
from math import ceil, floor

import numpy as np
import torch
from torch import Tensor

from ood_helpers.banks import Bank, Head
from ood_helpers.errors import InputError


def class_means(bank: Bank, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature of each class and number of images in it, streaming over the bank's shards.

    Returns
    -------
    means [C, D] float64 (NaN for a class without images), counts [C] int64

    Raises
    ------
    InputError : the bank has no labels, or a label outside 0 .. C - 1
    """
    sums, counts = None, torch.zeros(num_classes, dtype=torch.int64)
    for shard in bank.shards():
        if shard.labels is None:
            raise InputError(
                "The bank has no labels, expected the labels of the ID training images; add them to the set."
            )
        if len(shard) and not 0 <= int(shard.labels.min()) <= int(shard.labels.max()) < num_classes:
            raise InputError(
                f"Labels run from {int(shard.labels.min())} to {int(shard.labels.max())}, expected 0 to "
                f"{num_classes - 1}; check num_classes and the labels."
            )
        labels = shard.labels.cpu()
        if sums is None:
            sums = torch.zeros(num_classes, shard.features.shape[1], dtype=torch.float64)
        sums.index_add_(0, labels, shard.features.cpu().double())
        counts += torch.bincount(labels, minlength=num_classes)
    return sums / counts[:, None], counts


def accuracy(bank: Bank, head: Head) -> float:
    """Percent of a bank's images that its head classifies as labelled."""
    correct = sum(int((head.classify(shard.logits) == shard.labels).sum()) for shard in bank.shards())
    return 100 * correct / len(bank)


def activation_percentile(bank: Bank, percentile: float) -> float:
    """The percentile of all N * D feature values of a bank, exact, as numpy's linear interpolation.

    The two order statistics it lies between are found by counting the values' leading 16 bits, then the
    next 16 among those that share them, and so on: a few passes over the shards, no copy of the bank.
    """
    total = sum(shard.features.numel() for shard in bank.shards())
    position = percentile / 100 * (total - 1)
    lower = int(position)
    low, high = (_order_statistic(bank, min(rank, total - 1)) for rank in (lower, lower + 1))
    return low + (high - low) * (position - lower)


def _order_statistic(bank: Bank, rank: int) -> float:
    dtype = next(iter(bank.shards())).features.cpu().numpy().dtype
    prefix, bits = 0, 8 * dtype.itemsize
    for start in range(bits - 16, -1, -16):
        histogram = np.zeros(1 << 16, dtype=np.int64)
        for shard in bank.shards():
            keys = _sortable(shard.features.cpu().numpy().ravel())
            unsigned = keys.dtype.type
            if start < bits - 16:
                keys = keys[(keys >> unsigned(start + 16)) == prefix]
            digits = (keys >> unsigned(start)) & unsigned(0xFFFF)
            histogram += np.bincount(digits.astype(np.int64), minlength=1 << 16)
        cumulative = np.cumsum(histogram)
        digit = int(np.searchsorted(cumulative, rank, side="right"))
        rank -= int(cumulative[digit - 1]) if digit else 0
        prefix = (prefix << 16) | digit
    top = 1 << (bits - 1)
    pattern = prefix ^ top if prefix & top else prefix ^ (2 * top - 1)
    return float(np.array([pattern], dtype=f"u{bits // 8}").view(dtype)[0])


def _sortable(values: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the floats: flip the sign bit of positives, all bits of negatives."""
    bits = 8 * values.dtype.itemsize
    patterns = np.ascontiguousarray(values).view(f"u{bits // 8}")
    top = patterns.dtype.type(1 << (bits - 1))
    return np.where(patterns & top, ~patterns, patterns | top)


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


def _position(q: float, count: int) -> Fraction:
    """Where the percentile lies among `count` sorted values, exact for the decimal number that was written."""
    return Fraction(repr(float(q))) * (count - 1) / 100
