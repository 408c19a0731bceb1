"""What a tracked training keeps: weights of earlier epochs, its settings and its curves."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import torch
from loop_examples import EPOCHS, STEPS, accuracy_by_epoch, make_network, run, weights_of
from torch import nn

from ood_helpers.errors import InputError
from ood_helpers.training.tracking import Tracking, checkpoint_path, load_weights, saved_epochs


def stored(directory: Path, which: str | int) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(checkpoint_path(directory, which))


def same_weights(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_training_that_is_not_tracked_leaves_weights_and_history_alone(tmp_path):
    run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "history.csv",
        "record.json",
        "weights.safetensors",
    ]
    assert saved_epochs(tmp_path) == {}


def test_tracking_changes_nothing_of_the_training(tmp_path):
    plain = run(tmp_path / "plain")
    tracked = run(tmp_path / "tracked", tracking=Tracking(save_every=1))
    pd.testing.assert_frame_equal(plain, tracked, check_exact=True)
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "tracked")


def test_checkpoints_of_a_tracked_training(tmp_path):
    start = make_network().state_dict()
    accuracies = [50, 70, 70, 60]  # of equal ones the earliest
    run(tmp_path, tracking=Tracking(save_every=2), validate=accuracy_by_epoch(accuracies))
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
    assert json.loads((tmp_path / "settings.json").read_text())["steps"] == EPOCHS * STEPS


def test_the_last_epoch_is_among_the_saved_ones(tmp_path):
    run(tmp_path, tracking=Tracking(save_every=3))
    found = saved_epochs(tmp_path)
    assert {epoch: path.stem for epoch, path in found.items()} == {0: "first", 3: "epoch_3", 4: "last"}


def test_without_accuracies_there_is_no_best_epoch(tmp_path):
    run(tmp_path, tracking=Tracking(), validate=accuracy_by_epoch([math.nan] * EPOCHS))
    assert not checkpoint_path(tmp_path, "best").exists()


@pytest.mark.parametrize(("scored", "expected"), [("best", 2), (3, 3), (4, "last"), ("last", "last")])
def test_scored_epoch(tmp_path, scored, expected):
    options = {"tracking": Tracking(save_every=1, scored_epoch=scored)}
    network = make_network()
    run(tmp_path, network, validate=accuracy_by_epoch([50, 70, 70, 60]), **options)
    weights = stored(tmp_path, expected)
    assert same_weights(network.state_dict(), weights)
    again = make_network()
    run(tmp_path, again, **options)
    assert same_weights(again.state_dict(), weights)


def test_the_best_epoch_of_a_training_without_validation(tmp_path):
    with pytest.raises(InputError, match=r"no validation images to choose the best epoch by.*id\.validation"):
        run(tmp_path, tracking=Tracking(scored_epoch="best"))


def test_a_best_epoch_before_the_interruption_is_kept(tmp_path):
    accuracies = [50, 70, 60, 65]
    options = {"tracking": Tracking(save_every=1, scored_epoch="best")}
    run(tmp_path / "whole", validate=accuracy_by_epoch(accuracies), **options)
    with pytest.raises(StopIteration):
        run(tmp_path / "parts", validate=accuracy_by_epoch(accuracies[:2]), **options)
    run(tmp_path / "parts", validate=accuracy_by_epoch(accuracies[2:]), **options)
    for name in ("weights.safetensors", "checkpoints/best.safetensors", "checkpoints/first.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_damaged_best_epoch_is_not_replaced_by_the_last(tmp_path, capsys):
    options = {"tracking": Tracking(scored_epoch="best")}
    with pytest.raises(StopIteration):
        run(tmp_path, validate=accuracy_by_epoch([50, 70, 60]), **options)
    checkpoint_path(tmp_path, "best").write_bytes(b"")
    history = run(tmp_path, validate=accuracy_by_epoch([50, 70, 60, 65]), **options)
    assert "best.safetensors is damaged and computed again" in capsys.readouterr().err
    assert history.validation_accuracy.tolist() == [50, 70, 60, 65]  # all epochs
    assert same_weights(
        stored(tmp_path, "best"), safetensors.torch.load_file(tmp_path / "weights.safetensors")
    )


def test_weights_of_a_training_by_hand(tmp_path):
    run(tmp_path, tracking=Tracking())
    network = make_network()
    load_weights(network, checkpoint_path(tmp_path, "last"))
    assert same_weights(network.state_dict(), stored(tmp_path, "last"))
    with pytest.raises(InputError, match="damaged, expected those of a training; delete the file"):
        load_weights(network, checkpoint_path(tmp_path, 7))
    with pytest.raises(InputError, match="weights of another network"):
        load_weights(nn.Linear(2, 2), checkpoint_path(tmp_path, "last"))
