"""Networks of Unleashing Mask in an experiment: constraint, start, rows, what is made once, saved epochs, real CIFAR-10."""

import copy
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from continued_examples import kept_files, same_state, small
from safetensors.torch import load_file, save_file

from ood_helpers import studies
from ood_helpers.backbones.checkpoints import weights_fingerprint
from ood_helpers.banks import Head
from ood_helpers.detectors.base import create
from ood_helpers.errors import InputError, MissingDataError
from ood_helpers.experiment import Experiment
from ood_helpers.image_sets import checkpoints
from ood_helpers.networks.backbone import Backbone
from ood_helpers.statistics import accuracy
from ood_helpers.training.batches import evaluate
from ood_helpers.training.tracking import checkpoint_path
from ood_helpers.unleashing_mask.network import UnleashedNetwork, loss_constraint
from ood_helpers.unleashing_mask.recipe import Estimate, UnleashingMaskRecipe

FINE_TUNING = "method: unleashing_mask, epochs: 3, batch_size: 64, crop_padding: 1, save_every: 1"
UM_AND_UMAP = [
    f"networks={{um: {{{FINE_TUNING}, id_loss: {{constraint: 0.3}}, learning_rate: 0.05}}, "
    f"umap: {{{FINE_TUNING}, id_loss: {{constraint: {{keep_rate: 0.8, draws: 2}}}}, "
    "masks: {keep_rate: 0.8, initial_scores: magnitude}, learning_rate: 0.1}}",
    "detectors={msp: {}, energy: {}, msp_um: {detector: msp, network: um}, energy_umap: {detector: energy, network: umap}}",
]


def opened(folder, *overrides, **options) -> Experiment:
    return small(folder, *UM_AND_UMAP, *overrides, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("unleashed")


@pytest.fixture(scope="module")
def run(folder) -> Experiment:
    return opened(folder)


def recipe_of(run, name, **changes) -> UnleashingMaskRecipe:
    return run.config.networks[name].changed(changes)


def short(run, **changes) -> UnleashingMaskRecipe:
    """The recipe `um` for one step."""
    return recipe_of(run, "um", epochs=1, steps_per_epoch=1, **changes)


def save_weights(network, path) -> None:
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)


# ---- rows --------------------------------------------------------------------------------------------------


def test_rows_of_both_networks_are_scored(run):
    table = run.results()
    assert set(table.method) == {"MSP", "Energy", "MSP (um)", "Energy (umap)"}
    assert table.auroc.between(0, 100).all() and len(table) == 4 * 5
    for row, name, method in (("msp_um", "um", "MSP (um)"), ("energy_umap", "umap", "Energy (umap)")):
        network, lines = run.network(name), table[table.method == method]
        assert isinstance(network, UnleashedNetwork)
        assert lines.id_accuracy.tolist() == pytest.approx([network.check_accuracy()] * 5)
        described = json.loads(lines.hyperparameters.iloc[0])["network"]
        assert described == {"name": name, **network.settings()}
        expected = create(row.partition("_")[0]).fit(network.bank("test"), network.head())
        scores = torch.from_numpy(run.scores(row)[1]["noise"])
        torch.testing.assert_close(expected.score_samples(network.bank("noise")), scores)
    assert described["masks"]["keep_rate"] == 0.8
    assert described["loss_constraint"] == run.network("umap").constraint()
    assert run.network("um").settings()["loss_constraint"] == 0.3
    assert "masks" not in run.network("um").settings()


def test_um_changes_the_weights_and_umap_only_masks_them(run):
    backbone, um, umap = (
        network.model() for network in (run.backbone, run.network("um"), run.network("umap"))
    )
    assert not torch.equal(um.head.weight, backbone.head.weight)
    assert torch.equal(umap.head.bias, backbone.head.bias)
    masked, weights = umap.state_dict(), backbone.state_dict()
    for name in weights:
        if name.endswith(("conv1.weight", "conv2.weight", "head.weight")):
            kept = masked[name] != 0
            assert torch.equal(masked[name][kept], weights[name][kept])
            assert float((~kept).double().mean()) == pytest.approx(0.2, abs=1 / kept.numel())
    assert not torch.equal(umap.bn1.running_mean, backbone.bn1.running_mean)


