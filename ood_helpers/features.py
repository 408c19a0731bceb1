"""The feature bank: one forward pass an image set, kept on disk and read memory-mapped by every method.

A bank holds the pooled penultimate features [N, D], the logits [N, C] and the labels [N] of one image set.
It lives in a folder whose name is a hash of everything the numbers depend on, as safetensors shards that
are written atomically; an interrupted pass goes on at the first missing shard.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ood_helpers.backbones import Classifier, weights_fingerprint
from ood_helpers.config import FeaturesConfig
from ood_helpers.data import ImageSet, Transform, spanned_batches
from ood_helpers.errors import InputError
from ood_helpers.files import atomic_path, locked, sha256_of_json, write_json
from ood_helpers.groups import Groups, classify
from ood_helpers.progress import track

EXTRACTION_VERSION = 1  # raise it when the numbers in a bank change for the same network and images


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


@dataclass(frozen=True)
class Head:
    """The linear classifier on the pooled features: logits = features weight^T + bias.

    weight [L, D], bias [L]. L is the number of classes C; with `groups`, whose softmax has an "others" in each of K
    groups, it is C + K.
    """

    weight: Tensor
    bias: Tensor
    groups: Groups | None = None

    @classmethod
    def of(cls, network: Classifier, groups: Groups | None = None) -> "Head":
        """The head of a classifier, detached, on the CPU."""
        weight, bias = network.head.weight, network.head.bias
        return cls(weight.detach().cpu().clone(), bias.detach().cpu().clone(), groups)

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[:1]:
            found = f"weight {tuple(self.weight.shape)} and bias {tuple(self.bias.shape)}"
            raise InputError(
                f"A head has {found}, expected [C, D] and [C]; pass the weights of a linear layer."
            )
        if self.groups is not None and self.groups.num_logits != self.num_logits:
            raise InputError(
                f"A head has {self.num_logits} logits, expected {self.groups.num_logits} for "
                f"{self.groups.num_classes} classes in {self.groups.num_groups} groups; pass the groups it was trained with."
            )

    @property
    def num_logits(self) -> int:
        return self.weight.shape[0]

    @property
    def num_classes(self) -> int:
        return self.num_logits if self.groups is None else self.groups.num_classes

    @property
    def feature_dim(self) -> int:
        return self.weight.shape[1]

    def to(self, *args, **kwargs) -> "Head":
        """The head in another dtype or on another device, as torch.Tensor.to."""
        return Head(self.weight.to(*args, **kwargs), self.bias.to(*args, **kwargs), self.groups)

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, L] of features [N, D]."""
        return features @ self.weight.T + self.bias

    def classify(self, logits: Tensor) -> Tensor:
        """Predicted classes [N] of logits [N, L]: the largest, or by the rule of the group softmax."""
        return classify(logits, self.groups)


