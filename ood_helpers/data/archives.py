"""Downloads that resume and are verified, and archives that unpack safely.

A file is downloaded under its name plus `.part`, an archive is unpacked into a temporary folder; both get
their final name only when they are complete.

The environment variable OOD_MIRROR names a server that files are taken from instead: that of
https://host/path lies at $OOD_MIRROR/host/path. A file that the mirror lists in $OOD_MIRROR/SHA256SUMS (in the
format of `sha256sum`) must have the checksum given there, in place of the known size and checksums.
"""

import hashlib
import json
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
import urllib3

from ood_helpers.config.base import DownloadedFile, resolve_path
from ood_helpers.errors import InputError, MissingDataError
from ood_helpers.files import locked, sha256_of_file, write_json
from ood_helpers.progress import track

SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")
MIRROR, SUMS = "OOD_MIRROR", "SHA256SUMS"
TIMEOUT = (20, 60)  # seconds to connect, seconds between two packets
NO_CONNECTION = (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError)
# What a damaged archive, or a full disk, shows up as.
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


def archive_name(url: str) -> tuple[str, str]:
    """File name and stem of the archive at a URL; raises InputError when it is none of SUFFIXES."""
    name = unquote(PurePosixPath(urlsplit(url).path).name)
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name, name[: -len(suffix)]
    raise InputError(
        f"The URL {url} names no archive the kit can unpack; expected a name ending in {', '.join(SUFFIXES)}."
    )


def verify(
    path: Path, *, size: int | None = None, sha256: str | None = None, md5: str | None = None
) -> str | None:
    """What is wrong with a file: None, or "it has SHA-256 ..., expected ..."."""
    found_size = path.stat().st_size
    if size is not None and found_size != size:
        return f"it has {found_size} bytes, expected {size}"
    for algorithm, title, expected in (("sha256", "SHA-256", sha256), ("md5", "MD5", md5)):
        if expected is not None:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, algorithm).hexdigest()
            if found != expected:
                return f"it has {title} {found}, expected {expected}"
    return None


def fetch(
    url: str, path: Path, *, size: int | None = None, sha256: str | None = None, md5: str | None = None
) -> None:
    """Have the file at `url`, or on the mirror, as `path`, verified by size and checksums where they are given.

    A file that is there already is verified and left where it is. Otherwise it is downloaded to
    `path` + ".part"; a download that broke off resumes where it stopped (HTTP range), or starts again if
    the server cannot do that.

    Where no checksum is given, the first file is trusted: its size and SHA-256 are recorded in `path` + ".json", and
    every later one must have them.

    Raises
    ------
    MissingDataError : no connection, an HTTP error, or a connection that broke (the .part stays)
    InputError : wrong size or checksum (a downloaded file is removed, one found under `path` stays)
    """
    known: dict[str, Any] = {"size": size, "sha256": sha256, "md5": md5}
    if (sha256 or md5) and path.exists() and not verify(path, **known):
        return  # without asking a mirror
    record, remedy = None, "check the URL"
    if listed := listed_by_mirror(url):
        known, remedy = {"sha256": listed}, f"check the mirror and its {SUMS}"
    elif sha256 is None and md5 is None:
        record = path.with_name(path.name + ".json")
        if record.exists():
            try:
                first = json.loads(record.read_text(encoding="utf-8"))
                known = {"size": first["size"], "sha256": first["sha256"]}
            except (ValueError, KeyError):
                raise InputError(
                    f"{record} is damaged, expected size and SHA-256 of the first download; remove it to trust {path} as it is."
                ) from None
            remedy += f", or remove {record}, the record of the first download, to trust another file"
    with locked(path):
        if path.exists():
            if problem := verify(path, **known):
                raise InputError(
                    f"{path} is not the file that {url} should give: {problem}; remove it to have it downloaded, or {remedy}."
                )
        else:
            _fetch(mirrored(url), path, known, remedy)
        if record is not None and not record.exists():
            found = {"url": mirrored(url), "size": path.stat().st_size, "sha256": sha256_of_file(path)}
            write_json(record, found)


