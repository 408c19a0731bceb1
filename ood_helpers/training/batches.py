"""Batches of images on their way to a network, and what is measured on them."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.transforms import Transform
from ood_helpers.errors import InputError


class Softmax:
    """How logits become a loss and a class: by a flat softmax; that of MOS is another one."""

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each sample [B], of logits [B, L] and labels [B]."""
        return F.cross_entropy(logits, labels, reduction="none")

    def classify(self, logits: Tensor) -> Tensor:
        """Predicted classes [B] of logits [B, L]."""
        return logits.argmax(dim=1)


FLAT = Softmax()


def percent_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows whose largest logit is at the label, in percent."""
    return 100 * (logits.detach().argmax(dim=1) == labels).float().mean()


def evaluate(
    network: nn.Module,
    image_set: ImageSet,
    transform: Transform,
    batch_size: int,
    device: str | torch.device,
    softmax: Softmax = FLAT,
) -> dict[str, float]:
    """Mean loss and accuracy (percent) on a labelled image set; the network in eval mode."""
    network.eval()
    batches = (
        to_network(load_images(image_set, transform, rows), image_set, rows, transform, device)
        for rows in torch.arange(len(image_set)).split(batch_size)
    )
    with torch.inference_mode():
        return evaluate_logits(((network(images), labels) for images, labels in batches), softmax)


def evaluate_logits(batches: Iterable[tuple[Tensor, Tensor]], softmax: Softmax = FLAT) -> dict[str, float]:
    """Mean loss and accuracy (percent) of batches of logits [B, L] and labels [B]."""
    total, correct, images = 0.0, 0, 0
    for logits, labels in batches:
        total += float(softmax.losses(logits, labels).sum())
        correct += int((softmax.classify(logits) == labels).sum())
        images += len(labels)
    return {"loss": total / images, "accuracy": 100 * correct / images}


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Number of batches of an epoch; a last batch of one image is left out, as batch norm needs two.

    Raises
    ------
    InputError : no batch of two images can be made
    """
    if images < 2 or batch_size < 2:
        raise InputError(
            f"Found {images} training images and batch_size={batch_size}, expected at least 2 of both; "
            "take more images or a larger batch."
        )
    return images // batch_size + (images % batch_size > 1)


def augmented_batches(
    image_set: ImageSet,
    transform: Transform,
    recipe: Any,
    generator: torch.Generator,
    device: str | torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order: (normalised images [B, 3, h, w] in channels_last, labels [B]) on `device`.

    Order, crops and flips come from `generator` alone, whatever the device. recipe : gives batch_size, crop_padding, flip
    """
    order = torch.randperm(len(image_set), generator=generator)
    for rows in order.split(recipe.batch_size)[: steps_per_epoch(len(image_set), recipe.batch_size)]:
        images = augment(load_images(image_set, transform, rows), recipe.crop_padding, recipe.flip, generator)
        yield to_network(images, image_set, rows, transform, device)


def load_images(image_set: ImageSet, transform: Transform, rows: Tensor) -> Tensor:
    """The images `rows` after the transform's geometry, uint8 [B, h, w, 3].

    Taken straight from the set's array where the transform keeps its size, otherwise through PIL.
    """
    if image_set.array is not None and transform.keeps(*image_set.array.shape[1:3]):
        return torch.from_numpy(image_set.array[rows.numpy()])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        images = list(threads.map(lambda row: transform.geometry(image_set.image(row)), rows.tolist()))
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise InputError(
            f"The images of {image_set.name} have several sizes after the transform "
            f"({', '.join(map(str, sorted(sizes)))}), expected one; give the transform a resize [height, width] or a crop."
        )
    return torch.from_numpy(np.stack(images))


def augment(
    images: Tensor,
    crop_padding: int,
    flip: bool,
    generator: torch.Generator,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """A random crop of each zero-padded image to its own or another size, and a horizontal flip of every second on
    average.

    images uint8 [B, h, w, 3]; padding in pixels on each side, 0 for none; size [height, width] of the crop, at most that
    of the padded images. All images in one gather.
    """
    count = len(images)
    height, width = images.shape[1:3] if size is None else size
    spare = [images.shape[axis] + 2 * crop_padding - side for axis, side in ((1, height), (2, width))]
    top, left = (torch.randint(0, most + 1, (count,), generator=generator) for most in spare)
    mirrored = torch.rand(count, generator=generator) < (0.5 if flip else 0.0)
    if crop_padding:
        images = F.pad(images, (0, 0, crop_padding, crop_padding, crop_padding, crop_padding))
    elif not flip and not any(spare):
        return images
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + left[:, None]
    rows = torch.arange(height) + top[:, None]
    return images[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def check_labels(image_set: ImageSet, num_classes: int) -> None:
    """Raise an InputError unless every image has a label in 0 .. num_classes - 1."""
    if image_set.labels is None:
        raise InputError(
            f"The image set {image_set.name} has no labels, expected the class of each image; add them to the set."
        )
    if len(image_set) and not 0 <= image_set.labels.min() <= image_set.labels.max() < num_classes:
        raise InputError(
            f"The image set {image_set.name} has labels {image_set.labels.min()} to {image_set.labels.max()}, expected "
            f"0 to {num_classes - 1}; correct num_classes or the labels."
        )


def to_network(
    images: Tensor, image_set: ImageSet, rows: Tensor, transform: Transform, device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """`to_inputs` of images, and their labels, on `device`."""
    labels = torch.from_numpy(np.asarray(image_set.labels)[rows.numpy()]).to(device)
    return to_inputs(images, transform, device), labels


def to_inputs(images: Tensor, transform: Transform, device: str | torch.device) -> Tensor:
    """uint8 [B, h, w, 3] -> normalised float [B, 3, h, w] in channels_last on `device`."""
    # Seen as [B, 3, h, w], an image-major array already has the channels_last layout.
    inputs = transform.normalise(images.to(device).permute(0, 3, 1, 2))
    return inputs.contiguous(memory_format=torch.channels_last)
