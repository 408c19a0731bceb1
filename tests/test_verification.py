"""Comparing a run's tables with the committed ones, and what a run writes where."""

import pandas as pd
import pytest
from small_experiments import small

from ood_helpers import verification
from ood_helpers.config.loader import listed
from ood_helpers.errors import InputError
from ood_helpers.experiment import Experiment
from ood_helpers.files import write_json
from ood_helpers.verification import update_figures, verify

TABLE = pd.DataFrame(
    {"letters": [50.0, 20.0], "noise": [10.0, None]}, pd.Index(["MSP", "KNN"], name="method")
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "COMMITTED", tmp_path / "committed")
    return Experiment.open("digits", run_dir=str(tmp_path / "runs"), device="cpu")


def write(folder, name, table):
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / name)


def both(run, tmp_path, committed, own, name="30_results_fpr95.csv"):
    write(tmp_path / "committed" / "digits", name, committed)
    write(run.figures_directory, name, own)


@pytest.mark.parametrize(
    ("metric", "moved", "out"),
    [("fpr95", 0.1, 0), ("fpr95", 0.11, 1), ("auroc", 0.02, 0), ("auroc", 0.021, 1)],
)
def test_a_cell_is_out_beyond_the_tolerance(run, tmp_path, metric, moved, out):
    own = TABLE.copy()
    own.loc["KNN", "letters"] += moved
    both(run, tmp_path, TABLE, own, f"30_results_{metric}.csv")
    (compared,) = verify(run)
    assert (compared.cells, compared.free, compared.out) == (3, 0, out)
    assert compared.largest == pytest.approx(moved) and compared.where == "KNN, letters"
    assert ("1 beyond" in str(compared)) == bool(out)


def test_a_row_or_a_table_that_is_missing_is_out(run, tmp_path):
    both(run, tmp_path, TABLE, TABLE.drop(index="KNN"))
    assert [table.out for table in verify(run)] == [1]
    both(run, tmp_path, TABLE.drop(index="KNN"), TABLE)
    assert [table.out for table in verify(run)] == [1]
    (run.figures_directory / "30_results_fpr95.csv").unlink()
    (compared,) = verify(run)
    assert compared.out == 2 and "not made by this run" in str(compared)


def test_only_some_notebooks_are_compared(run, tmp_path):
    both(run, tmp_path, TABLE, TABLE)
    both(run, tmp_path, TABLE, TABLE, "13_mos_grouping_auroc.csv")
    assert [table.table for table in verify(run, ("13_mos",))] == ["13_mos_grouping_auroc"]
    assert len(verify(run)) == 2 and verify(run, ("12_line",)) == []


def test_networks_trained_here_are_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "COMMITTED", tmp_path / "committed")
    run = small(tmp_path, "weights=null")
    both(run, tmp_path, TABLE, TABLE + 5)
    both(run, tmp_path, TABLE, TABLE + 5, "13_mos_grouping_fpr95.csv")
    for compared in verify(run):
        assert (compared.cells, compared.free, compared.out) == (0, 3, 0) and "3 of networks trained" in str(
            compared
        )
    assert [compared.out for compared in verify(run, every_row=True)] == [3, 3]


def test_rows_of_shipped_networks_are_held_beside_those_trained_here(tmp_path, monkeypatch):
    """The backbone is shipped, the network of MOS has other settings."""
    monkeypatch.setattr(verification, "COMMITTED", tmp_path / "committed")
    settings = ["networks.group.schedule=[1, 2, 3, 4, 5]"]
    run = Experiment.open("digits", run_dir=str(tmp_path), device="cpu", overrides=settings)
    table = TABLE.rename(index={"KNN": "MOS"})
    both(run, tmp_path, table, table + 5)
    (compared,) = verify(run)
    assert (compared.cells, compared.free, compared.out) == (2, 1, 2)  # MSP has two cells, MOS has one


def test_updated_figures_are_those_of_the_run(run, tmp_path):
    folder = run.figures_directory
    folder.mkdir(parents=True)
    names = ["30_results.png", "30_results.svg", "30_results_fpr95.csv"]
    for name in (*names, "30_results_cost.png"):  # which no lasting manifest lists
        (folder / name).write_text(name)
    old = tmp_path / "committed" / "digits"
    old.mkdir(parents=True)
    for name in ("12_gone.png", "notes.txt"):
        (old / name).write_text("old")
    write_json(folder / "manifest.json", {"outputs": dict.fromkeys([*names, "missing.png"], "")})
    with pytest.raises(FileNotFoundError):
        update_figures(run)
    assert (old / "12_gone.png").exists()
    write_json(folder / "manifest.json", {"outputs": dict.fromkeys(names, "")})
    target = update_figures(run)
    assert sorted(path.name for path in target.iterdir()) == [
        "30_results.png",
        "30_results_fpr95.csv",
        "manifest.json",
        "notes.txt",
    ]


# ---- changed settings go to a run of their own ------------------------------------------------------------


def test_changed_settings_have_folders_and_captions_of_their_own(tmp_path):
    folders = {"run_dir": str(tmp_path), "device": "cpu"}
    plain = Experiment.open("digits", **folders)
    changed = Experiment.open("digits", **folders, overrides=["line.delta=0.8", "knn.k=3"])
    assert (
        plain.directory == tmp_path / "digits" and plain.figures_directory == tmp_path / "figures" / "digits"
    )
    assert changed.directory == tmp_path / "digits+line.delta=0.8+knn.k=3"
    one, other = (
        Experiment.open("digits", **folders, overrides=[f"line.delta={text}"])
        for text in ("1.0", "'1.0'"[1:-1] + " ")
    )
    assert one.directory != other.directory  # what a folder's name cannot hold is in a hash
    assert changed.figures_directory == tmp_path / "figures" / "digits+line.delta=0.8+knn.k=3"
    assert changed.with_seed(1).directory == changed.directory
    assert "changed: line.delta=0.8, knn.k=3" in changed.caption and "changed" not in plain.caption
    groups = [
        f"networks.group.groups={value}"
        for value in ("{strategy: random, number: 2}", "{strategy: random,number: 2}")
    ]
    one, other = (Experiment.open("digits", **folders, overrides=[group]) for group in groups)
    assert one.directory != other.directory  # what a folder's name cannot hold is in its hash
    many = Experiment.open(
        "digits", **folders, overrides=[f"ood.noise.images.count={n}" for n in range(20, 40)]
    )
    assert len(many.directory.name) < 120 and many.directory != changed.directory


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ()),
        ("", ()),
        ("line.delta=0.8", ("line.delta=0.8",)),
        ('["line.delta=0.8"]', ("line.delta=0.8",)),
        (["line.delta=0.8", "tuning.grids={}"], ("line.delta=0.8", "tuning.grids={}")),
    ],
)
def test_overrides_are_a_list_or_a_text(given, expected):
    assert listed(given) == expected


@pytest.mark.parametrize("given", ['["line.delta=0.8"', "[1]", ["line.delta=0.8", 3]])
def test_overrides_that_are_no_texts_are_refused(given):
    with pytest.raises(InputError, match=r"Found overrides .* expected KEY=VALUE"):
        listed(given)
