"""The README's examples are what it says they are."""

import importlib
import re

import pytest
import torch
import yaml

from ood_helpers.banks import FeatureBank, Head
from ood_helpers.config import PROJECT_ROOT, load_config
from ood_helpers.detectors.base import DETECTORS, create
from ood_helpers.experiment import Experiment

README = (PROJECT_ROOT / "README.md").read_text()


def test_the_ratios_are_those_that_were_measured(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT_ROOT / "benchmarks")
    summarise = importlib.import_module("summarise")
    assert summarise.summary() == (PROJECT_ROOT / "benchmarks" / "results" / "summary.md").read_text()
    assert summarise.summary() in README


def test_the_example_config_is_complete(tmp_path):
    path = tmp_path / "my_experiment.yaml"
    path.write_text(re.search(r"```yaml\n(# my_experiment.yaml\n.*?)```", README, re.DOTALL)[1])
    config = load_config(path, data_root=tmp_path)
    assert config.id.test.path == str(tmp_path / "test.npz")
    assert list(config.detectors) == ["msp", "energy", "himplos", "line"]
    for row, settings in config.detectors.items():
        assert create(row, **settings).hyperparameters().items() >= settings.items()


def test_the_example_detector_scores_as_its_docstring_says(monkeypatch):
    monkeypatch.setattr(DETECTORS, "_classes", {**DETECTORS})  # the example is registered for this test only
    code = re.search(r"```python\n(# ood_helpers/detectors/nearest_mean.py\n.*?)```", README, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 22  # "about twenty lines"
    exec(code, {"__name__": "ood_helpers.detectors.nearest_mean"})
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
    bank = FeatureBank(features, features, torch.tensor([0, 0, 1]))
    detector = create("nearest_mean").fit(bank, Head(torch.eye(2), torch.zeros(2)))
    assert detector.score_samples(bank).tolist() == [-1.0, -1.0, 0.0]  # class means (1, 0) and (0, 4)


def test_the_notebooks_of_the_readme_exist():
    for name in re.findall(r"^\| `(\d\d_\w+)` \|", README, re.MULTILINE):
        assert (PROJECT_ROOT / "notebooks" / f"{name}.ipynb").exists()


@pytest.mark.parametrize(
    ("place", "experiment", "methods", "labels"),
    [
        (
            0,
            "cifar10_npz",
            {"classifier", "dense"},
            ["Energy + DFB", "Energy (dfb)", "MOS", "MOS (kmeans)", "MSP (flat)"],
        ),
        (
            1,
            "digits",
            {"unleashing_mask", "outlier_exposure"},
            ["Energy (poem_um)", "Energy (um)", "ReAct (umap)"],
        ),
    ],
)
def test_networks_of_the_readme_are_valid(tmp_path, place, experiment, methods, labels):
    section = yaml.safe_load(re.findall(r"```yaml\n(networks:\n.*?)```", README, re.DOTALL)[place])
    replaced = {"networks", "detectors", "tuning", "outliers", "ablations"}
    config = load_config(experiment).model_dump(mode="json", exclude_none=True, exclude=replaced)
    (tmp_path / "readme.yaml").write_text(yaml.safe_dump(config | section))
    run = Experiment.open(tmp_path / "readme.yaml")
    assert set(run.config.networks) == set(section["networks"])
    assert [row.label for row in run.rows().values()] == labels
    assert run.training_methods() == methods
