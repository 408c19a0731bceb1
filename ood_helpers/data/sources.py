"""open_image_set: the image set behind a source of the config."""

import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ood_helpers.config import images as config
from ood_helpers.config.base import PROJECT_ROOT, resolve_path
from ood_helpers.data import embedded
from ood_helpers.data.archives import archive_name, fetch, listed_by_mirror, unpack
from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.imagenet import devkit_to_sorted
from ood_helpers.errors import InputError, MissingDataError, nearest
from ood_helpers.files import atomic_path, sha256_of_json

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")

TORCHVISION_SPLITS = {
    "CIFAR10": ("train", "test"),
    "CIFAR100": ("train", "test"),
    "SVHN": ("train", "test", "extra"),
    "DTD": ("train", "val", "test"),
    "Places365": ("train-standard", "train-challenge", "val", "test"),
}


def open_image_set(
    images: config.ImageSource, name: str, *, cache_dir: str | Path, skip_unreadable: bool = False
) -> ImageSet:
    """Open the set of images a config's source describes; download it if the source allows that and it is missing.

    Image files are not decoded here, unless `skip_unreadable` asks for it.

    Parameters
    ----------
    images : one of the source models of ood_helpers.config.images
    name : the set's name, for messages and progress bars
    cache_dir : folder for fingerprints and for arrays taken out of .npz files
    skip_unreadable : decode every file of the set (after `subset`) once and leave out the broken ones

    Raises
    ------
    MissingDataError : nothing at the expected place; says where and how to get it there
    InputError : broken data, or a subset that the set cannot give
    """
    cache_dir = Path(cache_dir)
    image_set = _OPENERS[type(images)](images, cache_dir)
    image_set = replace(image_set, name=name, cache_dir=cache_dir)
    if images.subset is not None:
        image_set = _apply_subset(image_set, images.subset)
    if skip_unreadable:
        image_set = image_set.without_unreadable()
    if getattr(images, "shrink", None) is not None:
        return image_set.shrunk(images.shrink)
    if not skip_unreadable and isinstance(images, config.ListImages | config.TorchvisionImages):
        _require_files(image_set)
    return image_set


def _apply_subset(image_set: ImageSet, subset: config.Subset) -> ImageSet:
    total = len(image_set)

    def check(asked: int) -> None:
        if asked > total:
            raise InputError(
                f"A subset of {asked:,} images was asked of {image_set.name}, which has {total:,}; lower it."
            )

    match subset:
        case config.RangeSubset():
            after = subset.after or 0
            stop = total if subset.first is None else after + subset.first
            check(max(stop, after + 1))
            taken = np.arange(after, stop)
            rule = f"the first {stop:,}" if not after else f"number {after + 1:,} to {stop:,}"
        case config.RunsSubset():
            check(subset.runs[-1][1])
            taken = np.concatenate([np.arange(*run) for run in subset.runs])
            rule = f"{len(taken):,} in {len(subset.runs)} runs"
        case config.RandomSubset():
            check(subset.random)
            rule = f"{subset.random:,} drawn with seed {subset.seed}"
            taken = np.sort(np.random.default_rng(subset.seed).choice(total, subset.random, replace=False))
        case config.PerClassSubset():
            rule = f"the first {subset.per_class:,} of each class"
            taken = _first_of_each_class(image_set, subset.per_class)
    image_set = replace(image_set.take(taken), source=f"{image_set.source}; {rule} of {total:,}")
    return replace(image_set, indices=None) if isinstance(subset, config.RunsSubset) else image_set


def _first_of_each_class(image_set: ImageSet, count: int) -> np.ndarray:
    labels = image_set.labels
    if labels is None:
        raise InputError(
            f"A subset per class was asked of {image_set.name}, which has no labels; use first or random."
        )
    # Position of each image among those of its class: 0, 1, 2, ... in file order.
    by_class = np.argsort(labels, kind="stable")
    classes, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    if counts.min() < count:
        scarce = counts.argmin()
        raise InputError(
            f"A subset of {count:,} images per class was asked of {image_set.name}, whose class "
            f"{classes[scarce]} has {counts[scarce]:,}; lower it."
        )
    return np.sort(by_class[(starts[:, None] + np.arange(count)).ravel()])


def _require_files(image_set: ImageSet) -> None:
    missing = [file for i, file in enumerate(image_set.files or ()) if not os.path.exists(image_set.path(i))]
    if missing:
        raise MissingDataError(
            f"{len(missing):,} of the {len(image_set):,} images of {image_set.name} are missing below {image_set.root}, "
            f"the first is {missing[0]}; put them there, correct the root, or run with --skip-unreadable."
        )


