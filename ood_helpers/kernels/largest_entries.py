"""The largest entries of each feature: where they begin, and how much of the feature's sum they hold, for ASH and SCALE.

    t_n = the count-th largest of f_n1 .. f_nD
    l_n = the place up to which entries equal to t_n are kept, so that with those above it exactly count are;
          D - 1 where all equal ones are
    s1_n = sum over d of f_nd,   s2_n = the same over the kept entries

f [N, D] features, which may be negative; -0.0 is 0.0. There is no sorting: floats have the order of the whole numbers that
their bits make (those of negative ones reversed), so the search for a pivot with count entries from it on ends. A row is read
once and counted in registers, about seven times for features after a ReLU; a second time where only some equal entries are kept.

Sources: Djurisic et al., "Extremely Simple Activation Shaping for Out-of-Distribution Detection", ICLR 2023,
arXiv 2209.09858; Xu et al., "Scaling for Training Time and Post-hoc Out-of-distribution Detection Enhancement", ICLR 2024,
arXiv 2310.00227.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ood_helpers.errors import InputError
from ood_helpers.kernels.launch import OPTIONS, jit, launcher, power_of_two, runs_on_triton, tl
from ood_helpers.kernels.selection import largest

CHUNK = 1024  # samples whose largest entries are copied at once
LONGEST_ROW = 16384  # features that a Triton program holds


@dataclass(frozen=True)
class LargestEntries:
    """Which entries of features [N, D] are the largest, and their sums: four tensors [N].

    threshold : t, the smallest value that is kept
    last : int64, the place up to which entries equal to it are kept; D - 1 where all are
    total, kept_total : s1, s2; both NaN for a feature with NaN
    count : how many are kept
    """

    threshold: Tensor
    last: Tensor
    total: Tensor
    kept_total: Tensor
    count: int

    def mask(self, features: Tensor) -> Tensor:
        """The entries that are kept: bool [N, D]. NaN counts as kept, so that it is not lost."""
        threshold = self.threshold[:, None]
        place = torch.arange(features.shape[1], device=features.device)
        return ~((features < threshold) | ((features == threshold) & (place > self.last[:, None])))

    def of(self, samples: Tensor | slice) -> Self:
        """The same for some of the samples."""
        tensors = self.threshold, self.last, self.total, self.kept_total
        return LargestEntries(*(tensor[samples] for tensor in tensors), self.count)

    def split(self, size: int) -> list[Self]:
        """The same for `size` samples each, as torch.Tensor.split."""
        return [self.of(slice(start, start + size)) for start in range(0, max(1, len(self.last)), size)]


@jit
def _ordered(values):
    """Whole numbers in the order of float32 values."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def _value(place):
    """The float32 value at a place in the order, the inverse of `_ordered`."""
    return tl.where(place < 0, place ^ 0x7FFFFFFF, place).to(tl.float32, bitcast=True)


