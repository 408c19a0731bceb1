"""MSP, MaxLogit, Energy, ReAct and DICE against the vectors."""

import numpy as np
import pytest
import torch
from detector_examples import make_bank, random_problem, split
from numpy.testing import assert_allclose

from ood_helpers.detectors import DICE, MSP, Energy, MaxLogit, ReAct, energy_score
from ood_helpers.errors import InputError
from ood_helpers.features import FeatureBank

VECTORS = {
    "MSP": (MSP(), [0.623568, 0.627508, 0.402659, 0.515096]),
    "MaxLogit": (MaxLogit(), [1.56, 1.23, 1.39, 1.29]),
    "Energy": (Energy(), [2.032298, 1.695999, 2.299664, 1.953401]),
    "ReAct": (ReAct(clip=1.0), [1.816770, 1.642819, 1.783261, 1.657965]),
    "DICE": (DICE(percentile=50), [2.168079, 1.848494, 2.651370, 2.066643]),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name, train_bank, head, bank):
    detector, expected = VECTORS[name]
    assert_allclose(detector.fit(train_bank, head).score_samples(bank), expected, atol=1e-6)


def test_logits_of_the_example(bank):
    expected = [[1.56, -0.28, 0.75], [0.04, 1.23, -0.01], [1.39, 1.04, 1.14], [1.03, -0.48, 1.29]]
    assert_allclose(bank.logits, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("logits", "msp", "energies"),
    [
        ([2, 0.5, -1], 0.785597, {1: 2.241311, 2: 3.055951, 1000: 1099.113039}),
        ([0.1, 1.2, 0.3], 0.574897, {1: 1.753564, 2: 2.790124, 1000: 1099.145736}),
    ],
)
def test_scores_of_logits_at_several_temperatures(logits, msp, energies, train_bank, head):
    logits = torch.tensor([logits], dtype=torch.float64)
    bank = FeatureBank(torch.zeros(1, 4, dtype=torch.float64), logits)
    assert float(MSP().fit(train_bank, head).score_samples(bank)) == pytest.approx(msp, abs=1e-6)
    for temperature, energy in energies.items():
        detector = Energy(temperature=temperature).fit(train_bank, head)
        assert float(detector.score_samples(bank)) == pytest.approx(energy, abs=1e-6)
        assert float(energy_score(logits, temperature)) == pytest.approx(energy, abs=1e-6)


def test_msp_keeps_confident_samples_apart(train_bank, head):
    """In float32 softmax each of these is exactly 1."""
    logits = torch.tensor([[18.0, 0, 0], [20, 0, 0], [25, 0, 0], [30, 0, 0]])
    scores = MSP().fit(train_bank, head).score_samples(FeatureBank(torch.zeros(4, 4), logits))
    assert (scores.diff() > 0).all()
    assert (logits.softmax(1).amax(1) == 1).all()


@pytest.mark.parametrize("percentile", [0, 10, 62.5, 90, 99, 100])
def test_react_clips_at_the_percentile_of_all_training_activations(percentile):
    train, head, bank = random_problem(3, 17, 20)
    clip = np.percentile(train.features.numpy(), percentile)
    detector = ReAct(percentile=percentile).fit(split(train, 4, 11), head)
    assert detector.clip_value() == pytest.approx(clip, abs=1e-12)
    expected = np.logaddexp.reduce(head.logits(bank.features.clamp(max=clip)).numpy(), axis=1)
    assert_allclose(detector.score_samples(bank), expected, atol=1e-9)


def test_react_takes_one_rule():
    assert ReAct().hyperparameters() == {"percentile": 90.0, "clip": None}
    assert ReAct(clip=1.0).hyperparameters() == {"percentile": None, "clip": 1.0}
    with pytest.raises(InputError, match=r"found both \(80 and 1.0\)"):
        ReAct(percentile=80, clip=1.0)


def test_react_refuses_two_rules_set_later(train_bank, head, bank):
    detector = ReAct().fit(train_bank, head)
    detector.clip = 1.0
    with pytest.raises(InputError, match="found both"):
        detector.score_samples(bank)
    detector.percentile = None
    assert detector.clip_value() == 1.0
    detector.clip = None
    with pytest.raises(InputError, match="found neither"):
        detector.clip_value()


def test_dice_mask_is_strict_and_signed(train_bank, head):
    detector = DICE(percentile=50).fit(train_bank, head)
    contributions = head.weight.numpy() * train_bank.features.numpy().mean(0)
    assert_allclose(detector.contributions_, contributions, atol=1e-12)
    assert np.percentile(contributions, 50) == pytest.approx(0.17)
    np.testing.assert_array_equal(detector.mask(), contributions > np.percentile(contributions, 50))


def test_dice_averages_over_samples_not_over_classes(head):
    """Classes of unequal size: the mean feature weighs every training image the same."""
    features = torch.rand(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    train = make_bank(features, head, torch.tensor([0] * 7 + [1, 2]))
    detector = DICE().fit(split(train, 2, 6, 1), head)
    assert_allclose(detector.contributions_, head.weight * features.mean(0), atol=1e-12)


def test_dice_mask_at_ties_of_the_percentile(head):
    """Four equal contributions are the largest of twelve: a percentile that hits them prunes them all."""
    head.weight[0] = 2.0
    train = make_bank(torch.ones(3, 4, dtype=torch.float64), head, torch.arange(3))
    detector = DICE(percentile=65).fit(train, head)
    np.testing.assert_array_equal(detector.mask(), head.weight == 2.0)
    detector.percentile = 75
    assert not detector.mask().any()
