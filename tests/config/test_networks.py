"""The recipes of networks as a config gives them: defaults, checkpoints, and what is refused."""

import json

import pytest
from pydantic import ValidationError

from ood_helpers.config import load_config
from ood_helpers.config.networks import RECIPES, parse_recipe
from ood_helpers.errors import InputError

UM = "networks.um={method: unleashing_mask, "
OE = "networks.oe={method: outlier_exposure, "
DFB = "networks.dfb={method: dense, "
GROUP = "networks.group={"


def network(setting: str):
    """The recipe that a setting of the digits gives."""
    return load_config("digits", overrides=["ablations={}", setting]).networks[setting.split("=")[0][9:]]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (UM + "id_loss: {kind: cross_entropy, constraint: 0.3}}", "um.id_loss: unknown key 'constraint'"),
        (UM + "id_loss: {kind: cross_entropy, beta: 0.5}}", "um.id_loss: unknown key 'beta'"),
        (UM + "id_loss: cross_entrpy}", "um.id_loss: found 'cross_entrpy'; did you mean 'cross_entropy'"),
        (UM + "id_loss: {constraint: 0}}", "um.id_loss.constraint: found 0, expected"),
        (UM + "id_loss: {constraint: high}}", "um.id_loss.constraint: found 'high', expected"),
        (UM + "id_loss: {constraint: {keep_rate: 0}}}", "um.id_loss.constraint.keep_rate: found 0, expected"),
        (UM + "id_loss: {constraint: {draw: 3}}}", "um.id_loss.constraint: unknown key 'draw'; did you mean 'draws'"),
        (UM + "freeze_weights: true}", "um: unknown key 'freeze_weights'"),
        (UM + "masks: {freeze_weights: true}}", "um.masks.keep_rate: Field required"),
        (UM + "masks: {keep_rate: 1}}", "um.masks: keep_rate 1 drops nothing"),
        (UM + "masks: {keep_rate: 0}}", "um.masks.keep_rate: found 0, expected"),
        (UM + "masks: {keep_rate: 1.5}}", "um.masks.keep_rate: found 1.5, expected"),
        (UM + "masks: {keeprate: 0.8}}", "um.masks: unknown key 'keeprate'; did you mean 'keep_rate'"),
        (UM + "nesterov: true, momentum: 0}", "um: nesterov needs momentum"),
        (UM + "scored_epoch: 11, epochs: 10}", "um: scored_epoch is 11, expected at most the 10 epochs"),
        (UM + "scored_epoch: bets}", "um.scored_epoch: found 'bets', expected last, best or the number"),
        (UM + "warmup_epochs: 11, epochs: 10}", "um: warmup_epochs is 11, expected less than the 10 epochs"),
        (UM + "batch_size: 1}", "um.batch_size: found 1, expected"),
        (UM + "start: frist}", "um.start: found 'frist', expected last, best .*, or the path of a checkpoint"),
        (UM + "start: 4}", r"um.start is 4, but the backbone saves the epochs \[3, 6, .*30\]"),
        (UM + "checkpoint: um.pth, epochs: 3}", "um: unknown key 'epochs'; valid names: checkpoint, "),
        (UM + "checkpoint: um.pth, id_loss: um}", "um: unknown key 'id_loss'; valid names: checkpoint, "),
        ("networks.um={method: unleashing}", "um: unknown method 'unleashing'; did you mean 'unleashing_mask'"),
        ("networks.um={method: outlier_exposur}", "um: unknown method .* did you mean 'outlier_exposure'"),
        ("networks.um=5", "um: found 5, expected a mapping of settings"),
        (OE + "objective: eo}", "oe.objective: found 'eo'; did you mean 'oe'"),
        (OE + "objective: {kind: oe, inside: -20}}", "oe.objective: unknown key 'inside'"),
        (OE + "objective: {weight: 2}}", "oe.objective: 'kind' is missing"),
        (OE + "objective: {kind: energy, kept: 0.5}}", "oe.objective: unknown key 'kept'"),
        (OE + "objective: {kind: energy, inside: -5}}", "oe.objective: inside is -5 and outside -7, expected"),
        (OE + "objective: doe, epochs: 5}", "oe: objective.unperturbed_epochs is 5, expected less than the 5"),
        (OE + "sample: {kind: random, pool_size: 3}}", "oe.sample: unknown key 'pool_size'"),
        (OE + "sample: {kind: ntom, confidence: 3}}", "oe.sample: unknown key 'confidence'"),
        (OE + "sample: {kind: poem, quantile: 0.1}}", "oe.sample: unknown key 'quantile'"),
        (OE + "sample: {kind: ntom, quantile: 1}}", "oe.sample.quantile: found 1, expected"),
        (DFB + "groups: {strategy: random, number: 2}}", "dfb: unknown key 'groups'"),
        (DFB + "background_column: first}", "dfb: unknown key 'background_column'"),
        (DFB + "images: {depht: 1}}", "dfb.images: unknown key 'depht'; did you mean 'depth'"),
        (DFB + "images: {depth: 9}}", "dfb.images.depth is 9, expected -1 to 3, .* blocks of densenet_bc"),
        (DFB + "masks: {threshold: 1}}", "dfb.masks.threshold: found 1, expected"),
        (GROUP + "depth: 1}", "group: unknown key 'depth'"),
        (GROUP + "flip: true}", "group: unknown key 'flip'"),
        (GROUP + "schedule: [1, 3, 2, 4, 5]}", r"group: the steps of schedule \[1, 3, 2, 4, 5\] do not rise"),
        (GROUP + "groups: {strategy: kmean, number: 3}}", "group.groups: found 'kmean'; did you mean 'kmeans'"),
        (GROUP + "groups: {strategy: random}}", "group.groups.number: Field required"),
        (GROUP + "groups: {strategy: random, number: 3, file: digits}}", "group.groups: unknown key 'file'"),
        (GROUP + "groups: {strategy: taxonomy, file: digits, number: 3}}", "group.groups: unknown key 'number'"),
        (GROUP + "groups: {strategy: kmeans, number: 11}}", "group.groups.number is 11, .* at most the 10 classes"),
        (GROUP + "checkpoint: w.pth, learning_rate: 0.1}", "group: unknown key 'learning_rate'; valid names: checkpoint"),
        (GROUP + "class_numbering: ilsvrc2012_devkit}", "group: unknown key 'class_numbering'"),
        (
            GROUP + "checkpoint: w.pth, groups: {strategy: random, number: 3}, class_numbering: ilsvrc2012_devkit}",
            "group: class_numbering is of a flat head",
        ),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_by_name_and_place(setting, sentence):
    with pytest.raises(InputError, match=rf"digits\.yaml: networks\.{sentence}") as caught:
        network(setting)
    assert "\n" not in str(caught.value)


