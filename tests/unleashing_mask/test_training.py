"""What a fine-tuning by Unleashing Mask does, and what it leaves behind."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from interruption import assert_interrupted_training_resumes
from pictures import TRANSFORM, Pictures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ood_helpers.backbones.densenet import DenseNet
from ood_helpers.errors import InputError
from ood_helpers.training.batches import evaluate
from ood_helpers.training.epochs import learning_rate_of_epoch
from ood_helpers.training.tracking import checkpoint_path, load_weights, saved_epochs
from ood_helpers.unleashing_mask.recipe import UnleashingMaskRecipe
from ood_helpers.unleashing_mask.training import prepare_masks, unleash
from ood_helpers.unleashing_mask.weight_masks import detach_masks, masks_of

TRAIN, VALIDATION = Pictures(50, 0), Pictures(30, 1)
UM = {"constraint": 0.3, "learning_rate": 0.05}
MASKS = {"keep_rate": 0.8, "initial_scores": "magnitude"}
UMAP = {"constraint": 0.4, "masks": MASKS, "learning_rate": 0.2, "weight_decay": 0.0}
UMAP_AND_WEIGHTS = UMAP | {"masks": MASKS | {"freeze_weights": False}}


def tune(directory, network, *, constraint, validation=VALIDATION, seed=1, device="cpu", **settings):
    """Fine-tune a copy of a network, with its masks; the copy and the history."""
    short = {"epochs": 4, "batch_size": 16, "crop_padding": 1, "flip": True}
    recipe = UnleashingMaskRecipe(**short | settings)
    network, options = copy.deepcopy(network), {"seed": seed, "device": device, "directory": directory}
    prepare_masks(network, recipe, seed)
    return network, unleash(network, TRAIN, validation, TRANSFORM, recipe, constraint, **options)


@pytest.fixture(scope="module")
def um(start, tmp_path_factory):
    directory = tmp_path_factory.mktemp("um")
    return directory, *tune(directory, start, **UM, epochs=20, save_every=5)


@pytest.fixture(scope="module")
def umap(start, tmp_path_factory):
    directory = tmp_path_factory.mktemp("umap")
    return directory, *tune(directory, start, **UMAP)


def test_the_loss_rises_to_about_the_constraint(um, start):
    _, network, history = um
    before = evaluate(start, TRAIN, TRANSFORM, 16, "cpu")["loss"]
    hovering = history.train_cross_entropy.iloc[-5:].mean()
    assert before < 0.1 and 0.15 < hovering < 0.6
    assert history.train_ascending.between(0, 100).all()
    assert (
        history.train_ascending.iloc[0] > 50 and history.train_ascending.iloc[-10:].between(1, 99).sum() > 3
    )
    assert (history.train_loss >= 0.3).all()
    assert history.epoch.tolist() == list(range(1, 21)) and history.step.tolist() == list(range(4, 84, 4))
    assert not network.training and history.validation_accuracy.between(0, 100).all()


def test_without_um_the_loss_stays_low(start, tmp_path):
    _, history = tune(tmp_path, start, constraint=None, id_loss="cross_entropy", learning_rate=0.05)
    assert "train_ascending" not in history and history.train_cross_entropy.iloc[-1] < 0.1
    assert history.train_loss.tolist() == history.train_cross_entropy.tolist()


def test_umap_moves_scores_and_not_weights(umap, start):
    _, network, history = umap
    frozen = start.state_dict()
    trained = network.state_dict()
    assert len(masks_of(network)) > 8
    for name, mask in masks_of(network).items():
        assert torch.equal(trained[f"{name}.parametrizations.weight.original"], frozen[f"{name}.weight"])
        assert not torch.equal(mask.scores, frozen[f"{name}.weight"])
    assert torch.equal(trained["head.bias"], frozen["head.bias"])
    assert torch.equal(trained["bn1.weight"], frozen["bn1.weight"])
    assert not torch.equal(trained["bn1.running_mean"], frozen["bn1.running_mean"])
    assert history.train_ascending.between(0, 100).all()
    images = torch.rand(4, 3, 8, 8)
    detached, original = copy.deepcopy(start), copy.deepcopy(start)
    prepare_masks(detached, UnleashingMaskRecipe(masks={"keep_rate": 0.8}), 0)
    detached.load_state_dict(trained)
    detach_masks(detached)
    expected = original.to(memory_format=torch.channels_last)(images)
    assert torch.equal(detached.eval().to(memory_format=torch.channels_last)(images), expected)


def test_umap_may_train_the_weights_too(start, tmp_path):
    network, _ = tune(tmp_path, start, **UMAP_AND_WEIGHTS, epochs=1)
    for name in masks_of(network):
        weight = network.get_submodule(name).parametrizations.weight.original
        assert not torch.equal(weight, start.get_submodule(name).weight)
    assert not torch.equal(network.head.bias, start.head.bias)
    assert not torch.equal(network.bn1.weight, start.bn1.weight)


@pytest.mark.parametrize("settings", [UM, UMAP, UMAP_AND_WEIGHTS | {"scored_epoch": "best"}])
def test_an_interrupted_training_resumes(settings, start, tmp_path):
    def run(directory, validation):
        return tune(directory, start, validation=validation, **settings, epochs=10)[1]

    assert_interrupted_training_resumes(run, tmp_path)
    for which in ("first", "best", "last"):
        contents = [checkpoint_path(tmp_path / name, which).read_bytes() for name in ("whole", "parts")]
        assert contents[0] == contents[1]
    files = (tmp_path / "parts" / "tensorboard").iterdir()
    points = [point for file in files for point in events_of(file)["train_loss"]]
    assert sorted(point.step for point in points) == list(range(1, 11))


def test_checkpoints_of_a_tracked_training(um, start):
    directory, network, history = um
    found = sorted(path.stem for path in (directory / "checkpoints").iterdir())
    assert found == ["best", "epoch_10", "epoch_15", "epoch_20", "epoch_5", "first", "last"]
    weights = {
        name: safetensors.torch.load_file(directory / "checkpoints" / f"{name}.safetensors") for name in found
    }

    def same(a, b):
        return all(torch.equal(a[name], b[name]) for name in b)

    assert same(weights["first"], start.state_dict())
    assert same(weights["last"], weights["epoch_20"]) and same(weights["last"], network.state_dict())
    different = [weights[name] for name in ("first", "epoch_5", "epoch_10", "epoch_15", "last")]
    assert not any(same(a, b) for i, a in enumerate(different) for b in different[:i])
    assert list(saved_epochs(directory)) == [0, 5, 10, 15, 20]
    best = copy.deepcopy(start)
    load_weights(best, checkpoint_path(directory, "best"))
    found = evaluate(best, VALIDATION, TRANSFORM, 16, "cpu")
    line = history.iloc[history.validation_accuracy.idxmax()]
    assert found["accuracy"] == pytest.approx(line.validation_accuracy)
    assert found["loss"] == pytest.approx(line.validation_loss, rel=1e-5)


@pytest.mark.parametrize("scored", [5, "best"])
def test_the_scored_epoch_is_what_the_network_ends_with(um, start, tmp_path, scored):
    directory, _, history = um
    network, same_history = tune(tmp_path, start, **UM, epochs=20, save_every=5, scored_epoch=scored)
    pd.testing.assert_frame_equal(same_history, history)
    expected = safetensors.torch.load_file(checkpoint_path(directory, scored))
    stored = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, expected[name]) and torch.equal(stored[name], expected[name])
    last = safetensors.torch.load_file(checkpoint_path(tmp_path, "last"))
    assert not torch.equal(last["conv1.weight"], expected["conv1.weight"])


def test_a_scored_epoch_that_is_not_among_the_saved_ones_is_saved(start, tmp_path):
    tune(tmp_path, start, **UM, epochs=3, save_every=2, scored_epoch=1)
    assert list(saved_epochs(tmp_path)) == [0, 1, 2, 3]


def test_the_best_epoch_needs_validation_images(start, tmp_path):
    with pytest.raises(InputError, match="no validation images to choose the best epoch by"):
        tune(tmp_path, start, **UM, validation=None, scored_epoch="best")
    _, history = tune(tmp_path, start, **UM, validation=None, epochs=1)
    assert not [name for name in history if name.startswith("validation")]
    assert not checkpoint_path(tmp_path, "best").exists()


def test_settings_have_the_constraint(um):
    settings = json.loads((um[0] / "settings.json").read_text())
    assert settings["constraint"] == 0.3 and settings["images"] == 50 and settings["seed"] == 1
    assert settings["nesterov"] is False and settings["id_loss"]["kind"] == "um"
    assert settings["learning_rate"] == 0.05


def events_of(path) -> dict[str, list]:
    events = EventAccumulator(str(path))
    events.Reload()
    return {name: events.Scalars(name) for name in events.Tags()["scalars"]}


def test_tensorboard_reads_the_history(um):
    directory, _, history = um
    events = events_of(directory / "tensorboard")
    assert set(events) == set(history.columns) - {"epoch"} >= {"train_cross_entropy", "train_ascending"}
    for name, points in events.items():
        assert [point.step for point in points] == history.epoch.tolist()
        np.testing.assert_allclose([point.value for point in points], history[name], rtol=1e-6)


def test_the_learning_rate_moves_once_an_epoch(um):
    recipe = UnleashingMaskRecipe(learning_rate=0.05, epochs=20)
    expected = [learning_rate_of_epoch(epoch, recipe) for epoch in range(20)]
    assert um[2].learning_rate.tolist() == pytest.approx(expected)


def test_another_seed_is_another_training(start, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tune(tmp_path / name, start, **UMAP, epochs=1, seed=seed)
        weights.append((tmp_path / name / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_an_epoch_may_end_early(start, tmp_path):
    _, history = tune(tmp_path, start, **UM, epochs=2, steps_per_epoch=1)
    assert history.step.tolist() == [1, 2]


def test_nesterov_momentum_only_where_it_is_asked_for(start, tmp_path):
    """Its first step is 1 + momentum times as long."""
    changes = []
    for nesterov in (False, True):
        options = {"nesterov": nesterov, "epochs": 1, "steps_per_epoch": 1}
        network, _ = tune(tmp_path / str(nesterov), start, **UM, **options)
        changes.append((network.head.weight - start.head.weight).detach())
    torch.testing.assert_close(changes[1], 1.9 * changes[0], rtol=1e-3, atol=1e-6)


def test_masks_of_network_and_recipe_belong_together(start, tmp_path):
    recipe = UnleashingMaskRecipe(masks={"keep_rate": 0.8}, epochs=1)
    options = {"seed": 0, "device": "cpu", "directory": tmp_path}
    sets = TRAIN, VALIDATION, TRANSFORM
    with pytest.raises(
        InputError, match=r"network without masks for a recipe with masks, .*call prepare_masks"
    ):
        unleash(copy.deepcopy(start), *sets, recipe, 0.3, **options)
    masked = copy.deepcopy(start)
    prepare_masks(masked, recipe, 0)
    with pytest.raises(InputError, match="network with masks for a recipe without masks, expected both or"):
        unleash(masked, *sets, UnleashingMaskRecipe(epochs=1), 0.3, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_constraint_that_does_not_fit_stops_before_the_training(start, tmp_path):
    for settings in ({"constraint": None}, {"constraint": 0.3, "id_loss": "cross_entropy"}):
        with pytest.raises(InputError, match="expected a constraint with um and none without"):
            tune(tmp_path, start, **settings)
    assert list(tmp_path.iterdir()) == []


def test_labels_out_of_range(start, tmp_path):
    wrong = Pictures(9, 0)
    wrong.labels = wrong.labels + 1
    with pytest.raises(InputError, match="labels 1 to 3, expected 0 to 2"):
        tune(tmp_path, start, **UM, validation=wrong)


def test_a_changed_constraint_is_another_training(um, start):
    with pytest.raises(InputError, match=r"training with constraint 0\.3 instead of 0\.5; use another"):
        tune(um[0], start, **UM | {"constraint": 0.5}, epochs=20, save_every=5)


def test_dropout_is_on_while_it_trains(tmp_path):
    """And batch norm in train mode, which moves its statistics."""
    networks = [DenseNet(3, depth=10, growth_rate=4, dropout=rate) for rate in (0.0, 0.5)]
    networks[0].load_state_dict(networks[1].state_dict())
    ends = [tune(tmp_path / str(i), network, **UM, epochs=1)[0] for i, network in enumerate(networks)]
    assert not torch.equal(ends[0].head.weight, ends[1].head.weight)
    assert not torch.equal(ends[0].bn1.running_mean, networks[0].bn1.running_mean)
    assert not any(child.training for child in ends[1].modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("settings", [UM, UMAP])
def test_on_cuda_twice_the_same_bytes(settings, start, tmp_path):
    for name in "ab":
        tune(tmp_path / name, start, **settings, device="cuda")
    contents = [(tmp_path / name / "weights.safetensors").read_bytes() for name in "ab"]
    assert contents[0] == contents[1]
