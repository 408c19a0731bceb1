"""Class activation maps and pseudo masks, against a plain implementation that goes image by image and class by class."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from scipy.ndimage import gaussian_filter
from torch import nn

from ood_helpers import cam
from ood_helpers.backbones import BiT, Classifier, DenseNet, build, load_checkpoint
from ood_helpers.backbones.bit import UNITS
from ood_helpers.cam import (
    ClassMaps,
    PseudoMasks,
    StoredMaps,
    class_activation_maps,
    dense_labels,
    maps_key,
    min_max,
    smoothed,
    stored_maps,
)
from ood_helpers.config import BackboneConfig, MasksConfig
from ood_helpers.data import ImageSet, Transform
from ood_helpers.errors import InputError

TRANSFORM = Transform(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
SCALES = (1.0, 0.5, 1.5, 2.0)
CLOSE = {"rtol": 0, "atol": 6e-7}


class Tiny(Classifier):
    """A convolution, pooling and a head; notes the shapes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, padding=1, stride=2)
        self.head = nn.Linear(5, 3)
        self.shapes = []

    def feature_map(self, images):
        self.shapes.append((len(images), *images.shape[2:]))
        return self.convolution(images).relu()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture
def eight_a_shard(monkeypatch):
    monkeypatch.setattr(cam, "SHARD_SIZE", 8)


def image_set(count=21, seed=0, labels=True):
    generator = np.random.default_rng(seed)
    array = generator.integers(0, 256, (count, 8, 6, 3), dtype=np.uint8)
    return ImageSet(
        "made", "made by the test", array=array, labels=generator.integers(0, 3, count) if labels else None
    )


def inputs_of(images):
    return TRANSFORM.normalise(torch.from_numpy(images.array).permute(0, 3, 1, 2))


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
    """Maps, classes, fused maps and masks of class_activation_maps are those of the plain implementation."""
    classes = None if labels is None else torch.tensor(labels)[:, None]
    maps, predicted = class_activation_maps(network, inputs, scales, classes)
    chosen = predicted if labels is None else torch.tensor(labels)
    result = ClassMaps([values[:, 0] for values in maps], chosen, tuple(inputs.shape[2:]))
    fused, masks = result.fused(), PseudoMasks.of(result).foreground()
    for i, image in enumerate(inputs):
        expected = plain(network, image, scales, None if labels is None else labels[i])
        assert int(predicted[i]) == expected[0]
        for found, wanted in zip(result.maps, expected[1], strict=True):
            tolerance = {"rtol": 1e-4, "atol": atol * float(wanted.max() + 1)}
            torch.testing.assert_close(found[i], wanted.float(), **tolerance)
        np.testing.assert_allclose(fused[i], expected[2], rtol=0, atol=1e-4)
        decided = np.abs(expected[3] - 0.5) > 1e-3  # the others are decided by rounding
        assert decided.mean() > 0.9
        np.testing.assert_array_equal(masks[i].numpy()[decided], (expected[3] > 0.5)[decided])
    return result


# ---- the vectors of the specification ---------------------------------------------------------------------


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
    assert maps.tolist() == [[[[2, 0.5], [5, 2.5]], [[0, 5], [0, 5]]]]
    # The mean outputs of the upright image are .625, 1.25 and 0; of the mirrored one class 0 would be the largest.
    assert predicted.tolist() == [1]
    (alone,), _ = class_activation_maps(network, inputs, (1.0,))
    assert torch.equal(alone, maps[:, 1:])


