"""The shared loop: resuming bit for bit, finished and tracked trainings, and what a broken directory says."""

import itertools
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from ood_helpers.config import TrainingConfig
from ood_helpers.errors import InputError
from ood_helpers.training import checkpoint_path, load_weights, saved_epochs, train

STEPS, EPOCHS = 3, 4


class Killed(Exception):
    """Stands for the end of the process."""


def make_network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 3)
    )


def batches(epoch, generator):
    for _ in range(STEPS):
        images = torch.rand(8, 3, 8, 8, generator=generator)
        yield images, (images.mean(dim=(1, 2, 3)) * 30).long() % 3


def loss_function(network, batch):
    images, labels = batch
    # The noise comes from torch's global random state, as dropout's does.
    logits = network(images + 0.01 * torch.randn_like(images))
    return F.cross_entropy(logits, labels), {"accuracy": 100 * (logits.argmax(1) == labels).float().mean()}


def run(directory: Path, network=None, **changes) -> pd.DataFrame:
    settings = {"epochs": EPOCHS, "learning_rate": 0.05, "schedule": "one_cycle"}
    settings.update(
        {
            name: changes.pop(name)
            for name in list(changes)
            if name in TrainingConfig.model_fields and name != "save_every"  # which the loop is given apart
        }
    )
    arguments = {"steps_per_epoch": STEPS, "seed": 3, "device": "cpu", "directory": directory}
    epoch_batches = changes.pop("epoch_batches", batches)
    loss = changes.pop("loss", loss_function)
    rate = changes.pop("learning_rate_at", None)
    network = make_network() if network is None else network
    return train(
        network,
        epoch_batches,
        loss,
        TrainingConfig(**settings),
        learning_rate=rate,
        **{**arguments, **changes},
    )


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    for name in "ab":
        run(tmp_path / name)
    run(tmp_path / "c", seed=4)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
@pytest.mark.parametrize("where", ["validation", "batches", "end"])
@pytest.mark.parametrize("stop", [1, 2, EPOCHS])
def test_killed_and_started_again_gives_the_same_bytes(tmp_path, monkeypatch, schedule, where, stop):
    run(tmp_path / "whole", schedule=schedule, validate=lambda network: {"value": 1.5})
    calls = {"validation": 0, "batches": 0}

    def count(kind):
        calls[kind] += 1
        if where == kind and calls[kind] == stop:
            raise Killed

    def validate(network):
        assert not network.training
        assert not torch.is_grad_enabled()
        torch.rand(stop)  # random numbers drawn here change nothing
        count("validation")
        return {"value": 1.5}

    def killed_batches(epoch, generator):
        for index, batch in enumerate(batches(epoch, generator)):
            if index == 1:
                count("batches")
            yield batch

    options = {"schedule": schedule, "validate": validate, "epoch_batches": killed_batches}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if where == "end":
            patch.setattr(
                "safetensors.torch.save_file", lambda *args, **kwargs: (_ for _ in ()).throw(Killed)
            )
        run(tmp_path / "parts", **options)
    assert not (tmp_path / "parts" / "weights.safetensors").exists()
    torch.manual_seed(99)
    frame = run(tmp_path / "parts", **options)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sorted(path.name for path in parts.iterdir()) == ["history.csv", "weights.safetensors"]
    assert (whole / "weights.safetensors").read_bytes() == (parts / "weights.safetensors").read_bytes()
    assert (whole / "history.csv").read_bytes() == (parts / "history.csv").read_bytes()
    assert frame["epoch"].tolist() == [1, 2, 3, 4]
    assert calls["batches"] == EPOCHS + (where != "end")  # only the interrupted epoch was repeated


def test_finished_training_is_not_repeated(tmp_path):
    first, again = make_network(), make_network()
    frame = run(tmp_path, first)
    content = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "training_state.pt").write_bytes(b"left by a process killed before it could remove it")

    def must_not_run(*_):
        raise AssertionError("trained again")

    pd.testing.assert_frame_equal(run(tmp_path, again, epoch_batches=must_not_run), frame, check_exact=True)
    assert not again.training
    assert not first.training
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name])
    assert (tmp_path / "weights.safetensors").read_bytes() == content
    assert not (tmp_path / "training_state.pt").exists()


