"""Class activation maps of an image set, passed once and kept on disk, and the pseudo masks that DFB makes of them.

What is kept are the merged maps of each scale as they leave the network, a few numbers an image; fusing, smoothing and
thresholding them is a matter of seconds, so that every setting of the masks can be tried without another pass.

Source: Ding and Pang, "Improving Out-of-Distribution Detection with Disentangled Foreground and Background Features",
ACM MM 2024, arXiv 2303.08727, and its public code.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from ood_helpers.backbones import Classifier, weights_fingerprint
from ood_helpers.config import MasksConfig
from ood_helpers.data import ImageSet, Transform, image_batches
from ood_helpers.errors import InputError
from ood_helpers.features import _open_shard, float32_products, shard_path
from ood_helpers.files import atomic_path, locked, sha256_of_json, write_json
from ood_helpers.progress import track

CAM_VERSION = 1  # raise it when the same network and images give other maps, or the same maps other masks
PIXELS_AT_ONCE = 2**25  # of maps that are made to masks
SHARD_SIZE = 2048  # images a file; an interrupted pass goes on at one
ROUNDING = 1e-5  # a map that varies by less than this part of its maximum is constant up to float32 rounding

Rows = Tensor | np.ndarray | slice | None


@torch.no_grad()
def class_activation_maps(
    network: Classifier, inputs: Tensor, scales: Sequence[float], classes: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The maps of chosen classes at several scales, each merged with that of the mirrored image.

    A(x)_c = ReLU(w_c . feature_map(x) + b_c) at each position; map = A(x) + mirrored A(mirrored x), where x is the image
    enlarged by the scale (bicubic). The head is applied to the chosen classes alone.

    Parameters
    ----------
    network : in evaluation mode
    inputs : normalised images, float [B, 3, H, W] on the network's device
    scales : factors of H and W, above 0
    classes : int64 [B, M], M maps an image; None = the predicted class, M = 1

    Returns
    -------
    for each scale the maps [B, M, h, w] float32, at least 0, and the classes [B] int64 predicted at the images' own size

    Raises
    ------
    InputError : a scale leaves the network nothing to see, `classes` of another shape

    Source: the public code of DFB, whose class is by default the predicted one.
    """
    if classes is not None and (classes.ndim != 2 or len(classes) != len(inputs)):
        raise InputError(
            f"Found classes {tuple(classes.shape)} for {len(inputs)} images, expected [B, M]; pass a row an image."
        )
    add_predicted = classes is None
    if add_predicted:
        classes = torch.empty(len(inputs), 0, dtype=torch.int64)
    return _maps(network, inputs, scales, classes, add_predicted)


