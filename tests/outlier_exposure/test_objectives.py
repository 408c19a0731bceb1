"""The losses of outlier exposure by hand-made vectors, and the steps of DOE against a copied network."""

import copy
import math

import pytest
import torch
from torch import nn

from ood_helpers.backbones.densenet import DenseNet
from ood_helpers.outlier_exposure.objectives import (
    DOE,
    direction,
    energy_margin_losses,
    scaling_penalty,
    uniform_cross_entropy,
)
from ood_helpers.outlier_exposure.recipe import DOEObjective, EnergyObjective

ID_LOGITS = torch.tensor(
    [[2, 0.5, -1], [0.1, 1.2, 0.3], [-0.5, 0, 1.5], [1, 1, 0]], dtype=torch.float64
)  # V1
OUTLIER_LOGITS = torch.tensor([[1, 0, -1], [3, 0.2, 0.1]], dtype=torch.float64)  # V7


# ---- losses ------------------------------------------------------------------------------------------------


def test_uniform_cross_entropy():  # V7
    assert uniform_cross_entropy(OUTLIER_LOGITS).tolist() == pytest.approx([1.407606, 2.009601], abs=1e-6)
    assert uniform_cross_entropy(torch.zeros(1, 5)).tolist() == pytest.approx([math.log(5)])


@pytest.mark.parametrize(
    ("inside", "outside", "expected"), [(-25, -7, (532.916784, 0)), (-2, -1.5, (0.029319, 1.295408))]
)
def test_energy_margins(inside, outside, expected):  # V7
    margins = EnergyObjective(kind="energy", inside=inside, outside=outside)
    losses = energy_margin_losses(ID_LOGITS, OUTLIER_LOGITS, margins)
    assert [float(loss) for loss in losses] == pytest.approx(expected, abs=1e-6)


# ---- DOE ---------------------------------------------------------------------------------------------------


def test_scaling_penalty_is_the_squared_slope():  # V8
    assert float(scaling_penalty(OUTLIER_LOGITS)) == pytest.approx(1.187680, abs=1e-6)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = -uniform_cross_entropy(scale * OUTLIER_LOGITS).mean()
    (slope,) = torch.autograd.grad(value, scale)
    assert (float(value.detach()), float(slope)) == pytest.approx((-1.708604, -1.089807), abs=1e-6)
    assert float(scaling_penalty(OUTLIER_LOGITS)) == pytest.approx(float(slope) ** 2)


def test_direction_has_the_norm_of_the_weights():  # V8
    weight, copied = torch.tensor([[3.0, 0], [0, 4]]), torch.tensor([[3.3, 0], [0.4, 4]])
    found = direction(weight, copied - weight)
    torch.testing.assert_close(found, torch.tensor([[3.0, 0], [4, 0]]))
    torch.testing.assert_close(weight + 0.01 * found, torch.tensor([[3.03, 0], [0.04, 4]]))
    assert direction(weight, torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]


def cross_entropy_and_uniform(network, batch):
    images, labels, outliers = batch
    logits = network(torch.cat([images, outliers]))
    id_loss = nn.functional.cross_entropy(logits[: len(images)], labels)
    return id_loss, uniform_cross_entropy(logits[len(images) :]).mean(), {}


def doe_of(losses=cross_entropy_and_uniform, weight_decay=0.0, **settings) -> DOE:
    """Perturbed from the first epoch on, unless told otherwise."""
    return DOE(DOEObjective(**{"kind": "doe", "unperturbed_epochs": 0} | settings), losses, weight_decay)


def make_network() -> DenseNet:
    torch.manual_seed(0)
    return DenseNet(3, depth=10, growth_rate=4, dropout=0.1).train()


def sgd(network) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


