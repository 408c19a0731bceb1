"""What the tests share: the processor, where several processes run them, Triton without a GPU, and the place of the real data."""

import os
from pathlib import Path

import pytest

from ood_helpers.config import PROJECT_ROOT  # does not import torch

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1:  # before torch is imported, and for the processes that tests start
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))

import torch  # noqa: E402 - reads OMP_NUM_THREADS

if (
    not torch.cuda.is_available()
):  # Triton's kernels run in its interpreter, which is chosen when they are imported
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the project: real CIFAR-10, OOD sets and the DenseNet-101 checkpoint."""
    folder = (PROJECT_ROOT.parent / "shared").resolve()  # as run_all.py passes folders on
    if not (folder / "data" / "cifar10" / "test.npz").exists():
        message = "no real data: expected the folder shared/ beside the project"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a small experiment with its results, and these. Processes that run tests side by side share it."""
    from small_experiments import small

    from ood_helpers import studies

    folder = tmp_path_factory.getbasetemp()
    if workers > 1:
        folder = folder.parent
    run = small(folder / "small")
    studies.collect_results(run)
    return folder / "small", run.results()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no process waits for them at the end."""
    items.sort(key=lambda item: "notebooks" not in item.path.parts)
