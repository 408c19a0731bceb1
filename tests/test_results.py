"""The results table: published values, wide tables, export."""

import numpy as np
import pandas as pd
import pytest

from ood_helpers import results as results_module
from ood_helpers.config import load_config
from ood_helpers.results import (
    COLUMNS,
    PUBLISHED_PATH,
    costs,
    defaults,
    export_tables,
    latex_table,
    markdown_table,
    mean_table,
    nemenyi_distance,
    paired_differences,
    published_values,
    rank_intervals,
    read_results,
    tuning_pairs,
    wide_table,
    write_results,
)


def rows(seeds=(0,)):
    lines = []
    values = {
        "MSP": {"far set": 40.0, "near_set": 60.0, "far two": 20.0},
        "LINe": {"far set": 30.0, "near_set": 70.0, "far two": 20.02},
    }
    for seed in seeds:
        for method, by_set in values.items():
            for ood_set, fpr in by_set.items():
                line = dict.fromkeys(COLUMNS, None) | {
                    "experiment": "made",
                    "seed": seed,
                    "method": method,
                    "ood_set": ood_set,
                    "group": "near" if ood_set.startswith("near") else "far",
                    "n_id": 1000,
                    "n_ood": 2000,
                    "fpr95": fpr + 2 * seed,
                    "fpr95_lo": fpr - 1.25,
                    "fpr95_hi": fpr + 1.5,
                    "auroc": 100 - fpr / 3,
                    "auroc_lo": 99 - fpr / 3,
                    "auroc_hi": 100.5 - fpr / 3,
                    "id_accuracy": 94.1,
                }
                lines.append(line)
    return pd.DataFrame(lines)


def test_the_columns_of_the_design_come_first_and_in_order():
    design = (
        "experiment, seed, method, ood_set, group, n_id, n_ood, fpr95, fpr95_lo, fpr95_hi, auroc, auroc_lo, auroc_hi, "
        "aupr_in, aupr_out, detection_error, threshold95, id_accuracy, score_seconds, hyperparameters, published_fpr95, "
        "published_auroc, published_source"
    )
    assert COLUMNS[: len(design.split(", "))] == design.split(", ")


def test_results_survive_the_file(tmp_path):
    write_results(rows(), tmp_path / "results.csv")
    read = read_results(tmp_path / "results.csv")
    assert list(read.columns) == COLUMNS
    assert read.fpr95.tolist() == rows().fpr95.tolist()
    assert (tmp_path / "results.csv").read_bytes().count(b"\r") == 0


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    rows()[COLUMNS[: COLUMNS.index("data_sha256")]].to_csv(tmp_path / "results.csv", index=False)
    read = read_results(tmp_path / "results.csv")
    assert list(read.columns) == COLUMNS and read.tuned_on.isna().all()
    assert "| MSP |" in markdown_table(read, "fpr95")


def test_wide_table_puts_near_first_and_adds_group_means():
    table = wide_table(rows(), "fpr95")
    assert list(table.columns) == ["near_set", "far set", "far two", "mean near", "mean far", "mean"]
    assert list(table.index) == ["MSP", "LINe"]
    assert table.loc["MSP"].tolist() == pytest.approx([60, 40, 20, 60, 30, 40])


def test_markdown_shows_intervals_bold_and_ties_at_the_printed_digits():
    text = markdown_table(rows(), "fpr95", missing=["LSUN-C"])
    lines = text.splitlines()
    assert lines[2].startswith("| MSP | **60.0 (58.8–61.5)** | 40.0 (38.8–41.5) | **20.0 (18.8–21.5)** |")
    assert "| **20.0 (18.8–21.5)** |" in lines[3]
    assert lines[0].endswith("| LSUN-C |") and lines[2].endswith("| missing |")
    assert "Without LSUN-C: not found and skipped." in text


def test_auroc_is_best_when_highest():
    assert "| LINe | 76.7 (75.7–77.2) | **90.0 (89.0–90.5)** |" in markdown_table(rows(), "auroc")


def test_several_seeds_show_their_spread():
    text = markdown_table(rows(seeds=(0, 1)), "fpr95")
    assert "61.0 ± 1.4" in text and "(58.8" not in text and "seeds 0, 1" in text


def test_latex_escapes_and_marks_the_best():
    text = latex_table(rows(), "fpr95")
    assert r"near\_set" in text and r"\textbf{60.0 (58.8--61.5)}" in text and r"95 \% bootstrap" in text
    assert text.count(r"\\") == 3  # the head and two methods


