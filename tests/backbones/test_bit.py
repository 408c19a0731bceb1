"""BiT against an implementation of its own from F.conv2d and F.group_norm, through both formats of its checkpoints."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import nn

from ood_helpers.backbones import BiT, load_checkpoint, weights_fingerprint
from ood_helpers.backbones.bit import UNITS
from ood_helpers.config.backbones import BackboneConfig
from ood_helpers.errors import InputError

CLASSES, DEPTH, WIDTH = 6, 17, 0.5  # a small network: D = 1024, groups of one, two, four and more channels
CONV = "standardized_conv2d/kernel"


@pytest.fixture(autouse=True)
def small_depth(monkeypatch):
    monkeypatch.setitem(UNITS, DEPTH, (2, 1, 1, 1))


def small(num_classes: int = CLASSES) -> BiT:
    torch.manual_seed(0)
    return BiT(num_classes, DEPTH, WIDTH).double().eval()


def on_meta(depth: int, width: int = 1) -> BiT:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return BiT(1000, depth, width)


def google_shapes(units, width=1, num_classes=1000) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays of an .npz file; kernels are [h, w, in, out]."""
    channels = int(64 * width)
    shapes = {f"resnet/root_block/{CONV}": (7, 7, 3, channels)}
    for block, count in enumerate(units, start=1):
        inner, outer = int(64 * width) << (block - 1), int(256 * width) << (block - 1)
        for unit in range(1, count + 1):
            prefix = f"resnet/block{block}/unit{unit:02d}"
            if unit == 1:
                shapes[f"{prefix}/a/proj/{CONV}"] = (1, 1, channels, outer)
            for letter, side, given, made in (
                ("a", 1, channels, inner),
                ("b", 3, inner, inner),
                ("c", 1, inner, outer),
            ):
                shapes[f"{prefix}/{letter}/{CONV}"] = (side, side, given, made)
                shapes[f"{prefix}/{letter}/group_norm/gamma"] = (given,)
                shapes[f"{prefix}/{letter}/group_norm/beta"] = (given,)
            channels = outer
    shapes |= {"resnet/group_norm/gamma": (channels,), "resnet/group_norm/beta": (channels,)}
    shapes |= {"resnet/head/conv2d/kernel": (1, 1, channels, num_classes)}
    return shapes | {"resnet/head/conv2d/bias": (num_classes,)}


def google_weights(num_classes: int = CLASSES) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        name: 0.1 * generator.standard_normal(shape) + (1 if name.endswith("gamma") else 0.03)
        for name, shape in google_shapes(UNITS[DEPTH], WIDTH, num_classes).items()
    }


def mos_name(name: str) -> str:
    """What the code of MOS calls a parameter of Google's."""
    ends = {"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"}
    _, *places, end = name.split("/")
    if places[0].startswith("block"):
        block, unit, letter, *layers = places
        number = "abc".index(letter) + 1
        layer = {CONV.split("/")[0]: f"conv{number}", "group_norm": f"gn{number}", "proj": "downsample"}
        return f"body.{block}.{unit}.{layer[layers[0]]}.{ends[end]}"
    module = {"root_block": "root.conv", "group_norm": "before_head.gn", "head": "head.conv"}
    return f"{module[places[0]]}.{ends[end]}"


def save_npz(path, weights):
    np.savez(path, **weights)


def save_mos(path, weights):
    state = {
        f"module.{mos_name(name)}": torch.from_numpy(
            array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
        )
        for name, array in weights.items()
    }
    groups = [{"lr": 3e-6, "momentum": 0.9, "params": [0]}]
    optim = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": groups}
    torch.save({"step": 20_000, "model": state, "optim": optim}, path)