@dataclass(frozen=True)
class FeatureBank:
    """Features [N, D], logits [N, C], labels [N] int64 or None, and pooled taps {module: [N, D_l]}, in memory."""

    features: Tensor
    logits: Tensor
    labels: Tensor | None = None
    taps: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in {"logits": self.logits, "labels": self.labels, **self.taps}.items():
            if tensor is not None and len(tensor) != len(self.features):
                raise InputError(
                    f"A feature bank has {len(self.features)} rows of features and {len(tensor)} of {name}; "
                    "expected one row an image in each."
                )

    def __len__(self) -> int:
        return len(self.features)

    def shards(self) -> Iterator["FeatureBank"]:
        """The bank in pieces that fit in memory; this one is a single piece."""
        yield self

    @staticmethod
    def joined(shards: "Sequence[FeatureBank]") -> "FeatureBank":
        """The samples of several shards as one FeatureBank; a single shard is given back as it is."""
        if len(shards) == 1:
            return shards[0]
        labels = None if shards[0].labels is None else torch.cat([shard.labels for shard in shards])
        taps = {name: torch.cat([shard.taps[name] for shard in shards]) for name in shards[0].taps}
        features = torch.cat([shard.features for shard in shards])
        return FeatureBank(features, torch.cat([shard.logits for shard in shards]), labels, taps)

    def to(self, device: torch.device | str) -> Self:
        """The bank with all its tensors on a device."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        taps = {name: tap.to(device) for name, tap in self.taps.items()}
        return replace(self, **moved, taps=taps)


@dataclass(frozen=True)
class StoredBank:
    """A complete bank on disk. `record` has the number of images, seconds and images a second of its pass."""

    directory: Path
    record: dict

    @classmethod
    def open(cls, directory: Path) -> "StoredBank | None":
        """The bank in a folder, or None when its pass has not ended or a shard is missing.

        Raises
        ------
        InputError : a shard is damaged
        """
        record_path = Path(directory) / "bank.json"
        if not record_path.exists():
            return None
        bank = cls(Path(directory), json.loads(record_path.read_text()))
        if not all(path.exists() for path in bank.shard_paths):
            return None
        for path in bank.shard_paths:
            with _open_shard(path):
                pass
        return bank

    @property
    def shard_paths(self) -> list[Path]:
        return [shard_path(self.directory, index) for index in range(self.record["shards"])]

    def __len__(self) -> int:
        return self.record["images"]

    def shards(self) -> Iterator[FeatureBank]:
        """One memory-mapped FeatureBank a shard, in order."""
        for path in self.shard_paths:
            with _open_shard(path) as shard:
                yield _read_shard(shard)

    def load(self) -> FeatureBank:
        """The whole bank; memory-mapped when it is a single shard, else N (D + C) floats in memory."""
        return FeatureBank.joined(list(self.shards()))


@dataclass(frozen=True)
class OtherHeadBank:
    """A bank with the logits of another head on the same features, taken anew whenever it is read."""

    bank: StoredBank
    head: Head

    @property
    def record(self) -> dict:
        """That of the forward pass."""
        return self.bank.record

    def __len__(self) -> int:
        return len(self.bank)

    def shards(self) -> Iterator[FeatureBank]:
        """One FeatureBank for every shard of the bank, in order."""
        for shard in self.bank.shards():
            yield self._with_logits(shard)

    def load(self) -> FeatureBank:
        """The whole bank in memory."""
        return self._with_logits(self.bank.load())

    def _with_logits(self, bank: FeatureBank) -> FeatureBank:
        return replace(bank, logits=self.head.logits(bank.features))


class PixelNetwork:
    """A classifier as a differentiable function of pixels in [0, 1], for methods that need its input gradient.

    The normalisation (x - mean) / std is part of the function, so a step of a given size in pixels is the same
    step whatever the normalisation. The network is set to evaluation mode and its parameters are frozen, as no
    method needs their gradients.

    Parameters
    ----------
    network : the classifier, moved to `device`
    transform : of which mean and std are used
    """

    def __init__(self, network: Classifier, transform: Transform, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        mean, std = torch.tensor([transform.mean, transform.std], dtype=torch.float32, device=device)
        self.mean, self.std = mean[:, None, None], std[:, None, None]
        self._tap_calls: dict[frozenset[str], Counter] = {}

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits [B, C] of pixels [B, 3, H, W] in [0, 1]."""
        return self.network(self._inputs(pixels))

    def pooled(self, pixels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Spatial means [B, D_l] of modules' outputs; the name `features` is the penultimate layer.

        The pass ends at the last module that is needed, so an early layer costs a fraction of a pass.

        Raises
        ------
        InputError : no such module
        """
        modules = frozenset(names) - {"features"}
        # A module may run several times in a pass and its last output counts, as in a bank: the first pass goes
        # to its end and counts them.
        last, calls = self._tap_calls.get(modules), Counter()

        def kept(name: str) -> None:
            calls[name] += 1
            if calls == last and "features" not in names:
                raise _LastTap

        with _tapped(self.network, tuple(modules), kept) as values:
            try:
                features = self.network.features(self._inputs(pixels))
                values["features"] = features
                self.network.head(features)
                self._tap_calls[modules] = calls
            except _LastTap:
                pass
        return {name: values[name] for name in names}

    def _inputs(self, pixels: Tensor) -> Tensor:
        inputs = (pixels - self.mean) / self.std
        return inputs.contiguous(memory_format=torch.channels_last)


class _LastTap(Exception):
    """Ends a forward pass when the last module that is needed has run."""


@dataclass(frozen=True, kw_only=True)
class ImageShard(FeatureBank):
    """A piece of a bank together with the images it was made of and the network.

    network : the classifier of the bank, as a function of pixels
    batches : gives the images, uint8 [B, 3, H, W] in the order of the bank
    name : of the image set, for progress bars
    """

    network: PixelNetwork
    batches: Callable[[], Iterator[Tensor]]
    name: str = "images"

    def pixels(self) -> Iterator[Tensor]:
        """The images in batches, float32 [B, 3, H, W] in [0, 1] on the network's device."""
        for batch in self.batches():
            yield batch.to(self.network.device, non_blocking=True).to(torch.float32).div(255)


@dataclass(frozen=True)
class ImageBank:
    """A bank whose shards hold the images and the network, too, for methods that differentiate it.

    bank : the features, logits, labels and taps
    network : the classifier the bank was made with
    batches : (start, stop) -> images start, ..., stop - 1 of the set, uint8 [B, 3, H, W]
    name : of the image set, for progress bars
    """

    bank: FeatureBank | StoredBank | OtherHeadBank
    network: PixelNetwork
    batches: Callable[[int, int], Iterator[Tensor]]
    name: str = "images"

    def __len__(self) -> int:
        return len(self.bank)

    def shards(self) -> Iterator[ImageShard]:
        """One ImageShard for every shard of the bank, in order."""
        start = 0
        for shard in self.bank.shards():
            stop = start + len(shard)
            yield ImageShard(
                shard.features,
                shard.logits,
                shard.labels,
                shard.taps,
                network=self.network,
                batches=partial(self.batches, start, stop),
                name=self.name,
            )
            start = stop


Bank = FeatureBank | StoredBank | OtherHeadBank | ImageBank


def shard_path(directory: Path, index: int) -> Path:
    """Where a shard of a stored bank lies."""
    return Path(directory) / f"shard-{index:05d}.safetensors"


@contextmanager
def _open_shard(path: Path):
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        size = f"{path.stat().st_size} bytes" if path.exists() else "no file"
        raise InputError(
            f"The cache shard {path} is damaged ({size}; {error}), expected a complete safetensors file; "
            "delete it and run again: only this shard is computed anew."
        ) from None


def _read_shard(shard) -> FeatureBank:
    names = shard.keys()
    taps = {name.removeprefix("taps."): shard.get_tensor(name) for name in names if name.startswith("taps.")}
    labels = shard.get_tensor("labels") if "labels" in names else None
    return FeatureBank(shard.get_tensor("features"), shard.get_tensor("logits"), labels, taps)


def bank_key(
    network: Classifier,
    image_set: ImageSet,
    transform: Transform,
    options: FeaturesConfig = FeaturesConfig(),  # noqa: B008 - frozen
    device: torch.device | str = "cpu",
) -> str:
    """SHA-256 over weights, transform, image set (content, labels, what was taken), taps, precision and compilation (on
    the CPU where they are not the default), kind of device, code version."""
    kind = torch.device(device).type  # the last bits differ between kinds of device; a table rests on one
    arithmetic = options.model_dump(include={"precision", "compile"}, exclude_defaults=kind == "cpu")
    parts = [
        weights_fingerprint(network),
        transform.fingerprint,
        image_set.fingerprint,
        list(options.taps),
        kind,
    ]
    return sha256_of_json([*parts, EXTRACTION_VERSION, *([arithmetic] if arithmetic else [])])


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


def extract(
    network: Classifier,
    image_set: ImageSet,
    transform: Transform,
    directory: Path,
    options: FeaturesConfig = FeaturesConfig(),  # noqa: B008 - frozen
    device: torch.device | str = "cpu",
) -> StoredBank:
    """Pass an image set through a network once and store features, logits, labels and taps.

    Memory: the outputs of three shards (`shard_size` images), one of which is being written, and two batches of images.
    Shards already in `directory` are kept, so an interrupted pass goes on where it stopped; each shard is
    computed by the same batches either way, so the result is the same.

    Raises
    ------
    InputError : unreadable image, damaged shard, NaN or infinite features, unknown tap
    """
    directory = Path(directory)
    with locked(directory):
        return StoredBank.open(directory) or _extract(
            network, image_set, transform, directory, options, torch.device(device)
        )


def _extract(network, image_set, transform, directory, options, device) -> StoredBank:
    network.eval().to(device, memory_format=torch.channels_last)
    shards = [
        (shard_path(directory, index), start, min(start + options.shard_size, len(image_set)))
        for index, start in enumerate(range(0, len(image_set), options.shard_size))
    ]
    missing = []
    for path, start, stop in shards:
        if path.exists():
            with _open_shard(path) as shard:
                _check_rows(path, shard.get_slice("features").get_shape()[0], stop - start)
        else:
            missing.append((path, start, stop))
    batch_size = pass_batch_size(options, device)
    spans = [
        (first, min(first + batch_size, stop))
        for _, start, stop in missing
        for first in range(start, stop, batch_size)
    ]
    batches = on_device(spanned_batches(image_set, transform, spans, options.workers), device)
    forward = network_in(network, options, device, batch_size)
    # The shard before is checked and written while the next one is computed.
    with (
        ThreadPoolExecutor(1) as writer,
        track(description=image_set.name, total=len(image_set), unit="image") as bar,
        torch.inference_mode(),
        float32_products(),
        _tapped(network, options.taps) as taps,
    ):
        bar.update(len(image_set) - sum(stop - start for _, start, stop in missing))
        written = None
        for path, start, stop in missing:
            begin, outputs = time.perf_counter(), defaultdict(list)
            for _ in range(start, stop, batch_size):
                inputs = transform.normalise(next(batches)).contiguous(memory_format=torch.channels_last)
                features = forward(inputs)
                outputs["features"].append(features)
                outputs["logits"].append(network.head(features).float())
                for name, value in taps.items():
                    outputs[f"taps.{name}"].append(value.float())
                bar.update(len(inputs))
            tensors = {name: torch.cat(parts).cpu() for name, parts in outputs.items()}
            seconds = time.perf_counter() - begin
            if written is not None:
                written.result()
            written = writer.submit(_write_shard, path, tensors, image_set, start, stop, seconds)
        if written is not None:
            written.result()
    seconds = 0.0
    for path, _, _ in shards:
        with _open_shard(path) as shard:
            seconds += float(shard.metadata()["seconds"])
    record = {
        "set": image_set.name,
        "images": len(image_set),
        "shards": len(shards),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(image_set) / max(seconds, 1e-9), 1),
        "device": str(device),
    }
    write_json(directory / "bank.json", record)
    return StoredBank(directory, record)


