"""Masks over the weights of a network: random ones, which Unleashing Mask estimates its loss constraint with, and learned
ones, which UMAP trains in place of the weights.

Every convolution and linear layer has a mask the shape of its weight; batch norm and biases have none. A layer with n
weights and keep rate k drops j = (1 - k) n of them, those of the j smallest |scores|.

Source: Zhu et al., "Unleashing Mask: Explore the Intrinsic Out-of-Distribution Detection Capability", ICML 2023, arXiv
2306.03715; learning scores by a straight-through gradient is Ramanujan et al., CVPR 2020, arXiv 1911.13299.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ood_helpers.errors import InputError

BATCH_NORM_BEFORE = "_before_masks_"  # starts the names of statistics that detach_masks brings back


def number_dropped(count: int, keep_rate: float, rounding: str = "nearest") -> int:
    """j = (1 - k) n, the number of a layer's n weights that a mask of keep rate k drops.

    Parameters
    ----------
    rounding : `nearest` of the exact decimal product, halves to the even number; `truncated` after computing in double
        precision, as the public code: k = 0.8 drops 1 of 10 weights there, 2 here

    Raises
    ------
    InputError : keep_rate outside (0, 1]
    """
    if not 0 < keep_rate <= 1:
        raise InputError(
            f"Found keep_rate {keep_rate}, expected a share above 0 and at most 1 of the weights to keep; correct it."
        )
    if rounding == "truncated":
        return int((1 - keep_rate) * count)
    return round((1 - Fraction(repr(float(keep_rate)))) * count)


def keep_largest(scores: Tensor, dropped: int) -> Tensor:
    """The mask of scores of any shape: 0 for the `dropped` smallest |s|, of equal ones the first, and 1 for all others."""
    order = scores.detach().abs().flatten().argsort(stable=True)
    mask = torch.ones_like(order, dtype=scores.dtype)
    mask.index_fill_(0, order[:dropped], 0)  # an assignment would copy the 0 to a GPU, and wait for it
    return mask.view(scores.shape)


class ScoreMask(nn.Module):
    """A parametrization that multiplies a weight w by the mask m of learned scores s of its shape.

    The straight-through gradient is that of m = |s|, for kept and dropped weights alike:
    dL/ds = (dL/dw_eff w) sign(s) and, where the weight is trained, too, dL/dw = dL/dw_eff m, with w_eff = w m.
    """

    def __init__(self, scores: Tensor, dropped: int) -> None:
        super().__init__()
        self.scores, self.dropped = nn.Parameter(scores), dropped
        self._mask: tuple[tuple, Tensor] | None = None

    def mask(self) -> Tensor:
        """m, computed again only when the scores have changed."""
        state = self.scores._version, self.scores.device, self.scores.data_ptr()
        if self._mask is None or self._mask[0] != state:
            self._mask = state, keep_largest(self.scores, self.dropped)
        return self._mask[1]

    def forward(self, weight: Tensor) -> Tensor:
        sizes = self.scores.abs()
        return weight * (self.mask() + (sizes - sizes.detach()))  # the mask, with the gradient of |s|


def attach_masks(
    network: nn.Module,
    keep_rate: float,
    generator: torch.Generator,
    *,
    initial_scores: str = "random",
    rounding: str = "nearest",
) -> None:
    """Put a ScoreMask over the weight of every convolution and linear layer, and remember the statistics of batch norm.

    Parameters
    ----------
    initial_scores : `random` = uniform in +-1 / sqrt(fan_in), so that the training begins with random weights dropped, as in
        the paper; `magnitude` = the weights, whose smallest are dropped first
    rounding : see number_dropped

    Raises
    ------
    InputError : keep_rate outside (0, 1], or the network has masks already
    """
    if masks_of(network):
        raise InputError("The network has masks already, expected none; detach them first.")
    for module in _masked_layers(network):
        weight = module.weight
        scores = weight.detach().clone()
        if initial_scores == "random":
            bound = 1 / math.sqrt(weight[0].numel())
            scores.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * bound)
        mask = ScoreMask(scores, number_dropped(weight.numel(), keep_rate, rounding))
        parametrize.register_parametrization(module, "weight", mask)
    for module in _batch_norms(network):
        for name, statistic in _statistics(module).items():
            module.register_buffer(BATCH_NORM_BEFORE + name, statistic.clone())


def freeze_weights(network: nn.Module) -> None:
    """Leave only the scores of the masks to be trained; statistics of batch norm move all the same in train mode."""
    network.requires_grad_(False)
    for mask in masks_of(network).values():
        mask.scores.requires_grad_(True)


def masks_of(network: nn.Module) -> dict[str, ScoreMask]:
    """Name of a layer -> its mask, in the order of the network; empty for a network without masks."""
    return {
        name: module.parametrizations.weight[0]
        for name, module in network.named_modules()
        if parametrize.is_parametrized(module, "weight")
    }


def apply_masks(network: nn.Module) -> None:
    """Multiply the weights by their masks for good: the same outputs from a network without parametrizations.

    Not for copies made by copy.deepcopy: torch lets them share the class that it takes the masked weight from.
    """
    _remove_masks(network, keep_masked=True)


def detach_masks(network: nn.Module) -> None:
    """Take the masks off, and bring the statistics of batch norm back that they replaced.

    Where the weights were frozen this is the network before `attach_masks`, bit for bit.
    """
    _remove_masks(network, keep_masked=False)


def _remove_masks(network: nn.Module, keep_masked: bool) -> None:
    for name in masks_of(network):
        parametrize.remove_parametrizations(
            network.get_submodule(name), "weight", leave_parametrized=keep_masked
        )
    for module in _batch_norms(network):
        for name, statistic in _statistics(module).items():
            before = getattr(module, BATCH_NORM_BEFORE + name, None)
            if before is not None:
                if not keep_masked:
                    statistic.copy_(before)
                delattr(module, BATCH_NORM_BEFORE + name)


@contextmanager
def random_masks(
    network: nn.Module, keep_rate: float, generator: torch.Generator, rounding: str = "nearest"
) -> Iterator[None]:
    """Within the context a random subset of each layer's weights is zero; afterwards they are what they were.

    Any subset of the right size is equally likely, as with the mask of random scores.

    Raises
    ------
    InputError : keep_rate outside (0, 1]
    """
    layers = _masked_layers(network)
    weights = [module.weight.detach().clone() for module in layers]
    try:
        with torch.no_grad():
            for module in layers:
                scores = torch.rand(module.weight.shape, generator=generator)
                mask = keep_largest(scores, number_dropped(scores.numel(), keep_rate, rounding))
                module.weight.mul_(mask.to(module.weight))
        yield
    finally:
        with torch.no_grad():
            for module, weight in zip(layers, weights):
                module.weight.copy_(weight)


def _masked_layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def _batch_norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if not name.startswith(BATCH_NORM_BEFORE)
    }
