"""ODIN and Mahalanobis: the methods that differentiate the network, and the plain Mahalanobis score."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from detector_examples import cast, make_bank, random_problem, split
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from ood_helpers.backbones import Classifier
from ood_helpers.data import Transform
from ood_helpers.detectors import ODIN, Mahalanobis, MahalanobisEnsemble, create
from ood_helpers.detectors.mahalanobis import _Regression, fgsm, layer_scores
from ood_helpers.detectors.odin import error_margin, step_by_sign
from ood_helpers.errors import InputError
from ood_helpers.features import FeatureBank, Head, ImageBank, ImageShard, PixelNetwork
from ood_helpers.metrics import fpr_at_tpr

TRANSFORM = Transform(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
LAYERS = ("stem", "deep", "features")


class LinearNetwork:
    """logits = W x + b of "pixels" x [B, 1, 1, D], which are the output of every layer."""

    device = torch.device("cpu")

    def __init__(self, weight, bias=0.0):
        self.weight = torch.tensor(weight, dtype=torch.float64)
        self.bias = torch.zeros(len(weight), dtype=torch.float64) + torch.tensor(bias, dtype=torch.float64)

    def logits(self, pixels):
        return pixels.flatten(1) @ self.weight.T + self.bias

    def pooled(self, pixels, names):
        return dict.fromkeys(names, pixels.flatten(1))

    @property
    def head(self):
        return Head(self.weight, self.bias)


class Given(ImageShard):
    """Images that are given as numbers, of any range."""

    def pixels(self):
        yield from self.batches()


def given(network, rows):
    x = torch.tensor(rows, dtype=torch.float64)
    return Given(x, network.logits(x), network=network, batches=lambda: iter([x[:, None, None]]))


class SmallNetwork(Classifier):
    """Two convolutions, the output of the first changed in place."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.head = nn.Linear(6, classes)

    def feature_map(self, images):
        return nn.functional.gelu(self.deep(self.stem(images).relu_()))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return SmallNetwork()


