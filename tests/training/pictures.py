"""Small images with labels that can be learned."""

import numpy as np
from PIL import Image

from ood_helpers.data import Transform

TRANSFORM = Transform(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


class Pictures:
    """What training uses of an ImageSet: three classes, told apart by the channel that is bright."""

    name = "pictures"

    def __init__(self, count: int, seed: int, decoded: bool = False):
        rng = np.random.default_rng(seed)
        self.labels = np.arange(count) % 3
        self.pixels = rng.integers(0, 120, (count, 8, 8, 3), dtype=np.uint8)
        self.pixels[np.arange(count), :, :, self.labels] += 100
        self.array = None if decoded else self.pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i])
