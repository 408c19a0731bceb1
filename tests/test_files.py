"""Atomic writes, locks and hashes."""

import hashlib
import stat
import threading

import pytest

from ood_helpers.files import atomic_path, locked, sha256_of_file, sha256_of_json, write_json, write_text


def test_a_reader_sees_the_old_file_or_the_whole_new_one(tmp_path):
    path = tmp_path / "new folder" / "results.csv"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="killed"), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        assert path.read_text() == "old" and temporary.suffix == ".csv"
        raise RuntimeError("killed")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    write_json(path, {"new": 1})
    assert path.read_text() == '{\n  "new": 1\n}\n' and list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_one_at_a_time_does_the_work_and_the_others_find_it_done(tmp_path, capsys):
    path, made = tmp_path / "bank", []
    inside, done = threading.Event(), threading.Event()

    def work():
        with locked(path):
            if not made:
                inside.set()
                done.wait(10)
                made.append(1)

    first = threading.Thread(target=work)
    first.start()
    assert inside.wait(10)
    threading.Timer(0.2, done.set).start()
    work()
    first.join()
    assert made == [1]
    assert f"Waiting for another process that is making {path}" in capsys.readouterr().err


def test_hashes_are_those_of_the_content(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()
    assert sha256_of_json({"a": [1, None], "b": 2}) == sha256_of_json({"b": 2, "a": [1, None]})
    assert sha256_of_json([1]) != sha256_of_json(["1"])
