"""DICE and DICE + ReAct against the vectors, and the mask of DICE."""

import numpy as np
import pytest
import torch
from detector_examples import logsumexp, make_bank, random_problem, split, tensor
from numpy.testing import assert_allclose, assert_array_equal

from ood_helpers.banks import Head
from ood_helpers.detectors.dice import DICE, DICEReAct


def test_vectors(train_bank, head, bank):
    expected = [2.168079, 1.848494, 2.651370, 2.066643]
    assert_allclose(DICE(percentile=50).fit(train_bank, head).score_samples(bank), expected, atol=1e-6)


def test_the_mask_is_strict_and_signed(train_bank, head):
    detector = DICE(percentile=50).fit(train_bank, head)
    contributions = head.weight.numpy() * train_bank.features.numpy().mean(0)
    assert_allclose(detector.contributions_, contributions, atol=1e-12)
    assert np.percentile(contributions, 50) == pytest.approx(0.17)
    assert_array_equal(detector.mask(), contributions > np.percentile(contributions, 50))


def test_the_mean_is_over_samples_not_over_classes(head):
    """Classes of unequal size: the mean feature weighs every training image the same."""
    features = torch.rand(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    train = make_bank(features, head, torch.tensor([0] * 7 + [1, 2]))
    detector = DICE().fit(split(train, 2, 6, 1), head)
    assert_allclose(detector.contributions_, head.weight * features.mean(0), atol=1e-12)


def test_the_mask_at_ties_of_the_percentile(head):
    """Four equal contributions are the largest of twelve: a percentile that hits them prunes them all."""
    head.weight[0] = 2.0
    train = make_bank(torch.ones(3, 4, dtype=torch.float64), head, torch.arange(3))
    detector = DICE(percentile=65).fit(train, head)
    assert_array_equal(detector.mask(), head.weight == 2.0)
    detector.percentile = 75
    assert not detector.mask().any()


def test_the_second_sheet():
    """Its head, mean feature, and a sample with a negative entry."""
    weight = tensor([[0.5, -1, 2, 0.1], [1.5, 0.3, -0.7, 0.2], [-0.4, 0.8, 0.6, -1.2]])
    head = Head(weight, tensor([0.1, 0, -0.1]))
    train = make_bank(tensor([[0.5, 1, 0.2, 0.8]]), head, torch.tensor([0]))
    detector = DICE(percentile=90).fit(train, head)
    assert detector.mask().nonzero().tolist() == [[1, 0], [2, 1]]
    detector.percentile = 50
    assert detector.mask().int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 1], [0, 1, 0, 0]]
    scores = detector.score_samples(make_bank(tensor([[1, 2, -1, 0.5]]), head))
    assert_allclose(scores, logsumexp([[-1.4, 2.2, 1.5]]), atol=1e-12)


def test_dice_react_clips_the_scored_features_only():
    train, head, bank = random_problem(5, 20, 30)
    detector = DICEReAct(percentile=40, clip=0.7).fit(train, head)
    contributions = head.weight.numpy() * train.features.numpy().mean(0)
    kept = contributions > np.percentile(contributions, 40)
    assert_array_equal(detector.mask(), kept)
    clipped = np.minimum(bank.features.numpy(), 0.7)
    expected = logsumexp(clipped @ (head.weight.numpy() * kept).T + head.bias.numpy())
    assert_allclose(detector.score_samples(bank), expected, atol=1e-12)
    unclipped = DICE(percentile=40).fit(train, head).score_samples(bank)
    assert (detector.score_samples(bank) - unclipped).abs().max() > 0.01


def test_dice_react_has_the_settings_of_imagenet():
    assert DICEReAct().hyperparameters() == {"percentile": 10.0, "clip": 1.0}
