"""Reading checkpoints: formats, prefixes, head names, and what a wrong file says."""

import collections
import fractions

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from ood_helpers.backbones import (
    CifarResNet18,
    DenseNet,
    MobileNetV2,
    ResNet50,
    WideResNet,
    load_checkpoint,
    weights_fingerprint,
)
from ood_helpers.errors import InputError, MissingDataError


def small(seed: int, num_classes: int = 4) -> DenseNet:
    torch.manual_seed(seed)
    return DenseNet(num_classes, depth=10, growth_rate=4).eval()


@pytest.fixture
def source() -> DenseNet:
    return small(1)


@pytest.fixture
def network() -> DenseNet:
    return small(2)


def renamed(network, head="head", prefix="") -> dict:
    return {
        prefix + (f"{head}.{name.removeprefix('head.')}" if name.startswith("head.") else name): tensor
        for name, tensor in network.state_dict().items()
    }


@pytest.mark.parametrize("head", ["head", "fc", "classifier", "classifier.1", "linear", "output_layer"])
@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.encoder.", "module.encoder.module."])
def test_head_names_and_prefixes(network, source, tmp_path, head, prefix):
    torch.save(renamed(source, head, prefix), tmp_path / "file.pth")
    load_checkpoint(network, tmp_path / "file.pth")
    assert weights_fingerprint(network) == weights_fingerprint(source)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 100, "state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"step": 20, "model": state},
        lambda state: {"net": state, "acc": 94.1},
        lambda state: {"net": "densenet", "model": 3, "state_dict": state},
        collections.OrderedDict,
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_formats(network, source, tmp_path, wrap, legacy):
    path = tmp_path / "file.pth.tar"
    torch.save(wrap(source.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    load_checkpoint(network, path)
    assert weights_fingerprint(network) == weights_fingerprint(source)


def test_safetensors(network, source, tmp_path):
    safetensors.torch.save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_checkpoint(network, str(tmp_path / "weights.safetensors"))
    assert weights_fingerprint(network) == weights_fingerprint(source)


def test_head_that_is_a_1_x_1_convolution(network, source, tmp_path):
    state = source.state_dict()
    state["head.weight"] = state["head.weight"][:, :, None, None]
    torch.save(state, tmp_path / "file.pth")
    load_checkpoint(network, tmp_path / "file.pth")
    assert weights_fingerprint(network) == weights_fingerprint(source)
    state["head.weight"] = state["head.weight"].expand(-1, -1, 3, 3).contiguous()
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(
        InputError, match=rf"1 of another shape: head\.weight \[4, {9 * network.feature_dim}\]"
    ):
        load_checkpoint(network, tmp_path / "file.pth")


def test_num_batches_tracked_may_be_absent(network, source, tmp_path):
    state = {name: value for name, value in source.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(state, tmp_path / "old.pth")
    load_checkpoint(network, tmp_path / "old.pth")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(network(images), source(images))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(torchvision.models.resnet50, ResNet50), (torchvision.models.mobilenet_v2, MobileNetV2)],
)
def test_torchvision_state_dict_from_a_local_file(theirs, ours, tmp_path):
    theirs = theirs(num_classes=6).eval()
    torch.save(theirs.state_dict(), tmp_path / "file.pth")
    network = ours(6).eval()
    load_checkpoint(network, tmp_path / "file.pth")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(network(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "names"),
    [
        (
            WideResNet(10, 16, 2),
            [
                "conv1.weight",
                "block1.layer.0.convShortcut.weight",
                "block3.layer.1.bn2.running_var",
                "bn1.bias",
            ],
        ),
        (
            CifarResNet18(10),
            [
                "conv1.weight",
                "bn1.weight",
                "layer1.0.conv1.weight",
                "layer2.0.shortcut.0.weight",
                "layer4.1.bn2.bias",
                "layer2.0.shortcut.1.running_mean",
            ],
        ),
    ],
    ids=["wide_resnet", "resnet18_cifar"],
)
def test_published_parameter_names(network, names):
    assert set(names) <= network.state_dict().keys()
    assert "layer1.0.shortcut.0.weight" not in network.state_dict()
    assert "block1.layer.1.convShortcut.weight" not in network.state_dict()


def test_mismatch_is_one_sentence_and_changes_nothing(network, source, tmp_path):
    state = renamed(source, "fc")
    del state["conv1.weight"], state["bn1.bias"]
    state["extra.weight"] = torch.zeros(2)
    state["fc.weight"] = torch.zeros(9, network.feature_dim)
    torch.save(state, tmp_path / "file.pth")
    before = weights_fingerprint(network)
    with pytest.raises(InputError) as caught:
        load_checkpoint(network, tmp_path / "file.pth")
    message = str(caught.value)
    assert "2 missing: conv1.weight, bn1.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert (
        f"1 of another shape: head.weight [9, {network.feature_dim}] instead of [4, {network.feature_dim}]"
        in message
    )
    assert "DenseNet with 4 outputs" in message
    assert "\n" not in message
    assert weights_fingerprint(network) == before


