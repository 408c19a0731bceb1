"""A network with a background class as a classifier of the foreground; for its banks see test_banks."""

import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from ood_helpers.backbones import Classifier, DenseNet
from ood_helpers.banks import BackgroundBank, FeatureBank, Head
from ood_helpers.networks.background import foreground_classifier, foreground_head


class Dense(Classifier):
    """A convolution and a head of 3 classes and the background."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.register_buffer("shift", torch.ones(1))
        self.head = nn.Linear(5, 4)

    def feature_map(self, images):
        return self.stem(images).relu() + self.shift


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Dense()


def test_the_sheets_conversion_is_lossless_and_the_classes_come_first():
    """D4: the mean over positions of the head's logits is the head of the pooled features."""
    head = Head(torch.tensor([[1, -1], [0.5, 2], [-1, 0]]), torch.tensor([0.1, -0.2, 0]))
    maps = torch.tensor([[[1.0, 0], [2, 1]], [[0, 3], [1, 0]]])
    by_position = head.logits(maps.flatten(1).T)
    pooled = head.logits(maps.mean((1, 2)))
    assert_allclose(by_position.mean(0), [0.1, 2.3, -1], atol=1e-6)
    assert_allclose(pooled, [0.1, 2.3, -1], atol=1e-6)
    foreground = foreground_head(head)
    assert (foreground.num_classes, foreground.feature_dim) == (2, 2)
    assert_allclose(foreground.logits(maps.mean((1, 2))), [0.1, 2.3], atol=1e-6)
    bank = BackgroundBank(FeatureBank(maps.mean((1, 2))[None], pooled[None])).load()
    assert_array_equal(bank.logits[0], pooled[:2])
    assert bank.background.tolist() == [float(pooled[2])]


def test_the_foreground_classifier_gives_the_first_logits_and_their_gradient(network):
    view = foreground_classifier(network)
    assert (view.num_classes, network.num_classes, view.feature_dim) == (3, 4, 5)
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    logits, expected = view(images), network(images)[:, :3]
    assert_allclose(logits.detach(), expected.detach(), atol=1e-6)
    weights = torch.rand(2, 3)
    gradients = [torch.autograd.grad((out * weights).sum(), images)[0] for out in (logits, expected)]
    assert_allclose(*gradients, atol=1e-6)
    assert_allclose(view.features(images).detach(), network.features(images).detach(), atol=0)
    head, own = foreground_head(Head.of(network)), Head.of(view)
    assert_array_equal(head.weight, own.weight)
    assert_array_equal(head.bias, own.bias)


def test_everything_but_the_head_is_shared(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    view = foreground_classifier(network)
    assert view.stem is network.stem and view.shift is network.shift
    with torch.no_grad():
        view.head.weight.zero_()
    for name, value in network.state_dict().items():
        assert_array_equal(value, before[name])
    assert network.head.out_features == 4 and network(torch.zeros(1, 3, 4, 4)).shape == (1, 4)


def test_the_foreground_classifier_draws_no_random_numbers_and_keeps_the_dtype(network):
    state = torch.get_rng_state()
    view = foreground_classifier(network.double())
    assert torch.equal(torch.get_rng_state(), state)
    assert view.head.weight.dtype == torch.float64 and view.head.weight.isfinite().all()


def test_the_foreground_of_a_densenet():
    """A network of the kit, with nested modules and batch norm."""
    torch.manual_seed(0)
    network = DenseNet(6, depth=10, growth_rate=4).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert_allclose(foreground_classifier(network)(images), network(images)[:, :5], atol=1e-5)
