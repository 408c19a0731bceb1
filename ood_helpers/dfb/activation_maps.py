"""Class activation maps of an image set, passed once and kept in the store.

The merged maps of each scale are kept as they leave the network, a few numbers per image. Fusing, smoothing and
thresholding them takes seconds, so every setting of the masks can be tried without another pass.

Source: Ding and Pang, ACM MM 2024, arXiv 2303.08727, and its public code.
"""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ood_helpers.backbones.base import Classifier
from ood_helpers.backbones.checkpoints import weights_fingerprint
from ood_helpers.backbones.precision import float32_products
from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.transforms import Transform, image_batches
from ood_helpers.errors import InputError
from ood_helpers.files import atomic_path
from ood_helpers.progress import track
from ood_helpers.storage import Entry, Shards, Store, missing_shards, shard_path

SHARD_SIZE = 2048  # images per file; an interrupted pass resumes at one

Rows = Tensor | np.ndarray | slice | None


@torch.no_grad()
def class_activation_maps(
    network: Classifier,
    inputs: Tensor,
    scales: Sequence[float],
    classes: Tensor,
    batch_size: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The maps of chosen classes and of the predicted one at several scales, merged with those of the mirrored image.

    A(x)_c = ReLU(w_c . feature_map(x) + b_c) at each position; map = A(x) + mirrored A(mirrored x), where x is the
    image enlarged by the scale (bicubic). The head is applied to the chosen classes alone.

    Parameters
    ----------
    network : in evaluation mode
    inputs : normalised images, float [B, 3, H, W] on the network's device
    scales : factors of H and W, above 0
    classes : int64 [B, M], M maps per image; M may be 0
    batch_size : images in a pass at scale 1, mirrored ones counted; other scales take as many as have their number of
        pixels; None = all

    Returns
    -------
    for each scale the maps [B, M + 1, h, w] float32, at least 0, the last that of the predicted class; and the classes
    [B] int64 predicted at the images' own size

    Raises
    ------
    InputError : a scale leaves the network nothing to see, `classes` of another shape

    Source: the public code of DFB, whose class is by default the predicted one.
    """
    if classes.ndim != 2 or len(classes) != len(inputs):
        raise InputError(
            f"Found classes {tuple(classes.shape)} for {len(inputs)} images, expected [B, M]; pass one row per image."
        )

    def batches(scale: float) -> list[slice]:
        step = len(inputs) if batch_size is None else max(1, int(batch_size / (2 * scale**2)))
        return [slice(start, start + step) for start in range(0, len(inputs), step)]

    # The pass at scale 1 tells the predicted class, which the others need.
    classes, predicted, own_size = classes.to(inputs.device), [], []
    for rows in batches(1.0):
        images = inputs[rows]
        features = _feature_maps(network, images, 1.0, mirrored=1.0 in scales)
        predicted.append(network.head(network.pool(features[: len(images)])).argmax(dim=1))
        if 1.0 in scales:
            chosen = torch.cat([classes[rows], predicted[-1][:, None]], dim=1)
            own_size.append(_merged(network, features, chosen))
    predicted = torch.cat(predicted)
    classes = torch.cat([classes, predicted[:, None]], dim=1)

    def of_scale(scale: float) -> list[Tensor]:
        return [
            _merged(network, _feature_maps(network, inputs[rows], scale), classes[rows])
            for rows in batches(scale)
        ]

    return [torch.cat(own_size if scale == 1 else of_scale(scale)) for scale in scales], predicted


def _merged(network: Classifier, features: Tensor, classes: Tensor) -> Tensor:
    """Maps [B, M, h, w] of `classes` [B, M], of feature maps [2 B, D, h, w] of images and of the mirrored ones."""
    weight, bias = network.head.weight[classes], network.head.bias[classes][..., None]
    upright, mirrored = (
        torch.relu(weight @ half.flatten(2) + bias).unflatten(2, half.shape[2:])
        for half in features.split(len(classes))
    )
    return (upright + mirrored.flip(3)).float()


def _feature_maps(network: Classifier, inputs: Tensor, scale: float, mirrored: bool = True) -> Tensor:
    """Feature maps [2 B, D, h, w] of the images at a scale and, behind them, of the mirrored ones."""
    size = [round(side * scale) for side in inputs.shape[2:]]
    try:
        if size != list(inputs.shape[2:]):
            inputs = F.interpolate(inputs, size, mode="bicubic", align_corners=False)
        if mirrored:
            inputs = torch.cat([inputs, inputs.flip(3)])
        return network.feature_map(inputs.contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        if not any(reason in str(error) for reason in ("too small", "greater than 0")):
            raise
        raise InputError(
            f"At scale {scale:g} the images have {size[0]} x {size[1]} pixels, too few for {type(network).__name__}; "
            "take larger scales."
        ) from None


@dataclass(frozen=True)
class ClassMaps:
    """One map per image at each scale, in memory.

    maps : for each scale float32 [N, h, w]
    classes : whose maps they are, int64 [N]
    size : height and width of the images
    """

    maps: list[Tensor]
    classes: Tensor
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.classes)

    def fused(self, rows: Rows = None, device: torch.device | str = "cpu") -> Tensor:
        """The maps of all scales enlarged to the images' size (bilinear) and added up, divided by their maximum + 1e-5.

        Returns
        -------
        float32 [n, H, W] in [0, 1) of the images `rows`; None = all
        """
        rows = slice(None) if rows is None else rows
        pieces = (maps[rows][:, None].to(device) for maps in self.maps)
        total = sum(
            F.interpolate(maps, self.size, mode="bilinear", align_corners=False)[:, 0] for maps in pieces
        )
        return total / (total.amax(dim=(1, 2), keepdim=True) + 1e-5)


@dataclass(frozen=True)
class StoredMaps:
    """The maps of a whole image set on disk.

    key : what tells them apart from others
    """

    stored: Shards
    key: str

    def load(self, label: str = "ground_truth") -> ClassMaps:
        """The maps of the true or of the predicted classes.

        Raises
        ------
        InputError : `ground_truth` of images without labels, or another word
        """
        record = self.stored.record
        kinds = record["classes"]
        if label not in kinds:
            raise InputError(
                f"Found a request for maps of the {label} classes of {record['set']}, which has those of the "
                f"{' and '.join(kinds)} ones; choose one of these."
            )
        column = kinds.index(label)

        def joined(name: str) -> Tensor:
            return torch.cat([shard.get_tensor(name)[:, column] for shard in self.stored])

        maps = [joined(f"maps.{index}") for index in range(len(record["scales"]))]
        return ClassMaps(maps, joined("classes"), tuple(record["size"]))


def maps_entry(
    network: Classifier,
    image_set: ImageSet,
    transform: Transform,
    store: Store,
    scales: Sequence[float],
    device: torch.device | str = "cpu",
) -> Entry:
    """Where the maps are kept: by weights, transform, images with labels, scales, kind of device, and code."""
    return store.entry(
        "maps",
        code=[__name__, type(network)],
        weights=weights_fingerprint(network),
        transform=transform.fingerprint,
        images=image_set.fingerprint,
        scales=[float(scale) for scale in scales],
        device=torch.device(device).type,  # as for a feature bank
    )


def stored_maps(
    network: Classifier,
    image_set: ImageSet,
    transform: Transform,
    store: Store,
    scales: Sequence[float],
    device: torch.device | str = "cpu",
    batch_size: int = 32,
) -> StoredMaps:
    """Pass an image set through a network once at each scale and store the maps of the predicted and, where the images
    have labels, of the true classes.

    An interrupted pass resumes at the first shard that is missing; each shard is computed by the same batches either
    way, so the result is the same.

    Parameters
    ----------
    batch_size : as for `class_activation_maps`

    Raises
    ------
    InputError : unreadable image, NaN or infinite maps, labels that are no classes of the network
    """
    entry = maps_entry(network, image_set, transform, store, scales, device)
    with entry.locked() as directory:
        stored = Shards.open(directory)
        if stored is None:
            stored = _pass(network, image_set, transform, directory, scales, device, batch_size)
    return StoredMaps(stored, entry.name)


def _pass(network, image_set, transform, directory, scales, device, batch_size) -> Shards:
    labels, count = image_set.labels, len(image_set)
    if labels is not None and count and not 0 <= labels.min() <= labels.max() < network.num_classes:
        raise InputError(
            f"Labels of {image_set.name} run from {labels.min()} to {labels.max()}, expected 0 to "
            f"{network.num_classes - 1}; check num_classes and the labels."
        )
    kinds = ["predicted"] if labels is None else ["ground_truth", "predicted"]
    labels = np.empty((count, 0), dtype=np.int64) if labels is None else labels[:, None]
    size = list(next(image_batches(image_set, transform, 0, 1, 1)).shape[2:])
    rows = [min(SHARD_SIZE, count - start) for start in range(0, count, SHARD_SIZE)]
    missing = missing_shards(directory, rows)
    network.eval().to(device, memory_format=torch.channels_last)
    # Enough images for a full batch of the smallest scale.
    at_once = math.ceil(batch_size / (2 * min(1.0, *scales) ** 2))
    with (
        track(description=f"Maps of {image_set.name}", total=count, unit="image") as bar,
        torch.inference_mode(),
        float32_products(),
    ):
        bar.update(count - sum(rows[index] for index in missing))
        for index in missing:
            begin, start, outputs = time.perf_counter(), index * SHARD_SIZE, defaultdict(list)
            first, stop = start, start + rows[index]
            for batch in image_batches(image_set, transform, start, stop, at_once):
                inputs = transform.normalise(batch.to(device, non_blocking=True))
                classes = torch.as_tensor(labels[first : first + len(batch)])
                maps, predicted = class_activation_maps(network, inputs, scales, classes, batch_size)
                for number, of_scale in enumerate(maps):
                    outputs[f"maps.{number}"].append(of_scale.cpu())
                outputs["classes"].append(torch.cat([classes.to(predicted), predicted[:, None]], dim=1).cpu())
                first += len(batch)
                bar.update(len(batch))
            seconds = time.perf_counter() - begin
            _write_shard(shard_path(directory, index), outputs, image_set.name, start, seconds)
    return Shards.complete(
        directory, rows, set=image_set.name, scales=list(scales), classes=kinds, size=size, device=str(device)
    )


def _write_shard(path: Path, outputs: dict[str, list[Tensor]], name: str, start: int, seconds: float) -> None:
    tensors = {key: torch.cat(parts).contiguous() for key, parts in outputs.items()}
    finite = [value.flatten(1).isfinite().all(dim=1) for value in tensors.values()]
    bad = ~torch.stack(finite).all(dim=0)
    if bad.any():
        raise InputError(
            f"The network gives NaN or infinite maps for {int(bad.sum())} of images {start} to {start + len(bad) - 1} of "
            f"{name} (first: {start + int(bad.nonzero()[0])}), expected finite numbers; check the checkpoint and the "
            "transform."
        )
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"seconds": f"{seconds:.6f}"})
