"""Batches of images: augmentation, both ways to get at images, epochs, and what is measured on them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import TRANSFORM, Pictures
from torch import nn

from ood_helpers.config.backbones import TrainingConfig
from ood_helpers.data import Transform
from ood_helpers.errors import InputError
from ood_helpers.training.batches import (
    FLAT,
    augment,
    augmented_batches,
    check_labels,
    evaluate,
    evaluate_logits,
    load_images,
    percent_correct,
    steps_per_epoch,
)


def test_transform_that_changes_the_size():
    pictures = Pictures(6, 0)
    transform = Transform(resize=(12, 10), mean=TRANSFORM.mean, std=TRANSFORM.std)
    images = load_images(pictures, transform, torch.tensor([4, 1]))
    assert images.shape == (2, 12, 10, 3)
    assert np.array_equal(images[0].numpy(), transform.geometry(pictures.image(4)))
    same = load_images(pictures, TRANSFORM, torch.tensor([4, 1]))
    assert np.array_equal(same.numpy(), pictures.pixels[[4, 1]])


def reference_crops(image: np.ndarray, padding: int, flip: bool) -> list[bytes]:
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    crops = [
        padded[top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return [c.tobytes() for crop in crops for c in ([crop, crop[:, ::-1]] if flip else [crop])]


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_gives_every_crop_and_flip_and_nothing_else(padding, flip):
    image = np.random.default_rng(0).integers(1, 255, (5, 4, 3), dtype=np.uint8)
    images = torch.from_numpy(image).expand(2000, -1, -1, -1)
    augmented = augment(images, padding, flip, torch.Generator().manual_seed(0))
    assert augmented.shape == images.shape
    assert augmented.dtype == torch.uint8
    expected = reference_crops(image, padding, flip)
    found = [a.tobytes() for a in augmented.numpy()]
    counts = [found.count(crop) for crop in expected]
    assert sum(counts) == 2000
    assert min(counts) > 0.5 * 2000 / len(expected)


def test_each_image_is_augmented_by_its_own_draw():
    pixels = torch.randint(1, 255, (64, 6, 6, 3), dtype=torch.uint8)
    augmented = augment(pixels, 2, True, torch.Generator().manual_seed(1))
    for before, after in zip(pixels.numpy(), augmented.numpy()):
        assert after.tobytes() in reference_crops(before, 2, True)


def test_batches_of_an_epoch():
    pictures = Pictures(33, 0)
    config = TrainingConfig(epochs=1, batch_size=16)

    def epoch(seed):
        return list(
            augmented_batches(pictures, TRANSFORM, config, torch.Generator().manual_seed(seed), "cpu")
        )

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert [len(labels) for _, labels in first] == [16, 16]  # the 33rd would be alone
    assert all(torch.equal(a, b) for pair, same in zip(first, again) for a, b in zip(pair, same))
    assert not torch.equal(first[0][0], other[0][0])
    images, labels = (torch.cat(parts) for parts in zip(*first))
    assert first[0][0].is_contiguous(memory_format=torch.channels_last)
    mean, std = torch.tensor([TRANSFORM.mean, TRANSFORM.std])[:, :, None, None]
    pixels = (images * std + mean).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    rows = [next(i for i, p in enumerate(pictures.pixels) if np.array_equal(p, pixel)) for pixel in pixels]
    assert len(set(rows)) == 32
    assert labels.tolist() == pictures.labels[rows].tolist()


@pytest.mark.parametrize(
    ("images", "batch_size", "steps"), [(32, 16, 2), (33, 16, 2), (34, 16, 3), (5, 16, 1)]
)
def test_steps_per_epoch(images, batch_size, steps):
    assert steps_per_epoch(images, batch_size) == steps


@pytest.mark.parametrize(("images", "batch_size"), [(1, 16), (0, 16), (50, 1)])
def test_too_few_images_a_batch(images, batch_size):
    with pytest.raises(InputError, match="expected at least 2"):
        steps_per_epoch(images, batch_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_softmax_and_what_is_measured(dtype):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(7, 3, generator=generator, dtype=dtype), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    losses = FLAT.losses(logits, labels)
    expected = -logits.softmax(dim=1)[torch.arange(7), labels].log()
    torch.testing.assert_close(losses, expected)
    assert torch.equal(FLAT.classify(logits), logits.argmax(dim=1))
    right = [int(row.argmax() == label) for row, label in zip(logits, labels)]
    assert float(percent_correct(logits, labels)) == pytest.approx(100 * sum(right) / 7)
    parts = zip(logits.split(3), labels.split(3))
    assert evaluate_logits(parts) == pytest.approx(
        {"loss": float(losses.mean()), "accuracy": 100 * sum(right) / 7}
    )


def test_evaluation_is_in_eval_mode_and_without_gradients():
    class Network(nn.Module):
        def forward(self, images):
            assert not self.training
            assert not torch.is_grad_enabled()
            return images.mean(dim=(2, 3))

    pictures = Pictures(10, 0)
    inputs = TRANSFORM.normalise(torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2))
    labels = torch.from_numpy(pictures.labels)
    expected = F.cross_entropy(inputs.mean(dim=(2, 3)), labels)
    values = evaluate(Network().train(), pictures, TRANSFORM, 4, "cpu")
    assert values == pytest.approx({"loss": float(expected), "accuracy": 100.0}, rel=1e-5)


def test_labels_of_an_empty_set_are_fine():
    check_labels(Pictures(0, 0), 3)
