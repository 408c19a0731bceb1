"""open_image_set: every source, subsets, and what is said when data are missing or broken."""

import hashlib
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from ood_helpers.config import images as config
from ood_helpers.data import archives, open_image_set
from ood_helpers.errors import InputError, MissingDataError


def npz(tmp_path, cache, subset=None, save=np.savez, **arrays):
    save(tmp_path / "set.npz", **arrays)
    return open_image_set(
        config.NpzImages(source="npz", path=str(tmp_path / "set.npz"), subset=subset), "set", cache_dir=cache
    )


def pictures(count: int = 6, side: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def folder(path, cache, **options):
    return open_image_set(
        config.FolderImages(source="folder", path=str(path), **options), "set", cache_dir=cache
    )


# folder


def test_class_folders(class_folders, cache):
    (class_folders / ".hidden").mkdir()
    (class_folders / "__MACOSX").mkdir()
    (class_folders / "ape" / "._a.png").write_bytes(b"resource fork")
    (class_folders / "ape" / "notes.txt").write_text("no image")
    (class_folders / "README.md").write_text("no image")
    images = folder(class_folders, cache)
    assert images.files == ["ape/a.png", "ape/b.png", "ape/deep/c.PNG", "bee/0.png", "bee/1.png"]
    assert images.labels.tolist() == [0, 0, 0, 1, 1] and images.labels.dtype == np.int64
    assert images.class_names == ("ape", "bee") and images.array is None
    with Image.open(class_folders / "bee" / "0.png") as expected:
        assert np.array_equal(np.asarray(images.image(3)), np.asarray(expected))


def test_flat_folder_has_no_labels(class_folders, cache):
    images = folder(class_folders / "bee", cache)
    assert images.files == ["0.png", "1.png"] and images.labels is None and images.class_names is None


def test_folder_errors(class_folders, cache, tmp_path):
    with pytest.raises(MissingDataError, match=r"no folder .*nowhere; put the images there"):
        folder(tmp_path / "nowhere", cache)
    (class_folders / "cat").mkdir()
    with pytest.raises(InputError, match=r"class folder .*cat holds no image"):
        folder(class_folders, cache)
    shutil.copy(class_folders / "bee" / "0.png", class_folders / "0.png")
    with pytest.raises(InputError, match=r"holds both images \(0.png\) and folders"):
        folder(class_folders, cache)
    with pytest.raises(MissingDataError, match="holds no images"):
        folder(class_folders / "cat", cache)


# subset


def test_subset_first_is_a_slice_of_the_mapped_file(tmp_path, cache):
    images = npz(tmp_path, cache, {"first": 4}, images=pictures())
    assert isinstance(images.array, np.memmap) and images.indices.tolist() == [0, 1, 2, 3]
    assert np.array_equal(images.array, pictures()[:4]) and "the first 4 of 6" in images.source


@pytest.mark.parametrize(
    ("subset", "taken"), [({"after": 2}, [2, 3, 4, 5]), ({"after": 2, "first": 3}, [2, 3, 4])]
)
def test_subset_after_leaves_out_the_first(tmp_path, cache, subset, taken):
    image_set = npz(tmp_path, cache, subset, images=pictures(), labels=np.arange(6))
    assert image_set.labels.tolist() == taken
    assert image_set.source.endswith(f"number 3 to {3 + len(taken) - 1} of 6")
    assert np.array_equal(image_set.array, pictures()[taken])


def test_runs_make_up_a_set_of_their_own(tmp_path, cache):
    """It has the fingerprint of a file with these images alone."""
    labels = np.arange(6)
    image_set = npz(tmp_path, cache, {"runs": [[0, 2], [3, 4], [5, 6]]}, images=pictures(), labels=labels)
    assert image_set.labels.tolist() == [0, 1, 3, 5] and image_set.indices.tolist() == [0, 1, 2, 3]
    assert image_set.source.endswith("; 4 in 3 runs of 6")
    alone = npz(tmp_path, cache, images=pictures()[[0, 1, 3, 5]], labels=labels[[0, 1, 3, 5]])
    assert image_set.fingerprint == alone.fingerprint


def test_subset_per_class_is_in_file_order(tmp_path, cache):
    labels = np.array([7, 2, 2, 7, 2, 7])
    images = npz(tmp_path, cache, {"per_class": 2}, images=pictures(), labels=labels)
    assert images.indices.tolist() == [0, 1, 2, 3] and images.labels.tolist() == [7, 2, 2, 7]
    images = npz(tmp_path, cache, {"per_class": 1}, images=pictures(), labels=labels[::-1])
    assert images.indices.tolist() == [0, 1] and np.array_equal(images.array, pictures()[:2])
    images = npz(tmp_path, cache, {"per_class": 50}, images=pictures(600), labels=np.arange(600) % 3)
    assert images.indices.tolist() == list(range(150))


def test_subset_random(tmp_path, cache):
    def taken(seed):
        return npz(tmp_path, cache, {"random": 20, "seed": seed}, images=pictures(100)).indices.tolist()

    assert taken(1) == taken(1) == sorted(set(taken(1))) and len(taken(1)) == 20
    assert taken(1) != taken(2) and taken(1) != list(range(20))


def test_subset_errors(tmp_path, cache):
    arrays = {"images": pictures(), "labels": np.array([0, 0, 0, 1, 1, 2])}
    for subset in (
        {"first": 7},
        {"random": 7},
        {"after": 6},
        {"after": 3, "first": 4},
        {"runs": [[0, 2], [3, 7]]},
    ):
        with pytest.raises(InputError, match="subset of 7 images was asked of set, which has 6"):
            npz(tmp_path, cache, subset, **arrays)
    with pytest.raises(InputError, match="whose class 2 has 1"):
        npz(tmp_path, cache, {"per_class": 2}, **arrays)
    with pytest.raises(InputError, match="no labels"):
        npz(tmp_path, cache, {"per_class": 2}, images=pictures())


# list


def image_list(class_folders, text, cache, labelled=True, class_numbering="as_is", **options):
    path = class_folders.parent / "list.txt"
    path.write_text(text, encoding="utf-8")
    source = config.ListImages(
        source="list",
        path=str(path),
        root=str(class_folders),
        labelled=labelled,
        class_numbering=class_numbering,
    )
    return open_image_set(source, "listed", cache_dir=cache, **options)


def test_list(class_folders, cache):
    (class_folders / "bee" / "0.png").rename(class_folders / "bee" / "a b 1.png")
    images = image_list(class_folders, "bee/a b 1.png 4\r\n\nape/a.png\t0\n", cache)
    assert images.files == ["bee/a b 1.png", "ape/a.png"] and images.labels.tolist() == [4, 0]
    images = image_list(class_folders, "bee/a b 1.png\nape/a.png", cache, labelled=False)
    assert images.files == ["bee/a b 1.png", "ape/a.png"] and images.labels is None
    assert images.image(1).size == (8, 6)


def test_list_with_minus_one_everywhere_has_no_labels(class_folders, cache):
    assert image_list(class_folders, "ape/a.png -1\nape/b.png -1\n", cache).labels is None
    with pytest.raises(InputError, match="class number -1"):
        image_list(class_folders, "ape/a.png -1\nape/b.png 1\n", cache)


def test_list_with_the_class_numbers_of_the_devkit(class_folders, cache):
    lines = "ape/a.png 0\nape/b.png 448\nbee/0.png 888\n"

    def labels(text, **options):
        return image_list(class_folders, text, cache, class_numbering="ilsvrc2012_devkit", **options).labels

    assert labels(lines).tolist() == [278, 0, 999], "kit fox, tench, toilet tissue"
    assert image_list(class_folders, lines, cache).labels.tolist() == [0, 448, 888]
    assert labels("ape/a.png -1\nape/b.png -1\n") is None
    assert labels("ape/a.png\nape/b.png\n", labelled=False) is None
    with pytest.raises(InputError, match="class number 1000, expected devkit ids minus 1, 0 to 999"):
        labels("ape/a.png 0\nape/b.png 1000\n")


def test_list_errors(class_folders, cache):
    with pytest.raises(
        InputError, match=r"Line 2 of .*list\.txt is 'ape/b\.png', expected a path and a class number"
    ):
        image_list(class_folders, "ape/a.png 0\nape/b.png\n", cache)
    with pytest.raises(InputError, match="is empty"):
        image_list(class_folders, "\n", cache)
    with pytest.raises(
        MissingDataError,
        match=r"1 of the 2 images of listed are missing below .*animals, the first is ape/x\.png",
    ):
        image_list(class_folders, "ape/a.png 0\nape/x.png 0\n", cache)
    assert image_list(class_folders, "ape/x.png 0\nape/a.png 0\n", cache, skip_unreadable=True).skipped == [
        "ape/x.png"
    ]
    (class_folders.parent / "list.txt").write_bytes(b"\xff\xfe")
    for changes, message in (
        ({}, "not UTF-8"),
        ({"path": "/nowhere/list.txt"}, "no image list /nowhere/list.txt"),
        ({"root": "/nowhere"}, "no folder /nowhere for the images"),
    ):
        settings = {"path": str(class_folders.parent / "list.txt"), "root": str(class_folders), **changes}
        with pytest.raises(InputError, match=message):
            open_image_set(config.ListImages(source="list", **settings), "listed", cache_dir=cache)


# npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, cache, save):
    arrays = {"labels": np.array([1, 0, 1, 1, 0, 0], dtype=np.uint8), "class_names": np.array(["no", "yes"])}
    images = npz(tmp_path, cache, save=save, images=pictures(), extra=np.arange(3.0), **arrays)
    assert isinstance(images.array, np.memmap), "never wholly in memory"
    assert np.array_equal(images.array, pictures()) and images.labels.tolist() == [1, 0, 1, 1, 0, 0]
    assert images.labels.dtype == np.int64 and images.class_names == ("no", "yes")
    assert images.image(2).size == (2, 2)


def test_npz_is_unpacked_once_and_again_when_it_changes(tmp_path, cache):
    first = npz(tmp_path, cache, images=pictures())
    unpacked = list(cache.glob("*.npy"))
    again = open_image_set(
        config.NpzImages(source="npz", path=str(tmp_path / "set.npz")), "set", cache_dir=cache
    )
    assert list(cache.glob("*.npy")) == unpacked and again.fingerprint == first.fingerprint
    changed = npz(tmp_path, cache, images=255 - pictures())
    assert np.array_equal(changed.array, 255 - pictures()) and changed.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": pictures()}, "no array 'images', only pictures"),
        (
            {"images": pictures().astype(np.float32)},
            r"'images' of .* is float32 \[6, 2, 2, 3\], expected uint8",
        ),
        ({"images": pictures()[..., 0]}, r"is uint8 \[6, 2, 2\], expected"),
        ({"images": pictures().transpose(0, 3, 1, 2)}, r"is uint8 \[6, 3, 2, 2\], expected"),
        ({"images": pictures()[:0]}, r"is uint8 \[0, 2, 2, 3\], expected"),
        ({"images": np.array([None, "a"], dtype=object)}, "Python objects"),
        (
            {"images": pictures(), "labels": np.arange(5)},
            r"'labels' of .* is int64 \[5\], expected integers \[6\]",
        ),
        ({"images": pictures(), "labels": np.ones(6)}, "is float64"),
        ({"images": pictures(), "labels": np.arange(6) - 1}, "'labels' of .* holds -1"),
        ({"images": pictures(), "labels": np.array([{}] * 6)}, "Python objects"),
        (
            {"images": pictures(), "class_names": np.arange(2)},
            "'class_names' of .* expected a list of strings",
        ),
        ({"images": pictures(), "labels": np.arange(6), "class_names": np.array(["a"])}, "goes up to 5"),
    ],
)
def test_npz_errors(tmp_path, cache, arrays, message):
    with pytest.raises(InputError, match=message) as caught:
        npz(tmp_path, cache, **arrays)
    assert "\n" not in str(caught.value), "one sentence"
    assert not list(cache.glob(".*")), "no temporary file is left"