def test_fusing_smoothing_and_mask_of_the_small_example():
    second = [[2.75, 2.5, 2.25, 2], [1.75] * 4, [1.75] * 4, [2, 2.25, 2.5, 2.75]]
    pair = [torch.tensor([[[2, 0.5], [5, 2.5]]]), torch.tensor([second])]
    maps = ClassMaps(pair, torch.tensor([7]), (8, 8))
    fused = maps.fused()
    total = fused[0] * (7.0625 + 1e-5)
    expected = [4.75, 4.6875, 4.375, 3.875, 3.375, 2.875, 2.5625, 2.5]
    torch.testing.assert_close(total[0], torch.tensor(expected), **CLOSE)
    expected = [4.875, 4.875, 4.640625, 4.171875, 3.703125, 3.234375, 3, 3]
    torch.testing.assert_close(total[3], torch.tensor(expected), **CLOSE)
    assert float(total.max()) == pytest.approx(7.0625, abs=1e-6)
    assert float(fused.double().sum()) == pytest.approx(41.345074, abs=5e-6)
    scaled = min_max(smoothed(fused.double(), 4))[0]
    expected = [0.444445, 0.410615, 0.348103, 0.266426, 0.178019, 0.096342, 0.033830, 0]
    torch.testing.assert_close(scaled[0], torch.tensor(expected).double(), **CLOSE)
    expected = [1, 0.966170, 0.903659, 0.821981, 0.733575, 0.651898, 0.589386, 0.555556]
    torch.testing.assert_close(scaled[7], torch.tensor(expected).double(), **CLOSE)
    assert float(scaled.sum()) == pytest.approx(31.898971, abs=5e-6)
    masks = PseudoMasks.of(maps, MasksConfig(sigma=4))
    rows = masks.foreground()[0]
    assert rows.sum(dim=1).tolist() == [0, 0, 2, 3, 5, 6, 8, 8]
    for row in rows:
        assert row.tolist() == sorted(row.tolist(), reverse=True)  # foreground leads
    assert masks.share().tolist() == [0.5]
    assert set(masks.values().flatten().tolist()) == {0, 8}


def square():
    """Ones in rows 4 to 11 and columns 6 to 13 of 32 x 32."""
    maps = torch.zeros(1, 32, 32)
    maps[0, 4:12, 6:14] = 1
    return maps


def test_mask_of_a_square():
    filtered = smoothed(square(), 4)
    assert float(filtered[0, 8, 10]) == pytest.approx(0.463232, abs=6e-7)
    scaled = min_max(filtered)[0]
    for place, expected in {
        (8, 10): 0.998327,
        (4, 6): 0.601873,
        (12, 10): 0.635590,
        (0, 0): 0.092333,
    }.items():
        assert float(scaled[place]) == pytest.approx(expected, abs=6e-7)
    assert divmod(int(scaled.argmax()), 32) == (7, 9)
    foreground = PseudoMasks.of(ClassMaps([square()], torch.tensor([7]), (32, 32)), MasksConfig(sigma=4))
    rows, columns = foreground.foreground()[0].nonzero().T
    assert len(rows) == 106
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (1, 13, 4, 15)
    assert sorted(set(foreground.values().flatten().tolist())) == [0, 8]


def test_kernel_has_33_taps():
    one = torch.zeros(1, 65, 65, dtype=torch.float64)
    one[0, 32, 32] = 1
    line = smoothed(one, 4)[0].sum(dim=0)
    assert line.nonzero()[:, 0].tolist() == list(range(16, 49))
    assert line[31:34].tolist() == pytest.approx([0.096670, 0.099739, 0.096670], abs=6e-7)


def test_labels_of_a_dense_network():
    values = torch.tensor([[0, 1], [8, 10]], dtype=torch.uint8)
    labels = dense_labels(values, 10)
    assert labels.dtype == torch.int64 and labels.tolist() == [[10, 0], [7, 9]]
    for wrong in (11, -1):
        with pytest.raises(InputError, match="expected 0 to 10; check num_classes"):
            dense_labels(torch.tensor([0, wrong]), 10)


@pytest.mark.parametrize("value", [0.0, 1e-7, 0.1, 1 / 3, 123.456])
@pytest.mark.parametrize("sigma", [0, 0.25, 1, 4])
def test_constant_maps_have_no_foreground(value, sigma):
    sides = [2, 3, 5, 7]
    maps = ClassMaps([torch.full((2, side, side), value) for side in sides], torch.tensor([1, 2]), (37, 21))
    masks = PseudoMasks.of(maps, MasksConfig(sigma=sigma))
    assert not masks.foreground().any() and not masks.values().any()
    assert masks.share().tolist() == [0, 0]


def test_any_other_map_has_foreground_which_is_strictly_above_the_threshold():
    maps = torch.zeros(1, 2, 2)
    maps[0] = torch.tensor([[0, 0.5], [0.75, 1]])
    maps = ClassMaps([maps], torch.tensor([0]), (2, 2))
    shares = [
        float(PseudoMasks.of(maps, MasksConfig(sigma=0, threshold=threshold)).share())
        for threshold in (0, 0.5, 0.75, 0.999)
    ]
    assert shares == [0.75, 0.5, 0.25, 0.25]
    flat = torch.full((1, 4, 4), 1.0)
    flat[0, 0, 0] = 1.001
    assert PseudoMasks.of(ClassMaps([flat], torch.tensor([0]), (4, 4)), MasksConfig(sigma=0)).share() > 0


