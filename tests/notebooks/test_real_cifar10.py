"""Real CIFAR-10: every row of the config, and the notebooks of the papers that train."""

import json

import pytest
from complete_runs import TUNED, few_steps, run_cells
from labels import LABELS

from ood_helpers import studies
from ood_helpers.experiment import Experiment
from ood_helpers.report import write_manifest

SETS = {"SVHN", "Textures", "Tiny-ImageNet", "CIFAR-100"}
SETTINGS = [
    "id.train.subset.first=180",
    "id.test.subset.first=32",
    "id.validation.subset.first=24",
    "tuning.images.subset.first=12",
    *(f"ood.{name}.images.subset.first=12" for name in SETS),
    "metrics.bootstrap_resamples=50",
    "backbone.expected_accuracy=93.75",  # 30 of images 218 to 249
    "backbone.tolerance=0.01",
    "mahalanobis_ensemble.noise=0.0005",
    "mahalanobis_ensemble.layers=[conv1, features]",
    *(
        f"{row}.noise=0.0"
        for row in ("mahalanobis_flat", "odin_dfb", "dfb_odin.host", "odin_um", "odin_umap")
    ),
    # The ablations run on the digits. Here: detection along a training from scratch, of a network that has to be another.
    "ablations=null",
    "watched.images=8",
    "watched.from_scratch.depth=10",
    "watched.from_scratch.training.epochs=2",
]


@pytest.fixture(scope="module")
def parameters(shared, tmp_path_factory):
    """Those of all notebooks."""
    folder = tmp_path_factory.mktemp("cifar10")
    folders = {"run_dir": str(folder / "runs"), "figures_dir": str(folder / "figures")}
    overrides = [*few_steps("cifar10", exposed=False), *SETTINGS]
    return {
        "experiment": "cifar10_npz",
        "data_root": str(shared),
        **folders,
        "device": "cpu",
        "overrides": overrides,
    }


def test_every_row_learns_from_real_images(parameters):
    results = studies.collect_results(Experiment.open(**parameters))
    tuned = results.method.str.endswith("(tuned)")
    assert set(results[tuned].method) == {f"{label} (tuned)" for label in TUNED}
    assert set(results[tuned].ood_set) == SETS - {"Tiny-ImageNet"}  # they were tuned on such images
    results = results[~tuned]
    assert list(dict.fromkeys(results.method)) == LABELS
    assert set(results.groupby("method").ood_set.apply(frozenset)) == {frozenset(SETS)}
    assert results.n_id.eq(32).all() and results.n_ood.eq(12).all()
    flat = results.method.str.contains("flat") | (results.method == "MOS")
    dense = results.method.str.contains("dfb|DFB")  # five steps: too few to ask for more than that it runs
    unleashed = results.method.str.contains(r"\+ UM", regex=True)
    own = ~flat & ~dense & ~unleashed
    assert results[own].id_accuracy.unique().tolist() == pytest.approx([100 * 30 / 32], abs=1e-3)
    assert results[flat].id_accuracy.between(80, 98).all() and results[flat].id_accuracy.nunique() <= 2
    assert results[dense].id_accuracy.nunique() == 1
    assert results[unleashed].id_accuracy.gt(80).all() and results[unleashed].id_accuracy.nunique() <= 2
    means = results[(results.group == "far") & (own | flat)].groupby("method").auroc.mean()
    assert means.min() > 60  # every method has learnt something from the real features
    passes = results.groupby("method").extra_passes.first()
    assert set(passes[passes > 0].index) == {"ODIN", "Mahalanobis (ensemble)"}
    published = results[results.published_fpr95.notna()]
    assert set(published.ood_set) == {"SVHN", "Textures"} and "Energy" in set(published.method)


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("13_mos", ("groups", "others")),
        ("14_dfb", ("masks", "overlays", "parts", "hosts_auroc", "background_weight", "training")),
        ("15_unleashing_mask", ("constraint", "along_um", "along_umap", "stages", "forgotten_images")),
    ],
)
def test_a_notebook_runs_to_its_end(parameters, name, figures):
    """After the rows: its networks are trained and its banks are there."""
    assert {f"{name}_{what}.png" for what in figures} <= run_cells(name, parameters)


def test_the_manifest_names_no_path(parameters, shared):
    run = Experiment.open(**parameters)
    manifest = json.dumps(write_manifest(run, parameters, [0], {}))
    assert str(shared) not in manifest and "${data_root}" in manifest