def test_npz_missing_truncated_or_damaged(tmp_path, cache):
    path = tmp_path / "set.npz"
    source = config.NpzImages(source="npz", path=str(path))
    with pytest.raises(MissingDataError, match=r"no file .*set\.npz"):
        open_image_set(source, "set", cache_dir=cache)
    np.savez(path, images=pictures(50))
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 255
    for broken, message in (
        (content[:-30], "cut short"),
        (b"", "cut short"),
        (bytes(damaged), "broken .*CRC"),
    ):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=message):
            open_image_set(source, "set", cache_dir=cache)
        assert not [file for file in cache.glob("**/*") if file.is_file()]


def test_npz_of_fortran_order(tmp_path, cache):
    images = npz(tmp_path, cache, images=np.asfortranarray(pictures()))
    assert np.array_equal(images.array, pictures())
    assert images.fingerprint == npz(tmp_path, cache, images=pictures()).fingerprint


@pytest.mark.parametrize(
    ("file", "count", "classes"),
    [
        ("cifar10/test.npz", 1017, 10),
        ("cifar10/train.npz", 8336, 10),
        ("ood/svhn.npz", 1083, 10),
        ("ood/textures.npz", 1200, 10),
        ("ood/tiny_imagenet.npz", 2742, None),
        ("ood/cifar100_test.npz", 916, 100),
    ],
)
def test_real_npz(shared, cache, file, count, classes):
    images = open_image_set(
        config.NpzImages(source="npz", path=str(shared / "data" / file)), "real", cache_dir=cache
    )
    assert images.array.shape == (count, 32, 32, 3) and len(images.fingerprint) == 64
    if classes is None:
        assert images.labels is None and images.class_names is None
    else:
        assert len(images.class_names) == classes and images.labels.shape == (count,)
        assert images.labels.min() >= 0 and images.labels.max() < classes


