"""When a kernel runs on Triton, and what the launchers share."""

from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ood_helpers.errors import InputError, nearest

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch brings no Triton to macOS; there only the torch references run
    triton, tl = None, SimpleNamespace(constexpr=None)

PRECISIONS = ("ieee", "tf32")
# Contraction of a * b + c to one rounding: said, as Triton's default changes between versions.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Tile:
    """What one program of a matrix product computes with 4 warps: `samples` x `classes` logits, from `features` features
    at a time, loaded `stages` - 1 steps ahead."""

    samples: int
    classes: int
    features: int
    stages: int


def jit(function):
    """`triton.jit` where there is Triton."""
    return function if triton is None else triton.jit(function)


def runs_on_triton(features: Tensor) -> bool:
    """Whether a kernel takes these: float32 on CUDA, and Triton is there. Everything else goes to the torch reference."""
    return triton is not None and features.is_cuda and features.dtype == torch.float32


def launcher(function):
    """A function whose kernels go to the GPU of its first argument, where Triton takes the current one by itself."""

    @wraps(function)
    def launch(features: Tensor, *arguments, **settings):
        with torch.cuda.device_of(features):
            return function(features, *arguments, **settings)

    return launch


def check_precision(precision: str) -> None:
    """Raise InputError unless `precision` is "ieee" (float32 as it is) or "tf32" (10 bits of mantissa in products)."""
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; {nearest(str(precision), PRECISIONS)}")


def weights_by_feature(weight: Tensor, columns: int, precision: str) -> Tensor:
    """A head's weights [C, D] as [D, columns], zeros behind the last class, laid out for a product of that precision.

    Plain products take weights from shared memory by class, where they have to lie side by side to be read without waiting
    for each other; tensor cores take tf32 by feature.
    """
    by_feature = pad(weight, (0, 0, 0, columns - len(weight))).T
    return by_feature.contiguous() if precision == "ieee" else by_feature


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


# Bounds of loops over `range` are tl.constexpr: Triton 3.6, which comes with PyTorch 2.11, cannot interpret others with
# NumPy 2.4 and later.


@jit
def log_sum_exp(values):
    """Logarithm of the sum of exponentials over the columns of a block, [M, N] -> [M]; -inf where all are -inf.

    NaN and +inf come out as NaN: a maximum alone would lose the NaN.
    """
    largest = tl.max(values, axis=1)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    return tl.log(tl.sum(tl.exp(values - shift[:, None]), axis=1)) + shift
