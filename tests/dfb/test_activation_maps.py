"""Class activation maps, against a plain implementation that goes image by image and class by class, and on disk."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from map_examples import SCALES, TRANSFORM, Tiny, image_set, inputs_of, tiny_network
from pydantic import TypeAdapter
from scipy.ndimage import gaussian_filter
from torch import nn

from ood_helpers.backbones import BiT, Classifier, DenseNet, build, load_checkpoint
from ood_helpers.backbones.bit import UNITS
from ood_helpers.config.backbones import BackboneConfig
from ood_helpers.data import Transform
from ood_helpers.dfb import activation_maps
from ood_helpers.dfb.activation_maps import ClassMaps, class_activation_maps, maps_entry, stored_maps
from ood_helpers.dfb.pseudo_masks import PseudoMasks
from ood_helpers.errors import InputError
from ood_helpers.storage import Shards, Store


@pytest.fixture
def network():
    return tiny_network()


@pytest.fixture
def eight_per_shard(monkeypatch):
    monkeypatch.setattr(activation_maps, "SHARD_SIZE", 8)


def maps_of(network, inputs, scales, labels=None):
    """The maps at each scale of given classes, by default of the predicted ones alone, and the predicted classes."""
    classes = torch.empty(len(inputs), 0, dtype=torch.int64) if labels is None else labels[:, None]
    maps, predicted = class_activation_maps(network, inputs, scales, classes)
    return [of_scale[:, 0] for of_scale in maps], predicted


def plain(network, image, scales, label=None):
    """Predicted class, merged maps of the class at each scale, fused map and mask of one image [3, H, W], with the maps of
    all classes computed and enlarged."""
    size, merged, enlarged = list(image.shape[1:]), [], []
    weight, bias = network.head.weight[:, :, None, None], network.head.bias
    with torch.no_grad():
        predicted = int(network(image[None]).argmax())
        chosen = predicted if label is None else label
        for scale in scales:
            scaled = F.interpolate(
                image[None], [round(side * scale) for side in size], mode="bicubic", align_corners=False
            )
            upright = F.conv2d(network.feature_map(scaled), weight, bias).relu()
            mirrored = F.conv2d(network.feature_map(scaled.flip(3)), weight, bias).relu()
            merged.append(upright + mirrored.flip(3))
            enlarged.append(F.interpolate(merged[-1], size, mode="bilinear", align_corners=False))
    fused = sum(enlarged)[0, chosen].numpy()
    fused = fused / (fused.max() + 1e-5)
    value = gaussian_filter(fused, size[0] / 32, mode="reflect", truncate=4)
    value = value - value.min()
    value = value / value.max() if value.max() > 0 else value
    return predicted, [maps[0, chosen] for maps in merged], fused, value


def assert_plain(network, inputs, scales, labels=None, atol=1e-5):
    """Maps, classes, fused maps and masks are those of the plain implementation."""
    labels = None if labels is None else torch.tensor(labels)
    maps, predicted = maps_of(network, inputs, scales, labels)
    result = ClassMaps(maps, predicted if labels is None else labels, tuple(inputs.shape[2:]))
    fused, masks = result.fused(), PseudoMasks.of(result).foreground()
    for i, image in enumerate(inputs):
        expected = plain(network, image, scales, None if labels is None else int(labels[i]))
        assert int(predicted[i]) == expected[0]
        for found, wanted in zip(result.maps, expected[1], strict=True):
            tolerance = {"rtol": 1e-4, "atol": atol * float(wanted.max() + 1)}
            torch.testing.assert_close(found[i], wanted.float(), **tolerance)
        np.testing.assert_allclose(fused[i], expected[2], rtol=0, atol=1e-4)
        decided = np.abs(expected[3] - 0.5) > 1e-3  # the others are decided by rounding
        assert decided.mean() > 0.9
        np.testing.assert_array_equal(masks[i].numpy()[decided], (expected[3] > 0.5)[decided])
    return result


class Given(Classifier):
    """Returns given outputs of the head: channel c of the input is that of class c."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(3))
            self.head.bias.zero_()

    def feature_map(self, images):
        # The mirrored image gives what was seen of it, not the mirrored map.
        return torch.stack([self.outputs[int(image.argmax() % 2)] for image in images])