def test_without_its_masks_umap_classifies_as_before(run):
    network, backbone = run.network("umap"), run.backbone.model()
    detached = network.detached()
    assert weights_fingerprint(detached) == weights_fingerprint(backbone)
    images = run.image_set("test")
    inputs = run.context.transform.normalise(torch.from_numpy(images.array).permute(0, 3, 1, 2))
    with torch.no_grad():
        logits, before = (
            copy.deepcopy(one).to(memory_format=torch.channels_last)(inputs) for one in (detached, backbone)
        )
    assert torch.equal(logits, before)
    correct = int((logits.argmax(1) == torch.as_tensor(images.labels)).sum())
    assert 100 * correct / len(images) == pytest.approx(run.check_accuracy())
    assert accuracy(run.bank("test"), Head.of(detached)) == pytest.approx(run.check_accuracy())
    assert not same_state(network.model(), detached)


# ---- what is made once -------------------------------------------------------------------------------------


def test_the_constraint_is_estimated_once(run, folder):
    estimate = Estimate(keep_rate=0.9, draws=2)
    first = loss_constraint(run.backbone, estimate)
    kept = kept_files(folder)
    assert loss_constraint(opened(folder).backbone, estimate) == first
    assert kept_files(folder) == kept
    assert first.keep_rate == 0.9 and len(first.draws) == 2 and first.std > 0
    unmasked = evaluate(run.backbone.model(), run.image_set("train"), run.context.transform, 32, "cpu")[
        "loss"
    ]
    assert first.unmasked == pytest.approx(unmasked, rel=1e-6)
    other = loss_constraint(run.backbone, estimate.changed({"seed": 1}))
    assert set(other.draws).isdisjoint(first.draws)
    assert other.unmasked == pytest.approx(first.unmasked, rel=1e-6)
    assert loss_constraint(run.backbone, estimate, start=4).unmasked != pytest.approx(unmasked, rel=1e-3)


def test_the_factor_of_a_constraint_needs_no_new_estimate(run, folder):
    constraint = run.network("umap").constraint()
    kept = kept_files(folder)
    twice = run.network(recipe_of(run, "umap", **{"id_loss.constraint.factor": 2}))
    assert twice.constraint() == pytest.approx(2 * constraint) and kept_files(folder) == kept


def test_a_recipe_takes_the_constraint_it_asks_for(run):
    umap = run.network("umap")
    umap.model()
    assert umap.constraint() == loss_constraint(run.backbone, Estimate(keep_rate=0.8, draws=2)).mean
    settings = json.loads((umap.training_entry().directory / "settings.json").read_text())
    assert settings["constraint"] == umap.constraint()
    assert run.network(short(run, id_loss="cross_entropy")).constraint() is None


def test_another_process_finds_everything_trained(run, folder):
    table, along = run.results(), studies.along_training(run, run.network("umap"), 40)
    _ = run.network("umap").check_accuracy()
    kept = kept_files(folder)
    again = opened(folder)
    for name in ("um", "umap"):
        assert same_state(again.network(name).model(), run.network(name).model())
    assert same_state(again.network("umap").detached(), run.backbone.model())
    pd.testing.assert_frame_equal(again.results(), table)
    pd.testing.assert_frame_equal(studies.along_training(again, again.network("umap"), 40), along)
    assert kept_files(folder) == kept


@pytest.mark.parametrize(
    "change",
    [
        {"id_loss.constraint": 0.31},
        {"start": 4},
        {"start": "best"},
        {"id_loss.beta": 0.5},
        {"masks": {"keep_rate": 0.8}},
        {"nesterov": True},
        {"scored_epoch": "best"},
        {"steps_per_epoch": 2},
    ],
)
def test_another_setting_is_another_network(run, change):
    other = run.network(recipe_of(run, "um", **change))
    assert other.training_entry().directory != run.network("um").training_entry().directory


def test_another_seed_is_another_network(run):
    networks = run.network("um"), run.with_seed(1).network("um")
    assert networks[0].training_entry().directory != networks[1].training_entry().directory


def test_what_is_expected_of_a_network_is_no_part_of_it(run, folder):
    _ = run.network("um").model()
    kept = kept_files(folder)
    network = opened(folder, "networks.um.expected_accuracy=90", "networks.um.tolerance=60").network("um")
    assert same_state(network.model(), run.network("um").model()) and kept_files(folder) == kept
    wrong = opened(folder, "networks.um.expected_accuracy=1").network("um")
    with pytest.raises(
        InputError, match=r"accuracy of the network um of digits is .* %, expected 1\.00 ± 0\.50"
    ):
        wrong.check_accuracy()


# ---- where a training starts -------------------------------------------------------------------------------


def test_start_at_an_epoch_of_the_backbone(run):
    backbone = run.backbone
    assert list(backbone.epochs()) == [0, 2, 4, 5]
    for start in (4, "best"):
        weights = load_file(checkpoint_path(backbone.training_entry().directory, start))
        assert same_state(backbone.start(start), weights)
    for start in ("last", 5):
        assert same_state(backbone.start(start), backbone.model())
    network = run.network(short(run, start=2))
    first = load_file(network.epochs()[0])
    assert same_state(first, load_file(backbone.epochs()[2]))
    assert not same_state(network.model(), first)


