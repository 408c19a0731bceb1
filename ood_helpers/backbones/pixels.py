"""A network as a differentiable function of pixels, and steps along its gradient."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ood_helpers.backbones.base import Classifier
from ood_helpers.backbones.taps import tapped


class PixelNetwork:
    """A classifier as a differentiable function of pixels in [0, 1], for methods that need its input gradient.

    The normalisation (x - mean) / std is part of the function, so a step of a given size in pixels is the same
    step whatever the normalisation. The network is set to evaluation mode and its parameters are frozen, as no
    method needs their gradients.

    Parameters
    ----------
    network : the classifier, moved to `device`
    mean, std : of the normalisation, three numbers each
    """

    def __init__(
        self,
        network: Classifier,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        channels = torch.tensor([mean, std], dtype=torch.float32, device=device)
        self.mean, self.std = channels[:, :, None, None]
        self._tap_calls: dict[frozenset[str], Counter] = {}

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits [B, C] of pixels [B, 3, H, W] in [0, 1]."""
        return self.network(self._inputs(pixels))

    def pooled(self, pixels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Spatial means [B, D_l] of modules' outputs; the name `features` is the penultimate layer.

        The pass ends at the last module that is needed, so an early layer costs a fraction of a pass.

        Raises
        ------
        InputError : no such module
        """
        modules = frozenset(names) - {"features"}
        # A module may run several times in a pass and its last output counts, as in a bank: the first pass goes
        # to its end and counts them.
        last, calls = self._tap_calls.get(modules), Counter()

        def kept(name: str) -> None:
            calls[name] += 1
            if calls == last and "features" not in names:
                raise _LastTap

        with tapped(self.network, tuple(modules), kept) as values:
            try:
                features = self.network.features(self._inputs(pixels))
                values["features"] = features
                self.network.head(features)
                self._tap_calls[modules] = calls
            except _LastTap:
                pass
        return {name: values[name] for name in names}

    def _inputs(self, pixels: Tensor) -> Tensor:
        inputs = (pixels - self.mean) / self.std
        return inputs.contiguous(memory_format=torch.channels_last)


class _LastTap(Exception):
    """Ends a forward pass when the last module that is needed has run."""


def input_gradient(function: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Gradient [B, 3, H, W] of a function of pixels, [B, 3, H, W] -> [B], each value of which depends on its image only."""
    with torch.enable_grad():
        pixels = pixels.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(pixels).sum(), pixels)
    return gradient


def step_by_sign(pixels: Tensor, gradient: Tensor, step: float) -> Tensor:
    """x + step * sign(gradient), with sign(0) = +1; not clipped."""
    return torch.where(gradient >= 0, pixels + step, pixels - step)


def fgsm(pixels: Tensor, gradient: Tensor, step: float) -> Tensor:
    """min(max(x + step * sign(gradient), 0), 1), with sign(0) = +1 (Goodfellow et al., 2015, arXiv 1412.6572)."""
    return step_by_sign(pixels, gradient, step).clamp(0, 1)
