"""Networks of DFB in an experiment: masks, training once, foreground and background, rows, comparisons, real CIFAR-10."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ood_helpers import foreground, pipeline
from ood_helpers.config import DenseConfig, FineTuningConfig, MasksConfig
from ood_helpers.detectors import create
from ood_helpers.errors import InputError
from ood_helpers.features import OtherHeadBank, StoredBank
from ood_helpers.pipeline import Experiment
from ood_helpers.training import dense_logits

SMALL = [
    "backbone.training.epochs=8",
    "backbone.depth=10",
    "backbone.growth_rate=12",
    "backbone.expected_accuracy=null",
    "metrics.bootstrap_resamples=20",
    "tuning.images.count=60",
    "tuning.grids={dfb_energy: {sigma: [1, -1], temperature: [1, 10]}}",
    "networks.dfb.schedule=[10, 40, 60, 70, 80]",
    "networks.dfb.learning_rate=0.03",
    *(f"ood.{name}.images.count=60" for name in ("letters", "chimeras", "photographs", "textures", "noise")),
]
ROWS = ["energy", "energy_dfb", "dfb_background", "dfb_energy", "dfb_energy_tuned", "dfb_odin", "odin_dfb"]
HEAD_ONLY = DenseConfig(
    depth=0, inputs="features", flip=False, schedule=(1, 2, 3, 4, 30), batch_size=64, learning_rate=0.3
)


def small(folder, *overrides, **options):
    folders = {"run_dir": str(folder / "runs"), "figures_dir": str(folder / "figures")}
    return Experiment.open("digits", **folders, overrides=[*SMALL, *overrides], device="cpu", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dense")


@pytest.fixture(scope="module")
def run(folder):
    return small(folder)


def test_detectors_see_the_foreground_classes_and_the_background_beside_them(run):
    network = run.fine_tuned("dfb")
    assert network.network.head.out_features == 11 and network.head.num_logits == 10
    bank = network.bank("letters")
    assert isinstance(bank.bank, StoredBank)
    shard, whole = bank.load(), bank.bank.load()
    assert torch.equal(torch.cat([shard.logits, shard.background[:, None]], 1), whole.logits)
    torch.testing.assert_close(shard.logits, network.head.logits(shard.features), rtol=1e-4, atol=1e-4)
    for batch, stored in zip(network.image_bank("letters").shards(), bank.shards()):
        pixels = torch.cat(list(batch.pixels()))
        torch.testing.assert_close(batch.network.logits(pixels), stored.logits, rtol=1e-4, atol=1e-4)
    assert network.id_accuracy == pytest.approx(
        100
        * (network.bank("test").load().logits.argmax(1) == network.bank("test").load().labels).double().mean()
    )
    assert network.id_accuracy > 60


def test_the_conversion_to_a_classifier_of_images_is_exact(run):
    network, rows = run.fine_tuned("dfb"), torch.arange(20)
    inputs = run.transform.normalise(network.images("test", rows).permute(0, 3, 1, 2))
    with torch.no_grad():
        mean = dense_logits(network.network, inputs).mean(dim=(2, 3))
    torch.testing.assert_close(mean, network.bank("test").bank.load().logits[:20], rtol=1e-4, atol=1e-4)
    probabilities = network.probabilities("test", rows)
    assert probabilities.shape == (20, 11, 8, 8)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(20, 8, 8))


def test_training_happens_once_and_its_metadata_name_the_background(run, folder, monkeypatch):
    weights = run.fine_tuned("dfb").network.head.weight
    monkeypatch.setattr(
        "ood_helpers.training.loop._train_epoch", lambda *_, **__: pytest.fail("trained again")
    )
    monkeypatch.setattr("ood_helpers.cam.stored_maps", lambda *_, **__: pytest.fail("masks made"))
    monkeypatch.setattr("ood_helpers.networks.stored_maps", lambda *_, **__: pytest.fail("masks made"))
    again = small(folder).fine_tuned("dfb")
    assert torch.equal(again.network.head.weight, weights)
    assert {"train_pixel_accuracy", "train_accuracy", "validation_miou"} <= set(again.training_history)
    with safe_open(again.model_directory / "weights.safetensors", "pt") as file:
        assert '"background_index": 10' in file.metadata()["training"]


@pytest.mark.parametrize(
    "change",
    [
        {"masks": MasksConfig(threshold=0.4)},
        {"masks": MasksConfig(label="predicted")},
        {"masks": MasksConfig(scales=(1.0,))},
        {"masks": MasksConfig(sigma=1.0)},
        {"loss": "focal"},
        {"loss_resolution": "reduced"},
        {"balanced": True},
    ],
)
def test_another_setting_is_another_network(run, change):
    other = run.fine_tuned(run.networks["dfb"].model_copy(update=change))
    assert other.model_directory != run.fine_tuned("dfb").model_directory


def test_a_network_may_be_asked_for_first_where_there_are_no_gradients(run):
    network = run.fine_tuned(HEAD_ONLY.model_copy(update={"schedule": (1, 2, 3, 4, 5)}))
    with torch.no_grad():
        assert network.training_history.train_loss.notna().all()


def test_other_masks_of_the_same_maps_are_other_files(run):
    network = run.fine_tuned("dfb")
    wide = run.fine_tuned(network.recipe.model_copy(update={"masks": MasksConfig(threshold=0.2)}))
    assert (wide.masks("train").share() >= network.masks("train").share()).all()
    assert wide.masks("train").share().mean() > network.masks("train").share().mean()
    assert torch.equal(network.masks("train").classes, torch.as_tensor(run.image_set("train").labels))
    assert torch.equal(
        network.masks("train").packed, small(run.run_dir.parent).fine_tuned("dfb").masks("train").packed
    )


def test_a_head_on_the_backbones_maps_shares_its_features(run):
    network = run.fine_tuned(HEAD_ONLY)
    bank = network.bank("noise")
    assert isinstance(bank.bank, OtherHeadBank) and bank.bank.bank is run.bank("noise")
    shard = bank.load()
    features = run.bank("noise").load().features
    weight, bias = network.network.head.weight.detach(), network.network.head.bias.detach()
    torch.testing.assert_close(shard.background, features @ weight[10] + bias[10])
    assert network.id_accuracy > 60


def test_rows_of_foreground_background_and_sum_belong_together(run):
    table = run.results(ROWS)
    parts = run.dfb_parts("dfb_energy")
    assert parts == {
        "host on the backbone": "energy",
        "S_foreground": "energy_dfb",
        "S_background": "dfb_background",
        "S": "dfb_energy",
    }
    assert run.dfb_parts("dfb_odin")["S_foreground"] == "odin_dfb"
    for row, of_foreground in (("dfb_energy", "energy_dfb"), ("dfb_odin", "odin_dfb")):
        total, first, second = (
            run.scores(name)[1]["noise"] for name in (row, of_foreground, "dfb_background")
        )
        np.testing.assert_allclose(total, first + second, rtol=1e-9)
    tuned = table[table.method == "Energy + DFB (tuned)"]
    assert "chimeras" not in set(tuned.ood_set) and tuned.tuned_on.str.contains("jigsaw digits").all()
    assert len(run.tune("dfb_energy")) == 4
    assert table.set_index("method").id_accuracy["Energy + DFB"].unique() == pytest.approx(
        run.fine_tuned("dfb").id_accuracy
    )
    described = table[table.method == "Energy + DFB"].hyperparameters.iloc[0]
    assert '"name": "dfb"' in described and '"threshold": 0.5' in described


def test_parts_that_the_config_does_not_list_are_made(folder):
    run = small(folder, "detectors={dfb_knn: {detector: dfb, host: knn, sigma: -1}}", "tuning=null")
    parts = run.dfb_parts("dfb_knn")
    assert list(parts) == ["host on the backbone", "S_foreground", "S_background", "S"]
    first, background, total = (run.scores(parts[part])[1]["noise"] for part in list(parts)[1:])
    np.testing.assert_allclose(total, first + background, rtol=1e-9)
    assert (background < 0).mean() > 0.5  # -h
    on_backbone = run.results([parts["host on the backbone"]])
    assert on_backbone.method.unique() == ["KNN"] and run.labels() == ["KNN + DFB"]


def test_a_tuned_row_costs_what_its_host_costs(run):
    run.results(["dfb_energy_tuned"])
    _, facts = run._scored("dfb_energy_tuned")
    assert facts["seconds"]["noise"] >= run.detector("dfb_energy_tuned").host_seconds(
        run.fine_tuned("dfb").bank("noise")
    )


def test_the_foreground_is_scored_once_for_its_row_and_the_sum(run, folder, monkeypatch):
    run.results(["odin_dfb"])
    other = small(folder, "detectors.dfb_odin.sigma=-1")
    monkeypatch.setattr("ood_helpers.detectors.odin.ODIN._score", lambda *_: pytest.fail("scored again"))
    first, background, total = (
        other.scores(name)[1]["noise"] for name in ("odin_dfb", "dfb_background", "dfb_odin")
    )
    np.testing.assert_allclose(total, first - background, rtol=1e-9)


def test_networks_are_compared_by_a_given_detector(run):
    recipes = {"half": HEAD_ONLY, "low": HEAD_ONLY.model_copy(update={"masks": MasksConfig(threshold=0.2)})}
    table, means = run.compare_networks(recipes, create("dfb", host="energy", temperature=None))
    assert list(means.method.unique()) == ["half", "low"]
    network = run.fine_tuned(HEAD_ONLY)
    detector = create("dfb", host="energy", temperature=None).fit(network.bank("train"), network.head)
    expected = detector.score_samples(network.bank("test")), detector.score_samples(network.bank("noise"))
    found = table[(table.method == "half") & (table.ood_set == "noise")].auroc.item()
    wins = (expected[0][:, None] > expected[1]).double() + 0.5 * (
        expected[0][:, None] == expected[1]
    ).double()
    assert found == pytest.approx(100 * float(wins.mean()))


def test_scores_follow_the_code_of_host_and_foreground(run, monkeypatch):
    classes, modules = [], []
    monkeypatch.setattr(pipeline, "_code_of", lambda kind: classes.append(kind.__name__) or "code")
    monkeypatch.setattr(pipeline, "_hash_of", lambda parts: modules.extend(parts) or "code")
    run._score_fingerprint("dfb_vim")
    assert classes == ["DFB", "ViM"] and modules == [foreground]
    run._score_fingerprint("vim_dfb")
    assert classes == ["DFB", "ViM", "ViM"] and modules == [foreground, foreground]
    run._score_fingerprint("vim")
    assert modules == [foreground, foreground]


def test_a_network_without_background_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(InputError, match=r"detectors.dfb_energy.*flat has none; name one with method: dense"):
        small(tmp_path, "detectors.dfb_energy={detector: dfb, host: energy, network: flat}")


def test_without_an_entry_the_network_has_the_papers_recipe(tmp_path):
    run = small(
        tmp_path,
        "networks={}",
        "detectors={dfb: {host: energy}}",
        "tuning=null",
        "outliers=null",
        "unleashing_ablations=null",
    )
    assert run.networks["dfb"] == DenseConfig() and run.training_methods == {"dense"}


def test_a_checkpoint_whose_first_column_is_the_background(run, tmp_path):
    own = run.fine_tuned("dfb")
    weights = {name: value.contiguous() for name, value in own.network.state_dict().items()}
    for name in ("head.weight", "head.bias"):
        weights[name] = weights[name].roll(1, 0)
    save_file(weights, tmp_path / "dense.safetensors")
    recipe = DenseConfig(checkpoint=str(tmp_path / "dense.safetensors"), background_column="first")
    other = run.fine_tuned(recipe)
    assert torch.equal(other.network.head.weight, own.network.head.weight)
    assert other.id_accuracy == own.id_accuracy and other.training_history is None
    wrong = run.fine_tuned(recipe.model_copy(update={"background_column": "last"}))
    with pytest.raises(InputError, match="The ID accuracy of"):
        _ = wrong.id_accuracy


def test_reduced_loss_is_called_so(run):
    recipe = run.networks["dfb"].model_copy(update={"loss_resolution": "reduced"})
    assert run.fine_tuned(recipe).approximation == "loss at the resolution of the feature map"
    assert run.fine_tuned("dfb").approximation == ""


def test_the_plain_classifier_has_the_same_budget(run):
    recipe = run.networks["dfb"]
    plain = recipe.plain()
    assert type(plain) is FineTuningConfig
    for name in (
        "depth",
        "inputs",
        "batch_size",
        "learning_rate",
        "schedule",
        "crop_padding",
        "flip",
        "mixup",
    ):
        assert getattr(plain, name) == getattr(recipe, name)


def test_real_cifar10(shared, tmp_path):
    """The backbone of DICE on real images: masks, a short dense training of everything, foreground, background and sum."""
    sets = {"SVHN": 16, "Textures": 16, "Tiny-ImageNet": 16, "CIFAR-100": 16}
    overrides = [f"ood.{name}.images.subset.first={count}" for name, count in sets.items()]
    overrides += ["id.train.subset.first=64", "id.test.subset.first=32", "id.validation=null", "tuning=null"]
    overrides += ["backbone.expected_accuracy=null", "metrics.bootstrap_resamples=20"]
    overrides += [
        "networks.dfb.schedule=[1, 2, 3, 4, 5]",
        "networks.dfb.batch_size=16",
        "networks.dfb.learning_rate=0.03",
    ]
    overrides += ["networks.dfb.masks.scales=[1.0]"]
    folders = {"run_dir": str(tmp_path / "runs"), "figures_dir": str(tmp_path / "figures"), "device": "cpu"}
    run = Experiment.open("cifar10_npz", str(shared), **folders, overrides=overrides)
    network = run.fine_tuned("dfb")
    share = network.masks("train").share_per_class(10)
    assert share.images.sum() == 64 and share["mean"].between(5, 70).all() and share["empty"].sum() == 0
    table = run.results(["energy_dfb", "dfb_background", "dfb_energy"])
    assert isinstance(table, pd.DataFrame) and table.auroc.notna().all()
    history = network.training_history
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]
