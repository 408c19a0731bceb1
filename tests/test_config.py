"""Configs: what ships is valid, and what is misspelt is named with its nearest valid neighbour."""

import pytest
import yaml

from ood_helpers.config import CONFIG_DIRECTORY, PROJECT_ROOT, config_names, load_config, resolve_path
from ood_helpers.detectors import create_all
from ood_helpers.errors import InputError


@pytest.mark.parametrize("name", config_names())
def test_every_shipped_config_is_valid_and_named_after_its_file(name):
    config = load_config(name, data_root="somewhere")
    assert config.name == name
    assert create_all(config.detectors)
    assert "${" not in config.model_dump_json()


def test_the_four_experiments_of_the_foundation_ship():
    assert {"digits", "cifar10_npz", "cifar10_densenet", "cifar100_densenet"} <= set(config_names())


def test_data_root_replaces_its_placeholder(tmp_path):
    config = load_config("cifar10_npz", data_root=tmp_path)
    assert config.id.test.path == str(tmp_path / "data/cifar10/test.npz")
    assert config.backbone.checkpoint.startswith(str(tmp_path))
    assert load_config("cifar10_densenet", data_root=tmp_path).id.train.root == str(tmp_path)


def test_near_and_far_sets_of_the_sample():
    groups = {ood.name: ood.group for ood in load_config("cifar10_npz").ood}
    assert groups == {"CIFAR-100": "near", "Tiny-ImageNet": "near", "SVHN": "far", "Textures": "far"}


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("himplos.percentile=50", lambda c: c.detectors["himplos"]["percentile"], 50),
        ("detectors.line.delta=null", lambda c: c.detectors["line"]["delta"], None),
        ("backbone.training.epochs=3", lambda c: c.backbone.training.epochs, 3),
        ("ood.letters.images.count=16", lambda c: c.ood[0].images.count, 16),
        ("id.test.subset.first=7", lambda c: c.id.test.subset.first, 7),
        ("metrics={bootstrap_resamples: 10}", lambda c: c.metrics.bootstrap_resamples, 10),
    ],
)
def test_an_override_sets_any_field(override, place, value):
    assert place(load_config("digits", overrides=[override])) == value


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("himplo.percentile=50", "did you mean 'himplos'"),
        ("backbne.depth=40", "did you mean 'backbone'"),
        ("backbone.growthrate=12", "'growthrate'; did you mean 'growth_rate'"),
        ("backbone.training.epoch=3", "'epoch'; did you mean 'epochs'"),
        ("id.tset.split=test", "'tset'; did you mean 'test'"),
        ("ood.leters.group=far", "did you mean 'letters'"),
        ("ood.letters.images.cuont=5", "'cuont'; did you mean 'count'"),
        ("transform.std=[0, 1, 1]", "transform.std"),
        ("ood.letters.group=middle", "'middle'"),
        ("backbone.widen_factor=2", "'widen_factor'"),
        ("seed", "KEY=VALUE"),
        ("line.delta=[", "not valid YAML"),
        ("backbone.checkpoint=x.pth", "checkpoint and training"),
        ("id.test.subset={first: 3, random: 3}", "exactly one"),
        ("backbone.depth=23", "6 n + 4"),
        ("ood.noise.name=letters", "taken"),
    ],
)
def test_a_wrong_override_is_one_sentence_with_a_way_out(override, sentence):
    with pytest.raises(InputError) as caught:
        load_config("digits", overrides=[override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


UM = "networks.um={method: unleashing_mask, "
OE = "networks.oe={method: outlier_exposure, "
OUTLIERS = "outliers={name: jigsaw, images: {source: embedded, set: jigsaw}, related: [chimeras]}"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            UM + "loss_constraint: 0.3, id_loss: cross_entropy}",
            "loss_constraint has no effect on plain cross",
        ),
        (UM + "beta: 0.5, id_loss: cross_entropy}", "beta has no effect on plain cross-entropy"),
        (
            UM + "estimate: {draws: 2}, id_loss: cross_entropy}",
            "estimate has no effect on plain cross-entropy",
        ),
        (
            UM + "loss_constraint: 0.3, estimate: {draws: 2}}",
            "estimate has no effect where loss_constraint is",
        ),
        (
            UM + "freeze_weights: true}",
            "networks.um: freeze_weights has no effect without masks; set keep_rate",
        ),
        (UM + "initial_scores: magnitude}", "initial_scores has no effect without masks"),
        (UM + "rounding: truncated}", "rounding has no effect without masks"),
        (UM + "keep_rate: 1}", "keep_rate 1 drops nothing"),
        (UM + "keep_rate: 0}", "networks.um.keep_rate: found 0, expected"),
        (UM + "keep_rate: 1.5}", "networks.um.keep_rate: found 1.5, expected"),
        (UM + "loss_constraint: 0}", "networks.um.loss_constraint: found 0, expected"),
        (UM + "estimate: {keep_rate: 0}}", "networks.um.estimate.keep_rate: found 0, expected"),
        (UM + "nesterov: true, momentum: 0}", "nesterov has no effect without momentum"),
        (UM + "scored_epoch: 11, epochs: 10}", "scored_epoch is 11, expected at most the 10 epochs"),
        (UM + "warmup_epochs: 11, epochs: 10}", "warmup_epochs is 11, expected less than the 10 epochs"),
        (UM + "batch_size: 1}", "networks.um.batch_size: found 1, expected"),
        (UM + "keeprate: 0.8}", "unknown key 'keeprate'; did you mean 'keep_rate'"),
        (UM + "estimate: {draw: 3}}", "unknown key 'draw'; did you mean 'draws'"),
        (UM + "checkpoint: um.pth, epochs: 3}", "epochs has no effect on a checkpoint"),
        (UM + "checkpoint: um.pth, loss_constraint: 1}", "loss_constraint has no effect on a checkpoint"),
        ("networks.um={method: unleashing}", "unknown method 'unleashing'; did you mean 'unleashing_mask'"),
        ("networks.um={method: outlier_exposur}", "did you mean 'outlier_exposure'"),
        (OE + "margins: {inside: -20}}", "margins has no effect without objective: energy; remove it"),
        (OE + "doe: {kept: 0.5}}", "doe has no effect without objective: doe; remove it"),
        (OE + "posterior: {confidence: 3}}", "posterior has no effect without sample: poem; remove it"),
        (OE + "quantile: 0.1}", "quantile has no effect without sample: ntom; remove it"),
        (
            OE + "objective: energy, loss_constraint: 0.1}",
            "loss_constraint has no effect on plain cross-entropy",
        ),
        (OE + "objective: doe, epochs: 5}", "doe.unperturbed_epochs is 5, expected less than the 5 epochs"),
        (
            OUTLIERS.replace("chimeras", "chimera"),
            "outliers.related names 'chimera'; did you mean 'chimeras'",
        ),
    ],
)
def test_a_setting_without_effect_is_refused_by_name(override, sentence):
    with pytest.raises(InputError) as caught:
        load_config("digits", overrides=[override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_exposure_needs_outliers():
    overrides = ["networks={}", "outliers=null", "detectors={msp: {}}", "tuning=null", OE + "epochs: 3}"]
    with pytest.raises(
        InputError, match=r"networks\.oe is trained with auxiliary outliers, but .*; add outliers"
    ):
        load_config("digits", overrides=overrides)


def test_the_best_epoch_needs_validation_images():
    overrides = ["id.validation=null", "tuning=null", UM + "scored_epoch: best}"]
    with pytest.raises(InputError, match=r"networks\.um\.scored_epoch: best needs ID images of its own"):
        load_config("digits", overrides=overrides)
    assert load_config("digits", overrides=overrides[2:]).networks["um"].scored_epoch == "best"


@pytest.mark.parametrize(
    ("override", "without"),
    [
        (
            UM + "loss_constraint: 0.3}",
            {"estimate", "keep_rate", "freeze_weights", "initial_scores", "rounding"},
        ),
        (UM + "keep_rate: 0.8}", {"loss_constraint"}),
        (
            UM + "id_loss: cross_entropy}",
            {
                "estimate",
                "loss_constraint",
                "beta",
                "keep_rate",
                "freeze_weights",
                "initial_scores",
                "rounding",
            },
        ),
        (
            OE + "objective: energy}",
            {"doe", "posterior", "quantile", "pool_size", "estimate", "loss_constraint", "beta"},
        ),
        (OE + "sample: poem, id_loss: um}", {"doe", "margins", "quantile", "loss_constraint"}),
    ],
)
def test_in_force_is_what_the_weights_depend_on(override, without):
    (recipe,) = (
        recipe
        for name, recipe in load_config(
            "digits", overrides=[OUTLIERS, "unleashing_ablations=null", override]
        ).networks.items()
        if override.startswith(f"networks.{name}=")
    )
    optional = {"steps_per_epoch", "save_every", "outlier_weight"} & recipe.in_force().keys()
    of_none = {"steps_per_epoch", "save_every", "outlier_weight"} - optional
    expected = set(type(recipe).model_fields) - without - of_none
    assert recipe.in_force().keys() == expected - {"checkpoint", "expected_accuracy", "tolerance"}


def test_the_papers_recipe_is_the_default():
    recipe = load_config("digits", overrides=[UM + "}"]).networks["um"]
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.momentum) == (100, 256, 0.1, 0.9)
    assert (recipe.weight_decay, recipe.nesterov, recipe.beta, recipe.start) == (1e-4, False, 1, "last")
    assert (recipe.estimate.keep_rate, recipe.id_loss, recipe.keep_rate) == (0.965, "um", None)
    exposed = load_config("digits", overrides=[OUTLIERS, OE + "}"]).networks["oe"]
    assert (exposed.epochs, exposed.learning_rate, exposed.weight, exposed.id_loss) == (
        10,
        0.01,
        0.5,
        "cross_entropy",
    )
    assert (exposed.margins.inside, exposed.margins.outside, exposed.doe.unperturbed_epochs) == (-25, -7, 5)


@pytest.mark.parametrize(
    ("override", "row", "key"),
    [
        ("pytorch_ood.KNN.k=20", "pytorch_ood.KNN", "k"),
        ("detectors.pytorch_ood.KNN.k=20", "pytorch_ood.KNN", "k"),
        ("pytorch_ood.KNN.small.k=20", "pytorch_ood.KNN.small", "k"),
    ],
)
def test_an_override_reaches_a_row_with_dots_in_its_name(override, row, key, tmp_path):
    """The longest row name that fits is meant."""
    data = yaml.safe_load((CONFIG_DIRECTORY / "digits.yaml").read_text())
    data["detectors"] = {"line": {}, "pytorch_ood.KNN": None, "pytorch_ood.KNN.small": {"k": 5}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data | {"tuning": None}))
    expected = {"line": {}, "pytorch_ood.KNN": {}, "pytorch_ood.KNN.small": {"k": 5}}
    expected[row] = {**expected[row], key: 20}
    assert load_config(path, overrides=[override]).detectors == expected
    with pytest.raises(InputError, match=r"did you mean 'pytorch_ood\.KNN'"):
        load_config(path, overrides=["pytorch_ood.KN.k=20"])


def test_an_unknown_experiment_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'cifar10_npz'"):
        load_config("cifar10_nzp")


def test_a_config_is_found_by_path(tmp_path):
    data = yaml.safe_load((CONFIG_DIRECTORY / "digits.yaml").read_text()) | {"name": "mine"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    assert load_config(path).name == "mine"
    path.write_text("name: [unclosed")
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(path)


def test_relative_paths_mean_the_same_from_the_project_and_from_notebooks(monkeypatch):
    monkeypatch.chdir(PROJECT_ROOT / "notebooks")
    assert resolve_path("configs") == PROJECT_ROOT / "configs"
