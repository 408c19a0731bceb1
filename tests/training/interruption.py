"""A training that is interrupted and begun again, seen from outside: by the validation images that it looks at."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pictures import Pictures


class WatchedPixels:
    """The pixels of pictures; counts the passes through them, and presses Ctrl-C in the one of number `last`."""

    def __init__(self, pixels: np.ndarray, last: int | None = None) -> None:
        self.pixels, self.shape = pixels, pixels.shape
        self.passes, self.last = 0, last

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.passes += int(0 in rows)
        if self.passes == self.last:
            raise KeyboardInterrupt
        return self.pixels[rows]


def assert_interrupted_training_resumes(
    run: Callable[[Path, Pictures], pd.DataFrame], folder: Path, pictures: int = 30
) -> None:
    """`run(directory, validation)` is interrupted after its third epoch, before that is kept; begun again it trains the
    others and ends in the weights and the history of an uninterrupted training."""

    def trained(directory: Path, last: int | None = None) -> tuple[pd.DataFrame, int]:
        validation = Pictures(pictures, 1)
        validation.array = WatchedPixels(validation.pixels, last)
        return run(directory, validation), validation.array.passes

    whole, passes = trained(folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(folder / "parts", last=3)
    parts, passes_of_the_rest = trained(folder / "parts")
    assert passes_of_the_rest == passes - 2
    pd.testing.assert_frame_equal(parts, whole, check_exact=True)
    weights = [(folder / name / "weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
