"""Trainings that come with the kit: taken for the same settings alone, checked, and enough for the default experiment."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from continued_examples import small

from ood_helpers import studies
from ood_helpers.backbones import weights_fingerprint
from ood_helpers.config import PROJECT_ROOT, load_config
from ood_helpers.detectors import create
from ood_helpers.errors import InputError
from ood_helpers.experiment import Experiment
from ood_helpers.files import sha256_of_file
from ood_helpers.results import seeds_against_images, with_seeds
from ood_helpers.shipping import remove_shipped, results_of_seeds, seed_results, ship, write_card, write_seeds
from ood_helpers.storage import Shipped, Store
from ood_helpers.training import loop

ROWS = "detectors={msp: , energy_um: {detector: energy, network: um}}"
UM = "networks={um: {method: unleashing_mask, epochs: 2, batch_size: 64, save_every: 1}}"
SETTINGS = ["tuning=null", "outliers=null", UM, ROWS]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A run that has trained, and the folder of what was shipped of it."""
    folder = tmp_path_factory.mktemp("shipping")
    run = small(folder / "trained", *SETTINGS)
    run.results()
    studies.along_training(run, run.network("um"), images=20)
    shorter = run.config.networks["um"].changed({"epochs": 1})
    studies.compare_networks(run, {"one epoch": shorter}, create("energy"))
    ship(run, folder / "weights", every_training=False)
    write_seeds(results_of_seeds([run]), folder / "weights")
    return run, folder / "weights"


@pytest.fixture
def untrained(monkeypatch):
    """Any training fails."""
    monkeypatch.setattr(loop, "_train_epoch", lambda *_, **__: pytest.fail("trained"))


def another(tmp_path, weights, *overrides):
    return small(tmp_path, *SETTINGS, f"weights={weights}", *overrides)


def test_what_is_shipped_is_not_trained(shipped, tmp_path, untrained):
    run, weights = shipped
    other = another(tmp_path, weights)
    network = other.network("um")
    assert network.shipped() and network.ready() and other.backbone.shipped()
    assert weights_fingerprint(network.model()) == weights_fingerprint(run.network("um").model())
    assert network.constraint() == run.network("um").constraint()
    pd.testing.assert_frame_equal(network.history(), run.network("um").history())
    columns = ["method", "ood_set", "fpr95", "auroc"]
    pd.testing.assert_frame_equal(other.results()[columns], run.results()[columns])
    # Tables of networks that are not shipped, too.
    shorter = other.config.networks["um"].changed({"epochs": 1})
    table, means = studies.compare_networks(other, {"one epoch": shorter}, create("energy"))
    assert table.method.unique() == ["one epoch"] and means.fpr95.notna().all()
    assert not other.network(shorter).shipped()
    along = studies.along_training(other, network, images=20)
    assert along.epoch.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("change", ["networks.um.epochs=1", "backbone.training.epochs=2"])
def test_other_settings_train_their_own(shipped, tmp_path, change):
    run, weights = shipped
    other = another(tmp_path, weights, change)
    assert other.backbone.shipped() == change.startswith("networks")
    if other.backbone.shipped():
        assert not other.network("um").shipped()
        assert weights_fingerprint(other.network("um").model()) != weights_fingerprint(
            run.network("um").model()
        )


def test_another_seed_trains_its_own(shipped, tmp_path):
    assert not another(tmp_path, shipped[1]).with_seed(1).backbone.shipped()


def test_a_training_of_ones_own_is_no_shipped_one(shipped, tmp_path):
    _, weights = shipped
    own, other = small(tmp_path, *SETTINGS, "weights=null"), another(tmp_path, weights)
    assert own.backbone.training_entry().directory != other.backbone.training_entry().directory
    assert own.backbone.training_entry().inputs == other.backbone.training_entry().inputs


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_shipped_file_is_named(shipped, tmp_path, damage):
    _, weights = shipped
    copy = tmp_path / "weights"
    copy.mkdir()
    for path in weights.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    if damage == "changed":
        (copy / "backbone.safetensors").write_bytes(b"0" * 100)
    else:
        (copy / "backbone.safetensors").unlink()
    with pytest.raises(InputError, match=rf"backbone.safetensors {damage}, expected .* git checkout"):
        another(tmp_path / "run", copy).backbone.model()


def test_a_damaged_copy_is_replaced(shipped, tmp_path, untrained):
    other = another(tmp_path, shipped[1])
    entry = other.backbone.training_entry()
    other.backbone.model()
    (entry.directory / "weights.safetensors").write_bytes(b"0" * 100)
    again = another(tmp_path, shipped[1])
    assert weights_fingerprint(again.backbone.model()) == weights_fingerprint(other.backbone.model())


def test_saved_epochs_of_a_shipped_network_come_from_a_training_of_its_own(shipped, tmp_path):
    run, weights = shipped
    other = another(tmp_path, weights)
    network = other.network("um")
    along = studies.along_training(other, network, images=10)  # not the images of the shipped table
    assert along.epoch.unique().tolist() == [0, 1, 2]
    assert network.shipped() and list(network.epochs()) == [0, 1, 2]
    assert weights_fingerprint(network.at_epoch(2)) == weights_fingerprint(run.network("um").model())


