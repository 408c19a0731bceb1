"""What the tests of run_all.py share: starting it, and what a complete run leaves."""

import json
import re
import subprocess
import sys

import pandas as pd

from ood_helpers.config import PROJECT_ROOT
from ood_helpers.results import COLUMNS
from ood_helpers.runner import notebook_names

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


def check_outputs(folder, name, sets, related, labels, ablated):
    """What every complete run leaves; `related` sets resemble those tuned on, `labels` are those of the rows, `ablated`
    the figures of ablations."""
    results = pd.read_csv(folder / "runs" / name / "results.csv")
    assert list(results.columns) == COLUMNS
    assert set(results.method) == set(labels) | {f"{label} (tuned)" for label in TUNED & set(labels)}
    tuned = results.method.str.endswith("(tuned)")
    by_method = results.groupby("method").ood_set
    for method, found in by_method.apply(set).items():
        assert found == (sets - related if method.endswith("(tuned)") else sets), method
    assert results[tuned].tuned_on.notna().all()
    tune_themselves = {"Mahalanobis (ensemble)", "Mahalanobis (ensemble, flat)"}
    assert set(results[~tuned & results.tuned_on.notna()].method) == tune_themselves & set(labels)
    manifest = json.loads((folder / "runs" / name / "manifest.json").read_text())
    done = {name for name, how in manifest["notebooks"].items() if how == "done"}
    assert done == set(notebook_names())
    assert set(manifest["inputs"]["seed0"]["banks"]) == {"train", "validation", "test", "tuning", *sets}
    figures = {path.name for path in (folder / "figures" / name).iterdir()}
    assert set(manifest["outputs"]) == figures - {"manifest.json"}
    stems = [
        *("03_precompute_projection", "11_himplos_logits", "12_line_masks", "13_mos_groups", "13_mos_others"),
        *(f"14_dfb_{what}" for what in ("masks", "overlays", "parts", "hosts_auroc", "background_weight")),
        *(f"14_dfb_{what}" for what in ("foreground_share", "training")),
        *(f"15_unleashing_mask_{what}" for what in ("constraint", "training", "along_um", "along_umap")),
        *(f"15_unleashing_mask_{what}" for what in ("stages", "scores_auroc", "histograms")),
        *(f"15_unleashing_mask_{what}" for what in ("forgotten_um", "forgotten_images")),
        *(f"16_outlier_exposure_{what}" for what in ("images", "training_um", "auroc", "selected")),
        *("16_outlier_exposure_strategies_fpr95", "20_ablations_sensitivity", "20_ablations_sample_size"),
        *("30_results", "30_results_paired_differences", "30_results_mean_rank", "30_results_tuned"),
        *("30_results_fpr_conventions", "30_results_cost"),
    ]
    for stem in [*stems, *ablated]:
        assert {f"{stem}.png", f"{stem}.svg"} <= figures
    for suffix in ("csv", "md", "tex"):
        assert {f"30_results_fpr95.{suffix}", f"30_results_tuned_auroc.{suffix}"} <= figures
        assert {f"14_dfb_hosts_auroc.{suffix}", f"15_unleashing_mask_scores_fpr95.{suffix}"} <= figures
    report = (folder / "runs" / name / "report.html").read_text()
    for link in re.findall(r'href="(notebooks/[^"]+)"', report):
        assert (folder / "runs" / name / link).exists()
    assert report.count("data:image/png;base64,") == sum(figure.endswith(".png") for figure in figures)
    assert all(label in report for label in labels)
