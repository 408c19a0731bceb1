"""run_all.py from the command line to the report, on the embedded digits; papermill alone."""

import json
import os
import re
import runpy
import subprocess
import sys

import pandas as pd
import pytest
from complete_runs import TUNED, few_steps, folder_of, folders, run_all, run_cells

from ood_helpers.config import PROJECT_ROOT, load_config
from ood_helpers.plan import notebook_names
from ood_helpers.results import COLUMNS

SETS = {"letters", "chimeras", "photographs", "textures", "noise"}
# Some rows of each kind: figures of all take long to draw, and test_real_cifar10 scores them all.
ROWS = {
    "msp": "MSP", "energy": "Energy", "odin": "ODIN", "mahalanobis": "Mahalanobis", "knn": "KNN", "vim": "ViM",
    "react": "ReAct", "dice": "DICE", "himplos": "HIMPLoS", "line": "LINe", "mos": "MOS", "msp_flat": "MSP (flat)",
    "energy_dfb": "Energy (dfb)", "dfb_background": "DFB background", "dfb_energy": "Energy + DFB",
    "dfb_odin": "ODIN + DFB", "msp_um": "MSP + UM", "energy_um": "Energy + UM", "energy_umap": "Energy + UMAP",
}  # fmt: skip

RUN = ["02_backbone", "03_precompute", "30_results"]  # by run_all.py, the others here
LEFT = {  # figures and tables of the others
    "13_mos": "groups.png others.png grouping.png grouping_fpr95.md depth.png number_of_groups.png",
    "14_dfb": "masks.png overlays.png parts.png hosts_auroc.tex background_weight.png foreground_share.png training.png "
    "which_masks.png",
    "15_unleashing_mask": "constraint.png training.png along_um.png along_umap.png stages.png scores_auroc.md histograms.png "
    "forgotten_um.png forgotten_images.png ablation_loss_constraint.png ablation_keep_rate.png ablation_epochs.png",
    "16_outlier_exposure": "images.png training_um.png auroc.csv selected.png strategies_fpr95.png",
    "20_ablations": "sensitivity.png sample_size.svg",
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    config = load_config("digits")
    grids = {row: grid for row, grid in config.tuning.grids.items() if row in ROWS}
    settings = [
        f"detectors={json.dumps({row: config.detectors[row] for row in ROWS})}",
        f"tuning.grids={json.dumps(grids)}",
        "backbone.training.epochs=4",
        "backbone.depth=10",
        "backbone.growth_rate=12",
        "backbone.expected_accuracy=null",
        "metrics.bootstrap_resamples=50",
        *(f"ood.{name}.images.count=100" for name in SETS),
        *few_steps("digits"),
        "ablations.depth.changes.schedule=[1, 2, 3, 4, 5]",
        "ablations.masks.values=[0.5]",
        "ablations.masks.changes.schedule=[5, 10, 15, 20, 25]",
        "ablations.loss_constraint={network: um, vary: id_loss.constraint.factor, values: [1]}",
        "ablations.keep_rate={network: umap, vary: masks.keep_rate, values: [0.9]}",
        "ablations.epochs={network: um, vary: epochs, values: [1]}",
        "ablations.estimate.values=[0.9]",
        "watched.images=100",
    ]
    arguments = ["--set", *settings, "--jobs", "2", "--only", *RUN]
    return folder, arguments, run_all(folder, *arguments)


def test_digits_run_from_nothing_to_the_report(digits):
    folder, _, (status, output) = digits
    assert status == 0, output
    assert "report.html" in output and "results.csv" in output
    assert "small demonstration" in output  # honest about what it is
    results = pd.read_csv(folder_of(folder / "runs", "digits") / "results.csv")
    assert list(results.columns) == COLUMNS
    tuned = results.method.str.endswith("(tuned)")
    assert set(results[~tuned].method) == set(ROWS.values())
    assert set(results[tuned].method) == {f"{label} (tuned)" for label in TUNED & set(ROWS.values())}
    assert set(results[tuned].ood_set) == SETS - {"chimeras"}  # they were tuned on such images
    assert set(results[~tuned].groupby("method").ood_set.apply(frozenset)) == {frozenset(SETS)}
    assert results.tuned_on.notna().equals(tuned)
    manifest = json.loads((folder_of(folder / "runs", "digits") / "manifest.json").read_text())
    assert [name for name, how in manifest["notebooks"].items() if how == "done"] == RUN
    assert set(manifest["inputs"]["seed0"]["banks"]) == {"train", "validation", "test", "tuning", *SETS}
    figures = {path.name for path in (folder_of(folder / "figures", "digits")).iterdir()}
    assert set(manifest["outputs"]) == figures - {"manifest.json"}
    for what in ("", "_paired_differences", "_mean_rank", "_tuned", "_fpr_conventions", "_cost"):
        assert {f"30_results{what}.png", f"30_results{what}.svg"} <= figures
    for suffix in ("csv", "md", "tex"):
        assert {f"30_results_fpr95.{suffix}", f"30_results_tuned_auroc.{suffix}"} <= figures
    report = (folder_of(folder / "runs", "digits") / "report.html").read_text()
    for link in re.findall(r'href="(notebooks/[^"]+)"', report):
        assert (folder_of(folder / "runs", "digits") / link).exists()
    assert report.count("data:image/png;base64,") == sum(figure.endswith(".png") for figure in figures)
    assert all(label in report for label in ROWS.values())


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs run_all.py in this process; status and output."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_all.py", "--run-dir", str(tmp_path / "runs"), *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(PROJECT_ROOT / "run_all.py"), run_name="__main__")
        output = capsys.readouterr()
        return stop.value.code, output.out + output.err

    return run