def test_history_and_learning_rates(tmp_path):
    cosine = run(tmp_path / "cosine", schedule="cosine", learning_rate=0.2)
    assert cosine.columns.tolist() == ["epoch", "step", "learning_rate", "train_loss", "train_accuracy"]
    assert cosine["step"].tolist() == [STEPS * epoch for epoch in range(1, EPOCHS + 1)]
    steps = STEPS * EPOCHS
    expected = [0.1 * (1 + math.cos(math.pi * (STEPS * epoch - 1) / steps)) for epoch in range(1, EPOCHS + 1)]
    assert cosine["learning_rate"].tolist() == pytest.approx(expected)
    one_cycle = run(tmp_path / "one_cycle", learning_rate=0.2)["learning_rate"]
    assert one_cycle.iloc[-1] < 1e-5 < 0.1 < one_cycle.max() <= 0.2


def test_ends_in_the_middle_of_an_epoch_with_a_learning_rate_of_its_own(tmp_path):
    rates = []

    def some_batches(epoch, generator):
        yield from itertools.islice(batches(epoch, generator), 3 if epoch < 3 else 1)

    def rate(step):
        rates.append(step)
        return 0.01 * (step + 1)

    frame = run(tmp_path, epoch_batches=some_batches, steps=7, learning_rate_at=rate, learning_rate=0.5)
    assert frame["step"].tolist() == [3, 6, 7]
    assert frame["learning_rate"].tolist() == pytest.approx([0.03, 0.06, 0.07])
    assert sorted(set(rates)) == list(range(8))


@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path, size):
    def loss(network, batch):
        return F.cross_entropy(network(batch[0]), batch[1]), {"one": 1.0}

    networks = [make_network().double(), make_network().double()]
    start = networks[0].state_dict()["5.weight"].clone()

    def double_batches(epoch, generator):
        for images, labels in batches(epoch, generator):
            yield images.double(), labels

    frames = [
        run(
            tmp_path / str(part),
            network,
            loss=loss,
            epoch_batches=double_batches,
            micro_batch_size=part,
            train_mode=nn.Module.eval,
        )
        for part, network in zip([None, size], networks)
    ]
    whole, parts = (network.state_dict() for network in networks)
    assert not torch.equal(whole["5.weight"], start)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-9, atol=1e-12)
    assert frames[1]["train_loss"].tolist() == pytest.approx(frames[0]["train_loss"].tolist())


def test_eval_mode_keeps_the_statistics_of_batch_norm(tmp_path):
    network = make_network()
    run(tmp_path / "eval", network, train_mode=nn.Module.eval)
    assert torch.equal(network.state_dict()["1.running_mean"], torch.zeros(4))
    run(tmp_path / "train", network := make_network())
    assert not torch.equal(network.state_dict()["1.running_mean"], torch.zeros(4))


def test_logged_values_are_means_over_samples(tmp_path):
    sizes = [6, 2]

    def two_batches(epoch, generator):
        for size in sizes:
            yield (torch.rand(size, 3, 8, 8, generator=generator), torch.zeros(size, dtype=torch.long))

    def loss(network, batch):
        return F.cross_entropy(network(batch[0]), batch[1]), {
            "size": float(len(batch[0])),
            "one": torch.ones(()),
        }

    frame = run(tmp_path, epoch_batches=two_batches, loss=loss, steps_per_epoch=2)
    assert frame["train_size"].tolist() == [pytest.approx((6 * 6 + 2 * 2) / 8)] * EPOCHS
    assert frame["train_one"].tolist() == [1.0] * EPOCHS


def test_random_state_of_the_caller_is_left_alone(tmp_path):
    network = make_network()
    before = torch.get_rng_state()
    run(tmp_path, network)
    assert torch.equal(torch.get_rng_state(), before)


def test_frozen_parameters_stay(tmp_path):
    network = make_network()
    network[0].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    run(tmp_path, network)
    assert torch.equal(network[0].weight, before["0.weight"])
    assert not torch.equal(network[5].weight, before["5.weight"])
    with pytest.raises(InputError, match="nothing to train"):
        run(tmp_path / "other", make_network().requires_grad_(False))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(tmp_path, value):
    def broken(network, batch):
        loss, values = loss_function(network, batch)
        return loss * value, values

    with pytest.raises(InputError, match=r"training loss became (nan|inf) in epoch 1, .*lower learning_rate"):
        run(tmp_path, loss=broken)
    assert list(tmp_path.iterdir()) == []


