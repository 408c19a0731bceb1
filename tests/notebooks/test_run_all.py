"""run_all.py from the command line to the report, on the embedded digits and on real CIFAR-10; papermill alone."""

import json
import os
import re
import subprocess
import sys

import pandas as pd
import pytest

from ood_helpers.config import PROJECT_ROOT
from ood_helpers.results import COLUMNS
from ood_helpers.runner import notebook_names

METHODS = {
    "MSP", "MaxLogit", "Energy", "GEN", "KL matching", "ODIN", "GradNorm", "Mahalanobis", "Mahalanobis (ensemble)",
    "KNN", "ViM", "ReAct", "DICE", "DICE + ReAct", "ASH-P", "ASH-B", "ASH-S", "SCALE", "HIMPLoS", "LINe", "MOS",
    "MSP (flat)", "ODIN (flat)", "Energy (flat)", "Mahalanobis (ensemble, flat)", "KL matching (flat)",
    "MSP (T = 2)", "MSP (dfb)", "MSP (T = 2, dfb)", "ODIN (dfb)", "Energy (dfb)", "ViM (dfb)", "DFB background",
    "MSP + DFB", "MSP (T = 2) + DFB", "ODIN + DFB", "Energy + DFB", "ViM + DFB",
    "MSP + UM", "ODIN + UM", "Energy + UM", "Mahalanobis + UM", "ReAct + UM", "DICE + UM", "ASH-S + UM",
    "MSP + UMAP", "ODIN + UMAP", "Energy + UMAP", "Mahalanobis + UMAP", "ReAct + UMAP", "DICE + UMAP", "ASH-S + UMAP",
}  # fmt: skip
TUNED = {
    "GEN", "KNN", "ViM", "ReAct", "DICE", "DICE + ReAct", "ASH-P", "ASH-B", "ASH-S", "SCALE", "HIMPLoS", "LINe",
    "MSP + DFB", "MSP (T = 2) + DFB", "ODIN + DFB", "Energy + DFB", "ViM + DFB",
}  # fmt: skip
ABLATIONS = [
    "mos_ablations.depth_recipe.schedule=[1, 2, 3, 4, 5]",
    "dfb_ablations.thresholds=[0.5]",
    "dfb_ablations.recipe.schedule=[5, 10, 15, 20, 25]",
]


def few_steps(groups, exposed=True):
    """The networks of the configs, and the ablations that both have, with as few steps as show that they run."""
    head = {"schedule": [5, 10, 15, 20, 25], "learning_rate": 0.1}
    unleashed = {"method": "unleashing_mask", "estimate": {"draws": 1}, "epochs": 2, "steps_per_epoch": 2}
    unleashed |= {"batch_size": 16, "learning_rate": 0.005}
    networks = {
        "group": {"groups": {"strategy": "taxonomy", "file": groups}, **head},
        "flat": head,
        "dfb": {
            "schedule": [1, 2, 3, 4, 5],
            "batch_size": 32,
            "learning_rate": 0.03,
            "masks": {"scales": [1.0]},
        },
        "um": unleashed,
        "umap": {**unleashed, "keep_rate": 0.9, "initial_scores": "magnitude"},
    }
    if not exposed:
        return [f"networks={json.dumps(networks)}", "outliers=null", *ABLATIONS]
    short = {"method": "outlier_exposure", "epochs": 2, "steps_per_epoch": 1, "batch_size": 16}
    networks |= {
        "oe": short,
        "poem": {**short, "objective": "energy", "sample": "poem", "pool_size": 100},
        "doe": {**short, "objective": "doe", "doe": {"unperturbed_epochs": 1}},
        "ntom": {**short, "objective": "ntom", "sample": "ntom", "pool_size": 100},
    }
    return [f"networks={json.dumps(networks)}", *ABLATIONS]


def run_all(folder, *arguments):
    command = [
        sys.executable,
        "run_all.py",
        "--run-dir",
        folder / "runs",
        "--figures-dir",
        folder / "figures",
        "--device",
        "cpu",
    ]
    finished = subprocess.run([*command, *arguments], cwd=PROJECT_ROOT, capture_output=True, text=True)
    return finished.returncode, finished.stdout + finished.stderr