def test_merging_of_the_small_example():
    network = Given()
    image = torch.tensor([[[1, -2], [3, 0.5]], [[0, 4], [-1, 2]], [[0, 0], [0, 0]]])
    mirrored = torch.tensor([[[0.5, 1], [2, 2]], [[1, 0], [3, -3]], [[0, 0], [0, 0]]])
    network.outputs = [image, mirrored]
    inputs = torch.zeros(1, 3, 2, 2)
    inputs[..., 0] = 1  # the largest pixel is in an even place, and in an odd one when mirrored
    (maps,), predicted = class_activation_maps(network, inputs, (1.0,), torch.tensor([[0, 1]]))
    assert maps[:, :2].tolist() == [[[[2, 0.5], [5, 2.5]], [[0, 5], [0, 5]]]]
    # The mean outputs of the upright image are .625, 1.25 and 0; of the mirrored one class 0 would be the largest.
    assert predicted.tolist() == [1]
    assert torch.equal(maps[:, 2], maps[:, 1])  # the last is that of the predicted class
    (alone,), _ = class_activation_maps(network, inputs, (1.0,), torch.empty(1, 0, dtype=torch.int64))
    assert torch.equal(alone, maps[:, 2:])


def test_fusing_of_the_small_example():
    second = [[2.75, 2.5, 2.25, 2], [1.75] * 4, [1.75] * 4, [2, 2.25, 2.5, 2.75]]
    pair = [torch.tensor([[[2, 0.5], [5, 2.5]]]), torch.tensor([second])]
    fused = ClassMaps(pair, torch.tensor([7]), (8, 8)).fused()
    total = fused[0] * (7.0625 + 1e-5)
    expected = [4.75, 4.6875, 4.375, 3.875, 3.375, 2.875, 2.5625, 2.5]
    torch.testing.assert_close(total[0], torch.tensor(expected), rtol=0, atol=6e-7)
    expected = [4.875, 4.875, 4.640625, 4.171875, 3.703125, 3.234375, 3, 3]
    torch.testing.assert_close(total[3], torch.tensor(expected), rtol=0, atol=6e-7)
    assert float(total.max()) == pytest.approx(7.0625, abs=1e-6)
    assert float(fused.double().sum()) == pytest.approx(41.345074, abs=5e-6)


def test_some_rows_of_the_fused_maps():
    generator = torch.Generator().manual_seed(0)
    maps = ClassMaps([torch.rand(11, 3, 5, generator=generator)], torch.arange(11) % 4, (7, 9))
    assert torch.equal(maps.fused(torch.tensor([10, 2])), maps.fused()[[10, 2]])


# ---- against plain implementations --------------------------------------------------------------------------


BACKBONES = [
    ({"architecture": "densenet_bc", "depth": 10, "growth_rate": 4}, 16),
    ({"architecture": "wide_resnet", "depth": 10, "widen_factor": 1}, 16),
    ({"architecture": "resnet18_cifar"}, 16),
    ({"architecture": "mobilenet_v2"}, 32),
]


@pytest.mark.parametrize(("config", "side"), BACKBONES, ids=lambda value: str(value))
def test_maps_and_masks_of_backbones(config, side):
    torch.manual_seed(0)
    config = TypeAdapter(BackboneConfig).validate_python({"checkpoint": "unused", **config})
    network = build(config, 7).eval().double()
    inputs = torch.randn(2, 3, side, side, dtype=torch.float64)
    with torch.no_grad():  # contrast, which fresh weights lack
        nn.init.normal_(network.head.weight, std=1 / float(network.feature_map(inputs).std()))
    nn.init.normal_(network.head.bias)
    assert_plain(network, inputs, SCALES, atol=1e-6)
    assert_plain(network, inputs, (1.5, 0.5), labels=[6, 2], atol=1e-6)


def test_maps_and_masks_of_bit(monkeypatch):
    monkeypatch.setitem(UNITS, 17, (2, 1, 1, 1))
    torch.manual_seed(0)
    network = BiT(5, 17, 0.5).eval().double()
    result = assert_plain(network, torch.randn(1, 3, 128, 128).double(), SCALES, atol=1e-6)
    assert [tuple(maps.shape[1:]) for maps in result.maps] == [(4, 4), (2, 2), (6, 6), (8, 8)]


