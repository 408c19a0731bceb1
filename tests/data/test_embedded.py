"""The embedded digits and the OOD sets made for them."""

import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ood_helpers.config.images import EmbeddedDigits, GeneratedImages
from ood_helpers.data import embedded, open_image_set


def rows(array: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in array}


def test_levels_are_those_of_sixteen_pixels():
    assert len(embedded.LEVELS) == 17 and embedded.LEVELS[0] == 0 and embedded.LEVELS[16] == 255
    bitmap = np.zeros((1, 32, 32), dtype=bool)
    bitmap[0, 4:8, 28:32] = True
    bitmap[0, 8, :3] = True
    counts = embedded._block_counts(bitmap)
    assert counts[0, 1, 7] == 16 and counts[0, 2, 0] == 3 and counts.sum() == 19


def test_digit_splits_partition_scikit_learns_digits():
    splits = {split: embedded.digits(split) for split in ("train", "validation", "test")}
    assert {split: len(labels) for split, (_, labels) in splits.items()} == {
        "train": 1000,
        "validation": 197,
        "test": 600,
    }
    together = np.concatenate([array for array, _ in splits.values()])[..., 0]
    originals = embedded.LEVELS[load_digits().images.astype(int)]
    assert sorted(image.tobytes() for image in together) == sorted(image.tobytes() for image in originals)
    assert not rows(splits["train"][0]) & rows(splits["test"][0])
    assert not rows(splits["validation"][0]) & rows(splits["test"][0])


@pytest.mark.parametrize(("split", "size"), embedded.SPLIT_SIZES.items())
def test_digit_splits_are_stratified(split, size):
    data = load_digits()
    expected = np.bincount(data.target) * size / len(data.target)
    array, labels = embedded.digits(split)
    assert np.abs(np.bincount(labels) - expected).max() <= 1
    lookup = dict(zip((image.tobytes() for image in embedded.LEVELS[data.images.astype(int)]), data.target))
    assert [lookup[image[..., 0].tobytes()] for image in array] == labels.tolist()


@pytest.mark.parametrize("name", embedded.GENERATORS)
def test_ood_sets(name, cache):
    def made(seed):
        source = GeneratedImages(source="embedded", set=name, count=150, seed=seed)
        return open_image_set(source, name, cache_dir=cache)

    first, again, other = made(3), made(3), made(4)
    assert first.array.shape == (150, 8, 8, 3) and first.array.dtype == np.uint8
    assert first.labels is None and first.class_names is None
    assert set(np.unique(first.array)) == set(embedded.LEVELS), "all 17 levels of the digits and no other"
    assert (first.array == first.array[..., :1]).all(), "grey"
    assert np.array_equal(first.array, again.array) and first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert len(rows(first.array)) > 140
    # Mean ink must not tell the sets apart: within a third of the digits'.
    digits = embedded.digits("train")[0].mean()
    assert abs(first.array.mean() - digits) < digits / 3


def test_sets_of_one_seed_differ():
    arrays = [generator(20, 0) for generator in embedded.GENERATORS.values()]
    assert len(set.union(*map(rows, arrays))) >= 95


def test_letters_look_like_no_digit():
    assert not set(embedded.LETTERS) & set("OoDQIlijJLSsZzBbGgq0123456789")


def test_letters_fill_the_height():
    array = embedded.letters(60, 0)[..., 0]
    assert (array[:, 0].max(axis=1) > 0).mean() > 0.9 and (array[:, 7].max(axis=1) > 0).mean() > 0.9


def test_chimeras_join_test_digits_of_different_classes():
    counts, labels = embedded._digit_split("test")
    digits = embedded.LEVELS[counts]

    def classes_of(half, where):
        return set(labels[(digits[where] == half).all(axis=(1, 2))])

    upper, lower = np.s_[:, :4], np.s_[:, 4:]
    left, right = np.s_[:, :, :4], np.s_[:, :, 4:]
    kinds = []
    for image in embedded.chimeras(2000, 5)[..., 0]:
        vertical = classes_of(image[:4], upper), classes_of(image[4:], lower)
        sideways = classes_of(image[:, :4], left), classes_of(image[:, 4:], right)
        found = vertical if all(vertical) else sideways
        assert all(found), "both halves are halves of test digits"
        assert len(found[0] | found[1]) > 1, "of two classes"
        kinds.append(all(vertical))
    assert 0.2 < np.mean(kinds) < 0.8, "both ways of joining"


def test_jigsaws_are_validation_digits_in_another_order():
    def quarters(image):
        return sorted(image[y : y + 4, x : x + 4].tobytes() for y in (0, 4) for x in (0, 4))

    digits = {image.tobytes(): quarters(image) for image in embedded.digits("validation")[0][..., 0]}
    for image in embedded.jigsaw(50, 1)[..., 0]:
        assert quarters(image) in digits.values()
    assert sum(image.tobytes() in digits for image in embedded.jigsaw(500, 1)[..., 0]) < 10  # equal quarters


def test_digits_as_image_set(cache):
    source = EmbeddedDigits(source="embedded", set="digits", split="test")
    digits = open_image_set(source, "digits", cache_dir=cache)
    assert digits.class_names == tuple("0123456789") and digits.name == "digits"
    assert "test" in digits.source
    assert digits.image(0).mode == "RGB" and digits.image(0).size == (8, 8)
    digits.labels[:] = 0
    assert embedded.digits("test")[1].max() == 9, "changing one set leaves the next alone"


def test_the_images_do_not_depend_on_the_vector_unit():
    """Sorts that are not stable and the last digits of sines differ between processors."""
    code = (
        "from ood_helpers.data.embedded import GENERATORS\nfrom hashlib import sha256\n"
        "for name in ('textures', 'noise'): print(sha256(GENERATORS[name](40, 0).tobytes()).hexdigest())"
    )
    found = set()
    for disabled in ("", "X86_V4 AVX512_ICL AVX512_SPR", "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"):
        environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": disabled}
        command = [sys.executable, "-W", "ignore", "-c", code]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0 or disabled  # what this numpy is built on cannot be disabled
        found |= {finished.stdout} if finished.returncode == 0 else set()
    assert len(found) == 1