def check_outputs(folder, name, sets, related, left_out=frozenset()):
    """What every complete run leaves; `related` sets resemble those tuned on, notebooks `left_out` have nothing to show. Returns the results of the defaults."""
    results = pd.read_csv(folder / "runs" / name / "results.csv")
    assert list(results.columns) == COLUMNS
    assert set(results.method) == METHODS | {f"{method} (tuned)" for method in TUNED}
    tuned = results.method.str.endswith("(tuned)")
    by_method = results.groupby("method").ood_set
    for method, found in by_method.apply(set).items():
        assert found == (sets - related if method.endswith("(tuned)") else sets), method
    assert results[tuned].tuned_on.notna().all()
    assert results[~tuned & results.tuned_on.notna()].method.unique().tolist() == [
        "Mahalanobis (ensemble)",
        "Mahalanobis (ensemble, flat)",
    ]
    results = results[~tuned]
    manifest = json.loads((folder / "runs" / name / "manifest.json").read_text())
    assert set(manifest["notebooks"]) == set(notebook_names()) - left_out
    assert set(manifest["inputs"]["seed0"]["banks"]) == {"train", "validation", "test", "tuning", *sets}
    figures = {path.name for path in (folder / "figures" / name).iterdir()}
    assert set(manifest["outputs"]) == figures - {"manifest.json"}
    stems = ["12_line_masks", "11_himplos_logits", "30_results", "03_precompute_projection"]
    stems += ["13_mos_groups", "13_mos_others", "13_mos_grouping", "13_mos_depth", "13_mos_number_of_groups"]
    stems += [
        "14_dfb_masks",
        "14_dfb_overlays",
        "14_dfb_parts",
        "14_dfb_hosts_auroc",
        "14_dfb_background_weight",
    ]
    stems += ["14_dfb_foreground_share", "14_dfb_training", "14_dfb_which_masks"]
    stems += [f"15_unleashing_mask_{what}" for what in ("constraint", "training", "along_um", "along_umap")]
    stems += [
        f"15_unleashing_mask_{what}"
        for what in ("scores_auroc", "histograms", "forgotten_um", "forgotten_images")
    ]
    of_exposure = ("_images", "_training_um", "_auroc", "_selected", "_strategies_fpr95")
    stems += [] if left_out else [f"16_outlier_exposure{what}" for what in of_exposure]
    stems += ["20_ablations_sensitivity", "20_ablations_sample_size", "30_results_paired_differences"]
    for stem in [
        *stems,
        "30_results_mean_rank",
        "30_results_tuned",
        "30_results_fpr_conventions",
        "30_results_cost",
    ]:
        assert {f"{stem}.png", f"{stem}.svg"} <= figures
    for suffix in ("csv", "md", "tex"):
        assert {f"30_results_fpr95.{suffix}", f"30_results_tuned_auroc.{suffix}"} <= figures
        assert {f"13_mos_grouping_fpr95.{suffix}", f"14_dfb_hosts_auroc.{suffix}"} <= figures
        assert {f"15_unleashing_mask_scores_fpr95.{suffix}"} <= figures
    report = (folder / "runs" / name / "report.html").read_text()
    for link in re.findall(r'href="(notebooks/[^"]+)"', report):
        assert (folder / "runs" / name / link).exists()
    assert report.count("data:image/png;base64,") == sum(figure.endswith(".png") for figure in figures)
    assert all(method in report for method in METHODS)
    return results


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    settings = [
        "backbone.training.epochs=4",
        "backbone.depth=10",
        "backbone.expected_accuracy=null",
        "metrics.bootstrap_resamples=50",
        *few_steps("digits"),
        "unleashing_ablations={factors: [1], keep_rates: [0.9], epochs: [1], estimate_keep_rates: [0.9], images: 100}",
    ]
    arguments = ["--set", *settings, "--jobs", "2"]
    return folder, arguments, run_all(folder, *arguments)


def test_digits_run_from_nothing_to_the_report(digits):
    folder, _, (status, output) = digits
    assert status == 0, output
    sets = {"letters", "chimeras", "photographs", "textures", "noise"}
    check_outputs(folder, "digits", sets, related={"chimeras"})
    figures = {path.name for path in (folder / "figures" / "digits").iterdir()}
    sweeps = {
        f"15_unleashing_mask_ablation_{what}.png" for what in ("loss_constraint", "keep_rate", "epochs")
    }
    assert sweeps | {"15_unleashing_mask_stages.png"} <= figures
    assert "report.html" in output and "results.csv" in output
    assert "small demonstration" in output  # honest about what it is


def test_a_second_run_has_nothing_to_do_and_says_so(digits):
    folder, arguments, _ = digits
    manifest = folder / "figures" / "digits" / "manifest.json"
    before = manifest.read_bytes()
    status, output = run_all(folder, *arguments)
    assert status == 0 and output.count("up to date") == len(notebook_names())
    assert manifest.read_bytes() == before
    status, output = run_all(folder, *arguments, "--dry-run", "--force")
    assert output.count("would run") == len(notebook_names())