def image_bank(network, count, seed, device="cpu", transform=TRANSFORM, size=6, taps=LAYERS[:2]):
    """Images whose colours follow their class, all of them in shards and batches of uneven sizes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    colours = 40 + 60 * torch.stack([labels == 0, labels == 1, labels == 2], dim=1)
    noise = torch.randint(0, 40, (count, 3, size, size), generator=generator)
    images = (colours[:, :, None, None] + noise).to(torch.uint8)
    pixel_network = PixelNetwork(network, transform, device)
    with torch.no_grad():
        inputs = images.to(device) / 255
        logits = pixel_network.logits(inputs)
        outputs = pixel_network.pooled(inputs, (*taps, "features"))
    features = outputs.pop("features")
    bank = FeatureBank(features, logits, labels.to(device), outputs)
    return ImageBank(bank, pixel_network, lambda start, stop: iter(images[start:stop].split(7)), "made")


# ODIN


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(2, [0.670989, 0.220483, 0.556127]), (1000, [0.200720872, 0.200040002, 0.201301435])],
)
def test_odin_without_noise_is_a_function_of_the_logits(temperature, expected):
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
    ("network", "rows", "temperature", "noise", "moved", "before", "after"),
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
def test_odin_with_noise(network, rows, temperature, noise, moved, before, after):
    tolerance = 1e-9 if temperature == 1000 else 1e-6
    bank = given(network, rows)
    detector = ODIN(temperature, noise).fit(bank, network.head)
    assert_allclose(detector.score_samples(bank), after, atol=tolerance)
    detector.noise = 0
    assert_allclose(detector.score_samples(given(network, moved)), after, atol=tolerance)
    if before:
        assert_allclose(detector.score_samples(bank), before, atol=tolerance)


def test_a_zero_gradient_counts_as_positive():
    pixels = torch.full((1, 3), 0.5, dtype=torch.float64)
    gradient = torch.tensor([[-1.0, 0.0, 2.0]])
    assert step_by_sign(pixels, gradient, 0.1).tolist() == [[0.4, 0.6, 0.6]]
    assert step_by_sign(pixels, gradient, -0.1).tolist() == [[0.6, 0.4, 0.4]]


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
    """In float32 the probability of the class is 1, and the gradient of the cross-entropy 0."""
    logits = torch.tensor([[300.0, 0.0, 10.0]], requires_grad=True)
    (vanished,) = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.tensor([0])), logits)
    (gradient,) = torch.autograd.grad(error_margin(logits, torch.tensor([0])).sum(), logits)
    assert vanished.count_nonzero() == 0
    assert gradient[0, 0] < 0 < gradient[0, 2]


def test_odin_equals_a_loop_over_images_by_the_papers_formula(network):
    bank = image_bank(network, 23, seed=1)
    detector = ODIN(temperature=5, noise=0.01).fit(bank, Head.of(network))
    mean, std = (torch.tensor(values)[:, None, None] for values in (TRANSFORM.mean, TRANSFORM.std))
    expected = []
    for batch in bank.batches(0, 23):
        for image in batch:
            pixels = (image[None] / 255).requires_grad_()
            logits = network((pixels - mean) / std)
            nn.functional.cross_entropy(logits / 5, logits.argmax(1)).backward()
            moved = pixels.detach() - 0.01 * pixels.grad.sign()
            expected.append(float((network((moved - mean) / std).double() / 5).softmax(1).max()))
    scores = detector.score_samples(bank)
    assert_allclose(scores, expected, atol=1e-6)
    assert_allclose(detector.score_samples(shards_of(bank, 5, 18)), scores, atol=1e-6)
    detector.noise = 0
    assert (detector.score_samples(bank.bank) < scores).all()


def shards_of(bank, *sizes):
    """The same image bank in several shards."""
    pieces, start = [], 0
    for size in sizes:
        rows, part = slice(start, start + size), bank.bank
        taps = {name: tap[rows] for name, tap in part.taps.items()}
        pieces.append(FeatureBank(part.features[rows], part.logits[rows], part.labels[rows], taps))
        start += size
    whole = split(FeatureBank(bank.bank.features, bank.bank.logits), *sizes)
    return ImageBank(type(whole)(tuple(pieces)), bank.network, bank.batches, bank.name)


@pytest.mark.parametrize("name", ["odin", "mahalanobis_ensemble"])
def test_noise_is_in_pixels_whatever_the_normalisation(name, network):
    """A network that normalises itself gives the same scores behind a transform that does not."""

    class Normalising(SmallNetwork):
        def feature_map(self, images):
            mean, std = (torch.tensor(values)[:, None, None] for values in (TRANSFORM.mean, TRANSFORM.std))
            return super().feature_map((images - mean) / std)

    inside = Normalising()
    inside.load_state_dict(network.state_dict())
    scores = []
    for model, transform in ((network, TRANSFORM), (inside, Transform(mean=(0, 0, 0), std=(1, 1, 1)))):
        train, validation, test = (
            image_bank(model, count, seed, transform=transform) for seed, count in enumerate((60, 40, 20))
        )
        detector = create(name, noise=0.02).fit(train, Head.of(model), validation)
        scores.append(detector.score_samples(test))
    assert_allclose(scores[0], scores[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["odin", "mahalanobis_ensemble"])
def test_the_network_is_frozen_and_left_as_it_was(name, network):
    state = {key: value.clone() for key, value in network.state_dict().items()}
    network.train()
    train, validation = image_bank(network, 60, 0), image_bank(network, 40, 1)
    create(name, noise=0.01).fit(train, Head.of(network), validation).score_samples(validation)
    assert not network.training
    for parameter in network.parameters():
        assert parameter.grad is None and not parameter.requires_grad
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key])
    assert not any(module._forward_hooks for module in network.modules())


def test_odin_needs_images_only_for_noise(train_bank, head, bank):
    detector = ODIN().fit(train_bank, head)
    assert detector.needs_images and detector.extra_passes == 3
    with pytest.raises(
        InputError, match=r"ODIN: found a bank without images, expected an ImageBank.*or set noise to 0\."
    ):
        detector.score_samples(bank)
    detector.noise = 0
    assert not detector.needs_images
    assert_allclose(detector.score_samples(bank), (bank.logits / 1000).softmax(1).amax(1), atol=1e-12)


# Mahalanobis at the last layer

H8 = ([[0, 0], [2, 1], [1, 2], [5, 4], [8, 6], [5, 5]], [0, 0, 0, 1, 1, 1])
V12 = ([[0, 0], [2, 0], [1, 3], [3, 5], [5, 4]], [0, 0, 1, 1, 1])
H8_QUERIES = [[1, 0], [3, 3], [6, 5], [10, -2]]


def labelled(example):
    features, labels = example
    head = Head(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    return make_bank(torch.tensor(features, dtype=torch.float64), head, torch.tensor(labels)), head


def gaussians_of(example):
    bank, head = labelled(example)
    return Mahalanobis().fit(bank, head).gaussians_


@pytest.mark.parametrize(
    ("example", "means", "precision", "queries", "expected"),
    [
        (
            *(H8, [[1, 1], [6, 5]], [[1.5, -1.5], [-1.5, 3]], H8_QUERIES),
            [[-1.5, -18.75], [-3, -3.75], [-12.75, 0], [-114.75, -127.5]],
        ),
        (
            *(V12, [[1, 0], [3, 4]], [[0.625, -0.625], [-0.625, 3.125]], [[3, 3]]),
            [[-11.5625, -1.5625]],
        ),
    ],
)
def test_mahalanobis_vectors(example, means, precision, queries, expected):
    train, head = labelled(example)
    detector = Mahalanobis().fit(train, head)
    gaussians, queries = detector.gaussians_, torch.tensor(queries, dtype=torch.float64)
    whitening = gaussians.whitening
    assert_allclose(whitening @ whitening.T, precision, atol=1e-12)
    assert_allclose(gaussians.means, (torch.tensor(means) - gaussians.centre) @ whitening, atol=1e-12)
    assert_allclose(gaussians.log_densities(queries), expected, atol=1e-9)
    assert_allclose(detector.score_samples(make_bank(queries, head)), np.max(expected, axis=1), atol=1e-9)


def explicit_scores(train, features):
    """max_c -(f - mu_c)^T P (f - mu_c) / 2, one sample and class at a time, P by numpy's pseudo-inverse."""
    train_features, labels = train.features.double().numpy(), train.labels.numpy()
    means = np.stack([train_features[labels == c].mean(0) for c in range(labels.max() + 1)])
    residuals = train_features - means[labels]
    precision = np.linalg.pinv(residuals.T @ residuals / len(labels), hermitian=True)
    return [max(-(f - mu) @ precision @ (f - mu) / 2 for mu in means) for f in features.double().numpy()]


