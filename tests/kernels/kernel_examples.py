"""What the tests of kernels share: the device they run on, inputs, and the comparison.

Without a GPU Triton's kernels run on the CPU through its interpreter (TRITON_INTERPRET, set in tests/conftest.py); with one
they are compiled. Launchers are called directly, as the public functions take CPU tensors to the torch reference.
"""

import secrets

import pytest
import torch
from torch import Tensor

from ood_helpers.kernels.launch import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(triton is None, reason="PyTorch has no Triton on this system")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# samples, classes, features: one sample, the DenseNet's odd width, fewer and more than a block of each
SHAPES = [(1, 7, 342), (70, 7, 342), (5, 10, 33), (33, 130, 40), (40, 3, 1)]


@pytest.fixture
def fresh_seed() -> int:
    """Another one in each run; pytest shows it with a test that fails."""
    seed = secrets.randbelow(2**31)
    print(f"fresh seed: {seed}")
    return seed


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float32 on the device, of 8 significant bits: products of two of them are exact in float32."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().float().to(DEVICE)


def relu_features(samples: int, feature_dim: int, seed: int = 1) -> Tensor:
    """Features as behind a ReLU, about half of them 0."""
    return random(samples, feature_dim, seed=seed).clamp(min=0)


def strided(tensor: Tensor) -> Tensor:
    """The same matrix, neither its rows nor its columns contiguous."""
    wide = tensor.new_full((2 * tensor.shape[1], 3 * tensor.shape[0]), float("nan"))
    view = wide[::2, ::3].T
    view.copy_(tensor)
    assert not view.is_contiguous() or view.numel() < 2
    return view


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Equal up to float32 rounding, of the same shape, in float32; NaN is equal to nothing."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), expected.double().to(found.device), rtol=tolerance, atol=tolerance
    )
