"""The long-form results table, the published values beside it, and its export."""

import html
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from ood_helpers import metrics
from ood_helpers.config.experiment import PublishedConfig
from ood_helpers.files import write_text

COLUMNS = ["experiment", "seed", "method", "ood_set", "group", "n_id", "n_ood"]
COLUMNS += [metric + end for metric in ("fpr95", "auroc") for end in ("", "_lo", "_hi")]
COLUMNS += ["aupr_in", "aupr_out", "detection_error", "threshold95", "id_accuracy", "score_seconds"]
COLUMNS += ["hyperparameters", "published_fpr95", "published_auroc", "published_source"]
COLUMNS += ["data_sha256", "fpr95_ood_positive", "tuned_on", "fit_seconds", "extra_passes"]
METRICS = {"fpr95": ("FPR95", "lower is better"), "auroc": ("AUROC", "higher is better")}
OVER_SEEDS = "mean over seeds ± standard deviation"  # a column of tables
PUBLISHED_PATH = Path(__file__).with_name("published.csv")
_read_published = cache(lambda: pd.read_csv(PUBLISHED_PATH))


def with_published(lines: pd.DataFrame, published: PublishedConfig | None) -> pd.DataFrame:
    """A results table with the published values beside the measured ones, all columns in order."""
    values = [published_values(published, *pair) for pair in zip(lines.method, lines.ood_set)]
    return pd.concat([lines, pd.DataFrame(values, index=lines.index)], axis=1)[COLUMNS]


def published_values(published: PublishedConfig | None, method: str, ood_set: str) -> dict:
    """The published FPR95 and AUROC (percent) of a method on a set, with their source; None where unknown."""
    row: dict = {}
    if published is not None and ood_set in published.ood_sets:
        table = _read_published()
        found = table[
            (table.method.map(_plain) == _plain(method))
            & (table.id_set == published.id_set)
            & (table.architecture == published.architecture)
            & (table.ood_set == published.ood_sets[ood_set])
        ]
        row = next(iter(found.to_dict("records")), {})
    return {f"published_{name}": row.get(name) for name in ("fpr95", "auroc", "source")}


def _plain(method: str) -> str:
    """A method's name without what spellings differ in: KL Matching and KL matching, DICE+ReAct."""
    return method.lower().replace(" ", "")


