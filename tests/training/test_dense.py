"""Dense training: the sheet's vectors, images paired with masks, the head on maps, batches in parts, resuming, errors."""

import copy
import json
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import TRANSFORM, Pictures, assert_interrupted_ends_in_the_same_bytes
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from ood_helpers.backbones import Classifier, DenseNet
from ood_helpers.config import DenseConfig
from ood_helpers.data import Transform
from ood_helpers.errors import InputError
from ood_helpers.foreground import foreground_classifier
from ood_helpers.training import (
    IGNORED,
    confusion,
    dense_logits,
    dense_losses,
    evaluate,
    evaluate_dense,
    fine_tuning,
    on_map,
    segmentation_metrics,
    train_dense,
    train_dense_head,
    zero_head,
)
from ood_helpers.training import dense as module
from ood_helpers.training.fine_tuning import default_schedule, learning_rate_at

CLASSES = 3


@dataclass(frozen=True)
class Masks:
    """What dense training uses of pseudo masks."""

    pixels: Tensor
    classes: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.pixels)

    def foreground(self, rows: Tensor) -> Tensor:
        return self.pixels[rows]


class OwnPixels(Classifier):
    """A network whose feature map is its input."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.head = head

    def feature_map(self, images: Tensor) -> Tensor:
        return images


def config(**settings) -> DenseConfig:
    """In ten steps of 16 images."""
    settings = {
        "schedule": (2, 4, 6, 8, 10),
        "batch_size": 16,
        "learning_rate": 0.05,
        "flip": False,
    } | settings
    return DenseConfig(**settings)


def make_network() -> DenseNet:
    torch.manual_seed(0)
    network = DenseNet(CLASSES, depth=10, growth_rate=4)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
    network.head = zero_head(network.feature_dim, CLASSES + 1, None)
    return network


def make_masks(pictures: Pictures) -> Masks:
    """A rectangle for each image, one more often on the left."""
    rng = np.random.default_rng(len(pictures))
    pixels = torch.zeros(pictures.pixels.shape[:3], dtype=torch.bool)
    for mask in pixels:
        top, left = rng.integers(0, 4, 2)
        mask[top : top + rng.integers(3, 6), left : left + rng.integers(2, 5)] = True
    return Masks(pixels, torch.from_numpy(pictures.labels))


PICTURES, HELD_OUT = Pictures(50, 0), Pictures(20, 1)
MASKS, HELD_OUT_MASKS = make_masks(PICTURES), make_masks(HELD_OUT)
MOSTLY_FOREGROUND = Masks((torch.arange(64) > 5).view(8, 8).expand(50, 8, 8), MASKS.classes)
LONGER = {"schedule": (2, 27, 28, 29, 30), "learning_rate": 0.1}  # the classes are learned


def run(
    directory,
    network=None,
    train=PICTURES,
    masks=MASKS,
    held_out=(None, None),
    transform=TRANSFORM,
    device="cpu",
    **settings,
):
    return train_dense(
        make_network() if network is None else network,
        train,
        held_out[0],
        transform,
        config(**settings),
        masks,
        held_out[1],
        seed=1,
        device=device,
        directory=directory,
    )


def run_head(directory, head, maps, held_out_maps=None, **settings):
    return train_dense_head(
        head,
        maps,
        held_out_maps,
        PICTURES,
        None if held_out_maps is None else HELD_OUT,
        config(inputs="features", depth=0, **settings),
        MASKS,
        None if held_out_maps is None else HELD_OUT_MASKS,
        seed=1,
        device="cpu",
        directory=directory,
    )


def linear(weight, bias) -> nn.Linear:
    weight = torch.tensor(weight, dtype=torch.float64)
    head = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return head.requires_grad_(False)


def random_batch(outputs=4) -> tuple[Tensor, Tensor]:
    """Logits on 2 x 3 positions, targets on 8 x 6 pixels, some of them ignored."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(4, outputs, 2, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(IGNORED, outputs, (4, 8, 6), generator=generator)
    return logits, targets


# ---- the sheet's vectors -----------------------------------------------------------------------------------


