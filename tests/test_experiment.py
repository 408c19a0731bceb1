"""Experiments: what is computed once and kept, seeds, the guards, wrong inputs, and interruption at any point."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from labels import LABELS
from safetensors.torch import load_file, save_file
from small_experiments import OOD_SETS, TIMES, npz_experiment, one_sentence, small

from ood_helpers import report, studies
from ood_helpers.config import PROJECT_ROOT
from ood_helpers.detectors.base import Detector
from ood_helpers.errors import InputError, MissingDataError
from ood_helpers.experiment import Experiment
from ood_helpers.results import COLUMNS
from ood_helpers.storage import shard_path

METHODS = [*LABELS, "ReAct (tuned)", "LINe (tuned)"]


def method(table, label):
    return table[table.method == label].reset_index(drop=True)


def test_every_method_has_a_line_for_every_set(finished):
    _, table = finished
    assert list(table.columns) == COLUMNS
    assert set(table.method) == set(METHODS)
    tuned = table.method.str.endswith("(tuned)")
    assert table[~tuned].groupby("method").ood_set.nunique().eq(5).all()
    assert set(table[tuned].ood_set) == set(OOD_SETS) - {
        "chimeras"
    }  # these are related to what it is tuned on
    assert (table.fpr95_lo <= table.fpr95).all() and (table.fpr95 <= table.fpr95_hi).all()
    assert (table.auroc_lo <= table.auroc).all() and (table.auroc <= table.auroc_hi).all()
    assert table.n_id.eq(600).all() and table.n_ood.eq(80).all()
    kinds = table.data_sha256.groupby(table.method).apply(tuple)
    # what rests on the validation images, and on those tuned on, has hashes of its own
    assert (
        kinds.nunique() == 3
        and kinds["ReAct (tuned)"] == kinds["LINe (tuned)"] != kinds["LINe"] == kinds["MSP"]
    )


def test_a_second_run_reads_what_is_there(finished, monkeypatch):
    folder, table = finished
    run = small(folder)
    monkeypatch.setattr(type(run.backbone.model()), "feature_map", lambda *_: pytest.fail("a forward pass"))
    monkeypatch.setattr(Detector, "fit", lambda *_: pytest.fail("a fit"))
    monkeypatch.setattr("ood_helpers.metrics.resampled", lambda *_, **__: pytest.fail("a bootstrap"))
    pd.testing.assert_frame_equal(run.results(), table)
    pd.testing.assert_frame_equal(studies.collect_results(run)[table.columns[:7]], table[table.columns[:7]])


def test_another_seed_trains_another_network(finished):
    folder, table = finished
    other = small(folder).with_seed(1).results(["energy"])
    assert other.seed.eq(1).all()
    assert other.fpr95.tolist() != method(table, "Energy").fpr95.tolist()


def test_a_changed_hyper_parameter_is_scored_anew_without_a_new_pass(finished, monkeypatch):
    folder, table = finished
    run = small(folder, "himplos.percentile=10")
    monkeypatch.setattr(type(run.backbone.model()), "feature_map", lambda *_: pytest.fail("a forward pass"))
    changed = run.results(["himplos", "line"])
    for label, same in (("HIMPLoS", False), ("LINe", True)):
        thresholds = [method(frame, label).threshold95.tolist() for frame in (changed, table)]
        assert (thresholds[0] == thresholds[1]) is same


def test_a_method_that_the_config_leaves_out_comes_with_its_defaults(finished):
    run = small(finished[0], 'detectors={"msp": {}}', "tuning=null")
    assert run.detector("line").hyperparameters()["delta"] == 1.0
    assert run.results(["line"]).method.unique().tolist() == ["LINe"]
    assert list(run.rows()) == ["msp"]


def test_the_record_trains_and_passes_nothing(finished, tmp_path):
    assert "banks" not in report.record(small(tmp_path))
    assert not (tmp_path / "runs" / "models").exists()
    record = report.record(small(finished[0]))
    assert set(record["banks"]) == {"train", "validation", "test", "tuning", *OOD_SETS}
    assert record["id_accuracy"] == small(finished[0]).check_accuracy()
    report.record(small(finished[0], "networks.um.id_loss.constraint={draws: 7}"))
    kept = (finished[0] / "runs").glob("estimates/*/key.json")
    assert all(json.loads(path.read_text())["estimate"]["draws"] != 7 for path in kept)


def test_resamples_are_the_ones_behind_the_intervals(finished):
    folder, table = finished
    run = small(folder)
    resamples = run.resamples(table, "auroc")
    assert set(resamples) == set(METHODS)
    assert resamples["LINe"].shape == (50, 5) and resamples["LINe (tuned)"].shape == (50, 4)
    row = table[(table.method == "LINe") & (table.ood_set == "letters")].iloc[0]
    low, high = np.quantile(resamples["LINe"].letters, [0.025, 0.975])
    assert (low, high) == pytest.approx((row.auroc_lo, row.auroc_hi))


def test_scores_match_the_results(finished):
    folder, table = finished
    id_scores, ood_scores = small(folder).scores("energy")
    assert len(id_scores) == 600 and set(ood_scores) == set(OOD_SETS)
    row = table[(table.method == "Energy") & (table.ood_set == "noise")].iloc[0]
    assert 100 * np.mean(ood_scores["noise"] >= row.threshold95) == pytest.approx(row.fpr95)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from ood_helpers import studies
from small_experiments import small
studies.collect_results(small(Path(sys.argv[2])))
print("finished")
"""