def write_results(results: pd.DataFrame, path: Path) -> None:
    """Write the long-form table as CSV, six significant digits, atomically."""
    write_text(path, results[COLUMNS].to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def read_results(path: Path) -> pd.DataFrame:
    """Read a results.csv; columns that an earlier version did not write are empty."""
    return pd.read_csv(path).reindex(columns=COLUMNS)


def wide_table(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Methods x OOD sets of one metric in percent, mean over seeds, with means over each group and all sets.

    Near sets come first; a mean over a group is that of its sets, NaN when the method lacks one of them.
    """
    sets = ordered_sets(results)
    table = results.pivot_table(index="method", columns="ood_set", values=metric, sort=False)[list(sets)]
    for column, members in _averaged(results).items():
        table[column] = table[members].mean(axis=1, skipna=False)
    return table.reindex(results.method.unique())


def _averaged(results: pd.DataFrame) -> dict[str, list[str]]:
    """The columns of means and the OOD sets that each is over."""
    sets = ordered_sets(results)
    groups = {f"mean {group}": [name for name in sets if sets[name] == group] for group in ("near", "far")}
    return {column: members for column, members in groups.items() if members} | {"mean": list(sets)}


def ordered_sets(results: pd.DataFrame) -> dict[str, str]:
    """OOD set -> group; the near sets first."""
    pairs = results[["ood_set", "group"]].drop_duplicates()
    return dict(sorted(zip(pairs.ood_set, pairs.group), key=lambda pair: pair[1] == "far"))


def mean_table(results: pd.DataFrame, resamples: Mapping[str, Mapping[str, pd.DataFrame]]) -> pd.DataFrame:
    """The means over OOD sets with what the long-form table has for single sets.

    Parameters
    ----------
    results : the long-form table
    resamples : metric -> method -> the metric on bootstrap resamples, see Experiment.resamples

    Returns
    -------
    one line per method and mean (near, far, all sets): experiment, method, ood_sets (joined by "; "), and for
    each metric its mean over seeds and sets, _lo and _hi (95 % interval), _std (over seeds; NaN if all agree)
    """
    lines = []
    for members in _averaged(results).values():
        for method, rows in results[results.ood_set.isin(members)].groupby("method", sort=False):
            if rows.ood_set.nunique() < len(members):
                continue
            line = {"experiment": rows.experiment.iloc[0], "method": method, "ood_sets": "; ".join(members)}
            for metric, by_method in resamples.items():
                of_seeds = rows.groupby("seed")[metric].mean()
                low, high = metrics.interval(by_method[method][members].mean(axis=1))
                line |= {metric: of_seeds.mean(), f"{metric}_lo": low, f"{metric}_hi": high}
                line[f"{metric}_std"] = _spread(of_seeds)
            lines.append(line)
    return pd.DataFrame(lines)


def with_seeds(means: pd.DataFrame, by_seed: pd.DataFrame) -> pd.DataFrame:
    """A `mean_table` with the means over OOD sets of several seeds, whose networks were trained anew for each.

    Parameters
    ----------
    by_seed : seed, method, ood_set, fpr95, auroc

    Returns
    -------
    the table with, for each metric, _seeds (mean over seeds) and _seeds_std (standard deviation); NaN for other methods
    """
    means = means.copy()
    for place, line in means.iterrows():
        own = by_seed[(by_seed.method == line.method) & by_seed.ood_set.isin(line.ood_sets.split("; "))]
        if set(own.ood_set) != set(line.ood_sets.split("; ")):
            own = own.iloc[:0]
        for metric in METRICS:
            of_seed = own.groupby("seed")[metric].mean()
            means.loc[place, [f"{metric}_seeds", f"{metric}_seeds_std"]] = of_seed.mean(), of_seed.std()
    return means


def seeds_against_images(means: pd.DataFrame, metric: str = "fpr95") -> str:
    """Which is larger, the spread over seeds or over images: a sentence on the rows of a table `with_seeds`."""
    rows = means[means[f"{metric}_seeds_std"].notna()]
    rows = rows[
        rows.ood_sets.map(len) == rows.ood_sets.map(len).groupby(rows.method).transform("max")
    ]  # over all sets
    images = (rows[f"{metric}_hi"] - rows[f"{metric}_lo"]) / (2 * 1.96)
    ratio = rows[f"{metric}_seeds_std"] / images
    return (
        f"The standard deviation over seeds of the mean {METRICS[metric][0]} is larger than that over images for "
        f"{int((ratio > 1).sum())} of {len(rows)} rows, {ratio.median():.1f} times as large in the median: two methods that "
        "are further apart than the interval over images may still change places with other networks."
    )


def _cells(
    results: pd.DataFrame,
    metric: str,
    missing: Iterable[str],
    means: pd.DataFrame | None,
    bold: Callable[[str], str],
    escape=str,
) -> pd.DataFrame:
    """The wide table as text: values with their interval, or with their spread over several seeds.

    The best value of each column, ties at the printed precision included, goes through `bold`, every text
    through `escape`; a dagger marks the methods with `tuned_on`; each missing set has a column that says so.
    """
    table = wide_table(results, metric)
    cells = table.map(lambda value: "–" if np.isnan(value) else f"{value:.1f}")
    printed = table.round(1)
    best = printed.eq(printed.min() if metric == "fpr95" else printed.max())
    for (method, ood_set), rows in results.groupby(["method", "ood_set"], sort=False):
        low, high = rows[f"{metric}_lo"].iloc[0], rows[f"{metric}_hi"].iloc[0]
        cells.loc[method, ood_set] += _uncertainty(_spread(rows[metric]), low, high)
    columns = {"; ".join(members): column for column, members in _averaged(results).items()}
    for line in [] if means is None else means.to_dict("records"):
        column = columns.get(line["ood_sets"])
        if column is not None and line["method"] in cells.index:
            ends = (line[f"{metric}_{end}"] for end in ("std", "lo", "hi"))
            cells.loc[line["method"], column] += _uncertainty(*ends)
    if means is not None and f"{metric}_seeds" in means:
        over = means[means.ood_sets == "; ".join(ordered_sets(results))].set_index("method")
        texts = [
            "" if np.isnan(mean) else f"{mean:.1f} ± {spread:.1f}"
            for mean, spread in zip(over[f"{metric}_seeds"], over[f"{metric}_seeds_std"])
        ]
        cells[OVER_SEEDS] = pd.Series(texts, over.index).reindex(cells.index).fillna("")
    cells = cells.map(escape)
    daggers = {method: f"{method} †" for method in _tuned_on(results)}
    best = best.reindex(columns=cells.columns, fill_value=False)
    cells = cells.where(~best, cells.map(bold)).rename(index=daggers).rename(index=escape, columns=escape)
    for name in missing:
        cells[escape(name)] = "missing"
    return cells


def _spread(values: pd.Series) -> float:
    """Standard deviation over seeds; NaN where they do not differ, as with one seed or a checkpoint."""
    return values.std() if values.nunique() > 1 else np.nan


def _uncertainty(spread: float, low: float, high: float) -> str:
    return f" ({low:.1f}–{high:.1f})" if np.isnan(spread) else f" ± {spread:.1f}"


def _tuned_on(results: pd.DataFrame) -> dict[str, str]:
    """Method -> what its hyper-parameters were chosen on, for the methods whose were."""
    tuned = results[results.tuned_on.notna() & (results.tuned_on != "")].drop_duplicates("method")
    return dict(zip(tuned.method, tuned.tuned_on))


def markdown_table(
    results: pd.DataFrame, metric: str, missing: Iterable[str] = (), means: pd.DataFrame | None = None
) -> str:
    """One metric as a Markdown table: methods x sets with intervals, the best of each column in bold.

    `means`, a `mean_table`, gives the columns of means their intervals.
    """
    cells = _cells(results, metric, missing, means, bold="**{}**".format)
    lines = ["| " + " | ".join(["method", *cells.columns]) + " |", "|---" * (1 + len(cells.columns)) + "|"]
    lines += ["| " + " | ".join([method, *row]) + " |" for method, row in zip(cells.index, cells.to_numpy())]
    return "\n".join([*lines, "", describe_table(results, metric, missing), ""])


def html_table(
    results: pd.DataFrame, metric: str, missing: Iterable[str] = (), means: pd.DataFrame | None = None
) -> str:
    """One metric as an HTML table; parameters as for `markdown_table`."""
    cells = _cells(results, metric, missing, means, bold="<b>{}</b>".format, escape=html.escape)
    cells.index.name = cells.columns.name = None
    return cells.to_html(escape=False, border=0)


def latex_table(
    results: pd.DataFrame, metric: str, missing: Iterable[str] = (), means: pd.DataFrame | None = None
) -> str:
    """One metric as a LaTeX booktabs table; parameters as for `markdown_table`."""
    cells = _cells(results, metric, missing, means, bold=r"\textbf{{{}}}".format, escape=_latex)
    cells.columns.name = None
    style = cells.rename_axis("method").reset_index().style.hide(axis="index")
    caption, columns = _latex(describe_table(results, metric, missing)), "l" + "r" * len(cells.columns)
    return style.to_latex(hrules=True, position_float="centering", column_format=columns, caption=caption)


def _latex(text: str) -> str:
    replacements = {"\\": r"\textbackslash{}", "–": "--", "±": r"$\pm$", "†": r"$\dagger$"}
    return text.translate(str.maketrans(replacements | {sign: "\\" + sign for sign in "&%$#_{}"}))


def describe_table(results: pd.DataFrame, metric: str, missing: Iterable[str] = ()) -> str:
    """What a table shows, in a few sentences: metric, direction, sizes of sets, intervals, missing sets."""
    name, direction = METRICS[metric]
    seeds = sorted(results.seed.unique())
    interval = "95 % bootstrap interval"
    if results.groupby(["method", "ood_set"])[metric].nunique().max() > 1:
        interval = f"mean ± standard deviation over seeds ({interval} where they do not differ)"
    sizes = results.drop_duplicates("ood_set")
    sizes = ", ".join(f"{row.ood_set} {row.n_ood:,}" for row in sizes.itertuples())
    text = (
        f"{name} in percent ({direction}), {interval}; experiment {results.experiment.iloc[0]}, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}, "
        f"ID accuracy {_accuracies(results)}, {results.n_id.iloc[0]:,} ID images, OOD images: {sizes}."
    )
    for methods, choice in _sharing(_tuned_on(results)):
        text += f" † {methods}: {choice}."
    for methods, what in _sharing(_approximations(results)):
        text += f" Approximation for {methods}: {what}."
    # Methods are not reported on sets with images like those that they have learned from.
    sets, own_sets = set(results.ood_set), results.groupby("method", sort=False).ood_set
    for methods, absent in _sharing({method: ", ".join(sorted(sets - set(own))) for method, own in own_sets}):
        text += f" {methods}: not reported on {absent}."
    without = ", ".join(missing)
    return text + (f" Without {without}: not found and skipped." if without else "")


def _sharing(texts: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """The methods that share a text, joined, and the text; those without one are left out."""
    found: dict[str, list[str]] = {}
    for method, text in texts.items():
        if text:
            found.setdefault(text, []).append(method)
    return [(", ".join(methods), text) for text, methods in found.items()]


def _accuracies(results: pd.DataFrame) -> str:
    """The ID accuracy that most methods rest on, and those of methods with another network."""
    means = results.groupby("method", sort=False).id_accuracy.mean().map("{:.2f} %".format)
    counts = means.value_counts()
    common = next(value for value in means if counts[value] == counts.max())
    listed = [f"{value} for {methods}" for methods, value in _sharing(means[means != common])]
    return common + (f" ({'; '.join(listed)})" if listed else "")


def _approximations(results: pd.DataFrame) -> dict[str, str | None]:
    """Method -> what its network was trained by in place of its recipe."""
    rows = results.drop_duplicates("method").dropna(subset="hyperparameters")
    settings = zip(rows.method, map(json.loads, rows.hyperparameters))
    return {method: found.get("network", {}).get("approximation") for method, found in settings}


def tuned_label(label: str) -> str:
    """The name of the tuned row beside a row."""
    return f"{label} (tuned)"


def defaults(results: pd.DataFrame) -> pd.DataFrame:
    """The results without the tuned rows that stand beside a row of the config."""
    return results[~results.method.isin({tuned_label(method) for method in results.method})]


def tuning_pairs(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of methods that have a tuned row, and the tuned ones, on the OOD sets of these;
    with a column `tuned` (bool)."""
    methods = set(results.method)
    order = [
        name
        for method in results.method.unique()
        if tuned_label(method) in methods
        for name in (method, tuned_label(method))
    ]
    tuned = results.method.isin(order[1::2])
    reported = results.ood_set.isin(results[tuned].ood_set)
    pairs = results.assign(tuned=tuned)[results.method.isin(order) & reported]
    return pairs.sort_values("method", key=lambda names: names.map(order.index), kind="stable")


def headline(results: pd.DataFrame, title: str, rows: int = 5) -> str:
    """The best rows of a results table by mean FPR95, one line each."""
    means = pd.DataFrame({metric: wide_table(defaults(results), metric)["mean"] for metric in METRICS})
    best = means.dropna().sort_values("fpr95", kind="stable").head(rows)
    lines = [f"  {name:32}FPR95{row.fpr95:6.1f}   AUROC{row.auroc:6.1f}" for name, row in best.iterrows()]
    return "\n".join([f"{title}, means over the OOD sets:", *lines])


def paired_differences(
    results: pd.DataFrame, resamples: Mapping[str, pd.DataFrame], metric: str = "fpr95"
) -> pd.DataFrame:
    """Differences of the mean over OOD sets between every two methods, with paired bootstrap intervals.

    Both methods are evaluated on the same resampled images, so what makes one easy or hard for both cancels.

    Parameters
    ----------
    results : the long-form table
    resamples : method -> the metric on bootstrap resamples in percent, one column per OOD set, see
        Experiment.resamples; methods that are not reported on all sets are left out

    Returns
    -------
    one line per pair, methods from best to worst: method_a (the better), method_b, difference (a - b in
    points), low, high (95 % interval; not corrected for the number of pairs)
    """
    resamples = _on_all_sets(results, resamples)
    means = wide_table(results, metric)["mean"][list(resamples)]
    order = means.sort_values(ascending=metric == "fpr95", kind="stable").index
    lines = []
    for a, b in itertools.combinations(order, 2):
        low, high = metrics.interval((resamples[a] - resamples[b]).mean(axis=1))
        lines.append((a, b, means[a] - means[b], low, high))
    return pd.DataFrame(lines, columns=["method_a", "method_b", "difference", "low", "high"])


def rank_intervals(
    results: pd.DataFrame, resamples: Mapping[str, pd.DataFrame], metric: str = "fpr95"
) -> tuple[pd.DataFrame, list[list[str]]]:
    """Mean rank of each method over the OOD sets (1 = best, ties share their mean) with bootstrap intervals.

    Where methods are close, ranks of resamples move to the middle; an interval may reach further inwards.

    Parameters as for `paired_differences`.

    Returns
    -------
    ranks : method, mean_rank, low, high (95 % interval over the images); best first
    cliques : the longest runs of two and more neighbours of which no two differ: the 95 % interval of each
        difference of mean ranks, paired, contains 0; methods in no common run may still not differ
    """
    from scipy.stats import rankdata  # late: importing scipy.stats takes half a second

    resamples = _on_all_sets(results, resamples)
    methods, sign = list(resamples), 1 if metric == "fpr95" else -1
    sets = list(ordered_sets(results))
    values = wide_table(results, metric).loc[methods, sets].to_numpy()
    ranks = rankdata(sign * values, axis=0).mean(axis=1)
    drawn = rankdata(sign * np.stack([table[sets] for table in resamples.values()]), axis=0).mean(axis=2)
    order = np.argsort(ranks, kind="stable")
    low, high = np.transpose([metrics.interval(drawn[place]) for place in order])
    table = pd.DataFrame({"method": [methods[place] for place in order], "mean_rank": ranks[order]})

    def equal(a: int, b: int) -> bool:
        below, above = metrics.interval(drawn[order[a]] - drawn[order[b]])
        return below <= 0 <= above

    cliques, reached = [], 0
    for start in range(len(order)):
        stop = start + 1
        while stop < len(order) and all(equal(stop, other) for other in range(start, stop)):
            stop += 1
        if stop - start > 1 and stop > reached:
            cliques.append(table.method[start:stop].tolist())
            reached = stop
    return table.assign(low=low, high=high), cliques


def _on_all_sets(results: pd.DataFrame, resamples: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    sets = ordered_sets(results).keys()
    return {method: drawn for method, drawn in resamples.items() if sets <= set(drawn.columns)}


def nemenyi_distance(methods: int, sets: int) -> float:
    """Critical difference of mean ranks at 5 %: q sqrt(k (k + 1) / (6 N)) for k methods on N sets.

    q is the 95 % point of the studentised range of k groups over sqrt 2. Two methods whose mean ranks are
    further apart differ on a population of OOD sets of which the N are a sample.

    Source: Demsar, JMLR 7 (2006), section 3.2.2.
    """
    from scipy.stats import studentized_range

    q = studentized_range.ppf(0.95, methods, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(methods * (methods + 1) / (6 * sets)))


def costs(results: pd.DataFrame) -> pd.DataFrame:
    """What each method costs beside the forward pass that fills the banks.

    Returns
    -------
    method, fit_seconds (with tuning, where a method is tuned), seconds_per_10k (to score 10,000 images),
    extra_passes (through the network for each image, forward or backward); means over seeds
    """
    groups = results.groupby("method", sort=False)
    return pd.DataFrame(
        {
            "fit_seconds": groups.fit_seconds.mean(),
            "seconds_per_10k": 10_000 * groups.score_seconds.sum() / groups.n_ood.sum(),
            "extra_passes": groups.extra_passes.max(),
        }
    ).reset_index()


def export_tables(
    results: pd.DataFrame,
    directory: Path,
    stem: str,
    missing: Iterable[str] = (),
    means: pd.DataFrame | None = None,
) -> list[Path]:
    """Write the FPR95 and AUROC tables as CSV, Markdown and LaTeX: `directory`/`stem`_fpr95.csv and so on.

    Parameters as for `markdown_table`; the CSV has no intervals.
    """
    missing, written = list(missing), []
    for metric in METRICS:
        wide = wide_table(results, metric).assign(**dict.fromkeys(missing))
        texts = {
            "csv": wide.to_csv(float_format="%.6g", lineterminator="\n"),
            "md": markdown_table(results, metric, missing, means),
            "tex": latex_table(results, metric, missing, means),
        }
        for suffix, text in texts.items():
            path = Path(directory) / f"{stem}_{metric}.{suffix}"
            write_text(path, text)
            written.append(path)
    return written
