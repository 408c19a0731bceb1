"""What comes with the kit so that its tables are the same on every machine: the trainings of an experiment, the tables that
took further trainings, a card that says how they were made, and the results over seeds."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ood_helpers.experiment import Experiment
from ood_helpers.files import sha256_of_file, sha256_of_json, write_json, write_text
from ood_helpers.storage import PYTHON, inputs_of
from ood_helpers.training.loop import finished

SEEDS = "seeds.csv"
TABLES = {"along": ("detection.csv",), "comparisons": ("results.csv", "means.csv", "held_out.csv")}
BY_SEED = ["seed", "method", "ood_set", "fpr95", "auroc"]


def ship(run: Experiment, folder: Path, *, every_training: bool) -> list[str]:
    """Copy what a run has trained into the folder of what is shipped, beside what is there; the titles of what is new.

    Parameters
    ----------
    run : has run its notebooks
    every_training : also those of networks that the config does not name; False = these alone, and all tables
    """
    path, records = folder / "index.json", {}
    if path.exists():
        records = json.loads(path.read_text())["entries"]
    names = {run.network(name).training_entry().inputs: name or "backbone" for name in ["", *_trained(run)]}
    new = []
    for kind, key, directory in _entries(run.run_dir):
        inputs = inputs_of(key)
        if inputs in records or "shipped" in key:
            continue
        files: dict[str, dict[str, str]] = {}
        if kind == "models" and finished(directory) and (every_training or inputs in names):
            title = names.get(inputs, f"other_{inputs[:8]}")
            for name, target in (
                ("weights.safetensors", f"{title}.safetensors"),
                ("history.csv", f"{title}_history.csv"),
            ):
                files[name] = _copied(directory / name, folder, target)
            files["record.json"] = {"text": (directory / "record.json").read_text()}
        elif kind == "estimates" and (directory / "loss_constraint.json").exists():
            title = "loss_constraint"
            files["loss_constraint.json"] = {"text": (directory / "loss_constraint.json").read_text()}
        elif kind in TABLES:
            title = f"{kind}_{inputs[:8]}"
            present = [name for name in TABLES[kind] if (directory / name).exists()]
            files = {name: _copied(directory / name, folder, f"tables/{title}_{name}") for name in present}
        if files:
            records[inputs] = {"kind": kind, "title": title, "files": files}
            if kind in TABLES:
                records[inputs]["code"] = sha256_of_json(key["code"])
            new.append(title)
    ordered = sorted(records.items(), key=lambda item: (item[1]["kind"], item[1]["title"]))
    write_json(path, {"python": PYTHON, "entries": dict(ordered)})
    return new


def remove_shipped(folder: Path) -> None:
    """Remove what an index lists, and the index; other files in the folder stay."""
    records = (
        json.loads((folder / "index.json").read_text())["entries"] if (folder / "index.json").exists() else {}
    )
    for record in records.values():
        for file in record["files"].values():
            (folder / file.get("file", "index.json")).unlink(missing_ok=True)
    (folder / "index.json").unlink(missing_ok=True)


def results_of_seeds(runs: Iterator[Experiment]) -> pd.DataFrame:
    """The results of all rows of several seeds, each with networks of its own."""
    return pd.concat([run.results([*run.rows()])[BY_SEED] for run in runs], ignore_index=True)


def write_seeds(table: pd.DataFrame, folder: Path) -> None:
    """Write `results_of_seeds` as the folder's seeds.csv."""
    write_text(folder / SEEDS, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def write_card(run: Experiment, folder: Path, command: str, machine: Mapping[str, Any], commit: str) -> None:
    """README.md of the folder: what each network is, its accuracy, its size and its hash."""
    lines = []
    for name in ["", *_trained(run)]:
        network, file = run.network(name), folder / f"{name or 'backbone'}.safetensors"
        if not file.exists():  # a default that no row of the config uses
            continue
        parameters = sum(parameter.numel() for parameter in network.model().parameters())
        facts = f"{parameters:,} | {network.check_accuracy():.2f} % | {sha256_of_file(file)[:16]}"
        lines.append(
            f"| `{file.name}` | {network.recipe.method if name else 'trained from scratch'} | {facts} |"
        )
    table = "\n".join(lines)
    write_text(
        folder / "README.md",
        f"""# The networks of `{run.config.name}`

`configs/{run.config.name}.yaml` describes each of them; `{command}` has trained them, with seed {run.seed}. A run loads
them where config, data and seed are the same, whatever the machine; with other settings it trains its own.

| file | method | parameters | ID accuracy | SHA-256 begins |
|---|---|---|---|---|
{table}

`*_history.csv` are the learning curves. `other_*` are networks that notebooks compare and the config does not name.
`tables/` has the results of ablations and of saved epochs, whose networks are not shipped.
`{SEEDS}` has the results of {_count(folder)} seeds, with all networks trained anew for each.
`index.json` says what belongs to which settings, with SHA-256.

Machine: {", ".join(f"{name} {value}" for name, value in machine.items())}. Commit: {commit}.
""",
    )


def seed_results(run: Experiment) -> pd.DataFrame | None:
    """The shipped results over seeds, see `write_seeds`; None where there are none, or of another experiment."""
    shipped = run.context.store.shipped
    if shipped is None or run.changes or shipped.folder.name != run.config.name:
        return None
    path = shipped.folder / SEEDS
    return pd.read_csv(path) if path.exists() else None


def _count(folder: Path) -> int:
    return pd.read_csv(folder / SEEDS).seed.nunique() if (folder / SEEDS).exists() else 0


def _trained(run: Experiment) -> list[str]:
    """The networks of the config that are trained here."""
    return [name for name, recipe in run.config.all_networks().items() if recipe.trained_here]


def _entries(root: Path) -> Iterator[tuple[str, dict, Path]]:
    """Kind, key and folder of the entries of a store that may be shipped."""
    for kind in ("models", "estimates", *TABLES):
        for path in sorted(root.glob(f"{kind}/*/key.json")):
            yield kind, json.loads(path.read_text()), path.parent


def _copied(source: Path, folder: Path, name: str) -> dict[str, str]:
    """Copy a file into the folder; what the index says of it."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    return {"file": name, "sha256": sha256_of_file(target)}