def test_learning_rates_of_the_sheet():
    """D1."""
    schedule = default_schedule(50_000)
    rates = {0: 0, 250: 0.0015, 500: 3e-3, 3000: 3e-3, 3001: 3e-4, 6000: 3e-4, 6001: 3e-5, 9000: 3e-5}
    rates |= {9001: 3e-6, 9999: 3e-6}
    for step, rate in rates.items():
        assert learning_rate_at(step, DenseConfig().learning_rate, schedule) == pytest.approx(rate, rel=1e-12)
    assert schedule[-1] == 10_000


def test_mean_of_the_map_is_the_head_on_pooled_features():
    """D4, linearity."""
    maps = torch.tensor([[[[1, 0], [2, 1]], [[0, 3], [1, 0]]]], dtype=torch.float64)
    network = OwnPixels(linear([[1, -1], [0.5, 2], [-1, 0]], [0.1, -0.2, 0]))
    for logits in (on_map(network.head, maps), dense_logits(network, maps)):
        assert logits.mean(dim=(2, 3))[0].tolist() == pytest.approx([0.1, 2.3, -1], abs=1e-12)
    assert network(maps)[0].tolist() == pytest.approx([0.1, 2.3, -1], abs=1e-12)


def test_enlarging_changes_the_mean():
    """D4, upsampling."""
    network = OwnPixels(linear([[1]], [0]))
    maps = torch.tensor([[[[1, 2, 3], [4, 5, 6], [7, 8, 100]]]], dtype=torch.float64)
    assert float(dense_logits(network, maps).mean()) == pytest.approx(15.111111, abs=1e-6)
    assert float(dense_logits(network, maps, (5, 5)).mean()) == pytest.approx(13.19, abs=1e-6)
    assert float(dense_logits(network, maps, (9, 9)).mean()) == pytest.approx(12.021605, abs=1e-6)
    unaligned = F.interpolate(maps, (6, 6), mode="bilinear", align_corners=False)
    assert float(unaligned.mean()) == pytest.approx(15.111111, abs=1e-6)
    assert float(dense_logits(network, maps[..., 1:, 1:], (7, 7)).mean()) == pytest.approx(119 / 4)


def test_loss_of_the_sheet():
    """D4, dense cross-entropy."""
    maps = [[[2, 0], [0, -1]], [[0, 1], [2, 0]], [[-1, 0], [1, 3]]]
    maps = torch.tensor([maps], dtype=torch.float64)
    network = OwnPixels(linear(torch.eye(3).tolist(), [0, 0, 0]))
    rows = [[2, 1.333333, 0.666667, 0], [1.333333, 0.777778, 0.222222, -0.333333]]
    rows += [[0.666667, 0.222222, -0.222222, -0.666667], [0, -0.333333, -0.666667, -1]]
    enlarged = dense_logits(network, maps, (4, 4))[0, 0]
    torch.testing.assert_close(enlarged, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-6)
    targets = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 2, 255], [1, 2, 2, 2]]])
    targets[targets == 255] = IGNORED
    assert dense_losses(maps, targets, DenseConfig()).tolist() == pytest.approx([0.576034], abs=1e-6)
    focal = dense_losses(maps, targets, DenseConfig(loss="focal"))
    assert focal.tolist() == pytest.approx([0.055223], abs=1e-6)
    assert dense_logits(network, maps).mean(dim=(2, 3))[0].tolist() == [0.25, 0.75, 0.75]


# ---- losses and metrics against plain loops ----------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
@pytest.mark.parametrize("weights", [None, (3.0, 0.25)])
@pytest.mark.parametrize("resolution", ["full", "reduced"])
def test_losses_are_those_of_a_plain_loop(loss, weights, resolution):
    logits, targets = random_batch()
    ours = dense_losses(logits, targets, DenseConfig(loss=loss, loss_resolution=resolution), weights)
    height, width = (8, 6) if resolution == "full" else (2, 3)
    for image in range(4):
        losses = []
        for i, j in product(range(height), range(width)):
            if resolution == "full":  # corners of map and image lie on each other
                y, x = i / 7, j * 2 / 5
                left = min(int(x), 1)
                above, below = ((1 - x + left) * row[:, left] + (x - left) * row[:, left + 1]
                                for row in logits[image].unbind(dim=1))  # fmt: skip
                z, target = ((1 - y) * above + y * below).numpy(), int(targets[image, i, j])
            else:  # the pixel right and below of the middle of 4 x 2 pixels
                z, target = logits[image, :, i, j].numpy(), int(targets[image, 4 * i + 2, 2 * j + 1])
            if target != IGNORED:
                factor = 1 if weights is None else weights[int(target == 3)]
                losses.append(factor * (np.log(np.exp(z).sum()) - z[target]))
        expected = np.mean(losses)
        if loss == "focal":
            expected = (1 - np.exp(-expected)) ** 2 * 0.5 * expected
        assert float(ours[image]) == pytest.approx(expected, abs=1e-12)


