"""LINe against the vectors, autograd contributions and the formula sample by sample."""

import numpy as np
import pytest
import torch
from detector_examples import make_bank, random_problem, split
from numpy.testing import assert_allclose, assert_array_equal

from ood_helpers.banks import FeatureBank, Head
from ood_helpers.detectors.energy import Energy
from ood_helpers.detectors.line import LINe
from ood_helpers.detectors.react import ReAct
from ood_helpers.errors import InputError

CONTRIBUTIONS = [[0.96, -0.03, 0.45, 0.04], [-0.04, 1.35, -0.12, 0.48], [0.18, 0.10, 0.77, -0.10]]
VECTORS = {
    "50, 50, 1.0": (
        (50, 50, 1.0),
        [0.015, 0.04, 0.037],
        [(1.25, -0.2, 0.84), (0.19, 1.24, 0.25), (1.1, -0.2, 0.63), (0.84, -0.2, 0.84)],
        [1.890917, 1.783204, 1.740555, 1.695884],
    ),
    "25, 75, 1.0": (
        (25, 75, 1.0),
        [0.24075, 0.1305, 0.1035],
        [(0.9, -0.2, 0.84), (0.1, 1.24, 0.25), (0.9, -0.2, 0.63), (0.84, -0.2, 0.75)],
        [1.721820, 1.765554, 1.640150, 1.658628],
    ),
    "50, 50, none": (
        (50, 50, None),
        [0.015, 0.04, 0.037],
        [(1.57, -0.2, 0.96), (0.19, 1.33, 0.27), (1.9, -0.2, 0.93), (1.14, -0.2, 1.26)],
        [2.108645, 1.840590, 2.306491, 2.011018],
    ),
}


def bits(text):
    """ "10/01" as a matrix of booleans."""
    return np.array([[digit == "1" for digit in row] for row in text.split("/")])


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name, train_bank, head, bank):
    (activation, weight, delta), thresholds, logits, scores = VECTORS[name]
    detector = LINe(delta=delta, activation_percentile=activation, weight_percentile=weight).fit(
        train_bank, head
    )
    assert_allclose(detector.contributions_, CONTRIBUTIONS, atol=1e-6)
    products = (detector.contributions_.abs()[:, None] * head.weight).flatten(1)
    assert_allclose(np.percentile(products, weight, axis=1), thresholds, atol=1e-6)
    assert_allclose(detector.pruned_logits(bank), logits, atol=1e-6)
    assert_allclose(detector.score_samples(bank), scores, atol=1e-6)


def test_masks_of_the_vectors(train_bank, head):
    detector = LINe(activation_percentile=50, weight_percentile=50).fit(train_bank, head)
    assert_array_equal(detector.activation_mask(), bits("1010/0101/1010"))
    assert_array_equal(detector.weight_mask(0), bits("1010/0101/1010"))
    assert_array_equal(detector.weight_mask(1), bits("0011/0101/0110"))
    assert_array_equal(detector.weight_mask(2), bits("1010/0101/1010"))
    with pytest.raises(InputError, match="no class 3, expected one of 0 to 2"):
        detector.weight_mask(3)


def test_contributions_equal_a_backward_pass_for_every_image():
    """Mean over a class's images of feature * d(logit of the label) / d(feature), one image at a time."""
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.ReLU()).double()
    last = torch.nn.Linear(9, 4).double()
    images, labels = torch.randn(30, 6, dtype=torch.float64), torch.arange(30) % 4
    sums = torch.zeros(4, 9, dtype=torch.float64)
    for image, label in zip(images, labels, strict=True):
        feature = body(image[None]).detach().requires_grad_()
        last(feature)[0, label].backward()
        sums[label] += (feature * feature.grad)[0].detach()
    expected = sums / torch.bincount(labels)[:, None]
    head = Head(last.weight, last.bias)
    detector = LINe().fit(make_bank(body(images).detach(), head, labels), head)
    assert_allclose(detector.contributions_, expected, atol=1e-12)
    assert len(detector.score_samples(make_bank(body(images).detach(), head))) == 30


def sample_by_sample(train, head, bank, delta, activation_percentile, weight_percentile):
    """The definition, with numpy's percentile, for one sample after the other."""
    weight, bias = head.weight.numpy(), head.bias.numpy()
    features, labels = train.features.numpy(), train.labels.numpy()
    contributions = np.stack([weight[c] * features[labels == c].mean(0) for c in range(len(weight))])
    logits = []
    for f in bank.features.numpy():
        g = f if delta is None else np.minimum(f, delta)
        k = np.argmax(weight @ g + bias)
        keep_activation = np.ones(len(f), dtype=bool)
        if activation_percentile is not None:
            keep_activation = contributions[k] > np.percentile(contributions[k], activation_percentile)
        keep_weight = np.ones(weight.shape, dtype=bool)
        if weight_percentile is not None:
            product = np.abs(contributions[k]) * weight
            keep_weight = product > np.percentile(product, weight_percentile)
        logits.append((weight * keep_weight) @ (g * keep_activation) + bias)
    return np.array(logits)