def _check_rows(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise InputError(
            f"The cache shard {path} holds {found} images, expected {expected}: features.shard_size changed "
            f"since an interrupted pass; set it back or delete {path.parent}."
        )


def pass_batch_size(options: FeaturesConfig, device: torch.device | str) -> int:
    """Images in a batch of a pass: as set, else 32 on the CPU, whose caches it fits, or 256."""
    return options.batch_size or (32 if torch.device(device).type == "cpu" else 256)


def network_in(
    network: Classifier, options: FeaturesConfig, device: torch.device, batch_size: int
) -> Callable[[Tensor], Tensor]:
    """Gives the features of a batch, float32, by the arithmetic that the options name."""
    compiled = torch.compile(network.features) if options.compile else network.features
    bfloat16 = options.precision == "bfloat16"

    def forward(inputs: Tensor) -> Tensor:
        # A batch of another size would be compiled anew; there is one at the end of a shard at most.
        function = compiled if len(inputs) == batch_size else network.features
        with (
            float32_products(options.precision),
            torch.autocast(device.type, torch.bfloat16, enabled=bfloat16),
        ):
            return function(inputs).float()

    return forward


def on_device(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Batches on a device, in order; on CUDA each is copied from pinned memory while the one before is computed with."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copies, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copies):
            copied = batch.pin_memory().to(device, non_blocking=True)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(copies)
        copied.record_stream(torch.cuda.current_stream(device))
        ahead = copied
    if ahead is not None:
        yield ahead


def _write_shard(
    path: Path, tensors: dict[str, Tensor], image_set: ImageSet, start: int, stop: int, seconds: float
) -> None:
    bad = ~torch.isfinite(tensors["features"]).all(1) | ~torch.isfinite(tensors["logits"]).all(1)
    if bad.any():
        first = start + int(bad.nonzero()[0])
        raise InputError(
            f"The network gives NaN or infinite outputs for {int(bad.sum())} of images {start} to {stop - 1} of "
            f"{image_set.name} (first: {first}), expected finite numbers; check the checkpoint and the transform."
        )
    if image_set.labels is not None:
        tensors["labels"] = torch.from_numpy(np.ascontiguousarray(image_set.labels[start:stop])).long()
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"seconds": f"{seconds:.6f}"})


