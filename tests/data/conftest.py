"""Small image files on disk for the tests of the data part."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder for fingerprints and unpacked arrays."""
    return tmp_path / "cache"


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Two classes of PNG files, 3 x "ape" and 2 x "bee", each image of another colour."""
    generator = np.random.default_rng(0)
    for name in ("bee/1.png", "bee/0.png", "ape/b.png", "ape/a.png", "ape/deep/c.PNG"):
        path = tmp_path / "animals" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(path)
    return tmp_path / "animals"