# torchvision: no network, small files in the place of the real ones


def md5(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def offline(monkeypatch):
    """Every download fails, as it does without a network."""

    def get(*args, **kwargs):
        raise archives.requests.ConnectionError("no route")

    monkeypatch.setattr(archives.requests, "get", get)


def torchvision(tmp_path, cache, dataset, split, **options):
    source = config.TorchvisionImages(
        source="torchvision", dataset=dataset, split=split, root=str(tmp_path / "root"), **options
    )
    return open_image_set(source, dataset, cache_dir=cache)


SETS = [
    ("CIFAR10", "test", "cifar-10-batches-py"),
    ("CIFAR100", "train", "cifar-100-python"),
    ("SVHN", "extra", "extra_32x32.mat"),
    ("DTD", "val", "dtd/dtd"),
    ("Places365", "val", "filelist_places365-standard"),
]


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize(("dataset", "split", "place"), SETS)
def test_missing_torchvision_set(tmp_path, cache, offline, dataset, split, place, download):
    with pytest.raises(MissingDataError, match=f'{tmp_path}/root/.*curl -L -o ".*" "http') as caught:
        torchvision(tmp_path, cache, dataset, split, download=download)
    assert download or place in str(caught.value)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()], "no half files"


@pytest.mark.parametrize(
    ("dataset", "split"), [("CIFAR10", "val"), ("SVHN", "val"), ("DTD", "validation"), ("Places365", "train")]
)
def test_unknown_torchvision_split(tmp_path, cache, dataset, split):
    with pytest.raises(InputError, match=f"no split '{split}'.*(train|val)"):
        torchvision(tmp_path, cache, dataset, split)


