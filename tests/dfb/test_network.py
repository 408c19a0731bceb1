"""Networks of DFB in an experiment: masks, training once, foreground and background, rows, comparisons, real CIFAR-10."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ood_helpers import studies
from ood_helpers.banks import HeadBank, StoredBank
from ood_helpers.detectors import create
from ood_helpers.detectors.odin import ODIN
from ood_helpers.dfb.detector import DFBBackground
from ood_helpers.dfb.recipe import DenseCheckpoint, DenseRecipe
from ood_helpers.dfb.training import dense_logits
from ood_helpers.errors import InputError
from ood_helpers.experiment import Experiment
from ood_helpers.mos.recipe import ClassifierRecipe

SMALL = [
    "backbone.training.epochs=6",
    "backbone.depth=10",
    "backbone.growth_rate=12",
    "backbone.expected_accuracy=null",
    "metrics.bootstrap_resamples=20",
    "tuning.images.count=60",
    "tuning.grids={dfb_energy: {sigma: [1, -1], temperature: [1, 10]}}",
    "networks.dfb.schedule=[10, 30, 40, 45, 50]",
    "networks.dfb.learning_rate=0.03",
    *(f"ood.{name}.images.count=60" for name in ("letters", "chimeras", "photographs", "textures", "noise")),
]
ROWS = ["energy", "energy_dfb", "dfb_background", "dfb_energy", "dfb_energy_tuned", "dfb_odin", "odin_dfb"]
HEAD_ONLY = DenseRecipe(images=None, schedule=(1, 20, 25, 28, 30), batch_size=64, learning_rate=0.3)


def small(folder, *overrides, **options):
    folders = {"run_dir": str(folder / "runs"), "figures_dir": str(folder / "figures")}
    return Experiment.open("digits", **folders, overrides=[*SMALL, *overrides], device="cpu", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dense")


@pytest.fixture(scope="module")
def run(folder):
    return small(folder)


# ---- the network -------------------------------------------------------------------------------------------


def test_detectors_see_the_foreground_classes_and_the_background_beside_them(run):
    network = run.network("dfb")
    assert network.model().head.out_features == 11 and network.head().num_logits == 10
    bank = network.bank("letters")
    assert isinstance(bank.bank, StoredBank)
    shard, whole = bank.load(), bank.bank.load()
    assert torch.equal(torch.cat([shard.logits, shard.background[:, None]], 1), whole.logits)
    torch.testing.assert_close(shard.logits, network.head().logits(shard.features), rtol=1e-4, atol=1e-4)
    for batch, stored in zip(network.image_bank("letters").shards(), bank.shards()):
        pixels = torch.cat(list(batch.pixels()))
        torch.testing.assert_close(batch.network.logits(pixels), stored.logits, rtol=1e-4, atol=1e-4)
    test = network.bank("test").load()
    correct = (test.logits.argmax(1) == test.labels).double().mean()
    assert network.check_accuracy() == pytest.approx(100 * float(correct))
    assert network.check_accuracy() > 60


def test_the_conversion_to_a_classifier_of_images_is_exact(run):
    network, rows = run.network("dfb"), torch.arange(20)
    inputs = run.context.transform.normalise(network.images("test", rows).permute(0, 3, 1, 2))
    with torch.no_grad():
        mean = dense_logits(network.model(), inputs).mean(dim=(2, 3))
    torch.testing.assert_close(mean, network.bank("test").bank.load().logits[:20], rtol=1e-4, atol=1e-4)
    probabilities = network.probabilities("test", rows)
    assert probabilities.shape == (20, 11, 8, 8)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(20, 8, 8))


def test_segmentation_is_that_of_the_last_validation(run):
    network = run.network("dfb")
    found, last = network.segmentation("validation"), network.history().iloc[-1]
    assert set(found) == {"pixel_accuracy", "mean_class_accuracy", "miou", "accuracy"}
    for name, value in found.items():
        assert value == pytest.approx(last[f"validation_{name}"], abs=0.2)


def test_training_happens_once_and_its_metadata_name_the_background(run, folder):
    weights = run.network("dfb").model().head.weight
    path = run.network("dfb").training_entry().directory / "weights.safetensors"
    written = path.stat().st_mtime_ns
    made = [folder / "runs" / kind for kind in ("maps", "masks")]
    for directory in made:
        directory.rename(directory.with_suffix(".away"))
    again = small(folder).network("dfb")
    assert again.ready() and torch.equal(again.model().head.weight, weights)
    assert path.stat().st_mtime_ns == written and not any(directory.exists() for directory in made)
    for directory in made:
        directory.with_suffix(".away").rename(directory)
    assert {"train_pixel_accuracy", "train_accuracy", "validation_miou"} <= set(again.history())
    with safe_open(path, "pt") as file:
        assert '"background_index": 10' in file.metadata()["training"]


@pytest.mark.parametrize(
    "change",
    [
        {"masks.threshold": 0.4},
        {"masks.label": "predicted"},
        {"masks.scales": (1.0,)},
        {"masks.sigma": 1.0},
        {"loss": "focal"},
        {"loss_resolution": "reduced"},
        {"balanced": True},
    ],
)
def test_another_setting_is_another_network(run, change):
    network = run.network("dfb")
    other = run.network(network.recipe.changed(change))
    assert other.training_entry().directory != network.training_entry().directory


def test_a_network_may_be_asked_for_first_where_there_are_no_gradients(run):
    network = run.network(HEAD_ONLY.changed({"schedule": (1, 2, 3, 4, 5)}))
    with torch.no_grad():
        assert network.history().train_loss.notna().all()


def test_other_masks_of_the_same_maps(run, folder):
    network = run.network("dfb")
    wide = run.network(network.recipe.changed({"masks.threshold": 0.2}))
    assert (wide.masks("train").share() >= network.masks("train").share()).all()
    assert wide.masks("train").share().mean() > network.masks("train").share().mean()
    assert torch.equal(network.masks("train").classes, torch.as_tensor(run.image_set("train").labels))
    again = small(folder).network("dfb").masks("train")
    assert torch.equal(network.masks("train").packed, again.packed)


def test_a_head_on_the_backbones_maps_shares_its_features(run):
    network = run.network(HEAD_ONLY)
    bank = network.bank("noise")
    assert isinstance(bank.bank, HeadBank) and bank.bank.bank is run.bank("noise")
    shard = bank.load()
    features, head = run.bank("noise").load().features, network.model().head
    weight, bias = head.weight.detach(), head.bias.detach()
    torch.testing.assert_close(shard.background, features @ weight[10] + bias[10])
    assert network.check_accuracy() > 60


def test_a_checkpoint_whose_first_column_is_the_background(run, tmp_path):
    own = run.network("dfb")
    weights = {name: value.contiguous() for name, value in own.model().state_dict().items()}
    for name in ("head.weight", "head.bias"):
        weights[name] = weights[name].roll(1, 0)
    save_file(weights, tmp_path / "dense.safetensors")
    recipe = DenseCheckpoint(checkpoint=str(tmp_path / "dense.safetensors"), background_column="first")
    other = run.network(recipe)
    assert torch.equal(other.model().head.weight, own.model().head.weight)
    assert other.check_accuracy() == own.check_accuracy() and other.history() is None
    wrong = run.network(recipe.changed({"background_column": "last"}))
    with pytest.raises(InputError, match="The ID accuracy of"):
        wrong.check_accuracy()


def test_a_reduced_loss_is_named_an_approximation(run):
    recipe = run.network("dfb").recipe.changed({"loss_resolution": "reduced"})
    assert run.network(recipe).approximation() == "loss at the resolution of the feature map"
    assert run.network("dfb").approximation() == ""


def test_the_plain_classifier_has_the_same_budget(run):
    recipe = run.network("dfb").recipe
    plain = recipe.plain()
    assert type(plain) is ClassifierRecipe
    assert plain.images.model_dump() == recipe.images.model_dump()
    for name in ("depth", "batch_size", "learning_rate", "momentum", "weight_decay", "schedule", "mixup"):
        assert getattr(plain, name) == getattr(recipe, name)


# ---- rows --------------------------------------------------------------------------------------------------


def test_rows_of_foreground_background_and_sum_belong_together(run):
    table = run.results(ROWS)
    for row, of_foreground in (("dfb_energy", "energy_dfb"), ("dfb_odin", "odin_dfb")):
        total, first, second = (
            run.scores(name)[1]["noise"] for name in (row, of_foreground, "dfb_background")
        )
        np.testing.assert_allclose(total, first + second, rtol=1e-9)
    tuned = table[table.method == "Energy + DFB (tuned)"]
    assert "chimeras" not in set(tuned.ood_set) and tuned.tuned_on.str.contains("jigsaw digits").all()
    assert len(run.tuned_rows()["dfb_energy"].table()) == 4
    accuracy = table.set_index("method").id_accuracy["Energy + DFB"].unique()
    assert accuracy == pytest.approx(run.network("dfb").check_accuracy())
    described = json.loads(table[table.method == "Energy + DFB"].hyperparameters.iloc[0])
    assert described["network"]["name"] == "dfb" and described["network"]["masks"]["threshold"] == 0.5


def test_the_parts_of_a_row_are_found_in_the_config(run):
    for row, on_backbone, on_network in (
        ("dfb_energy", "energy", "energy_dfb"),
        ("dfb_odin", "odin", "odin_dfb"),
    ):
        detector, network = run.row(row).detector, run.row(row).network.name
        assert run.row_of(detector.make_host(), "").name == on_backbone
        assert run.row_of(detector.make_host(), network).name == on_network
        assert (
            run.row_of(DFBBackground(detector.sigma, detector.background), network).name == "dfb_background"
        )


def test_parts_that_the_config_does_not_list_are_made(folder):
    run = small(folder, "detectors={dfb_knn: {detector: dfb, host: knn, sigma: -1}}", "tuning=null")
    detector = run.row("dfb_knn").detector
    parts = [run.row_of(detector.make_host(), "dfb"), run.row_of(DFBBackground(sigma=-1))]
    first, background, total = (row.scores()[1]["noise"] for row in (*parts, run.row("dfb_knn")))
    np.testing.assert_allclose(total, first + background, rtol=1e-9)
    assert (background < 0).mean() > 0.5  # -h
    on_backbone = run.results([run.row_of(detector.make_host(), "")])
    assert on_backbone.method.unique() == ["KNN"]
    assert [row.label for row in run.rows().values()] == ["KNN + DFB"]


def test_a_tuned_row_costs_what_its_host_costs(run):
    table = run.results(["energy_dfb", "dfb_energy_tuned"])
    seconds = table[table.ood_set == "noise"].set_index("method").score_seconds
    assert seconds["Energy + DFB (tuned)"] >= seconds["Energy (dfb)"] > 0


def test_the_foreground_is_scored_once_for_its_row_and_the_sum(run, folder, monkeypatch):
    run.results(["odin_dfb"])
    other = small(folder, "detectors.dfb_odin.sigma=-1")
    monkeypatch.setattr(ODIN, "score_samples", lambda *_: pytest.fail("scored again"))
    first, background, total = (
        other.scores(name)[1]["noise"] for name in ("odin_dfb", "dfb_background", "dfb_odin")
    )
    np.testing.assert_allclose(total, first - background, rtol=1e-9)


def test_networks_are_compared_by_a_given_detector(run):
    recipes = {"half": HEAD_ONLY, "low": HEAD_ONLY.changed({"masks.threshold": 0.2})}
    detector = create("dfb", host="energy", temperature=None)
    table, means = studies.compare_networks(run, recipes, detector)
    assert list(means.method.unique()) == ["half", "low"]
    network = run.network(HEAD_ONLY)
    detector.fit(network.bank("train"), network.head())
    expected = detector.score_samples(network.bank("test")), detector.score_samples(network.bank("noise"))
    found = table[(table.method == "half") & (table.ood_set == "noise")].auroc.item()
    id_scores, ood_scores = expected[0][:, None], expected[1]
    wins = (id_scores > ood_scores).double() + 0.5 * (id_scores == ood_scores).double()
    assert found == pytest.approx(100 * float(wins.mean()))


def test_scores_depend_on_the_code_of_the_host(run, folder):
    run.scores("dfb_energy")
    keys = [json.loads(path.read_text()) for path in (folder / "runs" / "scores").glob("*/key.json")]
    of_sums = [key for key in keys if key["detector"][0] == "DFB"]
    assert of_sums
    for key in of_sums:
        host = key["detector"][1]["host"]["detector"]
        assert {"ood_helpers.dfb.detector", f"ood_helpers.detectors.{host}"} <= set(key["code"])


def test_a_network_without_background_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(
        InputError, match=r"detectors.dfb_energy: DFB .*flat has none; name one with method: dense"
    ):
        small(tmp_path, "detectors.dfb_energy={detector: dfb, host: energy, network: flat}")


def test_without_an_entry_the_network_has_the_papers_recipe(tmp_path):
    run = small(
        tmp_path,
        "networks={}",
        "detectors={dfb: {host: energy}}",
        "tuning=null",
        "outliers=null",
        "ablations={}",
    )
    assert run.config.all_networks()["dfb"] == DenseRecipe() and run.training_methods() == {"dense"}


# ---- real data ---------------------------------------------------------------------------------------------


def test_real_cifar10(shared, tmp_path):
    """The backbone of DICE on real images: masks, a short dense training of everything, foreground, background and sum."""
    overrides = [
        *(f"ood.{name}.images.subset.first=8" for name in ("SVHN", "Textures", "Tiny-ImageNet", "CIFAR-100")),
        *("id.train.subset.first=64", "id.test.subset.first=16", "id.validation=null", "tuning=null"),
        *("backbone.expected_accuracy=null", "metrics.bootstrap_resamples=20"),
        "networks.dfb.schedule=[1, 2, 3, 4, 5]",
        "networks.dfb.batch_size=8",
        "networks.dfb.learning_rate=0.03",
        "networks.dfb.masks.scales=[1.0]",
    ]
    folders = {"run_dir": str(tmp_path / "runs"), "figures_dir": str(tmp_path / "figures"), "device": "cpu"}
    run = Experiment.open("cifar10_npz", data_root=str(shared), **folders, overrides=overrides)
    network = run.network("dfb")
    share = network.masks("train").share_per_class(10)
    assert share.images.sum() == 64 and share["mean"].between(5, 70).all() and share["empty"].sum() == 0
    table = run.results(["energy_dfb", "dfb_background", "dfb_energy"])
    assert isinstance(table, pd.DataFrame) and table.auroc.notna().all()
    history = network.history()
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]