def test_wrong_number_of_batches(tmp_path):
    for steps in (STEPS - 1, STEPS + 1):
        with pytest.raises(ValueError, match="zip"):
            run(tmp_path, steps_per_epoch=steps)


def interrupted(directory: Path) -> Path:
    def validate(network):
        if (directory / "training_state.pt").exists():
            raise Killed
        return {}

    with pytest.raises(Killed):
        run(directory, validate=validate)
    return directory / "training_state.pt"


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_damaged_state(tmp_path, part):
    path = interrupted(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(InputError, match=r"training_state\.pt is unreadable; delete this file"):
        run(tmp_path)
    path.unlink()
    assert len(run(tmp_path)) == EPOCHS


def test_damaged_weights(tmp_path):
    run(tmp_path)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        InputError, match=r"weights\.safetensors are unreadable; delete this file to train again"
    ):
        run(tmp_path)


def test_directory_of_another_training(tmp_path):
    interrupted(tmp_path / "interrupted")
    run(tmp_path / "finished")
    for name in ("interrupted", "finished"):
        with pytest.raises(
            InputError, match=r"training with epochs 4 instead of 9, seed 3 instead of 8; use another"
        ):
            run(tmp_path / name, epochs=9, seed=8)
        with pytest.raises(InputError, match="images None instead of 12"):
            run(tmp_path / name, settings={"images": 12})


def test_weights_of_another_network(tmp_path):
    run(tmp_path / "finished")
    with pytest.raises(InputError, match="weights of another network"):
        run(tmp_path / "finished", nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    interrupted(tmp_path / "interrupted")
    with pytest.raises(InputError, match="delete this file"):
        run(tmp_path / "interrupted", nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))


# ---- tracked trainings, steps and states of their own -------------------------------------------------------


def accuracy_by_epoch(values):
    """A validation whose accuracy is the next of `values`."""
    values = iter(values)
    return lambda network: {"accuracy": next(values)}


def stored(directory: Path, which: str | int) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(checkpoint_path(directory, which))


def same_weights(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_untracked_training_leaves_weights_and_history_alone(tmp_path):
    with pytest.raises(
        InputError, match="save_every 1 and scored_epoch last for a training that is not tracked"
    ):
        run(tmp_path, save_every=1)
    run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.csv", "weights.safetensors"]
    assert saved_epochs(tmp_path) == {}


def test_tracking_changes_nothing_of_the_training(tmp_path):
    plain = run(tmp_path / "plain")
    tracked = run(tmp_path / "tracked", tracked=True, save_every=1)
    pd.testing.assert_frame_equal(plain, tracked, check_exact=True)
    contents = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("plain", "tracked")]
    assert contents[0] == contents[1]


def test_checkpoints_of_a_tracked_training(tmp_path):
    start = make_network().state_dict()
    accuracies = [50, 70, 70, 60]  # of equal ones the earliest
    run(tmp_path, tracked=True, save_every=2, validate=accuracy_by_epoch(accuracies))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"{name}.safetensors" for name in ("best", "epoch_2", "epoch_4", "first", "last")]
    assert same_weights(stored(tmp_path, "first"), start)
    assert same_weights(stored(tmp_path, "best"), stored(tmp_path, 2))
    assert same_weights(stored(tmp_path, "last"), stored(tmp_path, 4))
    assert same_weights(
        stored(tmp_path, "last"), safetensors.torch.load_file(tmp_path / "weights.safetensors")
    )
    assert not same_weights(stored(tmp_path, 2), stored(tmp_path, 4))
    assert list(saved_epochs(tmp_path)) == [0, 2, 4]
    assert json.loads((tmp_path / "settings.json").read_text())["epochs"] == EPOCHS


def test_the_last_epoch_is_among_the_saved_ones(tmp_path):
    run(tmp_path, tracked=True, save_every=3)
    found = saved_epochs(tmp_path)
    assert {epoch: path.stem for epoch, path in found.items()} == {0: "first", 3: "epoch_3", 4: "last"}


