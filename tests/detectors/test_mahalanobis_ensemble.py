"""Mahalanobis over several layers: the vectors, a loop over images, and what it tunes itself."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from detector_examples import tensor
from gaussian_examples import TWO_CLASSES, TWO_CLASSES_UNEVEN, gaussians_of
from numpy.testing import assert_allclose, assert_array_equal
from pixel_examples import (
    LAYERS,
    LinearNetwork,
    all_pixels,
    given_pixels,
    image_bank,
    normalised,
    shards_of,
)
from torch import nn

from ood_helpers.backbones.pixels import fgsm, step_by_sign
from ood_helpers.banks import FeatureBank, Head, ImageBank
from ood_helpers.detectors import create
from ood_helpers.detectors.mahalanobis import Mahalanobis
from ood_helpers.detectors.mahalanobis_ensemble import (
    MahalanobisEnsemble,
    OutlierRegression,
    adversarial_copies,
    layer_scores,
)
from ood_helpers.errors import InputError
from ood_helpers.metrics import fpr_at_tpr


@pytest.fixture
def problem(network):
    """(training bank, head, validation bank, bank): 60, 41 and 23 images."""
    banks = [image_bank(network, count, seed) for seed, count in enumerate((60, 41, 23))]
    return banks[0], Head.of(network), banks[1], banks[2]


# ---- its parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "queries", "noise", "expected"),
    [
        # The third query of the sheet is a mean and has a test of its own: here rounding would decide its gradient.
        (TWO_CLASSES, [[1, 0], [3, 3], [10, -2]], 0.1, [-1.0875, -2.7075, -110.7375]),
        (TWO_CLASSES_UNEVEN, [[3, 3]], 0.01, [-1.525250]),
    ],
)
def test_a_step_towards_the_nearest_class(example, queries, noise, expected):
    pixels = tensor(queries)[:, None, None]
    layers = {"a": gaussians_of(example), "b": gaussians_of(example)}
    scores = layer_scores(LinearNetwork([[1, 0], [0, 1]]), pixels, layers, (noise, 0.0))
    assert scores.shape == (2, len(queries), 2)
    for layer in (0, 1):
        assert_allclose(scores[0, :, layer], expected, atol=1e-9)
    plain = layers["a"].log_densities(pixels.flatten(1)).amax(1)
    assert_allclose(scores[1, :, 0], plain, atol=1e-12)


def test_a_step_from_a_class_mean_goes_where_a_zero_gradient_counts_as_positive():
    mean = tensor([[6, 5]])
    moved = step_by_sign(mean, torch.zeros_like(mean), -0.1)
    assert_allclose(gaussians_of(TWO_CLASSES).log_densities(moved).amax(1), [-0.0075], atol=1e-12)


def test_adversarial_copies_stay_in_the_range_of_pixels():
    centred = tensor([-0.9, -0.2, -0.03, 0, 0.02, 0.5, 0.98])
    signs = torch.tensor([1, -1, 1, 1, -1, 1, 1])
    moved = 2 * fgsm((centred + 1) / 2, signs, 0.025) - 1
    assert_allclose(moved, [-0.85, -0.25, 0.02, 0.05, -0.03, 0.55, 1], atol=1e-12)
    pixels = tensor([0.02, 0.5, 0.97])
    assert_allclose(fgsm(pixels, torch.tensor([-1, 0, 2]), 0.05), [0, 0.55, 1], atol=1e-12)


def test_the_score_is_the_log_odds_of_being_in():
    """S ranks as the paper's -P(out | M) and keeps apart what saturates there."""
    regression = OutlierRegression(0.0, tensor([-0.8]), -1.5)
    scores = regression.score(tensor([[-1.5], [-3], [0], [-114.75], [-115]]))
    probabilities = -torch.sigmoid(-scores)
    assert_allclose(probabilities, [-0.425557, -0.710950, -0.182426, -1, -1], atol=1e-6)
    assert abs(probabilities[3] - probabilities[4]) < 1e-15 and scores[3] > scores[4] + 0.1


def test_the_regression_does_not_depend_on_the_scale_of_a_layer():
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    outside = torch.randn(40, 3, dtype=torch.float64, generator=generator) - 1
    scale = tensor([1, 1e3, 1e-3])
    plain = OutlierRegression.fit(0.0, inside, outside)
    scaled = OutlierRegression.fit(0.0, inside * scale - 5e4, outside * scale - 5e4)
    assert_allclose(scaled.weights * scale, plain.weights, rtol=1e-4)
    assert_allclose(scaled.score(inside * scale - 5e4), plain.score(inside), rtol=1e-4, atol=1e-4)


# ---- the whole ------------------------------------------------------------------------------------------


def loop_scores(network, train, pixels, noise):
    """M_l [N, 3] one image and layer at a time, with an explicit inverse of the covariance."""

    def outputs(x):
        stem = network.stem(normalised(x))
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


@pytest.mark.parametrize("noise", [0.0, 0.004])
def test_the_ensemble_equals_a_loop_over_images(noise, network, problem):
    train, head, validation, bank = problem
    detector = MahalanobisEnsemble(noise=noise).fit(train, head, validation)
    assert detector.layers_ == LAYERS
    scores = detector.score_samples(bank)
    assert scores.dtype == torch.float64
    layers = loop_scores(network, train, all_pixels(bank), noise)
    expected = -(layers @ detector.regression_.weights) - detector.regression_.intercept
    assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)
    assert_allclose(detector.score_samples(shards_of(bank, 9, 14)), scores, rtol=1e-5, atol=1e-5)
    of_shards = shards_of(train, 50, 10), head, shards_of(validation, 1, 40)
    found = MahalanobisEnsemble(noise=noise).fit(*of_shards).score_samples(bank)
    assert_allclose(scores, found, rtol=1e-5, atol=1e-5)


