"""A tiny network and images, of which the tests of maps and masks are made."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ood_helpers.backbones import Classifier
from ood_helpers.data import ImageSet, Transform
from ood_helpers.dfb.pseudo_masks import PseudoMasks

TRANSFORM = Transform(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
SCALES = (1.0, 0.5, 1.5, 2.0)


class Tiny(Classifier):
    """A convolution, pooling and a head; notes the shapes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, padding=1, stride=2)
        self.head = nn.Linear(5, 3)
        self.shapes = []

    def feature_map(self, images: Tensor) -> Tensor:
        self.shapes.append((len(images), *images.shape[2:]))
        return self.convolution(images).relu()


def tiny_network() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


def image_set(count: int = 21, seed: int = 0, labels: bool = True) -> ImageSet:
    """Random images of 8 x 6 pixels."""
    generator = np.random.default_rng(seed)
    array = generator.integers(0, 256, (count, 8, 6, 3), dtype=np.uint8)
    return ImageSet(
        "made", "made by the test", array=array, labels=generator.integers(0, 3, count) if labels else None
    )


def inputs_of(images: ImageSet) -> Tensor:
    """The images as the network takes them."""
    return TRANSFORM.normalise(torch.from_numpy(images.array).permute(0, 3, 1, 2))


def masks_of(foreground: Tensor, classes: Sequence[int]) -> PseudoMasks:
    """Masks of given pixels, bool [N, H, W]."""
    packed = torch.from_numpy(np.packbits(foreground.flatten(1).numpy(), axis=1))
    return PseudoMasks(packed, torch.as_tensor(classes), tuple(foreground.shape[1:]))


class OwnPixels(Classifier):
    """A network whose feature map is its input."""

    blocks = ()

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.head = head

    def feature_map(self, images: Tensor) -> Tensor:
        return images


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    """A layer in float64 that is not trained."""
    weight = torch.tensor(weight, dtype=torch.float64)
    head = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return head.requires_grad_(False)