def test_without_accuracies_there_is_no_best_epoch(tmp_path):
    run(tmp_path, tracked=True, validate=accuracy_by_epoch([math.nan] * EPOCHS))
    assert not checkpoint_path(tmp_path, "best").exists()


@pytest.mark.parametrize(("scored", "expected"), [("best", 2), (3, 3), (4, "last"), ("last", "last")])
def test_scored_epoch(tmp_path, scored, expected):
    options = {"tracked": True, "save_every": 1, "scored_epoch": scored}
    network = make_network()
    run(tmp_path, network, validate=accuracy_by_epoch([50, 70, 70, 60]), **options)
    weights = stored(tmp_path, expected)
    assert same_weights(network.state_dict(), weights)
    again = make_network()
    run(tmp_path, again, **options)
    assert same_weights(again.state_dict(), weights)


def test_the_best_epoch_of_a_training_without_validation(tmp_path):
    with pytest.raises(InputError, match=r"no validation images to choose the best epoch by.*id\.validation"):
        run(tmp_path, tracked=True, scored_epoch="best")


def test_a_best_epoch_before_the_interruption_is_kept(tmp_path):
    accuracies = [50, 70, 60, 65]
    options = {"tracked": True, "save_every": 1, "scored_epoch": "best"}
    run(tmp_path / "whole", validate=accuracy_by_epoch(accuracies), **options)
    with pytest.raises(StopIteration):
        run(tmp_path / "parts", validate=accuracy_by_epoch(accuracies[:2]), **options)
    run(tmp_path / "parts", validate=accuracy_by_epoch(accuracies[2:]), **options)
    for name in ("weights.safetensors", "checkpoints/best.safetensors", "checkpoints/first.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_step_of_its_own_takes_the_place_of_the_loss(tmp_path):
    """Two steps of plain SGD a batch, which a loss function could not do."""

    def step(network, batch, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            loss, values = loss_function(network, batch)
            loss.backward()
            optimizer.step()
        return loss, values

    frame = run(tmp_path / "two", loss=None, step=step)
    assert frame.columns.tolist() == run(tmp_path / "one").columns.tolist()
    assert frame["step"].tolist() == [STEPS * epoch for epoch in range(1, EPOCHS + 1)]
    contents = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("one", "two")]
    assert contents[0] != contents[1]


class Counter:
    """A state that the loss depends on."""

    def __init__(self):
        self.steps, self.mean = 0, torch.zeros(())

    def state_dict(self):
        return {"steps": self.steps, "mean": self.mean}

    def load_state_dict(self, state):
        self.steps, self.mean = state["steps"], state["mean"]

    def loss(self, network, batch):
        loss, values = loss_function(network, batch)
        self.steps, self.mean = self.steps + 1, 0.9 * self.mean + 0.1 * loss.detach()
        return loss + 0.1 * self.steps * (loss - self.mean).square(), values


def test_a_state_of_its_own_survives_an_interruption(tmp_path):
    whole = Counter()
    run(tmp_path / "whole", loss=whole.loss, state=whole)
    with pytest.raises(StopIteration):
        first = Counter()
        run(tmp_path / "parts", loss=first.loss, state=first, validate=accuracy_by_epoch([1, 2]))
    second = Counter()
    run(tmp_path / "parts", loss=second.loss, state=second)
    assert first.steps == 3 * STEPS and second.steps == whole.steps == EPOCHS * STEPS
    assert torch.equal(second.mean, whole.mean)
    contents = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert contents[0] == contents[1]


def test_weights_of_a_training_by_hand(tmp_path):
    run(tmp_path, tracked=True)
    network = make_network()
    load_weights(network, checkpoint_path(tmp_path, "last"))
    assert same_weights(network.state_dict(), stored(tmp_path, "last"))
    with pytest.raises(InputError, match="unreadable; delete this file"):
        load_weights(network, checkpoint_path(tmp_path, 7))
    with pytest.raises(InputError, match="weights of another network"):
        load_weights(nn.Linear(2, 2), checkpoint_path(tmp_path, "last"))
