"""LINe's head: logits, or their energy, through the weights that matter for each sample's predicted class.

    g = min(f, clip)
    k = argmax_c (g W^T + b)
    z_c = b_c + sum over d of g_d M[k, d] W[c, d] [ |A[k, d]| W[c, d] > t_k ]
    S = logsumexp_c z_c

f [N, D] features; W [C, D], b [C] head; |A| [C, D] importance of the features for each class; M [C, D] the features that
each class keeps; t [C] the floors of the products. Samples are grouped by predicted class, and the masked weights of a
class exist only while they are multiplied: there is no [C, C, D] table.

Source: Ahn, Park and Kim, "LINe: Out-of-Distribution Detection by Leveraging Important Neurons", CVPR 2023,
arXiv 2303.13995, section 3.
"""

from math import inf
from typing import Literal

import torch
from torch import Tensor

from ood_helpers.kernels.launch import (
    OPTIONS,
    Tile,
    ceil_div,
    check_precision,
    jit,
    launcher,
    log_sum_exp,
    power_of_two,
    runs_on_triton,
    tl,
    weights_by_feature,
)

CHUNK = 2048  # samples whose features and logits are copied at once
PIECE = 2048  # features whose weights are masked at once
# The fastest on an H200 of those that fit into the shared memory of any recent GPU (99 KiB).
TILES = {
    "ieee": Tile(samples=64, classes=128, features=32, stages=3),
    "tf32": Tile(samples=64, classes=256, features=32, stages=2),
}


