"""Downloads from a local server that can drop out, and archives that try to escape."""

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from small_experiments import one_sentence

from ood_helpers.config.base import DownloadedFile
from ood_helpers.config.images import ArchiveImages
from ood_helpers.data import open_image_set
from ood_helpers.data.archives import fetch, provide, unpack, verify
from ood_helpers.errors import InputError, MissingDataError

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content` under every path; records the Range header of each request."""

    content = CONTENT
    supports_range = True
    announces_length = True
    drop_after: int | None = None  # bytes of the body after which the connection breaks, once
    status: int | None = None
    shift = 0  # answer a range request with a range that starts elsewhere


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.ranges.append(asked)
        if server.status is not None:
            return self.send_error(server.status)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.supports_range else 0
        if start and start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = max(0, start + server.shift) if start else 0
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            )
        if server.announces_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        drop, server.drop_after = server.drop_after, None
        self.wfile.write(body[:drop])
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as running:
        running.ranges = []
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_download(server, tmp_path):
    path = tmp_path / "deep" / "file.bin"
    fetch(f"{server.url}/file.bin", path, size=len(CONTENT), sha256=SHA256, md5=MD5)
    assert path.read_bytes() == CONTENT and [entry.name for entry in path.parent.iterdir()] == ["file.bin"]
    fetch(f"{server.url}/file.bin", path, sha256=SHA256)
    assert server.ranges == [None], "a file that is there is not fetched again"


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_dropped_connection_resumes(server, tmp_path, size):
    path, part = tmp_path / "file.bin", tmp_path / "file.bin.part"
    server.drop_after = 123_456
    with pytest.raises(MissingDataError, match="123,456 bytes are kept, and the next run resumes there"):
        fetch(f"{server.url}/file.bin", path, size=size, sha256=SHA256)
    assert not path.exists() and part.read_bytes() == CONTENT[:123_456]
    fetch(f"{server.url}/file.bin", path, size=size, sha256=SHA256)
    assert server.ranges == [None, "bytes=123456-"]
    assert path.read_bytes() == CONTENT and not part.exists()


def test_drop_is_noticed_by_the_given_size_alone(server, tmp_path):
    server.drop_after, server.announces_length = 1000, False
    with pytest.raises(MissingDataError, match="1,000 of 300,000 bytes"):
        fetch(f"{server.url}/file.bin", tmp_path / "file.bin", size=len(CONTENT))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin.part"]


def test_server_without_ranges_starts_again(server, tmp_path):
    server.supports_range = False
    (tmp_path / "file.bin.part").write_bytes(b"x" * 1000)
    fetch(f"{server.url}/file.bin", tmp_path / "file.bin", sha256=SHA256)
    assert server.ranges == ["bytes=1000-"] and (tmp_path / "file.bin").read_bytes() == CONTENT


def test_another_range_than_asked_for_is_not_used(server, tmp_path):
    server.shift = -10
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    with pytest.raises(MissingDataError, match="another range"):
        fetch(f"{server.url}/file.bin", tmp_path / "file.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("known", [{"size": len(CONTENT)}, {}])
def test_complete_part_is_used(server, tmp_path, known):
    """Killed between the last byte and the renaming."""
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    fetch(f"{server.url}/file.bin", tmp_path / "file.bin", sha256=SHA256, **known)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.ranges == ([] if known else ["bytes=300000-"])


@pytest.mark.parametrize("known", [{"size": len(CONTENT)}, {}])
def test_part_longer_than_the_file_starts_again(server, tmp_path, known):
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    fetch(f"{server.url}/file.bin", tmp_path / "file.bin", sha256=SHA256, **known)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT and server.ranges[-1] is None


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"sha256": "0" * 64}, f"SHA-256 {SHA256}, expected {'0' * 64}"),
        ({"md5": "1" * 32, "sha256": SHA256}, f"MD5 {MD5}, expected {'1' * 32}"),
        ({"size": 5}, "300000 bytes, expected 5"),
    ],
)
def test_wrong_checksum(server, tmp_path, known, message):
    path = tmp_path / "file.bin"
    with pytest.raises(InputError, match=message):
        fetch(f"{server.url}/file.bin", path, **known)
    assert not list(tmp_path.iterdir()), "neither the file nor its part is left"
    path.write_bytes(CONTENT)
    with pytest.raises(InputError, match=f"file.bin is not the file.*{message}; remove it"):
        fetch(f"{server.url}/file.bin", path, **known)
    assert path.exists(), "what the user put there stays"


def test_http_error_keeps_the_part(server, tmp_path):
    server.status = 404
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:10])
    with pytest.raises(MissingDataError, match=r"HTTP status 404.*curl -L -o"):
        fetch(f"{server.url}/file.bin", tmp_path / "file.bin")
    assert (tmp_path / "file.bin.part").exists()


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(MissingDataError, match=r"no connection\); run again"):
        fetch("http://127.0.0.1:9/file.bin", tmp_path / "file.bin")
    assert not list(tmp_path.iterdir())


def test_archive_is_downloaded_resumed_and_read(server, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("set/images/a.png", "set/images/b.png"):
            picture = io.BytesIO()
            Image.effect_noise((32, 32), 50).save(picture, "png")
            member = tarfile.TarInfo(name)
            member.size = picture.tell()
            picture.seek(0)
            archive.addfile(member, picture)
    server.content = buffer.getvalue()
    source = ArchiveImages(
        source="archive",
        url=f"{server.url}/some%20set.tar.gz?dl=1",
        directory=str(tmp_path / "data"),
        folder="set/images",
        sha256=hashlib.sha256(server.content).hexdigest(),
    )
    server.drop_after = 700
    with pytest.raises(MissingDataError):
        open_image_set(source, "set", cache_dir=tmp_path / "cache")
    assert [entry.name for entry in (tmp_path / "data").iterdir()] == ["some set.tar.gz.part"]
    images = open_image_set(source, "set", cache_dir=tmp_path / "cache")
    assert images.files == ["a.png", "b.png"] and images.labels is None and images.image(1).size == (32, 32)
    assert sorted(entry.name for entry in (tmp_path / "data").iterdir()) == ["some set", "some set.tar.gz"]


def tar(path, *members):
    with tarfile.open(path, "w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def member(name, kind=tarfile.REGTYPE, target="", size=1):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.size = size if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    "unsafe",
    [
        member("../outside.png"),
        member("a/../../outside.png"),
        member("link", tarfile.SYMTYPE, "../../outside"),
        member("link", tarfile.SYMTYPE, "/etc"),
        member("link", tarfile.LNKTYPE, "../outside.png"),
        member("device", tarfile.CHRTYPE),
    ],
)
def test_unsafe_tar_is_refused(tmp_path, unsafe):
    data = tmp_path / "data"
    data.mkdir()
    path = tar(data / "a.tar", member("good.png"), unsafe)
    with pytest.raises(InputError, match=r"a\.tar was refused, it holds an unsafe member"):
        unpack(path, data / "a")
    assert [entry.name for entry in data.iterdir()] == ["a.tar"] and list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize(
    "name",
    ["../outside.png", "a/../../outside.png", "/outside.png", "..\\outside.png", "C:\\outside.png", "link"],
)
def test_unsafe_zip_is_refused(tmp_path, name):
    data = tmp_path / "data"
    data.mkdir()
    with zipfile.ZipFile(data / "a.zip", "w") as archive:
        archive.writestr("good.png", b"x")
        unsafe = zipfile.ZipInfo(name)
        unsafe.external_attr = (0o120777 if name == "link" else 0o100644) << 16
        archive.writestr(unsafe, b"/etc")
    with pytest.raises(InputError, match=r"a\.zip was refused, it holds an unsafe member"):
        unpack(data / "a.zip", data / "a")
    assert [entry.name for entry in data.iterdir()] == ["a.zip"] and list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip", "a.tar"])
def test_broken_archive_leaves_no_folder(tmp_path, name):
    whole = tmp_path / name
    noise = np.random.default_rng(0).bytes(100_000)
    if name == "a.zip":
        with zipfile.ZipFile(whole, "w") as archive:
            archive.writestr("a.png", noise)
    else:
        with tarfile.open(whole, "w:gz" if name.endswith("gz") else "w") as archive:
            info = tarfile.TarInfo("a.png")
            info.size = len(noise)
            archive.addfile(info, io.BytesIO(noise))
    whole.write_bytes(whole.read_bytes()[:50_000])
    with pytest.raises(InputError, match="cannot be unpacked"):
        unpack(whole, tmp_path / "a")
    assert list(tmp_path.iterdir()) == [whole]


def test_part_of_an_archive(tmp_path):
    path = tar(tmp_path / "a.tar", member("inner/x.png"), member("other/y.png"))
    unpack(path, tmp_path / "there", "inner")
    assert [entry.name for entry in (tmp_path / "there").iterdir()] == ["x.png"]
    with pytest.raises(InputError, match="no folder 'absent'"):
        unpack(path, tmp_path / "nothing", "absent")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.tar", "there"]


def test_verify(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    assert verify(tmp_path / "file", size=len(CONTENT), sha256=SHA256, md5=MD5) is None
    assert "expected 4" in verify(tmp_path / "file", size=4)


def test_the_first_download_without_a_checksum_is_trusted_and_recorded(server, tmp_path):
    url, path, record = f"{server.url}/file.bin", tmp_path / "file.bin", tmp_path / "file.bin.json"
    fetch(url, path)
    assert json.loads(record.read_text()) == {"url": url, "size": len(CONTENT), "sha256": SHA256}
    fetch(url, path)
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(
        InputError, match=r"is not the file .* it has SHA-256 .*; remove it to have it downloaded"
    ) as error:
        fetch(url, path)
    assert f"or remove {record}" in one_sentence(error) and path.exists()
    path.unlink()
    server.content = CONTENT[::-1]
    with pytest.raises(InputError, match=f"expected {SHA256}; it was removed") as error:
        fetch(url, path)
    assert f"or remove {record}" in one_sentence(error) and list(tmp_path.iterdir()) == [record]
    record.unlink()
    fetch(url, path)
    assert path.read_bytes() == server.content and record.exists()


def test_a_file_that_was_put_there_is_recorded(tmp_path):
    (tmp_path / "file.bin").write_bytes(CONTENT)
    fetch("http://nowhere/file.bin", tmp_path / "file.bin")
    assert json.loads((tmp_path / "file.bin.json").read_text())["sha256"] == SHA256


def test_a_file_of_the_config_is_found_or_fetched(server, tmp_path):
    assert provide(str(tmp_path / "mine.pth")) == tmp_path / "mine.pth"
    path = tmp_path / "checkpoints" / "net.pth"
    wanted = DownloadedFile(url=f"{server.url}/net.pth", path=str(path), size=len(CONTENT), sha256=SHA256)
    assert provide(wanted) == path and path.read_bytes() == CONTENT
    assert server.ranges == [None] and provide(wanted) == path and server.ranges == [None]