@pytest.mark.parametrize(("dataset", "key"), [("CIFAR10", "labels"), ("CIFAR100", "fine_labels")])
def test_cifar(tmp_path, cache, offline, monkeypatch, dataset, key):
    """The archive was put into the root by hand: verified, unpacked and read without a network."""
    cls, root = getattr(datasets, dataset), tmp_path / "root"
    content = tmp_path / "made" / cls.base_folder
    content.mkdir(parents=True)
    data = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        (content / name).write_bytes(
            pickle.dumps(
                {
                    "data": data if name == "test" else data[:1],
                    key: [3, 0, 1, 2][: 4 if name == "test" else 1],
                }
            )
        )
    (content / "names").write_bytes(pickle.dumps({cls.meta["key"]: ["a", "b", "c", "d"]}))
    root.mkdir()
    with tarfile.open(root / cls.filename, "w:gz") as archive:
        archive.add(content, cls.base_folder)
    with pytest.raises(InputError, match=f"MD5 {md5(root / cls.filename)}, expected {cls.tgz_md5}"):
        torchvision(tmp_path, cache, dataset, "test")
    assert not (root / cls.base_folder).exists() and (root / cls.filename).exists()

    monkeypatch.setattr(cls, "tgz_md5", md5(root / cls.filename))
    monkeypatch.setattr(cls, "train_list", [["train", md5(content / "train")]])
    monkeypatch.setattr(cls, "test_list", [["test", md5(content / "test")]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "filename": "names", "md5": md5(content / "names")})
    images = torchvision(tmp_path, cache, dataset, "test", download=False)
    assert np.array_equal(images.array, data.reshape(4, 3, 32, 32).transpose(0, 2, 3, 1))
    assert images.labels.tolist() == [3, 0, 1, 2] and images.class_names == ("a", "b", "c", "d")
    assert len(torchvision(tmp_path, cache, dataset, "train")) == 1

    (root / cls.base_folder / "test").write_bytes(b"half")
    with pytest.raises(InputError, match=r"cannot read .* remove what is there"):
        torchvision(tmp_path, cache, dataset, "test")


