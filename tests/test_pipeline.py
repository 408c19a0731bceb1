"""Experiments: the stages, what is kept, the guards, and interruption at any point."""

import inspect
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
import yaml
from labels import LABELS
from safetensors.torch import load_file, save_file

from ood_helpers import pipeline
from ood_helpers.config import CONFIG_DIRECTORY, PROJECT_ROOT
from ood_helpers.detectors import DETECTORS, Detector
from ood_helpers.errors import InputError, MissingDataError
from ood_helpers.features import shard_path
from ood_helpers.pipeline import Experiment
from ood_helpers.results import COLUMNS

TIMES = ["score_seconds", "fit_seconds"]
METHODS = [*LABELS, "ReAct (tuned)", "LINe (tuned)"]
SMALL = [
    "backbone.training.epochs=2",
    "backbone.depth=10",
    "backbone.growth_rate=12",
    "backbone.expected_accuracy=null",
    "metrics.bootstrap_resamples=50",
    "features.shard_size=64",
    "mahalanobis_ensemble.noise_grid=[0.0, 0.001]",
    "mahalanobis_flat.noise_grid=[0.0]",
    "networks.group.schedule=[10, 20, 30, 40, 50]",
    "networks.flat.schedule=[10, 20, 30, 40, 50]",
    "networks.dfb.schedule=[2, 4, 6, 8, 10]",
    "networks.dfb.masks.scales=[1.0]",
    "networks.um={method: unleashing_mask, loss_constraint: 0.3, epochs: 2, batch_size: 64}",
    "networks.umap={method: unleashing_mask, loss_constraint: 0.3, keep_rate: 0.9, epochs: 2, batch_size: 64}",
    "outliers.images.count=40",
    "tuning.images.count=100",
    "tuning.grids={react: {percentile: [70.0, 99.0]}, line: {delta: [0.5, null], weight_percentile: [10, 90]}}",
    *(f"ood.{name}.images.count=80" for name in ("letters", "chimeras", "photographs", "textures", "noise")),
]


