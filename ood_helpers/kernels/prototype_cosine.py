"""The cosine of each feature and the prototype of its predicted class.

    c_n = (mu_k . f_n) / (max(|mu_k|, e) max(|f_n|, e)),   k = the class of sample n,   e = 1e-8

f [N, D] features, mu [C, D] prototypes. A feature is read once, a prototype where it is needed: no [N, D] copy of them.

Source: the logit smoothing of HIMPLoS, "Head-Informed feature Masking and Prototype-based Logit Smoothing",
arXiv 2310.18104.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ood_helpers.kernels.launch import OPTIONS, jit, launcher, power_of_two, runs_on_triton, tl

CHUNK = 1024  # samples whose prototypes are copied at once
BLOCK_D = 1024
SMALLEST_NORM = 1e-8


@jit
def _prototype_cosine_kernel(
    features,
    prototypes,
    predicted,
    out,
    features_n,
    features_d,
    smallest_norm,
    FEATURE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row."""
    n = tl.program_id(0).to(tl.int64)
    offset = tl.load(predicted + n) * FEATURE_DIM
    product = tl.zeros((BLOCK_D,), tl.float32)
    feature_square = tl.zeros((BLOCK_D,), tl.float32)
    prototype_square = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, FEATURE_DIM, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        inside = d < FEATURE_DIM
        f = tl.load(features + n * features_n + d.to(tl.int64) * features_d, mask=inside, other=0.0)
        mu = tl.load(prototypes + offset + d, mask=inside, other=0.0)
        product += mu * f
        feature_square += f * f
        prototype_square += mu * mu
    feature_norm, prototype_norm = tl.sqrt(tl.sum(feature_square)), tl.sqrt(tl.sum(prototype_square))
    # Comparisons keep a NaN that a maximum would lose.
    feature_norm = tl.where(feature_norm < smallest_norm, smallest_norm, feature_norm)
    prototype_norm = tl.where(prototype_norm < smallest_norm, smallest_norm, prototype_norm)
    tl.store(out + n, tl.sum(product) / prototype_norm / feature_norm)


@launcher
def launch(features: Tensor, prototypes: Tensor, predicted: Tensor) -> Tensor:
    """The Triton kernel, arguments as for `prototype_cosine`. No memory beside the output."""
    n, feature_dim = features.shape
    out = features.new_empty(n)
    block = max(16, min(BLOCK_D, power_of_two(feature_dim)))
    if n:
        _prototype_cosine_kernel[(n,)](
            features,
            prototypes.contiguous(),
            predicted.contiguous(),
            out,
            *features.stride(),
            SMALLEST_NORM,
            FEATURE_DIM=feature_dim,
            BLOCK_D=block,
            num_warps=max(1, block // 512),
            **OPTIONS,
        )
    return out


def reference(features: Tensor, prototypes: Tensor, predicted: Tensor) -> Tensor:
    """The same in plain torch, on any device and in any dtype; arguments as for `prototype_cosine`.

    Memory beside the output, in numbers: C D for the unit prototypes, 2 D CHUNK.
    """
    prototypes = normalize(prototypes, dim=1, eps=SMALLEST_NORM)
    cosines = []
    for f, k in zip(features.split(CHUNK), predicted.split(CHUNK), strict=True):
        norms = f.norm(dim=1).clamp(min=SMALLEST_NORM)
        cosines.append(torch.einsum("nd,nd->n", f, prototypes[k]) / norms)
    return torch.cat(cosines)


def prototype_cosine(features: Tensor, prototypes: Tensor, predicted: Tensor) -> Tensor:
    """c [N] of features [N, D], of any strides, prototypes [C, D] and the predicted classes int64 [N]."""
    return (launch if runs_on_triton(features) else reference)(features, prototypes, predicted)
