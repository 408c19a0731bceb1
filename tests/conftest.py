"""What the tests share: the place of the real data."""

import os
from pathlib import Path

import pytest

from ood_helpers.config import PROJECT_ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the project: real CIFAR-10, OOD sets and the DenseNet-101 checkpoint."""
    folder = PROJECT_ROOT.parent / "shared"
    if not (folder / "data" / "cifar10" / "test.npz").exists():
        message = "no real data: expected the folder shared/ beside the project"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder
