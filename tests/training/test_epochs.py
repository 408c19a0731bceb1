"""Learning rates and steps of trainings that continue the backbone's by epochs."""

import pytest

from ood_helpers.training.epochs import epoch_steps, learning_rate_of_epoch
from ood_helpers.unleashing_mask.recipe import UnleashingMaskRecipe


@pytest.mark.parametrize(
    ("rate", "epochs", "expected"),
    [
        (0.1, 100, {0: 0.1, 1: 0.099975, 25: 0.085355, 50: 0.05, 75: 0.014645, 99: 0.000025}),
        (0.01, 10, {5: 0.005, 9: 0.000245}),
    ],
)
def test_learning_rates_of_epochs(rate, epochs, expected):  # V10
    recipe = UnleashingMaskRecipe(learning_rate=rate, epochs=epochs)
    found = {epoch: learning_rate_of_epoch(epoch, recipe) for epoch in expected}
    assert found == pytest.approx(expected, abs=5e-7)


def test_warm_up_comes_before_the_cosine():
    recipe = UnleashingMaskRecipe(learning_rate=0.1, epochs=104, warmup_epochs=4)
    rates = [learning_rate_of_epoch(epoch, recipe) for epoch in range(104)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    expected = {4: 0.1, 5: 0.099975, 29: 0.085355, 54: 0.05, 103: 0.000025}
    assert {epoch: rates[epoch] for epoch in expected} == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(
    ("images", "given", "steps"), [(50, None, 4), (49, None, 3), (50, 2, 2), (50, 9, 4), (48, 3, 3)]
)
def test_steps_of_an_epoch(images, given, steps):
    assert epoch_steps(UnleashingMaskRecipe(batch_size=16, steps_per_epoch=given), images) == steps
