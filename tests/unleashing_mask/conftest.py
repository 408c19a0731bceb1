"""The network whose training the tests continue."""

import pytest
import torch
from pictures import TRANSFORM, Pictures

from ood_helpers.backbones.densenet import DenseNet
from ood_helpers.config.backbones import TrainingConfig
from ood_helpers.training.classifier import train_classifier


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> DenseNet:
    """A network that has learned the pictures; to be copied before it is changed."""
    torch.manual_seed(0)
    network = DenseNet(3, depth=10, growth_rate=4)
    config = TrainingConfig(epochs=6, batch_size=16, learning_rate=0.1)
    options = {"seed": 0, "device": "cpu", "directory": tmp_path_factory.mktemp("start")}
    history = train_classifier(network, Pictures(50, 0), Pictures(30, 1), TRANSFORM, config, **options)
    assert history.validation_accuracy.iloc[-1] > 90
    return network