@contextmanager
def _tapped(
    network: nn.Module, names: tuple[str, ...], kept: Callable[[str], None] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Collect the spatial mean of the named modules' outputs during forward passes; `kept` is told of each."""
    modules, values = dict(network.named_modules()), {}
    for name in names:
        if name not in modules:
            raise InputError(
                f"The network has no module {name!r} to tap; expected one of: {', '.join(filter(None, modules))}."
            )

    def keep(name):
        def hook(_module, _inputs, output):
            values[name] = output.mean((2, 3)) if output.ndim == 4 else output
            if kept is not None:
                kept(name)

        return hook

    hooks = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield values
    finally:
        for hook in hooks:
            hook.remove()


def class_means(bank: Bank, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature of each class and number of images in it, streaming over the bank's shards.

    Returns
    -------
    means [C, D] float64 (NaN for a class without images), counts [C] int64

    Raises
    ------
    InputError : the bank has no labels, or a label outside 0 .. C - 1
    """
    sums, counts = None, torch.zeros(num_classes, dtype=torch.int64)
    for shard in bank.shards():
        if shard.labels is None:
            raise InputError(
                "The bank has no labels, expected the labels of the ID training images; add them to the set."
            )
        if len(shard) and not 0 <= int(shard.labels.min()) <= int(shard.labels.max()) < num_classes:
            found = f"{int(shard.labels.min())} to {int(shard.labels.max())}"
            raise InputError(
                f"Labels run from {found}, expected 0 to {num_classes - 1}; check num_classes and the labels."
            )
        labels = shard.labels.cpu()
        if sums is None:
            sums = torch.zeros(num_classes, shard.features.shape[1], dtype=torch.float64)
        sums.index_add_(0, labels, shard.features.cpu().double())
        counts += torch.bincount(labels, minlength=num_classes)
    return sums / counts[:, None], counts


def accuracy(bank: Bank, head: Head) -> float:
    """Percent of a bank's images that its head classifies as labelled."""
    correct = sum(int((head.classify(shard.logits) == shard.labels).sum()) for shard in bank.shards())
    return 100 * correct / len(bank)


def activation_percentile(bank: Bank, percentile: float) -> float:
    """The percentile of all N * D feature values of a bank, exact, as numpy's linear interpolation.

    The two order statistics it lies between are found by counting the values' leading 16 bits, then the
    next 16 among those that share them, and so on: a few passes over the shards, no copy of the bank.
    """
    total = sum(shard.features.numel() for shard in bank.shards())
    position = percentile / 100 * (total - 1)
    lower = int(position)
    low, high = (_order_statistic(bank, min(rank, total - 1)) for rank in (lower, lower + 1))
    return low + (high - low) * (position - lower)


def _order_statistic(bank: Bank, rank: int) -> float:
    dtype = next(iter(bank.shards())).features.cpu().numpy().dtype
    prefix, bits = 0, 8 * dtype.itemsize
    for start in range(bits - 16, -1, -16):
        histogram = np.zeros(1 << 16, dtype=np.int64)
        for shard in bank.shards():
            keys = _sortable(shard.features.cpu().numpy().ravel())
            unsigned = keys.dtype.type
            if start < bits - 16:
                keys = keys[(keys >> unsigned(start + 16)) == prefix]
            digits = (keys >> unsigned(start)) & unsigned(0xFFFF)
            histogram += np.bincount(digits.astype(np.int64), minlength=1 << 16)
        cumulative = np.cumsum(histogram)
        digit = int(np.searchsorted(cumulative, rank, side="right"))
        rank -= int(cumulative[digit - 1]) if digit else 0
        prefix = (prefix << 16) | digit
    top = 1 << (bits - 1)
    pattern = prefix ^ top if prefix & top else prefix ^ (2 * top - 1)
    return float(np.array([pattern], dtype=f"u{bits // 8}").view(dtype)[0])


def _sortable(values: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the floats: flip the sign bit of positives, all bits of negatives."""
    bits = 8 * values.dtype.itemsize
    patterns = np.ascontiguousarray(values).view(f"u{bits // 8}")
    unsigned = patterns.dtype.type
    top = unsigned(1 << (bits - 1))
    return patterns ^ np.where(patterns & top, unsigned(2 * int(top) - 1), top)
