"""Training a classifier: learning, resuming, and both ways to get at images."""

import numpy as np
import pytest
import torch
from pictures import TRANSFORM, Pictures
from PIL import Image

from ood_helpers.backbones import DenseNet, load_checkpoint, weights_fingerprint
from ood_helpers.config.backbones import TrainingConfig
from ood_helpers.errors import InputError
from ood_helpers.training.batches import evaluate
from ood_helpers.training.classifier import train_classifier


def make_network() -> DenseNet:
    torch.manual_seed(0)
    return DenseNet(3, depth=10, growth_rate=4, dropout=0.1)


def run(directory, network=None, train=None, validation=None, transform=TRANSFORM, **config):
    config = TrainingConfig(**{"epochs": 3, "batch_size": 16, "crop_padding": 1, "flip": True, **config})
    network = make_network() if network is None else network
    train = Pictures(50, 0) if train is None else train
    return train_classifier(
        network, train, validation, transform, config, seed=1, device="cpu", directory=directory
    )


def test_learns_and_reports(tmp_path):
    network, validation = make_network(), Pictures(30, 1)
    history = run(tmp_path, network, validation=validation, epochs=8)
    assert history.columns.tolist() == (
        [
            "epoch",
            "step",
            "learning_rate",
            "train_loss",
            "train_accuracy",
            "validation_loss",
            "validation_accuracy",
        ]
    )
    assert history["train_loss"].iloc[-1] < 0.5 * history["train_loss"].iloc[0]
    assert history["validation_accuracy"].iloc[-1] > 90
    assert not network.training
    last = history.iloc[-1]
    assert evaluate(network, validation, TRANSFORM, 7, "cpu") == pytest.approx(
        {"loss": last["validation_loss"], "accuracy": last["validation_accuracy"]}, rel=1e-4
    )


def test_without_validation_set_its_columns_are_empty(tmp_path):
    for _ in range(2):  # trained, then read back
        history = run(tmp_path, epochs=2)
        assert history[["validation_loss", "validation_accuracy"]].isna().all(axis=None)
        assert history[["train_loss", "train_accuracy"]].notna().all(axis=None)


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_resumes_bit_for_bit(tmp_path, monkeypatch, decoded, schedule):
    train, validation = Pictures(50, 0, decoded), Pictures(10, 1, decoded)
    run(tmp_path / "whole", train=train, validation=validation, schedule=schedule)

    class Killed(Exception):
        pass

    def kill(*_):
        if (tmp_path / "parts" / "training_state.pt").exists():
            raise Killed
        return {"loss": 0.0, "accuracy": 0.0}

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("ood_helpers.training.batches.evaluate", kill)
        run(tmp_path / "parts", train=train, validation=validation, schedule=schedule)
    network = make_network()
    run(tmp_path / "parts", network, train=train, validation=validation, schedule=schedule)
    whole, parts = (tmp_path / name / "weights.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    finished, loaded = make_network(), make_network()
    run(tmp_path / "parts", finished, train=train, validation=validation, schedule=schedule)
    load_checkpoint(loaded, parts)
    assert weights_fingerprint(network) == weights_fingerprint(finished) == weights_fingerprint(loaded)
    assert not finished.training


def test_decoded_images_and_arrays_train_alike(tmp_path):
    run(tmp_path / "array", epochs=1)
    run(tmp_path / "decoded", train=Pictures(50, 0, decoded=True), epochs=1)
    array, decoded = (tmp_path / name / "weights.safetensors" for name in ("array", "decoded"))
    assert array.read_bytes() == decoded.read_bytes()


def test_images_of_several_sizes(tmp_path):
    pictures = Pictures(4, 0, decoded=True)
    pictures.image = lambda i: Image.new("RGB", (8 + i, 8))
    with pytest.raises(InputError, match="pictures have several sizes after the transform"):
        run(tmp_path, train=pictures)


def test_labels_are_checked(tmp_path):
    unlabelled, wrong = Pictures(6, 0), Pictures(6, 0)
    unlabelled.labels, wrong.labels = None, np.array([0, 1, 2, 3, 0, 1])
    with pytest.raises(InputError, match="pictures has no labels"):
        run(tmp_path, train=unlabelled)
    with pytest.raises(InputError, match="labels 0 to 3, expected 0 to 2"):
        run(tmp_path, validation=wrong)


def test_diverging_training_says_so(tmp_path):
    with pytest.raises(InputError, match=r"training loss became (nan|inf)"):
        run(tmp_path, learning_rate=1e30)


def test_read_only_arrays_are_fine(tmp_path):
    pictures = Pictures(20, 0)
    pictures.array.flags.writeable = False
    pictures.labels.flags.writeable = False
    assert len(run(tmp_path, train=pictures, epochs=1)) == 1
