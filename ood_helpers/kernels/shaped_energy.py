"""Energy of the head on shaped features, for methods that clip, mask, prune or scale them.

    g = min(f, clip) * M[k, :]
    g_d = 0 where d is none of the largest entries;  1 where it is one, if binary
    z_c = scale * (gain * sum over d of g_d W[c, d] + b_c)
    S = T logsumexp_c(z_c / T)

f [N, D] features; W [C, D], b [C] head; M [C, D] the features that each class keeps, k [N] the classes of the samples;
gain, scale [N]; T the temperature. Every step but the last two is optional. Features are shaped while they are read, and of
the logits only the sum of exponentials of each block of classes is written: there are no shaped features [N, D] and no
logits [N, C].

Sources: Sun, Guo and Li, "ReAct: Out-of-distribution Detection With Rectified Activations", NeurIPS 2021, arXiv 2111.12797;
Djurisic et al. (ASH), ICLR 2023, arXiv 2209.09858; Xu et al. (SCALE), ICLR 2024, arXiv 2310.00227; HIMPLoS,
arXiv 2310.18104.
"""

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from ood_helpers.kernels.largest_entries import LargestEntries
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

CHUNK = 2048  # samples whose shaped features and logits are copied at once
# The fastest on an H200 of those that fit into the shared memory of any recent GPU (99 KiB).
TILES = {
    "ieee": Tile(samples=64, classes=128, features=16, stages=4),
    "tf32": Tile(samples=64, classes=256, features=32, stages=2),
}


@dataclass(frozen=True)
class Shaping:
    """What happens to features before the head and to logits after it; every step is optional.

    clip : above 0
    class_mask : M bool [C, D], row k for samples predicted as k
    predicted : k int64 [N]; needed with class_mask
    largest : the entries that are kept, of g as clipped and masked
    binary : whether each of them becomes 1; only with `largest`
    gain : factor [N] of the shaped features
    scale : factor [N] of the logits
    temperature : T, above 0
    """

    clip: float | None = None
    class_mask: Tensor | None = None
    predicted: Tensor | None = None
    largest: LargestEntries | None = None
    binary: bool = False
    gain: Tensor | None = None
    scale: Tensor | None = None
    temperature: float = 1.0