def reference_step(network, batch, optimizer, mean, kept, strength, max_norm):
    """A perturbed step with a copy of the network and an optimizer of its own; the running mean of directions."""

    def step(network, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        optimizer.step()

    copied = copy.deepcopy(network)
    for block in copied.modules():
        if isinstance(block, nn.Dropout):
            block.p = 0.0
    scale = torch.ones((), requires_grad=True)
    images, _, outliers = batch
    logits = scale * copied(torch.cat([images, outliers]))[len(images) :]
    value = (logits.mean(dim=1) - logits.logsumexp(dim=1)).mean()
    (slope,) = torch.autograd.grad(value, scale, create_graph=True)
    step(copied, torch.optim.SGD(copied.parameters(), lr=1.0, weight_decay=1e-2), slope**2)
    found = {}
    for (name, weight), moved in zip(network.named_parameters(), copied.parameters()):
        if weight.ndim > 1:
            change = (moved - weight).detach()
            new = weight.detach().norm() / (change.norm() + 1e-20) * change
            found[name] = kept * mean[name] + (1 - kept) * new if mean else new

    def move(factor):
        with torch.no_grad():
            for name, change in found.items():
                network.get_parameter(name).add_(factor * change)

    move(strength)
    step(network, optimizer, 0.7 * cross_entropy_and_uniform(network, batch)[1])
    move(-strength)
    step(network, optimizer, cross_entropy_and_uniform(network, batch)[0])
    return found


def test_perturbed_steps_are_those_of_a_copied_network():
    generator = torch.Generator().manual_seed(3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    batches = [
        (torch.randn(6, 3, 8, 8, generator=generator), labels, torch.randn(4, 3, 8, 8, generator=generator))
        for _ in range(3)
    ]
    doe = doe_of(weight_decay=1e-2, weight=0.7, unperturbed_epochs=2, strengths=(0.05,), max_norm=0.5)
    doe.epoch = 3
    network, reference = make_network(), make_network()
    optimizer, reference_optimizer, mean = sgd(network), sgd(reference), {}
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        doe.step(network, batch, optimizer)
        torch.manual_seed(seed)
        torch.randint(1, ())  # of the strength
        mean = reference_step(reference, batch, reference_optimizer, mean, 0.6, 0.05, 0.5)
    assert doe.directions.keys() == mean.keys()
    for name, change in mean.items():
        torch.testing.assert_close(doe.directions[name], change, rtol=1e-3, atol=1e-4)
    for name, tensor in reference.state_dict().items():  # with the statistics of batch norm
        torch.testing.assert_close(network.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


class OneWeight(nn.Module):
    """Logits that depend on one entry of a weight of norm 5, so that its direction is +5 or -5 there."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, 0], [0, 4]]))

    def forward(self, inputs):
        return torch.stack([self.weight[0, 1] * inputs[:, 0] + 1, inputs[:, 0]], dim=1)


def test_directions_are_a_running_mean():  # V8
    doe, network = doe_of(), OneWeight()
    doe.directions = {"weight": torch.tensor([[3.0, 0], [4, 0]])}
    batch = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), -torch.ones(2, 2)
    doe.step(network, batch, torch.optim.SGD(network.parameters(), lr=0.0))
    torch.testing.assert_close(doe.directions["weight"], torch.tensor([[1.8, 2], [2.4, 0]]))


def test_strengths_are_drawn_for_each_step_and_taken_back():
    torch.manual_seed(0)
    network = nn.Linear(2, 2).double()
    start, moved = network.weight.detach().clone(), []

    def losses(network, batch):
        moved.append(float((network.weight.detach() - start).norm() / doe.directions["weight"].norm()))
        return cross_entropy_and_uniform(network, batch)

    doe, optimizer = doe_of(losses), torch.optim.SGD(network.parameters(), lr=0.0)
    batch = torch.rand(3, 2).double(), torch.zeros(3, dtype=torch.int64), torch.rand(2, 2).double()
    for _ in range(40):
        doe.step(network, batch, optimizer)
    assert {round(strength, 6) for strength in moved[::2]} == {0.1, 0.01, 0.001, 0.0001}
    assert moved[1::2] == pytest.approx([0] * 40, abs=1e-9)


def test_first_epochs_are_unperturbed_and_clipped():
    torch.manual_seed(0)
    doe, network = doe_of(weight=0.7, unperturbed_epochs=2, max_norm=0.01), nn.Sequential(nn.Linear(2, 2))
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    batch = torch.rand(3, 2), torch.zeros(3, dtype=torch.int64), torch.rand(2, 2)
    id_loss, outlier_loss, _ = cross_entropy_and_uniform(network, batch)
    doe.epoch = 2
    loss, _ = doe.step(network, batch, optimizer)
    assert float(loss.detach()) == pytest.approx(float((id_loss + 0.7 * outlier_loss).detach()))
    assert not doe.directions
    changes = [new.detach() - old for new, old in zip(network.parameters(), before)]
    assert float(nn.utils.get_total_norm(changes)) == pytest.approx(0.01, rel=1e-3)
