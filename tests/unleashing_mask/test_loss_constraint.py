"""The loss of Unleashing Mask, and the estimate of its constraint."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from pictures import TRANSFORM, Pictures

from ood_helpers.errors import InputError
from ood_helpers.training.batches import evaluate, evaluate_logits
from ood_helpers.unleashing_mask.loss_constraint import IDLoss, LossConstraint, estimate_constraint, um_loss
from ood_helpers.unleashing_mask.recipe import CrossEntropyLoss, Estimate, UMLoss

TRAIN = Pictures(50, 0)
LABELS = torch.tensor([0, 1, 2, 0])
LOGITS = [[2, 0.5, -1], [0.1, 1.2, 0.3], [-0.5, 0, 1.5], [1, 1, 0]]  # V1
GRADIENT = torch.tensor(
    [
        [-0.053601, 0.043823, 0.009778],
        [0.047842, -0.106276, 0.058434],
        [0.024906, 0.041063, -0.065969],
        [-0.144420, 0.105580, 0.038841],
    ],
    dtype=torch.float64,
)


# ---- the objective -----------------------------------------------------------------------------------------


def logits() -> torch.Tensor:
    return torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("constraint", "beta", "loss", "factor"),
    [
        (0.1, 1, 0.490806, 1),
        (0.7, 1, 0.909194, -1),
        (0, 1, 0.490806, 1),
        (0.1, 0.15, 0.126379, -0.15),
        (0.3, 1, 0.490806, 1),  # of each sample it would be 0.520151
    ],
)
def test_loss_and_its_gradient(constraint, beta, loss, factor):  # V1
    z = logits()
    found = um_loss(F.cross_entropy(z, LABELS), constraint, beta)
    assert found.item() == pytest.approx(loss, abs=1e-6)
    found.backward()
    torch.testing.assert_close(z.grad, factor * GRADIENT, atol=1e-6, rtol=0)


def test_at_the_constraint_the_gradient_is_zero():  # V1
    z = logits()
    cross_entropy = F.cross_entropy(z, LABELS)
    loss = um_loss(cross_entropy, cross_entropy.item())
    loss.backward()
    assert loss.item() == pytest.approx(0.490806, abs=1e-6) and not z.grad.any()


@pytest.mark.parametrize(("constraint", "after"), [(0.1, 0.460506), (0.7, 0.522565)])
def test_one_step_goes_down_above_the_constraint_and_up_below_it(constraint, after):  # V1
    z = logits()
    um_loss(F.cross_entropy(z, LABELS), constraint).backward()
    assert F.cross_entropy(z - 0.5 * z.grad, LABELS).item() == pytest.approx(after, abs=1e-6)


@pytest.mark.parametrize(("beta", "constraint", "ascending"), [(1, 0.1, 0), (1, 0.7, 100), (0.15, 0.1, 100)])
def test_logged_is_the_unflooded_cross_entropy(beta, constraint, ascending):
    loss, values = IDLoss(UMLoss(beta=beta), constraint)(logits(), LABELS)
    assert values["cross_entropy"].item() == pytest.approx(0.490806, abs=1e-6)
    assert float(values["ascending"]) == ascending and float(values["accuracy"]) == 100
    assert loss.item() == pytest.approx(abs(beta * 0.490806 - constraint) + constraint, abs=1e-6)


def test_plain_cross_entropy_has_no_ascent():
    loss, values = IDLoss(CrossEntropyLoss(), None)(logits(), LABELS)
    assert loss.item() == pytest.approx(0.490806, abs=1e-6) and set(values) == {"cross_entropy", "accuracy"}


def test_a_constraint_belongs_to_um_and_um_to_a_constraint():
    with pytest.raises(InputError, match="Found no loss constraint with id_loss: um, expected"):
        IDLoss(UMLoss(), None)
    with pytest.raises(InputError, match=r"Found the loss constraint 0\.3 with id_loss: cross_entropy"):
        IDLoss(CrossEntropyLoss(), 0.3)


# ---- the estimate -------------------------------------------------------------------------------------------


def estimate(network, batch_size=16, **settings):
    settings = Estimate(**{"draws": 3, "keep_rate": 0.8, **settings})
    return estimate_constraint(network, TRAIN, TRANSFORM, settings, batch_size=batch_size, device="cpu")


def test_every_image_counts_equally_in_unequal_batches(start):  # V13
    batches = []
    for value, size in ((0.2, 512), (0.4, 512), (0.1, 336)):
        z = torch.tensor([0, math.log(math.exp(value) - 1)], dtype=torch.float64).expand(size, 2)
        batches.append((z, torch.zeros(size, dtype=torch.long)))
    assert evaluate_logits(batches)["loss"] == pytest.approx(0.250588, abs=1e-6)
    parts, whole = estimate(start, batch_size=16), estimate(start, batch_size=50)
    assert parts.draws == pytest.approx(whole.draws, rel=1e-5)


def test_the_estimate_is_seeded_and_changes_nothing(start):
    before = copy.deepcopy(start.state_dict())
    first, again, other = estimate(start), estimate(start), estimate(start, seed=1)
    assert first == again and set(first.draws).isdisjoint(other.draws)
    assert first.draws[0] == estimate(start, draws=1).draws[0]
    assert first.unmasked == other.unmasked == evaluate(start, TRAIN, TRANSFORM, 16, "cpu")["loss"]
    assert first.keep_rate == 0.8 and min(first.draws) > first.unmasked
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())


def test_rounding_decides_how_many_weights_go(start):
    nearest, truncated = (
        estimate(start, keep_rate=0.965),
        estimate(start, keep_rate=0.965, rounding="truncated"),
    )
    assert nearest.draws != truncated.draws and nearest.unmasked == truncated.unmasked


def test_mean_and_deviation_of_the_draws():
    found = LossConstraint((0.2, 0.4, 0.3), 0.1, 0.965)
    assert found.mean == pytest.approx(0.3) and found.std == pytest.approx(0.1)
    assert math.isnan(LossConstraint((0.2,), 0.1, 0.965).std)


def test_weights_that_are_no_numbers(start):
    network = copy.deepcopy(start)
    with torch.no_grad():
        network.head.weight[0, 0] = math.nan
    with pytest.raises(InputError, match="cross-entropy of pictures is nan, expected a finite number; check"):
        estimate(network)


def test_no_constraint_without_labels(start):
    unlabelled = Pictures(8, 0)
    unlabelled.labels = None
    with pytest.raises(InputError, match="has no labels"):
        estimate_constraint(start, unlabelled, TRANSFORM, Estimate(), batch_size=8, device="cpu")
