"""Reading configs: what ships is valid, what a config extends is merged, and what is misspelt is named with its nearest
valid neighbour."""

import pytest
import yaml

from ood_helpers.config import CONFIG_DIRECTORY, config_names, load_config
from ood_helpers.detectors.base import create
from ood_helpers.errors import InputError

NAMES_OF_ROWS = {"detector", "network", "label"}  # settings of a row that its detector does not take


def refused(*overrides, experiment="digits") -> str:
    """The one sentence by which settings are refused."""
    with pytest.raises(InputError) as caught:
        load_config(experiment, overrides=overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def written(tmp_path):
    """Writes configs to a folder and loads the first of them."""

    def load(overrides=(), **texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return load_config(tmp_path / f"{next(iter(texts))}.yaml", overrides=overrides)

    return load


@pytest.mark.parametrize("name", config_names())
def test_every_shipped_config_is_valid_and_named_after_its_file(name):
    config = load_config(name, data_root="somewhere")
    assert config.name == name
    for row, settings in config.detectors.items():
        create(settings.get("detector", row), **{k: v for k, v in settings.items() if k not in NAMES_OF_ROWS})
    assert "${" not in config.model_dump_json()


def test_the_experiments_of_the_papers_ship():
    expected = {
        "digits",
        "cifar10_npz",
        "cifar10_sample",
        "cifar10_densenet",
        "cifar100_densenet",
        "imagenet_bit_mos",
    }
    assert set(config_names()) >= expected


def test_data_root_replaces_its_placeholder(tmp_path):
    config = load_config("cifar10_npz", data_root=tmp_path)
    assert config.id.test.path == str(tmp_path / "data/cifar10/test.npz")
    assert config.backbone.checkpoint.startswith(str(tmp_path))
    assert load_config("cifar10_densenet", data_root=tmp_path).id.train.root == str(tmp_path)
    archive = load_config("cifar10_densenet", data_root=tmp_path).sources()["iSUN"]
    assert archive.directory == str(tmp_path)


def test_a_setting_may_name_the_data_root(tmp_path):
    overrides = ["id.test.path=${data_root}/mine.npz", "ood.SVHN.images={source: torchvision, dataset: SVHN, split: test}"]  # fmt: skip
    config = load_config("cifar10_npz", data_root=tmp_path, overrides=overrides)
    assert config.id.test.path == str(tmp_path / "mine.npz")
    assert config.sources()["SVHN"].root == str(tmp_path)


def test_near_and_far_sets_of_the_sample():
    groups = {ood.name: ood.group for ood in load_config("cifar10_npz").ood}
    assert groups == {"CIFAR-100": "near", "Tiny-ImageNet": "near", "SVHN": "far", "Textures": "far"}


# ---- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("himplos.percentile=50", lambda c: c.detectors["himplos"]["percentile"], 50),
        ("detectors.line.delta=null", lambda c: c.detectors["line"]["delta"], None),
        ("msp.label=my own", lambda c: c.detectors["msp"]["label"], "my own"),  # a row without settings
        ("backbone.training.epochs=3", lambda c: c.backbone.training.epochs, 3),
        ("ood.letters.images.count=16", lambda c: c.ood[0].images.count, 16),
        ("ood.noise.group=near", lambda c: c.ood[4].group, "near"),
        ("id.test.subset.first=7", lambda c: c.id.test.subset.first, 7),
        ("id.test.subset={per_class: 7}", lambda c: c.id.test.subset.per_class, 7),
        ("id.test.subset={random: 7, seed: 2}", lambda c: c.id.test.subset.seed, 2),
        ("metrics={bootstrap_resamples: 10}", lambda c: c.metrics.bootstrap_resamples, 10),
        ("networks.flat.mixup=0.2", lambda c: c.networks["flat"].mixup, 0.2),
        ("networks.flat.images.depth=1", lambda c: c.networks["flat"].depth, 1),
        ("networks.mine={method: dense}", lambda c: c.networks["mine"].depth, -1),
        ("networks.um.id_loss.constraint.draws=2", lambda c: c.networks["um"].id_loss.constraint.draws, 2),
        ("networks.um={checkpoint: um.pth, method: unleashing_mask}", lambda c: c.networks["um"].files, ["um.pth"]),
        ("ablations.epochs.values=[1]", lambda c: c.ablations["epochs"].values, (1,)),
        ("tuning.grids.knn.k=[3]", lambda c: c.tuning.grids["knn"], {"k": [3]}),
    ],
)  # fmt: skip
def test_a_setting_changes_any_field(override, place, value):
    overrides = [override] if "checkpoint" not in override else ["ablations={}", override]
    assert place(load_config("digits", overrides=overrides)) == value


