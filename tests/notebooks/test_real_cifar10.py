"""run_all.py on real CIFAR-10, from images to the report."""

import pytest
from complete_runs import check_outputs, few_steps, run_all

from ood_helpers.runner import notebook_names

# They have nothing of their own to show on these images: the digits run through them.
LEFT_OUT = {"00_start_here", "01_data_preparation", "16_outlier_exposure", "20_ablations"}
SETS = {"SVHN", "Textures", "Tiny-ImageNet", "CIFAR-100"}
SETTINGS = [
    "id.train.subset.first=200",
    "id.test.subset.first=48",
    "id.validation.subset.first=24",
    "tuning.images.subset.first=16",
    *(f"ood.{name}.images.subset.first=16" for name in SETS),
    "metrics.bootstrap_resamples=50",
    "backbone.expected_accuracy=93.75",  # 45 of images 218 to 265
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


def test_from_images_to_the_report(shared, tmp_path):
    settings = [*few_steps("cifar10", exposed=False), *SETTINGS]
    chosen = [name for name in notebook_names() if name not in LEFT_OUT]
    options = ["--config", "cifar10_npz", "--data-root", shared, "--only", *chosen]
    status, output = run_all(tmp_path, *options, "--set", *settings)
    assert status == 0, output
    results = check_outputs(tmp_path, "cifar10_npz", SETS, related={"Tiny-ImageNet"}, left_out=LEFT_OUT)
    assert results.n_id.eq(48).all() and results.n_ood.eq(16).all()
    flat = results.method.str.contains("flat") | (results.method == "MOS")
    dense = results.method.str.contains("dfb|DFB")  # five steps: too few to ask for more than that it runs
    unleashed = results.method.str.contains(r"\+ UM", regex=True)
    own = ~flat & ~dense & ~unleashed
    assert results[own].id_accuracy.unique().tolist() == pytest.approx([100 * 45 / 48], abs=1e-3)
    assert results[flat].id_accuracy.between(89, 98).all() and results[flat].id_accuracy.nunique() <= 2
    assert results[dense].id_accuracy.nunique() == 1
    assert results[unleashed].id_accuracy.gt(80).all() and results[unleashed].id_accuracy.nunique() <= 2
    means = results[(results.group == "far") & (own | flat)].groupby("method").auroc.mean()
    assert means.min() > 60  # every method has learnt something from the real features
    passes = results.groupby("method").extra_passes.first()
    assert set(passes[passes > 0].index) == {"ODIN", "Mahalanobis (ensemble)"}
    published = results[results.published_fpr95.notna()]
    assert set(published.ood_set) == {"SVHN", "Textures"} and "Energy" in set(published.method)
    manifest = (tmp_path / "runs" / "cifar10_npz" / "manifest.json").read_text()
    assert str(shared) not in manifest and "${data_root}" in manifest
