"""What a run leaves to read and to check: report.html and manifest.json."""

import base64
import importlib.metadata
import itertools
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import torch
import yaml

from ood_helpers.backbones.checkpoints import weights_fingerprint
from ood_helpers.config.base import PROJECT_ROOT, resolve_path
from ood_helpers.experiment import Experiment
from ood_helpers.files import sha256_of_file, write_json, write_text
from ood_helpers.plan import Task
from ood_helpers.results import METRICS, defaults, describe_table, html_table, read_results, tuning_pairs
from ood_helpers.runner import Outcome
from ood_helpers.statistics import accuracy
from ood_helpers.storage import Shards
from ood_helpers.studies import bank_names

PACKAGES = ["torch", "torchvision", "numpy", "scikit-learn", "pandas", "matplotlib", "safetensors"]
PACKAGES += ["papermill", "pydantic"]


def machine() -> dict[str, Any]:
    """What the last digits of a training depend on beside its seed: processor, vector unit, threads, BLAS."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": names[0] if names else platform.processor(),
        "vector_unit": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "blas": "MKL" if torch.backends.mkl.is_available() else "not MKL",
    }


def write_manifest(
    experiment: Experiment, parameters: dict, seeds: list[int], outcomes: dict[str, Outcome]
) -> dict:
    """Write manifest.json beside results.csv and, without times and commit, beside the figures.

    It holds parameters, config, versions, git commit, hashes of image sets, weights and banks of each seed,
    the SHA-256 of every figure and table, and what became of each notebook. Folders of this machine appear as
    ${data_root}, ${run_dir} and ${project}.
    """
    name, root = experiment.name, experiment.figures_root
    outputs = [output for outcome in outcomes.values() for output in outcome.outputs]
    manifest = {
        "experiment": experiment.config.name,
        "changes": list(experiment.changes),
        "seeds": seeds,
        "parameters": {
            key: value for key, value in parameters.items() if key not in ("run_dir", "figures_dir")
        },
        "config": experiment.config.model_dump(mode="json", exclude_none=True),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "machine": machine() | {"device": str(experiment.context.device)},
        "git_commit": git_commit(),
        "inputs": {f"seed{seed}": record(experiment.with_seed(seed)) for seed in seeds},
        "outputs": {
            output.removeprefix(f"{name}/"): sha256_of_file(root / output)
            for output in outputs
            if (root / output).exists() and not output.endswith(("results.csv", "means.csv"))
        },
        "notebooks": {notebook: outcome.status for notebook, outcome in outcomes.items()},
    }
    text, data_root = json.dumps(manifest), resolve_path(parameters.get("data_root") or "data")
    folders = {"${data_root}": data_root, "${run_dir}": experiment.run_dir, "${project}": PROJECT_ROOT}
    for placeholder, folder in folders.items():
        text = text.replace(json.dumps(str(folder))[1:-1], placeholder)
    manifest = json.loads(text)
    write_json(experiment.directory / "manifest.json", manifest)
    write_json(root / name / "manifest.json", _lasting(manifest))
    return manifest


def record(run: Experiment) -> dict:
    """What the results rest on: image sets, weights, accuracy, banks and their forward passes.

    Only what is there is recorded; nothing is trained or passed for it.
    """
    names, backbone = bank_names(run), run.backbone
    described = {}
    for name in [*names, *(["outliers"] if run.image_sets.has("outliers") else [])]:
        images = run.image_set(name)
        described[name] = {"source": images.source, "images": len(images)}
        described[name] |= {"sha256": images.fingerprint, "skipped": images.skipped}
    found = {"image_sets": described, "missing": run.image_sets.missing}
    if not backbone.ready():
        return found
    entries = {name: backbone.bank_entry(name) for name in names}
    passes = {name: Shards.open(entry.directory) for name, entry in entries.items()}
    banks = {name: {"key": entries[name].name, **stored.record} for name, stored in passes.items() if stored}
    found |= {"weights_sha256": weights_fingerprint(backbone.model()), "banks": banks}
    if not (passes["test"] and passes["train"]):
        return found
    made = {}
    for name in run.config.networks:
        if (network := run.network(name)).ready():
            weights = weights_fingerprint(network.model())
            made[name] = {"weights_sha256": weights, "approximation": network.approximation()}
    return found | {"id_accuracy": accuracy(backbone.bank("test"), backbone.head()), "networks": made}


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


def git_commit() -> str:
    """The commit of the working tree, with -dirty where it was changed; `unknown` without git."""
    try:
        command = ["git", "-C", str(PROJECT_ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_report(
    experiment: Experiment, manifest: dict, tasks: list[Task], outcomes: dict[str, Outcome]
) -> Path:
    """Write report.html: results, figures (embedded), settings and links to the executed notebooks."""
    results_path, means_path = (experiment.directory / name for name in ("results.csv", "means.csv"))
    missing = experiment.image_sets.missing_ood()
    figures: dict[str, list[dict]] = {}
    for task in sorted(tasks, key=lambda task: (task.notebook.stem != "30_results", task.name)):
        for name in outcomes[task.name].outputs:
            path = experiment.figures_root / name
            if path.suffix == ".png" and path.exists():
                picture = {"name": path.stem, "data": base64.b64encode(path.read_bytes()).decode()}
                figures.setdefault(task.name, []).append(picture)
    tables = []
    if results_path.exists():
        results = read_results(results_path)
        means = pd.read_csv(means_path) if means_path.exists() else None
        parts = {"": defaults(results), ", tuned": tuning_pairs(results)}
        for (suffix, part), metric in itertools.product(parts.items(), METRICS):
            if len(part):
                table = html_table(part, metric, missing, means)
                text = describe_table(part, metric, missing)
                tables.append({"name": METRICS[metric][0] + suffix, "html": table, "text": text})
    published = experiment.config.published
    environment = jinja2.Environment(autoescape=True, loader=jinja2.PackageLoader("ood_helpers", ""))
    page = environment.get_template("report.html").render(
        config=experiment.config,
        changes=experiment.changes,
        manifest=manifest,
        settings=yaml.safe_dump(manifest["config"], sort_keys=False, allow_unicode=True),
        tables=tables,
        figures=figures,
        tasks=tasks,
        outcomes=outcomes,
        missing=experiment.image_sets.missing,
        published_note=published.note if published else "",
        sets=experiment.image_sets.describe().drop(columns="source").to_html(index=False, border=0),
    )
    path = experiment.directory / "report.html"
    write_text(path, page)
    return path