def test_mahalanobis_equals_the_explicit_inverse():
    train, head, bank = random_problem(5, 20, 30, train=100)
    scores = Mahalanobis().fit(split(train, 1, 60, 39), head).score_samples(split(bank, 11, 19))
    assert_allclose(scores, explicit_scores(train, bank.features), rtol=1e-9)


def test_features_that_do_not_vary_within_the_classes_have_no_part():
    """A dead feature, a sum of two others, and one that only tells the classes apart."""
    train, head, bank = random_problem(4, 10, 15, train=80)

    def extend(part, between):
        extra = [torch.full((len(part), 1), 3.0), part.features[:, :1] + part.features[:, 1:2], between]
        return torch.cat([part.features, *extra], dim=1)

    wide_head = Head(torch.zeros(4, 13, dtype=torch.float64), head.bias)
    wide_train = make_bank(extend(train, train.labels[:, None].double()), wide_head, train.labels)
    wide = make_bank(extend(bank, torch.ones(15, 1, dtype=torch.float64)), wide_head)
    detector = Mahalanobis().fit(wide_train, wide_head)
    assert detector.gaussians_.whitening.shape == (13, 10)
    assert_allclose(detector.score_samples(wide), explicit_scores(train, bank.features), rtol=1e-9)


def test_features_that_do_not_vary_within_any_class_are_refused(train_bank, head):
    with pytest.raises(InputError, match="do not vary within the classes"):
        Mahalanobis().fit(train_bank, head)