# ---- against plain implementations --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (32, 32), (40, 24)])
@pytest.mark.parametrize(
    "sigma", [0.0, 0.05, 0.25, 1, 4]
)  # 0.05 has a radius of 0, 4 one of 16, beyond the image
def test_gaussian(size, sigma):
    maps = torch.rand(3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, radius = smoothed(maps, sigma), int(4 * sigma + 0.5)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) if sigma else 1.0 for i in range(-radius, radius + 1)]
    for image, result in zip(maps.numpy(), found.numpy()):
        theirs = gaussian_filter(image, sigma, mode="reflect") if sigma else image
        np.testing.assert_allclose(result, theirs, atol=1e-12)
        padded = np.pad(image, radius, mode="symmetric")
        window = np.outer(weights, weights) / sum(weights) ** 2
        for row, column in ((0, 0), (size[0] - 1, size[1] // 2)):
            part = padded[row : row + 2 * radius + 1, column : column + 2 * radius + 1]
            assert result[row, column] == pytest.approx((part * window).sum(), abs=1e-12)


def test_min_max():
    maps = torch.tensor([[[1, 3], [2, 5]], [[-2, -1], [0, 0]]], dtype=torch.float64)
    assert min_max(maps).tolist() == [[[0, 0.5], [0.25, 1]], [[0, 0.5], [1, 1]]]


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
        _, predicted = class_activation_maps(network, inputs, scales)
        assert torch.equal(predicted, expected)
        assert len(network.shapes) == len({1.0, *scales})  # an image and its mirror image in one pass
    assert not network.head.weight.grad and not predicted.requires_grad


def test_the_company_of_an_image_does_not_matter(network):
    inputs = inputs_of(image_set())
    together, _ = class_activation_maps(network, inputs, SCALES)
    for i in (0, 7, 20):
        alone, _ = class_activation_maps(network, inputs[i : i + 1], SCALES)
        for one, all_of_them in zip(alone, together):
            torch.testing.assert_close(one[0], all_of_them[i], rtol=1e-5, atol=1e-6)


def test_wrong_classes_and_scales(network):
    inputs = inputs_of(image_set(3))
    for classes in (torch.zeros(3, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"for 3 images, expected \[B, M\]"):
            class_activation_maps(network, inputs, (1.0,), classes)
    with pytest.raises(InputError, match=r"At scale 0.05 the images have 0 x 0 pixels, too few for Tiny"):
        class_activation_maps(network, inputs, (0.05,))
    with pytest.raises(InputError, match=r"At scale 0.25 the images have 2 x 2 pixels, too few for DenseNet"):
        class_activation_maps(DenseNet(3, 10, 4).eval(), torch.zeros(1, 3, 8, 8), (0.25,))


# ---- on disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_stored_maps_are_those_of_true_and_predicted_classes(network, tmp_path, batch_size):
    images = image_set()
    stored = stored_maps(network, images, TRANSFORM, tmp_path, batch_size=batch_size)
    assert len(stored) == 21 and stored.record["size"] == [8, 6]
    inputs = inputs_of(images)
    _, predicted = class_activation_maps(network, inputs, SCALES)
    for label, classes in (("ground_truth", torch.from_numpy(images.labels)), ("predicted", predicted)):
        loaded = stored.load(label)
        expected, _ = class_activation_maps(network, inputs, SCALES, classes[:, None])
        assert loaded.size == (8, 6) and torch.equal(loaded.classes, classes)
        for found, wanted in zip(loaded.maps, expected, strict=True):
            torch.testing.assert_close(found, wanted[:, 0], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="Maps of the guessed classes were asked of made"):
        stored.load("guessed")


def test_batches_of_all_scales_have_as_many_pixels(network, tmp_path):
    stored_maps(network, image_set(), TRANSFORM, tmp_path, batch_size=8)
    largest = {
        shape[1:]: max(n for n, *size in network.shapes if tuple(size) == shape[1:])
        for shape in network.shapes
    }
    assert largest == {(8, 6): 8, (4, 3): 32, (12, 9): 2, (16, 12): 2}


def test_images_without_labels(network, tmp_path):
    stored = stored_maps(network, image_set(labels=False), TRANSFORM, tmp_path, MasksConfig(scales=(2.0,)))
    loaded = stored.load("predicted")
    expected, predicted = class_activation_maps(network, inputs_of(image_set()), (2.0,))
    torch.testing.assert_close(loaded.maps[0], expected[0][:, 0], rtol=1e-5, atol=1e-6)
    assert torch.equal(loaded.classes, predicted)
    with pytest.raises(
        InputError,
        match="Maps of the ground_truth classes were asked of made, which has those of the predicted",
    ):
        stored.load("ground_truth")


def test_an_interrupted_pass_goes_on_at_the_next_shard_with_the_same_numbers(
    network, tmp_path, eight_a_shard
):
    class Interrupted(Tiny):
        def feature_map(self, inputs):
            if sum(n for n, height, _ in self.shapes if height == 8) > 2 * 8:
                raise KeyboardInterrupt
            return super().feature_map(inputs)

    broken = Interrupted()
    broken.load_state_dict(network.state_dict())
    options = {"config": MasksConfig(), "batch_size": 4}
    with pytest.raises(KeyboardInterrupt):
        stored_maps(broken, image_set(), TRANSFORM, tmp_path / "a", **options)
    assert StoredMaps.open(tmp_path / "a") is None
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["shard-00000.safetensors"]
    resumed = stored_maps(network, image_set(), TRANSFORM, tmp_path / "a", **options)
    assert sum(n for n, height, _ in network.shapes if height == 8) == 2 * 13
    whole = stored_maps(network, image_set(), TRANSFORM, tmp_path / "b", **options)
    for label in ("ground_truth", "predicted"):
        found, expected = resumed.load(label), whole.load(label)
        assert torch.equal(found.classes, expected.classes)
        assert all(map(torch.equal, found.maps, expected.maps))
    network.shapes.clear()
    stored_maps(network, image_set(), TRANSFORM, tmp_path / "a", **options)
    assert not network.shapes


def test_damaged_shard_is_named_and_only_it_is_computed_anew(network, tmp_path, eight_a_shard):
    before = stored_maps(network, image_set(), TRANSFORM, tmp_path).load()
    path = tmp_path / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"shard-00001.safetensors is damaged .* delete it and run again"):
        stored_maps(network, image_set(), TRANSFORM, tmp_path)
    path.unlink()
    network.shapes.clear()
    after = stored_maps(network, image_set(), TRANSFORM, tmp_path).load()
    assert sum(n for n, height, _ in network.shapes if height == 8) == 2 * 8
    assert all(map(torch.equal, before.maps, after.maps))


def test_labels_that_are_no_classes_and_nan(network, tmp_path):
    images = image_set()
    images.labels[3] = 3
    with pytest.raises(InputError, match="Labels of made run from 0 to 3, expected 0 to 2"):
        stored_maps(network, images, TRANSFORM, tmp_path)
    with torch.no_grad():
        network.convolution.bias[0] = float("nan")
    with pytest.raises(
        InputError, match=r"NaN or infinite maps for 21 of images 0 to 20 of made \(first: 0\)"
    ):
        stored_maps(network, image_set(), TRANSFORM, tmp_path)
    assert not list(tmp_path.glob("*"))


def test_the_key_changes_with_everything_the_maps_depend_on(network, monkeypatch):
    keys = [maps_key(network, image_set(), TRANSFORM, SCALES)] * 2
    assert keys[1] == maps_key(network, image_set(), TRANSFORM, SCALES)
    keys.append(maps_key(network, image_set(seed=1), TRANSFORM, SCALES))
    keys.append(maps_key(network, image_set(labels=False), TRANSFORM, SCALES))
    keys.append(maps_key(network, image_set(), Transform(mean=(0.5,) * 3, std=(0.25, 0.25, 0.2)), SCALES))
    keys.append(maps_key(network, image_set(), TRANSFORM, (1.0,)))
    keys.append(maps_key(network, image_set(), TRANSFORM, SCALES, "cuda"))
    monkeypatch.setattr(cam, "CAM_VERSION", cam.CAM_VERSION + 1)
    keys.append(maps_key(network, image_set(), TRANSFORM, SCALES))
    with torch.no_grad():
        network.head.bias[0] += 1
    keys.append(maps_key(network, image_set(), TRANSFORM, SCALES))
    assert len(set(keys)) == len(keys) - 1


# ---- packed masks ---------------------------------------------------------------------------------------------


def masks_of(foreground, classes):
    foreground, classes = torch.as_tensor(foreground), torch.as_tensor(classes)
    packed = torch.from_numpy(np.packbits(foreground.flatten(1).numpy(), axis=1))
    return PseudoMasks(packed, classes, tuple(foreground.shape[1:]))


def test_packed_masks_come_back_in_pieces_and_from_disk(tmp_path):
    generator = torch.Generator().manual_seed(0)
    maps = ClassMaps(
        [torch.rand(11, 3, 5, generator=generator)], torch.arange(11) % 4, (7, 9)
    )  # 63 pixels: 8 bytes
    masks = PseudoMasks.of(maps, chunk=4)
    expected = min_max(smoothed(maps.fused(), 7 / 32)) > 0.5
    assert masks.packed.shape == (11, 8)
    assert torch.equal(masks.foreground(), expected)
    assert torch.equal(masks.foreground(torch.tensor([10, 2])), expected[[10, 2]])
    assert torch.equal(maps.fused(torch.tensor([10, 2])), maps.fused()[[10, 2]])
    values = torch.where(expected, maps.classes[:, None, None] + 1, 0)
    assert torch.equal(masks.values(), values) and torch.equal(masks.values(slice(3, 5)), values[3:5])
    torch.testing.assert_close(masks.share(), expected.double().mean(dim=(1, 2)))
    masks.save(tmp_path / "masks.safetensors")
    loaded = PseudoMasks.load(tmp_path / "masks.safetensors")
    assert torch.equal(loaded.packed, masks.packed) and torch.equal(loaded.classes, masks.classes)
    assert loaded.size == (7, 9) and len(loaded) == 11


def test_damaged_files_and_wrong_shapes(tmp_path):
    path = tmp_path / "masks.safetensors"
    masks = masks_of(torch.ones(3, 4, 4, dtype=torch.bool), [0, 1, 2])
    with pytest.raises(InputError, match="holds no pseudo masks"):
        PseudoMasks.load(path)
    masks.save(path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1], b"", content.replace(b"classes", b"klasses")):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"holds no pseudo masks .* delete it and run again"):
            PseudoMasks.load(path)
    path.write_bytes(content.replace(b"[4, 4]", b"[4, 9]"))
    with pytest.raises(InputError, match="for 3 classes and 4 x 9 pixels"):
        PseudoMasks.load(path)


