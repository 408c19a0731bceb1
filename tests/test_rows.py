"""Rows of the results: hyper-parameters, tuning, what is kept of them, and wrong ones."""

import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from small_experiments import TIMES, small

from ood_helpers.detectors.knn import KNN
from ood_helpers.errors import InputError, MissingDataError
from ood_helpers.experiment import Experiment
from ood_helpers.extract import extract


def without_times(table):
    return table.drop(columns=TIMES).reset_index(drop=True)


def test_tuning_sees_the_validation_images_and_the_outliers_only(finished, monkeypatch):
    run = small(finished[0], "tuning.grids={react: {percentile: [60.0, 98.0]}}")
    banks, seen = type(run.backbone).bank, set()
    monkeypatch.setattr(
        type(run.backbone), "bank", lambda network, name: seen.add(name) or banks(network, name)
    )
    run.row("react").fitted()
    learned_from = seen - {"test"}  # one image of it, which warms the clock up
    seen.clear()
    table = run.tuned_rows()["react"].table()
    assert learned_from == {"train"} and seen == {"validation", "tuning"}
    assert table.percentile.tolist() == [60.0, 98.0] and table.chosen.sum() == 1
    assert table.auroc[table.chosen].item() == table.auroc.max()


def test_tuning_happens_once_and_its_seconds_are_those_it_took_then(finished, monkeypatch):
    """A notebook may have tuned before: what it took then is what it costs."""
    grid = "tuning.grids={react: {percentile: [50.0, 97.0]}}"
    tuned = small(finished[0], grid).tuned_rows()["react"]
    table, seconds = tuned.table(), tuned.fit_seconds()
    again = small(finished[0], grid)
    with monkeypatch.context() as patched:
        patched.setattr("ood_helpers.metrics.evaluate", lambda *_: pytest.fail("tuned again"))
        pd.testing.assert_frame_equal(again.tuned_rows()["react"].table(), table)
    reported = again.results(["react_tuned"]).fit_seconds.iloc[0]
    assert reported == seconds > again.row("react").fit_seconds()


def test_the_forward_passes_of_a_network_are_not_the_cost_of_its_first_row(tmp_path, monkeypatch):
    passes = []

    def passing(*arguments):
        passes.append(arguments)
        return extract(*arguments)

    monkeypatch.setattr("ood_helpers.networks.base.extract", passing)
    monkeypatch.setattr("ood_helpers.rows.time", SimpleNamespace(perf_counter=lambda: len(passes)))
    run = small(tmp_path, "tuning.grids={react: {percentile: [70.0, 99.0]}}")
    table = run.results(["react", "react_tuned", "energy_dfb", "dfb_energy"])
    assert len(passes) > 6 and table.score_seconds.eq(0).all() and table.fit_seconds.eq(0).all()


def test_a_tuned_row_is_the_detector_with_the_chosen_values(finished):
    folder, table = finished
    run = small(folder)
    best = run.tuned_rows()["line"].table().query("chosen").iloc[0]
    row = table[table.method == "LINe (tuned)"].iloc[0]
    chosen = json.loads(row.hyperparameters)
    assert chosen["delta"] == best.delta and chosen["weight_percentile"] == best.weight_percentile
    assert chosen["activation_percentile"] == 90.0  # not in the grid
    assert row.tuned_on == "AUROC on 197 ID validation images against 100 of jigsaw digits"
    by_hand = run.detector("line")
    by_hand.delta, by_hand.weight_percentile = best.delta, best.weight_percentile
    expected = by_hand.score_samples(run.bank("letters"))
    np.testing.assert_allclose(run.scores("line_tuned")[1]["letters"], expected, rtol=1e-6)
    defaults = table[~table.method.str.endswith("(tuned)")]
    assert set(defaults[defaults.tuned_on != ""].method) == {
        "Mahalanobis (ensemble)",
        "Mahalanobis (ensemble, flat)",
    }


def test_a_changed_grid_is_tuned_anew_and_nothing_else(finished):
    folder, table = finished
    run = small(folder, "tuning.grids={line: {delta: [0.1]}}")
    assert [row.name for row in run.tuned_rows().values()] == ["line_tuned"]
    assert json.loads(run.results(["line_tuned"]).hyperparameters.iloc[0])["delta"] == 0.1
    energy = table[table.method == "Energy"].reset_index(drop=True)
    pd.testing.assert_frame_equal(run.results(["energy"]), energy)  # with its seconds: those on disk


def test_a_value_that_a_method_refuses_is_left_out_of_the_choice(finished):
    table = small(finished[0], "tuning.grids={knn: {k: [5, 5000]}}").tuned_rows()["knn"].table()
    assert table.auroc.isna().tolist() == [False, True] and table.chosen.tolist() == [True, False]
    with pytest.raises(InputError, match="k is 5000, expected at most"):
        small(finished[0], "tuning.grids={knn: {k: [5000]}}").tuned_rows()["knn"].table()


def test_the_other_rule_of_react_can_be_set_beside_a_grid(finished):
    run = small(finished[0], "react.clip=1.0", "react.percentile=null")
    learned = json.loads(run.results(["react"]).hyperparameters.iloc[0])
    assert learned == {"percentile": None, "clip": 1.0, "learned": {"clip": 1.0}}
    assert len(run.tuned_rows()["react"].table()) == 2


