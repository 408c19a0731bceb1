"""Networks with a flat or a group softmax: what they share with the backbone, what is trained once, checkpoints, guards."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from ood_helpers.banks import HeadBank, StoredBank
from ood_helpers.data.imagenet import devkit_to_sorted
from ood_helpers.errors import InputError, MissingDataError
from ood_helpers.experiment import Experiment
from ood_helpers.mos.recipe import ClassifierCheckpoint, ClassifierRecipe
from ood_helpers.report import record
from ood_helpers.results import markdown_table
from ood_helpers.studies import compare_networks
from ood_helpers.training.fine_tuning import reorder

SMALL = [
    "backbone.training.epochs=4",
    "backbone.depth=10",
    "backbone.growth_rate=12",
    "backbone.expected_accuracy=null",
    "metrics.bootstrap_resamples=20",
    "features.shard_size=256",
    "tuning=null",
    "networks.group.schedule=[10, 20, 30, 40, 50]",
    "networks.flat.schedule=[10, 20, 30, 40, 50]",
    "networks.group.learning_rate=0.3",
    "networks.flat.learning_rate=0.3",
    *(f"ood.{name}.images.count=60" for name in ("letters", "chimeras", "photographs", "textures", "noise")),
]
IMAGES = ClassifierRecipe(schedule=(1, 2, 3, 4, 5), batch_size=64, images={"depth": 1})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("networks")


@pytest.fixture
def run(folder):
    """An experiment that finds what earlier ones left behind."""
    return small(folder)


def small(folder, *overrides, **options):
    folders = {"run_dir": str(folder / "runs"), "figures_dir": str(folder / "figures")}
    return Experiment.open("digits", **folders, overrides=[*SMALL, *overrides], device="cpu", **options)


def test_a_head_trained_on_features_shares_the_banks(run):
    network = run.network("group")
    bank, head = network.bank("letters"), network.head()
    assert isinstance(bank, HeadBank) and bank.bank is run.bank("letters")
    assert head.num_logits == 10 + network.groups().num_groups and head.num_classes == 10
    own, base = bank.load(), run.bank("letters").load()
    assert torch.equal(own.features, base.features) and own.taps.keys() == base.taps.keys()
    torch.testing.assert_close(own.logits, base.features @ head.weight.T + head.bias)
    pieces = torch.cat([shard.logits for shard in bank.shards()])
    torch.testing.assert_close(pieces, own.logits)
    for batch, shard in zip(network.image_bank("letters").shards(), bank.shards()):
        pixels = torch.cat(list(batch.pixels()))
        torch.testing.assert_close(batch.network.logits(pixels), shard.logits, rtol=1e-4, atol=1e-4)


def test_backbone_keeps_its_own_head(run):
    head = run.backbone.head().weight.clone()
    _ = run.network("group").model(), run.network("flat").model()
    assert torch.equal(run.backbone.model().head.weight.cpu(), head)
    assert run.bank("test").load().logits.shape[1] == run.network("flat").head().num_logits == 10


def test_accuracy_is_that_of_the_classes(run):
    network = run.network("group")
    bank = network.bank("test").load()
    right = []
    for logits, label in zip(bank.logits.double(), bank.labels.tolist()):
        best = {}
        for members, (start, end) in zip(network.groups().members, network.groups().slices):
            best |= dict(zip(members, logits[start:end].softmax(0)[1:].tolist()))
        right.append(max(best, key=best.get) == label)
    assert network.check_accuracy() == pytest.approx(100 * np.mean(right))
    assert network.check_accuracy() > 80


def test_rows_name_their_network(folder):
    rows = small(
        folder,
        "detectors={mos: , msp: , msp_flat: {detector: msp, network: flat}, "
        "mos_kmeans: {detector: mos, network: kmeans, label: 'MOS, k-means'}}",
        "networks.kmeans={groups: {strategy: kmeans, number: 3}}",
    ).rows()
    assert [row.network.name for row in rows.values()] == ["group", "", "flat", "kmeans"]
    assert [row.label for row in rows.values()] == ["MOS", "MSP", "MSP (flat)", "MOS, k-means"]


def test_rows_are_scored_on_their_network(run):
    table = run.results(["mos", "msp", "msp_flat"]).drop_duplicates("method").set_index("method")
    assert table.id_accuracy["MOS"] == pytest.approx(run.network("group").check_accuracy())
    assert table.id_accuracy["MSP (flat)"] == pytest.approx(run.network("flat").check_accuracy())
    assert table.id_accuracy["MSP"] == pytest.approx(run.check_accuracy())
    scores = run.scores("msp_flat")[1]["noise"]
    logits = run.network("flat").bank("noise").load().logits.double()
    np.testing.assert_allclose(scores, logits.softmax(1).amax(1), rtol=1e-9)


def test_scores_rest_on_the_code_of_the_groups(run):
    run.results(["mos", "msp_flat"])
    keys = [json.loads(path.read_text()) for path in (run.run_dir / "scores").glob("*/key.json")]
    rests = {key["detector"][0]: "ood_helpers.mos.groups" in key["code"] for key in keys}
    assert rests["MOS"] and not rests["MSP"]


def test_a_head_is_trained_once(run, monkeypatch):
    head = run.network("group").head()
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_, **__: pytest.fail("trained again"))
    again = small(run.run_dir.parent).network("group")
    assert torch.equal(again.head().weight, head.weight)
    assert len(again.history()) == 17  # 50 steps, an evaluation after every third


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.01},
        {"groups": {"strategy": "random", "number": 3}},
        {"groups": None},
        {"batch_size": 32},
    ],
)
def test_another_recipe_is_another_network(run, change):
    recipe, made = run.config.networks["group"], run.network("group")
    other = run.network(recipe.changed(change))
    assert other.training_entry().name != made.training_entry().name
    assert other.key("test") != made.key("test")
    expected = run.network(recipe.changed({"expected_accuracy": 12.0}))
    assert expected.training_entry().name == made.training_entry().name


def test_a_head_depends_on_the_seed_where_the_backbone_does_not(run, folder):
    path = folder / "backbone.pth"
    torch.save(run.backbone.model().state_dict(), path)
    overrides = ["backbone.training=null", f"backbone.checkpoint={path}"]
    one, two = small(folder, *overrides), small(folder, *overrides, seed=1)
    assert one.backbone.key("test") == two.backbone.key("test")
    assert one.network("group").key("test") != two.network("group").key("test")
    assert one.network("group").training_entry().name != two.network("group").training_entry().name
    pd.testing.assert_frame_equal(
        one.results(["msp"]).drop(columns="seed"), two.results(["msp"]).drop(columns="seed")
    )
    assert not np.array_equal(one.scores("mos")[0], two.scores("mos")[0])


def test_head_alone_is_trained_on_features_where_that_is_the_same(run):
    other = run.network(run.config.networks["group"].changed({"images": {}}))
    assert other.training_entry().name == run.network("group").training_entry().name
    assert torch.equal(other.head().weight, run.network("group").head().weight)


@pytest.mark.parametrize(
    ("change", "approximation"),
    [
        ({}, ""),
        ({"mixup": 0.1}, "mixup of features instead of images"),
        ({"mixup": 0.1, "images": {}}, ""),
        ({"images": {"depth": 1}}, ""),
    ],
)
def test_mixup_of_features_is_an_approximation(run, change, approximation):
    assert run.network(run.config.networks["group"].changed(change)).approximation() == approximation


def test_deeper_fine_tuning_has_banks_of_its_own(run):
    network = run.network(IMAGES)
    assert not network.shares_features()
    bank = network.bank("letters")
    assert isinstance(bank, StoredBank) and bank.key != run.bank("letters").key
    assert not torch.allclose(bank.load().features, run.bank("letters").load().features)
    weights, backbone = network.model().state_dict(), run.backbone.model().state_dict()
    assert torch.equal(weights["conv1.weight"], backbone["conv1.weight"])
    assert not torch.equal(weights["bn1.weight"], backbone["bn1.weight"])


# ---- checkpoints and guards -----------------------------------------------------------------------------


def checkpoint_of(network, path, **changes):
    """The weights of a network in a file, as their authors publish them."""
    state = {f"module.{name}": tensor.cpu() for name, tensor in network.model().state_dict().items()}
    torch.save({"step": 50, "model": state | changes}, path)
    return str(path)


@pytest.mark.parametrize("name", ["group", "flat"])
def test_a_checkpoint_in_place_of_training(run, folder, name):
    made = run.network(name)
    path = checkpoint_of(made, folder / f"{name}.pth.tar")
    groups_too = "groups: {strategy: taxonomy, file: digits}, " if name == "group" else ""
    loaded = small(folder, f"networks.{name}={{{groups_too}checkpoint: '{path}'}}", "ablations={}")
    network = loaded.network(name)
    assert network.shares_features() and network.history() is None and network.approximation() == ""
    assert torch.equal(network.head().weight, made.head().weight)
    assert network.check_accuracy() == made.check_accuracy()
    assert network.settings()["checkpoint"] == f"{name}.pth.tar"


def test_a_checkpoint_with_another_backbone_has_banks_of_its_own(run, folder):
    weight = run.backbone.model().state_dict()["conv1.weight"].cpu() * 1.1
    path = checkpoint_of(run.network("flat"), folder / "other.pth", **{"module.conv1.weight": weight})
    network = run.network(ClassifierCheckpoint(checkpoint=path))
    assert not network.shares_features() and isinstance(network.bank("noise"), StoredBank)


def test_the_guard_catches_a_head_in_another_order(run, folder):
    made = run.network("flat")
    shifted = made.head().weight.roll(1, dims=0)
    path = checkpoint_of(made, folder / "shifted.pth", **{"module.head.weight": shifted})
    wrong = small(
        folder, f"networks.flat={{checkpoint: '{path}', expected_accuracy: {made.check_accuracy():.2f}}}"
    )
    with pytest.raises(
        InputError, match=r"network flat of digits is .*expected .*label order.*networks.flat.expected"
    ):
        wrong.results(["energy_flat"])


def test_a_checkpoint_with_other_groups_is_noticed(run, folder):
    path = checkpoint_of(run.network("group"), folder / "group.pth")
    (folder / "other.yaml").write_text(
        'groups: {a: ["1", "3", "5", "7"], b: ["0", "2", "4"], c: ["6", "8", "9"]}'
    )
    groups_too = f"groups: {{strategy: taxonomy, file: {folder / 'other.yaml'}}}"
    wrong = small(folder, f"networks.group={{{groups_too}, checkpoint: '{path}'}}", "ablations={}")
    for _ in range(2):  # no second try gets past it
        with pytest.raises(InputError, match=r"network group of digits is .* the backbone's .* its groups"):
            wrong.results(["mos"])


def test_no_networks_may_be_said_as_null(folder):
    run = small(folder, "networks=null", "outliers=null", "detectors={msp: {}}", "ablations={}")
    assert run.config.networks == {}


def test_the_guard_of_the_backbone_stops_comparisons(folder):
    wrong = small(folder, "backbone.expected_accuracy=20")
    with pytest.raises(InputError, match="ID accuracy of digits"):
        compare_networks(wrong, {"flat": wrong.config.networks["flat"]})
    with pytest.raises(InputError, match="ID accuracy of digits"):
        wrong.network("group").others_probability(wrong.ood_sets())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "networks.group={groups: {strategy: taxonomy, file: digit}}",
            "No group file 'digit'.*did you mean 'digits'",
        ),
        (
            "networks.group={groups: {strategy: taxonomy, file: cifar10}}",
            "cifar10.yaml names the class 'bird'",
        ),
        ("networks.flat={images: {depth: 4}}", "networks.flat.images.depth is 4, expected -1 to 3"),
        ("ablations.depth.values=[0, 7]", "ablations.depth: images.depth is 7, expected -1 to 3"),
        ("ablations.depth.vary=images.dept", "ablations.depth: .*unknown key 'dept'; did you mean 'depth'"),
        ("mos.network=flat", "detectors.mos: MOS scores a group softmax, but the network flat has a flat"),
        ("msp.network=group", "detectors.msp: MSP scores a flat softmax, but the network group has a group"),
        ("networks.group.groups=null", "detectors.mos: MOS scores a group softmax"),
        ("msp_flat.network=flatt", "names 'flatt'; did you mean 'flat'"),
        ("networks.flat={depth: 1}", "networks.flat: unknown key 'depth'"),
        ("networks.flat={flip: true}", "networks.flat: unknown key 'flip'"),
        ("networks.flat={checkpoint: w.pth, learning_rate: 0.1}", "unknown key 'learning_rate'"),
        (
            "networks.group={groups: {strategy: taxonomy, file: digits}, checkpoint: w.pth, "
            "class_numbering: ilsvrc2012_devkit}",
            "class_numbering is of a flat head",
        ),
        ("networks.flat.class_numbering=ilsvrc2012_devkit", "unknown key 'class_numbering'"),
        ("networks.flat.schedule=[1, 3, 2, 4, 5]", "do not rise"),
        ("networks.group.groups.number=3", "networks.group.groups: unknown key 'number'"),
        ("networks.group.groups={strategy: random}", "networks.group.groups.number: Field required"),
        (
            "networks.group.groups={strategy: kmeans, number: 11}",
            "networks.group.groups.number is 11, expected at most the 10 classes",
        ),
        ("networks.flat.deptth=1", "unknown key 'deptth'"),
        ("networks.flat={images: {deptth: 1}}", "unknown key 'deptth'; did you mean 'depth'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(folder, override, message, monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(InputError, match=message) as error:
        small(folder, override).check()
    assert "\n" not in str(error.value)


def test_what_the_config_expects_of_a_network_is_not_expected_of_others(run, folder):
    accuracy = run.network("group").check_accuracy()
    expected = small(folder, f"networks.group.expected_accuracy={accuracy:.3f}")
    other = expected.config.networks["group"].changed({"batch_size": 32, "learning_rate": 1e-4})
    assert abs(expected.network(other).check_accuracy() - accuracy) > 0.5  # beyond the tolerance


def test_a_missing_checkpoint_is_found_before_anything_runs(folder):
    with pytest.raises(MissingDataError, match=r"No checkpoint .*nowhere\.pth"):
        small(folder, "networks.flat={checkpoint: nowhere.pth}").check()


def test_devkit_columns_come_into_the_order_of_labels():
    head = torch.nn.Linear(2, 1000)
    before = head.weight.detach().clone()
    order = devkit_to_sorted()
    reorder(head, torch.from_numpy(order))
    assert order[0] == 278 and order[448] == 0  # n02119789 is the devkit's first, n01440764 its 449th
    assert torch.equal(head.weight[278], before[0]) and torch.equal(head.weight[0], before[448])
    assert torch.equal(head.weight[torch.from_numpy(order)], before)


def test_networks_without_any_in_the_config(folder):
    run = small(folder, "networks={}", "outliers=null", "detectors={msp: {}}", "ablations={}")
    assert run.network("group").groups().names == ("cluster 1", "cluster 2", "cluster 3")
    assert run.row("mos").network is run.network("group")
    with pytest.raises(InputError, match="No network 'grup' in digits; did you mean 'group'"):
        run.network("grup")


# ---- what is said of them -------------------------------------------------------------------------------


def test_comparison_of_networks(run):
    networks = run.config.networks
    table, means = compare_networks(run, {"groups": networks["group"], "flat": networks["flat"]})
    assert table.method.unique().tolist() == ["groups", "flat"]
    assert table.groupby("method").ood_set.nunique().eq(5).all()
    results = run.results(["mos", "msp_flat"]).set_index(["method", "ood_set"])
    for line in table.itertuples():
        row = results.loc[({"groups": "MOS", "flat": "MSP (flat)"}[line.method], line.ood_set)]
        for column in ("fpr95", "fpr95_lo", "fpr95_hi", "auroc", "auroc_lo", "auroc_hi", "id_accuracy"):
            assert getattr(line, column) == pytest.approx(row[column]), column
    assert set(means.method) == {"groups", "flat"}


def test_probability_of_others_by_set_and_group(run):
    network = run.network("group")
    table, groups = network.others_probability(run.ood_sets()), network.groups()
    assert len(table) == (groups.num_groups + 5) * groups.num_groups
    of_group = np.array([line.set.endswith(f": {line.group}") for line in table.itertuples()])
    own = table[of_group]
    other = table[(table.kind == "ID")].drop(own.index)
    assert own["mean"].max() < 0.5 < other["mean"].min()
    assert (table.q25 <= table.q75).all()
    logits = network.bank("noise").load().logits.double()
    start, end = groups.slices[0]
    noise = table[(table.set == "noise") & (table.group == groups.names[0])]
    assert noise["mean"].item() == pytest.approx(float(logits[:, start:end].softmax(1)[:, 0].mean()))


def test_record_names_the_networks(run):
    _ = run.bank("test"), run.network("group").model()
    networks = json.loads(json.dumps(record(run)))["networks"]
    assert networks["group"]["approximation"] == ""
    assert len(networks["group"]["weights_sha256"]) == 64


def test_record_passes_and_trains_nothing(tmp_path, monkeypatch):
    run = small(tmp_path, "networks.group.groups={strategy: kmeans, number: 3}")
    _ = run.bank("test")
    monkeypatch.setattr(type(run.backbone.model()), "feature_map", lambda *_: pytest.fail("a forward pass"))
    assert "networks" not in record(small(tmp_path, "networks.group.groups={strategy: kmeans, number: 3}"))


def test_results_say_what_the_network_is(run):
    settings = [
        json.loads(text) for text in run.results(["mos", "msp_flat", "msp"]).hyperparameters.drop_duplicates()
    ]
    assert settings[0]["network"]["name"] == "group"
    assert settings[0]["network"]["groups"] == {"strategy": "taxonomy", "file": "digits"}
    assert settings[0]["network"]["schedule"] == [10, 20, 30, 40, 50] and settings[0]["network"]["mixup"] == 0
    assert settings[1]["network"]["name"] == "flat" and "groups" not in settings[1]["network"]
    assert settings[2] == {}


def test_tables_name_an_approximation(folder):
    run = small(folder, "networks.group.mixup=0.2")
    text = markdown_table(run.results(["mos", "msp"]), "fpr95")
    assert "Approximation for MOS: mixup of features instead of images." in text
    assert "Approximation" not in markdown_table(small(folder).results(["mos", "msp"]), "fpr95")
