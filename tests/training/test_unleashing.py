"""Unleashing Mask: the sheet's vectors, the loss constraint, what a fine-tuning does and leaves behind."""

import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from pictures import TRANSFORM, Pictures, assert_interrupted_ends_in_the_same_bytes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ood_helpers.backbones import DenseNet
from ood_helpers.config import LossConstraintConfig, TrainingConfig, UnleashingMaskConfig
from ood_helpers.errors import InputError
from ood_helpers.training import checkpoint_path, evaluate, prepare_masks, train_classifier, unleash
from ood_helpers.training import unleashing as module
from ood_helpers.training.classifier import evaluate_logits
from ood_helpers.training.loop import load_weights, saved_epochs
from ood_helpers.training.unleashing import (
    IDLoss,
    LossConstraint,
    epoch_steps,
    estimate_constraint,
    learning_rate_of_epoch,
    um_loss,
)
from ood_helpers.training.weight_masks import detach_masks, masks_of

LABELS = torch.tensor([0, 1, 2, 0])
LOGITS = [[2, 0.5, -1], [0.1, 1.2, 0.3], [-0.5, 0, 1.5], [1, 1, 0]]  # V1
GRADIENT = torch.tensor(
    [
        [-0.053601, 0.043823, 0.009778],
        [0.047842, -0.106276, 0.058434],
        [0.024906, 0.041063, -0.065969],
        [-0.144420, 0.105580, 0.038841],
    ],
    dtype=torch.float64,
)
SETS = {"train": Pictures(50, 0), "validation": Pictures(30, 1)}


# ---- the objective -----------------------------------------------------------------------------------------


def logits() -> torch.Tensor:
    return torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("constraint", "beta", "loss", "factor"),
    [
        (0.1, 1, 0.490806, 1),
        (0.7, 1, 0.909194, -1),
        (0, 1, 0.490806, 1),
        (0.1, 0.15, 0.126379, -0.15),
        (0.3, 1, 0.490806, 1),  # of each sample it would be 0.520151
    ],
)
def test_loss_and_its_gradient(constraint, beta, loss, factor):  # V1
    z = logits()
    found = um_loss(F.cross_entropy(z, LABELS), constraint, beta)
    assert found.item() == pytest.approx(loss, abs=1e-6)
    found.backward()
    torch.testing.assert_close(z.grad, factor * GRADIENT, atol=1e-6, rtol=0)


def test_at_the_constraint_the_gradient_is_zero():  # V1
    z = logits()
    cross_entropy = F.cross_entropy(z, LABELS)
    loss = um_loss(cross_entropy, cross_entropy.item())
    loss.backward()
    assert loss.item() == pytest.approx(0.490806, abs=1e-6) and not z.grad.any()


@pytest.mark.parametrize(("constraint", "after"), [(0.1, 0.460506), (0.7, 0.522565)])
def test_one_step_goes_down_above_the_constraint_and_up_below_it(constraint, after):  # V1
    z = logits()
    um_loss(F.cross_entropy(z, LABELS), constraint).backward()
    assert F.cross_entropy(z - 0.5 * z.grad, LABELS).item() == pytest.approx(after, abs=1e-6)


@pytest.mark.parametrize(("beta", "constraint", "ascending"), [(1, 0.1, 0), (1, 0.7, 100), (0.15, 0.1, 100)])
def test_logged_is_the_unflooded_cross_entropy(beta, constraint, ascending):
    loss, values = IDLoss(UnleashingMaskConfig(beta=beta), constraint)(logits(), LABELS)
    assert values["cross_entropy"].item() == pytest.approx(0.490806, abs=1e-6)
    assert float(values["ascending"]) == ascending and float(values["accuracy"]) == 100
    assert loss.item() == pytest.approx(abs(beta * 0.490806 - constraint) + constraint, abs=1e-6)


def test_plain_cross_entropy_has_no_ascent():
    loss, values = IDLoss(UnleashingMaskConfig(id_loss="cross_entropy"), None)(logits(), LABELS)
    assert loss.item() == pytest.approx(0.490806, abs=1e-6) and set(values) == {"cross_entropy", "accuracy"}


def test_a_constraint_belongs_to_um_and_um_to_a_constraint():
    with pytest.raises(InputError, match="Found no loss constraint with id_loss: um, expected"):
        IDLoss(UnleashingMaskConfig(), None)
    with pytest.raises(InputError, match=r"Found the loss constraint 0\.3 with id_loss: cross_entropy"):
        IDLoss(UnleashingMaskConfig(id_loss="cross_entropy"), 0.3)


