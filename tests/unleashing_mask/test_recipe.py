"""Which combinations of the options of Unleashing Mask can be written down, and which cannot."""

import pytest
from pydantic import ValidationError

from ood_helpers.unleashing_mask.recipe import (
    CrossEntropyLoss,
    Estimate,
    UMLoss,
    UnleashingMaskCheckpoint,
    UnleashingMaskRecipe,
)

MASKS = {"keep_rate": 0.8}


@pytest.mark.parametrize("masks", [None, MASKS, MASKS | {"freeze_weights": False, "rounding": "truncated"}])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("um", UMLoss(constraint=Estimate(keep_rate=0.965, draws=5, factor=1))),
        ({}, UMLoss()),
        ({"constraint": 0.3}, UMLoss(constraint=0.3, beta=1)),
        ({"constraint": {"factor": 2}, "beta": 0.5}, UMLoss(constraint=Estimate(factor=2), beta=0.5)),
        ("cross_entropy", CrossEntropyLoss()),
        ({"kind": "cross_entropy"}, CrossEntropyLoss()),
    ],
)
def test_each_loss_goes_with_weights_and_with_masks(given, expected, masks):
    recipe = UnleashingMaskRecipe(id_loss=given, masks=masks)
    assert recipe.id_loss == expected and (recipe.masks is None) == (masks is None)
    assert recipe.changed({}) == recipe == UnleashingMaskRecipe.model_validate(recipe.settings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id_loss": {"kind": "cross_entropy", "constraint": 0.3}}, "unknown key 'constraint'"),
        ({"id_loss": {"kind": "cross_entropy", "beta": 0.5}}, "unknown key 'beta'"),
        ({"id_loss": {"constraint": 0.3, "draws": 2}}, "unknown key 'draws'"),
        ({"id_loss": {"constraint": -1}}, "greater than 0"),
        ({"id_loss": {"beta": 0}}, "greater than 0"),
        ({"id_loss": 0.3}, "id_loss"),
        ({"keep_rate": 0.8}, "unknown key 'keep_rate'"),
        ({"masks": {"rounding": "truncated"}}, "masks.keep_rate"),
        ({"masks": {"keep_rate": 1}}, "frozen weights leave nothing to learn"),
        ({"masks": MASKS | {"initial_scores": "ones"}}, "'random' or 'magnitude'"),
    ],
)
def test_options_that_would_have_no_effect_cannot_be_written_down(settings, message):
    with pytest.raises(ValidationError, match=message):
        UnleashingMaskRecipe(**settings)


def test_masks_that_drop_nothing_leave_weights_to_learn():
    assert UnleashingMaskRecipe(masks={"keep_rate": 1, "freeze_weights": False}).masks.keep_rate == 1


def test_a_checkpoint_has_no_options_of_the_training():
    assert UnleashingMaskCheckpoint(checkpoint="um.pth").settings() == {
        "method": "unleashing_mask",
        "checkpoint": "um.pth",
    }
    for settings in ({"id_loss": "um"}, {"masks": MASKS}, {"epochs": 3}):
        with pytest.raises(ValidationError, match="unknown key"):
            UnleashingMaskCheckpoint(checkpoint="um.pth", **settings)


def test_plain_is_the_same_budget_without_um_and_masks():
    recipe = UnleashingMaskRecipe(epochs=7, learning_rate=0.2, masks=MASKS, expected_accuracy=90)
    assert recipe.plain() == UnleashingMaskRecipe(epochs=7, learning_rate=0.2, id_loss="cross_entropy")
