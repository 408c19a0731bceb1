"""The device, and by which arithmetic a network runs on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ood_helpers.backbones.base import Classifier
from ood_helpers.errors import InputError


def resolve_device(device: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; any other name is taken as it is."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(" at start of device string")[0][:120]
        raise InputError(f"Device {device!r} cannot be used ({reason}); give auto, cpu or cuda.") from None
    return chosen


@contextmanager
def float32_products(precision: str = "float32") -> Iterator[None]:
    """How CUDA multiplies float32 meanwhile: "tf32", or anything else for full float32.

    By default PyTorch rounds the inputs of convolutions to 10 bits of mantissa there.
    """
    settings = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting in settings:
            setting.allow_tf32 = precision == "tf32"
        yield
    finally:
        for setting, value in zip(settings, before):
            setting.allow_tf32 = value


def network_in(
    network: Classifier, precision: str, compile: bool, device: torch.device, batch_size: int
) -> Callable[[Tensor], Tensor]:
    """Gives the features of a batch, float32, at a precision, compiled if asked for."""
    compiled = torch.compile(network.features) if compile else network.features
    bfloat16 = precision == "bfloat16"

    def forward(inputs: Tensor) -> Tensor:
        # A batch of another size would be compiled again; there is one at the end of a shard at most.
        function = compiled if len(inputs) == batch_size else network.features
        with float32_products(precision), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            return function(inputs).float()

    return forward
