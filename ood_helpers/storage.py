"""The one store for everything that is computed once and kept: banks, activation maps, scores, intervals, trainings.

An entry is a folder <root>/<kind>/<digits>. The digits are those of a SHA-256 over its key: the inputs and settings that
its content depends on, and the code of the stage that computes it. The code is the syntax tree of the modules that the
stage names and of those of this package that they import, without what is written for readers (docstrings, comments, error
messages): a changed formula never serves a stale number, a corrected typo recomputes nothing. key.json in the folder says what the key holds.

Files are written atomically. One process at a time works on an entry; others wait and find it done. A damaged file is
computed again, with a notice.

What took a training can be shipped: a folder in weights/ holds such entries, found by their inputs and settings whatever the
code and the device, so that the tables are the same on every machine. See `Shipped`.
"""

import ast
import hashlib
import inspect
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from io import StringIO
from pathlib import Path
from types import FunctionType, MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ood_helpers.errors import InputError
from ood_helpers.files import atomic_path, locked, sha256_of_file, sha256_of_json, write_json, write_text

PACKAGE = "ood_helpers"
ROOT = Path(__file__).resolve().parent
BEGUN = time.time_ns()
OF_MACHINE = ("code", "device", "features", "training")  # of a key; the last two are keys of other entries
PYTHON = "{}.{}".format(*sys.version_info)
DIGITS = 20  # hexadecimal digits of a key in a folder's name
# What these do cannot change a number: settings are in the key themselves.
WITHOUT_NUMBERS = ("config", "errors", "files", "progress", "registry", "storage")

Arrays = dict[str, np.ndarray]
Facts = dict[str, Any]


class Store:
    """All entries below a folder; those that are shipped are copied to it when they are first asked for."""

    def __init__(self, root: Path, shipped: "Shipped | None" = None) -> None:
        self.root, self.shipped = Path(root), shipped

    def entry(self, kind: str, *, code: Iterable[str | type | FunctionType], **key: Any) -> "Entry":
        """The entry of a key, whether or not anything is in it yet.

        Parameters
        ----------
        kind : the folder, such as banks
        code : what computes the content, see `code_behind`
        key : inputs and settings, as JSON values
        """
        key |= {"code": code_behind(code)}
        inputs = inputs_of(key)
        shipped = self.shipped.records.get(inputs) if self.shipped else None
        if shipped:  # not what is computed here under the same key
            self.shipped.check_code(shipped, key["code"])
            key |= {"shipped": shipped}
        entry = Entry(self.root / kind, key, inputs)
        if shipped:
            entry.restore = lambda: self.shipped.copy(shipped, entry.directory)
        return entry


