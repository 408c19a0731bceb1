"""Training with outliers: what is learned, the totals of the losses, resuming, errors."""

import math

import numpy as np
import pytest
import torch
from interruption import assert_interrupted_training_resumes
from pictures import TRANSFORM, Pictures

from ood_helpers.backbones.densenet import DenseNet
from ood_helpers.errors import InputError
from ood_helpers.outlier_exposure.recipe import OutlierExposureRecipe
from ood_helpers.outlier_exposure.training import Exposure, expose, with_outlier_output

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


def recipe_of(**settings) -> OutlierExposureRecipe:
    short = {"epochs": 3, "batch_size": 16, "learning_rate": 0.05, "crop_padding": 1, "flip": True}
    return OutlierExposureRecipe(**short | settings)


def run(directory, network=None, train=None, validation=None, outliers=None, constraint=None, **settings):
    recipe = recipe_of(**settings)
    return expose(
        make_network(3 + recipe.background) if network is None else network,
        Pictures(50, 0) if train is None else train,
        validation,
        Outliers(60, 2) if outliers is None else outliers,
        TRANSFORM,
        recipe,
        constraint,
        seed=1,
        device="cpu",
        directory=directory,
    )


def exposure(train=50, outliers=40, constraint=None, **settings) -> Exposure:
    sets = Pictures(train, 0), None, Outliers(outliers, 2)
    return Exposure(make_network(), *sets, TRANSFORM, recipe_of(**settings), constraint, "cpu")


# ---- losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "constraint", "expected"),
    [
        ({"id_loss": "um"}, 0.1, 1.345108),
        ({"id_loss": "um"}, 0.7, 1.763495),
        ({"objective": "energy"}, None, 53.782485),
        ({"objective": {"kind": "energy", "inside": -2, "outside": -1.5}}, None, 0.623279),
    ],
)
def test_totals(settings, constraint, expected):  # V7
    batch = torch.zeros(4, 3, 2, 2), LABELS, torch.ones(2, 3, 2, 2)

    def network(inputs):
        assert inputs[:, 0, 0, 0].tolist() == [0, 0, 0, 0, 1, 1]
        return torch.cat([ID_LOGITS, OUTLIER_LOGITS])

    loss, values = exposure(constraint=constraint, **settings).loss(network, batch)
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    assert float(values["cross_entropy"]) == pytest.approx(0.490806, abs=1e-6)


def test_outliers_are_a_class_of_their_own():
    batch = torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 1, 0]), torch.ones(2, 3, 2, 2)
    training = exposure(train=2, objective="ntom")  # labels 0 and 1
    _, outlier_loss, values = training.losses(lambda _: torch.cat([ID_LOGITS, OUTLIER_LOGITS]), batch)
    expected = OUTLIER_LOGITS.exp().sum(dim=1).log() - OUTLIER_LOGITS[:, 2]
    assert float(outlier_loss) == pytest.approx(float(expected.mean()))
    assert float(values["accuracy"]) == 100  # of the third image by its first two outputs


def test_an_output_for_outliers_starts_from_zero():
    network, images = make_network().eval(), torch.rand(4, 3, 8, 8)
    before, drawn = network(images), torch.random.get_rng_state()
    logits = with_outlier_output(network)(images)
    torch.testing.assert_close(logits[:, :3], before)
    assert logits.shape == (4, 4) and not logits[:, 3].any()
    assert torch.equal(torch.random.get_rng_state(), drawn)


# ---- training ----------------------------------------------------------------------------------------------

POEM = {"objective": {"kind": "energy", "inside": -5.0, "outside": -1.0}, "sample": "poem"}


def doe(unperturbed_epochs: int) -> dict:
    return {"objective": {"kind": "doe", "unperturbed_epochs": unperturbed_epochs}}


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"objective": {"kind": "oe"}}, math.log(3)),
        (POEM, 0),
        (doe(1), math.log(3)),
        ({"objective": {"kind": "ntom"}, "sample": "ntom"}, 0),
        ({"objective": {"kind": "oe"}, "sample": "ntom"}, math.log(3)),
    ],
    ids=["oe", "poem", "doe", "ntom", "oe with hard outliers"],
)
def test_learns_id_images_and_outliers(tmp_path, settings, least):
    def trained(name, **changes):
        changed = settings | {"objective": settings["objective"] | changes}
        return run(tmp_path / name, validation=Pictures(30, 1), epochs=12, **changed)

    history, ignoring = trained("default"), trained("ignoring", weight=1e-6)
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
    [POEM, doe(1) | {"sample": "poem"}, doe(5)],
    ids=["poem", "doe", "doe not yet perturbed"],
)
def test_an_interrupted_training_resumes(tmp_path, settings):
    def train(directory, validation):
        return run(directory, train=Pictures(34, 0), validation=validation, epochs=10, **settings)

    assert_interrupted_training_resumes(train, tmp_path, pictures=6)


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
    training = exposure(outlier_factor=factor, **settings)
    batches = list(training.epoch_batches(1, torch.Generator().manual_seed(0)))
    assert [len(grey) for _, _, grey in batches] == expected
    images, labels, grey = batches[0]
    assert len(images) == len(labels) == 16
    assert grey.is_contiguous(memory_format=torch.channels_last)
    pixels = (grey * 0.25 + 0.5).mul(255).round()  # the transform taken back
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
