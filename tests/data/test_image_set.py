"""ImageSet: taking, decoding, fingerprints, unreadable files."""

import os
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from ood_helpers.config.images import FolderImages, NpzImages
from ood_helpers.data import ImageSet, open_image_set
from ood_helpers.data import image_set as module
from ood_helpers.errors import InputError, MissingDataError


def array_set(**changes) -> ImageSet:
    array = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    return ImageSet(
        **{"name": "set", "source": "memory", "array": array, "labels": np.arange(5) % 2, **changes}
    )


def open_folder(path, cache, **options) -> ImageSet:
    images = FolderImages(source="folder", path=str(path), subset=options.pop("subset", None))
    return open_image_set(images, "animals", cache_dir=cache, **options)


def test_taking_a_run_does_not_copy():
    images = array_set()
    run, scattered = images.take(np.arange(1, 4)), images.take(np.array([0, 2]))
    assert np.shares_memory(run.array, images.array)
    assert run.indices.tolist() == [1, 2, 3] and run.labels.tolist() == [1, 0, 1]
    assert np.array_equal(scattered.array, images.array[[0, 2]]) and scattered.indices.tolist() == [0, 2]
    assert scattered.take(np.array([1])).indices.tolist() == [2], "indices count in the source"


def test_array_fingerprint_covers_content_labels_and_choice():
    original = array_set().fingerprint
    other = array_set().array.copy()
    other[4, 1, 1, 2] ^= 1
    same = array_set(name="other name", source="elsewhere", array=np.asfortranarray(array_set().array))
    assert same.fingerprint == original
    changed = {
        "bytes": array_set(array=other),
        "shape": array_set(array=array_set().array.reshape(5, 1, 4, 3)),
        "labels": array_set(labels=np.array([0, 1, 0, 1, 1])),
        "no labels": array_set(labels=None),
        "subset": array_set().take(np.arange(4)),
        "place in source": array_set(indices=np.arange(1, 6)),
    }
    assert len({original, *(images.fingerprint for images in changed.values())}) == 7


def test_file_fingerprint_covers_content_names_labels_and_choice(class_folders, cache, tmp_path):
    original = open_folder(class_folders, cache).fingerprint
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(class_folders, copy)
    assert open_folder(copy, cache).fingerprint == original, "the place does not matter"
    assert open_folder(class_folders, cache, subset={"first": 3}).fingerprint != original
    assert open_folder(class_folders / "bee", cache).fingerprint != original

    (copy / "bee").rename(copy / "aaa")
    assert open_folder(copy, cache).fingerprint != original, "other labels and paths"
    (copy / "aaa").rename(copy / "bee")
    Image.new("RGB", (8, 6)).save(copy / "bee" / "0.png")
    assert open_folder(copy, cache).fingerprint != original, "other bytes"


def test_fingerprint_is_remembered_until_a_file_changes(class_folders, cache, monkeypatch):
    original = open_folder(class_folders, cache).fingerprint
    reads = []
    read = module._sha256_of_bytes
    monkeypatch.setattr(module, "_sha256_of_bytes", lambda path: reads.append(path) or read(path))
    assert open_folder(class_folders, cache).fingerprint == original and not reads
    path = class_folders / "ape" / "a.png"
    os.utime(path, ns=(1, 1))
    assert open_folder(class_folders, cache).fingerprint == original and len(reads) == 5
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert open_folder(class_folders, cache).fingerprint != original


def test_fingerprint_of_an_npz_is_remembered(tmp_path, cache, monkeypatch):
    np.savez(tmp_path / "set.npz", images=array_set().array)
    images = NpzImages(source="npz", path=str(tmp_path / "set.npz"))
    original = open_image_set(images, "set", cache_dir=cache).fingerprint
    monkeypatch.setattr(ImageSet, "_hash_content", lambda self: pytest.fail("read again"))
    assert open_image_set(images, "set", cache_dir=cache).fingerprint == original


def test_damaged_memory_of_a_fingerprint_is_replaced(class_folders, cache):
    original = open_folder(class_folders, cache).fingerprint
    for path in (cache / "fingerprints").iterdir():
        path.write_text('"abc')
    assert open_folder(class_folders, cache).fingerprint == original


def test_fingerprint_of_a_vanished_file(class_folders, cache):
    images = open_folder(class_folders, cache)
    (class_folders / "bee" / "1.png").unlink()
    with pytest.raises(InputError, match=r"bee.1\.png"):
        _ = images.fingerprint


