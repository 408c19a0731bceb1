"""A mirror of the addresses of cifar10_sample that has its images alone: archives of the same formats, made from the .npz
files of cifar10_npz, and a server for them."""

import io
import pickle
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from ood_helpers.config import load_config
from ood_helpers.files import sha256_of_file


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[str]:
    """Serve a folder on 127.0.0.1; gives the address."""
    with ThreadingHTTPServer(("127.0.0.1", port), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def place(folder: Path, url: str) -> Path:
    """Where a mirror in `folder` has the file of a URL."""
    parts = urlsplit(url)
    path = folder / (parts.netloc + parts.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def list_sums(folder: Path) -> None:
    """Write SHA256SUMS for all files, as `sha256sum` in the folder does."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = [f"{sha256_of_file(path)}  ./{path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def png(image: np.ndarray) -> bytes:
    """The image as a file, lossless."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def tar_gz(path: Path, members: dict[str, bytes]) -> None:
    """Write a .tar.gz of files: name -> content."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _batch(images: np.ndarray, labels: np.ndarray, key: str = "labels") -> bytes:
    """A file of CIFAR's archives."""
    rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    return pickle.dumps({"data": rows, key: labels.tolist()}, protocol=2)


def make_mirror(shared: Path, folder: Path) -> None:
    """Write the files of all addresses, with black images where the sample has none."""
    data = shared / "data"
    config = load_config("cifar10_sample")
    urls = {ood.name: getattr(ood.images, "url", None) for ood in config.ood}
    train, test = np.load(data / "cifar10/train.npz"), np.load(data / "cifar10/test.npz")
    images, labels = np.zeros((50_000, 32, 32, 3), np.uint8), np.zeros(50_000, np.int64)
    images[train["index_in_original"]], labels[train["index_in_original"]] = train["images"], train["labels"]
    base = datasets.CIFAR10.base_folder
    batches = {
        f"{base}/data_batch_{i + 1}": _batch(images[10_000 * i :][:10_000], labels[10_000 * i :][:10_000])
        for i in range(5)
    }
    meta = pickle.dumps({"label_names": test["class_names"].tolist()}, protocol=2)
    batches |= {f"{base}/test_batch": _batch(test["images"], test["labels"]), f"{base}/batches.meta": meta}
    tar_gz(place(folder, datasets.CIFAR10.url), batches)

    cifar100 = np.load(data / "ood/cifar100_test.npz")
    content = _batch(cifar100["images"], cifar100["labels"], "fine_labels")
    meta = pickle.dumps({"fine_label_names": cifar100["class_names"].tolist()}, protocol=2)
    base = datasets.CIFAR100.base_folder
    members = {f"{base}/train": content, f"{base}/test": content, f"{base}/meta": meta}
    tar_gz(place(folder, datasets.CIFAR100.url), members)

    svhn = np.load(data / "ood/svhn.npz")
    digits = np.where(svhn["labels"] == 0, 10, svhn["labels"])[:, None].astype(np.uint8)
    url = datasets.SVHN.split_list["test"][0]
    savemat(place(folder, url), {"X": svhn["images"].transpose(1, 2, 3, 0), "y": digits})

    textures = np.load(data / "ood/textures.npz")
    members, black = {}, np.zeros((40, 50, 3), np.uint8)
    for i, (image, label) in enumerate(zip(textures["images"], textures["labels"])):
        category = textures["class_names"][label]
        members[f"dtd/images/{category}/{category}_{i:04}.jpg"] = png(image)
    shuffled = dict(sorted(members.items(), reverse=True))
    tar_gz(place(folder, urls["Textures"]), {"dtd/images/dotted/dotted_0001.jpg": png(black), **shuffled})

    tiny = np.load(data / "ood/tiny_imagenet.npz")
    sample = {path.rsplit("/", 1)[1]: image for path, image in zip(tiny["paths"].tolist(), tiny["images"])}
    names = sorted(f"test_{i}.JPEG" for i in range(10_000))[: config.ood[1].images.subset.runs[-1][1]]
    with zipfile.ZipFile(place(folder, urls["Tiny-ImageNet"]), "w") as archive:
        for name in names:
            archive.writestr(f"tiny-imagenet-200/test/images/{name}", png(sample.get(name, black)))

    checkpoint = config.backbone.checkpoint
    shutil.copy(shared / "checkpoints/cifar10_densenet101_dice.pth.tar", place(folder, checkpoint.url))
    list_sums(folder)