@jit
def _shaped_energy_kernel(
    features,
    weight,
    bias,
    class_mask,
    predicted,
    threshold,
    last,
    gain,
    scale,
    out,
    num_samples,
    num_classes,
    features_n,
    features_d,
    weight_d,
    weight_c,
    blocks,
    clip,
    temperature,
    FEATURE_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    PRUNED: tl.constexpr,
    BINARY: tl.constexpr,
    GAIN: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile: BLOCK_N samples times BLOCK_C logits. Neighbouring programs share the samples, and all the head."""
    program = tl.program_id(0)
    block = program % blocks
    n = (program // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = n < num_samples
    classes = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_head = classes < num_classes
    if MASKED:
        mask_offset = tl.load(predicted + n, mask=present, other=0) * FEATURE_DIM
    if PRUNED:
        smallest = tl.load(threshold + n, mask=present, other=0.0)
        end = tl.load(last + n, mask=present, other=0).to(tl.int32)
    z = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first in range(0, FEATURE_DIM, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        inside = d < FEATURE_DIM
        both = present[:, None] & inside[None, :]
        places = n[:, None] * features_n + d.to(tl.int64)[None, :] * features_d
        g = tl.load(features + places, mask=both, other=0.0)
        g = tl.where(g > clip, clip, g)
        if MASKED:
            kept = tl.load(class_mask + mask_offset[:, None] + d[None, :], mask=both, other=0)
            g *= kept.to(tl.float32)  # a product keeps NaN
        if PRUNED:
            dropped = (g < smallest[:, None]) | ((g == smallest[:, None]) & (d[None, :] > end[:, None]))
            if BINARY:
                g = tl.where(g == g, 1.0, g)
            g = tl.where(dropped, 0.0, g)
        w = tl.load(
            weight + d[:, None] * weight_d + classes[None, :] * weight_c, mask=inside[:, None], other=0.0
        )
        z = tl.dot(g, w, z, input_precision=PRECISION)
    if GAIN:
        z *= tl.load(gain + n, mask=present, other=0.0)[:, None]
    z += tl.load(bias + classes, mask=in_head, other=0.0)[None, :]
    if SCALE:
        z *= tl.load(scale + n, mask=present, other=0.0)[:, None]
    z = tl.where(in_head[None, :], z / temperature, float("-inf"))
    tl.store(out + n * blocks + block, log_sum_exp(z), mask=present)


@launcher
def launch(
    features: Tensor, weight: Tensor, bias: Tensor, shaping: Shaping, precision: str = "ieee"
) -> Tensor:
    """The Triton kernel, arguments as for `shaped_energy`. Memory beside the output, in numbers: 2 C D
    for the head, N C / 128 or less for partial energies."""
    (n, feature_dim), num_classes = features.shape, len(weight)
    tile = TILES[precision]
    block_n = max(16, min(tile.samples, power_of_two(n)))
    # Features that end within a block need registers for masks, which a wide tile does not have.
    widest = tile.classes if feature_dim % tile.features == 0 else 128
    block_c = max(16, min(widest, power_of_two(num_classes)))
    blocks = ceil_div(num_classes, block_c)
    out = features.new_empty(n, blocks)
    by_feature = weights_by_feature(weight, blocks * block_c, precision)

    mask, largest = shaping.class_mask, shaping.largest

    def pointer(values: Tensor | None) -> Tensor:
        return bias if values is None else values.contiguous()  # bias: not read there

    if n:
        _shaped_energy_kernel[(ceil_div(n, block_n) * blocks,)](
            features,
            by_feature,
            bias.contiguous(),
            pointer(mask if mask is None else mask.contiguous().view(torch.uint8)),
            pointer(shaping.predicted),
            pointer(largest and largest.threshold),
            pointer(largest and largest.last),
            pointer(shaping.gain),
            pointer(shaping.scale),
            out,
            n,
            num_classes,
            *features.stride(),
            *by_feature.stride(),
            blocks,
            inf if shaping.clip is None else float(shaping.clip),
            float(shaping.temperature),
            FEATURE_DIM=feature_dim,
            MASKED=mask is not None,
            PRUNED=largest is not None,
            BINARY=shaping.binary,
            GAIN=shaping.gain is not None,
            SCALE=shaping.scale is not None,
            PRECISION=precision,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            BLOCK_D=tile.features,
            num_warps=4,
            num_stages=tile.stages,
            **OPTIONS,
        )
    return shaping.temperature * out.logsumexp(dim=1)


def reference(features: Tensor, weight: Tensor, bias: Tensor, shaping: Shaping) -> Tensor:
    """The same in plain torch, on any device and in any dtype; arguments as for `shaped_energy`.

    Memory beside the output, in numbers: (3 D + 2 C) CHUNK.
    """
    out, temperature = features.new_empty(len(features)), shaping.temperature
    parts = [None] * max(1, ceil_div(len(features), CHUNK))

    def split(values):
        return parts if values is None else values.split(CHUNK)

    per_sample = (features, shaping.predicted, shaping.largest, shaping.gain, shaping.scale, out)
    for f, k, entries, gain, scale, energies in zip(*map(split, per_sample), strict=True):
        g = shaped_features(f, replace(shaping, predicted=k, largest=entries))
        z = torch.addmm(bias, g, weight.T) if gain is None else (g @ weight.T).mul_(gain[:, None]).add_(bias)
        if scale is not None:
            z *= scale[:, None]
        energies.copy_((z if temperature == 1 else z / temperature).logsumexp(dim=1))
    return out.mul_(temperature)


def shaped_energy(
    features: Tensor, weight: Tensor, bias: Tensor, shaping: Shaping = Shaping(), *, precision: str = "ieee"
) -> Tensor:
    """S [N] of samples through the head, their features shaped before it and their logits scaled after it.

    Parameters
    ----------
    features : f [N, D], of any strides
    weight, bias : W [C, D], b [C]
    precision : of the product in Triton, "ieee" or "tf32"

    Raises
    ------
    InputError : unknown precision
    """
    check_precision(precision)
    if runs_on_triton(features):
        return launch(features, weight, bias, shaping, precision)
    return reference(features, weight, bias, shaping)


def shaped_features(features: Tensor, shaping: Shaping) -> Tensor:
    """g [N, D], the features [N, D] as `shaped_energy` takes them to the head, without the gain."""
    g = features if shaping.clip is None else features.clamp(max=shaping.clip)
    if shaping.class_mask is not None:
        g = g * shaping.class_mask[shaping.predicted]
    if shaping.largest is not None:
        # Masks in the features' dtype: choosing by booleans takes several times as long. NaN stays: it times 0 is NaN.
        keep = torch.ge(g, shaping.largest.threshold[:, None], out=torch.empty_like(g))
        tied = keep.sum(dim=1) > shaping.largest.count
        if tied.any():
            keep[tied] = shaping.largest.of(tied).mask(g[tied]).to(g)
        g = keep.add_(0 * g.sum(dim=1, keepdim=True)) if shaping.binary else keep.mul_(g)
    return g