def test_settings_apply_in_order_and_one_by_one():
    """YAML anchors share what they name; a setting changes it in one place."""
    overrides = [
        "networks.oe.epochs=4",
        "networks.energy_margins.epochs=5",
        "networks.energy_margins.epochs=6",
    ]
    networks = load_config("digits", overrides=overrides).networks
    assert [networks[name].epochs for name in ("oe", "energy_margins", "poem")] == [4, 6, 3]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("himplo.percentile=50", "did you mean 'himplos'"),
        ("backbne.depth=40", "did you mean 'backbone'"),
        ("backbone.growthrate=12", "backbone: unknown key 'growthrate'; did you mean 'growth_rate'"),
        ("backbone.training.epoch=3", "backbone.training: unknown key 'epoch'; did you mean 'epochs'"),
        ("id.tset.split=test", "id: unknown key 'tset'; did you mean 'test'"),
        ("ood.leters.group=far", "did you mean 'letters'"),
        ("ood.letters.images.cuont=5", "ood.letters.images: unknown key 'cuont'; did you mean 'count'"),
        ("ood.letters.group=middle", "ood.letters.group: found 'middle', expected"),
        ("transform.std=[0, 1, 1]", "transform.std.0: found 0, expected"),
        ("backbone.widen_factor=2", "unknown key 'widen_factor'"),
        ("seed", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("line.delta=[", "not valid YAML"),
        ("backbone.checkpoint=x.pth", "one of checkpoint, training or weights; found checkpoint and training"),
        ("backbone.training=null", "one of checkpoint, training or weights; found none"),
        ("backbone.depth=23", "6 n + 4"),
        ("backbone.architecture=densnet_bc", "backbone: found 'densnet_bc'; did you mean 'densenet_bc'"),
        ("backbone={depth: 22}", "backbone: 'architecture' is missing"),
        ("id.train.source=embeded", "id.train: found 'embeded'; did you mean 'embedded'"),
        ("id.train.source=[embedded]", "id.train: found"),
        ("id.train.set=digit", "id.train: found 'digit'; did you mean 'digits'"),
        ("id.train.count=5", "id.train: unknown key 'count'"),
        ("id.train={source: npz}", "id.train.path: Field required"),
        ("ood.letters.images.split=train", "unknown key 'split'"),
        ("id.test.subset={first: 3, random: 3}", "id.test.subset: unknown key 'first'"),
        ("id.test.subset={first: 3, seed: 3}", "id.test.subset: unknown key 'seed'"),
        ("id.test.subset={}", "exactly one of first (and after), per_class, random and runs"),
        ("id.test.subset={runs: [[0, 3], [2, 5]]}", "runs are [start, stop] with start < stop, each after the one before"),
        ("id.test.subset={runs: [[3, 3]]}", "runs are [start, stop] with start < stop"),
        ("id.test.subset={runs: [[0, 3]], first: 2}", "id.test.subset: unknown key 'first'"),
        ("id.test.subset=3", "id.test.subset: found 3, expected"),
        ("networks.flat.schedule=[1, 2, 3]", "networks.flat.schedule.3: Field required"),
        ("id.train.split.x=3", "goes below id.train.split, which is the plain value"),
        ("ood.letters=5", "ends in a list; name one of its items"),
        ("extends=cifar10_npz", "starts with 'extends', neither a setting nor a detector"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence_with_a_way_out(override, sentence):
    assert sentence in refused(override)


def test_a_row_is_unknown_where_there_are_none():
    text = refused("detectors=null", "line.delta=1")
    assert "starts with 'line', neither a setting nor a detector of this experiment" in text


def test_all_problems_are_named_at_once():
    text = refused("backbone.depht=22", "metrics.bootstrap_resamples=0")
    assert "backbone: unknown key 'depht'" in text and "; metrics.bootstrap_resamples: found 0" in text


@pytest.mark.parametrize(
    ("override", "row", "key"),
    [
        ("pytorch_ood.KNN.k=20", "pytorch_ood.KNN", "k"),
        ("detectors.pytorch_ood.KNN.k=20", "pytorch_ood.KNN", "k"),
        ("pytorch_ood.KNN.small.k=20", "pytorch_ood.KNN.small", "k"),
    ],
)
def test_a_setting_reaches_a_row_with_dots_in_its_name(override, row, key, written):
    """The longest row name that fits is meant."""
    data = load_config("digits").model_dump(mode="json", exclude_none=True, exclude={"tuning"})
    data["detectors"] = {"line": {}, "pytorch_ood.KNN": None, "pytorch_ood.KNN.small": {"k": 5}}
    text = yaml.safe_dump(data)
    expected = {"line": {}, "pytorch_ood.KNN": {}, "pytorch_ood.KNN.small": {"k": 5}}
    expected[row] = {**expected[row], key: 20}
    assert written([override], mine=text).detectors == expected
    with pytest.raises(InputError, match=r"did you mean 'pytorch_ood\.KNN'"):
        written(["pytorch_ood.KN.k=20"], mine=text)


# ---- files ------------------------------------------------------------------------------------------------


def test_an_unknown_experiment_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'cifar10_npz'"):
        load_config("cifar10_nzp")


def test_a_config_is_found_by_path(written, tmp_path):
    assert written(mine=f"extends: {CONFIG_DIRECTORY}/digits\nname: mine").name == "mine"
    with pytest.raises(InputError, match="not valid YAML"):
        written(mine="name: [unclosed")
    with pytest.raises(InputError, match="holds list, expected a mapping"):
        written(mine="- name")
    with pytest.raises(
        InputError, match=r"No experiment .*other\.yaml; give a path to a YAML file or a name"
    ):
        load_config(tmp_path / "other.yaml")


BASE = f"extends: {CONFIG_DIRECTORY}/digits.yaml\n"


def test_a_config_holds_differences_only(written):
    changes = """
name: mine
transform: {mean: [0.5, 0.5, 0.5]}
ood: [{name: noise, group: far, images: {source: embedded, set: noise}}]
outliers: {related: []}
tuning: null
detectors: {line: {delta: 0.5}, knn: {k: 7}, mine: {detector: msp}}
"""
    config, base = written(mine=BASE + changes), load_config("digits")
    assert (config.name, config.description) == ("mine", "")  # not those of the base
    assert config.transform.mean == (0.5, 0.5, 0.5) and config.transform.std == base.transform.std
    assert [ood.name for ood in config.ood] == ["noise"]  # a list is replaced
    assert config.outliers.images == base.outliers.images and config.tuning is None
    assert list(config.detectors) == [*base.detectors, "mine"]  # their order is that of the tables
    assert config.detectors["line"] == {**base.detectors["line"], "delta": 0.5}
    assert (config.detectors["knn"], config.detectors["odin"]) == ({"k": 7}, base.detectors["odin"])


def test_another_choice_replaces_what_it_would_extend(written):
    """A network of another architecture does not keep the depth of the first; a row of another detector starts anew."""
    changes = """
name: mine
id: {validation: {source: npz, path: validation.npz}}
backbone: {architecture: resnet18_cifar, checkpoint: weights.pth}
networks: {group: {groups: {strategy: kmeans, number: 3}}, um: {method: dense}, doe: {objective: {weight: 2}}}
detectors: {odin: {detector: knn}}
ablations: null
"""
    config = written(mine=BASE + changes)
    assert (config.backbone.architecture, config.backbone.training) == ("resnet18_cifar", None)
    assert config.id.validation.path == "validation.npz" and config.id.train.source == "embedded"
    assert config.networks["group"].groups.number == 3
    assert config.networks["um"].method == "dense" and config.networks["um"].schedule is None
    assert (config.networks["doe"].objective.kind, config.networks["doe"].objective.weight) == ("doe", 2)
    assert config.detectors["odin"] == {"detector": "knn"}


def test_later_files_of_a_list_come_on_top_of_earlier_ones(written):
    first = BASE + "metrics: {bootstrap_resamples: 7, bootstrap_seed: 1}\n"
    second = "metrics: {bootstrap_seed: 2}\n"
    mine = written(mine="extends: [first, second]\nname: mine", first=first, second=second)
    assert (mine.metrics.bootstrap_resamples, mine.metrics.bootstrap_seed) == (7, 2)


def test_a_config_without_a_name_has_that_of_its_file_and_writes_nowhere_else(written):
    """It would write over the results of the one that it extends."""
    assert written(mine="extends: digits").name == "mine"


def test_an_ablation_that_is_not_there_cannot_be_left_out():
    with pytest.raises(
        InputError, match="leaves out an ablation that is not there; did you mean 'loss_constraint'"
    ):
        load_config("digits", overrides=["ablations.loss_constrain=null"])


def test_two_files_may_extend_the_same_one(written):
    first, second = BASE + "description: the first\n", BASE + "features: {workers: 3}\n"
    mine = written(mine="extends: [first, second]\nname: mine", first=first, second=second)
    assert mine.features.workers == 3


def test_the_paths_of_a_base_are_relative_to_its_own_folder(written, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "v1.0.yaml").write_text("extends: rows.yml\nname: v1")
    (tmp_path / "parts" / "rows.yml").write_text(BASE)
    assert written(mine="extends: parts/v1.0.yaml").name == "mine"


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({"mine": "extends: digitz"}, r"mine\.yaml extends digitz, but there is neither .*digitz\.yaml nor .*digitz\.yaml; correct"),
        ({"mine": "extends: [a]", "a": "extends: b"}, r"a\.yaml extends b, but there is neither .*b\.yaml"),
        ({"mine": "extends: mine"}, r"mine\.yaml extends mine, which extends it in turn"),
        ({"mine": "extends: a", "a": "extends: b", "b": "extends: mine"}, r"b\.yaml extends mine, which extends it"),
        ({"mine": "extends: a", "a": "- 1"}, r"a\.yaml holds list, expected a mapping"),
        ({"mine": "extends: a", "a": "name: ["}, r"a\.yaml is not valid YAML"),
        ({"mine": "extends: 5"}, "extends is 5, expected a file or a list of files"),
        ({"mine": "extends:"}, "extends is None, expected a file or a list of files"),
        ({"mine": "extends: [a, 5]", "a": BASE}, r"extends is \['a', 5\], expected a file or a list"),
        ({"mine": BASE + "backbone: {dept: 3}"}, r"mine\.yaml: backbone: unknown key 'dept'; did you mean 'depth'"),
    ],
)  # fmt: skip
def test_a_wrong_base_is_one_sentence(written, texts, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        written(**texts)
    assert "\n" not in str(caught.value)