def test_far_features_cost_no_digits():
    train, head, bank = random_problem(4, 10, 15, train=80)
    expected = Mahalanobis().fit(train, head).score_samples(bank)
    far_train = make_bank(train.features + 1e6, head, train.labels)
    scores = Mahalanobis().fit(far_train, head).score_samples(make_bank(bank.features + 1e6, head))
    assert_allclose(scores, expected, rtol=1e-6)


def test_mahalanobis_scores_are_float64():
    train, head, bank = random_problem(5, 20, 30, train=100)
    train, bank = cast(train, torch.float32), cast(bank, torch.float32)
    scores = Mahalanobis().fit(train, head.to(torch.float32)).score_samples(bank)
    assert scores.dtype == torch.float64
    assert_allclose(scores, explicit_scores(train, bank.features), rtol=1e-9)


@pytest.mark.parametrize("cls", [Mahalanobis, MahalanobisEnsemble])
def test_class_means_need_labelled_images_of_every_class(cls, problem):
    train, head, validation, _ = problem
    bank = train.bank
    with pytest.raises(InputError, match="no training image of class 2, expected at least one of each"):
        cls().fit(replace(bank, labels=bank.labels % 2), head, validation)
    with pytest.raises(InputError, match="no labels"):
        cls().fit(replace(bank, labels=None), head, validation)
    bank.features[7, 2] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinite training features \(first: sample 7\)"):
        cls().fit(bank, head, validation)


# Mahalanobis over several layers


@pytest.mark.parametrize(
    ("example", "queries", "noise", "expected"),
    [
        # The third query of the sheet is a mean and has a test of its own: here rounding would decide its gradient.
        (H8, [[1, 0], [3, 3], [10, -2]], 0.1, [-1.0875, -2.7075, -110.7375]),
        (V12, [[3, 3]], 0.01, [-1.525250]),
    ],
)
def test_a_step_towards_the_nearest_class(example, queries, noise, expected):
    pixels = torch.tensor(queries, dtype=torch.float64)[:, None, None]
    layers = {"a": gaussians_of(example), "b": gaussians_of(example)}
    scores = layer_scores(LinearNetwork([[1, 0], [0, 1]]), pixels, layers, (noise, 0.0))
    assert scores.shape == (2, len(queries), 2)
    for layer in (0, 1):
        assert_allclose(scores[0, :, layer], expected, atol=1e-9)
    plain = layers["a"].log_densities(pixels.flatten(1)).amax(1)
    assert_allclose(scores[1, :, 0], plain, atol=1e-12)


def test_a_step_from_a_class_mean_goes_where_a_zero_gradient_counts_as_positive():
    mean = torch.tensor([[6.0, 5.0]], dtype=torch.float64)
    moved = step_by_sign(mean, torch.zeros_like(mean), -0.1)
    assert_allclose(gaussians_of(H8).log_densities(moved).amax(1), [-0.0075], atol=1e-12)


def test_the_score_is_the_log_odds_of_being_in():
    """S ranks as the paper's -P(out | M) and keeps apart what saturates there."""
    regression = _Regression(0.0, torch.tensor([-0.8], dtype=torch.float64), -1.5)
    scores = regression.score(torch.tensor([[-1.5], [-3], [0], [-114.75], [-115]], dtype=torch.float64))
    probabilities = -torch.sigmoid(-scores)
    assert_allclose(probabilities, [-0.425557, -0.710950, -0.182426, -1, -1], atol=1e-6)
    assert probabilities[3] == probabilities[4] and scores[3] > scores[4]


def test_adversarial_copies_stay_in_the_range_of_pixels():
    centred = torch.tensor([-0.9, -0.2, -0.03, 0, 0.02, 0.5, 0.98], dtype=torch.float64)
    signs = torch.tensor([1, -1, 1, 1, -1, 1, 1])
    moved = 2 * fgsm((centred + 1) / 2, signs, 0.025) - 1
    assert_allclose(moved, [-0.85, -0.25, 0.02, 0.05, -0.03, 0.55, 1], atol=1e-12)
    pixels = torch.tensor([0.02, 0.5, 0.97], dtype=torch.float64)
    assert_allclose(fgsm(pixels, torch.tensor([-1, 0, 2]), 0.05), [0, 0.55, 1], atol=1e-12)


