"""cifar10_sample against a local mirror: from the bytes of archives to the image sets of cifar10_npz."""

import shutil

import numpy as np
import pytest
from labels import LABELS
from PIL import Image
from sample_mirror import list_sums, make_mirror, place, serve, tar_gz
from torchvision import datasets

from ood_helpers.config import load_config
from ood_helpers.config.images import ArchiveImages
from ood_helpers.data import archives, open_image_set
from ood_helpers.errors import InputError, MissingDataError
from ood_helpers.experiment import Experiment
from ood_helpers.image_sets import ImageSets


@pytest.fixture(scope="module")
def files(shared, tmp_path_factory):
    """The folder of a mirror."""
    folder = tmp_path_factory.mktemp("mirror")
    make_mirror(shared, folder)
    return folder


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror in `tmp_path`, without files; what it lists is read anew."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    archives._sums.cache_clear()
    with serve(folder) as address:
        monkeypatch.setenv(archives.MIRROR, address + "/")
        yield folder
    archives._sums.cache_clear()


def test_its_rows_are_those_of_the_shipped_networks(tmp_path):
    run = Experiment.open("cifar10_sample", run_dir=str(tmp_path), figures_dir=str(tmp_path), device="cpu")
    labels = [row.label.replace(", 65 % of the steps)", ")") for row in run.rows().values()]
    labels = [label.removesuffix(" (65 % of the steps)") for label in labels]
    exposed = [
        f"{score} + {name}" for name in ("OE", "energy margins") for score in ("MSP", "Energy", "ODIN")
    ]
    assert labels == [label for label in LABELS if "UMAP" not in label] + exposed
    assert all(
        ("65 % of the steps" in row.label) == (row.network.name == "dfb") for row in run.rows().values()
    )
    assert run.training_methods() == {
        "classifier",
        "dense",
        "unleashing_mask",
    }  # nothing to compare with outliers
    assert "Tiny-ImageNet" in run.network("oe").unreported() and run.config.tuning is None


def sets_of(config, data_root, tmp_path):
    return ImageSets(load_config(config, data_root), tmp_path / "cache" / config)


def test_the_public_archives_give_the_images_of_the_npz_files(shared, files, mirror, tmp_path):
    shutil.copytree(files, mirror, dirs_exist_ok=True)
    ours, theirs = (
        sets_of("cifar10_sample", tmp_path / "data", tmp_path),
        sets_of("cifar10_npz", shared, tmp_path),
    )
    ours.check()
    expected = {name: theirs[name].fingerprint for name in theirs if name not in ("tuning", "outliers")}
    assert {name: ours[name].fingerprint for name in ours} == expected
    assert "shrunk to 32 x 32" in ours["Textures"].source and len(ours["Textures"].class_names) == 11
    shutil.rmtree(mirror)  # all is there
    assert sets_of("cifar10_sample", tmp_path / "data", tmp_path)["train"].fingerprint == expected["train"]


@pytest.mark.parametrize("listed", [True, False])
def test_other_bytes_are_refused(files, mirror, tmp_path, listed):
    place(mirror, datasets.CIFAR100.url).write_bytes(b"another file")
    if listed:
        shutil.copy(files / "SHA256SUMS", mirror)
    wanted = "check the mirror and its SHA256SUMS" if listed else f"expected {datasets.CIFAR100.tgz_md5}"
    with pytest.raises(InputError, match=wanted) as error:
        sets_of("cifar10_sample", tmp_path / "data", tmp_path)["CIFAR-100"]
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert not list((tmp_path / "data").iterdir())


def test_the_files_of_an_archive_need_the_checksums_of_torchvision_without_a_mirror(
    files, mirror, tmp_path, monkeypatch
):
    shutil.copytree(files, mirror, dirs_exist_ok=True)
    assert len(sets_of("cifar10_sample", tmp_path / "data", tmp_path)["CIFAR-100"]) == 916
    monkeypatch.delenv(archives.MIRROR)
    with pytest.raises(InputError, match="torchvision cannot read CIFAR100"):
        sets_of("cifar10_sample", tmp_path / "data", tmp_path)["CIFAR-100"]


def test_a_mirror_without_a_file_or_an_answer(mirror, tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    with pytest.raises(MissingDataError, match=r"HTTP status 404.*curl .*/somewhere\.org/file\.bin"):
        archives.fetch("https://somewhere.org/file.bin?dl=1", path)
    monkeypatch.setenv(archives.MIRROR, "http://127.0.0.1:9")
    with pytest.raises(MissingDataError, match=r"gives no SHA256SUMS .*; correct OOD_MIRROR, or unset it"):
        archives.fetch("https://somewhere.org/file.bin", path)


def test_images_are_shrunk_in_the_order_of_their_names(mirror, tmp_path):
    """Against the rule written out: side * 32 / short, rounded, and the same margins (the odd pixel right and below)."""
    generator = np.random.default_rng(0)
    sizes = [(32, 32), (40, 50), (300, 640), (501, 333), (33, 32), (16, 20), (47, 95), (1000, 64)]
    url, members, expected = "https://somewhere.org/dtd.tar.gz", {}, {}
    for number, (width, height) in enumerate(sizes):
        for category in ("banded", "woven", "bumpy"):
            picture = Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
            kind, suffix = [("JPEG", "jpg"), ("PNG", "png")][number % 2]
            name = f"dtd/images/{category}/{category}_{number:04}.{suffix}"
            picture.save(tmp_path / "picture", kind)
            members[name] = (tmp_path / "picture").read_bytes()
            picture = Image.open(tmp_path / "picture").convert("RGB")
            scale = 32 / min(width, height)
            wide, high = max(32, round(width * scale)), max(32, round(height * scale))
            pixels = np.asarray(picture.resize((wide, high), Image.Resampling.BILINEAR))
            x, y = (wide - 32) // 2, (high - 32) // 2
            expected[name] = pixels[y : y + 32, x : x + 32]
    tar_gz(place(mirror, url), dict(reversed(members.items())))
    list_sums(mirror)
    source = {
        "source": "archive",
        "url": url,
        "directory": str(tmp_path),
        "folder": "dtd/images",
        "shrink": 32,
    }
    images = open_image_set(
        ArchiveImages(**source, subset={"first": 16}), "textures", cache_dir=tmp_path / "cache"
    )
    of_two = [expected[name] for name in sorted(expected) if "woven" not in name]
    assert np.array_equal(images.array, of_two) and images.labels.tolist() == [0] * 8 + [1] * 8
    runs = ArchiveImages(**source, subset={"runs": [[1, 3], [8, 9]]})
    images = open_image_set(runs, "textures", cache_dir=tmp_path / "cache")
    assert np.array_equal(images.array, [of_two[i] for i in (1, 2, 8)])
    assert images.labels.tolist() == [0, 0, 1] and images.indices.tolist() == [0, 1, 2]
