"""Dense training: images paired with masks, the head on maps, batches in parts, resuming, errors."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from map_examples import OwnPixels, linear, masks_of
from pictures import TRANSFORM, Pictures
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from ood_helpers.backbones import DenseNet
from ood_helpers.data import Transform
from ood_helpers.dfb.pseudo_masks import PseudoMasks
from ood_helpers.dfb.recipe import DenseRecipe
from ood_helpers.dfb.training import MaskedSet, evaluate_dense, train_dense
from ood_helpers.errors import InputError
from ood_helpers.networks.background import foreground_classifier
from ood_helpers.training import fine_tuning
from ood_helpers.training.batches import evaluate
from ood_helpers.training.fine_tuning import zero_head

CLASSES = 3


def recipe(**settings) -> DenseRecipe:
    """In ten steps of 16 images, without flips unless `images` says otherwise."""
    settings = {
        "images": {},
        "schedule": (2, 4, 6, 8, 10),
        "batch_size": 16,
        "learning_rate": 0.05,
    } | settings
    if settings["images"] is not None:
        settings["images"] = {"flip": False} | settings["images"]
    return DenseRecipe(**settings)


def make_network() -> DenseNet:
    torch.manual_seed(0)
    network = DenseNet(CLASSES, depth=10, growth_rate=4)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
    network.head = zero_head(network.feature_dim, CLASSES + 1)
    return network


def make_masks(pictures: Pictures) -> PseudoMasks:
    """A rectangle for each image, one more often on the left."""
    rng = np.random.default_rng(len(pictures))
    pixels = torch.zeros(pictures.pixels.shape[:3], dtype=torch.bool)
    for mask in pixels:
        top, left = rng.integers(0, 4, 2)
        mask[top : top + rng.integers(3, 6), left : left + rng.integers(2, 5)] = True
    return masks_of(pixels, torch.from_numpy(pictures.labels))


def masked(pictures: Pictures, masks: PseudoMasks, maps: Tensor | None = None) -> MaskedSet:
    return MaskedSet(pictures, lambda: masks, lambda: maps)


PICTURES, HELD_OUT = Pictures(50, 0), Pictures(20, 1)
MASKS, HELD_OUT_MASKS = make_masks(PICTURES), make_masks(HELD_OUT)
MOSTLY_FOREGROUND = masks_of((torch.arange(64) > 5).view(8, 8).expand(50, 8, 8), MASKS.classes)
TRAIN, VALIDATION = masked(PICTURES, MASKS), masked(HELD_OUT, HELD_OUT_MASKS)
LONGER = {"schedule": (2, 27, 28, 29, 30), "learning_rate": 0.1}  # the classes are learned


def run(directory, network=None, train=TRAIN, validation=None, transform=TRANSFORM, device="cpu", **settings):
    network = make_network() if network is None else network
    where = {"seed": 1, "device": device, "directory": directory}
    return train_dense(network, train, validation, transform, recipe(**settings), **where)


# ---- images and their masks --------------------------------------------------------------------------------


class Coloured(Pictures):
    """Pictures that show their targets: foreground in the channel of its class, background in white; padding is black."""

    def __init__(self, masks: PseudoMasks, decoded: bool = False):
        super().__init__(len(masks), 0)
        colours = 255 * torch.eye(3, dtype=torch.uint8)[masks.classes]
        white = torch.tensor(255, dtype=torch.uint8)
        self.pixels = torch.where(masks.foreground()[..., None], colours[:, None, None], white).numpy()
        self.array = None if decoded else self.pixels


class NearestTransform(Transform):
    """Enlarges images as masks are enlarged, so that the two can be compared pixel by pixel."""

    def geometry(self, image: Image.Image) -> np.ndarray:
        return np.array(image.resize(self.resize[::-1], Image.Resampling.NEAREST))


@pytest.mark.parametrize(
    "images",
    [
        {"crop_padding": 3},
        {"flip": True},
        {"crop_padding": 2, "flip": True},
        {"resize": [24, 16], "crop_padding": 2, "flip": True},
    ],
)
def test_mask_goes_where_its_image_goes(tmp_path, images):
    """A network that reads the targets off the colours is always right: it takes black for class 0, but padding is not
    counted."""
    pixels = torch.rand(24, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    masks = masks_of(pixels, torch.arange(24) % CLASSES)
    pictures = Coloured(masks, decoded="resize" in images)
    transform = NearestTransform(**dict(TRANSFORM) | {"resize": (8, 8)})
    network = OwnPixels(linear([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]], [0, 0, 0, 0]).float())
    images = images | {"depth": 0}
    train = masked(pictures, masks)
    history = run(tmp_path, network, train, transform=transform, images=images, learning_rate=1e-9)
    assert history["train_pixel_accuracy"].tolist() == pytest.approx([100] * 10)


def test_targets_carry_the_classes_of_the_masks(tmp_path):
    """Where the backbone is mistaken, the class of its map is that of the foreground; accuracy is by the true label."""
    wrong = masks_of(MOSTLY_FOREGROUND.foreground(), (MASKS.classes + 1) % CLASSES)
    network = make_network()
    of_both = masked(PICTURES, wrong)
    history = run(tmp_path, network, of_both, of_both, **LONGER)
    right = evaluate_dense(network, PICTURES, MOSTLY_FOREGROUND, TRANSFORM, 16, "cpu")
    assert history["validation_pixel_accuracy"].iloc[-1] > 80 > 20 > right["pixel_accuracy"]
    assert history["validation_accuracy"].iloc[-1] == right["accuracy"] < 10
    assert history["train_accuracy"].iloc[-1] < 10


# ---- training ----------------------------------------------------------------------------------------------


def maps_of(network, pictures) -> Tensor:
    inputs = TRANSFORM.normalise(torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2))
    with torch.no_grad():
        return network.eval().feature_map(inputs)


def with_maps(network) -> MaskedSet:
    return masked(PICTURES, MASKS, maps_of(network, PICTURES))


@pytest.mark.parametrize(
    ("micro_batch_size", "settings"),
    [(None, {}), (None, {"loss": "focal", "balanced": True}), (5, {"loss_resolution": "reduced"})],
)
def test_head_on_maps_is_the_head_on_images(tmp_path, micro_batch_size, settings):
    on_images, on_maps = make_network(), make_network()
    images = {"depth": 0, "micro_batch_size": micro_batch_size}
    history = run(tmp_path / "images", on_images, TRAIN, VALIDATION, images=images, **settings)
    validation = masked(HELD_OUT, HELD_OUT_MASKS, maps_of(on_maps, HELD_OUT))
    same = run(tmp_path / "maps", on_maps, with_maps(on_maps), validation, images=None, **settings)
    torch.testing.assert_close(on_maps.head.weight, on_images.head.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(on_maps.head.bias, on_images.head.bias, rtol=1e-4, atol=1e-5)
    assert list(same) == list(history) and on_maps.head.weight.abs().max() > 0
    for column in history:
        assert same[column].tolist() == pytest.approx(history[column].tolist(), rel=1e-3), column
    assert same["train_loss"].iloc[-1] < same["train_loss"].iloc[0]


def test_first_loss_is_that_of_a_head_of_zeros_and_the_last_row_that_of_evaluate_dense(tmp_path):
    network = make_network()
    history = run(tmp_path, network, validation=VALIDATION, loss="focal", balanced=True)
    share = float(MASKS.foreground().float().mean())
    first = np.random.default_rng((1, 0)).permutation(50)[:16]
    shares = MASKS.foreground()[first].float().mean(dim=(1, 2)).numpy()
    losses = np.log(CLASSES + 1) * 0.5 * (shares / share + (1 - shares) / (1 - share))
    expected = np.mean((1 - np.exp(-losses)) ** 2 * 0.5 * losses)
    assert history["train_loss"].iloc[0] == pytest.approx(expected, rel=1e-5)
    weights = (0.5 / share, 0.5 / (1 - share))
    last = evaluate_dense(
        network, HELD_OUT, HELD_OUT_MASKS, TRANSFORM, 7, "cpu", recipe(loss="focal", balanced=True), weights
    )
    assert set(last) == {"loss", "pixel_accuracy", "mean_class_accuracy", "miou", "accuracy"}
    for name, value in last.items():
        assert history[f"validation_{name}"].iloc[-1] == pytest.approx(value, rel=1e-5)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_accuracy_is_that_of_the_classifier_of_pooled_features(tmp_path):
    network = make_network()
    run(tmp_path, network, masked(PICTURES, MOSTLY_FOREGROUND), **LONGER)
    network.head.bias.data[-1] += 100  # the background has no say in it
    pooled = evaluate(foreground_classifier(network), HELD_OUT, TRANSFORM, 16, "cpu")["accuracy"]
    ours = evaluate_dense(network, HELD_OUT, HELD_OUT_MASKS, TRANSFORM, 6, "cpu")["accuracy"]
    assert ours == pooled > 80


def test_metadata_hold_the_index_of_the_background(tmp_path):
    run(tmp_path, images={"depth": 0})
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["training"])["background_index"] == CLASSES


def test_a_finished_training_reads_no_maps_and_no_masks(tmp_path):
    network, again = make_network(), make_network()
    run(tmp_path, network, with_maps(network), images=None, balanced=True)
    nothing = MaskedSet(
        PICTURES, lambda: pytest.fail("masks were read"), lambda: pytest.fail("maps were read")
    )
    run(tmp_path, again, nothing, images=None, balanced=True)
    assert torch.equal(again.head.weight, network.head.weight) and again.head.weight.abs().max() > 0


def test_batches_in_parts_end_in_the_same_weights(tmp_path):
    networks, histories = [make_network(), make_network()], []
    images = {"depth": 1, "crop_padding": 3, "flip": True}
    for name, network, size in zip("ab", networks, [None, 5]):
        in_parts = images | {"micro_batch_size": size}
        histories.append(run(tmp_path / name, network, images=in_parts, mixup=0.5, balanced=True))
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
    plain = copy.deepcopy(network.head)
    settings = {"mixup": 1.0, "momentum": 0.0, "schedule": (1, 2, 3, 4, 5)}
    history = run(tmp_path, network, with_maps(network), images=None, **settings)
    targets = torch.where(MASKS.foreground(), MASKS.classes[:, None, None], CLASSES)
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
    torch.testing.assert_close(network.head.weight, plain.weight, rtol=1e-4, atol=1e-6)


def test_an_interrupted_training_resumes_and_ends_in_the_same_bytes(tmp_path):
    images = {"depth": 1, "flip": True, "crop_padding": 1}

    def trained(name, last=None):
        """The history, and how often the validation masks were asked for: before the training, and in each evaluation."""
        times = []

        def validation_masks():
            times.append(len(times) + 1)
            if times[-1] == last:
                raise KeyboardInterrupt
            return HELD_OUT_MASKS

        history = run(
            tmp_path / name,
            validation=MaskedSet(HELD_OUT, validation_masks),
            images=images,
            mixup=0.5,
            balanced=True,
        )
        return history, len(times)

    whole, times = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("parts", last=1 + 3)
    parts, times_of_the_rest = trained("parts")
    assert times_of_the_rest == times - 2  # two evaluations were kept
    assert parts.equals(whole)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


# ---- errors ------------------------------------------------------------------------------------------------


def with_labels(labels) -> Pictures:
    pictures = Pictures(50, 0)
    pictures.labels = labels
    return pictures


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": masked(with_labels(None), MASKS)}, "pictures has no labels"),
        ({"train": masked(with_labels(np.arange(50) % 4), MASKS)}, "labels 0 to 3, expected 0 to 2"),
        (
            {"train": masked(PICTURES, masks_of(MASKS.foreground(), MASKS.classes + 1))},
            "masks of pictures have classes 1 to 3, expected 0 to 2",
        ),
        (
            {"train": masked(PICTURES, masks_of(MASKS.foreground()[:49], MASKS.classes[:49]))},
            "49 masks for the 50 images of pictures",
        ),
        (
            {"train": masked(PICTURES, masks_of(MASKS.foreground()[:, 1:], MASKS.classes))},
            "are 7 x 8 pixels, expected 8 x 8",
        ),
        ({"validation": masked(HELD_OUT, MASKS)}, "50 masks for the 20 images"),
        (
            {
                "train": masked(PICTURES, masks_of(MASKS.foreground() & False, MASKS.classes)),
                "balanced": True,
            },
            "foreground in 0 % of all pixels",
        ),
        ({"images": {"depth": 4}}, "depth 4, expected 0 to 3"),
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
    images = {"resize": [10, 12], "depth": 0}
    settings = {"train": masked(Pictures(50, 0, decoded), MASKS), "transform": transform, "images": images}
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
        run(tmp_path, network, masked(PICTURES, MASKS, maps_of(network, PICTURES)[:49]), images=None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_trains_as_the_cpu_does(tmp_path):
    histories = [run(tmp_path / device, device=device, validation=VALIDATION) for device in ("cpu", "cuda")]
    torch.testing.assert_close(*(Tensor(history.values) for history in histories), rtol=2e-2, atol=0.5)