@pytest.fixture
def problem(network):
    """(training bank, head, validation bank, bank): 60, 41 and 23 images."""
    banks = [image_bank(network, count, seed) for seed, count in enumerate((60, 41, 23))]
    return banks[0], Head.of(network), banks[1], banks[2]


def loop_scores(network, train, pixels, noise):
    """M_l [N, 3] one image and layer at a time, with numpy's inverse covariance."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (TRANSFORM.mean, TRANSFORM.std))

    def outputs(x):
        stem = network.stem((x - mean) / std)
        deep = network.deep(stem.clone().relu())
        pooled = [stem.mean((2, 3)), deep.mean((2, 3)), nn.functional.gelu(deep).mean((2, 3))]
        return [layer[0].double() for layer in pooled]

    bank = train.bank
    columns = []
    for index, features in enumerate((bank.taps["stem"], bank.taps["deep"], bank.features)):
        features, labels = features.double(), bank.labels
        means = torch.stack([features[labels == c].mean(0) for c in range(3)])
        residuals = features - means[labels]
        precision = torch.linalg.inv(residuals.T @ residuals / len(labels))

        def nearest(x, index=index, means=means, precision=precision):
            f = outputs(x)[index]
            return torch.stack([-(f - mu) @ precision @ (f - mu) / 2 for mu in means]).max()

        column = []
        for image in pixels:
            x = image[None].clone().requires_grad_()
            (-nearest(x)).backward()
            column.append(float(nearest(x.detach() - noise * x.grad.sign()).detach()))
        columns.append(column)
    return torch.tensor(columns, dtype=torch.float64).T


def all_pixels(bank):
    return torch.cat(list(bank.batches(0, len(bank)))) / 255


@pytest.mark.parametrize("noise", [0.0, 0.004])
def test_the_ensemble_equals_a_loop_over_images(noise, network, problem):
    train, head, validation, bank = problem
    detector = MahalanobisEnsemble(noise=noise).fit(train, head, validation)
    assert detector.layers_ == LAYERS
    scores = detector.score_samples(bank)
    assert scores.dtype == torch.float64
    layers = loop_scores(network, train, all_pixels(bank), noise)
    expected = -(layers @ detector.weights_) - detector.intercept_
    assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)
    assert_allclose(detector.score_samples(shards_of(bank, 9, 14)), scores, rtol=1e-5, atol=1e-5)
    assert_allclose(
        scores,
        MahalanobisEnsemble(noise=noise)
        .fit(shards_of(train, 50, 10), head, shards_of(validation, 1, 40))
        .score_samples(bank),
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_regression_is_trained_on_every_other_validation_image(network, problem):
    train, head, validation, _ = problem
    detector = MahalanobisEnsemble(noise=0.002).fit(train, head, validation)
    pixels, labels = all_pixels(validation), validation.bank.labels
    mean, std = (torch.tensor(values)[:, None, None] for values in (TRANSFORM.mean, TRANSFORM.std))
    x = pixels.clone().requires_grad_()
    nn.functional.cross_entropy(network((x - mean) / std), labels).backward()
    copies = (pixels + 0.025 * x.grad.sign()).clamp(0, 1)
    inside, outside = (loop_scores(network, train, part[::2], 0.002) for part in (pixels, copies))
    expected = _Regression.fit(0.002, inside, outside)
    assert_allclose(detector.weights_, expected.weights, rtol=1e-2)
    assert detector.intercept_ == pytest.approx(expected.intercept, rel=1e-2)
    # It is a regression for "out": copies score lower.
    assert expected.score(outside).mean() < expected.score(inside).mean()


def test_the_regression_does_not_depend_on_the_scale_of_a_layer():
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    outside = torch.randn(40, 3, dtype=torch.float64, generator=generator) - 1
    scale = torch.tensor([1, 1e3, 1e-3], dtype=torch.float64)
    plain = _Regression.fit(0.0, inside, outside)
    scaled = _Regression.fit(0.0, inside * scale - 5e4, outside * scale - 5e4)
    assert_allclose(scaled.weights * scale, plain.weights, rtol=1e-4)
    assert_allclose(scaled.score(inside * scale - 5e4), plain.score(inside), rtol=1e-4, atol=1e-4)


def test_the_noise_of_least_fpr_on_the_second_half_is_chosen(problem):
    train, head, validation, bank = problem
    grid = (0.0, 0.001, 0.01, 0.03, 0.001)
    detector = MahalanobisEnsemble(noise_grid=grid).fit(train, head, validation)
    assert detector.tuned_on == "ID validation (41 images) against FGSM copies of them"
    fprs = []
    for noise in grid:
        fixed = MahalanobisEnsemble(noise=noise).fit(train, head, validation)
        inside, outside = fixed._validation_scores((noise,))
        score = fixed._regression().score
        fprs.append(fpr_at_tpr(score(inside[0, 20:]), score(outside[0, 20:])))
    assert min(fprs) < max(fprs)
    assert detector.noise_ == grid[int(np.argmin(fprs))]
    fixed = MahalanobisEnsemble(noise=detector.noise_).fit(train, head, validation)
    assert_array_equal(fixed.score_samples(bank), detector.score_samples(bank))


def test_equal_noises_are_a_tie_that_the_first_wins(problem):
    train, head, validation, _ = problem
    detector = MahalanobisEnsemble(noise_grid=(1e-12, 0.0, 2e-12)).fit(train, head, validation)
    assert detector.noise_ == 1e-12


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", ("features", "stem")),
        ("layers", ["deep"]),
        ("noise", 0.0),
        ("noise", 0.05),
        ("noise_grid", [0.03]),
        ("outlier_step", 0.2),
    ],
)
def test_a_field_changed_after_fit_changes_the_score_at_once(field, value, problem):
    train, head, validation, bank = problem
    settings = {"noise_grid": (0.004,)}
    detector = MahalanobisEnsemble(**settings).fit(train, head, validation)
    before, original = detector.score_samples(bank), getattr(detector, field)
    setattr(detector, field, value)
    fresh = MahalanobisEnsemble(**{**settings, field: value}).fit(train, head, validation)
    assert_allclose(detector.score_samples(bank), fresh.score_samples(bank), atol=0)
    assert (detector.score_samples(bank) - before).abs().max() > 1e-3
    assert (
        detector.extra_passes == fresh.extra_passes == (0 if value == 0.0 else 1 + 2 * len(detector.layers_))
    )
    setattr(detector, field, original)
    assert_allclose(detector.score_samples(bank), before, atol=0)


def test_without_noise_the_taps_are_scored_and_no_image_is_read(problem):
    train, head, validation, bank = problem
    detector = MahalanobisEnsemble(noise_grid=(0.0,)).fit(train, head, validation)
    assert detector.needs_images and detector.extra_passes == 0 and detector.noise_ == 0
    from_taps = detector.score_samples(bank.bank)
    assert_array_equal(detector.score_samples(bank), from_taps)
    assert not MahalanobisEnsemble(noise=0).needs_images
    detector.noise = 1e-9
    assert_allclose(detector.score_samples(bank), from_taps, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match=r"found a bank without images.*or set noise to 0\."):
        detector.score_samples(bank.bank)


def test_without_taps_the_ensemble_is_the_last_layer(network):
    train, validation, bank = (image_bank(network, n, n, taps=()) for n in (60, 40, 20))
    head = Head.of(network)
    detector = MahalanobisEnsemble(noise=0.0).fit(train, head, validation)
    assert detector.layers_ == ("features",) and detector.weights_ < 0
    plain = Mahalanobis().fit(train, head).score_samples(bank)
    assert_allclose(detector.score_samples(bank), -plain * detector.weights_ - detector.intercept_, atol=1e-9)


def test_what_the_ensemble_costs():
    assert MahalanobisEnsemble().extra_passes == 3
    assert MahalanobisEnsemble(layers=["a", "b", "c"], noise=0.1).extra_passes == 7
    assert MahalanobisEnsemble(noise=0).extra_passes == 0
    assert MahalanobisEnsemble().needs_validation


def test_hyperparameters_survive_json():
    detector = MahalanobisEnsemble(layers=["stem", "features"], noise_grid=[0.0, 0.001])
    stored = json.loads(json.dumps(detector.hyperparameters()))
    assert create("mahalanobis_ensemble", **stored) == detector
    assert detector == MahalanobisEnsemble(layers=("stem", "features"), noise_grid=(0.0, 0.001))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "stem"}, "layers is 'stem', expected a list of names or None"),
        ({"layers": []}, r"layers is \[\], expected a list of names"),
        ({"noise": -0.1}, "noise is -0.1, expected a number from 0 to 1"),
        ({"noise_grid": []}, r"noise_grid is \[\], expected a list of numbers from 0 to 1"),
        ({"noise_grid": [0.1, 2]}, r"noise_grid is \[0.1, 2\], expected"),
        ({"noise_grid": 0.1}, "noise_grid is 0.1, expected"),
        ({"outlier_step": 0}, "outlier_step is 0, expected a number above 0 to 1"),
    ],
)
def test_hyperparameters_out_of_range(settings, message):
    with pytest.raises(InputError, match=rf"Mahalanobis \(ensemble\): {message}"):
        MahalanobisEnsemble(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature is 0, expected a number above 0"),
        ({"noise": 2}, "noise is 2, expected a number from 0 to 1"),
    ],
)
def test_odin_out_of_range(settings, message):
    with pytest.raises(InputError, match=f"ODIN: {message}"):
        ODIN(**settings)


def test_what_the_ensemble_cannot_be_fitted_with(problem):
    train, head, validation, bank = problem
    detector = MahalanobisEnsemble(noise=0)
    with pytest.raises(InputError, match="no validation bank"):
        detector.fit(train, head)
    with pytest.raises(InputError, match=r"found a bank without images, .*give one as validation bank"):
        detector.fit(train, head, validation.bank)
    unlabelled = FeatureBank(validation.bank.features, validation.bank.logits)
    with pytest.raises(InputError, match="the validation bank has no labels"):
        detector.fit(train, head, ImageBank(unlabelled, validation.network, validation.batches))
    few = FeatureBank(validation.bank.features[:9], validation.bank.logits[:9], validation.bank.labels[:9])
    with pytest.raises(InputError, match="validation bank has 9 images, expected at least 10"):
        detector.fit(train, head, ImageBank(few, validation.network, validation.batches))
    message = (
        "found no layer 'block1' in the bank, expected one of stem, deep, features; add it to features.taps"
    )
    with pytest.raises(InputError, match=message):
        MahalanobisEnsemble(layers=["block1"]).fit(train, head, validation)
    with pytest.raises(InputError, match="found no layer 'stem' in the bank, expected one of features"):
        untapped = FeatureBank(bank.bank.features, bank.bank.logits)
        detector.fit(train, head, validation).score_samples(untapped)


@pytest.mark.parametrize("attribute", ["layers_", "weights_", "intercept_", "noise_"])
def test_an_unfitted_ensemble(attribute):
    with pytest.raises(InputError, match="is not fitted"):
        getattr(MahalanobisEnsemble(), attribute)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["odin", "mahalanobis", "mahalanobis_ensemble"])
def test_cuda_agrees_with_the_cpu(name, network):
    settings = {} if name == "mahalanobis" else {"noise": 0.01}
    scores = []
    for device in ("cpu", "cuda"):
        train, validation, bank = (image_bank(network, n, n, device) for n in (60, 40, 20))
        detector = create(name, **settings).fit(train, Head.of(network), validation)
        scores.append(detector.score_samples(bank))
    assert scores[1].is_cuda
    # A gradient next to 0 may take its sign from rounding, and its pixel another step.
    assert_allclose(scores[1].cpu(), scores[0], rtol=1e-2, atol=1e-2)
