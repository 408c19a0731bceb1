"""ODIN: the vectors, a loop over images by the paper's formula, and its step in pixels."""

import pytest
import torch
from detector_examples import tensor
from numpy.testing import assert_allclose
from pixel_examples import LinearNetwork, all_pixels, given, image_bank, normalised, shards_of
from torch import nn

from ood_helpers.backbones.pixels import step_by_sign
from ood_helpers.banks import FeatureBank, Head
from ood_helpers.detectors.odin import ODIN, error_margin
from ood_helpers.errors import InputError


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(2, [0.670989, 0.220483, 0.556127]), (1000, [0.200720872, 0.200040002, 0.201301435])],
)
def test_without_noise_it_is_a_function_of_the_logits(temperature, expected):
    logits = torch.tensor([[5, 1, 0, -1, 2], [1.2, 1, 0.8, 1.1, 0.9], [10, 9.5, -3, 0, 1]])
    bank = FeatureBank(torch.zeros(3, 4), logits)
    detector = ODIN(temperature=temperature, noise=0)
    assert not detector.needs_images and detector.extra_passes == 0
    scores = detector.fit(bank, Head(torch.zeros(5, 4), torch.zeros(5))).score_samples(bank)
    assert scores.dtype == torch.float64
    assert_allclose(scores, expected, atol=1e-6 if temperature == 2 else 1e-9)


THREE = LinearNetwork([[1, -0.5], [-0.3, 0.8], [0.2, 0.1]], [0.1, 0, -0.2])
THREE_ROWS = [[0.4, -0.2], [-0.6, 0.5], [0.05, 0.02]]
FIVE = LinearNetwork([[1, -2], [0.5, 1], [-1.5, 0.25]])


@pytest.mark.parametrize(
    ("linear", "rows", "temperature", "noise", "moved", "before", "after"),
    [
        (
            *(THREE, THREE_ROWS, 2, 0.1, [[0.5, -0.3], [-0.7, 0.6], [0.15, -0.08]]),
            *([0.428308, 0.461245, 0.359505], [0.452578, 0.483728, 0.383068]),
        ),
        (
            *(THREE, THREE_ROWS, 1000, 0.05, [[0.45, -0.25], [-0.65, 0.55], [0.1, -0.03]]),
            *(None, [0.333535585, 0.333596710, 0.333407448]),
        ),
        (FIVE, [[0.3, 0.6]], 10, 0.1, [[0.4, 0.7]], [0.363872], [0.369978]),
        (FIVE, [[0.3, 0.6]], 1000, 0.0014, [[0.3014, 0.6014]], [0.333633391], [0.333634208]),
    ],
)
def test_with_noise(linear, rows, temperature, noise, moved, before, after):
    tolerance = 1e-9 if temperature == 1000 else 1e-6
    bank = given(linear, rows)
    detector = ODIN(temperature, noise).fit(bank, linear.head)
    assert_allclose(detector.score_samples(bank), after, atol=tolerance)
    detector.noise = 0
    assert_allclose(detector.score_samples(given(linear, moved)), after, atol=tolerance)
    if before:
        assert_allclose(detector.score_samples(bank), before, atol=tolerance)


def test_a_zero_gradient_counts_as_positive():
    pixels, gradient = tensor([[0.5, 0.5, 0.5]]), tensor([[-1, 0, 2]])
    assert_allclose(step_by_sign(pixels, gradient, 0.1), [[0.4, 0.6, 0.6]], atol=1e-12)
    assert_allclose(step_by_sign(pixels, gradient, -0.1), [[0.6, 0.4, 0.4]], atol=1e-12)


def test_the_margin_has_the_gradient_of_the_cross_entropy_up_to_a_positive_factor():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.arange(50) % 7
    for temperature in (0.5, 1.0, 1000.0):
        margin = error_margin(logits, labels, temperature)
        loss = nn.functional.cross_entropy(logits / temperature, labels, reduction="none")
        assert_allclose(loss.detach(), margin.exp().log1p().detach(), atol=1e-12)
        (expected,) = torch.autograd.grad(loss.sum(), logits)
        (gradient,) = torch.autograd.grad(margin.sum(), logits)
        factor = margin.detach().sigmoid()[:, None]
        assert_allclose(gradient * factor, expected, atol=1e-12)


def test_a_confident_network_still_gives_a_step():
    """In float32 the probability of the class is 1 but for rounding, and so the gradient of the cross-entropy 0."""
    logits = torch.tensor([[300.0, 0.0, 10.0]], requires_grad=True)
    (vanished,) = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.tensor([0])), logits)
    (gradient,) = torch.autograd.grad(error_margin(logits, torch.tensor([0])).sum(), logits)
    assert vanished.abs().max() <= 2 * torch.finfo(torch.float32).eps
    assert_allclose(gradient, [[-1, 0, 1]], atol=1e-4)


def test_a_loop_over_images_by_the_papers_formula(network):
    bank = image_bank(network, 23, seed=1)
    detector = ODIN(temperature=5, noise=0.01).fit(bank, Head.of(network))
    expected = []
    for image in all_pixels(bank):
        pixels = image[None].clone().requires_grad_()
        logits = network(normalised(pixels))
        nn.functional.cross_entropy(logits / 5, logits.argmax(1)).backward()
        moved = pixels.detach() - 0.01 * pixels.grad.sign()
        expected.append(float((network(normalised(moved)).double() / 5).softmax(1).max()))
    scores = detector.score_samples(bank)
    assert_allclose(scores, expected, atol=1e-6)
    assert_allclose(detector.score_samples(shards_of(bank, 5, 18)), scores, atol=1e-6)
    detector.noise = 0
    assert (detector.score_samples(bank.bank) < scores).all()


def test_images_are_needed_for_noise_only(train_bank, head, bank):
    detector = ODIN().fit(train_bank, head)
    assert detector.needs_images and detector.extra_passes == 3
    with pytest.raises(
        InputError, match=r"ODIN: found a bank without images, expected an ImageBank.*or set noise to 0\."
    ):
        detector.score_samples(bank)
    detector.noise = 0
    assert not detector.needs_images
    assert_allclose(detector.score_samples(bank), (bank.logits / 1000).softmax(1).amax(1), atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature is 0, expected a number above 0"),
        ({"noise": 2}, "noise is 2, expected a number from 0 to 1"),
    ],
)
def test_hyperparameters_out_of_range(settings, message):
    with pytest.raises(InputError, match=f"ODIN: {message}"):
        ODIN(**settings)
