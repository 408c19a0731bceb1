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