def plain(weights, units, images, last_stride=2) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and the outputs of root and blocks, of weights with Google's names."""

    def convolve(x, name, stride=1, padding=0):
        kernel = torch.from_numpy(weights[name]).permute(3, 2, 0, 1)
        mean = kernel.mean(dim=(1, 2, 3), keepdim=True)
        variance = (kernel - mean).square().mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (kernel - mean) / (variance + 1e-10).sqrt(), stride=stride, padding=padding)

    def activate(x, name):
        gamma, beta = (torch.from_numpy(weights[f"{name}/group_norm/{which}"]) for which in ("gamma", "beta"))
        return F.relu(F.group_norm(x, 32, gamma, beta, eps=1e-5))

    x = convolve(images, f"resnet/root_block/{CONV}", stride=2, padding=3)
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=2)
    outputs = [x]
    for block, count in enumerate(units, start=1):
        for unit in range(1, count + 1):
            prefix = f"resnet/block{block}/unit{unit:02d}"
            stride = (1, 2, 2, last_stride)[block - 1] if unit == 1 else 1
            activated = activate(x, f"{prefix}/a")
            shortcut = convolve(activated, f"{prefix}/a/proj/{CONV}", stride) if unit == 1 else x
            branch = activate(convolve(activated, f"{prefix}/a/{CONV}"), f"{prefix}/b")
            branch = activate(convolve(branch, f"{prefix}/b/{CONV}", stride, padding=1), f"{prefix}/c")
            x = convolve(branch, f"{prefix}/c/{CONV}") + shortcut
        outputs.append(x)
    features = activate(x, "resnet").mean(dim=(2, 3))
    head = weights["resnet/head/conv2d/kernel"][0, 0], weights["resnet/head/conv2d/bias"]
    return features @ torch.from_numpy(head[0]) + torch.from_numpy(head[1]), outputs