def test_killed_at_any_point_and_started_again_ends_in_the_same_table(finished, tmp_path):
    """The same seed gives the same table, also in a new folder."""
    folder, _ = finished
    generator, kills = random.Random(7), 0
    command = [sys.executable, "-c", SCRIPT, str(PROJECT_ROOT / "tests"), str(tmp_path)]
    for wait in (None, None, 300):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if wait is None:
            begin = time.monotonic()
            while not any(tmp_path.iterdir()) and process.poll() is None and time.monotonic() - begin < 60:
                time.sleep(0.02)
            time.sleep(generator.uniform(0.5, 2.5))
            kills += process.poll() is None
            os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.wait()
        else:
            assert process.communicate(timeout=wait)[0].strip() == "finished"
    assert kills
    files = [pd.read_csv(small(f).directory / "results.csv", dtype=str) for f in (folder, tmp_path)]
    pd.testing.assert_frame_equal(files[0].drop(columns=TIMES), files[1].drop(columns=TIMES))


def test_what_a_notebook_chooses_from(finished):
    run = small(finished[0])
    with pytest.raises(InputError, match="did you mean 'himplos'"):
        run.detector("himplo")
    with pytest.raises(InputError, match="did you mean 'letters'"):
        run.image_set("leters")
    with pytest.raises(InputError, match="did you mean 'group'"):
        run.network("grup")
    with pytest.raises(InputError, match="did you mean 'percentile'"):
        small(finished[0], "himplos.percentil=3")
    assert run.network("") is run.backbone and run.network("group") is run.network(
        run.network("group").recipe
    )


# ---- wrong inputs: one sentence each, nothing lost --------------------------------------------------------