def test_mean_over_images_is_that_over_pixels_where_none_is_ignored():
    logits, targets = random_batch()
    targets = targets.clamp(min=0)
    enlarged = F.interpolate(logits, (8, 6), mode="bilinear", align_corners=True)
    mean = float(dense_losses(logits, targets, DenseConfig()).mean())
    assert mean == pytest.approx(float(F.cross_entropy(enlarged, targets)), rel=1e-12)


def test_image_of_ignored_pixels_alone_has_loss_and_gradient_zero():
    logits, targets = random_batch()
    targets[1] = IGNORED
    logits.requires_grad_(True)
    for loss in ("cross_entropy", "focal"):
        losses = dense_losses(logits, targets, DenseConfig(loss=loss))
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert losses[1] == 0 and losses[0] > 0 and not gradient[1].any() and gradient.isfinite().all()


def test_segmentation_metrics_are_those_of_a_plain_loop():
    """Class 3 is absent from the targets, but predicted."""
    logits, targets = random_batch(outputs=5)
    targets[targets == 3] = 1
    table = confusion(logits, targets)
    predicted = F.interpolate(logits, (8, 6), mode="bilinear", align_corners=True).argmax(dim=1)
    counted, accuracies, overlaps = targets != IGNORED, [], []
    for a, b in product(range(5), range(5)):
        assert int(table[a, b]) == int(((targets == a) & (predicted == b)).sum())
    assert table[:, 3].sum() > 0 and table.sum() == counted.sum() < targets.numel()
    for label in (0, 1, 2, 4):
        inside, found = targets == label, (predicted == label) & counted
        accuracies.append(100 * float((inside & found).sum() / inside.sum()))
        overlaps.append(100 * float((inside & found).sum() / (inside | found).sum()))
    metrics = segmentation_metrics(table)
    correct = 100 * float((predicted == targets).sum() / counted.sum())
    assert metrics["pixel_accuracy"] == pytest.approx(correct, rel=1e-6)
    assert metrics["mean_class_accuracy"] == pytest.approx(np.mean(accuracies), rel=1e-6)
    assert metrics["miou"] == pytest.approx(np.mean(overlaps), rel=1e-6)


# ---- images and their masks --------------------------------------------------------------------------------


class Encoded(Pictures):
    """Pictures that show their masks: white on grey; black is padding."""

    def __init__(self, masks: Tensor, decoded: bool = False):
        super().__init__(len(masks), 0)
        shown = np.where(masks.numpy()[..., None], 255, 128).astype(np.uint8)
        self.pixels = np.repeat(shown, 3, axis=3)
        self.array = None if decoded else self.pixels