@pytest.mark.parametrize(("name", "save"), [("bit.npz", save_npz), ("bit.pth.tar", save_mos)])
def test_checkpoints_give_the_logits_and_block_outputs_of_a_plain_implementation(name, save, tmp_path):
    weights, network = google_weights(), small()
    save(tmp_path / name, weights)
    load_checkpoint(network, tmp_path / name)
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    outputs = []
    for module in (network.root, network.block1, network.block2, network.block3, network.block4):
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    logits = network(images)
    expected, expected_outputs = plain(weights, UNITS[DEPTH], images)
    # Tight enough to tell an epsilon of 1e-8 in the weight standardisation from 1e-10.
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert [output.shape[1] for output in outputs] == [32, 128, 256, 512, 1024]
    for found, wanted in zip(outputs, expected_outputs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_both_formats_hold_the_same_weights_in_float32(tmp_path):
    weights = {name: array.astype(np.float32) for name, array in google_weights().items()}
    fingerprints = []
    for name, save in (("bit.npz", save_npz), ("bit.pth.tar", save_mos)):
        save(tmp_path / name, weights)
        network = BiT(CLASSES, DEPTH, WIDTH)
        load_checkpoint(network, tmp_path / name)
        fingerprints.append(weights_fingerprint(network))
    assert fingerprints[0] == fingerprints[1]
    np.testing.assert_array_equal(network.head.bias.detach(), weights["resnet/head/conv2d/bias"])


def test_own_state_dict_loads_under_its_own_names(tmp_path):
    source, network = small(), small()
    nn.init.normal_(source.head.weight)
    torch.save(source.state_dict(), tmp_path / "own.pth")
    load_checkpoint(network, tmp_path / "own.pth")
    assert weights_fingerprint(network) == weights_fingerprint(source)


def test_checkpoint_of_a_group_softmax_loads_into_a_head_of_that_size(tmp_path):
    network = small()
    network.head = nn.Linear(network.feature_dim, CLASSES + 2).double()
    save_mos(tmp_path / "group.pth.tar", google_weights(CLASSES + 2))
    load_checkpoint(network, tmp_path / "group.pth.tar")
    kernel = google_weights(CLASSES + 2)["resnet/head/conv2d/kernel"]
    np.testing.assert_array_equal(network.head.weight.detach(), kernel[0, 0].T)


@pytest.mark.parametrize(
    ("depth", "width", "keys"), [(50, 1, 153), (101, 1, 306), (50, 3, 153), (152, 2, 459)]
)
def test_every_published_name_and_shape_has_its_place(depth, width, keys):
    shapes, network = google_shapes(UNITS[depth], width), on_meta(depth, width)
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert len(shapes) == len(own) == keys
    for translated in (
        {network.own_name(name): shape for name, shape in shapes.items()},
        {network.own_name(mos_name(name)): shape for name, shape in shapes.items()},
    ):
        turned = {name: (s[3], s[2], s[0], s[1]) if len(s) == 4 else s for name, s in translated.items()}
        turned["head.weight"] = turned["head.weight"][:2]
        assert turned == own


def test_number_of_parameters_and_spatial_sizes_of_r101x1():
    network = on_meta(101)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    head = sizes["head.weight"] + sizes["head.bias"]
    assert (sum(sizes.values()) - head, head) == (42_492_480, 2_049_000)
    x, shapes = torch.empty(1, 3, 480, 480, device="meta"), []
    for module in (network.root, network.block1, network.block2, network.block3, network.block4):
        x = module(x)
        shapes.append((x.shape[1], x.shape[2]))
    assert shapes == [(64, 120), (256, 120), (512, 60), (1024, 30), (2048, 15)]


@pytest.mark.parametrize(("half_stride", "last"), [(False, 4), (True, 8)])
def test_spatial_sizes_and_parameters_of_r50x1_for_cifar(half_stride, last):
    with torch.device("meta"):
        network = BiT(10, 50, half_stride=half_stride)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    head = sizes["head.weight"] + sizes["head.bias"]
    assert (sum(sizes.values()) - head, head) == (23_500_352, 20_490)
    for classes, numbers in ((11, 22_539), (100, 204_900), (101, 206_949)):
        head = nn.Linear(network.feature_dim, classes, device="meta")
        assert sum(parameter.numel() for parameter in head.parameters()) == numbers
    x, heights = torch.empty(1, 3, 128, 128, device="meta"), []
    for module in (network.root, network.block1, network.block2, network.block3, network.block4):
        x = module(x)
        heights.append(x.shape[2])
    assert heights == [32, 32, 16, 8, last]
    ends = [network.feature_map(torch.empty(1, 3, side, side, device="meta")) for side in (64, 192, 256)]
    assert [tuple(end.shape[2:]) for end in ends] == [(n * last // 4,) * 2 for n in (2, 6, 8)]


def test_half_stride_leaves_out_one_step_and_dilates_nothing(tmp_path):
    weights = google_weights()
    save_npz(tmp_path / "bit.npz", weights)
    network = BiT(CLASSES, DEPTH, WIDTH, half_stride=True).double().eval()
    load_checkpoint(network, tmp_path / "bit.npz")
    images = torch.rand(1, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected, outputs = plain(weights, UNITS[DEPTH], images, last_stride=1)
    assert outputs[-1].shape[2:] == outputs[-2].shape[2:] == (4, 6)
    torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)
    usual = BiT(CLASSES, DEPTH, WIDTH).double()
    usual.load_state_dict(network.state_dict())
    assert weights_fingerprint(usual) != weights_fingerprint(network)  # else one would read the other's bank


def test_settings_of_every_convolution_and_norm():
    modules = list(on_meta(50).modules())
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    norms = [module for module in modules if isinstance(module, nn.GroupNorm)]
    assert {(conv.eps, conv.bias) for conv in convolutions} == {(1e-10, None)}
    assert {(norm.num_groups, norm.eps, norm.affine) for norm in norms} == {(32, 1e-5, True)}
    assert (len(convolutions), len(norms)) == (1 + 16 * 3 + 4, 16 * 3 + 1)


def test_weight_standardisation():
    conv = copy.deepcopy(small().block1.blocks[0].conv1)
    kernel = torch.tensor([[[[1.0, 2], [3, 4]], [[0, -1], [5, 2]]]], dtype=torch.float64)
    conv.weight, conv.out_channels = nn.Parameter(kernel), 1
    one_hot = torch.eye(8, dtype=torch.float64).reshape(8, 2, 2, 2)
    expected = [-0.534522, 0, 0.534522, 1.069045, -1.069045, -1.603567, 1.603567, 0]
    found = conv(one_hot).flatten()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_group_norm_relu_and_pool():
    network = small()
    norm = copy.deepcopy(network.norm)
    norm.num_groups, norm.num_channels = 2, 4
    norm.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
    norm.bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    x = torch.tensor([[1.0, 3], [5, 7], [-2, 0], [2, 4]], dtype=torch.float64).reshape(1, 4, 1, 2)
    expected = torch.tensor([[0, 0], [0.447213, 1.341639], [0, 0], [0.447213, 1.341639]], dtype=torch.float64)
    torch.testing.assert_close(norm(x), expected.reshape(1, 4, 1, 2), rtol=0, atol=1e-6)
    pooled = network.pool(norm(x))
    expected = torch.tensor([[0, 0.894426, 0, 0.894426]], dtype=torch.float64)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)


def test_root_pools_with_zeros_around_the_map():
    root = small().root
    x = -torch.arange(1.0, 17).reshape(1, 1, 4, 4)
    assert root.pool(root.pad(x)).tolist() == [[[[0, 0], [0, -6]]]]
    assert [name for name, _ in root.named_children()] == ["conv", "pad", "pool"]


def test_last_blocks_as_the_code_of_mos_opens_them():
    network = small()
    names = {id(parameter): name for name, parameter in network.named_parameters()}

    def opened(depth):
        return [names[id(parameter)] for parameter in network.last_parameters(depth)]

    body = [name for name in names.values() if not name.startswith(("head.", "root."))]
    norm1 = ("blocks.0.norm1.weight", "blocks.0.norm1.bias")
    assert opened(0) == []
    for depth, first in ((1, "block4"), (2, "block3"), (3, "block2"), (4, "block1")):
        closed = {f"{first}.{name}" for name in norm1}
        assert set(opened(depth)) == {name for name in body if name == "norm" or name >= first} - closed
    assert sorted(opened(-1)) == sorted([*body, "root.conv.weight"])
    with pytest.raises(InputError, match=r"depth 5, expected 0 to 4, the number of blocks of BiT"):
        opened(5)


def test_checkpoint_of_another_depth(tmp_path):
    weights = google_weights()
    weights |= {f"resnet/block4/unit02/a/{CONV}": np.zeros((1, 1, 1024, 256))}
    del weights["resnet/block1/unit02/b/group_norm/beta"]
    save_npz(tmp_path / "bit.npz", weights)
    with pytest.raises(InputError) as caught:
        load_checkpoint(small(), tmp_path / "bit.npz")
    assert "1 missing: block1.blocks.1.norm2.bias; 1 unexpected: block4.blocks.1.conv1.weight" in str(
        caught.value
    )


def test_checkpoint_of_another_width(tmp_path):
    save_npz(tmp_path / "bit.npz", google_weights())
    with pytest.raises(InputError, match=r"root\.conv\.weight \[32, 3, 7, 7\] instead of \[64, 3, 7, 7\]"):
        load_checkpoint(BiT(CLASSES, DEPTH, 1), tmp_path / "bit.npz")


@pytest.mark.parametrize("part", [0.0, 0.4, 0.999])
def test_truncated_npz(part, tmp_path):
    path, network = tmp_path / "bit.npz", small()
    save_npz(path, google_weights())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    before = weights_fingerprint(network)
    with pytest.raises(InputError, match=r"not a readable checkpoint .* fetch it again"):
        load_checkpoint(network, path)
    assert weights_fingerprint(network) == before


def test_npz_with_a_flipped_bit(tmp_path):
    path = tmp_path / "bit.npz"
    save_npz(path, google_weights())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"not a readable checkpoint \(BadZipFile\)"):
        load_checkpoint(small(), path)


def test_npz_with_python_objects_is_refused(tmp_path):
    np.savez(tmp_path / "bit.npz", **google_weights(), notes=np.array([{"author": 1}], dtype=object))
    with pytest.raises(InputError, match=r"holds a Python object \(array\), which is not loaded"):
        load_checkpoint(small(), tmp_path / "bit.npz")


@pytest.mark.parametrize("content", [np.array(["text"]), np.zeros(3, dtype=">f4")])
def test_npz_with_what_is_no_tensor(content, tmp_path):
    np.savez(tmp_path / "bit.npz", notes=content)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(small(), tmp_path / "bit.npz")


def test_impossible_depth_and_width():
    with pytest.raises(InputError, match="BiT depth 34, expected one of 50, 101, 152"):
        BiT(10, 34)
    config = TypeAdapter(BackboneConfig)
    for wrong in ({"depth": 34}, {"width": 5}, {"width": 0}):
        with pytest.raises(ValidationError):
            config.validate_python({"architecture": "bit", "checkpoint": "x.npz", **wrong})
    default = config.validate_python({"architecture": "bit", "checkpoint": "x.npz"})
    assert (default.depth, default.half_stride) == (101, False)