@pytest.mark.parametrize(
    ("num_classes", "feature_dim", "samples"), [(7, 342, 60), (7, 342, 1), (10, 33, 5), (2, 1, 9)]
)
@pytest.mark.parametrize(
    "settings",
    [(1.0, 90, 90), (0.8, 10, 10), (None, 37.5, 12.5), (1.0, None, None), (None, 90, None), (None, None, 90),
     (1.0, 10, None), (1.0, None, 90), (None, 90, 90), (None, None, None), (1.0, 100, 0), (1.0, 0, 100)],
)  # fmt: skip
def test_against_the_formula_sample_by_sample(num_classes, feature_dim, samples, settings):
    train, head, bank = random_problem(num_classes, feature_dim, samples, seed=samples)
    expected = sample_by_sample(train, head, bank, *settings)
    detector = LINe(*settings).fit(train, head)
    assert_allclose(detector.pruned_logits(bank), expected, atol=1e-9)
    assert_allclose(detector.score_samples(bank), np.logaddexp.reduce(expected, axis=1), atol=1e-9)


@pytest.mark.parametrize("settings", [(1.0, 50, 50), (None, 20, 80), (0.5, 75, 25)])
def test_ties_at_the_thresholds(settings):
    """Features and weights on a coarse grid of binary fractions, exact in float64: most values are tied."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-2, 3, (5, 16), generator=generator).double() / 2
    head = Head(weight, torch.zeros(5, dtype=torch.float64))
    features = torch.randint(0, 3, (60, 16), generator=generator).double() / 2
    train = make_bank(features[:20], head, torch.arange(20) % 5)
    bank = make_bank(features[20:], head)
    ties = (bank.logits == bank.logits.amax(1, keepdim=True)).sum(1)
    clipped = head.logits(bank.features.clamp(max=settings[0] or 9))
    ties += (clipped == clipped.amax(1, keepdim=True)).sum(1)
    clear = ties == 2  # one predicted class; which of several is taken is not defined
    assert clear.sum() > 10
    bank = make_bank(bank.features[clear], head)
    expected = sample_by_sample(train, head, bank, *settings)
    assert_allclose(LINe(*settings).fit(train, head).pruned_logits(bank), expected, atol=1e-12)


def test_classes_that_are_never_predicted():
    train, head, bank = random_problem(6, 20, 25)
    head.bias[1:5] = -1000.0
    bank = make_bank(bank.features, head)
    expected = sample_by_sample(train, head, bank, 1.0, 90, 90)
    assert set(bank.logits.argmax(1).tolist()) <= {0, 5}
    assert_allclose(LINe().fit(train, head).pruned_logits(bank), expected, atol=1e-9)


def test_the_class_is_predicted_from_the_clipped_feature(head, train_bank):
    """Unclipped this sample is class 0, clipped at 1 it is class 1."""
    features = torch.tensor([[6.0, 0.9, 0.0, 1.0]], dtype=torch.float64)
    bank = make_bank(features, head)
    assert bank.logits.argmax() == 0 and head.logits(features.clamp(max=1)).argmax() == 1
    expected = sample_by_sample(train_bank, head, bank, 1.0, 50, 50)
    detector = LINe(1.0, 50, 50).fit(train_bank, head)
    assert_allclose(detector.pruned_logits(bank), expected, atol=1e-12)


def test_ablations_meet_their_neighbours(train_bank, head, bank):
    """Nothing on = energy; clipping alone = ReAct at that value; switched-off masks keep everything."""
    off = LINe(delta=None, activation_percentile=None, weight_percentile=None).fit(train_bank, head)
    assert_allclose(off.score_samples(bank), Energy().fit(train_bank, head).score_samples(bank), atol=1e-12)
    off.delta = 1.0
    assert_allclose(
        off.score_samples(bank), ReAct(clip=1.0).fit(train_bank, head).score_samples(bank), atol=1e-12
    )
    assert off.activation_mask().all() and off.weight_mask(1).all()


def test_public_masks_rebuild_the_logits():
    train, head, bank = random_problem(4, 50, 30)
    detector = LINe(1.0, 40, 70).fit(train, head)
    clipped = bank.features.clamp(max=1.0)
    predicted = head.logits(clipped).argmax(1)
    activation = detector.activation_mask()
    expected = torch.stack(
        [
            (head.weight * detector.weight_mask(k)) @ (g * activation[k]) + head.bias
            for g, k in zip(clipped, predicted.tolist())
        ]
    )
    assert_allclose(detector.pruned_logits(bank), expected, atol=1e-12)


def test_no_sample_at_all(train_bank, head):
    empty = FeatureBank(torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.float64))
    assert LINe().fit(train_bank, head).score_samples(empty).shape == (0,)


def test_shards_are_scored_together_up_to_a_bound(monkeypatch):
    """In as many pieces as the bound asks for, with the same scores, in order."""
    pieces = []

    class Noting(LINe):
        def _score(self, shard):
            pieces.append(len(shard))
            return super()._score(shard)

    train, head, bank = random_problem(4, 10, 25)
    detector = Noting().fit(train, head)
    expected = detector.score_samples(bank)
    for bound, sizes in ((0, [4, 4, 12, 5]), (100, [8, 12, 5]), (200, [20, 5]), (2**26, [25])):
        pieces.clear()
        monkeypatch.setattr(Noting, "joined_features", bound)
        assert_allclose(detector.score_samples(split(bank, 4, 4, 12, 5)), expected, atol=1e-12)
        assert pieces == sizes
