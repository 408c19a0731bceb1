"""What every backbone has in common: shapes, sizes, blocks, gradients, memory formats."""

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from ood_helpers.backbones import Classifier, DenseNet, WideResNet, build, weights_fingerprint
from ood_helpers.backbones.wide_resnet import BasicBlock
from ood_helpers.config.backbones import BackboneConfig
from ood_helpers.errors import InputError


def network_of(num_classes=10, **config) -> Classifier:
    config = TypeAdapter(BackboneConfig).validate_python({"checkpoint": "unused", **config})
    torch.manual_seed(0)
    return build(config, num_classes).eval()


SMALL = [
    ({"architecture": "densenet_bc", "depth": 10, "growth_rate": 4}, 32),
    ({"architecture": "wide_resnet", "depth": 10, "widen_factor": 1}, 32),
    ({"architecture": "resnet18_cifar"}, 32),
    ({"architecture": "resnet50"}, 64),
    ({"architecture": "mobilenet_v2"}, 64),
    ({"architecture": "bit", "depth": 50}, 64),
]


@pytest.mark.parametrize("config", [config for config, _ in SMALL], ids=lambda value: value["architecture"])
def test_a_config_knows_the_number_of_blocks(config):
    parsed = TypeAdapter(BackboneConfig).validate_python({"checkpoint": "unused", **config})
    assert parsed.blocks == len(network_of(**config).blocks)


@pytest.mark.parametrize(("config", "side"), SMALL, ids=lambda value: str(value))
def test_forward_is_head_of_pooled_feature_map(config, side):
    network = network_of(7, **config)
    images = torch.randn(2, 3, side, side)
    feature_map = network.feature_map(images)
    features = network.features(images)
    assert isinstance(network.head, nn.Linear)
    assert feature_map.shape[:2] == (2, network.feature_dim)
    assert min(feature_map.shape[2:]) > 1
    torch.testing.assert_close(features, feature_map.mean(dim=(2, 3)))
    torch.testing.assert_close(network(images), features @ network.head.weight.T + network.head.bias)
    assert network(images).shape == (2, network.num_classes) == (2, 7)
    assert (feature_map >= 0).all()


@pytest.mark.parametrize(
    ("config", "num_classes", "feature_dim", "parameters"),
    [
        # Sizes reported with the papers' code for CIFAR-10 and by torchvision for ImageNet.
        ({"architecture": "densenet_bc", "depth": 100, "growth_rate": 12}, 10, 342, 769_162),
        ({"architecture": "wide_resnet", "depth": 40, "widen_factor": 2}, 10, 128, 2_243_546),
        ({"architecture": "wide_resnet", "depth": 40, "widen_factor": 4}, 10, 256, 8_949_210),
        ({"architecture": "resnet18_cifar"}, 10, 512, 11_173_962),
        ({"architecture": "resnet50"}, 1000, 2048, 25_557_032),
        ({"architecture": "mobilenet_v2"}, 1000, 1280, 3_504_872),
        ({"architecture": "bit"}, 1000, 2048, 44_541_480),
    ],
    ids=lambda value: str(value),
)
def test_feature_dim_and_number_of_parameters(config, num_classes, feature_dim, parameters):
    network = network_of(num_classes, **config)
    assert network.feature_dim == feature_dim
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("config", [config for config, _ in SMALL], ids=str)
def test_blocks_have_every_parameter_but_the_heads_once(config):
    network = network_of(**config)
    modules = [network.get_submodule(name) for block in network.blocks for name in block]
    found = [id(parameter) for module in modules for parameter in module.parameters()]
    head = {id(parameter) for parameter in network.head.parameters()}
    expected = [id(parameter) for parameter in network.parameters() if id(parameter) not in head]
    assert sorted(found) == sorted(expected)
    assert [id(parameter) for parameter in network.last_parameters(-1)] == found
    assert network.last_parameters(0) == []


@pytest.mark.parametrize("config", [config for config, _ in SMALL[:-1]], ids=str)
def test_a_block_is_trained_with_those_after_it(config):
    """For BiT, which leaves the first norm of the first one closed, see test_bit."""
    network = network_of(**config)
    expected = []
    for depth, block in enumerate(reversed(network.blocks), start=1):
        expected = [p for name in block for p in network.get_submodule(name).parameters()] + expected
        assert list(map(id, network.last_parameters(depth))) == list(map(id, expected))
    for depth in (len(network.blocks) + 1, -2):
        with pytest.raises(
            InputError, match=rf"depth {depth}, expected 0 to {len(network.blocks)}, the number"
        ):
            network.last_parameters(depth)


@pytest.mark.parametrize(
    ("config", "opened"),
    [
        (SMALL[0][0], ["block3", "bn1", "trans2"]),
        (SMALL[1][0], ["block3", "bn1"]),
        (SMALL[2][0], ["layer4"]),
        (SMALL[3][0], ["layer4"]),
    ],
    ids=lambda value: str(value),
)
def test_the_last_block(config, opened):
    network = network_of(**config)
    last = {id(parameter) for parameter in network.last_parameters(1)}
    assert sorted({name.split(".")[0] for name, p in network.named_parameters() if id(p) in last}) == opened


@pytest.mark.parametrize("depth", [10, 16, 22, 40])
def test_densenet_of_any_depth(depth):
    network = DenseNet(3, depth=depth, growth_rate=6).eval()
    assert network(torch.randn(1, 3, 16, 16)).shape == (1, 3)
    assert network.feature_map(torch.randn(1, 3, 16, 16)).shape[2:] == (4, 4)


@pytest.mark.parametrize("network", [DenseNet, WideResNet])
@pytest.mark.parametrize("depth", [4, 12, 101])
def test_impossible_depth(network, depth):
    with pytest.raises(InputError, match=rf"depth {depth}, expected 6 n \+ 4"):
        network(10, depth=depth)


@pytest.mark.parametrize("architecture", ["densenet_bc", "wide_resnet"])
def test_dropout_acts_in_training_only(architecture):
    config = {"architecture": architecture, "depth": 10}
    plain, dropping = network_of(**config), network_of(**config, dropout=0.5)
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(plain(images), dropping(images))
    assert torch.equal(dropping(images), dropping(images))
    dropping.train()
    assert not torch.equal(dropping(images), dropping(images))


@pytest.mark.parametrize("config", [config for config, _ in SMALL[:3]], ids=str)
def test_gradient_reaches_images_and_all_parameters(config):
    network = network_of(**config)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    network(images).logsumexp(dim=1).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_channels_last_gives_the_same_logits():
    network = network_of(architecture="densenet_bc", depth=22)
    images = torch.randn(2, 3, 32, 32)
    expected = network(images)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        network(images.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5
    )


def test_wide_resnet_shortcut_is_the_input_or_a_projection_of_the_activated_input():
    x = torch.randn(2, 4, 8, 8)
    same, wider = BasicBlock(4, 4, 1, 0.0).eval(), BasicBlock(4, 8, 2, 0.0).eval()
    for block in (same, wider):
        nn.init.zeros_(block.conv2.weight)
    assert torch.equal(same(x), x)
    # A fresh batch norm in eval mode only divides by sqrt(1 + eps).
    torch.testing.assert_close(wider(x), wider.convShortcut(torch.relu(x)), rtol=1e-4, atol=1e-5)


def test_build_depends_on_the_seed_alone():
    config = {"architecture": "densenet_bc", "depth": 10}
    first = weights_fingerprint(network_of(**config))
    assert weights_fingerprint(network_of(**config)) == first
    torch.manual_seed(1)
    assert weights_fingerprint(DenseNet(10, depth=10)) != first
