"""ReAct against the vectors, and its two rules for the clip value."""

import numpy as np
import pytest
from detector_examples import logsumexp, random_problem, split
from numpy.testing import assert_allclose

from ood_helpers.detectors import variants
from ood_helpers.detectors.react import ReAct
from ood_helpers.errors import InputError


def test_vectors(train_bank, head, bank):
    expected = [1.816770, 1.642819, 1.783261, 1.657965]
    assert_allclose(ReAct(clip=1.0).fit(train_bank, head).score_samples(bank), expected, atol=1e-6)


@pytest.mark.parametrize("percentile", [0, 10, 62.5, 90, 99, 100])
def test_the_clip_value_is_the_percentile_of_all_training_activations(percentile):
    train, head, bank = random_problem(3, 17, 20)
    clip = np.percentile(train.features.numpy(), percentile)
    detector = ReAct(percentile=percentile).fit(split(train, 4, 11), head)
    assert detector.clip_value() == pytest.approx(clip, abs=1e-12)
    assert detector.learned == {"clip": detector.clip_value()}
    expected = logsumexp(head.logits(bank.features.clamp(max=clip)))
    assert_allclose(detector.score_samples(bank), expected, atol=1e-9)


def test_one_rule_is_taken():
    assert ReAct().hyperparameters() == {"percentile": 90.0, "clip": None}
    assert ReAct(clip=1.0).hyperparameters() == {"percentile": None, "clip": 1.0}
    with pytest.raises(InputError, match=r"found both \(80 and 1.0\)"):
        ReAct(percentile=80, clip=1.0)


def test_two_rules_set_later_are_refused(train_bank, head, bank):
    detector = ReAct().fit(train_bank, head)
    detector.clip = 1.0
    with pytest.raises(InputError, match="found both"):
        detector.score_samples(bank)
    detector.percentile = None
    assert detector.clip_value() == 1.0
    detector.clip = None
    with pytest.raises(InputError, match="found neither"):
        detector.clip_value()


def test_a_grid_over_one_rule_switches_the_other_off(train_bank, head):
    (_, by_clip), (_, off) = variants(ReAct(percentile=80).fit(train_bank, head), {"clip": [1.0, 2.0]})
    assert by_clip.hyperparameters() == {"percentile": None, "clip": 1.0} and off.clip_value() == 2.0
    ((_, by_percentile),) = variants(ReAct(clip=1.0), {"percentile": [80]})
    assert by_percentile.hyperparameters() == {"percentile": 80, "clip": None}
    with pytest.raises(InputError, match="found both"):
        variants(ReAct(), {"percentile": [80], "clip": [1.0]})