class NearestTransform(Transform):
    """Enlarges images as masks are enlarged, so that the two can be compared pixel by pixel."""

    def geometry(self, image: Image.Image) -> np.ndarray:
        return np.array(image.resize(self.resize[::-1], Image.Resampling.NEAREST))


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_padding": 3},
        {"flip": True},
        {"crop_padding": 2, "flip": True},
        {"resize": [24, 16], "crop_padding": 2, "flip": True},
    ],
)
def test_mask_goes_where_its_image_goes(tmp_path, monkeypatch, settings):
    """What the network sees of an image that shows its mask tells the target of each pixel."""
    pixels = torch.rand(24, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    masks = Masks(pixels, torch.arange(24) % CLASSES)
    transform = NearestTransform(**dict(TRANSFORM) | {"resize": (8, 8)})
    seen, inputs = [], []
    to_network, losses = module.to_network, module.dense_losses

    def watched(images, *arguments):
        inputs.append(images.clone())
        return to_network(images, *arguments)

    def compared(logits, targets, *arguments):
        seen.append(targets)
        return losses(logits, targets, *arguments)

    monkeypatch.setattr(module, "to_network", watched)
    monkeypatch.setattr(module, "dense_losses", compared)
    pictures = Encoded(pixels, decoded="resize" in settings)
    run(tmp_path, None, pictures, masks, transform=transform, depth=0, **settings)
    orders = [np.random.default_rng((1, epoch)).permutation(24) for epoch in range(5)]
    batches = [rows for order in orders for rows in (order[:16], order[16:])]
    assert len(seen) == len(inputs) == 10
    values = set()
    for rows, images, targets in zip(batches, inputs, seen, strict=True):
        assert targets.shape[1:] == (8, 8)
        meaning = {0: torch.full((len(rows),), IGNORED), 128: torch.full((len(rows),), CLASSES)}
        meaning[255] = masks.classes[rows]
        expected = torch.full_like(targets, 99)
        for value, target in meaning.items():
            expected = torch.where(images[..., 0] == value, target[:, None, None], expected)
        assert torch.equal(targets, expected)
        values |= set(targets.unique().tolist())
    assert values == {0, 1, 2, CLASSES} | ({IGNORED} if "crop_padding" in settings else set())


def test_targets_carry_the_classes_of_the_masks(tmp_path):
    """Where the backbone is mistaken, the class of its map is that of the foreground; accuracy is by the true label."""
    wrong = Masks(MOSTLY_FOREGROUND.pixels, (MASKS.classes + 1) % CLASSES)
    network = make_network()
    history = run(tmp_path, network, masks=wrong, held_out=(PICTURES, wrong), **LONGER)
    right = evaluate_dense(network, PICTURES, MOSTLY_FOREGROUND, TRANSFORM, 16, "cpu")
    assert history["validation_pixel_accuracy"].iloc[-1] > 80 > 20 > right["pixel_accuracy"]
    assert history["validation_accuracy"].iloc[-1] == right["accuracy"] < 10
    assert history["train_accuracy"].iloc[-1] < 10


# ---- training ----------------------------------------------------------------------------------------------


def maps_of(network, pictures) -> Tensor:
    inputs = TRANSFORM.normalise(torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2))
    with torch.no_grad():
        return network.eval().feature_map(inputs)


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss": "focal", "balanced": True}, {"loss_resolution": "reduced", "micro_batch_size": 5}],
)
def test_head_on_maps_is_the_head_on_images(tmp_path, settings):
    network = make_network()
    head, micro_batch_size = copy.deepcopy(network.head), settings.pop("micro_batch_size", None)
    maps = [lambda: maps_of(network, PICTURES), lambda: maps_of(network, HELD_OUT)]
    held_out = (HELD_OUT, HELD_OUT_MASKS)
    on_images = run(
        tmp_path / "images",
        network,
        held_out=held_out,
        depth=0,
        micro_batch_size=micro_batch_size,
        **settings,
    )
    on_maps = run_head(tmp_path / "maps", head, *maps, **settings)
    torch.testing.assert_close(head.weight, network.head.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.bias, network.head.bias, rtol=1e-4, atol=1e-5)
    assert list(on_maps) == list(on_images) and head.weight.abs().max() > 0
    for column in on_images:
        assert on_maps[column].tolist() == pytest.approx(on_images[column].tolist(), rel=1e-3), column
    assert on_maps["train_loss"].iloc[-1] < on_maps["train_loss"].iloc[0]


