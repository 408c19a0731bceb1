"""Transform equals torchvision's transforms on PIL images; image_batches keeps the order."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from ood_helpers.config.images import FolderImages
from ood_helpers.data import ImageSet, Transform, image_batches, open_image_set, spanned_batches
from ood_helpers.errors import InputError

STATISTICS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def photos(sizes, tmp_path) -> ImageSet:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (height, width) in enumerate(sizes):
        picture(height, width, i).save(folder / f"{i:03}.png")
    images = FolderImages(source="folder", path=str(folder))
    return open_image_set(images, "photos", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(50, 37), (20, 61), (32, 32), (9, 9)])
@pytest.mark.parametrize(
    ("resize", "crop"), [(32, 32), (24, None), ((32, 32), None), ((20, 40), 16), (None, 32), (16, 21)]
)
def test_equals_torchvision(size, resize, crop, interpolation):
    steps = [T.Resize(resize, InterpolationMode(interpolation))] if resize else []
    steps += [T.CenterCrop(crop)] if crop else []
    expected = np.asarray(T.Compose(steps)(picture(*size)))
    transform = Transform(resize=resize, crop=crop, interpolation=interpolation, **STATISTICS)
    found = transform.geometry(picture(*size))
    assert found.dtype == np.uint8 and np.array_equal(found, expected)
    if transform.keeps(*size):
        assert np.array_equal(found, np.asarray(picture(*size)))


def test_aspect_ratio():
    assert Transform(resize=16, **STATISTICS).geometry(picture(40, 100)).shape == (16, 40, 3)
    assert Transform(resize=(16, 16), **STATISTICS).geometry(picture(40, 100)).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("settings", "size", "kept"),
    [
        ({}, (5, 7), True),
        ({"resize": 5}, (5, 7), True),
        ({"resize": 7}, (5, 7), False),
        ({"resize": (5, 7)}, (5, 7), True),
        ({"resize": (7, 5)}, (5, 7), False),
        ({"resize": 32, "crop": 32}, (32, 32), True),
        ({"resize": 32, "crop": 32}, (32, 33), False),
        ({"crop": 28}, (32, 32), False),
        ({"crop": 40}, (32, 32), False),
    ],
)
def test_keeps(settings, size, kept):
    assert Transform(**settings, **STATISTICS).keeps(*size) is kept


def test_normalise_equals_torchvision():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8))
    transform = Transform(**STATISTICS)
    reference = T.Compose([T.ToTensor(), T.Normalize(*STATISTICS.values())])
    expected = torch.stack([reference(image.permute(1, 2, 0).numpy()) for image in images])
    inputs = transform.normalise(images)
    assert inputs.dtype == torch.float32 and torch.equal(inputs, expected)


def test_fingerprint_covers_every_setting():
    settings = {"resize": 32, "crop": 28, "interpolation": "bicubic", **STATISTICS}
    changes = {
        "resize": (32, 32),
        "crop": 27,
        "interpolation": "bilinear",
        "mean": (0.5, 0.4822, 0.4465),
        "std": (1, 1, 1),
    }
    fingerprints = {Transform(**{**settings, key: value}).fingerprint for key, value in changes.items()}
    assert len(fingerprints | {Transform(**settings).fingerprint}) == 6
    assert Transform(**dict(Transform(**settings))).fingerprint == Transform(**settings).fingerprint


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("side", [8, 1])
def test_batches_of_an_array(writable, side):
    array = np.random.default_rng(0).integers(0, 256, (10, side, side, 3), dtype=np.uint8)
    array.flags.writeable = writable
    images = ImageSet("set", "memory", array=array)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of tensors on read-only memory
        batches = list(image_batches(images, Transform(**STATISTICS), 2, 9, 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert all(batch.dtype == torch.uint8 and batch.is_contiguous() for batch in batches)
    assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1), array[2:9])
    batches[0].zero_()
    assert array[2:5].any(), "a batch is a copy"


def test_arrays_that_the_transform_changes_go_through_it():
    array = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    transform = Transform(resize=12, crop=10, **STATISTICS)
    batches = list(image_batches(ImageSet("set", "memory", array=array), transform, 1, 5, 3, workers=2))
    expected = [transform.geometry(Image.fromarray(image)) for image in array[1:]]
    assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_files_are_in_order(tmp_path, workers):
    sizes = [(20 + i, 40 - i) for i in range(11)]
    images, transform = photos(sizes, tmp_path), Transform(resize=16, crop=16, **STATISTICS)
    batches = list(image_batches(images, transform, 1, 11, 4, workers))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    expected = [transform.geometry(picture(*size, i)) for i, size in enumerate(sizes)][1:]
    assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_file_in_a_batch_is_one_sentence(tmp_path, workers):
    images = photos([(8, 8)] * 4, tmp_path)
    (tmp_path / "photos" / "002.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"^The image .*002\.png cannot be read .*--skip-unreadable[^\n]*$"):
        list(image_batches(images, Transform(**STATISTICS), 0, 4, 2, workers))


@pytest.mark.parametrize(("start", "batch_size"), [(0, 4), (0, 2), (2, 2)])
def test_different_sizes_are_an_error(tmp_path, start, batch_size):
    images = photos([(8, 8), (8, 8), (8, 9), (8, 9)], tmp_path)
    with pytest.raises(InputError, match=r"8 x 8 and 8 x 9.*transform\.crop"):
        list(image_batches(images, Transform(**STATISTICS), start, 4, batch_size))
    assert len(list(image_batches(images, Transform(resize=(8, 8), **STATISTICS), start, 4, 4))) == 1


def test_bounds():
    images = ImageSet("set", "memory", array=np.zeros((3, 2, 2, 3), np.uint8))
    assert list(image_batches(images, Transform(**STATISTICS), 3, 3, 2)) == []
    with pytest.raises(InputError, match="expected some of its 3"):
        list(image_batches(images, Transform(**STATISTICS), 0, 4, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_spans_say_which_items_make_a_batch(tmp_path, workers):
    array = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 6, 6, 3), np.uint8)
    for i, image in enumerate(array):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    files = sorted(path.name for path in tmp_path.glob("*.png"))
    spans = [(0, 3), (3, 4), (9, 12)]
    for images in (
        ImageSet("array", "memory", array=array),
        ImageSet("files", "disk", root=tmp_path, files=files),
    ):
        for transform in (Transform(**STATISTICS), Transform(crop=4, **STATISTICS)):
            batches = list(spanned_batches(images, transform, spans, workers))
            assert [batch[:, 0, 0, 0].tolist() for batch in batches] == [[0, 1, 2], [3], [9, 10, 11]]