# ---- the schedule ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "epochs", "expected"),
    [
        (0.1, 100, {0: 0.1, 1: 0.099975, 25: 0.085355, 50: 0.05, 75: 0.014645, 99: 0.000025}),
        (0.01, 10, {5: 0.005, 9: 0.000245}),
    ],
)
def test_learning_rates_of_epochs(rate, epochs, expected):  # V10
    config = UnleashingMaskConfig(learning_rate=rate, epochs=epochs)
    found = {epoch: learning_rate_of_epoch(epoch, config) for epoch in expected}
    assert found == pytest.approx(expected, abs=5e-7)


def test_warm_up_comes_before_the_cosine():
    config = UnleashingMaskConfig(learning_rate=0.1, epochs=104, warmup_epochs=4)
    rates = [learning_rate_of_epoch(epoch, config) for epoch in range(104)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    expected = {4: 0.1, 5: 0.099975, 29: 0.085355, 54: 0.05, 103: 0.000025}
    assert {epoch: rates[epoch] for epoch in expected} == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(
    ("images", "given", "steps"), [(50, None, 4), (49, None, 3), (50, 2, 2), (50, 9, 4), (48, 3, 3)]
)
def test_steps_of_an_epoch(images, given, steps):
    assert epoch_steps(UnleashingMaskConfig(batch_size=16, steps_per_epoch=given), images) == steps


# ---- the loss constraint -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> DenseNet:
    """A network that has learned the pictures."""
    torch.manual_seed(0)
    network = DenseNet(3, depth=10, growth_rate=4)
    config = TrainingConfig(epochs=6, batch_size=16, learning_rate=0.1)
    directory = tmp_path_factory.mktemp("start")
    options = {"seed": 0, "device": "cpu", "directory": directory}
    history = train_classifier(network, *SETS.values(), TRANSFORM, config, **options)
    assert history.validation_accuracy.iloc[-1] > 90
    return network


def estimate(network, batch_size=16, **config):
    config = LossConstraintConfig(**{"draws": 3, "keep_rate": 0.8, **config})
    return estimate_constraint(network, SETS["train"], TRANSFORM, config, batch_size=batch_size, device="cpu")


def test_every_image_counts_equally_in_unequal_batches(start):  # V13
    batches = []
    for value, size in ((0.2, 512), (0.4, 512), (0.1, 336)):
        z = torch.tensor([0, math.log(math.exp(value) - 1)], dtype=torch.float64).expand(size, 2)
        batches.append((z, torch.zeros(size, dtype=torch.long)))
    assert evaluate_logits(batches)["loss"] == pytest.approx(0.250588, abs=1e-6)
    parts, whole = estimate(start, batch_size=16), estimate(start, batch_size=50)
    assert parts.draws == pytest.approx(whole.draws, rel=1e-5)


def test_the_estimate_is_seeded_and_changes_nothing(start):
    before = copy.deepcopy(start.state_dict())
    first, again, other = estimate(start), estimate(start), estimate(start, seed=1)
    assert first == again and set(first.draws).isdisjoint(other.draws)
    assert first.draws[0] == estimate(start, draws=1).draws[0]
    assert first.unmasked == other.unmasked == evaluate(start, SETS["train"], TRANSFORM, 16, "cpu")["loss"]
    assert first.keep_rate == 0.8 and min(first.draws) > first.unmasked
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())


def test_rounding_decides_how_many_weights_go(start):
    nearest, truncated = (
        estimate(start, keep_rate=0.965),
        estimate(start, keep_rate=0.965, rounding="truncated"),
    )
    assert nearest.draws != truncated.draws and nearest.unmasked == truncated.unmasked


def test_mean_and_deviation_of_the_draws():
    found = LossConstraint((0.2, 0.4, 0.3), 0.1, 0.965)
    assert found.mean == pytest.approx(0.3) and found.std == pytest.approx(0.1)
    assert math.isnan(LossConstraint((0.2,), 0.1, 0.965).std)


def test_weights_that_are_no_numbers(start):
    network = copy.deepcopy(start)
    with torch.no_grad():
        network.head.weight[0, 0] = math.nan
    with pytest.raises(InputError, match="cross-entropy of pictures is nan, expected a finite number; check"):
        estimate(network)