def _fetch(url: str, path: Path, known: dict[str, Any], remedy: str) -> None:
    """Download to `path` + ".part", verify, rename."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _download(url, part, known.get("size"))
    except NO_CONNECTION as error:
        reason = _reason(error)
        if part.exists():
            reason += f"; {part.stat().st_size:,} bytes are kept, and the next run resumes there"
        raise MissingDataError(
            f"{path} is missing and could not be downloaded ({reason}); run again with a network "
            f'connection, or get it by hand with: curl -L -o "{path}" "{url}"'
        ) from None
    if problem := verify(part, **known):
        part.unlink()
        raise InputError(
            f"The download of {url} is not the expected file: {problem}; it was removed, {remedy}."
        )
    os.replace(part, path)


def provide(file: str | DownloadedFile) -> Path:
    """The path of a file of the config, which is fetched if it is a download; raises as `fetch`."""
    if isinstance(file, str):
        return resolve_path(file)
    path = resolve_path(file.path)
    fetch(file.url, path, size=file.size, sha256=file.sha256, md5=file.md5)
    return path


def mirrored(url: str) -> str:
    """Where a file is taken from: `url`, or its place on the mirror."""
    mirror, parts = os.environ.get(MIRROR), urlsplit(url)
    return f"{mirror.rstrip('/')}/{parts.netloc}{parts.path}" if mirror else url


def listed_by_mirror(url: str) -> str | None:
    """The SHA-256 that the mirror lists for a URL; None without a mirror, and where it lists none."""
    mirror, parts = os.environ.get(MIRROR), urlsplit(url)
    return _sums(mirror.rstrip("/")).get(parts.netloc + unquote(parts.path)) if mirror else None


@cache
def _sums(mirror: str) -> dict[str, str]:
    """File -> SHA-256 of a mirror."""
    try:
        response = requests.get(f"{mirror}/{SUMS}", timeout=TIMEOUT)
        if response.status_code == 404:
            return {}
        response.raise_for_status()
    except NO_CONNECTION as error:
        raise MissingDataError(
            f"The mirror {mirror} gives no {SUMS} ({_reason(error)}), expected the file or status 404; correct {MIRROR}, or unset "
            "it to use the public addresses."
        ) from None
    lines = [line.split(maxsplit=1) for line in response.text.splitlines()]
    return {line[1].strip().lstrip("*").removeprefix("./"): line[0] for line in lines if len(line) == 2}


def _reason(error: Exception) -> str:
    """The cause in a few words: requests' own messages are chains of nested object representations."""
    if isinstance(error, requests.HTTPError):
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, requests.Timeout | TimeoutError | urllib3.exceptions.TimeoutError):
        return "the server does not answer"
    return str(error) if len(str(error)) < 100 else "no connection"


def _download(url: str, part: Path, size: int | None) -> None:
    """Append to `part` what is missing of `url`; returns when all bytes the server promised are there."""
    have = part.stat().st_size if part.exists() else 0
    if size is not None and have == size:
        return
    if size is not None and have > size:
        part.unlink()
        have = 0
    # identity: byte counts and ranges must mean the file itself, not a compressed form of it
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416 and have:  # nothing is beyond it: it is complete, or another file
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(have):
                return
            part.unlink()
            return _download(url, part, size)
        response.raise_for_status()
        resumes = response.status_code == 206
        if resumes and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise requests.ConnectionError("the server sent another range than was asked for")
        have = have if resumes else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else size
        bar = track(description=part.name.removesuffix(".part"), total=total, unit="B")
        bar.unit_scale = True
        bar.update(have)
        with bar, open(part, "ab" if resumes else "wb") as file:
            for block in response.raw.stream(2**20, decode_content=False):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
            have = file.tell()
    if total is not None and have < total:
        raise requests.ConnectionError(f"it ended after {have:,} of {total:,} bytes")


def unpack(archive: Path, folder: Path, member: str = ".") -> None:
    """Unpack an archive (or its folder `member`) as `folder`, which appears only when it is complete.

    Members that would land outside, links out of the archive and special files are refused (tarfile's
    `data` filter; the same rules for .zip). Raises InputError naming the archive.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        if archive.name.lower().endswith(".zip"):
            _unpack_zip(archive, temporary)
        else:
            with tarfile.open(archive) as file:
                file.extractall(temporary, filter="data")
        content = temporary / member
        if not content.is_dir():
            raise InputError(
                f"The archive {archive} has no folder {member!r}; remove it if it is the wrong file."
            )
        content.chmod(0o755)
        if not folder.exists():  # another process may have been quicker
            os.rename(content, folder)
    except tarfile.FilterError as error:
        raise InputError(
            f"The archive {archive} was refused, it holds an unsafe member: {error}; do not use it."
        ) from None
    except BROKEN as error:
        raise InputError(
            f"The archive {archive} cannot be unpacked in {folder.parent} ({error}); check the disk, or remove the archive "
            "to have it downloaded again."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            name = PurePosixPath(member.filename.replace("\\", "/"))
            kind = stat.S_IFMT(member.external_attr >> 16)
            outside = name.is_absolute() or ".." in name.parts or PureWindowsPath(member.filename).drive
            if outside or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise InputError(
                    f"The archive {archive} was refused, it holds an unsafe member: {member.filename!r}; do not use it."
                )
        file.extractall(folder)