def test_images_that_are_not_square(network):
    result = assert_plain(network, inputs_of(image_set(4)), (0.5, 1.0, 1.5))
    assert [tuple(maps.shape[1:]) for maps in result.maps] == [(2, 2), (4, 3), (6, 5)]


def test_prediction_is_that_of_the_images_own_size(network):
    inputs = inputs_of(image_set())
    with torch.no_grad():
        expected = network(inputs).argmax(dim=1)
    for scales in ((2.0,), (0.5, 1.0), (1.0,)):
        network.shapes.clear()
        _, predicted = maps_of(network, inputs, scales)
        assert torch.equal(predicted, expected)
        assert len(network.shapes) == len({1.0, *scales})  # an image and its mirror image in one pass
    assert not network.head.weight.grad and not predicted.requires_grad


def test_the_company_of_an_image_does_not_matter(network):
    inputs = inputs_of(image_set())
    together, _ = maps_of(network, inputs, SCALES)
    for i in (0, 7, 20):
        alone, _ = maps_of(network, inputs[i : i + 1], SCALES)
        for one, all_of_them in zip(alone, together):
            torch.testing.assert_close(one[0], all_of_them[i], rtol=1e-5, atol=1e-6)


def test_wrong_classes_and_scales(network):
    inputs = inputs_of(image_set(3))
    for classes in (torch.zeros(3, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"for 3 images, expected \[B, M\]"):
            class_activation_maps(network, inputs, (1.0,), classes)
    with pytest.raises(InputError, match=r"At scale 0.05 the images have 0 x 0 pixels, too few for Tiny"):
        maps_of(network, inputs, (0.05,))
    with pytest.raises(InputError, match=r"At scale 0.25 the images have 2 x 2 pixels, too few for DenseNet"):
        maps_of(DenseNet(3, 10, 4).eval(), torch.zeros(1, 3, 8, 8), (0.25,))


# ---- on disk ------------------------------------------------------------------------------------------------


def kept(network, folder, images=None, scales=SCALES, **options):
    """The maps of some images, passed once and kept in a folder."""
    images = image_set() if images is None else images
    return stored_maps(network, images, TRANSFORM, Store(folder), scales, **options)


def images_passed(network):
    """How many images the network has seen at scale 1, mirrored ones counted."""
    return sum(count for count, height, _ in network.shapes if height == 8)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_stored_maps_are_those_of_true_and_predicted_classes(network, tmp_path, batch_size):
    images = image_set()
    stored = kept(network, tmp_path, images, batch_size=batch_size)
    inputs = inputs_of(images)
    _, predicted = maps_of(network, inputs, SCALES)
    for label, classes in (("ground_truth", torch.from_numpy(images.labels)), ("predicted", predicted)):
        loaded = stored.load(label)
        expected, _ = maps_of(network, inputs, SCALES, classes)
        assert len(loaded) == 21 and loaded.size == (8, 6) and torch.equal(loaded.classes, classes)
        for found, wanted in zip(loaded.maps, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="maps of the guessed classes of made"):
        stored.load("guessed")


def test_batches_of_all_scales_have_as_many_pixels(network, tmp_path):
    kept(network, tmp_path, batch_size=8)
    largest = {
        shape[1:]: max(n for n, *size in network.shapes if tuple(size) == shape[1:])
        for shape in network.shapes
    }
    assert largest == {(8, 6): 8, (4, 3): 32, (12, 9): 2, (16, 12): 2}


def test_images_without_labels(network, tmp_path):
    stored = kept(network, tmp_path, image_set(labels=False), (2.0,))
    loaded = stored.load("predicted")
    expected, predicted = maps_of(network, inputs_of(image_set()), (2.0,))
    torch.testing.assert_close(loaded.maps[0], expected[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(loaded.classes, predicted)
    with pytest.raises(
        InputError,
        match="maps of the ground_truth classes of made, which has those of the predicted",
    ):
        stored.load("ground_truth")


def test_an_interrupted_pass_resumes_at_the_next_shard_with_the_same_numbers(
    network, tmp_path, eight_per_shard, monkeypatch
):
    def interrupted(images):
        if images_passed(network) > 2 * 8:
            raise KeyboardInterrupt
        return Tiny.feature_map(network, images)

    with monkeypatch.context() as patched:
        patched.setattr(network, "feature_map", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kept(network, tmp_path / "a", batch_size=4)
    directory = maps_entry(network, image_set(), TRANSFORM, Store(tmp_path / "a"), SCALES).directory
    assert Shards.open(directory) is None
    assert [path.name for path in directory.glob("*.safetensors")] == ["shard-00000.safetensors"]
    network.shapes.clear()
    resumed = kept(network, tmp_path / "a", batch_size=4)
    assert images_passed(network) == 2 * 13
    whole = kept(network, tmp_path / "b", batch_size=4)
    for label in ("ground_truth", "predicted"):
        found, expected = resumed.load(label), whole.load(label)
        assert torch.equal(found.classes, expected.classes)
        assert all(map(torch.equal, found.maps, expected.maps))
    network.shapes.clear()
    kept(network, tmp_path / "a", batch_size=4)
    assert not network.shapes


def test_a_damaged_shard_is_named_and_it_alone_is_computed_again(network, tmp_path, eight_per_shard, capsys):
    before = kept(network, tmp_path).load()
    (path,) = tmp_path.rglob("shard-00001.safetensors")
    path.write_bytes(path.read_bytes()[:200])
    network.shapes.clear()
    after = kept(network, tmp_path).load()
    assert f"{path} is damaged and computed again." in capsys.readouterr().err
    assert images_passed(network) == 2 * 8
    assert all(map(torch.equal, before.maps, after.maps))


def test_labels_that_are_no_classes_and_nan(network, tmp_path):
    images = image_set()
    images.labels[3] = 3
    with pytest.raises(InputError, match="Labels of made run from 0 to 3, expected 0 to 2"):
        kept(network, tmp_path, images)
    with torch.no_grad():
        network.convolution.bias[0] = float("nan")
    with pytest.raises(
        InputError, match=r"NaN or infinite maps for 21 of images 0 to 20 of made \(first: 0\)"
    ):
        kept(network, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_key_changes_with_everything_the_maps_depend_on(network, tmp_path):
    def entry(images=None, transform=TRANSFORM, scales=SCALES, device="cpu"):
        images = image_set() if images is None else images
        return maps_entry(network, images, transform, Store(tmp_path), scales, device)

    first = entry()
    assert entry().name == first.name and "ood_helpers.dfb.activation_maps" in first.key["code"]
    changed = [
        entry(image_set(seed=1)),
        entry(image_set(labels=False)),
        entry(transform=Transform(mean=(0.5,) * 3, std=(0.25, 0.25, 0.2))),
        entry(scales=(1.0,)),
        entry(device="cuda"),
    ]
    with torch.no_grad():
        network.head.bias[0] += 1
    changed.append(entry())
    assert len({found.name for found in (first, *changed)}) == 1 + len(changed)


# ---- real data --------------------------------------------------------------------------------------------------


def test_published_densenet_on_cifar10(shared):
    network = DenseNet(10).eval()
    load_checkpoint(network, shared / "checkpoints" / "cifar10_densenet101_dice.pth.tar")
    with np.load(shared / "data" / "cifar10" / "test.npz") as file:
        images, labels = file["images"][:4], file["labels"][:4]
    transform = Transform(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
    inputs = transform.normalise(torch.from_numpy(images).permute(0, 3, 1, 2))
    result = assert_plain(network, inputs, SCALES, labels=labels.tolist())
    assert [tuple(maps.shape[1:]) for maps in result.maps] == [(8, 8), (4, 4), (12, 12), (16, 16)]
    share = PseudoMasks.of(result).share()
    assert ((share > 0.02) & (share < 0.9)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(network, tmp_path):
    stored = {device: kept(network, tmp_path, device=device) for device in ("cpu", "cuda")}
    for ours, theirs in zip(stored["cpu"].load().maps, stored["cuda"].load().maps):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    maps = stored["cpu"].load()
    on_cpu, on_cuda = PseudoMasks.of(maps), PseudoMasks.of(maps, device="cuda")
    assert (on_cpu.foreground() != on_cuda.foreground()).double().mean() < 0.01  # pixels at the threshold
