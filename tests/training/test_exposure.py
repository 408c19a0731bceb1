"""Outlier exposure: the sheet's vectors, a step of DOE against a copied network, learning, resuming, errors."""

import copy
import math

import numpy as np
import pytest
import torch
from pictures import TRANSFORM, Pictures, assert_interrupted_ends_in_the_same_bytes
from torch import nn

from ood_helpers.backbones import DenseNet
from ood_helpers.config import DOEConfig, EnergyMargins, OutlierExposureConfig
from ood_helpers.errors import InputError
from ood_helpers.training import exposure as module
from ood_helpers.training.exposure import (
    DOE,
    direction,
    energy_margin_losses,
    expose,
    scaling_penalty,
    uniform_cross_entropy,
)

ID_LOGITS = torch.tensor(
    [[2, 0.5, -1], [0.1, 1.2, 0.3], [-0.5, 0, 1.5], [1, 1, 0]], dtype=torch.float64
)  # V1
LABELS = torch.tensor([0, 1, 2, 0])
OUTLIER_LOGITS = torch.tensor([[1, 0, -1], [3, 0.2, 0.1]], dtype=torch.float64)  # V7


class Outliers(Pictures):
    """Grey images without labels."""

    name = "grey"

    def __init__(self, count: int, seed: int, size: int = 8):
        self.pixels = np.random.default_rng(seed).integers(100, 140, (count, size, size, 3), dtype=np.uint8)
        self.labels, self.array = None, self.pixels


def make_network(outputs: int = 3) -> DenseNet:
    torch.manual_seed(0)
    return DenseNet(outputs, depth=10, growth_rate=4, dropout=0.1)


def run(directory, network=None, train=None, validation=None, outliers=None, constraint=None, **config):
    config = {"epochs": 3, "batch_size": 16, "learning_rate": 0.05, **config}
    config = OutlierExposureConfig(**{"crop_padding": 1, "flip": True, **config})
    network = make_network(3 + (config.objective == "ntom")) if network is None else network
    return expose(
        network,
        Pictures(50, 0) if train is None else train,
        validation,
        Outliers(60, 2) if outliers is None else outliers,
        TRANSFORM,
        config,
        constraint,
        seed=1,
        device="cpu",
        directory=directory,
    )


# ---- losses ------------------------------------------------------------------------------------------------


def test_uniform_cross_entropy_of_the_sheet():  # V7
    assert uniform_cross_entropy(OUTLIER_LOGITS).tolist() == pytest.approx([1.407606, 2.009601], abs=1e-6)
    assert uniform_cross_entropy(torch.zeros(1, 5)).tolist() == pytest.approx([math.log(5)])


@pytest.mark.parametrize(
    ("inside", "outside", "expected"), [(-25, -7, (532.916784, 0)), (-2, -1.5, (0.029319, 1.295408))]
)
def test_energy_margins_of_the_sheet(inside, outside, expected):  # V7
    margins = EnergyMargins(inside=inside, outside=outside)
    losses = energy_margin_losses(ID_LOGITS, OUTLIER_LOGITS, margins)
    assert [float(loss) for loss in losses] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "constraint", "expected"),
    [
        ({"id_loss": "um"}, 0.1, 1.345108),
        ({"id_loss": "um"}, 0.7, 1.763495),
        ({"objective": "energy"}, None, 53.782485),
        ({"objective": "energy", "margins": {"inside": -2, "outside": -1.5}}, None, 0.623279),
    ],
)
def test_totals_of_the_sheet(settings, constraint, expected):  # V7
    config = OutlierExposureConfig(**settings)
    training = module._Exposure(None, Pictures(4, 0), Outliers(2, 0), TRANSFORM, config, constraint, 3, "cpu")
    batch = torch.zeros(4, 3, 2, 2), LABELS, torch.ones(2, 3, 2, 2)

    def network(inputs):
        assert inputs[:, 0, 0, 0].tolist() == [0, 0, 0, 0, 1, 1]
        return torch.cat([ID_LOGITS, OUTLIER_LOGITS])

    loss, values = training.loss(network, batch)
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    assert float(values["cross_entropy"]) == pytest.approx(0.490806, abs=1e-6)


