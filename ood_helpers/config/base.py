"""The model that every part of a config derives from, and the paths that configs name."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from ood_helpers.errors import InputError, nearest

PROJECT_ROOT = Path(__file__).resolve().parents[2]
CONFIG_DIRECTORY = PROJECT_ROOT / "configs"


class Model(BaseModel):
    """A frozen pydantic model that refuses unknown keys, naming the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}; {nearest(str(key), cls.model_fields)}")
        return data

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """The same settings with some of them changed, and validated again.

        Parameters
        ----------
        changes : dotted path -> value, for example {"images.depth": 1, "epochs": 5}

        Raises
        ------
        InputError : unknown setting, or value out of range
        """
        data = self.model_dump()
        for path, value in changes.items():
            set_path(data, path, copy.deepcopy(value))
        try:
            return type(self).model_validate(data)
        except ValidationError as error:
            raise InputError(describe(error, data)) from None


class Download(Model):
    """A file on the web, and what is known of it. Without a checksum the first download is trusted, recorded, and
    compared with from then on."""

    url: str
    size: PositiveInt | None = Field(None, description="bytes")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    md5: str | None = Field(None, pattern="^[0-9a-f]{32}$")


class DownloadedFile(Download):
    """A file that is fetched to `path` if it is not there."""

    path: str


def describe(error: ValidationError, data: Any) -> str:
    """All problems that pydantic has found in some data, in one sentence."""
    problems = []
    for problem in error.errors():
        place, value = [], data
        for part in problem["loc"]:
            # pydantic also names the kind of a value that has several kinds: that is no key of the data.
            missing = problem["type"] == "missing" and part == problem["loc"][-1]
            if isinstance(value, Mapping) and (missing or part in value):
                place.append(str(part))
                value = value.get(part)
            elif isinstance(value, list | tuple) and isinstance(part, int):
                value = value[part] if part < len(value) else None
                place.append(str(value.get("name", part) if isinstance(value, Mapping) else part))
        message, found = problem["msg"].removeprefix("Value error, "), problem.get("input")
        if problem["type"] == "union_tag_invalid":
            tags = problem["ctx"]["expected_tags"].replace("'", "").split(", ")
            message = f"found {problem['ctx']['tag']!r}; {nearest(problem['ctx']['tag'], tags)}"
        elif problem["type"] == "union_tag_not_found":
            message = f"{problem['ctx']['discriminator']} is missing"
        elif problem["type"] not in ("missing", "value_error") and not isinstance(found, dict | list):
            message = f"found {found!r}, expected: {message}"
        problems.append(f"{'.'.join(place)}: {message}" if place else message)
    return "; ".join(problems)


def set_path(data: dict, path: str, value: Any) -> None:
    """Set one value of nested mappings: `path` is KEY.KEY; lists are entered by the `name` of their item.

    Raises
    ------
    ValueError : the path enters a list by an unknown name, ends in a list, or goes below a plain value
    """
    place: Any = data
    walked: list[str] = []
    while True:
        named = place
        if isinstance(place, list):
            named = {item.get("name"): item for item in place if isinstance(item, dict)}
        key, rest = split_path(path, named)
        if rest is None:
            break
        if isinstance(place, list) and key not in named:
            raise ValueError(f"names {key!r}; {nearest(key, map(str, named))}")
        if named.get(key) is None:
            named[key] = {}
        place, path = named[key], rest
        walked.append(key)
        if not isinstance(place, dict | list):
            above = ".".join(walked)
            raise ValueError(
                f"goes below {above}, which is the plain value {place!r}; give all of {above} instead."
            )
    if isinstance(place, list):
        raise ValueError("ends in a list; name one of its items and a key of it.")
    place[key] = value


def split_path(path: str, names: Iterable[str]) -> tuple[str, str | None]:
    """The first name of a dotted path and what follows it (None: nothing): the longest of `names` that the
    path starts with, as names such as pytorch_ood.KNN contain dots, else everything up to the first dot."""
    fitting = [name for name in names if f"{path}.".startswith(f"{name}.")]
    first = max(fitting, key=len, default=path.partition(".")[0])
    return first, path[len(first) + 1 :] if len(path) > len(first) else None


def resolve_path(path: str | Path) -> Path:
    """An absolute path: as given, below the working directory if it exists there, else below the project. So
    `../shared` is the same in JupyterLab, which runs notebooks from notebooks/, and in papermill."""
    path = Path(path).expanduser()
    if not path.is_absolute():
        path = path if path.exists() else PROJECT_ROOT / path
    return path.resolve()


def yaml_path(name: str | Path, directory: Path, kind: str) -> Path:
    """The path of a YAML file: `name` is that of a file in `directory` (without .yaml), or a path.

    Raises
    ------
    InputError : there is none
    """
    names = sorted(found.stem for found in directory.glob("*.yaml"))
    is_path = Path(name).suffix in (".yaml", ".yml")
    path = resolve_path(name) if is_path else directory / f"{name}.yaml"
    if path.exists():
        return path
    if is_path:
        raise InputError(f"No {kind} {path}; give a path to a YAML file or a name: {', '.join(names)}.")
    folder = directory.relative_to(PROJECT_ROOT).as_posix()
    raise InputError(f"No {kind} {str(name)!r} in {folder}/; {nearest(str(name), names)}")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises
    ------
    InputError : it is not valid YAML
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
