"""Networks of Unleashing Mask in an experiment: constraint, start, rows, what is made once, saved epochs, real CIFAR-10."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from ood_helpers import pipeline, results
from ood_helpers.backbones import weights_fingerprint
from ood_helpers.config import LossConstraintConfig, UnleashingMaskConfig
from ood_helpers.detectors import create
from ood_helpers.errors import InputError, MissingDataError
from ood_helpers.features import Head, accuracy
from ood_helpers.networks import Backbone, UnleashedNetwork
from ood_helpers.pipeline import Experiment
from ood_helpers.training import evaluate

FINE_TUNING = "epochs: 3, batch_size: 64, crop_padding: 1, save_every: 1"
SMALL = [
    "backbone.training={epochs: 5, batch_size: 64, learning_rate: 0.1, schedule: one_cycle, save_every: 2}",
    "backbone.depth=10",
    "backbone.growth_rate=12",
    "backbone.expected_accuracy=null",
    "metrics.bootstrap_resamples=20",
    "tuning=null",
    f"networks={{um: {{method: unleashing_mask, loss_constraint: 0.3, learning_rate: 0.05, {FINE_TUNING}}}, "
    "umap: {method: unleashing_mask, estimate: {keep_rate: 0.8, draws: 2}, keep_rate: 0.8, "
    f"initial_scores: magnitude, learning_rate: 0.1, {FINE_TUNING}}}}}",
    "outliers=null",
    "detectors={msp: {}, energy: {}, msp_um: {detector: msp, network: um}, energy_umap: {detector: energy, network: umap}}",
    *(f"ood.{name}.images.count=60" for name in ("letters", "chimeras", "photographs", "textures", "noise")),
]


def small(folder, *overrides, **options):
    folders = {"run_dir": str(folder / "runs"), "figures_dir": str(folder / "figures")}
    return Experiment.open("digits", **folders, overrides=[*SMALL, *overrides], device="cpu", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("unleashed")


@pytest.fixture(scope="module")
def run(folder):
    return small(folder)


def short(run, **changes) -> UnleashingMaskConfig:
    """The recipe `um` for one step."""
    return run.networks["um"].model_copy(update={"epochs": 1, "steps_per_epoch": 1, **changes})


def same_state(one, other) -> bool:
    one, other = (network if isinstance(network, dict) else network.state_dict() for network in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- rows --------------------------------------------------------------------------------------------------


def test_rows_of_both_networks_are_scored(run):
    table = run.results()
    assert set(table.method) == {"MSP", "Energy", "MSP (um)", "Energy (umap)"}
    assert table.auroc.between(0, 100).all() and len(table) == 4 * 5
    for row, name, method in (("msp_um", "um", "MSP (um)"), ("energy_umap", "umap", "Energy (umap)")):
        network, lines = run.fine_tuned(name), table[table.method == method]
        assert isinstance(network, UnleashedNetwork)
        assert lines.id_accuracy.tolist() == pytest.approx([network.id_accuracy] * 5)
        described = json.loads(lines.hyperparameters.iloc[0])["network"]
        assert described == {"name": name, **network.described}
        expected = create(row.partition("_")[0]).fit(network.bank("test"), network.head)
        scores = torch.from_numpy(run.scores(row)[1]["noise"])
        torch.testing.assert_close(expected.score_samples(network.bank("noise")), scores)
    assert described["keep_rate"] == 0.8 and described["loss_constraint"] == run.fine_tuned("umap").constraint
    assert run.fine_tuned("um").described["loss_constraint"] == 0.3
    assert "keep_rate" not in run.fine_tuned("um").described


def test_um_changes_the_weights_and_umap_only_masks_them(run):
    backbone, um, umap = (run.network, run.fine_tuned("um").network, run.fine_tuned("umap").network)
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
    network = run.fine_tuned("umap")
    detached = network.detached()
    assert weights_fingerprint(detached) == weights_fingerprint(run.network)
    head, images = Head.of(detached), run.image_set("test")
    inputs = run.transform.normalise(torch.from_numpy(images.array).permute(0, 3, 1, 2))
    with torch.no_grad():
        logits = detached(inputs.contiguous(memory_format=torch.channels_last))
        before = run.network(inputs.contiguous(memory_format=torch.channels_last))
    assert torch.equal(logits, before)
    correct = int((logits.argmax(1) == torch.as_tensor(images.labels)).sum())
    assert 100 * correct / len(images) == run.id_accuracy == accuracy(run.bank("test"), head)
    assert not same_state(network.network, detached)


# ---- what is made once -------------------------------------------------------------------------------------


def test_the_constraint_is_estimated_once(run, folder, monkeypatch):
    calls, estimate = [], pipeline.estimate_constraint
    monkeypatch.setattr(
        pipeline, "estimate_constraint", lambda *args, **kw: (calls.append(args), estimate(*args, **kw))[1]
    )
    config = LossConstraintConfig(keep_rate=0.9, draws=2)
    first = run.loss_constraint(config)
    assert small(folder).loss_constraint(config) == first and len(calls) == 1
    assert first.keep_rate == 0.9 and len(first.draws) == 2 and first.std > 0
    unmasked = evaluate(run.network, run.image_set("train"), run.transform, 32, "cpu")["loss"]
    assert first.unmasked == pytest.approx(unmasked, rel=1e-6)
    other = run.loss_constraint(config.model_copy(update={"seed": 1}))
    assert set(other.draws).isdisjoint(first.draws) and other.unmasked == first.unmasked and len(calls) == 2
    run.loss_constraint(config, start=4)
    assert len(calls) == 3


def test_a_recipe_takes_the_constraint_it_asks_for(run):
    umap = run.fine_tuned("umap")
    assert umap.constraint == run.loss_constraint(LossConstraintConfig(keep_rate=0.8, draws=2)).mean
    settings = json.loads((umap.model_directory / "settings.json").read_text())
    assert settings["constraint"] == umap.constraint
    assert run.fine_tuned(short(run, id_loss="cross_entropy", loss_constraint=None)).constraint is None


def test_another_process_finds_everything_trained(run, folder, monkeypatch):
    for name in ("um", "umap"):
        _ = run.fine_tuned(name).network, run.fine_tuned(name).id_accuracy
    table, along = run.results(), run.along_training(run.fine_tuned("umap"), 40)
    monkeypatch.setattr(
        "ood_helpers.training.loop._train_epoch", lambda *_, **__: pytest.fail("trained again")
    )
    monkeypatch.setattr(pipeline, "estimate_constraint", lambda *_, **__: pytest.fail("estimated again"))
    monkeypatch.setattr(Experiment, "_detection_at", lambda *_: pytest.fail("passed again"))
    again = small(folder)
    for name in ("um", "umap"):
        assert same_state(again.fine_tuned(name).network, run.fine_tuned(name).network)
    assert same_state(again.fine_tuned("umap").detached(), run.network)
    pd.testing.assert_frame_equal(again.results(), table)
    pd.testing.assert_frame_equal(again.along_training(again.fine_tuned("umap"), 40), along)


@pytest.mark.parametrize(
    "change",
    [
        {"loss_constraint": 0.31},
        {"start": 4},
        {"start": "best"},
        {"beta": 0.5},
        {"keep_rate": 0.8},
        {"nesterov": True},
        {"scored_epoch": "best"},
        {"steps_per_epoch": 2},
    ],
)
def test_another_setting_is_another_network(run, change):
    other = run.fine_tuned(run.networks["um"].model_copy(update=change))
    assert other.model_directory != run.fine_tuned("um").model_directory


def test_another_seed_is_another_network(run):
    other = run.with_seed(1)
    assert other.fine_tuned("um").model_directory != run.fine_tuned("um").model_directory


def test_what_is_expected_of_a_network_is_no_part_of_it(run, folder):
    expecting = small(folder, "networks.um.expected_accuracy=90", "networks.um.tolerance=60")
    network = expecting.fine_tuned("um")
    assert network.model_directory == run.fine_tuned("um").model_directory
    assert same_state(network.network, run.fine_tuned("um").network)
    wrong = small(folder, "networks.um.expected_accuracy=1").fine_tuned("um")
    with pytest.raises(
        InputError, match=r"accuracy of the network um of digits is .* %, expected 1\.00 ± 0\.50"
    ):
        _ = wrong.id_accuracy


# ---- where a training starts -------------------------------------------------------------------------------


def test_start_at_an_epoch_of_the_backbone(run):
    directory = run.backbone.model_directory
    assert list(run.backbone.saved_epochs) == [0, 2, 4, 5]
    assert same_state(run.start_network(), run.network)
    for start, name in ((4, "epoch_4"), ("best", "best")):
        weights = load_file(directory / "checkpoints" / f"{name}.safetensors")
        assert same_state(run.start_network(start), weights)
    network = run.fine_tuned(short(run, start=2))
    first = load_file(network.saved_epochs[0])
    assert same_state(first, load_file(run.backbone.saved_epochs[2]))
    assert not same_state(network.network, first)


def test_a_start_network_is_a_copy(run):
    with torch.no_grad():
        run.start_network(2).head.weight.zero_()
    assert run.start_network(2).head.weight.any() and run.network.head.weight.any()


def test_start_at_the_last_epoch_by_its_number(run):
    assert same_state(run.start_network(5), run.network)


def test_start_from_a_file(run, folder):
    path = folder / "mine.safetensors"
    save_file({name: value.contiguous() for name, value in run.start_network(2).state_dict().items()}, path)
    network = run.fine_tuned(short(run, start=str(path)))
    assert same_state(load_file(network.saved_epochs[0]), load_file(path))
    other = small(folder, f"networks.um.start={path}")
    assert other.checkpoints == [str(path)]
    missing = small(folder, "networks.um.start=nowhere.safetensors")
    with pytest.raises(MissingDataError, match=r"No checkpoint nowhere\.safetensors, expected the weights"):
        missing.check_images()


def test_an_epoch_that_is_not_saved(run):
    with pytest.raises(
        InputError, match=r"not saved epoch 3, only \[0, 2, 4, 5\] and the best; set .*save_every"
    ):
        run.start_network(3)


def test_a_checkpoint_has_no_epochs(run, folder):
    path = folder / "backbone.safetensors"
    save_file({name: value.contiguous() for name, value in run.network.state_dict().items()}, path)
    given = small(folder, "backbone.training=null", f"backbone.checkpoint={path}")
    assert same_state(given.start_network(), run.network)
    for start in (2, "best"):
        with pytest.raises(InputError, match=f"start: {start}, but the backbone is a checkpoint"):
            given.start_network(start)


# ---- along a training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["um", "umap"])
def test_the_last_epoch_along_a_training_is_the_network(run, name):
    network = run.fine_tuned(name)
    table = run.along_training(network)
    assert len(table) == 4 * 2 * 5 and table.groupby(["epoch", "detector", "ood_set"]).size().max() == 1
    assert sorted(table.epoch.unique()) == [0, 1, 2, 3] and set(table.detector) == {"MSP", "Energy"}
    for detector, label in (("msp", "MSP"), ("energy", "Energy")):
        compared, _ = run.compare_networks({name: network.recipe}, create(detector))
        last = table[(table.epoch == 3) & (table.detector == label)].set_index("ood_set")
        expected = compared.set_index("ood_set")
        assert last.auroc[expected.index].tolist() == pytest.approx(expected.auroc.tolist(), abs=0.01)
        assert last.fpr95[expected.index].tolist() == pytest.approx(expected.fpr95.tolist(), abs=2)
        assert last.id_accuracy.unique() == pytest.approx(network.id_accuracy)
    assert same_state(network.at_epoch(3), network.network)
    if name == "um":  # at epoch 0 the masks of UMAP are there already
        before = table[(table.epoch == 0) & (table.detector == "MSP")].set_index("ood_set").auroc
        backbone = run.compare(run.detector("msp")).set_index("ood_set").auroc
        assert before[backbone.index].tolist() == pytest.approx(backbone.tolist(), abs=0.01)


def test_along_a_training_on_a_part_of_the_images(run):
    network = run.fine_tuned("um")
    part, whole = run.along_training(network, 30, ("max_logit",)), run.along_training(network)
    assert set(part.detector) == {"MaxLogit"} and len(part) == 4 * 5
    id_accuracy = part[part.epoch == 3].id_accuracy.iloc[0]
    assert id_accuracy * 30 / 100 == pytest.approx(round(id_accuracy * 30 / 100))
    assert len(list(network.model_directory.glob("along-*.csv"))) == 2
    assert len(whole) == 2 * len(part)


def test_the_backbones_own_training_can_be_looked_at(run):
    table = run.along_training(run.backbone, 60)
    assert sorted(table.epoch.unique()) == [0, 2, 4, 5]
    accuracies = table.drop_duplicates("epoch").set_index("epoch").id_accuracy
    assert accuracies[0] < 40 < accuracies[5]


def test_a_backbone_that_was_frozen_for_input_gradients_can_be_trained_on(folder):
    other = small(folder, "networks.um.learning_rate=0.04")
    _ = other.image_bank("test")  # its network is frozen
    assert other.fine_tuned("um").training_history.train_cross_entropy.notna().all()


def test_another_network_trained_from_scratch_can_be_looked_at(run):
    config = run.config.backbone.model_copy(
        update={"training": run.config.backbone.training.model_copy(update={"epochs": 2, "save_every": 1})}
    )
    watched = Backbone(run, config)
    table = run.along_training(watched, 30)
    assert (
        sorted(table.epoch.unique()) == [0, 1, 2] and watched.model_directory != run.backbone.model_directory
    )


def test_what_cannot_be_looked_at_along_a_training(run):
    with pytest.raises(InputError, match="learns from training images"):
        run.along_training(run.fine_tuned("um"), 30, ("knn",))
    with pytest.raises(InputError, match=r"saved the epochs \[0, 1, 2, 3\], not 7"):
        run.fine_tuned("um").at_epoch(7)


# ---- trained with outliers ---------------------------------------------------------------------------------

EXPOSED = [
    "outliers={name: jigsaw, images: {source: embedded, set: jigsaw, count: 60, seed: 1}, related: [chimeras]}",
    "networks.ntom={method: outlier_exposure, objective: ntom, sample: ntom, epochs: 2, batch_size: 64, save_every: 1}",
    "detectors.energy_ntom={detector: energy, network: ntom}",
    "detectors.own={detector: dfb_background, network: ntom, sigma: -1, background: log_softmax, label: own}",
]


def test_a_network_trained_with_outliers_is_not_reported_on_sets_like_them(folder):
    exposed = small(folder, *EXPOSED)
    table = exposed.results()
    by_method = table.groupby("method").ood_set.apply(set)
    assert by_method["Energy (ntom)"] == by_method["own"] == set(exposed.ood_groups) - {"chimeras"}
    assert by_method["Energy"] == set(exposed.ood_groups)
    resamples = exposed.resamples(table, "auroc")
    complete = {"MSP", "Energy", "MSP (um)", "Energy (umap)"}
    assert set(results.rank_intervals(table, resamples, "auroc")[0].method) == complete
    pairs = results.paired_differences(table, resamples, "auroc")
    assert {*pairs.method_a, *pairs.method_b} == complete and pairs.difference.notna().all()
    assert "Energy (ntom), own: not reported on chimeras." in results.describe_table(table, "auroc")


def test_detectors_see_the_classes_alone_of_a_network_with_an_output_for_outliers(folder):
    exposed = small(folder, *EXPOSED)
    network = exposed.fine_tuned("ntom")
    assert network.network.num_classes == 11 and network.head.num_classes == 10
    along = exposed.along_training(network)
    last = along[(along.epoch == 2) & (along.detector == "Energy")]
    assert last.id_accuracy.iloc[0] == pytest.approx(network.id_accuracy)
    assert set(last.ood_set) == set(exposed.ood_groups) - {"chimeras"}
    table = exposed.results(["energy_ntom"]).set_index("ood_set").auroc
    assert last.set_index("ood_set").auroc.to_dict() == pytest.approx(table.to_dict(), abs=0.02)


def test_outliers_that_are_missing_can_be_done_without(folder, tmp_path):
    missing = f"outliers={{name: gone, images: {{source: npz, path: {tmp_path / 'gone.npz'}}}}}"
    with pytest.raises(MissingDataError, match=r"gone\.npz"):
        small(folder, missing, *EXPOSED[1:2]).check_images()
    without = small(folder, missing, *EXPOSED[1:2], skip_missing=True)
    without.check_images()
    assert "outlier_exposure" not in without.training_methods


def test_a_network_is_not_tuned_on_the_outliers_it_was_trained_with(folder):
    tuning = "tuning={name: same, images: {source: embedded, set: jigsaw, count: 60, seed: 1}, grids: {react_ntom: {percentile: [80, 90]}}}"
    row = "detectors.react_ntom={detector: react, network: ntom}"
    with pytest.raises(InputError, match=r"tunes a network trained with outliers on .* of the same images"):
        small(folder, *EXPOSED, row, tuning).check_images()


# ---- comparisons -------------------------------------------------------------------------------------------


def test_the_plain_recipe_has_the_same_budget_without_um_and_masks(run):
    recipe = run.networks["umap"]
    plain = recipe.plain()
    assert plain.id_loss == "cross_entropy" and plain.keep_rate is None
    for name in ("epochs", "batch_size", "learning_rate", "crop_padding", "start", "weight_decay"):
        assert getattr(plain, name) == getattr(recipe, name)
    network = run.fine_tuned(plain)
    assert network.constraint is None and "train_ascending" not in network.training_history
    assert not same_state(network.network, run.network)
    with pytest.raises(InputError, match="no masks over frozen weights"):
        network.detached()


def test_a_checkpoint_of_a_network_made_elsewhere(run, folder):
    path = folder / "um.safetensors"
    weights = run.fine_tuned("um").network.state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    other = small(
        folder, "unleashing_ablations=null", f"networks.um={{method: unleashing_mask, checkpoint: {path}}}"
    ).fine_tuned("um")
    assert same_state(other.network, run.fine_tuned("um").network)
    assert other.described == {"method": "unleashing_mask", "checkpoint": Path(path).name}
    assert other.training_history is None and other.saved_epochs == {}
    assert other.id_accuracy == run.fine_tuned("um").id_accuracy


# ---- real images -------------------------------------------------------------------------------------------


def test_real_cifar10(shared, tmp_path):
    """Two steps of each on the DenseNet-101 of DICE; real outliers, which Tiny-ImageNet is then left out for."""
    sets = {"SVHN": 8, "Textures": 8, "Tiny-ImageNet": 8, "CIFAR-100": 8}
    tuning = "method: unleashing_mask, loss_constraint: 0.1, epochs: 1, steps_per_epoch: 2, batch_size: 16, learning_rate: 0.02"
    overrides = [f"ood.{name}.images.subset.first={count}" for name, count in sets.items()]
    overrides += ["id.train.subset.first=32", "id.test.subset.first=16", "id.validation=null", "tuning=null"]
    overrides += ["backbone.expected_accuracy=null", "metrics.bootstrap_resamples=20"]
    exposed = {
        "oe": "objective: oe",
        "poem": "objective: energy, sample: poem, pool_size: 16, id_loss: um, loss_constraint: 0.1",
        "doe": "objective: doe, doe: {unperturbed_epochs: 1}",
        "ntom": "objective: ntom, sample: ntom, pool_size: 16",
    }
    short = "method: outlier_exposure, epochs: 2, steps_per_epoch: 1, batch_size: 8"
    networks = f"um: {{{tuning}}}, umap: {{{tuning}, keep_rate: 0.8, initial_scores: magnitude}}"
    networks += "".join(f", {name}: {{{short}, {settings}}}" for name, settings in exposed.items())
    detectors = "msp_um: {detector: msp, network: um}, energy_umap: {detector: energy, network: umap}"
    detectors += "".join(f", energy_{name}: {{detector: energy, network: {name}}}" for name in exposed)
    overrides += [f"networks={{{networks}}}", f"detectors={{{detectors}}}"]
    folders = {"run_dir": str(tmp_path / "runs"), "figures_dir": str(tmp_path / "figures"), "device": "cpu"}
    run = Experiment.open("cifar10_npz", str(shared), **folders, overrides=overrides)
    table = run.results()
    assert len(table) == 2 * 4 + 4 * 3 and table.auroc.between(0, 100).all()
    assert set(table[table.ood_set == "Tiny-ImageNet"].method) == {"MSP (um)", "Energy (umap)"}
    for name in exposed:
        assert run.fine_tuned(name).training_history.train_outlier_loss.gt(0).all()
    um, umap = run.fine_tuned("um"), run.fine_tuned("umap")
    assert um.training_history.train_loss.ge(0.1).all() and um.training_history.step.tolist() == [2]
    assert not torch.equal(um.network.head.weight, run.network.head.weight)
    share = float((umap.network.block2.layer[3].conv1.weight == 0).double().mean())
    assert share == pytest.approx(0.2, abs=0.001)
    inputs = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    backbone = run.start_network().to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = backbone(inputs)
        detached = umap.detached().to(memory_format=torch.channels_last)
        assert torch.equal(detached(inputs), expected)
        assert not torch.equal(umap.network(inputs), expected)
    assert weights_fingerprint(detached) == weights_fingerprint(run.network)