def small(folder, *overrides, **options):
    folders = {"run_dir": str(folder / "runs"), "figures_dir": str(folder / "figures")}
    return Experiment.open("digits", **folders, overrides=[*SMALL, *overrides], device="cpu", **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small experiment with its results."""
    folder = tmp_path_factory.mktemp("small")
    run = small(folder)
    run.collect_results()
    return folder, run.results()


def test_every_method_has_a_row_for_every_set(finished):
    _, table = finished
    assert list(table.columns) == COLUMNS
    assert list(table.method.unique()) == METHODS
    tuned = table.method.str.endswith("(tuned)")
    assert table[~tuned].groupby("method").ood_set.nunique().eq(5).all()
    assert set(table[tuned].ood_set) == {
        "letters",
        "photographs",
        "textures",
        "noise",
    }  # chimeras are related
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
    monkeypatch.setattr(type(run.network), "feature_map", lambda *_: pytest.fail("a forward pass"))
    monkeypatch.setattr("ood_helpers.detectors.base.Detector.fit", lambda *_: pytest.fail("a fit"))
    pd.testing.assert_frame_equal(run.results(), table)
    pd.testing.assert_frame_equal(run.collect_results()[table.columns[:7]], table[table.columns[:7]])


def test_the_same_seed_gives_the_same_table_from_nothing(finished, tmp_path):
    _, table = finished
    again = small(tmp_path).results()
    pd.testing.assert_frame_equal(again.drop(columns=TIMES), table.drop(columns=TIMES), check_exact=True)


def test_another_seed_trains_another_network(finished):
    folder, table = finished
    other = small(folder).with_seed(1).results(["energy"])
    assert other.seed.eq(1).all()
    assert other.fpr95.tolist() != table[table.method == "Energy"].fpr95.tolist()


def test_a_changed_hyper_parameter_is_scored_anew_without_a_new_pass(finished, monkeypatch):
    folder, table = finished
    run = small(folder, "himplos.percentile=10")
    monkeypatch.setattr(type(run.network), "feature_map", lambda *_: pytest.fail("a forward pass"))
    changed = run.results(["himplos", "line"])
    for method, same in (("HIMPLoS", False), ("LINe", True)):
        thresholds = [frame[frame.method == method].threshold95.tolist() for frame in (changed, table)]
        assert (thresholds[0] == thresholds[1]) is same


def test_a_method_that_the_config_leaves_out_comes_with_its_defaults(finished):
    run = small(finished[0])
    del run.detectors["line"]
    assert run.detector("line").hyperparameters()["delta"] == 1.0
    assert run.results(["line"]).method.unique().tolist() == ["LINe"]
    assert "LINe" not in run.results().method.tolist()


def test_the_record_trains_and_passes_nothing(finished, tmp_path):
    assert "banks" not in small(tmp_path).record()
    assert not (tmp_path / "runs" / "models").exists()
    record = small(finished[0]).record()
    sets = {"train", "validation", "test", "tuning", *small(finished[0]).ood_groups}
    assert set(record["banks"]) == sets
    assert record["id_accuracy"] == small(finished[0]).id_accuracy


def test_tuning_sees_the_validation_images_and_the_outliers_only(finished, monkeypatch):
    run = small(finished[0], "tuning.grids={react: {percentile: [60.0, 98.0]}}")
    scored, bank_for = set(), run._bank_for
    monkeypatch.setattr(run, "_bank_for", lambda *asked: scored.add(asked[1]) or bank_for(*asked))
    table = run.tune("react")
    assert scored == {"validation", "tuning"}
    assert table.percentile.tolist() == [60.0, 98.0] and table.chosen.sum() == 1
    assert table.auroc[table.chosen].item() == table.auroc.max()
    monkeypatch.setattr(run, "sweep", lambda *_: pytest.fail("tuned again"))
    pd.testing.assert_frame_equal(run.tune("react"), table)


def test_a_tuned_row_is_the_detector_with_the_chosen_values(finished):
    folder, table = finished
    run = small(folder)
    best = run.tune("line").query("chosen").iloc[0]
    row = table[table.method == "LINe (tuned)"].iloc[0]
    chosen = json.loads(row.hyperparameters)
    assert {name: chosen[name] for name in ("delta", "weight_percentile")} == {
        "delta": best.delta,
        "weight_percentile": best.weight_percentile,
    }
    assert chosen["activation_percentile"] == 90.0  # not in the grid
    assert row.tuned_on == "AUROC on 197 ID validation images against 100 of jigsaw digits"
    run.detector("line").delta, run.detector("line").weight_percentile = best.delta, best.weight_percentile
    by_hand = run.detector("line").score_samples(run.bank("letters"))
    np.testing.assert_array_equal(run.scores("line_tuned")[1]["letters"], by_hand)
    defaults = table[~table.method.str.endswith("(tuned)")]
    assert defaults[defaults.tuned_on != ""].method.unique().tolist() == [
        "Mahalanobis (ensemble)",
        "Mahalanobis (ensemble, flat)",
    ]


def test_a_changed_grid_is_tuned_anew_and_nothing_else(finished):
    folder, _ = finished
    run = small(folder, "tuning.grids={line: {delta: [0.1]}}")
    assert run.tuned_rows == ["line_tuned"]
    assert json.loads(run.results(["line_tuned"]).hyperparameters.iloc[0])["delta"] == 0.1
    assert "energy" not in run._fit_seconds and run.results(["energy"]) is not None
    assert "energy" not in run._fit_seconds  # its scores are those on disk


def test_a_sweep_scores_each_setting_and_leaves_the_detector_alone(finished):
    folder, table = finished
    run = small(folder)
    swept = run.sweep("line", {"delta": [1.0, None], "weight_percentile": [90.0]})
    assert swept.delta.tolist() == [1.0] * 5 + [None] * 5
    expected = table[table.method == "LINe"]
    assert swept.fpr95[:5].tolist() == expected.fpr95.tolist()
    assert swept.auroc[5:].tolist() != swept.auroc[:5].tolist()
    assert run.detector("line").delta == 1.0
    with pytest.raises(InputError, match="LINe has no hyper-parameter 'delte'; did you mean 'delta'"):
        run.sweep("line", {"delte": [1.0]})


def test_sample_sizes_end_in_the_result_of_all_training_images(finished):
    folder, table = finished
    samples = small(folder).sample_size(["himplos", "energy"], [2, 1000], draws=2)
    assert len(samples) == 8 and samples.groupby(["method", "images_per_class"]).draw.nunique().eq(2).all()
    for method in ("HIMPLoS", "Energy"):
        expected = table[table.method == method].fpr95.mean()
        found = samples[samples.method == method]
        assert found[found.images_per_class == 1000].fpr95.tolist() == pytest.approx([expected] * 2, abs=0.3)
    few = samples[(samples.method == "HIMPLoS") & (samples.images_per_class == 2)]
    assert few.auroc.nunique() == 2  # two draws, two sets of prototypes
    assert small(folder).sample_size(["vim"], [1], draws=1).fpr95.isna().all()  # refuses 10 images


def test_resamples_are_the_ones_behind_the_intervals(finished):
    folder, table = finished
    run = small(folder)
    resamples = run.resamples(table, "auroc")
    assert list(resamples) == METHODS
    assert resamples["LINe"].shape == (50, 5) and resamples["LINe (tuned)"].shape == (50, 4)
    row = table[(table.method == "LINe") & (table.ood_set == "letters")].iloc[0]
    low, high = np.quantile(resamples["LINe"].letters, [0.025, 0.975])
    assert (low, high) == pytest.approx((row.auroc_lo, row.auroc_hi))
    means = run.collect_means(table).set_index(["method", "ood_sets"])
    all_sets, tuned_sets = "; ".join(resamples["LINe"]), "; ".join(resamples["LINe (tuned)"])
    of_line = table[table.method == "LINe"]
    assert means.loc[("LINe", all_sets), "auroc"] == pytest.approx(of_line.auroc.mean(), abs=1e-3)
    expected = of_line[of_line.ood_set != "chimeras"].auroc.mean()
    assert means.loc[("LINe", tuned_sets), "auroc"] == pytest.approx(expected, abs=1e-3)
    assert ("LINe (tuned)", tuned_sets) in means.index and ("LINe (tuned)", all_sets) not in means.index


def test_the_seconds_of_tuning_do_not_depend_on_who_tuned(finished):
    """A notebook may have tuned before: what it took then is what it costs."""
    run = small(finished[0], "tuning.grids={react: {percentile: [50.0, 97.0]}}")
    run.tune("react")
    took = run._grid("react")["seconds"]
    again = small(finished[0], "tuning.grids={react: {percentile: [50.0, 97.0]}}")
    assert again.results(["react_tuned"]).fit_seconds.iloc[0] > took > 0


def test_what_was_chosen_rests_on_the_code_of_the_metrics(finished, monkeypatch):
    run = small(finished[0])
    rows = ("line", "line_tuned", "mahalanobis_ensemble")
    before = {row: run._score_fingerprint(row) for row in rows}
    source = inspect.getsource
    changed = pipeline.metrics
    monkeypatch.setattr("inspect.getsource", lambda what: source(what) + ("# new" if what is changed else ""))
    after = {row for row in rows if run._score_fingerprint(row) != before[row]}
    assert after == {"line_tuned", "mahalanobis_ensemble"}


def test_an_image_bank_shows_the_images_that_its_bank_was_made_of(finished):
    run = small(finished[0])
    for shard in run.image_bank("letters").shards():
        again = torch.cat([shard.network.logits(pixels) for pixels in shard.pixels()])
        torch.testing.assert_close(again, shard.logits, rtol=1e-4, atol=1e-4)


def test_a_value_that_a_method_refuses_is_left_out_of_the_choice(finished):
    grid = "tuning.grids={knn: {k: [5, 5000]}}"
    table = small(finished[0], grid).tune("knn")
    assert table.auroc.isna().tolist() == [False, True] and table.chosen.tolist() == [True, False]
    with pytest.raises(InputError, match="k is 5000, expected at most"):
        small(finished[0], "tuning.grids={knn: {k: [5000]}}").tune("knn")


def test_the_other_rule_of_react_can_be_set_beside_a_grid(finished):
    run = small(finished[0], "react.clip=1.0", "react.percentile=null")
    assert run.sweep("react", {"percentile": [90.0]}).percentile.tolist() == [90.0] * 5
    learned = json.loads(run.results(["react"]).hyperparameters.iloc[0])
    assert learned == {"percentile": None, "clip": 1.0, "learned": {"clip": 1.0}}


def test_a_wrong_grid_is_refused_before_anything_is_computed(tmp_path):
    for grids, sentence in (
        ("{react: {percentil: [3]}}", "did you mean 'percentile'"),
        ("{react: {percentile: [300]}}", "tuning.grids.react: ReAct: percentile is 300"),
        ("{raect: {percentile: [3]}}", "did you mean 'react'"),
        ("{react: {percentile: []}}", "tuning.grids.react has no values"),
    ):
        with pytest.raises(InputError, match=sentence):
            Experiment.open("digits", overrides=[f"tuning.grids={grids}"], run_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"tuning needs ID images of its own; add id\.validation"):
        Experiment.open("digits", overrides=["id.validation=null"])
    with pytest.raises(InputError, match="There is no grid for 'msp' in digits"):
        Experiment.open("digits").tune("msp")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["tuning.images={source: embedded, set: noise, count: 100}", "ood.noise.images.count=100"],
            "100 of the 100 images of jigsaw digits (tuning)",
        ),
        (["id.validation.split=test"], "600 of the 600 images of digits validation (validation)"),
    ],
)
def test_what_is_reported_is_not_chosen_on(tmp_path, overrides, sentence):
    run = Experiment.open("digits", overrides=overrides, run_dir=str(tmp_path), device="cpu")
    with pytest.raises(InputError) as error:
        run.check_images()
    assert sentence in one_sentence(error) and "which is reported" in str(error.value)


def test_without_the_outliers_to_tune_on_there_are_no_tuned_rows(tmp_path):
    source = ["tuning.images={source: npz, path: nowhere.npz}"]
    folders = {"run_dir": str(tmp_path), "figures_dir": str(tmp_path)}
    with pytest.raises(MissingDataError, match=r"nowhere\.npz"):
        Experiment.open("digits", overrides=source, **folders).check_images()
    run = Experiment.open("digits", overrides=source, **folders, skip_missing=True)
    assert run.tuned_rows == [] and "tuning" not in run.bank_names
    assert "jigsaw digits" in run.describe_image_sets().set_index("status").loc["missing, skipped", "set"]


def test_a_method_that_tunes_itself_asks_for_validation_images(finished):
    run = small(finished[0])
    run.config = run.config.model_copy(update={"id": run.config.id.model_copy(update={"validation": None})})
    with pytest.raises(InputError, match=r"found no validation bank.*add id\.validation"):
        run.detector("mahalanobis_ensemble")


@pytest.mark.parametrize(
    ("module", "users"),
    [
        ("kernels.shaped_energy", {"react", "dice"}),
        ("kernels.line_head", {"line"}),
        (
            "kernels.launch",
            {"react", "dice", "line", "msp"},
        ),  # the base of all asks it where scores are computed
        ("detectors.percentile", {"line", "dice"}),
    ],
)
def test_scores_rest_on_the_code_of_their_own_detector(module, users, monkeypatch):
    code = {name: pipeline._code_of(DETECTORS[name]) for name in ("react", "line", "dice", "msp")}
    assert len(set(code.values())) == 4
    source = inspect.getsource
    changed = sys.modules[f"ood_helpers.{module}"]
    monkeypatch.setattr(
        "inspect.getsource", lambda what: source(what) + ("# changed" if what is changed else "")
    )
    assert {name for name in code if pipeline._code_of(DETECTORS[name]) != code[name]} == users


def test_scores_match_the_results(finished):
    folder, table = finished
    run = small(folder)
    id_scores, ood_scores = run.scores("energy")
    assert len(id_scores) == 600 and set(ood_scores) == set(run.ood_groups)
    row = table[(table.method == "Energy") & (table.ood_set == "noise")].iloc[0]
    assert 100 * np.mean(ood_scores["noise"] >= row.threshold95) == pytest.approx(row.fpr95)


def test_a_damaged_score_file_is_computed_anew(finished):
    folder, table = finished
    run = small(folder)
    path = run.seed_directory / "scores" / "msp.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    pd.testing.assert_frame_equal(
        run.results(["msp"]).drop(columns=TIMES),
        table[table.method == "MSP"].reset_index(drop=True).drop(columns=TIMES),
    )


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_pipeline import small
small(Path(sys.argv[2])).collect_results()
print("finished")
"""


def test_killed_at_any_point_and_started_again_ends_in_the_same_table(finished, tmp_path):
    folder, _ = finished
    generator, kills = random.Random(7), 0
    command = [sys.executable, "-c", SCRIPT, str(PROJECT_ROOT / "tests"), str(tmp_path)]
    for wait in (None, None, None, 300):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if wait is None:
            begin = time.monotonic()
            while not any(tmp_path.iterdir()) and process.poll() is None and time.monotonic() - begin < 60:
                time.sleep(0.02)
            time.sleep(generator.uniform(0.1, 2.5))
            kills += process.poll() is None
            os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.wait()
        else:
            assert process.communicate(timeout=wait)[0].strip() == "finished"
    assert kills
    for folder_of in (folder, tmp_path):
        assert (folder_of / "runs" / "digits" / "results.csv").exists()
    files = [pd.read_csv(f / "runs" / "digits" / "results.csv", dtype=str) for f in (folder, tmp_path)]
    pd.testing.assert_frame_equal(files[0].drop(columns=TIMES), files[1].drop(columns=TIMES))


# ---- wrong inputs: one sentence each, nothing lost --------------------------------------------------------


def npz_experiment(folder):
    """A digits experiment whose sets are npz files and whose network is a checkpoint the test can spoil."""
    source = small(folder)
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for name in ("train", "test", "letters", "noise"):
        image_set = source.image_set(name)
        arrays = {"images": np.asarray(image_set.array)}
        if image_set.labels is not None and name in ("train", "test"):
            arrays |= {"labels": image_set.labels, "class_names": np.array([str(i) for i in range(10)])}
        np.savez_compressed(data / f"{name}.npz", **arrays)
    torch.save({"state_dict": source.network.cpu().state_dict()}, data / "weights.pth")
    config = yaml.safe_load((CONFIG_DIRECTORY / "digits.yaml").read_text())
    npz = {
        name: {"source": "npz", "path": "${data_root}/" + f"{name}.npz"}
        for name in ("train", "test", "letters", "noise")
    }
    del config["tuning"], config["detectors"]["mahalanobis_ensemble"], config["detectors"]["mahalanobis_flat"]
    del config["outliers"], config["unleashing_ablations"]
    exposed = [name for name, made in config["networks"].items() if made and "objective" in made]
    for name in exposed:
        del config["networks"][name]
    short = {"method": "unleashing_mask", "loss_constraint": 0.3, "epochs": 1, "batch_size": 64}
    config["networks"] |= {"um": short, "umap": {**short, "keep_rate": 0.9}}
    config |= {
        "name": "spoilt",
        "id": {"name": "digits", "num_classes": 10, "class_names": [str(i) for i in range(10)], "train": npz["train"], "test": npz["test"]},
        "ood": [{"name": "letters", "group": "near", "images": npz["letters"]}, {"name": "noise", "group": "far", "images": npz["noise"]}],
        "backbone": {
            "architecture": "densenet_bc",
            "depth": 10,
            "growth_rate": 12,
            "checkpoint": "${data_root}/weights.pth",
            "expected_accuracy": source.id_accuracy,
        },
        "metrics": {"bootstrap_resamples": 20},
    }  # fmt: skip
    (folder / "spoilt.yaml").write_text(yaml.safe_dump(config))
    return data


@pytest.fixture
def spoilt(finished, tmp_path):
    """A data folder to spoil, and a way to open the experiment on it; banks of the good run are there to be kept."""
    folder = finished[0]
    data = npz_experiment(folder)
    target = tmp_path / "data"
    target.mkdir()
    for path in data.iterdir():
        (target / path.name).write_bytes(path.read_bytes())

    def open_experiment(**options):
        return Experiment.open(
            folder / "spoilt.yaml",
            data_root=str(target),
            run_dir=str(tmp_path / "runs"),
            figures_dir=str(tmp_path),
            device="cpu",
            **options,
        )

    return target, open_experiment


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_the_npz_experiment_works_before_it_is_spoilt(spoilt):
    assert len(spoilt[1]().collect_results()) == 50 * 2


def test_with_a_checkpoint_a_seed_changes_nothing(spoilt, monkeypatch):
    """Neither scores nor intervals: resamples are of images, and averaged over seeds their noise must not shrink."""
    rows = ["msp", "odin", "knn", "kl_matching", "line"]
    run = spoilt[1](overrides=[f"detectors={json.dumps({row: {} for row in rows})}", "networks={}"])
    one = run.collect_results([0])
    monkeypatch.setattr(Detector, "score_samples", lambda *_: pytest.fail("scored again"))
    both = run.collect_results([0, 1])
    assert both.seed.tolist() == [0] * len(one) + [1] * len(one)
    same = both[both.seed == 1].drop(columns="seed").reset_index(drop=True)
    pd.testing.assert_frame_equal(same, one.drop(columns="seed"))
    single, mean = (run.resamples(table, "fpr95") for table in (one, both))
    assert all(np.allclose(mean[method], single[method]) for method in single)


def test_permuted_labels_are_caught_by_the_accuracy_guard_before_anything_is_scored(spoilt):
    target, open_experiment = spoilt
    with np.load(target / "test.npz") as arrays:
        permuted = np.random.default_rng(0).permutation(10)[arrays["labels"]]
        np.savez(target / "test.npz", images=arrays["images"], labels=permuted)
    run = open_experiment()
    with pytest.raises(InputError) as error:
        run.results(["msp"])
    text = one_sentence(error)
    assert (
        "ID accuracy of spoilt is" in text
        and "label order" in text
        and "normalisation" in text
        and "checkpoint" in text
    )
    assert not run.seed_directory.exists()
    assert run.bank("test").load().logits.shape == (600, 10)  # the pass is not lost


def test_the_guard_holds_for_scores_that_are_already_there(finished):
    folder, _ = finished
    with pytest.raises(InputError, match="expected 3"):
        small(folder, "backbone.expected_accuracy=3").results(["msp"])


def test_class_names_in_another_order_are_named(spoilt):
    target, open_experiment = spoilt
    with np.load(target / "train.npz") as arrays:
        names = np.array(list("0132456789"))
        np.savez(target / "train.npz", images=arrays["images"], labels=arrays["labels"], class_names=names)
    with pytest.raises(InputError) as error:
        open_experiment().image_set("train")
    assert "('3',) at label 2, expected 10 with ('2',)" in one_sentence(error)


def test_a_missing_set_is_reported_first_and_can_be_skipped(spoilt):
    target, open_experiment = spoilt
    (target / "noise.npz").unlink()
    with pytest.raises(MissingDataError) as error:
        open_experiment().check_images()
    assert str(target / "noise.npz") in str(error.value) and "--skip-missing" in str(error.value)
    run = open_experiment(skip_missing=True)
    table = run.collect_results()
    assert set(table.ood_set) == {"letters"} and list(run.missing) == ["noise"]
    run.export_tables(table, "30_results")
    assert "| missing |" in (run.figures_directory / "30_results_fpr95.md").read_text()
    assert "noise" in run.describe_image_sets()["set"].tolist()


def test_a_missing_id_set_cannot_be_skipped(spoilt):
    target, open_experiment = spoilt
    (target / "train.npz").unlink()
    with pytest.raises(MissingDataError, match=r"train\.npz"):
        open_experiment(skip_missing=True).check_images()


def test_a_missing_checkpoint_is_reported_before_the_pass(spoilt):
    target, open_experiment = spoilt
    (target / "weights.pth").unlink()
    with pytest.raises(MissingDataError, match=r"weights\.pth"):
        open_experiment().check_images()


def test_nothing_is_fetched_for_a_run_that_cannot_start(tmp_path, monkeypatch):
    monkeypatch.setattr("requests.get", lambda *_, **__: pytest.fail("a download"))
    run = Experiment.open(
        "cifar10_densenet", data_root=str(tmp_path), run_dir=str(tmp_path / "runs"), device="cpu"
    )
    with pytest.raises(MissingDataError, match=r"No checkpoint .*cifar10_densenet101_dice"):
        run.check_images()


def test_a_truncated_npz_is_named(spoilt):
    target, open_experiment = spoilt
    content = (target / "letters.npz").read_bytes()
    (target / "letters.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError) as error:
        open_experiment().check_images()
    assert "letters.npz" in one_sentence(error)


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
        _ = open_experiment().network
    assert name in one_sentence(error)


def test_nan_features_in_a_bank_stop_the_scoring_and_name_the_row(spoilt):
    _, open_experiment = spoilt
    run = open_experiment()
    path = shard_path(run.bank("noise").directory, 0)
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    tensors["features"][17, 3] = float("nan")
    save_file(tensors, path, metadata={"seconds": "1"})
    with pytest.raises(InputError) as error:
        run.results(["energy"])
    assert "NaN" in one_sentence(error) and "17" in one_sentence(error)


def test_a_shard_cut_in_half_stops_the_run_and_costs_only_itself(spoilt):
    _, open_experiment = spoilt
    table = open_experiment().collect_results()
    path = shard_path(open_experiment().bank("letters").directory, 0)
    path.write_bytes(path.read_bytes()[:1000])
    pd.testing.assert_frame_equal(open_experiment().collect_results(), table)  # what was scored is not lost
    for scores in path.parents[2].rglob("scores"):
        shutil.rmtree(scores)
    with pytest.raises(InputError) as error:
        open_experiment().collect_results()
    assert path.name in one_sentence(error)
    path.unlink()
    again = open_experiment().collect_results()
    pd.testing.assert_frame_equal(again.drop(columns=TIMES), table.drop(columns=TIMES))


def test_unknown_rows_and_sets_name_the_nearest(finished):
    run = small(finished[0])
    with pytest.raises(InputError, match="did you mean 'himplos'"):
        run.detector("himplo")
    with pytest.raises(InputError, match="did you mean 'letters'"):
        run.image_set("leters")
    with pytest.raises(InputError, match="did you mean 'percentile'"):
        small(finished[0], "himplos.percentil=3")