def test_a_network_without_a_method_is_a_classifier():
    assert parse_recipe({}) == RECIPES["classifier"]() == parse_recipe({"checkpoint": None})
    assert parse_recipe({"groups": {"strategy": "random", "number": 2}}).softmax == "group"
    assert (
        load_config("digits", overrides=["ablations={}", "networks.flat=null"]).networks["flat"].method
        == "classifier"
    )


@pytest.mark.parametrize("method", list(RECIPES))
def test_a_checkpoint_is_another_model_of_the_same_method(method):
    trained, loaded = (
        parse_recipe({"method": method}),
        parse_recipe({"method": method, "checkpoint": "w.pth"}),
    )
    assert (trained.method, trained.trained_here, trained.files) == (method, True, [])
    assert (loaded.method, loaded.trained_here, loaded.files) == (method, False, ["w.pth"])
    assert (loaded.softmax, loaded.background) == (trained.softmax, trained.background)
    assert loaded.image_sets == ()
    with pytest.raises(ValidationError, match="unknown key 'learning_rate'"):
        parse_recipe({"method": method, "checkpoint": "w.pth", "learning_rate": 0.1})


def test_what_a_recipe_needs_and_how_it_scores():
    outlier_class = parse_recipe({"method": "outlier_exposure", "objective": "ntom"})
    assert outlier_class.image_sets == ("outliers",) and outlier_class.background
    assert not parse_recipe({"method": "outlier_exposure"}).background
    assert parse_recipe({"method": "dense"}).background
    assert parse_recipe({"method": "unleashing_mask", "start": "runs/epoch.pth"}).files == ["runs/epoch.pth"]


