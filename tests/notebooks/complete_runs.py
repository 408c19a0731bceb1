"""What the tests of notebooks share: starting run_all.py, and running the cells of one."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from ood_helpers.config import PROJECT_ROOT

TUNED = {
    "GEN", "KNN", "ViM", "ReAct", "DICE", "DICE + ReAct", "ASH-P", "ASH-B", "ASH-S", "SCALE", "HIMPLoS", "LINe",
    "MSP + DFB", "MSP (T = 2) + DFB", "ODIN + DFB", "Energy + DFB", "ViM + DFB",
}  # fmt: skip


def few_steps(groups, exposed=True):
    """The networks of the configs with as few steps as show that they run; `exposed`: those trained with outliers, too."""
    head = {"schedule": [5, 10, 15, 20, 25], "learning_rate": 0.1}
    unleashed = {"method": "unleashing_mask", "id_loss": {"constraint": {"draws": 1}}, "epochs": 2}
    unleashed |= {"steps_per_epoch": 1, "batch_size": 16, "learning_rate": 0.005}
    networks = {
        "group": {"groups": {"strategy": "taxonomy", "file": groups}, **head},
        "flat": head,
        "dfb": {
            "method": "dense",
            "schedule": [1, 2, 3, 4, 5],
            "batch_size": 16,
            "learning_rate": 0.03,
            "masks": {"scales": [1.0]},
        },
        "um": unleashed,
        "umap": {**unleashed, "masks": {"keep_rate": 0.9, "initial_scores": "magnitude"}},
    }
    if not exposed:
        return [f"networks={json.dumps(networks)}", "outliers=null"]
    short = {"method": "outlier_exposure", "epochs": 2, "steps_per_epoch": 1, "batch_size": 16}
    networks |= {
        "oe": short,
        "poem": {**short, "objective": "energy", "sample": {"kind": "poem", "pool_size": 100}},
        "doe": {**short, "objective": {"kind": "doe", "unperturbed_epochs": 1}},
        "ntom": {**short, "objective": "ntom", "sample": {"kind": "ntom", "pool_size": 100}},
    }
    return [f"networks={json.dumps(networks)}"]


def folders(folder):
    """The options of run_all.py that keep a run below a folder."""
    return ["--run-dir", str(folder / "runs"), "--figures-dir", str(folder / "figures"), "--device", "cpu"]


def run_all(folder, *arguments):
    command = [sys.executable, "run_all.py", *folders(folder), *arguments]
    finished = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    return finished.returncode, finished.stdout + finished.stderr


def run_cells(name, parameters):
    """Run a notebook's cells in this process, without a kernel; the names of the figures and tables that it leaves."""
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    for cell in nbformat.read(PROJECT_ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source, silent=True).raise_error()
        if "parameters" in cell.metadata.get("tags", ()):
            shell.user_ns.update(parameters)
    return {
        path.name for path in Path(parameters["figures_dir"]).glob(f"{parameters['experiment']}*/{name}*")
    }


def folder_of(parent, experiment):
    """The first folder of an experiment, whose changed settings are part of its name."""
    return min(Path(parent).glob(f"{experiment}*"), key=lambda path: path.stat().st_ctime)