def test_export_writes_three_formats_of_two_metrics(tmp_path):
    paths = export_tables(rows(), tmp_path, "30_results", missing=["iSUN"])
    assert sorted(path.name for path in paths) == sorted(
        f"30_results_{metric}.{suffix}" for metric in ("fpr95", "auroc") for suffix in ("csv", "md", "tex")
    )
    assert "iSUN" in (tmp_path / "30_results_fpr95.csv").read_text()


def test_a_method_without_a_set_has_a_dash_and_no_mean():
    table = rows()
    table = table[(table.method != "LINe") | (table.ood_set != "near_set")]
    assert wide_table(table, "fpr95").loc["LINe"].isna().tolist() == [True, False, False, True, False, True]
    line = markdown_table(table, "fpr95").splitlines()[3]
    assert line.startswith("| LINe | – | **30.0") and line.endswith("| – |")


def test_a_dagger_marks_what_was_tuned_and_says_on_what():
    table = rows()
    table.loc[table.method == "LINe", "tuned_on"] = "AUROC on 10 images"
    text = markdown_table(table, "fpr95")
    assert "| LINe † |" in text and "| MSP |" in text and "† LINe: AUROC on 10 images." in text
    assert r"LINe $\dagger$" in latex_table(table, "fpr95")


def with_tuned():
    tuned = rows().query("method == 'LINe' and group == 'far'").assign(method="LINe (tuned)")
    return pd.concat([rows(), tuned], ignore_index=True)


def test_tuned_rows_stand_apart_and_are_compared_on_their_own_sets():
    table = with_tuned()
    assert defaults(table).method.unique().tolist() == ["MSP", "LINe"]
    pairs = tuning_pairs(table)
    assert pairs[["method", "tuned", "ood_set"]].to_numpy().tolist() == [
        ["LINe", False, "far set"],
        ["LINe", False, "far two"],
        ["LINe (tuned)", True, "far set"],
        ["LINe (tuned)", True, "far two"],
    ]
    assert len(tuning_pairs(rows())) == 0


def drawn(seed=0, resamples=400):
    """Resamples around the values of `rows`; what the methods share moves them by 5 points, what they do not by 0.1."""
    generator = np.random.default_rng(seed)
    shared = 5 * generator.standard_normal((3, resamples))
    sets = ["near_set", "far set", "far two"]
    point = wide_table(rows(), "fpr95")[sets].to_numpy()
    own = 0.1 * generator.standard_normal((2, 3, resamples))
    values = point[:, :, None] + shared + own
    return {method: pd.DataFrame(by_set.T, columns=sets) for method, by_set in zip(["MSP", "LINe"], values)}


def test_paired_differences_cancel_what_both_methods_share():
    table = paired_differences(rows(), drawn(), "fpr95")
    assert table[["method_a", "method_b"]].to_numpy().tolist() == [["MSP", "LINe"]]
    line = table.iloc[0]
    assert line.difference == pytest.approx(40 - 120.02 / 3)
    assert line.low < line.difference < line.high and line.high - line.low < 0.5
    unpaired = drawn()["MSP"].mean(axis=1) - drawn(seed=1)["LINe"].mean(axis=1)
    assert np.ptp(np.quantile(unpaired, [0.025, 0.975])) > 5
    best = paired_differences(rows(), drawn(), "auroc").iloc[0]
    assert best.method_a == "MSP" and best.difference > 0  # the higher AUROC is the better


def test_means_over_sets_have_an_interval_of_their_own():
    """Not that of a set: what is drawn for one set is independent of the others."""
    means = mean_table(rows(), {"fpr95": drawn(), "auroc": drawn()})
    assert (
        means.ood_sets.tolist()
        == ["near_set"] * 2 + ["far set; far two"] * 2 + ["near_set; far set; far two"] * 2
    )
    line = means.iloc[2]
    assert (line.method, line.fpr95) == ("MSP", 30.0) and np.isnan(line.fpr95_std)
    expected = np.quantile(drawn()["MSP"][["far set", "far two"]].mean(axis=1), [0.025, 0.975])
    assert line[["fpr95_lo", "fpr95_hi"]].tolist() == pytest.approx(expected)
    cells = markdown_table(rows(), "fpr95", means=means).splitlines()[2].split(" | ")
    assert cells[-2] == f"30.0 ({expected[0]:.1f}–{expected[1]:.1f})"
    assert markdown_table(rows(), "fpr95").splitlines()[2].split(" | ")[-2] == "30.0"


def test_means_over_several_seeds_show_the_spread_of_the_mean():
    table = rows(seeds=(0, 1))
    means = mean_table(table, {"fpr95": drawn(), "auroc": drawn()})
    assert means.fpr95_std.tolist() == pytest.approx([2 / 2**0.5] * 6)
    assert markdown_table(table, "fpr95", means=means).splitlines()[2].split(" | ")[-2] == "31.0 ± 1.4"