def test_a_failing_notebook_gives_exit_status_1_and_names_cell_and_error(digits):
    folder, arguments, _ = digits
    wrong = ["backbone.expected_accuracy=3", "backbone.tolerance=0.5"]
    status, output = run_all(
        folder, *arguments, "--set", *wrong, "--only", "00_start_here", "02_backbone", "03_precompute"
    )
    assert status == 1
    assert re.search(r"02_backbone\s+failed.*cell \d+: InputError: The ID accuracy of digits is", output)
    assert re.search(r"03_precompute\s+skipped: it needs 02_backbone", output)
    assert re.search(r"00_start_here\s+done", output)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "himplos.percentil=3"], "did you mean 'percentile'"),
        (["--config", "cifar"], "No experiment 'cifar'"),
        (["--only", "12_lien"], "did you mean '12_line'"),
        (["--config", "cifar10_npz", "--data-root", "/nowhere"], "/nowhere/data/ood/svhn.npz"),
        (["--seeds", "1", "1"], "expected different numbers"),
        (["--forc"], "unrecognized arguments: --forc"),
    ],
)
def test_wrong_arguments_are_sentences_without_a_traceback(tmp_path, arguments, sentence):
    status, output = run_all(tmp_path, *arguments)
    assert status != 0 and sentence in output and "Traceback" not in output


def test_list_names_notebooks_experiments_and_detectors(tmp_path):
    status, output = run_all(tmp_path, "--list")
    assert status == 0
    for name in [*notebook_names(), "cifar10_npz", "himplos", "after 03_precompute"]:
        assert name in output


def test_real_cifar10_run_from_images_to_the_report(shared, tmp_path):
    sets = {"SVHN", "Textures", "Tiny-ImageNet", "CIFAR-100"}
    settings = [f"ood.{name}.images.subset.first=48" for name in sets]
    settings += [
        "metrics.bootstrap_resamples=100",
        "tuning.images.subset.first=48",
        "id.train.subset.first=512",
        "id.test.subset.first=128",
    ]
    settings += [
        "id.validation.subset.first=64",
        "mahalanobis_ensemble.noise=0.0005",
        "mahalanobis_flat.noise=0.0",
    ]
    settings += [*few_steps("cifar10", exposed=False), "mos_ablations.depths=[0, 1]"]
    settings += ["unleashing_ablations={images: 32}", "odin_um.noise=0.0", "odin_umap.noise=0.0"]
    settings += ["backbone.expected_accuracy=93.7500", "backbone.tolerance=0.01"]  # 120 of images 218 to 345
    status, output = run_all(
        tmp_path, "--config", "cifar10_npz", "--data-root", shared, "--jobs", "2", "--set", *settings
    )
    assert status == 0, output
    results = check_outputs(
        tmp_path, "cifar10_npz", sets, related={"Tiny-ImageNet"}, left_out={"16_outlier_exposure"}
    )
    heads = results.method.str.contains("flat") | (results.method == "MOS")
    dense = results.method.str.contains(
        "dfb|DFB"
    )  # five steps of it: too few to ask for more than that it runs
    unleashed = results.method.str.contains(r"\+ UM", regex=True)
    assert results[~heads & ~dense & ~unleashed].id_accuracy.unique().tolist() == pytest.approx(
        [100 * 120 / 128], abs=1e-3
    )
    assert results[heads].id_accuracy.between(90, 98).all() and results[heads].id_accuracy.nunique() <= 2
    assert results.n_id.eq(128).all() and results.n_ood.eq(48).all()
    assert results[dense].id_accuracy.nunique() == 1
    assert results[unleashed].id_accuracy.gt(80).all() and results[unleashed].id_accuracy.nunique() <= 2
    means = results[(results.group == "far") & ~dense & ~unleashed].groupby("method").auroc.mean()
    assert means.min() > 60  # every method has learnt something from the real features
    assert results.groupby("method").extra_passes.first().gt(0).pipe(lambda some: set(some[some].index)) == {
        "ODIN",
        "ODIN (dfb)",
        "ODIN + DFB",
        "Mahalanobis (ensemble)",
    }
    published = results[results.published_fpr95.notna()]
    assert set(published.ood_set) == {"SVHN", "Textures"} and "Energy" in set(published.method)
    manifest = (tmp_path / "runs" / "cifar10_npz" / "manifest.json").read_text()
    assert str(shared) not in manifest and "${data_root}" in manifest


def test_papermill_runs_a_notebook_by_itself(digits, tmp_path):
    folder, arguments, _ = digits
    settings = arguments[1:-2]
    command = [
        sys.executable,
        "-m",
        "papermill",
        "notebooks/12_line.ipynb",
        tmp_path / "out.ipynb",
        "--no-progress-bar",
    ]
    parameters = {"run_dir": folder / "runs", "figures_dir": tmp_path / "figures", "device": "cpu"}
    options = [item for key, value in parameters.items() for item in ("-p", key, str(value))]
    finished = subprocess.run(
        [*command, *options, "-y", json.dumps({"overrides": settings})],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "figures" / "digits" / "12_line_masks.png").exists()