def test_a_start_network_is_a_copy(run):
    with torch.no_grad():
        run.backbone.start(2).head.weight.zero_()
    assert run.backbone.start(2).head.weight.any() and run.backbone.model().head.weight.any()


def test_start_from_a_file(run, folder):
    path = folder / "mine.safetensors"
    save_weights(run.backbone.start(2), path)
    network = run.network(short(run, start=str(path)))
    assert same_state(load_file(network.epochs()[0]), load_file(path))
    assert checkpoints(opened(folder, f"networks.um.start={path}").config) == [str(path)]
    missing = opened(folder, "networks.um.start=nowhere.safetensors")
    with pytest.raises(MissingDataError, match=r"No checkpoint nowhere\.safetensors, expected the weights"):
        missing.check()


def test_an_epoch_that_is_not_saved(run):
    with pytest.raises(
        InputError, match=r"not saved epoch 3, only \[0, 2, 4, 5\] and the best; set .*save_every"
    ):
        run.backbone.start(3)


def test_a_checkpoint_has_no_epochs(run, folder):
    path = folder / "backbone.safetensors"
    save_weights(run.backbone.model(), path)
    given = opened(folder, "backbone.training=null", f"backbone.checkpoint={path}").backbone
    assert same_state(given.start(), run.backbone.model())
    for start in (2, "best"):
        with pytest.raises(InputError, match=f"start: {start}, but the backbone is a checkpoint"):
            given.start(start)


# ---- along a training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["um", "umap"])
def test_the_last_epoch_along_a_training_is_the_network(run, name):
    network = run.network(name)
    table = studies.along_training(run, network)
    assert len(table) == 4 * 2 * 5 and table.groupby(["epoch", "detector", "ood_set"]).size().max() == 1
    assert sorted(table.epoch.unique()) == [0, 1, 2, 3] and set(table.detector) == {"MSP", "Energy"}
    for detector, label in (("msp", "MSP"), ("energy", "Energy")):
        compared, _ = studies.compare_networks(run, {name: network.recipe}, create(detector))
        last = table[(table.epoch == 3) & (table.detector == label)].set_index("ood_set")
        expected = compared.set_index("ood_set")
        assert last.auroc[expected.index].tolist() == pytest.approx(expected.auroc.tolist(), abs=0.01)
        assert last.fpr95[expected.index].tolist() == pytest.approx(expected.fpr95.tolist(), abs=2)
        assert last.id_accuracy.unique() == pytest.approx(network.check_accuracy())
    assert same_state(network.at_epoch(3), network.model())
    if name == "um":  # at epoch 0 the masks of UMAP are there already
        before = table[(table.epoch == 0) & (table.detector == "MSP")].set_index("ood_set").auroc
        backbone = studies.compare(run, create("msp")).set_index("ood_set").auroc
        assert before[backbone.index].tolist() == pytest.approx(backbone.tolist(), abs=0.01)


def test_along_a_training_on_a_part_of_the_images(run):
    network = run.network("um")
    part = studies.along_training(run, network, 30, {"MaxLogit": create("max_logit")})
    whole = studies.along_training(run, network)
    assert set(part.detector) == {"MaxLogit"} and len(part) == 4 * 5
    id_accuracy = part[part.epoch == 3].id_accuracy.iloc[0]
    assert id_accuracy * 30 / 100 == pytest.approx(round(id_accuracy * 30 / 100))
    assert len(whole) == 2 * len(part)


def test_the_backbones_own_training_can_be_looked_at(run):
    table = studies.along_training(run, run.backbone, 60)
    assert sorted(table.epoch.unique()) == [0, 2, 4, 5]
    accuracies = table.drop_duplicates("epoch").set_index("epoch").id_accuracy
    assert accuracies[0] < 40 < accuracies[5]


def test_a_backbone_that_was_frozen_for_input_gradients_can_be_trained_on(folder):
    other = opened(folder, "networks.um.learning_rate=0.04")
    _ = other.backbone.image_bank("test")  # its network is frozen
    assert other.network("um").history().train_cross_entropy.notna().all()


def test_another_network_trained_from_scratch_can_be_looked_at(run):
    recipe = run.config.backbone.changed({"training.epochs": 2, "training.save_every": 1})
    watched = Backbone(run.context, recipe)
    table = studies.along_training(run, watched, 30)
    assert sorted(table.epoch.unique()) == [0, 1, 2]
    assert watched.training_entry().directory != run.backbone.training_entry().directory