@pytest.fixture(scope="module")
def files(finished, tmp_path_factory):
    """The small experiment's data as files, and the config that reads them."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(finished[0] / "runs", folder / "runs")
    npz_experiment(folder)
    return folder


@pytest.fixture
def spoilt(files, tmp_path):
    """A data folder to spoil, and a way to open the experiment on it."""
    target = shutil.copytree(files / "data", tmp_path / "data")

    def open_experiment(**options):
        return Experiment.open(
            files / "spoilt.yaml",
            data_root=str(target),
            run_dir=str(tmp_path / "runs"),
            figures_dir=str(tmp_path),
            device="cpu",
            **options,
        )

    return target, open_experiment


def few(*rows, networks="{}"):
    """Settings: these rows only, and no networks beside the backbone."""
    return [f"detectors={json.dumps({row: {} for row in rows})}", f"networks={networks}"]


def test_the_npz_experiment_works_before_it_is_spoilt(spoilt):
    assert len(studies.collect_results(spoilt[1]())) == 50 * 2


def test_with_a_checkpoint_a_seed_changes_nothing(spoilt, monkeypatch):
    """Neither scores nor intervals: resamples are of images, and averaged over seeds their noise must not shrink."""
    run = spoilt[1](overrides=few("msp", "odin", "knn", "kl_matching", "line"))
    one = studies.collect_results(run, [0])
    monkeypatch.setattr(Detector, "score_samples", lambda *_: pytest.fail("scored again"))
    both = studies.collect_results(run, [0, 1])
    assert both.seed.tolist() == [0] * len(one) + [1] * len(one)
    same = both[both.seed == 1].drop(columns="seed").reset_index(drop=True)
    pd.testing.assert_frame_equal(same, one.drop(columns="seed"))
    single, mean = (run.resamples(table, "fpr95") for table in (one, both))
    assert all(np.allclose(mean[label], single[label]) for label in single)


def test_permuted_labels_are_caught_by_the_accuracy_guard_before_anything_is_scored(spoilt):
    target, open_experiment = spoilt
    with np.load(target / "test.npz") as arrays:
        permuted = np.random.default_rng(0).permutation(10)[arrays["labels"]]
        np.savez(target / "test.npz", images=arrays["images"], labels=permuted)
    run = open_experiment()
    with pytest.raises(InputError) as error:
        run.results(["msp"])
    text = one_sentence(error)
    assert "ID accuracy of spoilt is" in text
    assert "label order" in text and "normalisation" in text and "checkpoint" in text
    assert not (run.run_dir / "scores").exists()
    assert run.bank("test").load().logits.shape == (600, 10)  # the pass is not lost


def test_the_guard_holds_for_scores_that_are_already_there(finished):
    folder, _ = finished
    with pytest.raises(InputError, match="expected 3"):
        small(folder, "backbone.expected_accuracy=3").results(["msp"])


def test_a_missing_set_is_reported_first_and_can_be_skipped(spoilt):
    target, open_experiment = spoilt
    (target / "noise.npz").unlink()
    with pytest.raises(MissingDataError) as error:
        open_experiment().check()
    assert str(target / "noise.npz") in str(error.value) and "--skip-missing" in str(error.value)
    run = open_experiment(skip_missing=True, overrides=few("msp", "line"))
    table = studies.collect_results(run)
    assert set(table.ood_set) == {"letters"} and run.image_sets.missing_ood() == ["noise"]
    run.export_tables(table, "30_results")
    assert "| missing |" in (run.figures_directory / "30_results_fpr95.md").read_text()
    assert "noise" in run.image_sets.describe()["set"].tolist()


def test_a_missing_checkpoint_is_reported_before_the_pass(spoilt):
    target, open_experiment = spoilt
    (target / "weights.pth").unlink()
    with pytest.raises(MissingDataError, match=r"weights\.pth"):
        open_experiment().check()


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_a_checkpoint_that_does_not_fit_lists_the_keys(spoilt, fault):
    target, open_experiment = spoilt
    state = torch.load(target / "weights.pth", weights_only=True)["state_dict"]
    name = "bn1.weight"
    if fault == "missing":
        del state[name]
    elif fault == "extra":
        name = "surplus.weight"
        state[name] = torch.zeros(2)
    else:
        state[name] = torch.zeros(3)
    torch.save(state, target / "weights.pth")
    with pytest.raises(InputError) as error:
        open_experiment().backbone.model()
    assert name in one_sentence(error)


def test_nan_features_in_a_bank_stop_the_scoring_and_name_the_row(spoilt):
    _, open_experiment = spoilt
    run = open_experiment()
    run.bank("noise")
    path = shard_path(run.backbone.bank_entry("noise").directory, 0)
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    tensors["features"][17, 3] = float("nan")
    save_file(tensors, path, metadata={"seconds": "1"})
    with pytest.raises(InputError) as error:
        run.results(["energy"])
    assert "NaN" in one_sentence(error) and "17" in one_sentence(error)


def test_a_shard_cut_in_half_costs_only_itself_and_a_notice(spoilt, capsys):
    _, open_experiment = spoilt
    settings = {"overrides": few("energy", "knn", "line")}
    run = open_experiment(**settings)
    table = studies.collect_results(run)
    path = shard_path(run.backbone.bank_entry("letters").directory, 0)
    path.write_bytes(path.read_bytes()[:1000])
    pd.testing.assert_frame_equal(
        studies.collect_results(open_experiment(**settings)), table
    )  # scores are kept
    shutil.rmtree(run.run_dir / "scores")
    others = {other: other.stat().st_mtime_ns for other in run.run_dir.glob("banks/*/*") if other != path}
    capsys.readouterr()
    again = studies.collect_results(open_experiment(**settings))
    assert f"{path} is damaged and computed again." in capsys.readouterr().err
    pd.testing.assert_frame_equal(again.drop(columns=TIMES), table.drop(columns=TIMES))
    shards = [other for other in others if other.suffix == ".safetensors"]
    assert shards and all(other.stat().st_mtime_ns == others[other] for other in shards)
