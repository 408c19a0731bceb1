"""From image to network input: geometry on PIL images, normalisation on batches."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ood_helpers.config.images import TransformConfig
from ood_helpers.data.image_set import ImageSet
from ood_helpers.errors import InputError
from ood_helpers.files import sha256_of_json


class Transform(TransformConfig):
    """Resize, centre crop, scale to [0, 1], normalise per channel; `Transform(**dict(config.transform))`.

    The result is that of torchvision's Resize, CenterCrop, ToTensor, Normalize on a PIL image. Geometry and
    normalisation are apart so that batches travel as uint8, a quarter of the bytes.
    """

    def geometry(self, image: Image.Image) -> np.ndarray:
        """Resize and centre crop.

        An integer `resize` is the length of the shorter side and keeps the aspect ratio; [height, width]
        squashes. Reducing is antialiased. An image smaller than the crop is padded with black.

        Returns
        -------
        uint8 [h, w, 3]
        """
        # imported late, as all of torchvision: that takes a second, which arrays of the right size do not need
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        if self.resize is not None:
            size = [self.resize] if isinstance(self.resize, int) else list(self.resize)
            image = functional.resize(image, size, interpolation=InterpolationMode(self.interpolation))
        if self.crop is not None:
            image = functional.center_crop(image, [self.crop, self.crop])
        return np.array(image)

    def keeps(self, height: int, width: int) -> bool:
        """Whether geometry changes nothing on images of this size."""
        same_size = self.resize in (None, min(height, width), (height, width))
        return same_size and (self.crop is None or self.crop == height == width)

    def fixes_size(self) -> bool:
        """Whether images of any size come out with the same size."""
        return self.crop is not None or isinstance(self.resize, tuple)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(x / 255 - mean) / std of uint8 [B, 3, H, W]; float32 on the same device."""
        channels = torch.tensor([self.mean, self.std], dtype=torch.float32, device=images.device)
        mean, std = channels[:, :, None, None]
        return images.to(torch.float32).div(255).sub_(mean).div_(std)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all settings, as hexadecimal digits."""
        return sha256_of_json(self.model_dump(mode="json"))


class _Pictures(torch.utils.data.Dataset):
    """Images of a set after the transform's geometry.

    Errors are handed back as values: raised in a worker process they would arrive as a traceback.
    """

    def __init__(self, image_set: ImageSet, transform: Transform) -> None:
        self.image_set, self.transform = image_set, transform

    def __getitem__(self, i: int) -> np.ndarray | InputError:
        try:
            return self.transform.geometry(self.image_set.image(i))
        except InputError as error:
            return error


def _collate(pictures: list[np.ndarray | InputError]) -> torch.Tensor | InputError:
    for picture in pictures:
        if isinstance(picture, InputError):
            return picture
        if picture.shape != pictures[0].shape:
            return _size_error(pictures[0].shape, picture.shape)
    return torch.from_numpy(np.stack([picture.transpose(2, 0, 1) for picture in pictures]))


def _size_error(expected: tuple[int, ...], found: tuple[int, ...]) -> InputError:
    return InputError(
        f"The images end with different sizes, {expected[0]} x {expected[1]} and {found[0]} x {found[1]} (height x width); "
        "set transform.crop, or transform.resize to [height, width]."
    )


def image_batches(
    image_set: ImageSet, transform: Transform, start: int, stop: int, batch_size: int, workers: int = 0
) -> Iterator[torch.Tensor]:
    """Items start, ..., stop - 1 of a set, in order, after the transform's geometry.

    An array whose size the transform keeps is sliced; other images pass through PIL one by one, files in
    `workers` processes (0 = in this one).

    Yields
    ------
    uint8 [B, 3, H, W], B = batch_size but for the last

    Raises
    ------
    InputError : a file cannot be decoded, or the images end with different sizes
    """
    if not 0 <= start <= stop <= len(image_set):
        raise InputError(
            f"Found a request for images {start} to {stop} of {image_set.name}, expected some of its {len(image_set)}; ask for fewer."
        )
    spans = [(first, min(first + batch_size, stop)) for first in range(start, stop, batch_size)]
    yield from spanned_batches(image_set, transform, spans, workers)


def spanned_batches(
    image_set: ImageSet, transform: Transform, spans: Sequence[tuple[int, int]], workers: int = 0
) -> Iterator[torch.Tensor]:
    """As `image_batches`, with a batch of items first, ..., stop - 1 for each (first, stop) of `spans`."""
    for first, stop in spans:
        if not 0 <= first < stop <= len(image_set):
            raise InputError(
                f"Found a request for images {first} to {stop} of {image_set.name}, expected some of its {len(image_set)}; ask for fewer."
            )
    array = image_set.array
    if array is not None and transform.keeps(*array.shape[1:3]):
        for first, stop in spans:
            yield torch.from_numpy(np.array(array[first:stop].transpose(0, 3, 1, 2), order="C"))
        return

    shape = None
    if spans and array is None and not transform.fixes_size():
        # The first image of the whole set, so that calls for different parts agree.
        shape = transform.geometry(image_set.image(0)).shape
    loader = DataLoader(
        _Pictures(image_set, transform),
        batch_sampler=[range(*span) for span in spans],
        num_workers=0 if array is not None else min(workers, len(spans)),
        collate_fn=_collate,
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        if shape is not None and tuple(batch.shape[2:]) != shape[:2]:
            raise _size_error(shape, tuple(batch.shape[2:]))
        yield batch