def test_many_files_are_mapped_in_order(class_folders, cache, monkeypatch):
    original = open_folder(class_folders, cache).fingerprint
    monkeypatch.setattr(module, "FILES_AT_ONCE", 2)
    assert open_folder(class_folders, cache / "new").fingerprint == original


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "broken chunk"])
def test_unreadable_image_is_named_and_can_be_skipped(class_folders, cache, damage):
    path = class_folders / "ape" / "b.png"
    content = path.read_bytes()
    broken = {
        "truncated": content[:60],
        "text": b"no image",
        "empty": b"",
        "broken chunk": content[:20] + b"x" * 60,
    }
    path.write_bytes(broken[damage])
    images = open_folder(class_folders, cache)
    with pytest.raises(InputError, match=r"ape.b\.png.*--skip-unreadable"):
        images.image(1)
    left = open_folder(class_folders, cache, skip_unreadable=True)
    assert left.skipped == ["ape/b.png"] and left.indices.tolist() == [0, 2, 3, 4]
    assert left.labels.tolist() == [0, 0, 1, 1] and len(left) == 4
    assert left.fingerprint != images.fingerprint
    assert left.image(3).size == (8, 6)


def test_which_files_are_unreadable_is_remembered(class_folders, cache, monkeypatch):
    (class_folders / "ape" / "b.png").write_bytes(b"no image")
    open_folder(class_folders, cache, skip_unreadable=True)
    monkeypatch.setattr(module, "read_image", lambda path: pytest.fail("decoded again"))
    assert open_folder(class_folders, cache, skip_unreadable=True).skipped == ["ape/b.png"]


def test_skipping_everything_is_an_error(class_folders, cache):
    for path in class_folders.rglob("*.[pP][nN][gG]"):
        path.write_bytes(b"no image")
    with pytest.raises(MissingDataError, match="None of the 5 images"):
        open_folder(class_folders, cache, skip_unreadable=True)


def test_nothing_to_skip(class_folders, cache):
    images = open_folder(class_folders, cache, skip_unreadable=True)
    assert images.skipped == [] and len(images) == 5
    assert images.fingerprint == open_folder(class_folders, cache).fingerprint
    assert array_set().without_unreadable().skipped == []


def test_colour_modes_become_rgb(tmp_path):
    grey = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    rgba = np.dstack([grey, grey // 2, grey // 4, np.full_like(grey, 128)])
    palette = Image.fromarray(grey).convert("P")
    palette.putpalette([value for level in range(256) for value in (level, 0, 255 - level)])
    pictures = {
        "grey.png": (Image.fromarray(grey), np.dstack([grey] * 3)),
        "grey_alpha.png": (Image.fromarray(rgba[..., [0, 3]]), np.dstack([grey] * 3)),
        "rgba.png": (Image.fromarray(rgba), rgba[..., :3]),
        "palette.png": (palette, np.dstack([grey, grey * 0, 255 - grey])),
        "bit.png": (Image.fromarray(grey > 150), np.dstack([(grey > 150) * 255] * 3)),
        "deep.png": (Image.fromarray(grey.astype(np.uint16) * 257), np.dstack([grey] * 3)),
        "deep.tif": (Image.fromarray(grey.astype(np.uint16) * 257), np.dstack([grey] * 3)),
        "deep.pgm": (Image.fromarray(grey.astype(np.int32) * 257), np.dstack([grey] * 3)),
        "print.tif": (
            Image.fromarray(np.dstack([255 - grey] * 3 + [grey * 0]), "CMYK"),
            np.dstack([grey] * 3),
        ),
    }
    for name, (picture, expected) in pictures.items():
        picture.save(tmp_path / name)
        found = module.read_image(tmp_path / name)
        assert found.mode == "RGB", name
        assert np.array_equal(np.asarray(found), expected), name


def test_transparent_palette_gives_no_warning(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "gif.png", transparency=bytes([0, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = module.read_image(tmp_path / "gif.png")
    assert np.asarray(found).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_broken_off_jpeg_is_unreadable(tmp_path):
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    with pytest.raises(InputError, match=r"a\.jpg cannot be read \(image file is truncated"):
        module.read_image(tmp_path / "a.jpg")


def test_oversized_image_is_unreadable(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        module.read_image(tmp_path / "a.png")
