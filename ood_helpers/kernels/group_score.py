"""MOS: the largest log-odds of any group against its "others".

    g_k = logsumexp over the classes j of group k of (z_j - z_others,k)
    S = max_k g_k

z [N, C + K] logits, group by group, the first column of each its "others". The difference comes first, as a sum would be
rounded to the precision of large logits. In Triton the logits are read once: a running log-sum-exp goes through the columns
of a group, a block at a time.

Source: Huang and Li, "MOS: Towards Scaling Out-of-distribution Detection for Large Semantic Space", CVPR 2021,
arXiv 2105.01879, section 3.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ood_helpers.kernels.launch import OPTIONS, ceil_div, jit, launcher, power_of_two, runs_on_triton, tl

CHUNK = 2**20  # logits of the samples that are compared at once
BLOCK = 512  # logits a program reads at once
BLOCK_C = 128  # columns of them at most; the rest are rows


@jit
def _group_score_kernel(
    logits,
    first_columns,
    stop_columns,
    out,
    samples,
    logits_n,
    logits_c,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """S of BLOCK_N samples."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = rows < samples
    start = logits + rows.to(tl.int64) * logits_n
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for k in range(GROUPS):
        others, stop = tl.load(first_columns + k), tl.load(stop_columns + k)
        z_others = tl.load(start + others * logits_c, mask=present, other=0.0)
        largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        first = others + 1
        while first < stop:
            columns = first + tl.arange(0, BLOCK_C)
            inside = present[:, None] & (columns < stop)[None, :]
            z = tl.load(start[:, None] + (columns * logits_c)[None, :], mask=inside, other=0.0)
            odds = tl.where(inside, z - z_others[:, None], float("-inf"))
            until = tl.maximum(largest, tl.max(odds, axis=1))
            # Never inf - inf. Any shift is right, the largest only keeps exp in range; NaN stays in the total.
            shift = tl.where(tl.abs(until) == float("inf"), 0.0, until)
            total = total * tl.exp(largest - shift) + tl.sum(tl.exp(odds - shift[:, None]), axis=1)
            largest = until
            first += BLOCK_C
        g = tl.log(total) + tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
        best = tl.where((g > best) | (g != g), g, best)
    tl.store(out + rows, best, mask=present)


@lru_cache(maxsize=16)
def _bounds(slices: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """First columns and stops on the device, copied once: every copy waits for the GPU."""
    first, stop = torch.tensor(slices, device=device).T.contiguous()
    return first, stop


@launcher
def launch(logits: Tensor, slices: Sequence[tuple[int, int]]) -> Tensor:
    """The Triton kernel, arguments as for `group_score`. Beside the output: 2 K integers."""
    samples = len(logits)
    out = logits.new_empty(samples)
    if not samples:
        return out
    first, stop = _bounds(tuple(map(tuple, slices)), logits.device)
    block_c = min(BLOCK_C, power_of_two(max(end - start for start, end in slices) - 1))
    block_n = BLOCK // block_c
    _group_score_kernel[(ceil_div(samples, block_n),)](
        logits,
        first,
        stop,
        out,
        samples,
        *logits.stride(),
        GROUPS=len(slices),
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=4 if block_c <= 32 else 1,  # a row stays within a warp, which adds it up without the others
        **OPTIONS,
    )
    return out


def reference(logits: Tensor, slices: Sequence[tuple[int, int]]) -> Tensor:
    """The same in plain torch, on any device and in any dtype; arguments as for `group_score`.

    Memory beside the output, in numbers: 2 CHUNK, or 2 (C + K) if that is more.
    """
    chunks = logits.split(max(1, CHUNK // logits.shape[1]))
    return torch.cat([log_odds(chunk, slices).amax(dim=1) for chunk in chunks])


def group_score(logits: Tensor, slices: Sequence[tuple[int, int]]) -> Tensor:
    """S [N] of samples, higher = more in-distribution; NaN for a sample with a logit that is NaN.

    Parameters
    ----------
    logits : z [N, C + K], of any strides
    slices : first and one past the last column of each group, the first that of its "others"; see `Groups.slices`
    """
    return launch(logits, slices) if runs_on_triton(logits) else reference(logits, slices)


def log_odds(logits: Tensor, slices: Sequence[tuple[int, int]]) -> Tensor:
    """g_k [N, K] of all groups; arguments as for `group_score`."""
    odds = [
        (logits[:, others + 1 : stop] - logits[:, others : others + 1]).logsumexp(dim=1)
        for others, stop in slices
    ]
    return torch.stack(odds, dim=1)