def test_svhn(tmp_path, cache, offline, monkeypatch):
    path = tmp_path / "root" / "test_32x32.mat"
    path.parent.mkdir()
    array = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    savemat(path, {"X": array.transpose(1, 2, 3, 0), "y": np.array([[10], [1], [9]])})
    with pytest.raises(InputError, match="MD5"):
        torchvision(tmp_path, cache, "SVHN", "test")
    url = datasets.SVHN.split_list["test"][0]
    monkeypatch.setitem(datasets.SVHN.split_list, "test", [url, path.name, md5(path)])
    images = torchvision(tmp_path, cache, "SVHN", "test", subset={"first": 2})
    assert np.array_equal(images.array, array[:2])
    assert images.labels.tolist() == [0, 1] and images.class_names == tuple("0123456789")


def test_dtd(tmp_path, cache, offline, monkeypatch):
    made, archive = tmp_path / "made" / "dtd", tmp_path / "root" / "dtd" / "dtd-r1.0.1.tar.gz"
    for name in ("images/dotted/dotted_1.jpg", "images/banded/banded_1.jpg", "images/banded/banded_2.jpg"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7)).save(made / name)
    (made / "labels").mkdir()
    (made / "labels" / "test1.txt").write_text("dotted/dotted_1.jpg\nbanded/banded_2.jpg\n")
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as file:
        file.add(made, "dtd")
    monkeypatch.setattr(datasets.DTD, "_MD5", md5(archive))
    images = torchvision(tmp_path, cache, "DTD", "test")
    assert images.labels.tolist() == [1, 0] and images.class_names == ("banded", "dotted")
    assert images.files == ["dtd/dtd/images/dotted/dotted_1.jpg", "dtd/dtd/images/banded/banded_2.jpg"]
    assert images.image(0).size == (9, 7)
    (tmp_path / "root" / images.files[1]).unlink()
    with pytest.raises(MissingDataError, match="1 of the 2 images of DTD are missing"):
        torchvision(tmp_path, cache, "DTD", "test")