@jit
def _line_head_kernel(
    features,
    weight,
    bias,
    importance,
    feature_mask,
    weight_floors,
    order,
    tile_class,
    tile_start,
    tile_stop,
    out,
    num_classes,
    features_n,
    features_d,
    weight_d,
    weight_c,
    out_n,
    clip,
    FEATURE_DIM: tl.constexpr,
    MASKED_FEATURES: tl.constexpr,
    MASKED_WEIGHTS: tl.constexpr,
    ENERGY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile: up to BLOCK_N samples of one predicted class times BLOCK_C of the logits."""
    tile, block = tl.program_id(0), tl.program_id(1)
    k = tl.load(tile_class + tile).to(tl.int64)
    start, stop = tl.load(tile_start + tile), tl.load(tile_stop + tile)
    if start < stop:
        places = start + tl.arange(0, BLOCK_N)
        present = places < stop
        rows = tl.load(order + places, mask=present, other=0)
        classes = block * BLOCK_C + tl.arange(0, BLOCK_C)
        in_head = classes < num_classes
        floor = tl.load(weight_floors + k)
        z = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for first in range(0, FEATURE_DIM, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            inside = d < FEATURE_DIM
            g = tl.load(
                features + rows[:, None] * features_n + d.to(tl.int64)[None, :] * features_d,
                mask=present[:, None] & inside[None, :],
                other=0.0,
            )
            g = tl.where(g > clip, clip, g)
            if MASKED_FEATURES:
                kept = tl.load(feature_mask + k * FEATURE_DIM + d, mask=inside, other=0)
                g *= kept.to(tl.float32)[None, :]  # a product keeps NaN
            w = tl.load(
                weight + d[:, None] * weight_d + classes[None, :] * weight_c, mask=inside[:, None], other=0.0
            )
            if MASKED_WEIGHTS:
                a = tl.load(importance + k * FEATURE_DIM + d, mask=inside, other=0.0)
                w = tl.where(a[:, None] * w > floor, w, 0.0)
            z = tl.dot(g, w, z, input_precision=PRECISION)
        z += tl.load(bias + classes, mask=in_head, other=0.0)[None, :]
        if ENERGY:
            z = tl.where(in_head[None, :], z, float("-inf"))
            tl.store(out + rows * out_n + block, log_sum_exp(z), mask=present)
        else:
            tl.store(
                out + rows[:, None] * out_n + classes[None, :],
                z,
                mask=present[:, None] & in_head[None, :],
            )


@launcher
def launch(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    importance: Tensor | None,
    feature_mask: Tensor | None,
    weight_floors: Tensor | None,
    clip: float | None,
    output: Literal["energy", "logits"],
    precision: str,
) -> Tensor:
    """The Triton kernel, arguments as for `line_head`. Memory beside the output, in numbers: 2 C D for the head, CHUNK
    (D + C) for the prediction, 4 N for the order, N C / 128 or less for partial energies."""
    (n, feature_dim), num_classes = features.shape, len(weight)
    has_masks = feature_mask is not None or weight_floors is not None
    predicted, _ = _predict(features, weight, bias, clip, has_masks)
    tile_size = TILES[precision]
    # A tile holds samples of one class; with about 50 a class a larger one would stay half empty.
    block_n = min(tile_size.samples, max(16, power_of_two(ceil_div(n, num_classes))))
    counts = predicted.new_zeros(num_classes).scatter_add_(0, predicted, torch.ones_like(predicted))
    tiles_until = ((counts + block_n - 1) // block_n).cumsum(0)
    # An upper bound of the number of tiles, so that no count has to come back from the GPU; the rest are empty.
    tile = torch.arange(ceil_div(n, block_n) + min(n, num_classes), device=features.device)
    tile_class = torch.searchsorted(tiles_until, tile, right=True).clamp(max=num_classes - 1)
    first_tile = tiles_until - (counts + block_n - 1) // block_n
    samples_until = counts.cumsum(0)
    tile_start = (samples_until - counts)[tile_class] + (tile - first_tile[tile_class]) * block_n
    tile_stop = torch.minimum(tile_start + block_n, samples_until[tile_class])
    block_c = max(16, min(tile_size.classes, power_of_two(num_classes)))
    blocks = ceil_div(num_classes, block_c)
    by_feature = weights_by_feature(weight, blocks * block_c, precision)
    out = features.new_empty(n, blocks if output == "energy" else num_classes)
    unused = weight  # a pointer that is not read
    if not n:
        return out.sum(dim=1) if output == "energy" else out
    _line_head_kernel[(len(tile), blocks)](
        features,
        by_feature,
        bias.contiguous(),
        unused if importance is None else importance.contiguous(),
        unused if feature_mask is None else feature_mask.contiguous().view(torch.uint8),
        features.new_zeros(num_classes) if weight_floors is None else weight_floors.contiguous(),
        predicted.argsort(stable=True),
        tile_class,
        tile_start,
        tile_stop,
        out,
        num_classes,
        *features.stride(),
        *by_feature.stride(),
        out.stride(0),
        inf if clip is None else float(clip),
        FEATURE_DIM=feature_dim,
        MASKED_FEATURES=feature_mask is not None,
        MASKED_WEIGHTS=weight_floors is not None,
        ENERGY=output == "energy",
        PRECISION=precision,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        BLOCK_D=tile_size.features,
        num_warps=4,
        num_stages=tile_size.stages,
        **OPTIONS,
    )
    return out.logsumexp(dim=1) if output == "energy" else out


def reference(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    importance: Tensor | None,
    feature_mask: Tensor | None,
    weight_floors: Tensor | None,
    clip: float | None,
    output: Literal["energy", "logits"],
) -> Tensor:
    """The same in plain torch, on any device and in any dtype; arguments as for `line_head`.

    One masked matrix product for each class that is predicted, or for each CHUNK of its samples, with up to PIECE features
    at a time. Memory beside the output, in numbers: C D for the head, 2 PIECE C for masked weights, CHUNK (2 D + 2 C) for
    samples, 3 N for their order.
    """
    has_masks = feature_mask is not None or weight_floors is not None
    predicted, zeros = _predict(features, weight, bias, clip, has_masks)
    order = predicted.argsort(stable=True)
    by_feature = weight.T.contiguous()
    taken, masked = by_feature.new_empty(2, min(PIECE, len(by_feature)), len(weight))
    out = features.new_empty(len(features) if output == "energy" else (len(features), len(weight)))
    start = 0
    for k, count in enumerate(predicted.bincount().tolist()):
        if not count:
            continue
        kept = None if feature_mask is None else feature_mask[k].nonzero().flatten()
        # Where most are kept, a copy of their weights does not pay.
        few = kept is not None and 2 * len(kept) < len(by_feature)
        if weight_floors is not None:
            of_class = importance[k, kept] if few else importance[k]
        for rows in order[start : start + count].split(CHUNK):
            g = _clipped(features[rows[:, None], kept] if few else features[rows], clip)
            if kept is not None and not few:
                g = g * feature_mask[k]
            z = bias + zeros[rows, None]
            for first in range(0, g.shape[1], PIECE):
                piece = slice(first, first + PIECE)
                part = g[:, piece]
                w = by_feature[piece]
                if few:
                    w = torch.index_select(by_feature, 0, kept[piece], out=taken[: part.shape[1]])
                if weight_floors is not None:
                    # In the weights' dtype: comparing into booleans and multiplying by them takes three times as long.
                    keep = torch.mul(w, of_class[piece, None], out=masked[: len(w)])
                    w = keep.gt_(weight_floors[k]).mul_(w)
                z.addmm_(part, w)
            out[rows] = z.logsumexp(dim=1) if output == "energy" else z
        start += count
    return out


def line_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    importance: Tensor | None = None,
    feature_mask: Tensor | None = None,
    weight_floors: Tensor | None = None,
    clip: float | None = None,
    *,
    output: Literal["energy", "logits"] = "energy",
    precision: str = "ieee",
) -> Tensor:
    """S [N], or z [N, C], of samples through the head as masked for the class that each is predicted as.

    Parameters
    ----------
    features : f [N, D], of any strides, not yet clipped
    weight, bias : W [C, D], b [C]
    importance : |A| [C, D], at least 0; needed with weight_floors
    feature_mask : M bool [C, D], row k for samples predicted as k; None = keep every feature
    weight_floors : t [C]; None = keep every weight
    clip : above 0; None = no clipping
    output : "energy" or "logits"
    precision : of the masked product in Triton, "ieee" or "tf32"; the class is predicted as PyTorch multiplies float32,
        in full unless it has been told otherwise

    Raises
    ------
    InputError : unknown precision
    """
    check_precision(precision)
    arguments = features, weight, bias, importance, feature_mask, weight_floors, clip, output
    return launch(*arguments, precision) if runs_on_triton(features) else reference(*arguments)


def _clipped(features: Tensor, clip: float | None) -> Tensor:
    return features if clip is None else features.clamp(max=clip)


def _predict(
    features: Tensor, weight: Tensor, bias: Tensor, clip: float | None, has_masks: bool
) -> tuple[Tensor, Tensor]:
    """k [N] int64, the class with the largest logit of the clipped features through the whole head; and 0 per sample, but
    NaN for one with NaN in any feature, kept or not. Without masks the class is irrelevant, and all are 0."""
    if not has_masks:
        zeros = features.new_zeros(len(features))
        return zeros.long(), zeros
    predicted = torch.empty(len(features), dtype=torch.int64, device=features.device)
    zeros = features.new_empty(len(features))
    for chunk, classes, nothing in zip(
        features.split(CHUNK), predicted.split(CHUNK), zeros.split(CHUNK), strict=True
    ):
        logits = torch.addmm(bias, _clipped(chunk, clip), weight.T)
        torch.argmax(logits, dim=1, out=classes)
        torch.mul(logits[:, 0], 0, out=nothing)
    return predicted, zeros
