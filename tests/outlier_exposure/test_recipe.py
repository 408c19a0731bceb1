"""Which combinations of the options of outlier exposure can be written down, and which cannot."""

import itertools

import pytest
from pydantic import ValidationError

from ood_helpers.config import load_config
from ood_helpers.outlier_exposure.recipe import OutlierExposureCheckpoint, OutlierExposureRecipe

OBJECTIVES = {
    "oe": {"weight"},
    "energy": {"weight", "inside", "outside"},
    "doe": {"weight", "unperturbed_epochs", "strengths", "kept", "max_norm"},
    "ntom": {"weight"},
}
SAMPLES = {
    "random": set(),
    "ntom": {"pool_size", "quantile"},
    "poem": {"pool_size", "prior_variance", "noise_variance", "confidence", "buffer_epochs"},
}
VALUES = {"inside": -20, "strengths": [0.1], "kept": 0.5, "quantile": 0.2, "pool_size": 100}


@pytest.mark.parametrize("id_loss", ["um", "cross_entropy"])
@pytest.mark.parametrize(("objective", "sample"), list(itertools.product(OBJECTIVES, SAMPLES)))
def test_every_objective_goes_with_every_sample_with_and_without_um(objective, sample, id_loss):
    recipe = OutlierExposureRecipe(objective=objective, sample=sample, id_loss=id_loss)
    assert (recipe.objective.kind, recipe.sample.kind, recipe.id_loss.kind) == (objective, sample, id_loss)
    assert recipe.background == (objective == "ntom")
    assert recipe.changed({}) == recipe == OutlierExposureRecipe.model_validate(recipe.settings())


@pytest.mark.parametrize(("field", "options"), [("objective", OBJECTIVES), ("sample", SAMPLES)])
def test_each_kind_has_its_own_options_and_no_others(field, options):
    for kind, name in itertools.product(options, sorted(set().union(*options.values()))):
        settings = {field: {"kind": kind, name: VALUES.get(name, 1)}}
        if name in options[kind]:
            assert getattr(OutlierExposureRecipe(**settings), field).kind == kind
        else:
            with pytest.raises(ValidationError, match=f"unknown key '{name}'"):
                OutlierExposureRecipe(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"objective": {"kind": "energy", "inside": -7}},
            "inside is -7 and outside -7, expected the energy of",
        ),
        ({"objective": "doe", "epochs": 5}, "unperturbed_epochs is 5, expected less than the 5 epochs"),
        ({"objective": {"kind": "doe", "strengths": []}}, "at least 1 item"),
        ({"objective": {"kind": "doe", "kept": 1}}, "less than 1"),
        ({"objective": {"weight": 2}}, "kind"),
        ({"sample": {"kind": "ntom", "quantile": 1}}, "less than 1"),
        ({"id_loss": {"kind": "cross_entropy", "constraint": 0.1}}, "unknown key 'constraint'"),
        ({"outlier_factor": 0}, "greater than 0"),
    ],
)
def test_values_that_make_no_sense(settings, message):
    with pytest.raises(ValidationError, match=message):
        OutlierExposureRecipe(**settings)


def test_a_checkpoint_says_only_whether_it_has_an_output_for_outliers():
    loaded = OutlierExposureCheckpoint(checkpoint="oe.pth", objective="ntom")
    assert loaded.background and not OutlierExposureCheckpoint(checkpoint="oe.pth").background
    for settings in ({"sample": "random"}, {"id_loss": "um"}, {"epochs": 3}):
        with pytest.raises(ValidationError, match="unknown key"):
            OutlierExposureCheckpoint(checkpoint="oe.pth", **settings)


def test_sets_like_the_outliers_are_not_reported():
    config = load_config("digits", overrides=["ablations={}"])
    assert config.outliers.related == ("chimeras",)
    for recipe in (OutlierExposureRecipe(), OutlierExposureCheckpoint(checkpoint="oe.pth")):
        assert recipe.unreported(config) == ("chimeras",)
        assert recipe.unreported(config.model_copy(update={"outliers": None})) == ()