def test_the_regression_is_trained_on_every_other_validation_image(network, problem):
    train, head, validation, _ = problem
    detector = MahalanobisEnsemble(noise=0.002).fit(train, head, validation)
    pixels, labels = all_pixels(validation), validation.bank.labels
    x = pixels.clone().requires_grad_()
    nn.functional.cross_entropy(network(normalised(x)), labels).backward()
    copies = (pixels + 0.025 * x.grad.sign()).clamp(0, 1)
    inside, outside = (loop_scores(network, train, part[::2], 0.002) for part in (pixels, copies))
    expected = OutlierRegression.fit(0.002, inside, outside)
    assert_allclose(detector.regression_.weights, expected.weights, rtol=1e-2)
    assert detector.regression_.intercept == pytest.approx(expected.intercept, rel=1e-2)
    # It is a regression for "out": copies score lower.
    assert expected.score(outside).mean() < expected.score(inside).mean()


def test_the_noise_of_least_fpr_on_the_other_images_is_chosen(problem):
    train, head, validation, bank = problem
    grid = (0.03, 0.001, 0.0, 0.01, 0.001)
    detector = MahalanobisEnsemble(noise_grid=grid).fit(train, head, validation)
    assert detector.needs_validation and detector.tuned_against == "FGSM copies of them"
    pixels, labels = all_pixels(validation), validation.bank.labels
    copies = adversarial_copies(validation.network, pixels, labels, detector.outlier_step)
    outliers = given_pixels(validation.network, copies, labels)
    fixed = {noise: MahalanobisEnsemble(noise=noise).fit(train, head, validation) for noise in grid}
    fprs = []
    for noise in grid:
        inside, outside = (fixed[noise].score_samples(part)[1::2] for part in (validation, outliers))
        fprs.append(fpr_at_tpr(inside, outside))
    assert min(fprs) < max(fprs)
    assert detector.regression_.noise == grid[int(np.argmin(fprs))]
    expected = fixed[detector.regression_.noise].score_samples(bank)
    assert_allclose(detector.score_samples(bank), expected, rtol=1e-6)


def test_equal_noises_are_a_tie_that_the_first_wins(problem):
    train, head, validation, _ = problem
    detector = MahalanobisEnsemble(noise_grid=(1e-12, 0.0, 2e-12)).fit(train, head, validation)
    assert detector.regression_.noise == 1e-12


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
    assert_allclose(detector.score_samples(bank), fresh.score_samples(bank), rtol=1e-6)
    assert (detector.score_samples(bank) - before).abs().max() > 1e-3
    passes = 0 if value == 0.0 else 1 + 2 * len(detector.layers_)
    assert detector.extra_passes == fresh.extra_passes == passes
    setattr(detector, field, original)
    assert_allclose(detector.score_samples(bank), before, rtol=1e-6)


def test_without_noise_the_taps_are_scored_and_no_image_is_read(problem):
    train, head, validation, bank = problem
    detector = MahalanobisEnsemble(noise_grid=(0.0,)).fit(train, head, validation)
    assert detector.needs_images and detector.extra_passes == 0 and detector.regression_.noise == 0
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
    assert detector.layers_ == ("features",) and detector.regression_.weights < 0
    plain = Mahalanobis().fit(train, head).score_samples(bank)
    assert_allclose(
        detector.score_samples(bank),
        -plain * detector.regression_.weights - detector.regression_.intercept,
        atol=1e-9,
    )


def test_what_the_ensemble_costs():
    assert MahalanobisEnsemble().extra_passes == 3
    assert MahalanobisEnsemble(layers=["a", "b", "c"], noise=0.1).extra_passes == 7
    assert MahalanobisEnsemble(noise=0).extra_passes == 0
    assert MahalanobisEnsemble().needs_validation


# ---- what it takes --------------------------------------------------------------------------------------


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


def test_class_means_need_labelled_images_of_every_class(problem):
    train, head, validation, _ = problem
    bank = train.bank
    with pytest.raises(InputError, match="no training image of class 2, expected at least one of each"):
        MahalanobisEnsemble().fit(replace(bank, labels=bank.labels % 2), head, validation)
    with pytest.raises(InputError, match="no labels"):
        MahalanobisEnsemble().fit(replace(bank, labels=None), head, validation)
    bank.features[7, 2] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinite training features \(first: sample 7\)"):
        MahalanobisEnsemble().fit(bank, head, validation)


def test_banks_that_it_cannot_be_fitted_to(problem):
    train, head, validation, bank = problem
    detector = MahalanobisEnsemble(noise=0)
    with pytest.raises(InputError, match="no validation bank"):
        detector.fit(train, head)
    with pytest.raises(InputError, match=r"found a bank without images, .*give one as validation bank"):
        detector.fit(train, head, validation.bank)
    unlabelled = FeatureBank(validation.bank.features, validation.bank.logits)
    with pytest.raises(InputError, match="the validation bank has no labels"):
        detector.fit(train, head, ImageBank(unlabelled, validation.network, validation.batches))
    few = validation.bank.take(slice(9))
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


@pytest.mark.parametrize("attribute", ["layers_", "regression_", "learned"])
def test_an_unfitted_ensemble(attribute):
    with pytest.raises(InputError, match="is not fitted"):
        getattr(MahalanobisEnsemble(), attribute)
