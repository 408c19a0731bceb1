"""Dense training of a backbone with K + 1 outputs: the training of DFB.

Each position of the feature map is classified: pixels of the foreground as the class of their image, all others as
background, the last output K. Pseudo masks say what is foreground. The head is affine, so the mean of its logits over
the positions is the head applied to the pooled features: the trained network is a classifier of whole images, too.

Source: Ding and Pang, ACM MM 2024, arXiv 2303.08727. The public code has no dense training: the loss and the pairing of
images and masks are this kit's reading of the abstract and of unused parts of that code.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ood_helpers.backbones.base import Classifier
from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.transforms import Transform
from ood_helpers.dfb.pseudo_masks import PseudoMasks
from ood_helpers.dfb.recipe import DenseRecipe
from ood_helpers.errors import InputError
from ood_helpers.training import loop
from ood_helpers.training.batches import augment, check_labels, load_images, percent_correct, to_network
from ood_helpers.training.fine_tuning import Load, freeze_but, train_by_recipe, training_geometry

IGNORED = -1  # target of a pixel outside the image: padding of a random crop
OUTSIDE, BACKGROUND, FOREGROUND = 0, 1, 2  # of a mask on its way through augment, whose padding is 0

Weights = tuple[float, float]
Batches = Iterable[tuple[Tensor, Tensor, Tensor]]


class MaskedSet(NamedTuple):
    """A labelled image set, and what gives its masks and, for a head alone, its feature maps [N, D, h, w]. Both are
    asked for with every batch, so they should be kept in memory."""

    images: ImageSet
    masks: Callable[[], PseudoMasks]
    maps: Callable[[], Tensor] | None = None


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
    logits: Tensor, targets: Tensor, recipe: DenseRecipe, weights: Weights | None = None
) -> Tensor:
    """Each image's mean cross-entropy L over its pixels that are not IGNORED; with `focal` (1 - exp(-L))^2 L / 2.

    The mean over images is what batches in parts add up to. It is the mean over all pixels where none is ignored; else
    images with fewer pixels count as much as the others. An image of ignored pixels alone has loss 0.

    Parameters
    ----------
    logits : [B, L, h, w] of K classes and, last, the background
    targets : int64 [B, H, W], 0 to K - 1, K = background, or IGNORED
    recipe : loss, and loss_resolution: logits enlarged to H x W (`full`), or targets `reduced` to h x w, the pixel in the
        middle of each position
    weights : factors of foreground and background pixels; None = 1 and 1. The mean divides by the number of pixels.

    Returns
    -------
    [B]

    Source: the focal variant is that of the public code of DFB, on a mean and not on pixels.
    """
    logits, targets = _of_one_size(logits, targets, recipe)
    factors = None
    if weights is not None:
        factors = logits.new_full((logits.shape[1],), weights[0])
        factors[-1] = weights[1]
    losses = F.cross_entropy(logits, targets, factors, ignore_index=IGNORED, reduction="none")
    losses = losses.sum(dim=(1, 2)) / (targets != IGNORED).sum(dim=(1, 2)).clamp(min=1)
    return (1 - torch.exp(-losses)) ** 2 * 0.5 * losses if recipe.loss == "focal" else losses


def _of_one_size(logits: Tensor, targets: Tensor, recipe: DenseRecipe) -> tuple[Tensor, Tensor]:
    if recipe.loss_resolution == "full":
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
    train: MaskedSet,
    validation: MaskedSet | None,
    transform: Transform,
    recipe: DenseRecipe,
    *,
    seed: int,
    device: str | torch.device,
    directory: Path,
) -> pd.DataFrame:
    """Train the head of `network` and its last `recipe.images.depth` blocks on pixels, by the recipe of `fine_tune`.

    A mask is cropped and flipped with its image. Pixels of the padding of a crop are IGNORED. Without `recipe.images`
    the head alone is trained, on the feature maps of the sets: the same as at depth 0 without augmentation.

    Parameters
    ----------
    network : the backbone with a head of K + 1 outputs, the last of which is the background
    train, validation : masks and maps are not asked for when the training is finished
    transform : of images and masks
    directory : for weights.safetensors, whose metadata has background_index = K, and history.csv

    Returns
    -------
    One row for each of about 20 evaluations: epoch (its number), step, learning_rate, train_loss,
    train_pixel_accuracy, train_accuracy and, with a validation set, validation_<value> for all of `evaluate_dense`; in
    percent but for the losses. train_pixel_accuracy counts the pixels of the loss; with mixup both count first targets.

    Raises
    ------
    InputError : no labels, labels of images or masks that are not 0 to K - 1, another number or size of masks, another
        number of maps, `resize` and a transform that shows only a part of the images, more blocks than there are, a
        crop larger than the images, or a loss that is not finite
    """
    background, on_images = network.num_classes - 1, recipe.images is not None
    if not loop.finished(Path(directory)):
        for masked in filter(None, (train, validation)):
            _check_masks(masked.masks(), masked.images, background, transform)
    weights = _weights_of(train.masks, recipe)
    if on_images:
        load = _load_augmented(train, transform, recipe, background, device)
        freeze_but(network, recipe.depth)
    else:
        load = _load_maps(train, background, device)
        load_validation = None if validation is None else _load_maps(validation, background, device)

    def validate(trained: nn.Module) -> dict[str, float]:
        if on_images:
            batch_size = recipe.images.micro_batch_size or recipe.batch_size
            sets = validation.images, validation.masks(), transform
            return evaluate_dense(trained, *sets, batch_size, device, recipe, weights())
        parts = torch.arange(len(validation.images)).split(recipe.batch_size)
        batches = ((on_map(trained, maps), *others) for maps, *others in map(load_validation, parts))
        return _evaluate(batches, recipe, weights())

    history = train_by_recipe(
        network if on_images else network.head,
        load,
        dense_logits if on_images else on_map,
        lambda logits, targets: dense_losses(logits, targets, recipe, weights()),
        functools.partial(_values, recipe),
        None if validation is None else validate,
        len(train.images),
        recipe,
        seed=seed,
        device=device,
        directory=directory,
        description="Dense training",
        settings={"background_index": background},
    )
    network.requires_grad_(True)
    return history


def _load_augmented(
    train: MaskedSet, transform: Transform, recipe: DenseRecipe, background: int, device: str | torch.device
) -> Load:
    options = recipe.images
    if options.resize is not None and not _shows_whole_images(transform, train.images):
        raise InputError(
            f"Found resize {list(options.resize)} for training but a transform that may show only a part of the images of "
            f"{train.images.name}, to which their masks belong, expected one that shows all of them; remove resize, or "
            "give the transform a resize [height, width] without a crop."
        )
    geometry, size = training_geometry(transform, recipe)

    def load(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        masks, images = train.masks(), load_images(train.images, geometry, rows)
        images = torch.cat([images, _nearest(_coded(masks, rows), options.resize)[..., None]], dim=3)
        images = augment(images, options.crop_padding, options.flip, generator, size)
        inputs, labels = to_network(images[..., :3], train.images, rows, transform, device)
        return inputs, _targets(images[..., 3], masks.classes[rows], background, device), labels

    return load


def _load_maps(
    masked: MaskedSet, background: int, device: str | torch.device
) -> Callable[..., tuple[Tensor, ...]]:
    def load(rows: Tensor, _generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        maps, masks, count = masked.maps(), masked.masks(), len(masked.images)
        if len(maps) != count:
            raise InputError(
                f"Found {len(maps)} feature maps for the {count} images of {masked.images.name}, expected one per image; "
                "make them from this set."
            )
        targets = _targets(_coded(masks, rows), masks.classes[rows], background, device)
        return maps[rows].to(device), targets, torch.as_tensor(masked.images.labels)[rows].to(device)

    return load


def evaluate_dense(
    network: Classifier,
    image_set: ImageSet,
    masks: PseudoMasks,
    transform: Transform,
    batch_size: int,
    device: str | torch.device,
    recipe: DenseRecipe = DenseRecipe(),  # noqa: B008 - frozen
    weights: Weights | None = None,
) -> dict[str, float]:
    """A network of K + 1 outputs on a labelled image set with masks; the network in eval mode.

    Returns
    -------
    loss (mean of `dense_losses`, by `recipe` and `weights`), and in percent pixel_accuracy, mean_class_accuracy and miou
    against the masks, at their size, and accuracy: that of the classifier of whole images, the largest of the K foreground
    logits of the pooled features, against the labels of the set

    Raises
    ------
    InputError : no labels, labels of images or masks that are not 0 to K - 1, or another number or size of masks
    """
    background = network.num_classes - 1
    _check_masks(masks, image_set, background, transform)
    network.eval()

    def batches() -> Batches:
        for rows in torch.arange(len(image_set)).split(batch_size):
            images = load_images(image_set, transform, rows)
            inputs, labels = to_network(images, image_set, rows, transform, device)
            targets = _targets(_coded(masks, rows), masks.classes[rows], background, device)
            yield dense_logits(network, inputs), targets, labels

    with torch.inference_mode():
        return _evaluate(batches(), recipe, weights)


def _evaluate(batches: Batches, recipe: DenseRecipe, weights: Weights | None) -> dict[str, float]:
    """The values of `evaluate_dense` of batches of logits [B, L, h, w], targets [B, H, W] and labels [B]."""
    total, counts, correct, images = 0.0, 0, 0, 0
    for logits, targets, labels in batches:
        total += float(dense_losses(logits, targets, recipe, weights).sum())
        counts = counts + confusion(logits, targets)
        correct += int((_foreground_logits(logits).argmax(dim=1) == labels).sum())
        images += len(labels)
    return {"loss": total / images, **segmentation_metrics(counts), "accuracy": 100 * correct / images}


def _values(recipe: DenseRecipe, logits: Tensor, targets: Tensor, labels: Tensor) -> dict[str, Tensor]:
    compared, targets = _of_one_size(logits, targets, recipe)
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


def _coded(masks: PseudoMasks, rows: Tensor) -> Tensor:
    """uint8 [n, H, W]: BACKGROUND or FOREGROUND."""
    return masks.foreground(rows).to(torch.uint8) + BACKGROUND


def _targets(coded: Tensor, classes: Tensor, background: int, device: str | torch.device) -> Tensor:
    """Targets int64 [B, H, W] of coded masks [B, H, W] and the classes [B] of their foreground, on `device`."""
    coded = coded.to(device)
    targets = torch.where(coded == FOREGROUND, classes.to(device)[:, None, None], background)
    return targets.masked_fill(coded == OUTSIDE, IGNORED)


def _weights_of(masks: Callable[[], PseudoMasks], recipe: DenseRecipe) -> Callable[[], Weights | None]:
    """Gives the factors of foreground and background pixels with which each counts one half in all masks."""

    @functools.cache
    def weights() -> Weights | None:
        if not recipe.balanced:
            return None
        pixels = masks().pixels()
        share = int(pixels.sum()) / (len(pixels) * masks().size[0] * masks().size[1])
        if not 0 < share < 1:
            raise InputError(
                f"The training masks are foreground in {100 * share:.0f} % of all pixels, expected foreground and background "
                "for balanced; set balanced: false, or change the threshold of the masks."
            )
        return 0.5 / share, 0.5 / (1 - share)

    return weights


def _check_masks(masks: PseudoMasks, image_set: ImageSet, num_classes: int, transform: Transform) -> None:
    check_labels(image_set, num_classes)
    if len(masks) != len(image_set):
        raise InputError(
            f"Found {len(masks)} masks for the {len(image_set)} images of {image_set.name}, expected one per image; make "
            "them from this set."
        )
    if len(masks) and not 0 <= masks.classes.min() <= masks.classes.max() < num_classes:
        raise InputError(
            f"The masks of {image_set.name} have classes {int(masks.classes.min())} to {int(masks.classes.max())}, expected "
            f"0 to {num_classes - 1}; make them with the backbone of this data set."
        )
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