def _maps(
    network: Classifier,
    inputs: Tensor,
    scales: Sequence[float],
    classes: Tensor,
    add_predicted: bool,
    batch_size: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    """As class_activation_maps; with `add_predicted` the maps of the predicted class stand behind those of `classes`.

    batch_size : images in a pass at scale 1, mirrored ones counted, and at other scales as many as have their number of
        pixels; None = all
    """

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
            added = [predicted[-1][:, None]] if add_predicted else []
            own_size.append(_merged(network, features, torch.cat([classes[rows], *added], dim=1)))
    predicted = torch.cat(predicted)
    if add_predicted:
        classes = torch.cat([classes, predicted[:, None]], dim=1)
    maps = []
    for scale in scales:
        pieces = (
            own_size
            if scale == 1
            else [
                _merged(network, _feature_maps(network, inputs[rows], scale), classes[rows])
                for rows in batches(scale)
            ]
        )
        maps.append(torch.cat(pieces))
    return maps, predicted


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
    """One map an image at each scale, in memory.

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
        total = sum(
            F.interpolate(maps[rows][:, None].to(device), self.size, mode="bilinear", align_corners=False)[
                :, 0
            ]
            for maps in self.maps
        )
        return total / (total.amax(dim=(1, 2), keepdim=True) + 1e-5)


@dataclass(frozen=True)
class StoredMaps:
    """The maps of a whole image set on disk. `record` has the number of images and the seconds of the pass."""

    directory: Path
    record: dict

    @classmethod
    def open(cls, directory: Path) -> "StoredMaps | None":
        """The maps in a folder, or None when their pass has not ended or a shard is missing.

        Raises
        ------
        InputError : a shard is damaged
        """
        record_path = Path(directory) / "maps.json"
        if not record_path.exists():
            return None
        stored = cls(Path(directory), json.loads(record_path.read_text()))
        if not all(path.exists() for path in stored.shard_paths):
            return None
        for path in stored.shard_paths:
            with _open_shard(path):
                pass
        return stored

    @property
    def shard_paths(self) -> list[Path]:
        return [shard_path(self.directory, index) for index in range(self.record["shards"])]

    def __len__(self) -> int:
        return self.record["images"]

    def load(self, label: str = "ground_truth") -> ClassMaps:
        """The maps of the true or of the predicted classes.

        Raises
        ------
        InputError : `ground_truth` of images without labels, or another word
        """
        kinds = self.record["classes"]
        if label not in kinds:
            raise InputError(
                f"Maps of the {label} classes were asked of {self.record['set']}, which has those of the "
                f"{' and '.join(kinds)} ones; choose one of these."
            )
        column = kinds.index(label)
        shards = []
        for path in self.shard_paths:
            with _open_shard(path) as shard:
                shards.append({name: shard.get_tensor(name)[:, column].clone() for name in shard.keys()})  # noqa: SIM118
        maps = [
            torch.cat([shard[f"maps.{index}"] for shard in shards])
            for index in range(len(self.record["scales"]))
        ]
        classes = torch.cat([shard["classes"] for shard in shards])
        return ClassMaps(maps, classes, tuple(self.record["size"]))


def maps_key(
    network: Classifier,
    image_set: ImageSet,
    transform: Transform,
    scales: Sequence[float],
    device: torch.device | str = "cpu",
) -> str:
    """SHA-256 over weights, transform, image set (content, labels, what was taken), scales, kind of device, code version."""
    kind = torch.device(device).type  # as for a feature bank
    parts = [weights_fingerprint(network), transform.fingerprint, image_set.fingerprint]
    return sha256_of_json([*parts, [float(scale) for scale in scales], kind, CAM_VERSION])


def stored_maps(
    network: Classifier,
    image_set: ImageSet,
    transform: Transform,
    directory: Path,
    config: MasksConfig = MasksConfig(),  # noqa: B008 - frozen
    device: torch.device | str = "cpu",
    batch_size: int = 32,
) -> StoredMaps:
    """Pass an image set through a network once at each scale and store the maps of the predicted and, where the images have
    labels, of the true classes.

    Of the config only `scales` matter. Shards already in `directory` are kept, so an interrupted pass goes on where it
    stopped; each shard is computed by the same batches either way, so the result is the same.

    Parameters
    ----------
    batch_size : images in a pass at scale 1, mirrored ones counted; other scales take as many as have their number of
        pixels

    Raises
    ------
    InputError : unreadable image, damaged shard, NaN or infinite maps, labels that are no classes of the network
    """
    directory = Path(directory)
    with locked(directory):
        return StoredMaps.open(directory) or _store(
            network, image_set, transform, directory, config.scales, device, batch_size
        )


def _store(network, image_set, transform, directory, scales, device, batch_size) -> StoredMaps:
    labels = image_set.labels
    if labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < network.num_classes:
        raise InputError(
            f"Labels of {image_set.name} run from {labels.min()} to {labels.max()}, expected 0 to "
            f"{network.num_classes - 1}; check num_classes and the labels."
        )
    starts = range(0, len(image_set), SHARD_SIZE)
    network.eval().to(device, memory_format=torch.channels_last)
    with track(description=f"Maps of {image_set.name}", total=len(image_set), unit="image") as bar:
        for index, start in enumerate(starts):
            stop, path = min(start + SHARD_SIZE, len(image_set)), shard_path(directory, index)
            if not path.exists():
                _write_shard(
                    path, network, image_set, transform, start, stop, scales, device, batch_size, bar
                )
            bar.n = stop
            bar.refresh()
    seconds, size = 0.0, []
    for index in range(len(starts)):
        with _open_shard(shard_path(directory, index)) as shard:
            seconds += float(shard.metadata()["seconds"])
            size = json.loads(shard.metadata()["size"])
    record = {
        "set": image_set.name,
        "images": len(image_set),
        "shards": len(starts),
        "scales": list(scales),
        "classes": ["predicted"] if labels is None else ["ground_truth", "predicted"],
        "size": size,
        "seconds": round(seconds, 3),
        "images_per_second": round(len(image_set) / max(seconds, 1e-9), 1),
        "device": str(device),
    }
    write_json(directory / "maps.json", record)
    return StoredMaps(directory, record)


def _write_shard(path, network, image_set, transform, start, stop, scales, device, batch_size, bar) -> None:
    outputs: dict[str, list[Tensor]] = {}
    begin, first = time.perf_counter(), start
    # Enough images for a full batch of the smallest scale.
    at_once = math.ceil(batch_size / (2 * min(1.0, *scales) ** 2))
    with torch.inference_mode(), float32_products():
        for batch in image_batches(image_set, transform, start, stop, at_once):
            inputs = transform.normalise(batch.to(device, non_blocking=True))
            classes = torch.empty(len(batch), 0, dtype=torch.int64)
            if image_set.labels is not None:
                classes = torch.as_tensor(image_set.labels[first : first + len(batch), None])
            first += len(batch)
            maps, predicted = _maps(network, inputs, scales, classes, True, batch_size)
            values = {f"maps.{index}": value for index, value in enumerate(maps)}
            values["classes"] = torch.cat([classes.to(predicted), predicted[:, None]], dim=1)
            for name, value in values.items():
                outputs.setdefault(name, []).append(value.cpu())
            bar.update(len(batch))
    seconds = time.perf_counter() - begin
    tensors = {name: torch.cat(parts).contiguous() for name, parts in outputs.items()}
    finite = [tensors[f"maps.{i}"].flatten(1).isfinite().all(dim=1) for i in range(len(scales))]
    bad = ~torch.stack(finite).all(dim=0)
    if bad.any():
        raise InputError(
            f"The network gives NaN or infinite maps for {int(bad.sum())} of images {start} to {stop - 1} of "
            f"{image_set.name} (first: {start + int(bad.nonzero()[0])}), expected finite numbers; check the checkpoint and "
            "the transform."
        )
    metadata = {"seconds": f"{seconds:.6f}", "size": json.dumps(list(inputs.shape[2:]))}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def smoothed(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian filter of each map, truncated at 4 sigma, with the map mirrored at its borders (their pixels repeated).

    maps : float [N, H, W]
    sigma : in pixels; 0 = the maps as they are

    It equals scipy.ndimage.gaussian_filter(map, sigma, mode="reflect") up to rounding: filter and border are one matrix
    for the rows and one for the columns, which scipy makes of the identity.
    """
    if sigma == 0:
        return maps
    rows, columns = (
        torch.from_numpy(gaussian_filter1d(np.eye(side), sigma, axis=0, mode="reflect")).to(maps)
        for side in maps.shape[1:]
    )
    return rows @ maps @ columns.T


def min_max(maps: Tensor) -> Tensor:
    """Each map of [N, H, W] between 0 at its minimum and 1 at its maximum; a constant one becomes 0.

    Constant is a map whose values lie within 1e-5 of its maximum: rounding alone would otherwise become a mask.
    """
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    spread = high - low
    constant = spread <= ROUNDING * high.abs()
    return torch.where(constant, 0, (maps - low) / torch.where(constant, 1, spread))


@dataclass(frozen=True)
class PseudoMasks:
    """Which pixels of each image are foreground, and of which class.

    packed : uint8 [N, ceil(H W / 8)], one bit a pixel, row by row, the first in the highest bit
    classes : of the foreground, int64 [N]
    size : height and width
    """

    packed: Tensor
    classes: Tensor
    size: tuple[int, int]

    def __post_init__(self) -> None:
        expected = (len(self.classes), -(-self.size[0] * self.size[1] // 8))
        if self.packed.dtype != torch.uint8 or tuple(self.packed.shape) != expected:
            raise InputError(
                f"Pseudo masks have bits {tuple(self.packed.shape)} {self.packed.dtype}, expected {expected} torch.uint8 for "
                f"{expected[0]} classes and {self.size[0]} x {self.size[1]} pixels; make them with PseudoMasks.of."
            )

    @classmethod
    def of(
        cls,
        maps: ClassMaps,
        config: MasksConfig = MasksConfig(),  # noqa: B008 - frozen
        device: torch.device | str = "cpu",
        chunk: int | None = None,
    ) -> "PseudoMasks":
        """foreground = min_max(smoothed(fused maps)) > threshold.

        Parameters
        ----------
        config : of which `sigma` (None = H / 32) and `threshold` count
        device : where it is computed
        chunk : images at a time; None = as many as make 2^25 pixels

        A map that is constant, or zero everywhere, gives a mask without foreground; any other has at least a pixel of it,
        whatever the image shows, for the threshold is relative to the map's own range.

        Source: the public code of DFB, sigma 4 and threshold 0.5 at 128 x 128 pixels.
        """
        sigma = maps.size[0] / 32 if config.sigma is None else config.sigma
        chunk = chunk or max(1, PIXELS_AT_ONCE // (maps.size[0] * maps.size[1]))
        bits = []
        for start in range(0, len(maps), chunk):
            fused = maps.fused(slice(start, start + chunk), device)
            bits.append(_packed(min_max(smoothed(fused, sigma)) > config.threshold))
        return cls(torch.cat(bits), maps.classes, maps.size)

    def __len__(self) -> int:
        return len(self.classes)

    def foreground(self, rows: Rows = None) -> Tensor:
        """Bool [n, H, W] of the images `rows`; None = all."""
        packed = self.packed if rows is None else self.packed[rows]
        bits = np.unpackbits(packed.numpy(), axis=1, count=self.size[0] * self.size[1])
        return torch.from_numpy(bits).bool().unflatten(1, self.size)

    def values(self, rows: Rows = None) -> Tensor:
        """Int64 [n, H, W], the values of the public code's image files: 0 background, k + 1 foreground of class k."""
        classes = self.classes if rows is None else self.classes[rows]
        return self.foreground(rows) * (classes + 1)[:, None, None]

    @cached_property
    def _share(self) -> Tensor:
        ones = np.bitwise_count(self.packed.numpy()).sum(axis=1, dtype=np.int64)
        return torch.from_numpy(ones / (self.size[0] * self.size[1]))

    def share(self) -> Tensor:
        """The part of each image that is foreground, float64 [N] in [0, 1]."""
        return self._share

    def share_per_class(self, num_classes: int) -> pd.DataFrame:
        """The foreground's share of the images of each class.

        Returns
        -------
        A row a class: class, images, mean, q25 and q75 (quartiles) of the share in percent, NaN where there are no images,
        and empty, the number of images without foreground.
        """
        share = pd.Series(100 * self.share().numpy()).groupby(self.classes.numpy())
        table = pd.DataFrame(
            {
                "images": share.size(),
                "mean": share.mean(),
                "q25": share.quantile(0.25),
                "q75": share.quantile(0.75),
                "empty": share.agg(lambda values: (values == 0).sum()),
            }
        ).reindex(pd.RangeIndex(num_classes, name="class"))
        return table.fillna({"images": 0, "empty": 0}).astype({"images": int, "empty": int}).reset_index()

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        tensors = {"packed": self.packed.contiguous(), "classes": self.classes.contiguous()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"size": json.dumps(list(self.size))})

    @classmethod
    def load(cls, path: Path) -> "PseudoMasks":
        """The masks of a file.

        Raises
        ------
        InputError : there is none, or it is damaged
        """
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                size = tuple(json.loads(file.metadata()["size"]))
                return cls(file.get_tensor("packed"), file.get_tensor("classes"), size)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} holds no pseudo masks ({error}), expected a complete file of PseudoMasks.save; delete it and run again."
            ) from None


def _packed(foreground: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(foreground.flatten(1).cpu().numpy(), axis=1))


def dense_labels(values: Tensor, num_classes: int) -> Tensor:
    """Labels of a dense network of K + 1 outputs, int64: value k + 1 -> class k, value 0 (background) -> K, the last.

    Raises
    ------
    InputError : a value outside 0 ... K
    """
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) <= num_classes:
        raise InputError(
            f"Mask values run from {int(values.min())} to {int(values.max())}, expected 0 to {num_classes}; check num_classes."
        )
    return (values.long() - 1) % (num_classes + 1)
