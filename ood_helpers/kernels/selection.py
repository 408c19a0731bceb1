"""The k largest of each row, for the torch references of KNN and of the largest entries."""

import torch
from torch import Tensor

# NumPy's partition has one thread, but takes a fifth of the time of torch.topk on one (with AVX-512, k = 50 to 500).
THREADS_OF_TOPK = 6


def largest(tile: Tensor, k: int) -> Tensor:
    """The k largest of each row [N, k], or all; NaN counts as the largest. May reorder the tile [N, D]. Their order, and
    with it the last bits of their sum, depends on the number of threads."""
    width = tile.shape[1]
    if k >= width:
        return tile
    partitions = tile.device.type == "cpu" and tile.dtype in (torch.float32, torch.float64)
    if not partitions or torch.get_num_threads() >= THREADS_OF_TOPK:
        return tile.topk(k, dim=1, sorted=False).values
    tile.numpy().partition(width - k, axis=1)
    return tile[:, width - k :]