def test_share_per_class():
    foreground = torch.zeros(5, 2, 4, dtype=torch.bool)
    for image, pixels in enumerate((0, 2, 4, 8, 1)):
        foreground[image].view(-1)[:pixels] = True
    table = masks_of(foreground, [0, 0, 0, 3, 0]).share_per_class(5)
    assert table.columns.tolist() == ["class", "images", "mean", "q25", "q75", "empty"]
    assert table["class"].tolist() == [0, 1, 2, 3, 4]
    assert table["images"].tolist() == [4, 0, 0, 1, 0] and table["empty"].tolist() == [1, 0, 0, 0, 0]
    shares = [0, 12.5, 25, 50]
    expected = [np.mean(shares), np.percentile(shares, 25), np.percentile(shares, 75)]
    assert table.loc[0, ["mean", "q25", "q75"]].tolist() == pytest.approx(expected)
    assert table.loc[3, ["mean", "q25", "q75"]].tolist() == [100, 100, 100]
    assert table.loc[[1, 2, 4], ["mean", "q25", "q75"]].isna().all(axis=None)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(network, tmp_path):
    images, stored = image_set(), {}
    for device in ("cpu", "cuda"):
        stored[device] = stored_maps(network, images, TRANSFORM, tmp_path / device, device=device)
    for ours, theirs in zip(stored["cpu"].load().maps, stored["cuda"].load().maps):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    maps = stored["cpu"].load()
    on_cpu, on_cuda = PseudoMasks.of(maps), PseudoMasks.of(maps, device="cuda")
    assert (on_cpu.foreground() != on_cuda.foreground()).double().mean() < 0.01  # pixels at the threshold
