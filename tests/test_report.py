"""The manifest and the report of a run, of one small network."""

import json

import pytest

from ood_helpers import studies
from ood_helpers.config import PROJECT_ROOT
from ood_helpers.experiment import Experiment
from ood_helpers.files import sha256_of_file
from ood_helpers.plan import Task
from ood_helpers.report import record, write_manifest, write_report
from ood_helpers.runner import Outcome

SMALL = [
    "backbone.training={epochs: 1, batch_size: 256}",
    "backbone.depth=10",
    "backbone.growth_rate=12",
    "backbone.expected_accuracy=null",
    "metrics.bootstrap_resamples=20",
    "ood=[{name: noise, group: far, images: {source: embedded, set: noise, count: 40}}]",
    "networks={flat: {schedule: [1, 2, 3, 4, 5]}, group: {}}",
    "detectors={msp: {label: MSP & friends}, msp_flat: {detector: msp, network: flat}}",
    *("tuning=null", "outliers=null", "ablations=null"),
]


def small_run(folder):
    folders = {"run_dir": str(folder / "runs"), "figures_dir": str(folder / "figures")}
    return Experiment.open("digits", **folders, overrides=SMALL, device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run whose figures folder holds a picture and a table of costs."""
    folder = tmp_path_factory.mktemp("report")
    run = small_run(folder)
    studies.collect_results(run)
    run.figures_directory.mkdir(parents=True, exist_ok=True)
    for name in ("12_line_masks.png", "30_results_cost.png"):
        (run.figures_directory / name).write_bytes(name.encode())
    return run


TASKS = [Task(name, PROJECT_ROOT / "notebooks" / f"{name}.ipynb", 0, (), (), False) for name in ("12_line", "30_results", "13_mos")]  # fmt: skip


def outcomes_of(run):
    own = run.name
    return {
        "12_line": Outcome("done", 2.5, outputs=[f"{own}/12_line_masks.png", f"{own}/12_line_gone.png"]),
        "30_results": Outcome(
            "up to date", outputs=[f"{own}/30_results_cost.png", f"../runs/{own}/results.csv"]
        ),
        "13_mos": Outcome("not run"),
    }


def manifest_of(run):
    parameters = {"experiment": "digits", "run_dir": str(run.run_dir), "data_root": "", "overrides": SMALL}
    return write_manifest(run, parameters, [0], outcomes_of(run))


def test_the_manifest_names_what_the_results_rest_on(run):
    manifest = manifest_of(run)
    assert manifest == json.loads((run.directory / "manifest.json").read_text())
    assert manifest["notebooks"] == {"12_line": "done", "30_results": "up to date", "13_mos": "not run"}
    assert manifest["parameters"].keys() == {"experiment", "data_root", "overrides"}
    assert set(manifest["machine"]) == {"system", "processor", "vector_unit", "threads", "blas", "device"}
    inputs = manifest["inputs"]["seed0"]
    assert set(inputs["image_sets"]) == set(inputs["banks"]) == {"train", "validation", "test", "noise"}
    assert inputs["image_sets"]["noise"]["images"] == 40 and inputs["banks"]["noise"]["images"] == 40
    assert set(inputs["networks"]) == {"flat"}  # `group` was never asked for
    assert inputs["weights_sha256"] != inputs["networks"]["flat"]["weights_sha256"]
    picture = run.figures_directory / "12_line_masks.png"
    assert manifest["outputs"]["12_line_masks.png"] == sha256_of_file(picture)
    assert set(manifest["outputs"]) == {"12_line_masks.png", "30_results_cost.png"}


def test_the_manifest_beside_the_figures_is_the_same_wherever_and_whenever_it_was_run(run):
    whole = manifest_of(run)
    lasting = json.loads((run.figures_directory / "manifest.json").read_text())
    assert whole.keys() - lasting.keys() == {"git_commit", "notebooks"}
    assert lasting["inputs"]["seed0"]["banks"]["noise"] == whole["inputs"]["seed0"]["banks"]["noise"]["key"]
    assert set(lasting["outputs"]) == {"12_line_masks.png"}  # costs are seconds
    text = json.dumps(whole)
    assert str(run.run_dir) not in text and str(PROJECT_ROOT) not in text


def test_the_report_shows_results_figures_and_settings(run):
    page = write_report(run, manifest_of(run), TASKS, outcomes_of(run)).read_text()
    for text in ("MSP &amp; friends", "MSP (flat)", "FPR95", "AUROC", "growth_rate: 12", "torch"):
        assert text in page
    assert "MSP & friends" not in page and "&amp;amp;" not in page
    assert page.index("30_results_cost") < page.index("12_line_masks")  # the results come first
    assert page.count("data:image/png;base64,") == 2
    assert "13_mos: not run." in page and 'href="notebooks/12_line.html"' in page
    assert 'href="notebooks/13_mos.html"' not in page


def test_only_what_is_there_is_recorded(tmp_path):
    fresh = small_run(tmp_path)
    assert record(fresh).keys() == {"image_sets", "missing"}
    report = write_report(fresh, manifest_of(fresh), TASKS, outcomes_of(fresh))
    assert "No results table: the notebook 30_results has not run." in report.read_text()