@jit
def _largest_entries_kernel(
    features,
    threshold,
    last,
    total,
    kept_total,
    count,
    features_n,
    features_d,
    FEATURE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row. Where only some of the entries equal to t are kept, `last` becomes minus their number, for `_last_kernel`."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < FEATURE_DIM
    # NaN behind the row's end is in no comparison, minimum or maximum.
    f = tl.load(features + n * features_n + d.to(tl.int64) * features_d, mask=inside, other=float("nan"))
    whole = tl.sum(tl.where(inside, f, 0.0))
    # At least count entries are from low on, fewer from high on. To add 0.0 makes -0.0 its equal 0.0. Entries are counted
    # in floats, exact here, as a GPU compares to 1.0 or 0.0 in one instruction.
    low, high = _ordered(tl.min(f) + 0.0), _ordered(tl.max(f) + 0.0) + 1
    from_high = tl.zeros_like(whole)
    from_low = from_high + FEATURE_DIM
    wanted = from_high + count
    low_weight, high_weight = from_high + 1, from_high + 1
    step, side = 0, 0
    while (from_low != wanted) & (high > low + 1):
        # Many entries may be 0 as the smallest one, and the first pivot sees whether more are kept than there are others.
        # Then come five steps of regula falsi for an exponential tail (Illinois: an end that stays is drawn in), and one that
        # halves what is left, which bounds the steps. The bits of a count as a float are as good as its logarithm.
        common, goal, rare = _ordered(from_low), _ordered(wanted), _ordered(tl.maximum(from_high, 0.5))
        excess, lack = (common - goal).to(tl.float32) * low_weight, (goal - rare).to(tl.float32) * high_weight
        pivot = _ordered(_value(low) + (_value(high) - _value(low)) * (excess / (excess + lack)))
        pivot = tl.where(step % 6 == 0, (low & high) + ((low ^ high) >> 1), pivot)
        pivot = tl.where(step == 0, low + 1, pivot)
        pivot = tl.minimum(tl.maximum(pivot, low + 1), high - 1)
        from_pivot = tl.sum(tl.where(f >= _value(pivot), 1.0, 0.0))
        enough = from_pivot >= wanted
        low, from_low = tl.where(enough, pivot, low), tl.where(enough, from_pivot, from_low)
        high, from_high = tl.where(enough, high, pivot), tl.where(enough, from_high, from_pivot)
        low_weight = tl.where(side < 0, 0.5 * low_weight, 1.0)
        low_weight = tl.where(enough, 1.0, low_weight)
        high_weight = tl.where(side > 0, 0.5 * high_weight, 1.0)
        high_weight = tl.where(enough, high_weight, 1.0)
        side = tl.where(enough, 1, -1)
        step += 1
    smallest = tl.min(tl.where(f >= _value(low), f, float("inf")))
    # Where more than count entries are left they all equal low, and high is the next number: from_high counts those above.
    tied = from_low != wanted
    some = tl.where(tied, wanted - from_high, 0.0)
    kept = tl.sum(tl.where(f >= tl.where(tied, _value(high), smallest), f, 0.0))
    kept += tl.where(tied, some * smallest, 0.0)
    tl.store(threshold + n, smallest)
    tl.store(last + n, tl.where(tied, -some.to(tl.int64), FEATURE_DIM - 1))
    tl.store(total + n, whole)
    tl.store(kept_total + n, tl.where(whole == whole, kept, whole))


@jit
def _last_kernel(
    features, threshold, last, features_n, features_d, FEATURE_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One row: the place of the last entry equal to t that is kept, where `last` is minus their number."""
    n = tl.program_id(0).to(tl.int64)
    some = -tl.load(last + n)
    if some > 0:
        d = tl.arange(0, BLOCK_D)
        f = tl.load(
            features + n * features_n + d.to(tl.int64) * features_d, mask=d < FEATURE_DIM, other=float("nan")
        )
        rank = tl.cumsum((f == tl.load(threshold + n)).to(tl.int32))
        tl.store(last + n, tl.sum((rank < some).to(tl.int32)).to(tl.int64))


@launcher
def launch(features: Tensor, count: int) -> LargestEntries:
    """The Triton kernel, arguments as for `largest_entries`; D at most LONGEST_ROW. No memory beside the output."""
    n, feature_dim = features.shape
    found = LargestEntries(
        features.new_empty(n),
        features.new_empty(n, dtype=torch.int64),
        features.new_empty(n),
        features.new_empty(n),
        count,
    )
    block = max(16, power_of_two(feature_dim))
    if n:
        _largest_entries_kernel[(n,)](
            features,
            found.threshold,
            found.last,
            found.total,
            found.kept_total,
            count,
            *features.stride(),
            FEATURE_DIM=feature_dim,
            BLOCK_D=block,
            num_warps=min(16, max(1, block // 2048)),
            **OPTIONS,
        )
        _last_kernel[(n,)](
            features,
            found.threshold,
            found.last,
            *features.stride(),
            FEATURE_DIM=feature_dim,
            BLOCK_D=block,
            num_warps=min(16, max(1, block // 1024)),
            **OPTIONS,
        )
    return found


def reference(features: Tensor, count: int) -> LargestEntries:
    """The same in plain torch, on any device and in any dtype; arguments as for `largest_entries`.

    Memory beside the output, in numbers: 4 D CHUNK.
    """
    parts = []
    for f in features.split(CHUNK):
        kept = largest(f.clone(), count)
        threshold = kept.amin(dim=1)
        equal = f == threshold[:, None]
        wanted = (kept == threshold[:, None]).sum(dim=1)
        last = torch.full_like(wanted, f.shape[1] - 1)
        tied = equal.sum(dim=1) > wanted
        if tied.any():
            rank = equal[tied].cumsum(dim=1, dtype=torch.int32)
            last[tied] = (rank < wanted[tied, None]).sum(dim=1)
        parts.append((threshold, last, f.sum(dim=1), kept.sum(dim=1)))
    return LargestEntries(*map(torch.cat, zip(*parts, strict=True)), count)


def largest_entries(features: Tensor, count: int) -> LargestEntries:
    """The `count` largest entries of each feature [N, D], of any strides; of equal ones the first.

    Raises
    ------
    InputError : count below 1 or above D
    """
    feature_dim = features.shape[1]
    if not 1 <= count <= feature_dim:
        raise InputError(
            f"The {count} largest of {feature_dim} entries were asked for, expected 1 to {feature_dim}; change the count."
        )
    takes = runs_on_triton(features) and feature_dim <= LONGEST_ROW
    return launch(features, count) if takes else reference(features, count)
