"""MOS: the sheet's vectors, no ties, the paper's form, and heads of the wrong kind."""

import pytest
import torch
from detector_examples import cast, make_bank, random_problem, split
from numpy.testing import assert_allclose

from ood_helpers.banks import FeatureBank
from ood_helpers.detectors.base import DETECTORS, create
from ood_helpers.errors import InputError
from ood_helpers.mos.detector import MOS
from ood_helpers.mos.groups import GroupHead, Groups, random_groups

SHEET = Groups(("a", "b"), ((0, 1, 2), (3, 4)))
LOGITS = torch.tensor(
    [[-2, 4, 1, 0, 3, -1, 0], [3, 0.5, 0, -0.5, 2, 0, -1], [2, 0, 0, 0, -1, 0.5, 3]], dtype=torch.float64
)


def score(logits, groups, dtype=torch.float64):
    """Scores of logits as if the head gave them."""
    features = torch.zeros(len(logits), 2, dtype=dtype)
    head = GroupHead(torch.zeros(groups.num_logits, 2, dtype=dtype), torch.zeros(groups.num_logits), groups)
    bank = FeatureBank(features, logits.to(dtype))
    return MOS().fit(bank, head).score_samples(bank)


def group_problem(classes=9, number=3, seed=0):
    """(training bank, head with a group softmax, bank)"""
    train, _, bank = random_problem(classes, 12, 40, seed=seed)
    groups, generator = random_groups(classes, number, seed), torch.Generator().manual_seed(seed)
    weight = torch.randn(groups.num_logits, 12, generator=generator, dtype=torch.float64)
    head = GroupHead(weight, torch.randn(groups.num_logits, generator=generator, dtype=torch.float64), groups)
    return make_bank(train.features, head, train.labels), head, make_bank(bank.features, head)


def test_scores_of_the_sheet():
    """H1: S' = max_k g_k, and the paper's -min_k p(others) = -1 / (1 + exp S')."""
    scores = score(LOGITS, SHEET)
    assert scores.tolist() == pytest.approx([6.065884, -1.686738, 4.078890], abs=1e-6)
    assert (-torch.sigmoid(-scores)).tolist() == pytest.approx([-0.002315, -0.843795, -0.016645], abs=1e-6)


def test_an_untrained_head_of_imagenet():
    """H3."""
    sizes, members, start = (398, 521, 9, 7, 52, 8, 3, 2), [], 0
    for size in sizes:
        members.append(tuple(range(start, start + size)))
        start += size
    scores = score(torch.zeros(1, 1008), Groups(tuple(map(str, range(8))), tuple(members)))
    assert float(-torch.sigmoid(-scores)) == pytest.approx(-0.001916, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_ranks_as_the_minimum_others_score(seed):
    train, head, bank = group_problem(seed=seed)
    scores = MOS().fit(train, head).score_samples(bank)
    others = torch.stack(
        [bank.logits[:, start:end].softmax(1)[:, 0] for start, end in head.groups.slices], dim=1
    )
    assert_allclose(-1 / (1 + scores.exp()), -others.amin(1), rtol=1e-9)
    assert torch.equal(scores.argsort(), (-others.amin(1)).argsort())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sure_images_do_not_tie(dtype):
    groups = Groups(("one",), ((0, 1, 2),))
    outliers = torch.tensor([[20.0, 0, 0, 0], [24.0, 0, 0, 0], [900.0, 0, 0, 0]])
    scores = score(outliers, groups, dtype)
    assert scores.tolist() == sorted(scores.tolist(), reverse=True) and len(scores.unique()) == 3
    assert len((-groups.others_probability(outliers.float()).amin(1)).unique()) < 3
    inliers = torch.tensor([[0, 200.0, 0, 0], [0, 210.0, 0, 0]])
    assert len(score(inliers, groups, dtype).unique()) == 2


def test_shards_and_float32_give_the_same_scores():
    train, head, bank = group_problem()
    expected = MOS().fit(train, head).score_samples(bank)
    assert_allclose(MOS().fit(train, head).score_samples(split(bank, 1, 30, 9)), expected, atol=1e-12)
    single = MOS().fit(cast(train, torch.float32), head.to(torch.float32))
    scores = single.score_samples(cast(bank, torch.float32))
    assert scores.dtype == torch.float64
    assert_allclose(scores, expected, rtol=2e-5, atol=2e-5)


def test_needs_a_group_softmax_and_the_others_a_flat_one():
    train, head, _ = random_problem(5, 6, 4)
    with pytest.raises(InputError, match="MOS: found a head with a flat softmax, expected a group softmax"):
        MOS().fit(train, head)
    train, head, _ = group_problem()
    for name in set(DETECTORS) - {"mos", "pytorch_ood"}:
        if not create(name).needs_validation:
            with pytest.raises(InputError, match="found a head with a group softmax, expected a flat"):
                create(name).fit(train, head)
