"""Small images with labels that can be learned."""

import numpy as np
import pytest
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


def assert_interrupted_ends_in_the_same_bytes(run, module, evaluation, folder, monkeypatch):
    """A training `run(directory)` that is stopped in its third call of module.<evaluation> and begun again ends in the
    bytes of an uninterrupted one."""
    whole = run(folder / "whole")
    evaluate_as_before, calls = getattr(module, evaluation), []

    def stop_at_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate_as_before(*arguments)

    monkeypatch.setattr(module, evaluation, stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(folder / "parts")
    parts = run(folder / "parts")
    assert len(calls) == 3 + 8  # two evaluations were kept
    assert parts.equals(whole)
    content = [(folder / name / "weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert content[0] == content[1]
