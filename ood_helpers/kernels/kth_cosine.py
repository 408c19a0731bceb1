"""KNN: the k-th largest cosine of a feature with the training features, exact.

    cos(q, f) = q . f / (max(||q||, e) max(||f||, e)),  e = 1e-12
    c_k = the k-th largest of cos(q, f) over all f

The largest cosines of every query are kept while the training features pass block by block; no table [N, N_train] is made.

There is no Triton kernel: distances near 0 need float64, and libraries sort well. The product alone takes more than half of
the time on two CPU cores, on an H200 a third in float32 and a quarter in float64 (benchmarks/bench_kernels.py). There
torch.topk over all training features at once takes less than half of the time, and N N_train numbers of memory.

Source: Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022, arXiv 2204.06507.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ood_helpers.kernels.selection import largest

CHUNK = 512  # queries compared at once with a block; 16 times as many on CUDA, where one call has to fill the device
BLOCK = 2048  # training features in a block: 8 MB of cosines, which the caches hold


def kth_cosine(
    queries: Tensor, train: Iterable[Tensor], ks: Sequence[int], *, chunk: int = CHUNK, block: int = BLOCK
) -> Tensor:
    """The k-th largest cosine of each query with the training features, for each k: [N, len(ks)].

    In the dtype and on the device of the queries, whose rows may be of any length. All products of one pass serve all k.
    Memory beside the output, in numbers, with K the largest k: 4 N K for what is kept and its order, block D for training
    features, chunk (block + 4 K) for cosines, 16 times that on CUDA.

    Parameters
    ----------
    queries : [N, D]
    train : pieces [B, D] of the training features, read once, in any dtype and on any device
    ks : from 1 to the number of training features; beyond it the result is -inf

    A feature of zeros has the cosine 0 with all others. A query with NaN gives NaN; a training feature with NaN gives NaN
    for all queries.
    """
    deepest = max(ks)
    rows = min(chunk * (16 if queries.is_cuda else 1), max(1, len(queries)))
    # Two buffers for all blocks: fresh memory for each takes longer than the product itself.
    directions = queries.new_empty(block, queries.shape[1])
    cosines = queries.new_empty(rows * block)
    found = queries.new_full((len(queries), deepest), -torch.inf)
    for piece in train:
        for features in piece.split(block):
            unit = directions[: len(features)].copy_(features)
            unit /= _lengths(unit)
            for some, kept in zip(queries.split(rows), found.split(rows), strict=True):
                # The lengths of the queries do not change their order and come last.
                tile = torch.mm(some, unit.T, out=cosines[: len(some) * len(unit)].view(len(some), len(unit)))
                kept.copy_(largest(torch.cat([kept, largest(tile, deepest)], dim=1), deepest))
    found = found.sort(dim=1, descending=True).values
    # NaN counts as the largest of all, so that it is in the first column; it spoils the others, too.
    found = torch.where(found[:, :1].isnan(), torch.nan, found)
    return found[:, [k - 1 for k in ks]] / _lengths(queries)


def _lengths(features: Tensor) -> Tensor:
    return torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp(min=1e-12)