def _place(path: str) -> Path:
    """A path of the config; `${data_root}` is still there when the config was not read by load_config."""
    return resolve_path(path.replace("${data_root}", str(PROJECT_ROOT / "data")))


# ---- embedded -----------------------------------------------------------------------------------------


def _open_digits(images: config.EmbeddedDigits, cache_dir: Path) -> ImageSet:
    array, labels = embedded.digits(images.split)
    source = f"scikit-learn's handwritten digits, {images.split} split"
    return ImageSet(images.set, source, array=array, labels=labels, class_names=tuple("0123456789"))


def _open_generated(images: config.GeneratedImages, cache_dir: Path) -> ImageSet:
    array = embedded.GENERATORS[images.set](images.count, images.seed)
    source = f"embedded {images.set}, {images.count:,} made with seed {images.seed}"
    return ImageSet(images.set, source, array=array)


# ---- folder, list -------------------------------------------------------------------------------------


def _visible(names: Iterable[str]) -> list[str]:
    """Without hidden files and the resource forks that macOS puts into archives, sorted."""
    return sorted(name for name in names if not name.startswith(".") and name != "__MACOSX")


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _images_below(folder: Path) -> list[str]:
    """Image files at any depth below a folder, as sorted paths relative to it with forward slashes."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = _visible(folders)
        relative = Path(place).relative_to(folder)
        found += [(relative / file).as_posix() for file in _visible(files) if _is_image(file)]
    return sorted(found)


def _open_folder(images: config.FolderImages, cache_dir: Path) -> ImageSet:
    folder = _place(images.path)
    if not folder.is_dir():
        raise MissingDataError(
            f"There is no folder {folder}; put the images there, in one folder per class or, without labels, all in it."
        )
    return _read_folder(folder, f"folder {folder}")


def _read_folder(folder: Path, source: str) -> ImageSet:
    """Class folders, numbered in sorted order of their names, or a flat folder without labels."""
    names = _visible(os.listdir(folder))
    classes = [name for name in names if (folder / name).is_dir()]
    flat = [name for name in names if _is_image(name) and name not in classes]
    per_class = [[f"{name}/{file}" for file in _images_below(folder / name)] for name in classes]
    if not flat and not any(per_class):
        raise MissingDataError(
            f"The folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); put them there."
        )
    if not any(per_class):
        return ImageSet("", source, root=folder, files=flat)
    if flat:
        raise InputError(
            f"The folder {folder} holds both images ({flat[0]}) and folders with images ({classes[0]}); name one of the "
            "folders, or move all images into class folders."
        )
    for name, files in zip(classes, per_class):
        if not files:
            raise InputError(
                f"The class folder {folder / name} holds no image; fill it or remove it, as it shifts labels."
            )
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in per_class])
    files = [file for files in per_class for file in files]
    return ImageSet("", source, root=folder, files=files, labels=labels, class_names=tuple(classes))


def _open_list(images: config.ListImages, cache_dir: Path) -> ImageSet:
    """Lines of a path and, if labelled, a class number; -1 in every line (a habit of OOD lists) means none."""
    path, root = _place(images.path), _place(images.root)
    if not path.is_file():
        raise MissingDataError(
            f"There is no image list {path}; put it there, a line per image, or correct the path."
        )
    if not root.is_dir():
        raise MissingDataError(
            f"There is no folder {root} for the images of {path}; put them there or correct the root."
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise InputError(
            f"The image list {path} is not UTF-8 text; expected an image path in each line."
        ) from None
    files, labels = [], []
    for number, line in enumerate(map(str.strip, lines), start=1):
        file = line
        if line and images.labelled:
            try:
                file, label = line.rsplit(maxsplit=1)
                labels.append(int(label))
            except ValueError:
                raise InputError(
                    f"Line {number} of {path} is {line!r}, expected a path and a class number; correct it, "
                    "or set labelled: false."
                ) from None
        if file:
            files.append(file)
    if not files:
        raise InputError(f"The image list {path} is empty; expected an image path in each line.")
    numbers = np.array(labels, dtype=np.int64) if labels and set(labels) != {-1} else None
    if numbers is not None and numbers.min() < 0:
        raise InputError(
            f"The image list {path} has the class number {numbers.min()}; expected 0, 1, ..., or -1 in all lines."
        )
    if numbers is not None and images.class_numbering == "ilsvrc2012_devkit":
        place = devkit_to_sorted()
        if numbers.max() >= len(place):
            raise InputError(
                f"The image list {path} has the class number {numbers.max()}, expected devkit ids minus 1, 0 to "
                f"{len(place) - 1}; correct it or the class_numbering."
            )
        numbers = place[numbers]
    return ImageSet("", f"list {path}, images below {root}", root=root, files=files, labels=numbers)


# ---- npz ----------------------------------------------------------------------------------------------


def _open_npz(images: config.NpzImages, cache_dir: Path) -> ImageSet:
    path = _place(images.path)
    if not path.is_file():
        raise MissingDataError(
            f"There is no file {path}; put it there, a numpy .npz with images uint8 [N, H, W, 3], or correct the path."
        )
    status = path.stat()
    key = sha256_of_json(
        ["npz array", str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    )
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is no .npz file (a zip archive), or is cut short; get or save it again.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "images" not in archive.files:
                raise InputError(
                    f"{path} has no array 'images', only {', '.join(archive.files) or 'nothing'}; add it."
                )
            array = _map_images(path, cache_dir / f"{key}.npy")
            labels = archive["labels"] if "labels" in archive.files else None
            class_names = archive["class_names"] if "class_names" in archive.files else None
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"{path} cannot be read or unpacked into {cache_dir} ({error}); check access and free space."
        ) from None
    except (ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} is broken or holds Python objects ({' '.join(str(error).split())}); get or save it again."
        ) from None
    if labels is not None:
        labels = _check_labels(labels, len(array), path)
    if class_names is not None:
        if class_names.ndim != 1 or class_names.dtype.kind != "U":
            raise InputError(
                f"'class_names' of {path} is {class_names.dtype} {list(class_names.shape)}, expected a list of strings; "
                "save it again."
            )
        if labels is not None and labels.max() >= len(class_names):
            raise InputError(
                f"'labels' of {path} goes up to {labels.max()}, but 'class_names' names {len(class_names)} classes; "
                "correct one of them."
            )
        class_names = tuple(str(class_name) for class_name in class_names)
    return ImageSet("", f"npz {path}", array=array, labels=labels, class_names=class_names, origin=key)


def _map_images(path: Path, cached: Path) -> np.ndarray:
    """The array `images`, memory-mapped: taken out of the .npz once, in pieces, as it may not fit into memory."""
    if not cached.exists():
        with atomic_path(cached) as temporary:
            with (
                zipfile.ZipFile(path) as archive,
                archive.open("images.npy") as source,
                open(temporary, "wb") as target,
            ):
                shutil.copyfileobj(source, target, 2**20)
            array = np.load(temporary, mmap_mode="r", allow_pickle=False)
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or array.size == 0:
                raise InputError(
                    f"'images' of {path} is {array.dtype} {list(array.shape)}, expected uint8 [N, H, W, 3]; "
                    "convert it and save it again."
                )
    return np.load(cached, mmap_mode="r", allow_pickle=False)


def _check_labels(labels: np.ndarray, count: int, path: Path) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise InputError(
            f"'labels' of {path} is {labels.dtype} {list(labels.shape)}, expected integers [{count}], one per image; "
            "save it again."
        )
    if labels.min() < 0:
        raise InputError(
            f"'labels' of {path} holds {labels.min()}, expected class numbers from 0; leave out 'labels' if unknown."
        )
    return labels.astype(np.int64)


# ---- archive ------------------------------------------------------------------------------------------


def _open_archive(images: config.ArchiveImages, cache_dir: Path) -> ImageSet:
    directory = _place(images.directory)
    file_name, stem = archive_name(images.url)
    unpacked = directory / stem
    if not unpacked.is_dir():
        fetch(images.url, directory / file_name, size=images.size, sha256=images.sha256, md5=images.md5)
        unpack(directory / file_name, unpacked)
    folder = unpacked / images.folder
    if not folder.is_dir():
        folders = [name for name in _visible(os.listdir(unpacked)) if (unpacked / name).is_dir()]
        raise InputError(
            f"The archive {file_name} has no folder {images.folder!r} (looked for {folder}); "
            + nearest(images.folder, folders)
        )
    return _read_folder(folder, f"{images.url} in {folder}")


# ---- torchvision --------------------------------------------------------------------------------------


def _open_torchvision(images: config.TorchvisionImages, cache_dir: Path) -> ImageSet:
    """Read by torchvision, but fetched here: torchvision neither resumes a download nor unpacks atomically."""
    splits = TORCHVISION_SPLITS[images.dataset]
    if images.split not in splits:
        raise InputError(
            f"torchvision's {images.dataset} has no split {images.split!r}; {nearest(images.split, splits)}"
        )
    from torchvision import datasets  # late: importing torchvision takes a second

    root, dataset_class = _place(images.root), getattr(datasets, images.dataset)
    _provide_torchvision(images, dataset_class, root)
    is_cifar = images.dataset.startswith("CIFAR")
    is_svhn = images.dataset == "SVHN"
    address = dataset_class.split_list[images.split][0] if is_svhn else getattr(dataset_class, "url", "")
    if listed_by_mirror(address):
        dataset_class = _without_checksums(dataset_class)
    options: dict[str, Any] = {"train": images.split == "train"} if is_cifar else {"split": images.split}
    if images.dataset == "Places365":
        options["small"] = True
    try:
        dataset = dataset_class(root, download=False, **options)
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"torchvision cannot read {images.dataset} ({images.split}) below {root} ({' '.join(str(error).split())}); remove "
            "what is there of it to have it fetched again."
        ) from None
    source = f"torchvision {images.dataset}, {images.split} split, in {root}"
    array = None
    if is_svhn:
        array, labels, classes = dataset.data.transpose(0, 2, 3, 1), dataset.labels, "0123456789"
    elif is_cifar:
        array, labels, classes = dataset.data, dataset.targets, dataset.classes
    elif images.dataset == "DTD":
        paths, labels, classes = dataset._image_files, dataset._labels, dataset.classes
    else:  # the test split of Places365 has no labels
        paths, labels = [path for path, _ in dataset.imgs], dataset.targets
        classes = sorted(dataset.class_to_idx, key=dataset.class_to_idx.get)
    labels = None if labels[0] is None else np.asarray(labels, dtype=np.int64)
    content = {"labels": labels, "class_names": tuple(classes)}
    if array is not None:
        return ImageSet("", source, array=array, **content)
    files = [Path(os.path.relpath(path, root)).as_posix() for path in paths]
    return ImageSet("", source, root=root, files=files, **content)


def _without_checksums(dataset: Any) -> Any:
    """torchvision's CIFAR or SVHN, without the MD5 sums of the files inside, where a mirror has other ones."""
    if hasattr(dataset, "split_list"):
        own = {"split_list": {split: (*entry[:2], None) for split, entry in dataset.split_list.items()}}
    else:
        own = {
            name: [(file, None) for file, _ in getattr(dataset, name)] for name in ("train_list", "test_list")
        }
        own |= {"meta": dataset.meta | {"md5": None}}
    return type(dataset.__name__, (dataset,), own)