def test_outliers_are_a_class_of_their_own():
    training = module._Exposure(
        None,
        Pictures(4, 0),
        Outliers(2, 0),
        TRANSFORM,
        OutlierExposureConfig(objective="ntom"),
        None,
        2,
        "cpu",
    )
    batch = torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 1, 0]), torch.ones(2, 3, 2, 2)
    _, outlier_loss, values = training.losses(lambda _: torch.cat([ID_LOGITS, OUTLIER_LOGITS]), batch)
    expected = OUTLIER_LOGITS.exp().sum(dim=1).log() - OUTLIER_LOGITS[:, 2]
    assert float(outlier_loss) == pytest.approx(float(expected.mean()))
    assert float(values["accuracy"]) == 100  # of the third image by its first two outputs


# ---- DOE ---------------------------------------------------------------------------------------------------


def test_scaling_penalty_of_the_sheet():  # V8
    assert float(scaling_penalty(OUTLIER_LOGITS)) == pytest.approx(1.187680, abs=1e-6)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = -uniform_cross_entropy(scale * OUTLIER_LOGITS).mean()
    (slope,) = torch.autograd.grad(value, scale)
    assert (float(value.detach()), float(slope)) == pytest.approx((-1.708604, -1.089807), abs=1e-6)
    assert float(scaling_penalty(OUTLIER_LOGITS)) == pytest.approx(float(slope) ** 2)


def test_direction_of_the_sheet():  # V8
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
    batches = [
        (torch.randn(6, 3, 8, 8, generator=generator), LABELS[[0, 1, 2, 3, 1, 2]], torch.randn(4, 3, 8, 8))
        for _ in range(3)
    ]
    config = DOEConfig(unperturbed_epochs=2, strengths=(0.05,), max_norm=0.5)
    doe = DOE(config, cross_entropy_and_uniform, weight=0.7, weight_decay=1e-2)
    doe.epoch = 3
    network, reference = make_network().train(), make_network().train()
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


def test_running_mean_of_directions(monkeypatch):  # V8
    news = iter([torch.tensor([[3.0, 0], [4, 0]]), torch.tensor([[0.0, 5], [0, 0]])])
    monkeypatch.setattr(module, "direction", lambda *_: next(news))
    doe = DOE(DOEConfig(), cross_entropy_and_uniform, weight=1.0, weight_decay=0.0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    batch = torch.rand(3, 2), torch.zeros(3, dtype=torch.int64), torch.rand(2, 2)
    doe._update_directions(network, batch)
    doe._update_directions(network, batch)
    assert list(doe.directions) == ["1.weight"]
    torch.testing.assert_close(doe.directions["1.weight"], torch.tensor([[1.8, 2], [2.4, 0]]))


def test_strengths_are_drawn_for_each_step(monkeypatch):
    moved = []
    monkeypatch.setattr(DOE, "_move", lambda self, _, strength: moved.append(strength))
    doe = DOE(DOEConfig(unperturbed_epochs=0), cross_entropy_and_uniform, weight=1.0, weight_decay=0.0)
    network = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    batch = torch.rand(3, 2), torch.zeros(3, dtype=torch.int64), torch.rand(2, 2)
    torch.manual_seed(0)
    for _ in range(40):
        doe.step(network, batch, optimizer)
    assert set(moved[::2]) == {0.1, 0.01, 0.001, 0.0001}
    assert moved[1::2] == [-strength for strength in moved[::2]]


def test_first_epochs_are_unperturbed_and_clipped():
    doe = DOE(DOEConfig(unperturbed_epochs=2, max_norm=0.01), cross_entropy_and_uniform, 0.7, 0.0)
    network = nn.Sequential(nn.Linear(2, 2))
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


# ---- training ----------------------------------------------------------------------------------------------

DOE_FROM_2 = {"objective": "doe", "doe": {"unperturbed_epochs": 1}}
POEM = {"objective": "energy", "sample": "poem", "margins": {"inside": -5.0, "outside": -1.0}}


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, math.log(3)),
        (POEM, 0),
        (DOE_FROM_2, math.log(3)),
        ({"objective": "ntom", "sample": "ntom"}, 0),
        ({"sample": "ntom"}, math.log(3)),
    ],
    ids=["oe", "poem", "doe", "ntom", "oe with hard outliers"],
)
def test_learns_id_images_and_outliers(tmp_path, settings, least):
    history, ignoring = (
        run(tmp_path / str(weight), validation=Pictures(30, 1), epochs=12, outlier_weight=weight, **settings)
        for weight in (None, 1e-6)
    )
    assert history.columns.tolist() == [
        "epoch",
        "step",
        "learning_rate",
        "train_loss",
        "train_cross_entropy",
        "train_accuracy",
        "train_outlier_loss",
        "validation_loss",
        "validation_accuracy",
    ]
    first, last = history.iloc[0], history.iloc[-1]
    assert last["train_loss"] < 0.7 * first["train_loss"]
    assert last["train_cross_entropy"] < 0.4 * first["train_cross_entropy"]
    assert last["validation_accuracy"] > 95
    assert last["train_outlier_loss"] - least < 0.7 * (ignoring["train_outlier_loss"].iloc[-1] - least)


