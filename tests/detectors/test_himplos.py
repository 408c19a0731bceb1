"""HIMPLoS against the vectors, a per-sample loop and its ablations."""

import numpy as np
import pytest
import torch
from detector_examples import random_problem
from numpy.testing import assert_allclose, assert_array_equal

from ood_helpers.detectors.energy import Energy
from ood_helpers.detectors.himplos import HIMPLoS

COSINES = [0.982511, 0.979890, 0.718742, 0.943133]
HALF = [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]
VECTORS = {
    "50, 1.0": (
        {"percentile": 50, "clip": 1.0},
        [0.3, 0.2, 0.25],
        HALF,
        [
            [1.228139, -0.668108, 0.825309],
            [-0.107788, 1.215064, -0.195978],
            [0.790616, -0.402495, 0.452807],
            [0.792231, -0.622467, 0.792231],
        ],
        [1.826182, 1.627348, 1.492033, 1.600045],
    ),
    "60, 1.6": (
        {"percentile": 60, "clip": 1.6},
        [0.42, 0.44, 0.28],
        HALF,
        [
            [1.542543, -0.746709, 0.943211],
            [-0.137185, 1.303254, -0.176380],
            [1.135612, -0.488744, 0.582181],
            [1.075171, -0.848819, 1.188347],
        ],
        [2.043634, 1.684799, 1.707728, 1.893122],
    ),
    "0, none": (
        {"percentile": 0, "clip": None},
        [-0.3, -0.4, -0.5],
        np.ones((3, 4)),
        [[1.532718, -0.275103, 0.736883]],
        [2.012186, 1.680430, 1.959596, 1.895135],
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name, train_bank, head, bank):
    settings, row_percentiles, mask, logits, scores = VECTORS[name]
    detector = HIMPLoS(**settings).fit(train_bank, head)
    percentiles = np.percentile(head.weight, settings["percentile"], axis=1)
    assert_allclose(percentiles, row_percentiles, atol=1e-6)
    assert_array_equal(detector.mask(), np.array(mask, dtype=bool))
    assert_allclose(detector.prototype_cosines(bank), COSINES, atol=1e-6)
    assert_allclose(detector.smoothed_logits(bank)[: len(logits)], logits, atol=1e-6)
    assert_allclose(detector.score_samples(bank), scores, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"smoothing": False}, [1.842663, 1.642907, 1.696163, 1.638916]),
        ({"masking": False}, [1.801729, 1.628835, 1.589090, 1.621333]),
        (
            {"masking": False, "smoothing": False},
            [1.816770, 1.642819, 1.783261, 1.657965],
        ),  # clip only: ReAct at 1
    ],
)
def test_parts_alone(settings, expected, train_bank, head, bank):
    detector = HIMPLoS(percentile=50, clip=1.0, **settings).fit(train_bank, head)
    assert_allclose(detector.score_samples(bank), expected, atol=1e-6)


def test_nothing_switched_on_is_the_energy(train_bank, head, bank):
    detector = HIMPLoS(clip=None, masking=False, smoothing=False, temperature=2.0).fit(train_bank, head)
    energy = Energy(temperature=2.0).fit(train_bank, head)
    assert_allclose(detector.score_samples(bank), energy.score_samples(bank), atol=1e-12)


@pytest.mark.parametrize(("num_classes", "feature_dim", "samples"), [(7, 342, 40), (10, 5, 1), (2, 1, 8)])
@pytest.mark.parametrize("p", [0, 33, 60, 100])
def test_against_a_loop_over_samples(num_classes, feature_dim, samples, p):
    train, head, bank = random_problem(num_classes, feature_dim, samples)
    weight, bias = head.weight.numpy(), head.bias.numpy()
    expected = []
    for f in bank.features.numpy():
        k = np.argmax(weight @ f + bias)
        g = np.minimum(f * (weight[k] >= np.percentile(weight[k], p)), 1.6)
        prototype = train.features.numpy()[train.labels.numpy() == k].mean(0)
        cosine = prototype @ f / max(np.linalg.norm(prototype) * np.linalg.norm(f), 1e-8)
        expected.append(np.logaddexp.reduce((weight @ g + bias) * cosine))
    detector = HIMPLoS(percentile=p).fit(train, head)
    assert_allclose(detector.score_samples(bank), expected, atol=1e-9)


def test_masked_logits_do_not_depend_on_smoothing(train_bank, head, bank):
    on, off = (HIMPLoS(smoothing=smoothing).fit(train_bank, head) for smoothing in (True, False))
    assert_allclose(on.masked_logits(bank), off.masked_logits(bank), atol=0)
    assert_allclose(off.smoothed_logits(bank), off.masked_logits(bank), atol=0)
    assert_allclose(
        on.smoothed_logits(bank), on.masked_logits(bank) * on.prototype_cosines(bank)[:, None], atol=1e-12
    )


def test_mask_keeps_every_weight_equal_to_the_percentile(train_bank, head):
    head.weight[1] = torch.tensor([0.5, 0.5, -1, 0.5])
    detector = HIMPLoS(percentile=60).fit(train_bank, head)
    assert_array_equal(detector.mask()[1], [True, True, False, True])


def test_a_zero_feature_has_a_finite_score(train_bank, head, bank):
    bank.features[2] = 0.0
    scores = HIMPLoS().fit(train_bank, head).score_samples(bank)
    assert float(scores[2]) == pytest.approx(np.log(3), abs=1e-12)
