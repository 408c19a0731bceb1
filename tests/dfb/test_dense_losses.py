"""Logits, losses and metrics of dense training: the vectors of the specification, and plain loops over the pixels."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from map_examples import OwnPixels, linear
from torch import Tensor

from ood_helpers.dfb.recipe import DenseRecipe
from ood_helpers.dfb.training import (
    IGNORED,
    confusion,
    dense_logits,
    dense_losses,
    on_map,
    segmentation_metrics,
)
from ood_helpers.training.fine_tuning import learning_rate_at


def random_batch(outputs=4) -> tuple[Tensor, Tensor]:
    """Logits on 2 x 3 positions, targets on 8 x 6 pixels, some of them ignored."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(4, outputs, 2, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(IGNORED, outputs, (4, 8, 6), generator=generator)
    return logits, targets


def test_learning_rates():
    schedule = DenseRecipe().steps(50_000)
    rates = {0: 0, 250: 0.0015, 500: 3e-3, 3000: 3e-3, 3001: 3e-4, 6000: 3e-4, 6001: 3e-5, 9000: 3e-5}
    rates |= {9001: 3e-6, 9999: 3e-6}
    for step, rate in rates.items():
        assert learning_rate_at(step, DenseRecipe().learning_rate, schedule) == pytest.approx(rate, rel=1e-12)
    assert schedule[-1] == 10_000


def test_mean_of_the_map_is_the_head_on_pooled_features():
    maps = torch.tensor([[[[1, 0], [2, 1]], [[0, 3], [1, 0]]]], dtype=torch.float64)
    network = OwnPixels(linear([[1, -1], [0.5, 2], [-1, 0]], [0.1, -0.2, 0]))
    for logits in (on_map(network.head, maps), dense_logits(network, maps)):
        assert logits.mean(dim=(2, 3))[0].tolist() == pytest.approx([0.1, 2.3, -1], abs=1e-12)
    assert network(maps)[0].tolist() == pytest.approx([0.1, 2.3, -1], abs=1e-12)


def test_enlarging_changes_the_mean():
    network = OwnPixels(linear([[1]], [0]))
    maps = torch.tensor([[[[1, 2, 3], [4, 5, 6], [7, 8, 100]]]], dtype=torch.float64)
    assert float(dense_logits(network, maps).mean()) == pytest.approx(15.111111, abs=1e-6)
    assert float(dense_logits(network, maps, (5, 5)).mean()) == pytest.approx(13.19, abs=1e-6)
    assert float(dense_logits(network, maps, (9, 9)).mean()) == pytest.approx(12.021605, abs=1e-6)
    unaligned = F.interpolate(maps, (6, 6), mode="bilinear", align_corners=False)
    assert float(unaligned.mean()) == pytest.approx(15.111111, abs=1e-6)
    assert float(dense_logits(network, maps[..., 1:, 1:], (7, 7)).mean()) == pytest.approx(119 / 4)


def test_losses_of_the_small_example():
    maps = [[[2, 0], [0, -1]], [[0, 1], [2, 0]], [[-1, 0], [1, 3]]]
    maps = torch.tensor([maps], dtype=torch.float64)
    network = OwnPixels(linear(torch.eye(3).tolist(), [0, 0, 0]))
    rows = [[2, 1.333333, 0.666667, 0], [1.333333, 0.777778, 0.222222, -0.333333]]
    rows += [[0.666667, 0.222222, -0.222222, -0.666667], [0, -0.333333, -0.666667, -1]]
    enlarged = dense_logits(network, maps, (4, 4))[0, 0]
    torch.testing.assert_close(enlarged, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-6)
    targets = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 2, 255], [1, 2, 2, 2]]])
    targets[targets == 255] = IGNORED
    assert dense_losses(maps, targets, DenseRecipe()).tolist() == pytest.approx([0.576034], abs=1e-6)
    focal = dense_losses(maps, targets, DenseRecipe(loss="focal"))
    assert focal.tolist() == pytest.approx([0.055223], abs=1e-6)
    assert dense_logits(network, maps).mean(dim=(2, 3))[0].tolist() == [0.25, 0.75, 0.75]


# ---- losses and metrics against plain loops ----------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
@pytest.mark.parametrize("weights", [None, (3.0, 0.25)])
@pytest.mark.parametrize("resolution", ["full", "reduced"])
def test_losses_are_those_of_a_plain_loop(loss, weights, resolution):
    logits, targets = random_batch()
    ours = dense_losses(logits, targets, DenseRecipe(loss=loss, loss_resolution=resolution), weights)
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
    mean = float(dense_losses(logits, targets, DenseRecipe()).mean())
    assert mean == pytest.approx(float(F.cross_entropy(enlarged, targets)), rel=1e-12)


def test_image_of_ignored_pixels_alone_has_loss_and_gradient_zero():
    logits, targets = random_batch()
    targets[1] = IGNORED
    logits.requires_grad_(True)
    for loss in ("cross_entropy", "focal"):
        losses = dense_losses(logits, targets, DenseRecipe(loss=loss))
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
