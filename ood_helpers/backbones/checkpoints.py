"""Reading the checkpoints of the papers, and the fingerprint of a network's weights."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ood_helpers.backbones.base import Classifier
from ood_helpers.config.base import resolve_path
from ood_helpers.errors import InputError, MissingDataError

HEAD_NAMES = ("head", "fc", "classifier", "classifier.1", "linear", "output_layer")
PREFIX = re.compile(r"^(module\.|encoder\.)+")
LISTED = 4


def load_checkpoint(network: Classifier, path: str | Path) -> None:
    """Load the weights in a checkpoint file into `network`, all of them or, on an error, none.

    The state dict is the file's content or lies in it under `state_dict`, `model` or `net`. The prefixes
    `module.` and `encoder.` are dropped, and a head named fc, classifier, classifier.1, linear or
    output_layer is `head` here; a head that is a 1 x 1 convolution becomes a linear layer. Nothing but tensors is
    unpickled. Files that end in .safetensors and .npz are read as such, the kernels [h, w, in, out] of the latter, which
    TensorFlow writes, becoming [out, in, h, w]. `num_batches_tracked`, which old files lack, may be absent.

    Raises
    ------
    MissingDataError : no such file
    InputError : not a checkpoint, or its names or shapes are not those of the network
    """
    path = resolve_path(path)
    own = network.state_dict()
    given = _rename(_find_state_dict(_read(path), path), network)
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in own]
    misshapen = [
        f"{name} {list(given[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        found = "; ".join(
            f"{len(names)} {kind}: {_abbreviate(names)}" for kind, names in problems.items() if names
        )
        raise InputError(
            f"The checkpoint {path} does not fit {type(network).__name__} with {network.head.out_features} outputs "
            f"({found}); check the architecture, its depth and width, num_classes and, for a group softmax, the groups."
        )
    network.load_state_dict(own | given)


def weights_fingerprint(network: nn.Module) -> str:
    """SHA-256 hex digest over the names, dtypes, shapes and bytes of the state dict, in the order of the names, and the
    variant of a Classifier that has one.

    The same on every device and in every memory format.
    """
    digest = hashlib.sha256(getattr(network, "variant", "").encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path) -> Any:
    """The content of a checkpoint file."""
    if not path.exists():
        raise MissingDataError(
            f"No checkpoint {path}; put the file there or correct `checkpoint` in the config."
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix == ".npz":
            return _read_npz(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unreadable file shows up as nearly any type
        refused = re.search(r"GLOBAL (\S+)|Object (array)s", str(error))
        if refused:
            raise InputError(
                f"The checkpoint {path} holds a Python object ({refused[1] or refused[2]}), which is not loaded because it could "
                "run code; save its state_dict alone with torch.save(network.state_dict(), path)."
            ) from None
        raise InputError(
            f"{path} is not a readable checkpoint ({type(error).__name__}), expected a state_dict written by "
            "torch.save; it may be cut short: compare its size with the source and fetch it again."
        ) from None


def _read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file, with kernels as torch has them."""
    with np.load(path, allow_pickle=False) as file:
        return {
            name: torch.from_numpy(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)
            for name, array in file.items()
        }


def _find_state_dict(checkpoint: Any, path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file's content."""
    content = checkpoint if isinstance(checkpoint, Mapping) else {}
    for candidate in (*(content.get(key) for key in ("state_dict", "model", "net")), content):
        items = candidate.items() if isinstance(candidate, Mapping) else ()
        if items and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in items):
            return candidate
    found = f"the keys {_abbreviate([*map(str, content)])}" if content else f"a {type(checkpoint).__name__}"
    raise InputError(
        f"The checkpoint {path} holds {found}, expected a state_dict of tensors, flat or under state_dict, model or net; "
        "save it with torch.save(network.state_dict(), path)."
    )


def _rename(state: Mapping[str, Tensor], network: Classifier) -> dict[str, Tensor]:
    """Give the tensors of a public checkpoint the names they have in `network`."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = PREFIX.sub("", name)
        module, _, parameter = new.rpartition(".")
        if module in HEAD_NAMES:
            new = f"head.{parameter}"
        new = network.own_name(new)
        if new == "head.weight" and tensor.ndim == 4:
            tensor = tensor.flatten(1)
        # Of two tensors with one name the second keeps its own, and is then reported as unexpected.
        renamed[name if new in renamed else new] = tensor
    return renamed


def _abbreviate(names: list[str]) -> str:
    """The first few names and how many more there are."""
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