def test_no_constraint_without_labels(start):
    unlabelled = Pictures(8, 0)
    unlabelled.labels = None
    with pytest.raises(InputError, match="has no labels"):
        estimate_constraint(start, unlabelled, TRANSFORM, LossConstraintConfig(), batch_size=8, device="cpu")


# ---- fine-tuning -------------------------------------------------------------------------------------------


UM = {"constraint": 0.3, "learning_rate": 0.05}
UMAP = {
    **UM,
    "constraint": 0.4,
    "keep_rate": 0.8,
    "initial_scores": "magnitude",
    "learning_rate": 0.2,
    "weight_decay": 0.0,
}


def tune(directory, network, *, constraint, validation=SETS["validation"], seed=1, device="cpu", **config):
    """Fine-tune a copy of a network, with its masks; the copy and the history."""
    config = UnleashingMaskConfig(
        **{"epochs": 4, "batch_size": 16, "crop_padding": 1, "flip": True, **config}
    )
    network = copy.deepcopy(network)
    prepare_masks(network, config, seed)
    sets = SETS["train"], validation
    history = unleash(
        network, *sets, TRANSFORM, config, constraint, seed=seed, device=device, directory=directory
    )
    return network, history


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
    before = evaluate(start, SETS["train"], TRANSFORM, 16, "cpu")["loss"]
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
    detached = copy.deepcopy(start)
    prepare_masks(detached, UnleashingMaskConfig(keep_rate=0.8), 0)
    detached.load_state_dict(trained)
    detach_masks(detached)
    expected = start.to(memory_format=torch.channels_last)(images)
    assert torch.equal(detached.eval().to(memory_format=torch.channels_last)(images), expected)


def test_umap_may_train_the_weights_too(start, tmp_path):
    network, _ = tune(tmp_path, start, **UMAP, freeze_weights=False, epochs=1)
    for name in masks_of(network):
        weight = network.get_submodule(name).parametrizations.weight.original
        assert not torch.equal(weight, start.get_submodule(name).weight)
    assert not torch.equal(network.head.bias, start.head.bias)
    assert not torch.equal(network.bn1.weight, start.bn1.weight)


@pytest.mark.parametrize("settings", [UM, UMAP, {**UMAP, "freeze_weights": False, "scored_epoch": "best"}])
def test_interrupted_ends_in_the_same_bytes(settings, start, tmp_path, monkeypatch):
    def run(directory):
        return tune(directory, start, **settings, epochs=10)[1]

    assert_interrupted_ends_in_the_same_bytes(run, module, "evaluate", tmp_path, monkeypatch)
    for which in ("first", "best", "last"):
        contents = [checkpoint_path(tmp_path / name, which).read_bytes() for name in ("whole", "parts")]
        assert contents[0] == contents[1]
    files = (tmp_path / "parts" / "tensorboard").iterdir()
    assert sorted(point.step for file in files for point in events_of(file)["train_loss"]) == list(
        range(1, 11)
    )


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
    found = evaluate(best, SETS["validation"], TRANSFORM, 16, "cpu")
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
    assert settings["nesterov"] is False and settings["id_loss"] == "um" and settings["learning_rate"] == 0.05


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
    config = UnleashingMaskConfig(learning_rate=0.05, epochs=20)
    expected = [learning_rate_of_epoch(epoch, config) for epoch in range(20)]
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


def test_nesterov_momentum_only_where_it_is_asked_for(start, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        torch.optim,
        "SGD",
        lambda *args, sgd=torch.optim.SGD, **kwargs: (made.append(kwargs["nesterov"]), sgd(*args, **kwargs))[
            1
        ],
    )
    for nesterov in (False, True):
        tune(tmp_path / str(nesterov), start, **UM, epochs=1, steps_per_epoch=1, nesterov=nesterov)
    assert made == [False, True]


def test_masks_and_keep_rate_belong_together(start, tmp_path):
    config = UnleashingMaskConfig(keep_rate=0.8, loss_constraint=0.3, epochs=1)
    options = {"seed": 0, "device": "cpu", "directory": tmp_path}
    with pytest.raises(InputError, match=r"without masks and keep_rate 0\.8, .*call prepare_masks"):
        unleash(copy.deepcopy(start), *SETS.values(), TRANSFORM, config, 0.3, **options)
    masked = copy.deepcopy(start)
    prepare_masks(masked, config, 0)
    with pytest.raises(InputError, match="with masks and keep_rate None, expected masks where"):
        unleash(masked, *SETS.values(), TRANSFORM, UnleashingMaskConfig(epochs=1), 0.3, **options)
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