def test_a_second_run_has_nothing_to_do_and_says_so(digits, command):
    folder, arguments, _ = digits
    manifest = folder_of(folder / "figures", "digits") / "manifest.json"
    before = manifest.read_bytes()
    status, output = command(*folders(folder), *arguments)
    assert status == 0 and output.count("up to date") == len(RUN)
    assert manifest.read_bytes() == before


def test_a_failing_notebook_gives_exit_status_1_and_names_cell_and_error(digits, command):
    folder, arguments, _ = digits
    wrong = ["backbone.expected_accuracy=3", "backbone.tolerance=0.5"]
    status, output = command(*folders(folder), *arguments, "--set", *wrong)
    assert status == 1
    assert re.search(r"02_backbone\s+failed.*cell \d+: InputError: The ID accuracy of digits is", output)
    assert re.search(r"03_precompute\s+skipped: it needs 02_backbone", output)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "himplos.percentil=3"], "did you mean 'percentile'"),
        (["--config", "cifar"], "No experiment 'cifar'"),
        (["--only", "12_lien"], "did you mean '12_line'"),
        (["--config", "cifar10_npz", "--data-root", "/nowhere"], "/nowhere/data/ood/svhn.npz"),
        (["--seeds", "1", "1"], "expected different numbers"),
        (["--verify", "--set", "line.delta=0.8"], "expected the experiment as it is"),
        (["--update-weights"], "expected --retrain beside it"),
        (["--retrain", "--only", "12_line"], "it trains all of the config"),
        (["--forc"], "unrecognized arguments: --forc"),
    ],
)
def test_wrong_arguments_are_sentences_without_a_traceback(command, arguments, sentence):
    status, output = command(*arguments)
    assert status != 0 and sentence in output and "Traceback" not in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--config", "cifar"],
        ["--set", "backbone.epochs=3"],
        ["--only", "12_lien"],
        ["--set", "knn.kk=3"],
    ],
)
def test_help_and_a_wrong_name_are_answered_without_pytorch(arguments):
    code = "import runpy, sys\ntry: runpy.run_path('run_all.py', run_name='__main__')\nfinally: assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, *arguments]
    finished = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert "AssertionError" not in finished.stderr and finished.stdout.strip()


def test_list_names_notebooks_experiments_and_detectors(command):
    status, output = command("--list")
    assert status == 0
    for name in [*notebook_names(), "cifar10_npz", "himplos", "after 03_precompute"]:
        assert name in output


def test_a_dry_run_says_what_would_run(command, tmp_path):
    status, output = command("--dry-run")
    assert status == 0 and output.count("would run") == len(notebook_names())
    assert not list(tmp_path.rglob("*.ipynb"))


def test_papermill_runs_a_notebook_by_itself(digits, tmp_path):
    folder, arguments, _ = digits
    settings = arguments[1 : arguments.index("--jobs")]
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
    assert (folder_of(tmp_path / "figures", "digits") / "12_line_masks.png").exists()


@pytest.mark.parametrize("name", [name for name in notebook_names() if name not in RUN])
def test_the_other_notebooks_run_to_their_end(digits, tmp_path, name):
    folder, arguments, _ = digits
    folders = {"run_dir": str(folder / "runs"), "figures_dir": str(tmp_path)}
    settings = arguments[1 : arguments.index("--jobs")]
    found = run_cells(name, {"experiment": "digits", **folders, "device": "cpu", "overrides": settings})
    assert {f"{name}_{what}" for what in LEFT.get(name, "").split()} <= found