class Entry:
    """What is kept under one key.

    inputs : the digits of the key without what differs between machines and versions of the code
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], inputs: str = "") -> None:
        self.key, self.inputs = MappingProxyType(dict(key)), inputs
        self.name = sha256_of_json(dict(key))[:DIGITS]
        self.directory = folder / self.name
        self.restore: Callable[[], None] | None = None

    @contextmanager
    def locked(self) -> Iterator[Path]:
        """The folder, for one process at a time."""
        with locked(self.directory):
            if not (self.directory / "key.json").exists():
                write_json(self.directory / "key.json", dict(self.key))
            if self.restore is not None:
                self.restore()
            yield self.directory

    def json(self, name: str, compute: Callable[[], Facts], fields: Sequence[str]) -> Facts:
        """The JSON mapping of <name>.json with these fields, computed and written where there is none."""

        def read(path: Path) -> Facts:
            facts = json.loads(path.read_text())
            return {field: facts[field] for field in fields}

        return self._kept(f"{name}.json", read, write_json, compute)

    def table(
        self, name: str, compute: Callable[[], pd.DataFrame], texts: Sequence[str] = ()
    ) -> pd.DataFrame:
        """The table of <name>.csv, as read from the file, whose last line counts the others; `texts` are columns that are not
        taken for numbers."""

        def read(path: Path) -> pd.DataFrame:
            text, _, count = path.read_text().rpartition("# lines: ")
            if count != f"{text.count(chr(10))}\n":
                raise ValueError
            return pd.read_csv(StringIO(text), dtype=dict.fromkeys(texts, str))

        def write(path: Path, table: pd.DataFrame) -> None:
            text = table.to_csv(index=False)
            write_text(path, f"{text}# lines: {text.count(chr(10))}\n")

        return self._kept(f"{name}.csv", read, write, compute)

    def arrays(self, name: str, compute: Callable[[], tuple[Arrays, Facts]]) -> tuple[Arrays, Facts]:
        """Arrays, and facts as JSON, of <name>.safetensors."""
        return self._kept(
            f"{name}.safetensors", read_arrays, lambda path, value: write_arrays(path, *value), compute
        )

    def _kept(
        self,
        name: str,
        read: Callable[[Path], Any],
        write: Callable[[Path, Any], None],
        compute: Callable[[], Any],
    ) -> Any:
        with self.locked() as directory:
            path = directory / name
            if path.exists():
                try:
                    return read(path)
                except (OSError, ValueError, KeyError, TypeError, SafetensorError):
                    notice(path)
            write(path, compute())
            return read(path)  # the same value as from now on


class Shipped:
    """Entries of a store that come with the kit: a folder of their files, and index.json, which says what they are.

    index.json maps the `inputs` of an entry to its kind, its title and its files: name in the entry -> the name in the
    folder and the SHA-256, or the text itself.

    Raises
    ------
    InputError : no readable index
    """

    _told: ClassVar[set[Path]] = set()

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / "index.json").read_text())
            self.records, self.python = index["entries"], index["python"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"Found no readable {self.folder / 'index.json'} ({type(error).__name__}), expected the list of what is "
                "shipped; restore it with git checkout, or set weights: null to train here."
            ) from None

    @classmethod
    def of(cls, folder: str | None) -> "Shipped | None":
        """Those of a folder below the project, as configs name it; None for none."""
        return None if folder is None else cls(ROOT.parent / folder)

    def check_code(self, record: Mapping[str, Any], code: Mapping[str, str]) -> None:
        """Say so, once, where a shipped table was made by other code; syntax trees differ between versions of Python."""
        other = record.get("code", "") not in ("", sha256_of_json(dict(code))) and self.python == PYTHON
        if other and self.folder not in Shipped._told:
            Shipped._told.add(self.folder)
            print(
                f"Tables in {self.folder} were made by other code than this: run_all.py --retrain --update-weights makes "
                "them again.",
                file=sys.stderr,
            )

    def copy(self, record: Mapping[str, Any], directory: Path) -> None:
        """Copy the files of a record into an entry's folder where they are not there or have changed.

        Raises
        ------
        InputError : a shipped file is missing or is not the one that the index describes
        """
        for name, file in record["files"].items():
            path = directory / name
            if "text" in file:
                if not path.exists() or path.read_text() != file["text"]:
                    write_text(path, file["text"])
            elif not path.exists() or sha256_of_file(path) != file["sha256"]:
                source = self.folder / file["file"]
                if not source.exists() or sha256_of_file(source) != file["sha256"]:
                    raise InputError(
                        f"Found {source} {'changed' if source.exists() else 'missing'}, expected the file whose SHA-256 is in "
                        "index.json beside it; restore it with git checkout."
                    )
                with atomic_path(path) as temporary:
                    shutil.copyfile(source, temporary)


def inputs_of(key: Mapping[str, Any]) -> str:
    """The digits of a key without what differs between machines and versions of the code."""
    return sha256_of_json({name: value for name, value in key.items() if name not in OF_MACHINE})[:DIGITS]


class Shards:
    """A complete sequence of safetensors files in a folder, and the record of how they were made."""

    def __init__(self, directory: Path, record: Mapping[str, Any]) -> None:
        self.directory, self.record = Path(directory), dict(record)

    @classmethod
    def open(cls, directory: Path) -> "Shards | None":
        """Those of a folder; None where they are not complete. Damaged files are removed, with a notice."""
        path = Path(directory) / "record.json"
        if not path.exists():
            return None
        try:
            shards = cls(directory, json.loads(path.read_text()))
            complete = not missing_shards(directory, shards.record["rows"])
        except (OSError, ValueError, KeyError, TypeError):
            notice(path)
            complete = False
        if not complete:
            path.unlink()
            return None
        return shards

    @classmethod
    def complete(cls, directory: Path, rows: Sequence[int], **record: Any) -> "Shards":
        """Say that all shards of a folder are there; the record gets their rows, and the seconds that they took."""
        shards = cls(directory, {**record, "images": sum(rows), "rows": list(rows)})
        seconds = sum(float(shard.metadata()["seconds"]) for shard in shards)
        shards.record |= {
            "seconds": round(seconds, 3),
            "images_per_second": round(sum(rows) / max(seconds, 1e-9), 1),
        }
        write_json(shards.directory / "record.json", shards.record)
        return shards

    @property
    def paths(self) -> list[Path]:
        return [shard_path(self.directory, index) for index in range(len(self.record["rows"]))]

    def __len__(self) -> int:
        return sum(self.record["rows"])

    def __iter__(self) -> Iterator[Any]:
        """Each file, opened by safetensors, in order."""
        for path in self.paths:
            with safe_open(path, framework="pt", device="cpu") as shard:
                yield shard


def shard_path(directory: Path, index: int) -> Path:
    """Where a shard lies."""
    return Path(directory) / f"shard-{index:05d}.safetensors"


def missing_shards(directory: Path, rows: Sequence[int]) -> list[int]:
    """The numbers of the shards that are not there, with `rows` rows each; damaged ones are removed, with a notice."""
    missing = []
    for index, expected in enumerate(rows):
        path = shard_path(directory, index)
        if path.exists():
            try:
                with safe_open(path, framework="np") as shard:
                    float(shard.metadata()["seconds"])
                    names = list(shard.keys())
                    found = {shard.get_slice(name).get_shape()[0] for name in names}
                if found == {expected}:
                    continue  # else it is of a pass with shards of another size
            except (OSError, ValueError, KeyError, TypeError, SafetensorError):
                notice(path)
            path.unlink()
        missing.append(index)
    return missing


def notice(path: Path) -> None:
    """Say that a file of the store is computed again."""
    print(f"{path} is damaged and computed again.", file=sys.stderr)


def read_arrays(path: Path) -> tuple[Arrays, Facts]:
    """What `write_arrays` has written."""
    with safe_open(path, framework="np") as stored:
        facts = json.loads(stored.metadata()["facts"])
        return {key: stored.get_tensor(key) for key in stored.keys()}, facts  # noqa: SIM118


def write_arrays(path: Path, arrays: Arrays, facts: Facts) -> None:
    """One safetensors file of arrays and, as JSON in its header, facts."""
    contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata={"facts": json.dumps(facts)})


# ---- code -------------------------------------------------------------------------------------------------


def code_behind(code: Iterable[str | type | FunctionType], root: Path = ROOT) -> dict[str, str]:
    """Module -> fingerprint of its syntax tree, of the named modules and of those of the package that they import.

    Parameters
    ----------
    code : names of modules, classes whose modules are meant, or functions, which are meant alone; a class from elsewhere,
        such as a cell of a notebook, is never taken for unchanged
    root : folder of the package
    """
    found: dict[str, str] = {}
    waiting = []
    for item in code:
        name = item if isinstance(item, str) else item.__module__
        if name.split(".")[0] != PACKAGE:
            path = getattr(inspect.getmodule(item), "__file__", None)
            found[name] = tree_fingerprint(Path(path)) if path else str(time.time_ns())
        elif isinstance(item, FunctionType):
            found[f"{name}.{item.__qualname__}"] = _function(item, root, _edited(name, _path_of(name, root)))
        else:
            waiting.append(name)
    while waiting:
        name = waiting.pop()
        if name not in found:
            path = _path_of(name, root)
            found[name], imported = _module(path, root, _edited(name, path))
            waiting += imported
    return dict(sorted(found.items()))


def tree_fingerprint(path: Path) -> str:
    """Fingerprint of a Python file; its texts that tables and figures show count, too."""
    return _fingerprint(_tree(path), shown=True)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _path_of(name: str, root: Path) -> Path:
    path = root.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _edited(name: str, path: Path) -> str:
    """Sets an imported module apart whose file was changed since this process has begun: which code runs is not known."""
    changed = path.stat().st_mtime_ns
    imported = getattr(sys.modules.get(name), "__file__", None) == str(path)
    return f"{changed} {BEGUN}" if imported and changed > BEGUN else ""


@cache
def _function(function: FunctionType, root: Path, edited: str) -> str:
    """Fingerprint of a function alone."""
    node: ast.AST = _tree(_path_of(function.__module__, root))
    for name in function.__qualname__.split("."):
        node = next(inner for inner in node.body if getattr(inner, "name", "") == name)
    return _fingerprint(node) + edited


@cache
def _module(path: Path, root: Path, edited: str) -> tuple[str, tuple[str, ...]]:
    """Fingerprint of a module, and the modules that it imports from the package."""
    tree, imported = _tree(path), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            imported |= {_defined_in(node.module, alias.name, root) for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE}
    inside = {name for name in imported if name != PACKAGE and name.split(".")[1] not in WITHOUT_NUMBERS}
    return _fingerprint(tree) + edited, tuple(sorted(inside))


def _defined_in(module: str, name: str, root: Path) -> str:
    """The module that `from module import name` leads to: a submodule, or where a package has the name from."""
    if _path_of(f"{module}.{name}", root).exists():
        return f"{module}.{name}"
    path = _path_of(module, root)
    if path.name == "__init__.py":
        for node in _tree(path).body:
            names = node.names if isinstance(node, ast.ImportFrom) else []
            if name in {alias.asname or alias.name for alias in names}:
                return _defined_in(node.module, name, root)
    return module


def _fingerprint(tree: ast.AST, shown: bool = False) -> str:
    """The first digits of a SHA-256 over a syntax tree without what is written for readers only: docstrings, comments,
    the arguments of raised errors, arguments named description, and, unless they are `shown`, the title and source of a
    class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            node.exc = node.cause = None
        if isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "description"]
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") in ("title", "source"):
            node.value = node.value if shown else None
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:DIGITS]
