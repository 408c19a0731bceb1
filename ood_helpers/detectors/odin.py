"""ODIN: softmax at a high temperature of an image moved one step towards its predicted class."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import one_hot

from ood_helpers.backbones.pixels import input_gradient, step_by_sign
from ood_helpers.banks import FeatureBank, with_images
from ood_helpers.detectors.base import DETECTORS, Detector


@DETECTORS.register("odin")
@dataclass
class ODIN(Detector):
    """Score S = max_c softmax(z(x') / T)_c, in [1 / C, 1].

    x' = x - noise * sign(grad_x CE(softmax(z(x) / T), argmax_c z_c(x))), with sign(0) = +1; x' is not clipped.

    Hyper-parameters
    ----------------
    temperature : T, above 0
    noise : in [0, 1], in pixels of [0, 1] whatever the normalisation, so that a value means the same for every
        network; 0.0014 for CIFAR-10, 0.002 for CIFAR-100, 0.005 for ImageNet. 0 scores the logits of the bank,
        anything else the images, at the cost of three passes (forward, backward, forward)

    Code that divides the sign by the std of the normalisation (DICE, CADRef) takes the same step; code that does
    not, as that of MOS, steps by noise * std.
    """

    temperature: float = 1000.0
    noise: float = 0.0014

    title: ClassVar[str] = "ODIN"
    source: ClassVar[str] = "Liang, Li and Srikant, ICLR 2018, arXiv 1706.02690"

    def _check(self) -> None:
        self._check_number("temperature", 0, inf, open_low=True)
        self._check_number("noise", 0, 1)

    @property
    def needs_images(self) -> bool:
        return self.noise > 0

    @property
    def extra_passes(self) -> int:
        return 3 if self.noise > 0 else 0

    def _score(self, shard: FeatureBank) -> Tensor:
        if self.noise == 0:
            return odin_score(shard.logits, self.temperature)
        shard = with_images(shard, self.title, "give one, or set noise to 0")

        def margin(pixels: Tensor) -> Tensor:
            logits = shard.network.logits(pixels)
            return error_margin(logits, logits.argmax(dim=1), self.temperature)

        def score(pixels: Tensor) -> Tensor:
            moved = step_by_sign(pixels, input_gradient(margin, pixels), -self.noise)
            return odin_score(shard.network.logits(moved), self.temperature)

        return self._over_images(shard, score)


def odin_score(logits: Tensor, temperature: float) -> Tensor:
    """S = max_c softmax(z / T)_c of logits [N, C] -> [N] float64: at T = 1000 float32 has many ties."""
    return (logits.double() / temperature).softmax(dim=1).amax(dim=1)


def error_margin(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """L = logsumexp over the other classes of z_c / T, minus z_y / T, of logits [N, C], labels y [N] -> [N] float64.

    CE(softmax(z / T), y) = log(1 + exp(L)) rises with L, so the gradients of both have the same signs; but
    that of L neither vanishes for a confident network nor shrinks with 1 / C, whatever the temperature.
    """
    scaled = logits.double() / temperature
    others = scaled.masked_fill(one_hot(labels, logits.shape[1]).bool(), -inf).logsumexp(dim=1)
    return others - scaled.gather(1, labels[:, None]).squeeze(1)