@pytest.mark.parametrize("split", ["val", "test", "train-standard"])
def test_places365(tmp_path, cache, offline, monkeypatch, split):
    made, root, cls = tmp_path / "made", tmp_path / "root", datasets.Places365
    root.mkdir()
    (made / "lists").mkdir(parents=True)
    (made / "lists" / "categories_places365.txt").write_text("/b/bay 1\n/a/airfield 0\n")
    label = "" if split == "test" else " 1"
    (made / "lists" / cls._FILE_LIST_META[split][0]).write_text(f"/x/2.jpg{label}\n/x/1.jpg{label}\n")
    folder_inside = "data_256" if split.startswith("train") else f"{split}_256"
    (made / folder_inside / "x").mkdir(parents=True)
    for name in "12":
        Image.new("RGB", (9, 7)).save(made / folder_inside / "x" / f"{name}.jpg")
    devkit, images_file = cls._DEVKIT_META["standard"][0], cls._IMAGES_META[split, True][0]
    with tarfile.open(root / devkit, "w") as file:
        for path in (made / "lists").iterdir():
            file.add(path, path.name)
    with tarfile.open(root / images_file, "w") as file:
        file.add(made / folder_inside, folder_inside)
    names = cls._FILE_LIST_META[split][0], cls._CATEGORIES_META[0]
    monkeypatch.setitem(cls._DEVKIT_META, "standard", (devkit, md5(root / devkit)))
    monkeypatch.setitem(cls._IMAGES_META, (split, True), (images_file, md5(root / images_file)))
    monkeypatch.setitem(cls._FILE_LIST_META, split, (names[0], md5(made / "lists" / names[0])))
    monkeypatch.setattr(cls, "_CATEGORIES_META", (names[1], md5(made / "lists" / names[1])))
    images = torchvision(tmp_path, cache, "Places365", split)
    place = "data_256_standard" if split.startswith("train") else folder_inside
    assert images.files == [f"{place}/x/2.jpg", f"{place}/x/1.jpg"] and images.image(1).size == (9, 7)
    assert images.class_names == ("/a/airfield", "/b/bay")
    assert images.labels is None if split == "test" else images.labels.tolist() == [1, 1]


# archive, as far as no server is needed


def archive_source(directory, name, **options):
    return config.ArchiveImages(
        source="archive", url=f"http://localhost:9/{name}?dl=1", directory=str(directory), **options
    )


@pytest.mark.parametrize("name", ["pets.tar", "pets.tar.gz", "pets.tgz", "pets.zip"])
def test_archive_put_there_by_hand(class_folders, cache, tmp_path, offline, name):
    data = tmp_path / "data"
    data.mkdir()
    if name.endswith(".zip"):
        with zipfile.ZipFile(data / name, "w") as file:
            for path in sorted(class_folders.rglob("*")):
                file.write(path, path.relative_to(tmp_path))
    else:
        with tarfile.open(data / name, "w:gz" if "gz" in name else "w") as file:
            file.add(class_folders, "animals")
    source = archive_source(
        data, name, folder="animals", md5=md5(data / name), size=(data / name).stat().st_size
    )
    images = open_image_set(source, "pets", cache_dir=cache)
    assert images.class_names == ("ape", "bee") and len(images) == 5
    assert images.fingerprint == folder(class_folders, cache).fingerprint
    assert sorted(path.name for path in data.iterdir()) == ["pets", name]

    (data / name).unlink()
    assert len(open_image_set(source, "pets", cache_dir=cache)) == 5, "the unpacked folder is enough"
    with pytest.raises(InputError, match=r"no folder 'animal' .*did you mean 'animals'"):
        open_image_set(archive_source(data, name, folder="animal"), "pets", cache_dir=cache)


def test_archive_of_another_kind(cache, tmp_path):
    with pytest.raises(InputError, match=r"expected a name ending in \.tar\.gz"):
        open_image_set(archive_source(tmp_path, "pets.rar"), "pets", cache_dir=cache)


def test_missing_archive_offline(cache, tmp_path, offline):
    with pytest.raises(
        MissingDataError,
        match=rf'{tmp_path}/pets\.zip is missing .*curl -L -o "{tmp_path}/pets\.zip" "http://',
    ):
        open_image_set(archive_source(tmp_path, "pets.zip"), "pets", cache_dir=cache)
    assert not list(tmp_path.iterdir())
