"""Dense training of a backbone with K + 1 outputs: the training of DFB.

Each position of the feature map is classified: pixels of the foreground as the class of their image, all others as
background, the last output K. What is foreground comes from pseudo masks. The head is affine, so the mean of its logits
over the positions is the head applied to the pooled features: the trained network is a classifier of whole images, too.

Source: Ding and Pang, "Improving Out-of-Distribution Detection with Disentangled Foreground and Background Features",
ACM MM 2024, arXiv 2303.08727. The public code has no dense training: the loss and the pairing of images and masks are
this kit's reading of what the abstract and unused parts of that code say.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ood_helpers.backbones import Classifier
from ood_helpers.config import DenseConfig
from ood_helpers.data import ImageSet, Transform
from ood_helpers.errors import InputError
from ood_helpers.training import loop
from ood_helpers.training.classifier import augment, check_labels, load_images, percent_correct, to_network
from ood_helpers.training.fine_tuning import Evaluate, Load, freeze_but, train_by_recipe, training_geometry

IGNORED = -1  # target of a pixel outside the image: padding of a random crop
OUTSIDE, BACKGROUND, FOREGROUND = 0, 1, 2  # of a mask on its way through augment, whose padding is 0
MASKS_AT_ONCE = 2048

Weights = tuple[float, float]
Batches = Iterable[tuple[Tensor, Tensor, Tensor]]


class Masks(Protocol):
    """Which pixels of each image are foreground: `classes` int64 [N], the label of that foreground, and `size`, H and W."""

    classes: Tensor
    size: tuple[int, int]

    def __len__(self) -> int: ...

    def foreground(self, rows: Tensor) -> Tensor:
        """Bool [n, H, W] of the images `rows`."""
        ...


def on_map(head: nn.Linear, maps: Tensor) -> Tensor:
    """The head at every position: feature maps [B, D, h, w] -> logits [B, L, h, w]."""
    return F.conv2d(maps, head.weight[:, :, None, None], head.bias)


def dense_logits(network: Classifier, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """The head at every position of the feature map: normalised images [B, 3, H, W] -> logits [B, L, h, w].

    Their mean over the positions is network(images). With `size` [height, width] they are enlarged to it, bilinear with
    aligned corners; that changes the mean.
    """
    logits = on_map(network.head, network.feature_map(images))
    return logits if size is None else _enlarged(logits, size)


def dense_losses(
    logits: Tensor, targets: Tensor, config: DenseConfig, weights: Weights | None = None
) -> Tensor:
    """Each image's mean cross-entropy L over its pixels that are not IGNORED; with `focal` (1 - exp(-L))^2 L / 2.

    The mean over images is what batches in parts add up to. It is the mean over all pixels where none is ignored; else
    images with fewer pixels count as much as the others. An image of ignored pixels alone has loss 0.

    Parameters
    ----------
    logits : [B, L, h, w] of K classes and, last, the background
    targets : int64 [B, H, W], 0 to K - 1, K = background, or IGNORED
    config : loss, and loss_resolution: logits enlarged to H x W (`full`), or targets `reduced` to h x w, the pixel in the
        middle of each position
    weights : factors of foreground and background pixels; None = 1 and 1. The mean divides by the number of pixels.

    Returns
    -------
    [B]

    Source: the focal variant is that of the public code of DFB, on a mean and not on pixels.
    """
    logits, targets = _of_one_size(logits, targets, config)
    factors = None
    if weights is not None:
        factors = logits.new_full((logits.shape[1],), weights[0])
        factors[-1] = weights[1]
    losses = F.cross_entropy(logits, targets, factors, ignore_index=IGNORED, reduction="none")
    losses = losses.sum(dim=(1, 2)) / (targets != IGNORED).sum(dim=(1, 2)).clamp(min=1)
    return (1 - torch.exp(-losses)) ** 2 * 0.5 * losses if config.loss == "focal" else losses


def _of_one_size(logits: Tensor, targets: Tensor, config: DenseConfig) -> tuple[Tensor, Tensor]:
    if config.loss_resolution == "full":
        return _enlarged(logits, targets.shape[1:]), targets
    return logits, _nearest(targets, logits.shape[2:])


def confusion(logits: Tensor, targets: Tensor) -> Tensor:
    """Counts of pixels, int64 [L, L]: row = target, column = largest logit; IGNORED pixels are left out.

    logits [B, L, h, w], enlarged to the size of targets int64 [B, H, W]
    """
    outputs = logits.shape[1]
    predicted, counted = _enlarged(logits, targets.shape[1:]).argmax(dim=1), targets != IGNORED
    pairs = targets[counted] * outputs + predicted[counted]
    return torch.bincount(pairs, minlength=outputs**2).view(outputs, outputs)


def segmentation_metrics(confusion: Tensor) -> dict[str, float]:
    """Pixel accuracy, mean class accuracy and mean intersection over union (miou) in percent, of counts [L, L] (row =
    target, column = prediction). Classes absent from the targets are left out of the two means."""
    confusion = confusion.double()
    correct, target, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    present = target > 0
    return {
        "pixel_accuracy": 100 * float(correct.sum() / target.sum()),
        "mean_class_accuracy": 100 * float((correct / target)[present].mean()),
        "miou": 100 * float((correct / (target + predicted - correct))[present].mean()),
    }


def train_dense(
    network: Classifier,
    train: ImageSet,
    validation: ImageSet | None,
    transform: Transform,
    config: DenseConfig,
    masks: Masks,
    validation_masks: Masks | None,
    *,
    seed: int,
    device: str | torch.device,
    directory: Path,
) -> pd.DataFrame:
    """Train the head of `network` and its last `config.depth` blocks on pixels; the recipe is that of `fine_tune`.

    A mask is cropped and flipped with its image. Pixels of the padding of a crop are IGNORED.

    Parameters
    ----------
    network : the backbone with a head of K + 1 outputs, the last of which is the background
    masks, validation_masks : of the images as the transform shows them
    directory : for weights.safetensors, whose metadata has background_index = K, and history.csv

    Returns
    -------
    One row for each of about 20 evaluations: epoch (its number), step, learning_rate, train_loss, train_pixel_accuracy,
    train_accuracy and, with a validation set, validation_<value> for all of `evaluate_dense`; in percent but for the
    losses. Pixels of the training are those of the loss, of the feature map's where it is reduced. With mixup the training's accuracies are those of the mixed inputs, of their first targets.

    Raises
    ------
    InputError : no labels, labels of images or masks that are not 0 to K - 1, another number or size of masks, images of
        which the transform shows only a part together with `resize`, more blocks than there are, a crop larger than the
        images, or a loss that is not finite
    """
    background, batch_size = network.num_classes - 1, config.micro_batch_size or config.batch_size
    for image_set, its_masks in _sets_with_masks(train, validation, masks, validation_masks, directory):
        _check_masks(its_masks, image_set, background)
        _check_size(its_masks, image_set, transform)
    if config.resize is not None and not _shows_whole_images(transform, train):
        raise InputError(
            f"Found resize {list(config.resize)} for training but a transform that may show only a part of the images of "
            f"{train.name}, to which their masks belong, expected one that shows all of them; remove resize, or give the "
            "transform a resize [height, width] without a crop."
        )
    geometry, size = training_geometry(transform, config)
    weights = _weights_of(masks, config)
    freeze_but(network, config.depth)

    def load(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        images, coded = load_images(train, geometry, rows), _nearest(_coded(masks, rows), config.resize)
        images = torch.cat([images, coded[..., None]], dim=3)
        images = augment(images, config.crop_padding, config.flip, generator, size)
        inputs, labels = to_network(images[..., :3], train, rows, transform, device)
        return inputs, _targets(images[..., 3], masks.classes[rows], background, device), labels

    def validate(network: nn.Module) -> dict[str, float]:
        return evaluate_dense(
            network, validation, validation_masks, transform, batch_size, device, config, weights()
        )

    options = {"seed": seed, "device": device, "directory": directory}
    validate = None if validation is None else validate
    history = _train(
        network, load, dense_logits, validate, len(train), config, weights, background, **options
    )
    network.requires_grad_(True)
    return history


def train_dense_head(
    head: nn.Linear,
    maps: Callable[[], Tensor],
    validation_maps: Callable[[], Tensor] | None,
    train: ImageSet,
    validation: ImageSet | None,
    config: DenseConfig,
    masks: Masks,
    validation_masks: Masks | None,
    *,
    seed: int,
    device: str | torch.device,
    directory: Path,
) -> pd.DataFrame:
    """Train a head on feature maps; the rest as `train_dense`, whose head it is at depth 0 without augmentation.

    Parameters
    ----------
    maps, validation_maps : give the feature maps [N, D, h, w] of all images of the sets, to be held in memory; not called
        when the training is finished
    train, validation : of which the labels are used

    Raises
    ------
    InputError : as `train_dense`, or another number of feature maps than of images
    """
    background, batch_size = head.out_features - 1, config.micro_batch_size or config.batch_size
    for image_set, its_masks in _sets_with_masks(train, validation, masks, validation_masks, directory):
        _check_masks(its_masks, image_set, background)
    weights = _weights_of(masks, config)

    @functools.cache
    def samples(validating: bool) -> tuple[Tensor, Tensor, Masks]:
        image_set, its_masks = (validation, validation_masks) if validating else (train, masks)
        its_maps = (validation_maps if validating else maps)()
        if len(its_maps) != len(image_set):
            raise InputError(
                f"Found {len(its_maps)} feature maps for the {len(image_set)} images of {image_set.name}, expected one an "
                "image; make them from this set."
            )
        return its_maps, torch.as_tensor(image_set.labels), its_masks

    def batch(rows: Tensor, validating: bool) -> tuple[Tensor, Tensor, Tensor]:
        its_maps, labels, its_masks = samples(validating)
        targets = _targets(_coded(its_masks, rows), its_masks.classes[rows], background, device)
        return its_maps[rows].to(device), targets, labels[rows].to(device)

    def validate(head: nn.Module) -> dict[str, float]:
        parts = torch.arange(len(validation)).split(batch_size)
        batches = (batch(rows, validating=True) for rows in parts)
        return _evaluate(((on_map(head, inputs), *others) for inputs, *others in batches), config, weights())

    def load(rows: Tensor, _generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        return batch(rows, validating=False)

    options = {"seed": seed, "device": device, "directory": directory}
    validate = None if validation is None else validate
    return _train(head, load, on_map, validate, len(train), config, weights, background, **options)


def _train(
    network: nn.Module,
    load: Load,
    logits_of: Callable[[nn.Module, Tensor], Tensor],
    validate: Evaluate | None,
    images: int,
    config: DenseConfig,
    weights: Callable[[], Weights | None],
    background: int,
    **options: Any,
) -> pd.DataFrame:
    return train_by_recipe(
        network,
        load,
        logits_of,
        lambda logits, targets: dense_losses(logits, targets, config, weights()),
        functools.partial(_values, config),
        validate,
        images,
        config,
        **options,
        description="Dense training",
        settings={"background_index": background},
    )


def evaluate_dense(
    network: Classifier,
    image_set: ImageSet,
    masks: Masks,
    transform: Transform,
    batch_size: int,
    device: str | torch.device,
    config: DenseConfig = DenseConfig(),  # noqa: B008 - frozen
    weights: Weights | None = None,
) -> dict[str, float]:
    """A network of K + 1 outputs on a labelled image set with masks; the network in eval mode.

    Returns
    -------
    loss (mean of `dense_losses`, by `config` and `weights`), and in percent pixel_accuracy, mean_class_accuracy and miou
    against the masks, at their size, and accuracy: that of the classifier of whole images, the largest of the K foreground
    logits of the pooled features, against the labels of the set

    Raises
    ------
    InputError : no labels, labels of images or masks that are not 0 to K - 1, or another number or size of masks
    """
    background = network.num_classes - 1
    _check_masks(masks, image_set, background)
    _check_size(masks, image_set, transform)
    network.eval()

    def batches() -> Batches:
        for rows in torch.arange(len(image_set)).split(batch_size):
            images = load_images(image_set, transform, rows)
            inputs, labels = to_network(images, image_set, rows, transform, device)
            targets = _targets(_coded(masks, rows), masks.classes[rows], background, device)
            yield dense_logits(network, inputs), targets, labels

    with torch.inference_mode():
        return _evaluate(batches(), config, weights)


def _evaluate(batches: Batches, config: DenseConfig, weights: Weights | None) -> dict[str, float]:
    """The values of `evaluate_dense` of batches of logits [B, L, h, w], targets [B, H, W] and labels [B]."""
    total, counts, correct, images = 0.0, 0, 0, 0
    for logits, targets, labels in batches:
        total += float(dense_losses(logits, targets, config, weights).sum())
        counts = counts + confusion(logits, targets)
        correct += int((_foreground_logits(logits).argmax(dim=1) == labels).sum())
        images += len(labels)
    return {"loss": total / images, **segmentation_metrics(counts), "accuracy": 100 * correct / images}


def _values(config: DenseConfig, logits: Tensor, targets: Tensor, labels: Tensor) -> dict[str, Tensor]:
    compared, targets = _of_one_size(logits, targets, config)
    counted = targets != IGNORED
    correct = (compared.argmax(dim=1) == targets).sum(dim=(1, 2))
    return {
        "pixel_accuracy": 100 * (correct / counted.sum(dim=(1, 2)).clamp(min=1)).mean(),
        "accuracy": percent_correct(_foreground_logits(logits), labels),
    }


def _foreground_logits(logits: Tensor) -> Tensor:
    """Those [B, K] of the classifier of whole images, of dense logits [B, K + 1, h, w]."""
    return logits.mean(dim=(2, 3))[:, :-1]


def _enlarged(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits [B, L, h, w] at another size, bilinear with aligned corners."""
    # As products of matrices: F.interpolate's gradients are summed in no fixed order on a GPU, so that a training that
    # was interrupted would not end in the same bits.
    rows, columns = (
        F.interpolate(torch.eye(old).to(logits)[None], new, mode="linear", align_corners=True)[0]
        for old, new in zip(logits.shape[2:], size, strict=True)
    )
    return rows.T @ logits @ columns