def test_comparisons_come_in_the_order_that_was_asked_for(shipped, tmp_path):
    other = another(tmp_path, shipped[1])
    um = other.config.networks["um"]
    recipes = {"1": um.changed({"epochs": 1}), "2": um}
    forth, _ = studies.compare_networks(other, recipes, create("energy"))
    back, _ = studies.compare_networks(other, dict(reversed(recipes.items())), create("energy"))
    assert forth.method.unique().tolist() == ["1", "2"] and back.method.unique().tolist() == ["2", "1"]
    for name in ("1", "2"):
        columns = ["ood_set", "fpr95", "auroc"]
        one, two = (table[table.method == name][columns].reset_index(drop=True) for table in (forth, back))
        pd.testing.assert_frame_equal(one, two)


def test_tables_of_other_code_are_announced(shipped, tmp_path, capsys, monkeypatch):
    _, weights = shipped
    index = json.loads((weights / "index.json").read_text())
    record = next(record for record in index["entries"].values() if record["kind"] == "comparisons")
    monkeypatch.setattr(Shipped, "_told", set())
    Shipped(weights).check_code(record | {"code": "another"}, {})
    Shipped(weights).check_code(record | {"code": "another"}, {})
    assert capsys.readouterr().err.count("were made by other code") == 1


def test_removing_what_is_shipped_leaves_other_files(shipped, tmp_path):
    copy = tmp_path / "weights"
    shutil.copytree(shipped[1], copy)
    (copy / "mine.txt").write_text("mine")
    remove_shipped(copy)
    left = {path.name for path in copy.rglob("*") if path.is_file()}
    assert left <= {"mine.txt", "seeds.csv", "README.md"} and "mine.txt" in left


def test_seeds_are_those_of_the_experiment_alone(shipped, tmp_path):
    assert (shipped[1] / "seeds.csv").exists() and seed_results(another(tmp_path, shipped[1])) is None
    assert seed_results(Experiment.open("digits", overrides=["knn.k=3"])) is None


def test_no_index_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"no readable .*index.json .*weights: null"):
        Shipped(tmp_path)


def test_inputs_are_the_key_without_machine_and_code(tmp_path):
    first = Store(tmp_path).entry("models", code=["ood_helpers.metrics"], device="cpu", seed=0)
    second = Store(tmp_path).entry("models", code=["ood_helpers.files"], device="cuda", seed=0)
    third = Store(tmp_path).entry("models", code=["ood_helpers.files"], device="cuda", seed=1)
    assert first.name != second.name and first.inputs == second.inputs != third.inputs


def test_the_card_names_each_network(shipped):
    run, weights = shipped
    write_card(run, weights, "a command", {"threads": 2}, "a commit")
    card = (weights / "README.md").read_text()
    for name in ("backbone", "um"):
        line = next(line for line in card.splitlines() if line.startswith(f"| `{name}.safetensors`"))
        assert sha256_of_file(weights / f"{name}.safetensors")[:16] in line
    assert "a command" in card and "threads 2" in card and "1 seeds" in card


def test_seeds_stand_beside_the_intervals():
    means = pd.DataFrame(
        [
            {
                "method": "A",
                "ood_sets": "x; y",
                "fpr95": 50.0,
                "fpr95_lo": 48.0,
                "fpr95_hi": 52.0,
                "auroc": 90.0,
            },
            {
                "method": "B",
                "ood_sets": "x; y",
                "fpr95": 60.0,
                "fpr95_lo": 40.0,
                "fpr95_hi": 80.0,
                "auroc": 80.0,
            },
        ]
    )
    lines = [
        (seed, method, ood_set, value + seed, 90.0)
        for seed in (0, 2, 4)
        for method, value in (("A", 50.0), ("B", 60.0))
        for ood_set in ("x", "y")
    ]
    by_seed = pd.DataFrame(lines, columns=["seed", "method", "ood_set", "fpr95", "auroc"])
    found = with_seeds(means, by_seed)
    assert found.fpr95_seeds.tolist() == [52.0, 62.0] and found.fpr95_seeds_std.tolist() == [2.0, 2.0]
    assert "for 1 of 2 rows" in seeds_against_images(found)  # 2.0 against 1.02 and 10.2


# ---- what the kit ships -----------------------------------------------------------------------------------

WEIGHTS = PROJECT_ROOT / "weights" / "digits"


def test_the_index_describes_the_files():
    records = json.loads((WEIGHTS / "index.json").read_text())["entries"]
    files = [file for record in records.values() for file in record["files"].values() if "file" in file]
    for file in files:
        assert sha256_of_file(WEIGHTS / file["file"]) == file["sha256"], file["file"]
    beside = {"README.md", "index.json", "seeds.csv"}
    present = {str(path.relative_to(WEIGHTS)) for path in WEIGHTS.rglob("*") if path.is_file()}
    assert present - beside == {file["file"] for file in files}


def test_the_default_experiment_loads_every_network(tmp_path, untrained):
    run = Experiment.open("digits", run_dir=str(tmp_path), device="cpu")
    for name in ["", *run.config.networks]:
        assert run.network(name).shipped(), name
    parameters = sum(parameter.numel() for parameter in run.backbone.model().parameters())
    assert parameters <= 60_000
    run.check_accuracy()


def test_what_is_shipped_is_small():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 4e6


def test_five_seeds_were_trained():
    table = seed_results(Experiment.open("digits"))
    assert sorted(table.seed.unique()) == [0, 1, 2, 3, 4]
    labels = {row.label for row in Experiment.open("digits").rows().values()}
    assert set(table.method) == labels
    assert Path(load_config("digits").weights) == Path("weights/digits")