def test_first_loss_is_that_of_a_head_of_zeros_and_the_last_row_that_of_evaluate_dense(tmp_path):
    network, held_out = make_network(), (HELD_OUT, HELD_OUT_MASKS)
    history = run(tmp_path, network, held_out=held_out, loss="focal", balanced=True)
    share = float(MASKS.pixels.float().mean())
    first = np.random.default_rng((1, 0)).permutation(50)[:16]
    shares = MASKS.pixels[first].float().mean(dim=(1, 2)).numpy()
    losses = np.log(CLASSES + 1) * 0.5 * (shares / share + (1 - shares) / (1 - share))
    expected = np.mean((1 - np.exp(-losses)) ** 2 * 0.5 * losses)
    assert history["train_loss"].iloc[0] == pytest.approx(expected, rel=1e-5)
    weights = (0.5 / share, 0.5 / (1 - share))
    last = evaluate_dense(
        network, HELD_OUT, HELD_OUT_MASKS, TRANSFORM, 7, "cpu", config(loss="focal", balanced=True), weights
    )
    assert set(last) == {"loss", "pixel_accuracy", "mean_class_accuracy", "miou", "accuracy"}
    for name, value in last.items():
        assert history[f"validation_{name}"].iloc[-1] == pytest.approx(value, rel=1e-5)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_accuracy_is_that_of_the_classifier_of_pooled_features(tmp_path):
    network = make_network()
    run(tmp_path, network, masks=MOSTLY_FOREGROUND, **LONGER)
    network.head.bias.data[-1] += 100  # the background has no say in it
    pooled = evaluate(foreground_classifier(network), HELD_OUT, TRANSFORM, 16, "cpu")["accuracy"]
    ours = evaluate_dense(network, HELD_OUT, HELD_OUT_MASKS, TRANSFORM, 6, "cpu")["accuracy"]
    assert ours == pooled > 80


def test_metadata_hold_the_index_of_the_background(tmp_path):
    run(tmp_path, depth=0)
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["training"])["background_index"] == CLASSES


def test_a_finished_training_reads_no_maps_and_no_masks(tmp_path, monkeypatch):
    head, network = zero_head(make_network().feature_dim, CLASSES + 1, None), make_network()
    run_head(tmp_path, head, lambda: maps_of(network, PICTURES), balanced=True)
    again = zero_head(network.feature_dim, CLASSES + 1, None)
    monkeypatch.setattr(Masks, "foreground", lambda *_: pytest.fail("masks were read"))
    run_head(tmp_path, again, lambda: pytest.fail("maps were read"), balanced=True)
    assert torch.equal(again.weight, head.weight) and again.weight.abs().max() > 0