@pytest.mark.parametrize(
    ("grids", "sentence"),
    [
        ("{react: {percentil: [3]}}", "did you mean 'percentile'"),
        ("{react: {percentile: [300]}}", "tuning.grids.react: ReAct: percentile is 300"),
        ("{raect: {percentile: [3]}}", "did you mean 'react'"),
        ("{react: {percentile: []}}", "tuning.grids.react has no values"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_is_computed(tmp_path, grids, sentence):
    with pytest.raises(InputError, match=sentence):
        Experiment.open("digits", overrides=[f"tuning.grids={grids}"], run_dir=str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_tuning_needs_validation_images():
    with pytest.raises(InputError, match=r"tuning needs ID images of its own; add id\.validation"):
        Experiment.open("digits", overrides=["id.validation=null"])


def test_without_the_outliers_to_tune_on_there_are_no_tuned_rows(tmp_path):
    source = ["tuning.images={source: npz, path: nowhere.npz}"]
    folders = {"run_dir": str(tmp_path), "figures_dir": str(tmp_path)}
    with pytest.raises(MissingDataError, match=r"nowhere\.npz"):
        Experiment.open("digits", overrides=source, **folders).check()
    run = Experiment.open("digits", overrides=source, **folders, skip_missing=True)
    assert run.tuned_rows() == {}
    assert "jigsaw digits" in run.image_sets.describe().set_index("status").loc["missing, skipped", "set"]


def test_a_method_that_tunes_itself_asks_for_validation_images(finished):
    rows = 'detectors={"mahalanobis_ensemble": {}}'
    run = small(finished[0], "id.validation=null", "tuning=null", "backbone.training.save_every=null", rows)
    with pytest.raises(InputError, match=r"found no validation bank.*add id\.validation"):
        run.detector("mahalanobis_ensemble")


def test_an_image_bank_shows_the_images_that_its_bank_was_made_of(finished):
    run = small(finished[0])
    for shard in run.row("odin").bank("letters").shards():
        again = torch.cat([shard.network.logits(pixels) for pixels in shard.pixels()])
        torch.testing.assert_close(again, shard.logits, rtol=1e-4, atol=1e-4)


def test_a_damaged_score_file_is_computed_anew_with_a_notice(finished, tmp_path, capsys):
    folder, table = finished
    shutil.copytree(folder / "runs", tmp_path / "runs")
    damaged = list((tmp_path / "runs" / "scores").glob("*/*.safetensors"))
    for path in damaged:
        path.write_bytes(path.read_bytes()[:100])
    again = small(tmp_path).results(["msp", "energy_dfb"])
    expected = table[table.method.isin(["MSP", "Energy (dfb)"])]
    pd.testing.assert_frame_equal(without_times(again), without_times(expected))
    notices = capsys.readouterr().err
    assert sum(f"{path} is damaged and computed again." in notices for path in damaged) == 2 * 6


def test_a_detector_on_a_network_is_the_row_of_the_config_where_there_is_one(finished):
    run = small(finished[0])
    assert run.row_of(KNN(k=50)) is run.row("knn")
    other = run.row_of(KNN(k=7))
    assert other is not run.row("knn") and run.row_of(KNN(k=7)) is other and other.results()
    assert run.row_of(KNN(k=1)).detector.k == 1
    assert run.row_of(KNN(k=50), "flat").label == "KNN (flat)"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{detector: mos, network: flat}", "scores a group softmax, but the network flat has a flat softmax"),
        (
            "{detector: msp, network: group}",
            "scores a flat softmax, but the network group has a group softmax",
        ),
        ("{detector: dfb_background, network: flat}", "scores a network with a background class"),
        ("{detector: msp, network: grup}", "did you mean 'group'"),
        ("{detector: knn, label: Energy}", "have the same label 'Energy'"),
        ("{detector: knn, neighbours: 3}", "'knn' has no hyper-parameter 'neighbours'"),
    ],
)
def test_a_row_that_cannot_be_is_one_sentence(tmp_path, row, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        small(tmp_path, f"detectors.mine={row}")
    assert "mine" in str(error.value)


def test_a_network_trained_with_outliers_is_not_tuned_on_them(tmp_path):
    settings = [
        "detectors.energy_oe={detector: energy, network: oe}",
        "tuning.grids={energy_oe: {temperature: [1.0, 2.0]}}",
        "outliers.images.seed=0",
    ]
    for use in (Experiment.check, Experiment.tuned_rows, Experiment.results):
        with pytest.raises(InputError, match=r"trained with outliers on \d+ of the same images"):
            use(small(tmp_path, *settings))


def test_a_tuned_row_takes_the_values_that_its_table_chose_in_any_order_of_the_grid(finished):
    values = {"activation_percentile: [10.0, 95.0]", "weight_percentile: [10, 90]"}
    for order in itertools.permutations(sorted(values)):
        run = small(finished[0], f"tuning.grids={{line: {{{', '.join(order)}}}}}")
        row = run.tuned_rows()["line"]
        best = row.table().query("chosen").iloc[0]
        chosen = row.detector.activation_percentile, row.detector.weight_percentile
        assert chosen == (best.activation_percentile, best.weight_percentile)


def test_a_leak_is_named_on_the_tuned_row_too(finished):
    leak = "detectors.leaking={detector: kl_matching, templates: test_leak}"
    run = small(finished[0], leak, "tuning.grids={leaking: {templates: [test_leak]}}")
    for row in (run.row("leaking"), run.tuned_rows()["leaking"]):
        assert row.tuned_on() == "fitted on the labelled ID test set, a leak"
