"""What fine-tuning with the recipe of BiT shares: schedule, mixup, heads, frozen blocks, the crop of training images."""

import numpy as np
import pytest
import torch
from pictures import TRANSFORM
from torch import nn

from ood_helpers.backbones import DenseNet
from ood_helpers.data import Transform
from ood_helpers.errors import InputError
from ood_helpers.training.fine_tuning import (
    freeze_but,
    learning_rate_at,
    mixup,
    reorder,
    training_geometry,
    zero_head,
)
from ood_helpers.training.recipes import FineTuningRecipe


def recipe(images: dict | None = None, **settings) -> FineTuningRecipe:
    return FineTuningRecipe(method="any", images=images, **settings)


def test_learning_rates_of_the_sheet():
    """H4."""
    schedule = recipe().steps(1_281_167)
    rates = {0: 0, 1: 6e-6, 250: 0.0015, 499: 0.002994, 500: 3e-3, 6000: 3e-3, 6001: 3e-4, 12000: 3e-4}
    rates |= {12001: 3e-5, 18000: 3e-5, 18001: 3e-6, 19999: 3e-6}
    for step, rate in rates.items():
        assert learning_rate_at(step, 0.003, schedule) == pytest.approx(rate, rel=1e-12)
    assert schedule[-1] == 20000
    assert recipe().steps(499_999) == recipe().steps(20_000) == (500, 3000, 6000, 9000, 10000)
    assert recipe().steps(19_999) == (100, 200, 300, 400, 500)
    assert recipe(schedule=(1, 2, 3, 4, 5)).steps(1_281_167) == (1, 2, 3, 4, 5)


def test_mixup_is_that_of_the_recipe():
    images = torch.arange(8.0)[:, None].expand(8, 3)
    generator, shares = torch.Generator().manual_seed(0), []
    for _ in range(2000):
        mixed, labels, partners, share = mixup(images, torch.arange(8), 0.1, generator)
        assert len(share.unique()) == 1
        torch.testing.assert_close(mixed[:, 0], share * labels + (1 - share) * partners)
        assert sorted(partners.tolist()) == list(range(8))
        shares.append(float(share[0]))
    between = np.mean([0.05 < share < 0.95 for share in shares])
    assert between == pytest.approx(0.245, abs=0.03)  # the sheet's P(0.05 < lambda < 0.95)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.04)


def test_when_mixup_is_on_and_when_features_do_as_well_as_images():
    assert recipe().mixup_alpha(20_000) == 0.1
    assert recipe().mixup_alpha(19_999) == 0
    assert recipe(mixup=0.3).mixup_alpha(5) == 0.3
    assert recipe().exact_on_features(19_999)
    assert not recipe().exact_on_features(20_000)
    assert recipe(mixup=0).exact_on_features(20_000)
    assert recipe({}).exact_on_features(19_999)
    assert recipe({"micro_batch_size": 2}).exact_on_features(19_999)
    for change in ({"depth": 1}, {"depth": -1}, {"flip": True}, {"crop_padding": 1}, {"resize": (9, 9)}):
        assert not recipe(change).exact_on_features(19_999)
    assert not recipe({}, mixup=0.1).exact_on_features(19_999)


def test_a_head_of_zeros_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    head = zero_head(6, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert head.weight.shape == (4, 6) and not head.weight.any() and not head.bias.any()


def test_outputs_of_a_head_are_moved_to_their_columns():
    head = nn.Linear(2, 4)
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    columns = torch.tensor([2, 0, 3, 1])
    reorder(head, columns)
    for output, column in enumerate(columns):
        assert torch.equal(head.weight[column], weight[output])
        assert torch.equal(head.bias[column], bias[output])


@pytest.mark.parametrize(
    ("depth", "opened"), [(0, {"head"}), (1, {"head", "block3", "bn1", "trans2"}), (-1, None)]
)
def test_depth_decides_what_is_frozen(depth, opened):
    network = DenseNet(3, depth=10, growth_rate=4)
    freeze_but(network, depth)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (opened is None or name.split(".")[0] in opened), name


def test_training_images_are_cropped_from_larger_ones():
    transform = Transform(**dict(TRANSFORM) | {"resize": (8, 9)})
    assert training_geometry(transform, recipe()) == (transform, None)
    assert training_geometry(transform, recipe({"flip": True})) == (transform, None)
    geometry, size = training_geometry(transform, recipe({"resize": (10, 12)}))
    assert size == (8, 9) and tuple(geometry.resize) == (10, 12)
    square = transform.model_copy(update={"crop": 6})
    geometry, size = training_geometry(square, recipe({"resize": (10, 12)}))
    assert size == (6, 6) and geometry.crop is None
    with pytest.raises(InputError, match=r"resized to \[7, 12\], expected at least .* \[8, 9\]"):
        training_geometry(transform, recipe({"resize": (7, 12)}))
    with pytest.raises(InputError, match="a transform that does not fix the size"):
        training_geometry(TRANSFORM, recipe({"resize": (10, 12)}))