def test_seeds_that_do_not_differ_have_no_spread():
    """With a checkpoint; the standard deviation of three equal values is not always exactly 0."""
    table = pd.concat([rows().assign(seed=seed, fpr95=0.1) for seed in range(3)])
    means = mean_table(table, {"fpr95": drawn(), "auroc": drawn()})
    assert means.fpr95_std.isna().all()
    assert "±" not in markdown_table(table, "fpr95", means=means)


def test_a_method_without_a_set_has_no_mean_over_it():
    table = rows()[lambda t: (t.method != "LINe") | (t.ood_set != "near_set")]
    means = mean_table(table, {"fpr95": drawn(), "auroc": drawn()})
    assert means[means.method == "LINe"].ood_sets.tolist() == ["far set; far two"]
    assert markdown_table(table, "fpr95", means=means).splitlines()[3].endswith("| – |")


def test_ranks_are_means_over_sets_with_an_interval_over_images():
    table, cliques = rank_intervals(rows(), drawn(), "fpr95")
    assert cliques == [["MSP", "LINe"]]
    table = table.set_index("method")
    assert table.mean_rank.to_dict() == pytest.approx({"MSP": 4 / 3, "LINe": 5 / 3})
    # near_set and far set are never in doubt; far two, 0.02 apart, is anyone's
    assert table.loc["MSP", ["low", "high"]].tolist() == pytest.approx([4 / 3, 5 / 3])


def test_cliques_are_runs_of_neighbours_of_which_no_two_ranks_differ():
    """On one set: a and b swap places, so do c and d, d and e, while c and e keep apart from each other."""
    values = {
        "a": [1, 2] * 50,
        "b": [2, 1] * 50,
        "c": [3] * 50 + [4] * 50,
        "d": ([4] * 25 + [5] * 25) + [3] * 50,
    }
    values["e"] = [5] * 25 + [4] * 25 + [5] * 50
    results = pd.concat(
        rows().query("method == 'MSP' and ood_set == 'far set'").assign(method=name, fpr95=float(place))
        for place, name in enumerate(values)
    )
    drawn = {name: pd.DataFrame({"far set": column}) for name, column in values.items()}
    ranks, cliques = rank_intervals(results, drawn, "fpr95")
    assert ranks.method.tolist() == list("abcde")
    assert cliques == [["a", "b"], ["c", "d"], ["d", "e"]]
    apart = {name: pd.DataFrame({"far set": [place] * 9}) for place, name in enumerate(values)}
    assert rank_intervals(results, apart, "fpr95")[1] == []


@pytest.mark.parametrize(("methods", "sets", "distance"), [(4, 14, 1.25), (2, 10, 0.62), (10, 5, 6.06)])
def test_nemenyi_distance(methods, sets, distance):
    """Demsar's own example, 4 methods on 14 sets, and q = 1.960 and 3.164 of his table 5a."""
    assert nemenyi_distance(methods, sets) == pytest.approx(distance, abs=0.01)


def test_costs_are_for_ten_thousand_images():
    table = rows(seeds=(0, 1)).assign(score_seconds=0.5, fit_seconds=[1.0] * 6 + [3.0] * 6, extra_passes=3)
    line = costs(table).set_index("method").loc["MSP"]
    assert line.tolist() == pytest.approx([2.0, 2.5, 3])


def test_published_values_are_found_only_for_the_same_network_and_set():
    published = load_config("cifar10_npz").published
    found = published_values(published, "ReAct", "SVHN")
    table = pd.read_csv(PUBLISHED_PATH)
    row = table[
        (table.method == "ReAct")
        & (table.ood_set == "SVHN")
        & table.id_set.eq("CIFAR-10")
        & table.architecture.str.startswith("DenseNet-101 (DICE")
    ].iloc[0]
    assert (found["published_fpr95"], found["published_auroc"]) == (row.fpr95, row.auroc)
    assert "CADRef" in found["published_source"]
    nothing = dict.fromkeys(found)
    assert published_values(published, "ReAct", "CIFAR-100") == nothing
    assert published_values(published, "HIMPLoS", "SVHN") == nothing
    assert published_values(None, "ReAct", "SVHN") == nothing


def test_published_rates_are_percentages():
    table = pd.read_csv(results_module.PUBLISHED_PATH)
    assert len(table) > 300 and table.source.notna().all()
    rates = table[["fpr95", "auroc"]]
    assert ((rates >= 0) & (rates <= 100) | rates.isna()).all().all()
    assert rates.max().min() > 1