def test_batches_in_parts_end_in_the_same_weights(tmp_path):
    networks, histories = [make_network(), make_network()], []
    settings = {"mixup": 0.5, "crop_padding": 3, "flip": True, "balanced": True, "depth": 1}
    for name, network, size in zip("ab", networks, [None, 5]):
        histories.append(run(tmp_path / name, network, micro_batch_size=size, **settings))
    assert networks[0].head.weight.abs().max() > 0
    for ours, theirs in zip(*(network.parameters() for network in networks)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    for column in ("train_loss", "train_pixel_accuracy", "train_accuracy"):
        assert histories[1][column].tolist() == pytest.approx(histories[0][column].tolist(), rel=1e-4)


def test_mixup_takes_targets_and_inputs_of_the_same_partners():
    inputs, targets = torch.arange(8.0)[:, None], torch.arange(8)[:, None, None].expand(8, 2, 3)
    mixed, own, partners, shares = fine_tuning.mixup(inputs, targets, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(own, targets) and not torch.equal(partners, own)
    expected = shares * own[:, 0, 0] + (1 - shares) * partners[:, 0, 0]
    torch.testing.assert_close(mixed[:, 0], expected)


def test_mixup_weighs_the_losses_of_both_masks(tmp_path, monkeypatch):
    """Five steps of plain gradient descent by hand, on mixed maps."""
    network, mixed_batches, mixup = make_network(), [], fine_tuning.mixup

    def watched(*arguments):
        mixed_batches.append(mixup(*arguments))
        return mixed_batches[-1]

    monkeypatch.setattr(fine_tuning, "mixup", watched)
    maps, head = maps_of(network, PICTURES), zero_head(network.feature_dim, CLASSES + 1, None)
    plain = copy.deepcopy(head)
    settings = {"mixup": 1.0, "momentum": 0.0, "schedule": (1, 2, 3, 4, 5)}
    history = run_head(tmp_path, head, lambda: maps, **settings)
    targets = torch.where(MASKS.pixels, MASKS.classes[:, None, None], CLASSES)
    order = [row for epoch in range(2) for row in np.random.default_rng((1, epoch)).permutation(50)]
    batches = [order[:16], order[16:32], order[32:48], order[48:50], order[50:66]]
    for step, (rows, (mixed, own, partners, shares)) in enumerate(zip(batches, mixed_batches, strict=True)):
        assert torch.equal(own, targets[rows])
        share = float(shares[0])
        logits = F.interpolate(
            F.conv2d(mixed, plain.weight[..., None, None], plain.bias),
            (8, 8),
            mode="bilinear",
            align_corners=True,
        )
        loss = share * F.cross_entropy(logits, own) + (1 - share) * F.cross_entropy(logits, partners)
        assert history["train_loss"][step] == pytest.approx(float(loss.detach()), rel=1e-5)
        plain.zero_grad()
        loss.backward()
        rate = 0.0 if step == 0 else 0.05 * 0.1 ** max(0, step - 2)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= rate * parameter.grad
    torch.testing.assert_close(head.weight, plain.weight, rtol=1e-4, atol=1e-6)


def test_interrupted_training_ends_in_the_same_bytes(tmp_path, monkeypatch):
    settings = {"mixup": 0.5, "depth": 1, "flip": True, "crop_padding": 1, "balanced": True}
    settings |= {"held_out": (HELD_OUT, HELD_OUT_MASKS)}
    assert_interrupted_ends_in_the_same_bytes(
        lambda folder: run(folder, **settings), module, "evaluate_dense", tmp_path, monkeypatch
    )


# ---- errors ------------------------------------------------------------------------------------------------


def with_labels(labels) -> Pictures:
    pictures = Pictures(50, 0)
    pictures.labels = labels
    return pictures


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": with_labels(None)}, "pictures has no labels"),
        ({"train": with_labels(np.arange(50) % 4)}, "labels 0 to 3, expected 0 to 2"),
        (
            {"masks": Masks(MASKS.pixels, MASKS.classes + 1)},
            "masks of pictures have classes 1 to 3, expected 0 to 2",
        ),
        ({"masks": Masks(MASKS.pixels[:49], MASKS.classes[:49])}, "49 masks for the 50 images of pictures"),
        ({"masks": Masks(MASKS.pixels[:, 1:], MASKS.classes)}, "are 7 x 8 pixels, expected 8 x 8"),
        ({"held_out": (HELD_OUT, None)}, "validation images without masks, expected both"),
        ({"held_out": (None, MASKS)}, "masks without validation images, expected both"),
        ({"held_out": (HELD_OUT, MASKS)}, "50 masks for the 20 images"),
        (
            {"masks": Masks(MASKS.pixels & False, MASKS.classes), "balanced": True},
            "foreground in 0 % of all pixels",
        ),
        ({"depth": 4}, "depth 4, expected 0 to 3"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, **changes)


@pytest.mark.parametrize(
    ("geometry", "decoded", "fits"),
    [
        ({"resize": 8, "crop": 8}, False, True),
        ({"crop": 8}, False, True),
        ({"resize": (8, 8)}, True, True),
        ({"resize": (8, 8), "crop": 8}, True, True),
        ({"resize": (10, 10), "crop": 8}, True, False),
        ({"resize": 9, "crop": 8}, False, False),
        ({"resize": 8, "crop": 8}, True, False),  # files may have any aspect ratio
    ],
)
def test_resize_needs_a_transform_that_shows_whole_images(tmp_path, geometry, decoded, fits):
    transform = Transform(**dict(TRANSFORM) | geometry)
    settings = {"train": Pictures(50, 0, decoded), "transform": transform, "resize": [10, 12], "depth": 0}
    if fits:
        assert len(run(tmp_path, **settings)) == 10
    else:
        with pytest.raises(
            InputError, match=r"resize \[10, 12\] for training but a transform that may show only a part"
        ):
            run(tmp_path, **settings)


def test_another_number_of_maps_is_refused(tmp_path):
    network = make_network()
    with pytest.raises(InputError, match="49 feature maps for the 50 images of pictures"):
        run_head(tmp_path, network.head, lambda: maps_of(network, PICTURES)[:49])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_trains_as_the_cpu_does(tmp_path):
    held_out = (HELD_OUT, HELD_OUT_MASKS)
    histories = [run(tmp_path / device, device=device, held_out=held_out) for device in ("cpu", "cuda")]
    torch.testing.assert_close(*(Tensor(history.values) for history in histories), rtol=2e-2, atol=0.5)