def _nearest(values: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Integers [B, H, W] at another size, each from the pixel at the middle of its place."""
    if size is None:
        return values
    # F.interpolate takes no int64, and rounds where the middle falls between two pixels.
    rows, columns = (
        (2 * torch.arange(new, device=values.device) + 1) * old // (2 * new)
        for new, old in zip(size, values.shape[1:], strict=True)
    )
    return values[:, rows[:, None], columns]


def _coded(masks: Masks, rows: Tensor) -> Tensor:
    """uint8 [n, H, W]: BACKGROUND or FOREGROUND."""
    return masks.foreground(rows).to(torch.uint8) + BACKGROUND


def _targets(coded: Tensor, classes: Tensor, background: int, device: str | torch.device) -> Tensor:
    """Targets int64 [B, H, W] of coded masks [B, H, W] and the classes [B] of their foreground, on `device`."""
    coded = coded.to(device)
    targets = torch.where(coded == FOREGROUND, classes.to(device)[:, None, None], background)
    return targets.masked_fill(coded == OUTSIDE, IGNORED)


def _weights_of(masks: Masks, config: DenseConfig) -> Callable[[], Weights | None]:
    """The factors of foreground and background pixels with which each counts one half in all masks; taken when first
    asked for, so that a finished training reads no masks."""

    @functools.cache
    def weights() -> Weights | None:
        if not config.balanced:
            return None
        parts = torch.arange(len(masks)).split(MASKS_AT_ONCE)
        pixels = sum(int(masks.foreground(rows).sum()) for rows in parts)
        share = pixels / (len(masks) * masks.size[0] * masks.size[1])
        if not 0 < share < 1:
            raise InputError(
                f"The training masks are foreground in {100 * share:.0f} % of all pixels, expected foreground and background "
                "for balanced; set balanced: false, or change the threshold of the masks."
            )
        return 0.5 / share, 0.5 / (1 - share)

    return weights


def _sets_with_masks(
    train: ImageSet,
    validation: ImageSet | None,
    masks: Masks,
    validation_masks: Masks | None,
    directory: Path,
) -> list[tuple[ImageSet, Masks]]:
    """The sets whose masks are to be checked: none where the training is finished, whose masks are not read."""
    if (validation is None) != (validation_masks is None):
        alone = "masks without validation images" if validation is None else "validation images without masks"
        raise InputError(f"Found {alone}, expected both or none; give the other, too.")
    if loop.finished(Path(directory)):
        return []
    return [(train, masks), *([] if validation is None else [(validation, validation_masks)])]


def _check_masks(masks: Masks, image_set: ImageSet, num_classes: int) -> None:
    check_labels(image_set, num_classes)
    if len(masks) != len(image_set):
        raise InputError(
            f"Found {len(masks)} masks for the {len(image_set)} images of {image_set.name}, expected one an image; make them "
            "from this set."
        )
    if len(masks) and not 0 <= masks.classes.min() <= masks.classes.max() < num_classes:
        raise InputError(
            f"The masks of {image_set.name} have classes {int(masks.classes.min())} to {int(masks.classes.max())}, expected "
            f"0 to {num_classes - 1}; make them with the backbone of this data set."
        )


def _check_size(masks: Masks, image_set: ImageSet, transform: Transform) -> None:
    height, width = load_images(image_set, transform, torch.zeros(1, dtype=torch.int64)).shape[1:3]
    if tuple(masks.size) != (height, width):
        raise InputError(
            f"The masks of {image_set.name} are {masks.size[0]} x {masks.size[1]} pixels, expected {height} x {width} as the "
            "images after the transform; make them with this transform."
        )


def _shows_whole_images(transform: Transform, image_set: ImageSet) -> bool:
    """Whether the transform surely crops nothing off an image and pads none."""
    if transform.crop is None:
        return True
    if isinstance(transform.resize, tuple):
        return transform.resize == (transform.crop, transform.crop)
    if image_set.array is None:
        return False
    height, width = image_set.array.shape[1:3]
    return height == width and transform.crop == (transform.resize or height)
