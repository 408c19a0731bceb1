"""The forward pass that fills a feature bank: once per network and image set, kept in the store."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ood_helpers.backbones.base import Classifier
from ood_helpers.backbones.checkpoints import weights_fingerprint
from ood_helpers.backbones.precision import float32_products, network_in
from ood_helpers.backbones.taps import tapped
from ood_helpers.banks import StoredBank
from ood_helpers.config.experiment import FeaturesConfig
from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.transforms import Transform, spanned_batches
from ood_helpers.errors import InputError
from ood_helpers.files import atomic_path
from ood_helpers.progress import track
from ood_helpers.storage import Entry, Shards, Store, missing_shards, shard_path


def bank_entry(
    network: Classifier,
    image_set: ImageSet,
    transform: Transform,
    store: Store,
    options: FeaturesConfig = FeaturesConfig(),  # noqa: B008 - frozen
    device: torch.device | str = "cpu",
) -> Entry:
    """Where the bank of an image set is kept: by weights, transform, image set (content, labels, what was taken), taps,
    precision and compilation (on the CPU where they are not the default), kind of device, and code."""
    kind = torch.device(device).type  # the last bits differ between kinds of device; a table rests on one
    return store.entry(
        "banks",
        code=[__name__, type(network)],
        weights=weights_fingerprint(network),
        transform=transform.fingerprint,
        images=image_set.fingerprint,
        taps=list(options.taps),
        device=kind,
        arithmetic=options.model_dump(include={"precision", "compile"}, exclude_defaults=kind == "cpu"),
    )


def extract(
    network: Classifier,
    image_set: ImageSet,
    transform: Transform,
    store: Store,
    options: FeaturesConfig = FeaturesConfig(),  # noqa: B008 - frozen
    device: torch.device | str = "cpu",
) -> StoredBank:
    """Pass an image set through a network once and store features, logits, labels and taps.

    Memory: the outputs of three shards (`shard_size` images), one of which is being written, and two batches of images.
    Shards that are there already are kept, so an interrupted pass resumes where it stopped; each shard is
    computed by the same batches either way, so the result is the same.

    Raises
    ------
    InputError : unreadable image, NaN or infinite features, unknown tap
    """
    entry = bank_entry(network, image_set, transform, store, options, device)
    with entry.locked() as directory:
        stored = Shards.open(directory)
        if stored is None:
            stored = _pass(network, image_set, transform, directory, options, torch.device(device))
    return StoredBank(stored, entry.name)


def _pass(network, image_set, transform, directory, options, device) -> Shards:
    network.eval().to(device, memory_format=torch.channels_last)
    size = options.shard_size
    rows = [min(size, len(image_set) - start) for start in range(0, len(image_set), size)]
    indices = missing_shards(directory, rows)
    missing = [(shard_path(directory, i), i * size, i * size + rows[i]) for i in indices]
    batch_size = pass_batch_size(options, device)
    spans = [
        (first, min(first + batch_size, stop))
        for _, start, stop in missing
        for first in range(start, stop, batch_size)
    ]
    batches = on_device(spanned_batches(image_set, transform, spans, options.workers), device)
    forward = network_in(network, options.precision, options.compile, device, batch_size)
    # The shard before is checked and written while the next one is computed.
    with (
        ThreadPoolExecutor(1) as writer,
        track(description=image_set.name, total=len(image_set), unit="image") as bar,
        torch.inference_mode(),
        float32_products(),
        tapped(network, options.taps) as taps,
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
    return Shards.complete(directory, rows, set=image_set.name, device=str(device))


def pass_batch_size(options: FeaturesConfig, device: torch.device | str) -> int:
    """Images in a batch of a pass: as set, else 32 on the CPU, whose caches it fits, or 256."""
    return options.batch_size or (32 if torch.device(device).type == "cpu" else 256)


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