def test_what_cannot_be_looked_at_along_a_training(run):
    with pytest.raises(InputError, match="learns from training images"):
        studies.along_training(run, run.network("um"), 30, {"KNN": create("knn")})
    with pytest.raises(InputError, match=r"saved the epochs \[0, 1, 2, 3\], not 7"):
        run.network("um").at_epoch(7)


# ---- comparisons -------------------------------------------------------------------------------------------


def test_the_plain_recipe_has_the_same_budget_without_um_and_masks(run):
    recipe = run.config.networks["umap"]
    plain = recipe.plain()
    assert plain.id_loss.kind == "cross_entropy" and plain.masks is None
    for name in ("epochs", "batch_size", "learning_rate", "crop_padding", "start", "weight_decay"):
        assert getattr(plain, name) == getattr(recipe, name)
    network = run.network(plain)
    assert network.constraint() is None and "train_ascending" not in network.history()
    assert not same_state(network.model(), run.backbone.model())
    with pytest.raises(InputError, match="no masks over frozen weights"):
        network.detached()


def test_a_checkpoint_of_a_network_made_elsewhere(run, folder):
    path, um = folder / "um.safetensors", run.network("um")
    save_weights(um.model(), path)
    other = opened(folder, f"networks.um={{method: unleashing_mask, checkpoint: {path}}}").network("um")
    assert same_state(other.model(), um.model())
    assert other.settings() == {"method": "unleashing_mask", "checkpoint": Path(path).name}
    assert other.history() is None and other.epochs() == {}
    assert other.check_accuracy() == um.check_accuracy()
    with pytest.raises(InputError, match="no masks over frozen weights"):
        other.detached()


# ---- real images -------------------------------------------------------------------------------------------


def test_real_cifar10(shared, tmp_path):
    """Two steps of each on the DenseNet-101 of DICE; real outliers, which Tiny-ImageNet is then left out for."""
    names = ("SVHN", "Textures", "Tiny-ImageNet", "CIFAR-100")
    tuning = "method: unleashing_mask, id_loss: {constraint: 0.1}, epochs: 1, steps_per_epoch: 2, batch_size: 4, learning_rate: 0.02"
    overrides = [f"ood.{name}.images.subset.first=4" for name in names]
    overrides += ["id.train.subset.first=16", "id.test.subset.first=8", "id.validation=null", "tuning=null"]
    overrides += ["backbone.expected_accuracy=null", "metrics.bootstrap_resamples=20", "ablations={}"]
    exposed = {
        "poem": "objective: energy, sample: {kind: poem, pool_size: 8}, id_loss: {constraint: 0.1}",
        "doe": "objective: {kind: doe, unperturbed_epochs: 1}",
    }
    short = "method: outlier_exposure, epochs: 2, steps_per_epoch: 1, batch_size: 4"
    networks = f"um: {{{tuning}}}, umap: {{{tuning}, masks: {{keep_rate: 0.8, initial_scores: magnitude}}}}"
    networks += "".join(f", {name}: {{{short}, {settings}}}" for name, settings in exposed.items())
    detectors = "msp_um: {detector: msp, network: um}, energy_umap: {detector: energy, network: umap}"
    detectors += "".join(f", energy_{name}: {{detector: energy, network: {name}}}" for name in exposed)
    overrides += [f"networks={{{networks}}}", f"detectors={{{detectors}}}"]
    folders = {"run_dir": str(tmp_path / "runs"), "figures_dir": str(tmp_path / "figures"), "device": "cpu"}
    run = Experiment.open("cifar10_npz", data_root=str(shared), **folders, overrides=overrides)
    table = run.results()
    assert len(table) == 2 * 4 + 2 * 3 and table.auroc.between(0, 100).all()
    assert set(table[table.ood_set == "Tiny-ImageNet"].method) == {"MSP (um)", "Energy (umap)"}
    for name in exposed:
        assert run.network(name).history().train_outlier_loss.gt(0).all()
    um, umap = run.network("um"), run.network("umap")
    assert um.history().train_loss.ge(0.1).all() and um.history().step.tolist() == [2]
    assert not torch.equal(um.model().head.weight, run.backbone.model().head.weight)
    share = float((umap.model().block2.layer[3].conv1.weight == 0).double().mean())
    assert share == pytest.approx(0.2, abs=0.001)
    inputs = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    backbone = run.backbone.start().to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = backbone(inputs)
        detached = umap.detached().to(memory_format=torch.channels_last)
        assert torch.equal(detached(inputs), expected)
        assert not torch.equal(umap.model()(inputs), expected)
    assert weights_fingerprint(detached) == weights_fingerprint(run.backbone.model())
