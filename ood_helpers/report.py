"""What a run leaves to read and to check: report.html and manifest.json."""

import base64
import importlib.metadata
import itertools
import json
import platform
import subprocess
from pathlib import Path

import jinja2
import pandas as pd
import yaml

from ood_helpers.config import PROJECT_ROOT, resolve_path
from ood_helpers.files import sha256_of_file, write_json, write_text
from ood_helpers.pipeline import Experiment
from ood_helpers.results import METRICS, defaults, describe_table, html_table, read_results, tuning_pairs
from ood_helpers.runner import Outcome, Task

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scikit-learn",
    "pandas",
    "matplotlib",
    "safetensors",
    "papermill",
    "pydantic",
)


def write_manifest(
    experiment: Experiment, parameters: dict, seeds: list[int], outcomes: dict[str, Outcome]
) -> dict:
    """Write manifest.json beside results.csv and, without times and commit, beside the figures.

    The data root appears as ${data_root}.

    It holds parameters, config, versions, git commit, hashes of image sets, weights and banks of each seed,
    the SHA-256 of every figure and table, and what became of each notebook.
    """
    figures = experiment.figures_root / experiment.config.name
    manifest = {
        "experiment": experiment.config.name,
        "seeds": seeds,
        "parameters": {
            key: value for key, value in parameters.items() if key not in ("run_dir", "figures_dir")
        },
        "config": experiment.config.model_dump(mode="json", exclude_none=True),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {experiment.device}",
        "git_commit": _git_commit(),
        "inputs": {f"seed{seed}": experiment.with_seed(seed).record() for seed in seeds},
        "outputs": {
            name.removeprefix(f"{experiment.config.name}/"): sha256_of_file(experiment.figures_root / name)
            for outcome in outcomes.values()
            for name in outcome.outputs
            if (experiment.figures_root / name).exists() and not name.endswith(("results.csv", "means.csv"))
        },
        "notebooks": {name: outcome.status for name, outcome in outcomes.items()},
    }
    text = json.dumps(manifest)
    for root, name in (
        (str(resolve_path(parameters.get("data_root") or "data")), "${data_root}"),
        (str(experiment.run_dir), "${run_dir}"),
        (str(PROJECT_ROOT), "${project}"),
    ):
        text = text.replace(json.dumps(root)[1:-1], name)
    manifest = json.loads(text)
    write_json(experiment.directory / "manifest.json", manifest)
    write_json(figures / "manifest.json", _lasting(manifest))
    return manifest


def _lasting(manifest: dict) -> dict:
    """A manifest without what differs between runs of the same thing: the same inputs give the same file."""
    inputs = {
        seed: record | {"banks": {name: bank["key"] for name, bank in record.get("banks", {}).items()}}
        for seed, record in manifest["inputs"].items()
    }
    outputs = {name: found for name, found in manifest["outputs"].items() if "_cost." not in name}  # seconds
    return {key: value for key, value in manifest.items() if key not in ("git_commit", "notebooks")} | {
        "inputs": inputs,
        "outputs": outputs,
    }


def _git_commit() -> str:
    try:
        command = ["git", "-C", str(PROJECT_ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_report(
    experiment: Experiment, manifest: dict, tasks: list[Task], outcomes: dict[str, Outcome]
) -> Path:
    """Write report.html: results, figures (embedded), settings and links to the executed notebooks."""
    results_path = experiment.directory / "results.csv"
    figures: dict[str, list[dict]] = {}
    for task in sorted(tasks, key=lambda task: (task.notebook.stem != "30_results", task.name)):
        for name in outcomes[task.name].outputs:
            path = experiment.figures_root / name
            if path.suffix == ".png" and path.exists():
                picture = {"name": path.stem, "data": base64.b64encode(path.read_bytes()).decode()}
                figures.setdefault(task.name, []).append(picture)
    tables = []
    if results_path.exists():
        results, means_path = read_results(results_path), experiment.directory / "means.csv"
        means = pd.read_csv(means_path) if means_path.exists() else None
        parts = {"": defaults(results), ", tuned": tuning_pairs(results)}
        for (suffix, part), metric in itertools.product(parts.items(), METRICS):
            if len(part):
                tables.append(
                    {
                        "name": METRICS[metric][0] + suffix,
                        "html": html_table(part, metric, experiment.missing, means),
                        "text": describe_table(part, metric, experiment.missing),
                    }
                )
    published = experiment.config.published
    page = (
        jinja2.Environment(autoescape=True)
        .from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
        .render(
            config=experiment.config,
            manifest=manifest,
            settings=yaml.safe_dump(manifest["config"], sort_keys=False, allow_unicode=True),
            tables=tables,
            figures=figures,
            tasks=tasks,
            outcomes=outcomes,
            missing=experiment.missing,
            published_note=published.note if published else "",
            sets=experiment.describe_image_sets().drop(columns="source").to_html(index=False, border=0),
        )
    )
    path = experiment.directory / "report.html"
    write_text(path, page)
    return path