def test_a_bare_name_is_the_kind_with_its_defaults():
    for short, long in (
        (UM + "id_loss: cross_entropy}", UM + "id_loss: {kind: cross_entropy}}"),
        (OE + "objective: energy, sample: poem, id_loss: um}", OE + "objective: {kind: energy}, sample: {kind: poem}, id_loss: {}}"),
    ):  # fmt: skip
        assert network(short) == network(long)


@pytest.mark.parametrize(
    ("setting", "keys"),
    [
        (UM + "id_loss: {constraint: 0.3}}", {"id_loss": {"kind": "um", "constraint": 0.3, "beta": 1.0}}),
        (
            UM + "masks: {keep_rate: 0.8}, id_loss: cross_entropy, tolerance: 3, expected_accuracy: 90}",
            {
                "id_loss": {"kind": "cross_entropy"},
                "masks": {"keep_rate": 0.8, "freeze_weights": True, "initial_scores": "random", "rounding": "nearest"},
            },
        ),
        (
            OE + "objective: energy, save_every: 2}",
            {
                "id_loss": {"kind": "cross_entropy"},
                "objective": {"kind": "energy", "weight": 0.1, "inside": -25, "outside": -7},
                "sample": {"kind": "random"},
                "outlier_factor": 1.0,
                "save_every": 2,
            },
        ),
    ],
)  # fmt: skip
def test_settings_are_what_the_weights_depend_on(setting, keys):
    settings = network(setting).settings()
    training = {
        *("start", "epochs", "batch_size", "learning_rate", "warmup_epochs", "momentum", "nesterov"),
        *("weight_decay", "crop_padding", "flip", "scored_epoch"),
    }
    assert settings.keys() == {"method", *training, *keys}
    assert {key: settings[key] for key in keys} == keys
    assert json.loads(json.dumps(settings)) == settings


def test_settings_of_a_fine_tuned_network_do_not_hold_what_is_expected_of_it():
    recipe = network(GROUP + "groups: {strategy: random, number: 3}, expected_accuracy: 90, tolerance: 2}")
    assert recipe.settings() == {
        "method": "classifier",
        "groups": {"strategy": "random", "number": 3, "seed": 0},
        "batch_size": 512,
        "learning_rate": 0.003,
        "momentum": 0.9,
        "weight_decay": 0.0,
    }


def test_the_papers_recipe_is_the_default():
    recipe = network(UM + "}")
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.momentum) == (100, 256, 0.1, 0.9)
    assert (recipe.weight_decay, recipe.nesterov, recipe.start, recipe.masks) == (1e-4, False, "last", None)
    assert (recipe.id_loss.kind, recipe.id_loss.beta, recipe.id_loss.constraint.keep_rate) == ("um", 1, 0.965)
    exposed = network(OE + "}")
    assert (exposed.epochs, exposed.learning_rate, exposed.id_loss.kind) == (10, 0.01, "cross_entropy")
    assert (exposed.objective.kind, exposed.objective.weight) == ("oe", 0.5)
    energy = network(OE + "objective: energy}").objective
    assert (energy.weight, energy.inside, energy.outside) == (0.1, -25, -7)
    doe = network(OE + "objective: doe}").objective
    assert (doe.weight, doe.unperturbed_epochs) == (1, 5)


def test_a_recipe_may_be_changed_but_not_to_what_makes_no_sense():
    recipe = network(UM + "masks: {keep_rate: 0.8}, expected_accuracy: 95}")
    changed = recipe.changed({"masks.keep_rate": 0.5, "id_loss": "cross_entropy", "epochs": 3})
    assert (changed.masks.keep_rate, changed.id_loss.kind, changed.epochs) == (0.5, "cross_entropy", 3)
    with pytest.raises(ValueError, match=r"^masks\.keep_rate: found 2, expected"):
        recipe.changed({"masks.keep_rate": 2})
    with pytest.raises(ValueError, match=r"^id_loss: unknown key 'constraint'"):
        recipe.changed({"id_loss": "cross_entropy"}).changed({"id_loss.constraint": 1})