def test_loss_constraint_acts_on_id_images_alone(tmp_path):
    last = run(tmp_path, id_loss="um", constraint=0.5, epochs=12).iloc[-1]
    assert 0 < last["train_ascending"] < 100
    assert last["train_cross_entropy"] == pytest.approx(0.5, abs=0.1)
    assert last["train_accuracy"] > 90
    assert last["train_outlier_loss"] < 1.15  # the least is log 3 = 1.099, without the constraint it is 1.27


@pytest.mark.parametrize(
    "settings",
    [POEM, DOE_FROM_2 | {"sample": "poem"}, {"objective": "doe", "doe": {"unperturbed_epochs": 5}}],
    ids=["poem", "doe", "doe not yet perturbed"],
)
def test_interrupted_training_ends_in_the_same_bytes(tmp_path, monkeypatch, settings):
    def train(folder):
        return run(folder, train=Pictures(34, 0), validation=Pictures(6, 1), epochs=10, **settings)

    assert_interrupted_ends_in_the_same_bytes(train, module, "evaluate_logits", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("factor", "settings", "expected"),
    [
        (1.0, {}, [16, 16, 16, 2]),
        (0.5, {}, [8, 8, 8, 1]),
        (0.1, {}, [2, 2, 2, 1]),
        (2.0, {"steps_per_epoch": 2}, [32, 32]),
    ],
)
def test_outliers_of_a_batch(factor, settings, expected):
    config = OutlierExposureConfig(
        batch_size=16, outlier_factor=factor, crop_padding=1, flip=True, **settings
    )
    outliers = Outliers(40, 2)
    training = module._Exposure(make_network(), Pictures(50, 0), outliers, TRANSFORM, config, None, 3, "cpu")
    batches = list(training.epoch_batches(1, torch.Generator().manual_seed(0)))
    assert [len(grey) for _, _, grey in batches] == expected
    images, labels, grey = batches[0]
    assert len(images) == len(labels) == 16
    assert grey.is_contiguous(memory_format=torch.channels_last)
    pixels = TRANSFORM.denormalise(grey).mul(255).round()
    assert ((pixels == 0) | ((pixels >= 100) & (pixels < 140))).all()  # 0 is the padding
    assert (pixels == 0).any()


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "ntom", "network": 3}, "network has 3 outputs for the labels 0 to 2 of pictures"),
        ({"network": 2}, "labels 0 to 2, expected 0 to 1"),
        ({"train": Outliers(20, 0)}, "grey has no labels"),
        ({"outliers": Outliers(0, 0)}, "outliers grey has no images"),
        (
            {"outliers": Outliers(20, 0, size=6)},
            "outliers of grey are 6 x 6 pixels after the transform, expected 8 x 8",
        ),
        ({"constraint": 0.4}, "constraint 0.4 with id_loss: cross_entropy"),
        ({"id_loss": "um"}, "no loss constraint with id_loss: um"),
    ],
)
def test_errors(tmp_path, changes, message):
    if "network" in changes:
        changes = changes | {"network": make_network(changes["network"])}
    with pytest.raises(InputError, match=message):
        run(tmp_path, **changes)
