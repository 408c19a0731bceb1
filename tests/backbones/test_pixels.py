"""A network as a function of pixels: the numbers of its bank, passes that end early, input gradients."""

import pytest
import torch
from bank_examples import TRANSFORM, Staged, bytes_of, random_images
from torch import nn

from ood_helpers.backbones import Classifier
from ood_helpers.backbones.pixels import PixelNetwork, fgsm, input_gradient, step_by_sign
from ood_helpers.config import FeaturesConfig
from ood_helpers.data import Transform
from ood_helpers.errors import InputError
from ood_helpers.extract import extract
from ood_helpers.storage import Store


def of_pixels(network: Classifier, transform: Transform = TRANSFORM) -> PixelNetwork:
    return PixelNetwork(network, transform.mean, transform.std)


def test_a_network_of_pixels_gives_the_numbers_of_the_bank(tmp_path):
    network, images, names = Staged(), random_images(), ("first", "activation", "second")
    options = FeaturesConfig(batch_size=4, shard_size=8, taps=names)
    bank = extract(network, images, TRANSFORM, Store(tmp_path), options).load()
    pixel_network, pixels = of_pixels(network), bytes_of(images) / 255
    torch.testing.assert_close(pixel_network.logits(pixels), bank.logits)
    known = {"features": bank.features, "head": bank.logits, **bank.taps}
    for _ in range(2):  # the second time the pass ends early
        for asked in (names, ("activation",), ("second", "features"), ("features",), ("head",)):
            pooled = pixel_network.pooled(pixels, asked)
            assert list(pooled) == list(asked)
            for name, value in pooled.items():
                torch.testing.assert_close(value, known[name])
    with pytest.raises(InputError, match="no module 'third' to tap"):
        pixel_network.pooled(pixels, ("third",))


def test_a_pass_ends_at_the_last_module_that_is_needed():
    network = Staged()
    pixel_network, pixels = of_pixels(network), torch.rand(2, 3, 6, 6)
    for asked, whole in (
        (("first",), 0),
        (("first", "last"), 1),
        (("second",), 0),
        (("first", "features"), 1),
    ):
        pixel_network.pooled(pixels, asked)
        before = network.whole_passes
        pixel_network.pooled(pixels, asked)
        assert network.whole_passes - before == whole


def test_a_network_of_pixels_has_input_gradients_only():
    network = Staged().train()
    pixel_network, pixels = of_pixels(network), torch.rand(2, 3, 6, 6, requires_grad=True)
    assert not network.training
    pooled = pixel_network.pooled(pixels, ("first", "second", "features"))
    loss = pixel_network.logits(pixels).square().sum() + sum(
        value.square().sum() for value in pooled.values()
    )
    loss.backward()
    assert pixels.grad.abs().amax((1, 2, 3)).min() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


class Unchanged(Classifier):
    """The features are the means of the input channels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def feature_map(self, images):
        return images


def test_normalisation_of_pixels():
    pixels = torch.stack([torch.zeros(3, 1, 1), torch.ones(3, 1, 1)])
    mean, std = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
    transform = Transform(mean=tuple(m / 255 for m in mean), std=tuple(s / 255 for s in std))
    normalised = of_pixels(Unchanged(), transform).pooled(pixels, ("features",))["features"]
    by_transform = transform.normalise((255 * pixels).to(torch.uint8))
    torch.testing.assert_close(normalised, by_transform[:, :, 0, 0])
    expected = [[-1.988889, -1.980676, -1.707646], [2.058730, 2.125604, 2.115442]]
    torch.testing.assert_close(normalised, torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_input_gradient_is_that_of_each_image_alone():
    network = of_pixels(Staged())
    pixels = torch.rand(3, 3, 6, 6)

    def confidence(pixels):
        return network.logits(pixels).log_softmax(1).amax(1)

    with torch.no_grad():
        together = input_gradient(confidence, pixels)
    alone = torch.cat([input_gradient(confidence, image[None]) for image in pixels])
    assert together.shape == pixels.shape and together.abs().amax((1, 2, 3)).min() > 0
    torch.testing.assert_close(together, alone)
    assert not pixels.requires_grad


def test_steps_along_the_sign_of_a_gradient():
    pixels, gradient = torch.tensor([0.02, 0.5, 0.98]), torch.tensor([-2.0, 0.0, 3.0])
    torch.testing.assert_close(step_by_sign(pixels, gradient, 0.05), torch.tensor([-0.03, 0.55, 1.03]))
    torch.testing.assert_close(fgsm(pixels, gradient, 0.05), torch.tensor([0, 0.55, 1]))