def _provide_torchvision(images: config.TorchvisionImages, dataset: Any, root: Path) -> None:
    """Put what torchvision expects below `root`, verified by the MD5 sums its class `dataset` knows."""
    if images.dataset == "SVHN":
        url, file_name, md5 = dataset.split_list[images.split]
        _provide(images, url, root / file_name, md5)
    elif images.dataset == "DTD":
        archive = root / "dtd" / archive_name(dataset._URL)[0]
        _provide(images, dataset._URL, archive, dataset._MD5, root / "dtd" / "dtd", member="dtd")
    elif images.dataset == "Places365":
        variant = "challenge" if images.split == "train-challenge" else "standard"
        file_name, md5 = dataset._DEVKIT_META[variant]
        lists = [dataset._CATEGORIES_META[0], dataset._FILE_LIST_META[images.split][0]]
        if not all((root / name).exists() for name in lists):
            unpacked = root / archive_name(file_name)[1]
            _provide(images, dataset._BASE_URL + file_name, root / file_name, md5, unpacked)
            for name in lists:
                with atomic_path(root / name) as temporary:
                    shutil.copyfile(unpacked / name, temporary)
        file_name, md5 = dataset._IMAGES_META[images.split, True]
        is_train = images.split.startswith("train")
        member = "data_256" if is_train else f"{images.split}_256"
        folder = root / (f"data_256_{variant}" if is_train else member)
        _provide(images, dataset._BASE_URL + file_name, root / file_name, md5, folder, member)
    else:
        archive, folder = root / dataset.filename, root / dataset.base_folder
        _provide(images, dataset.url, archive, dataset.tgz_md5, folder, member=dataset.base_folder)


def _provide(
    images: config.TorchvisionImages,
    url: str,
    file: Path,
    md5: str,
    folder: Path | None = None,
    member: str = ".",
) -> None:
    """Have `file` from `url` or, if `folder` is given, that folder, unpacked from `member` of the archive `file`."""
    if folder is not None and folder.exists():
        return
    if not images.download and not file.exists():
        raise MissingDataError(
            f"torchvision's {images.dataset} ({images.split}) is missing, expected {folder or file}; set download: true, "
            f'or get it with: curl -L -o "{file}" "{url}"'
        )
    fetch(url, file, md5=md5)
    if folder is not None:
        unpack(file, folder, member)


_OPENERS = {
    config.EmbeddedDigits: _open_digits,
    config.GeneratedImages: _open_generated,
    config.TorchvisionImages: _open_torchvision,
    config.FolderImages: _open_folder,
    config.ListImages: _open_list,
    config.NpzImages: _open_npz,
    config.ArchiveImages: _open_archive,
}
