"""ImageSet: images with labels and a fingerprint of their content, held as one array or as a list of files."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from ood_helpers.errors import InputError, MissingDataError
from ood_helpers.files import atomic_path, sha256_of_json, write_json
from ood_helpers.progress import track

FINGERPRINT_VERSION = 1  # raise it when the same content gives another fingerprint
FILES_AT_ONCE = 512  # files handed to the threads at a time; also: from here on a progress bar is worth it


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB: grey is repeated, 16 bits are scaled down, transparency is dropped.

    Dropping alpha, and leaving the EXIF orientation alone, is what torchvision's image loader does; 16-bit
    grey images, which Pillow would clip to white, become value / 257.
    """
    if image.mode.startswith("I"):  # I;16, or I from formats whose plugin widens 16 bits to 32
        image = Image.fromarray(np.rint(np.clip(np.asarray(image), 0, 65535) / 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB gives the same colours and a warning
    return image.convert("RGB")


def read_image(path: str | Path) -> Image.Image:
    """Decode an image file completely, as 8-bit RGB; raises InputError when that is not possible."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow raises nearly everything: OSError, SyntaxError, struct.error
        reason = " ".join(str(error).replace(repr(str(path)), "").split()).rstrip(" :")
    raise _unreadable(path, reason)


def _shrink(image: Image.Image, side: int) -> np.ndarray:
    """Bilinear to a short side of `side`, the long one rounded, and the middle of it, rounded up and to the left."""
    size = [max(side, round(length * side / min(image.size))) for length in image.size]
    left, top = ((length - side) // 2 for length in size)
    image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + side, top + side)))


@dataclass(eq=False)
class ImageSet:
    """Images of one set, in a fixed order.

    Exactly one of `array` and `files` is there: an array is indexed, files are decoded when asked for.

    Attributes
    ----------
    name : the set's name in the experiment
    source : one readable line, where the images come from
    array : uint8 [N, H, W, 3], possibly memory-mapped; None for files
    root, files : folder and the N paths below it; None for an array
    labels : int64 [N] class numbers, or None
    class_names : names of the classes by number, or None
    indices : int64 [N], which items of the source were taken
    skipped : files left out because they cannot be decoded
    cache_dir : folder for fingerprints and unpacked arrays; None = nothing is remembered
    origin : what tells cheaply that an array is unchanged (its file, size and time); None = always hash it
    """

    name: str
    source: str
    array: np.ndarray | None = None
    root: Path | None = None
    files: Sequence[str] | None = None
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    indices: np.ndarray | None = None
    skipped: list[str] = field(default_factory=list)
    cache_dir: Path | None = None
    origin: str | None = None

    def __post_init__(self) -> None:
        if self.indices is None:
            self.indices = np.arange(len(self), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files) if self.array is None else len(self.array)

    def __repr__(self) -> str:
        return f"ImageSet({self.name!r}, {len(self):,} images, {self.source})"

    def path(self, i: int) -> str:
        """Path of image i of a set of files."""
        return os.path.join(self.root, self.files[i])

    def image(self, i: int) -> Image.Image:
        """Image i as PIL RGB; raises InputError naming the file when it cannot be decoded."""
        if self.array is not None:
            return Image.fromarray(np.ascontiguousarray(self.array[i]))
        return read_image(self.path(i))

    def take(self, positions: np.ndarray) -> "ImageSet":
        """The set of the images at `positions` (ascending); a run of neighbours of an array is not copied."""
        positions = np.asarray(positions, dtype=np.int64)
        is_run = len(positions) > 0 and positions[-1] - positions[0] + 1 == len(positions)
        key = slice(positions[0], positions[-1] + 1) if is_run else positions
        return replace(
            self,
            array=None if self.array is None else self.array[key],
            files=None if self.files is None else [self.files[i] for i in positions],
            labels=None if self.labels is None else self.labels[key],
            indices=self.indices[key],
        )

    def shared_with(self, other: "ImageSet") -> int:
        """How many images are in both sets: equal pixels of two arrays, equal paths of two sets of files, else not compared."""
        if (self.array is None) != (other.array is None):
            return 0
        return len(self._identities() & other._identities())

    def _identities(self) -> set[Any]:
        if self.array is None:
            return {os.path.realpath(self.path(i)) for i in range(len(self))}
        return {hashlib.sha256(image.tobytes()).digest() for image in self.array}

    def without_unreadable(self) -> "ImageSet":
        """Decode every file once and leave out those that cannot be decoded; they are listed in `skipped`.

        The outcome is remembered in `cache_dir` for as long as the files stay as they are. An array is
        returned as it is. Raises MissingDataError when no file can be read.
        """
        if self.array is not None:
            return self

        def is_unreadable(path: str) -> bool:
            try:
                read_image(path)
            except InputError:
                return True
            return False

        def find() -> list[int]:
            Image.init()  # registers the file formats once, not in every thread
            found = self._map_files(is_unreadable, f"Checking {self.name}")
            return [i for i, unreadable in enumerate(found) if unreadable]

        unreadable = self._remembered(f"unreadable-pillow-{PIL.__version__}", find)
        if len(unreadable) == len(self):
            raise MissingDataError(
                f"None of the {len(self):,} images of {self.name} below {self.root} can be read; check the path and the files."
            )
        kept = self.take(np.setdiff1d(np.arange(len(self)), unreadable))
        return replace(kept, skipped=[*self.skipped, *(self.files[i] for i in unreadable)])

    def shrunk(self, side: int) -> "ImageSet":
        """The images as an array of squares: bilinear to a short side of `side`, and of that the middle.

        The array is kept in `cache_dir`, which must be there, for as long as the files stay as they are.
        """
        key = sha256_of_json(["shrunk", side, self.fingerprint, PIL.__version__])
        path = Path(self.cache_dir) / f"{key}.npy"
        if not path.exists():
            Image.init()  # registers the file formats once, not in every thread
            pictures = self._map_files(lambda file: _shrink(read_image(file), side), f"Shrinking {self.name}")
            with atomic_path(path) as temporary:
                np.save(temporary, np.stack(list(pictures)))
        source = f"{self.source}; shrunk to {side} x {side}"
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return replace(self, source=source, array=array, root=None, files=None, origin=key)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over the content: paths and bytes of the files, or the bytes of the array,
        then labels and `indices`. The place on disk does not matter.

        It is remembered in `cache_dir` under the paths, sizes and times of the files, so that an unchanged
        set is not read again.
        """
        return self._remembered(f"fingerprint-{FINGERPRINT_VERSION}", self._hash_content)

    def _hash_content(self) -> str:
        digest = hashlib.sha256()
        if self.array is not None:
            digest.update(f"array {self.array.shape}\n".encode())
            step = max(1, 2**24 // max(1, self.array[:1].nbytes))
            for start in range(0, len(self), step):
                digest.update(np.ascontiguousarray(self.array[start : start + step]))
        else:
            digest.update(f"files {len(self)}\n".encode())
            hashes = self._map_files(_sha256_of_bytes, f"Fingerprint of {self.name}")
            for file, file_hash in zip(self.files, hashes):
                digest.update(os.fsencode(file) + b"\0" + file_hash)
        self._hash_choice(digest)
        return digest.hexdigest()

    def _hash_choice(self, digest: Any) -> None:
        """Add labels and taken list to a hash."""
        labels = b"none" if self.labels is None else self.labels.astype("<i8").tobytes()
        digest.update(b"\0labels " + labels + b"\0indices " + self.indices.astype("<i8").tobytes())

    def _remembered(self, kind: str, compute: Callable[[], Any]) -> Any:
        """The value of `compute`, kept as JSON under a key that changes when the files may have changed."""
        if self.cache_dir is None or (self.array is not None and self.origin is None):
            return compute()
        key = hashlib.sha256(f"{kind}\0{self.origin}\0{self.root}\n".encode("utf-8", "surrogateescape"))
        for i, file in enumerate(self.files or ()):
            try:
                status = os.stat(self.path(i))
                state = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
            except OSError:
                state = "missing"
            key.update(os.fsencode(file) + b"\0" + state.encode() + b"\n")
        self._hash_choice(key)
        path = Path(self.cache_dir) / "fingerprints" / f"{key.hexdigest()}.json"
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text(encoding="utf-8"))
        value = compute()
        write_json(path, value)
        return value

    def _map_files(self, function: Callable[[str], Any], description: str) -> Iterator[Any]:
        """Apply `function` to every path, in order, with threads (hashing and decoding release Python's lock)."""
        starts = range(0, len(self), FILES_AT_ONCE)
        chunks = (range(start, min(start + FILES_AT_ONCE, len(self))) for start in starts)
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            results = (result for chunk in chunks for result in pool.map(function, map(self.path, chunk)))
            yield from track(results, description, len(self), "file") if len(starts) > 1 else results


def _sha256_of_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise _unreadable(path, error.strerror) from None


def _unreadable(path: str | Path, reason: str) -> InputError:
    return InputError(
        f"The image {path} cannot be read ({reason}); replace the file, or run with --skip-unreadable "
        "to leave such files out."
    )
