"""run_all.py from the command line to the report, on the embedded digits; papermill alone."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest
from complete_runs import check_outputs, few_steps, run_all

from ood_helpers.config import PROJECT_ROOT
from ood_helpers.runner import notebook_names

SETS = {"letters", "chimeras", "photographs", "textures", "noise"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    settings = [
        "backbone.training.epochs=4",
        "backbone.depth=10",
        "backbone.growth_rate=12",
        "backbone.expected_accuracy=null",
        "metrics.bootstrap_resamples=50",
        *(f"ood.{name}.images.count=100" for name in SETS),
        *few_steps("digits"),
        "mos_ablations.depth_recipe.schedule=[1, 2, 3, 4, 5]",
        "dfb_ablations.thresholds=[0.5]",
        "dfb_ablations.recipe.schedule=[5, 10, 15, 20, 25]",
        "unleashing_ablations={factors: [1], keep_rates: [0.9], epochs: [1], estimate_keep_rates: [0.9], images: 100}",
    ]
    arguments = ["--set", *settings, "--jobs", "2"]
    return folder, arguments, run_all(folder, *arguments)


def test_digits_run_from_nothing_to_the_report(digits):
    folder, _, (status, output) = digits
    assert status == 0, output
    ablated = [f"15_unleashing_mask_ablation_{what}" for what in ("loss_constraint", "keep_rate", "epochs")]
    ablated += ["13_mos_grouping", "13_mos_depth", "13_mos_number_of_groups", "14_dfb_which_masks"]
    check_outputs(folder, "digits", SETS, related={"chimeras"}, ablated=ablated)
    assert (folder / "figures" / "digits" / "13_mos_grouping_fpr95.md").exists()
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
def test_wrong_arguments_are_sentences_without_a_traceback(
    tmp_path, monkeypatch, capsys, arguments, sentence
):
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--run-dir", str(tmp_path / "runs"), *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(PROJECT_ROOT / "run_all.py"), run_name="__main__")
    output = capsys.readouterr()
    assert stop.value.code != 0 and sentence in output.out + output.err


def test_list_names_notebooks_experiments_and_detectors(tmp_path):
    status, output = run_all(tmp_path, "--list")
    assert status == 0
    for name in [*notebook_names(), "cifar10_npz", "himplos", "after 03_precompute"]:
        assert name in output


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
