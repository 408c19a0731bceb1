"""Reading a config: `extends`, `${data_root}`, changed settings, and errors in one sentence."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ood_helpers.config.base import (
    CONFIG_DIRECTORY,
    describe,
    read_yaml,
    resolve_path,
    set_path,
    split_path,
    yaml_path,
)
from ood_helpers.config.experiment import ExperimentConfig
from ood_helpers.errors import InputError, nearest
from ood_helpers.files import sha256_of_json

# A mapping that sets one of these to another value replaces the mapping that it would extend.
CHOICES = ("source", "set", "architecture", "method", "strategy", "kind", "detector")

LONGEST = 80  # characters of overrides in a folder's name
OWN = ("name", "description")  # what a config does not take over from those that it extends


def config_names() -> list[str]:
    """Names of the experiments in configs/."""
    return sorted(path.stem for path in CONFIG_DIRECTORY.glob("*.yaml"))


def load_config(
    experiment: str | Path, data_root: str | Path | None = None, overrides: str | Iterable[str] = ()
) -> ExperimentConfig:
    """Read and validate an experiment.

    Parameters
    ----------
    experiment : name of a file in configs/ (without .yaml), or a path to a YAML file
    data_root : folder that replaces `${data_root}`; None = data/ in the project
    overrides : settings such as "himplos.percentile=50", "backbone.training.epochs=3" or
        "ood.SVHN.images.subset.first=256"; the value is YAML. See `listed` for a single text

    Raises
    ------
    InputError : unknown experiment, unreadable YAML, unknown key, invalid value
    """
    path = yaml_path(experiment, CONFIG_DIRECTORY, "experiment")
    root = str(resolve_path(data_root or "data"))
    data = _substitute(_read(path, ()), root)  # a copy: what YAML anchors share is changed apart
    data.setdefault("name", path.stem)
    for override in listed(overrides):
        _apply_override(data, override)
    data = _substitute(data, root)
    try:
        return ExperimentConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{path.name}: {describe(error, data)}") from None


def listed(overrides: str | Iterable[str]) -> tuple[str, ...]:
    """Overrides one by one: of a list, of a text that is a list in YAML (`papermill -p` hands lists over so), or of one text.

    Raises
    ------
    InputError : something else than texts
    """
    given = overrides
    if isinstance(overrides, str):
        text = overrides.strip()
        try:
            overrides = yaml.safe_load(text) if text.startswith("[") else [text] if text else []
        except yaml.YAMLError:
            overrides = [None]
    overrides = tuple(overrides)
    if not all(isinstance(override, str) for override in overrides):
        raise InputError(
            f"Found overrides {given!r}, expected KEY=VALUE or a list of these; correct the quotes."
        )
    return overrides


def changes_as_name(changes: tuple[str, ...]) -> str:
    """Overrides as part of a folder's name."""
    name = "+".join(changes)
    readable = re.sub(r"[^\w.=+-]+", "_", name)[:LONGEST]
    return name if readable == name else f"{readable}_{sha256_of_json(changes)[:8]}"


def _read(path: Path, extended_by: tuple[Path, ...]) -> dict:
    """The content of a config on top of the files that it extends: paths relative to its folder, or names in configs/."""
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise InputError(f"{path} holds {type(data).__name__}, expected a mapping of experiment settings.")
    bases = data.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(f"{path}: extends is {bases!r}, expected a file or a list of files.")
    merged: dict = {}
    for base in bases:
        ending = "" if base.endswith((".yaml", ".yml")) else ".yaml"
        places = [(folder / (base + ending)).resolve() for folder in (path.parent, CONFIG_DIRECTORY)]
        base_path = next((place for place in places if place.exists()), None)
        if base_path is None:
            raise InputError(
                f"{path} extends {base}, but there is neither {places[0]} nor {places[1]}; correct the path."
            )
        if base_path in (path, *extended_by):
            raise InputError(f"{path} extends {base}, which extends it in turn; remove one of the two.")
        merged = _merged(merged, _read(base_path, (path, *extended_by)))
    return _merged({key: value for key, value in merged.items() if key not in OWN}, data)


def _merged(base: dict, changes: Mapping) -> dict:
    """Mappings are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        if both and all(old.get(choice) == value[choice] for choice in CHOICES if choice in value):
            value = _merged(old, value)
        merged[key] = value
    return merged


def _substitute(value: Any, data_root: str) -> Any:
    """Replace `${data_root}` in every string; the fields' own defaults contain it too."""
    if isinstance(value, dict):
        folder = {"torchvision": "root", "archive": "directory"}.get(str(value.get("source")))
        filled = {folder: "${data_root}", **value} if folder else value
        return {key: _substitute(item, data_root) for key, item in filled.items()}
    if isinstance(value, list):
        return [_substitute(item, data_root) for item in value]
    return value.replace("${data_root}", data_root) if isinstance(value, str) else value


def _apply_override(data: dict, override: str) -> None:
    """Set one value of the raw config: KEY.KEY=VALUE; what starts with the name of a row means that row."""
    match = re.fullmatch(r"\s*([^=\s]+)\s*=(.*)", override, flags=re.DOTALL)
    if not match:
        raise InputError(
            f"The setting {override!r} is not of the form KEY=VALUE, for example himplos.percentile=50."
        )
    path = match[1]
    try:
        value = yaml.safe_load(match[2])
    except yaml.YAMLError:
        raise InputError(
            f"The value of the setting {override!r} is not valid YAML; put text with brackets in quotes."
        ) from None
    group, _, name = path.partition(".")
    known = data.get("ablations") or {}
    if group == "ablations" and value is None and name and name not in known:
        raise InputError(
            f"The setting {override!r} leaves out an ablation that is not there; {nearest(name, known)}"
        )
    detectors = data.get("detectors") or {}
    if split_path(path, data)[0] not in ExperimentConfig.model_fields:
        row, _ = split_path(path, detectors)
        if row not in detectors:
            raise InputError(
                f"The setting {override!r} starts with {row!r}, neither a setting nor a detector of this "
                "experiment; " + nearest(row, [*ExperimentConfig.model_fields, *detectors])
            )
        path = f"detectors.{path}"
    try:
        set_path(data, path, value)
    except ValueError as error:
        raise InputError(f"The setting {override!r} {error}") from None