def test_long_lists_are_abbreviated(network, tmp_path):
    torch.save(WideResNet(4, depth=16, widen_factor=1).state_dict(), tmp_path / "file.pth")
    with pytest.raises(
        InputError, match=r"missing: .* and \d+ more; \d+ unexpected: .* and \d+ more"
    ) as caught:
        load_checkpoint(network, tmp_path / "file.pth")
    assert len(str(caught.value)) < 1000


def test_two_heads_are_an_error(network, source, tmp_path):
    state = {
        **source.state_dict(),
        "fc.weight": source.head.weight.detach(),
        "fc.bias": source.head.bias.detach(),
    }
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(InputError, match=r"2 unexpected: fc\.weight, fc\.bias"):
        load_checkpoint(network, tmp_path / "file.pth")


@pytest.mark.parametrize("name", ["file.pth", "file.pth.tar", "file.safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_truncated_file(network, source, tmp_path, name, part):
    path = tmp_path / name
    save = safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save
    save(source.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    before = weights_fingerprint(network)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(network, path)
    assert weights_fingerprint(network) == before


@pytest.mark.parametrize("content", [b"<html>404 Not Found</html>", b"\x89PNG\r\n", b"\x00" * 64])
def test_not_a_checkpoint(network, tmp_path, content):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(network, tmp_path / "file.pth")


def test_folder_instead_of_a_file(network, tmp_path):
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(network, tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, "the keys epoch, weights"),
        ({}, "a dict"),
        (torch.ones(3), "a Tensor"),
        ([torch.ones(3)], "a list"),
    ],
)
def test_file_without_a_state_dict(network, tmp_path, content, found):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(InputError, match=f"holds {found}, expected a state_dict"):
        load_checkpoint(network, tmp_path / "file.pth")


def test_missing_file(network, tmp_path):
    with pytest.raises(MissingDataError, match=r"No checkpoint .*nowhere\.pth; put the file there"):
        load_checkpoint(network, tmp_path / "nowhere.pth")


class RunsCode:
    ran = False

    @classmethod
    def run(cls):
        cls.ran = True

    def __reduce__(self):
        return RunsCode.run, ()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("item", [RunsCode(), fractions.Fraction(1, 2)])
def test_pickle_with_code_is_refused(network, source, tmp_path, item, legacy):
    content = {"state_dict": source.state_dict(), "item": item}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        InputError, match=r"holds a Python object .* could run code; save its state_dict alone"
    ):
        load_checkpoint(network, tmp_path / "file.pth")
    assert not RunsCode.ran


def test_fingerprint_ignores_layout_and_sees_every_change(source):
    before = weights_fingerprint(source)
    assert weights_fingerprint(source.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        source.bn1.running_var[0] += 1e-6
    assert weights_fingerprint(source) != before
    assert weights_fingerprint(source.half()) != weights_fingerprint(small(1))


def test_published_densenet_on_cifar10(shared):
    path = shared / "checkpoints" / "cifar10_densenet101_dice.pth.tar"
    published = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    network = DenseNet(10).eval()
    assert [name.replace("head.", "fc.") for name in network.state_dict()] == list(published)
    load_checkpoint(network, path)
    assert torch.equal(network.block3.layer[15].conv2.weight, published["block3.layer.15.conv2.weight"])

    with np.load(shared / "data" / "cifar10" / "test.npz") as file:
        images, labels = torch.from_numpy(file["images"][:256]), torch.from_numpy(file["labels"][:256])
    mean, std = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]])
    inputs = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    network.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        predicted = torch.cat([network(batch).argmax(dim=1) for batch in inputs.split(64)])
    assert int((predicted == labels).sum()) == 243  # 94.92 %; 94.10 % on all 1,017 images
