"""The shared loop: resuming bit for bit, finished trainings, damaged files, and directories of other trainings."""

import itertools
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from loop_examples import (
    EPOCHS,
    STEPS,
    Killed,
    accuracy_by_epoch,
    batches,
    loss_function,
    make_network,
    run,
    weights_of,
)
from torch import nn

from ood_helpers.errors import InputError
from ood_helpers.training.loop import descent, finished


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    for name in "ab":
        run(tmp_path / name)
    run(tmp_path / "c", seed=4)
    weights = [weights_of(tmp_path / name) for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("shape", ["one_cycle", "cosine"])
@pytest.mark.parametrize(
    ("where", "stop"),
    [*itertools.product(["validation", "batches"], [1, 2, EPOCHS]), ("saving the weights", EPOCHS)],
)
def test_killed_and_started_again_gives_the_same_bytes(tmp_path, monkeypatch, shape, where, stop):
    """Killed in epoch `stop`; afterwards no finished epoch is repeated."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, shape=shape, validate=lambda network: {"value": 1.5})
    alive, begun = False, []

    def killed_batches(epoch, generator):
        begun.append(epoch)
        for index, batch in enumerate(batches(epoch, generator)):
            if not alive and (where, stop, 1) == ("batches", epoch, index):
                raise Killed
            yield batch

    def validate(network):
        assert not network.training
        assert not torch.is_grad_enabled()
        torch.rand(stop)  # random numbers drawn here change nothing
        if not alive and (where, stop) == ("validation", begun[-1]):
            raise Killed
        return {"value": 1.5}

    def killed(*_, **__):
        raise Killed

    options = {"shape": shape, "validate": validate, "epoch_batches": killed_batches}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if where == "saving the weights":
            patch.setattr("safetensors.torch.save_file", killed)
        run(parts, **options)
    assert begun == list(range(1, stop + 1))
    assert not finished(parts)
    alive = True
    begun.clear()
    torch.manual_seed(99)
    frame = run(parts, **options)
    assert begun == list(range(stop + (where == "saving the weights"), EPOCHS + 1))
    assert finished(parts)
    assert sorted(path.name for path in parts.iterdir()) == [
        "history.csv",
        "record.json",
        "weights.safetensors",
    ]
    assert weights_of(whole) == weights_of(parts)
    assert (whole / "history.csv").read_bytes() == (parts / "history.csv").read_bytes()
    assert frame["epoch"].tolist() == [1, 2, 3, 4]


def test_finished_training_is_not_repeated(tmp_path):
    first, again = make_network(), make_network()
    frame = run(tmp_path, first)
    content = weights_of(tmp_path)
    (tmp_path / "training_state.pt").write_bytes(b"left by a process killed before it could remove it")

    def must_not_run(*_):
        raise AssertionError("trained again")

    pd.testing.assert_frame_equal(run(tmp_path, again, epoch_batches=must_not_run), frame, check_exact=True)
    assert not again.training
    assert not first.training
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name])
    assert weights_of(tmp_path) == content
    assert not (tmp_path / "training_state.pt").exists()


def test_history_and_learning_rates(tmp_path):
    cosine = run(tmp_path / "cosine", shape="cosine", learning_rate=0.2)
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

    frame = run(tmp_path, epoch_batches=some_batches, steps=7, shape=rate, learning_rate=0.5)
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

    options = {"epoch_batches": double_batches, "train_mode": nn.Module.eval}
    frames = [
        run(tmp_path / str(part), network, step=descent(loss, part), **options)
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
    def two_batches(epoch, generator):
        for size in (6, 2):
            yield (torch.rand(size, 3, 8, 8, generator=generator), torch.zeros(size, dtype=torch.long))

    def loss(network, batch):
        values = {"size": float(len(batch[0])), "one": torch.ones(())}
        return F.cross_entropy(network(batch[0]), batch[1]), values

    frame = run(tmp_path, epoch_batches=two_batches, loss=loss, steps_per_epoch=2, steps=2 * EPOCHS)
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
            run(tmp_path, steps_per_epoch=steps, steps=steps * EPOCHS)


def test_a_step_of_its_own_takes_the_place_of_the_descent(tmp_path):
    """Two steps of plain SGD per batch, which a loss function could not do."""

    def step(network, batch, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            loss, values = loss_function(network, batch)
            loss.backward()
            optimizer.step()
        return loss, values

    frame = run(tmp_path / "two", step=step)
    assert frame.columns.tolist() == run(tmp_path / "one").columns.tolist()
    assert frame["step"].tolist() == [STEPS * epoch for epoch in range(1, EPOCHS + 1)]
    assert weights_of(tmp_path / "one") != weights_of(tmp_path / "two")


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
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "parts")


# ---- damaged files and directories of other trainings -------------------------------------------------------


def interrupted(directory: Path) -> Path:
    """Stop a training in its second epoch; the file of its state."""

    def validate(network):
        if (directory / "training_state.pt").exists():
            raise Killed
        return {}

    with pytest.raises(Killed):
        run(directory, validate=validate)
    return directory / "training_state.pt"


def cut(path: Path, part: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])


def assert_trained_from_the_start(folder: Path, capsys, damaged: Path, **options) -> None:
    """A training in `folder` ends as one in an empty folder, after a notice that names the damaged file."""
    capsys.readouterr()
    frame = run(folder, **options)
    assert f"{damaged} is damaged and computed again." in capsys.readouterr().err
    pd.testing.assert_frame_equal(frame, run(folder / "fresh", **options), check_exact=True)
    assert weights_of(folder) == weights_of(folder / "fresh")


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_damaged_state(tmp_path, capsys, part):
    path = interrupted(tmp_path)
    cut(path, part)
    assert_trained_from_the_start(tmp_path, capsys, path)


@pytest.mark.parametrize("lost", ["network", "optimizer", "scheduler", "history"])
def test_state_of_which_a_part_is_lost(tmp_path, capsys, lost):
    path = interrupted(tmp_path)
    state = torch.load(path, weights_only=True)
    del state[lost]
    torch.save(state, path)
    assert_trained_from_the_start(tmp_path, capsys, path)


def test_state_of_another_network(tmp_path, capsys):
    path = interrupted(tmp_path)
    torch.manual_seed(0)
    start = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).state_dict()

    def other() -> nn.Module:
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        network.load_state_dict(start)
        return network

    frame = run(tmp_path, other())
    assert f"{path} is damaged and computed again." in capsys.readouterr().err
    pd.testing.assert_frame_equal(frame, run(tmp_path / "fresh", other()), check_exact=True)


@pytest.mark.parametrize("name", ["weights.safetensors", "history.csv"])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_damaged_files_of_a_finished_training(tmp_path, capsys, name, part):
    run(tmp_path)
    path = tmp_path / name
    cut(path, part)
    assert_trained_from_the_start(tmp_path, capsys, tmp_path)


def test_directory_of_another_training(tmp_path):
    interrupted(tmp_path / "interrupted")
    run(tmp_path / "finished")
    for name in ("interrupted", "finished"):
        with pytest.raises(
            InputError, match=r"training with seed 3 instead of 8, steps 12 instead of 27; use another"
        ):
            run(tmp_path / name, steps=9 * STEPS, seed=8)
        with pytest.raises(InputError, match="images None instead of 12"):
            run(tmp_path / name, settings={"images": 12})


def test_weights_of_another_network(tmp_path):
    run(tmp_path)
    with pytest.raises(InputError, match="weights of another network"):
        run(tmp_path, nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
