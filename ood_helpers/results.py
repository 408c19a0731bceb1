"""The long-form results table, the published values beside it, and its export."""

import html
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pandas as pd

from ood_helpers.config import PublishedConfig
from ood_helpers.files import write_text

COLUMNS = [
    "experiment",
    "seed",
    "method",
    "ood_set",
    "group",
    "n_id",
    "n_ood",
    "fpr95",
    "fpr95_lo",
    "fpr95_hi",
    "auroc",
    "auroc_lo",
    "auroc_hi",
    "aupr_in",
    "aupr_out",
    "detection_error",
    "threshold95",
    "id_accuracy",
    "score_seconds",
    "hyperparameters",
    "published_fpr95",
    "published_auroc",
    "published_source",
    "data_sha256",
]
METRICS = {"fpr95": ("FPR95", "lower is better"), "auroc": ("AUROC", "higher is better")}
PUBLISHED_PATH = Path(__file__).with_name("published.csv")


def published_values(published: PublishedConfig | None, method: str, ood_set: str) -> dict:
    """The published FPR95 and AUROC (percent) of a method on a set, with their source; None where there is none."""
    values = {"published_fpr95": None, "published_auroc": None, "published_source": None}
    if published is None or ood_set not in published.ood_sets:
        return values
    table = _published_table()
    found = table[
        (table.method == method)
        & (table.id_set == published.id_set)
        & (table.architecture == published.architecture)
        & (table.ood_set == published.ood_sets[ood_set])
    ]
    if len(found) == 0:
        return values
    row = found.iloc[0]
    return {"published_fpr95": row.fpr95, "published_auroc": row.auroc, "published_source": row.source}


@cache
def _published_table() -> pd.DataFrame:
    return pd.read_csv(PUBLISHED_PATH)


def write_results(results: pd.DataFrame, path: Path) -> None:
    """Write the long-form table as CSV, six significant digits, atomically."""
    write_text(path, results[COLUMNS].to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def read_results(path: Path) -> pd.DataFrame:
    """Read a results.csv."""
    return pd.read_csv(path)


def wide_table(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Methods x OOD sets of one metric in percent, mean over seeds, with the mean of each group and of all sets.

    Near sets come first; a mean over a group is a plain mean of its sets.
    """
    sets = ordered_sets(results)
    table = results.pivot_table(index="method", columns="ood_set", values=metric, sort=False)[list(sets)]
    for group in ("near", "far"):
        members = [name for name, its_group in sets.items() if its_group == group]
        if members:
            table[f"mean {group}"] = table[members].mean(axis=1)
    table["mean"] = table[list(sets)].mean(axis=1)
    return table.reindex(results.method.unique())


def ordered_sets(results: pd.DataFrame) -> dict[str, str]:
    """OOD set -> group; the near sets first."""
    pairs = results[["ood_set", "group"]].drop_duplicates()
    order = sorted(zip(pairs.ood_set, pairs.group), key=lambda pair: pair[1] == "far")
    return dict(order)


def _cells(
    results: pd.DataFrame, metric: str, missing: Iterable[str], bold: Callable[[str], str], escape=str
) -> pd.DataFrame:
    """The wide table as text: values with their interval, or with their spread over several seeds.

    The best value of each column, ties at the printed precision included, goes through `bold`; all texts go
    through `escape`; a column that says so is added for each missing set.
    """
    table = wide_table(results, metric)
    cells = table.map("{:.1f}".format)
    printed = cells.astype(float)
    best = printed.eq(printed.min() if metric == "fpr95" else printed.max())
    for (method, ood_set), rows in results.groupby(["method", "ood_set"], sort=False):
        if rows[metric].nunique() > 1:
            cells.loc[method, ood_set] += f" ± {rows[metric].std():.1f}"
        else:
            cells.loc[method, ood_set] += (
                f" ({rows[f'{metric}_lo'].iloc[0]:.1f}–{rows[f'{metric}_hi'].iloc[0]:.1f})"
            )
    cells = cells.map(escape)
    cells = cells.where(~best, cells.map(bold)).rename(index=escape, columns=escape)
    for name in missing:
        cells[escape(name)] = "missing"
    return cells


def markdown_table(results: pd.DataFrame, metric: str, missing: Iterable[str] = ()) -> str:
    """One metric as a Markdown table: methods x sets with intervals, the best of each column in bold."""
    cells = _cells(results, metric, missing, bold="**{}**".format)
    lines = ["| " + " | ".join(["method", *cells.columns]) + " |", "|---" * (1 + len(cells.columns)) + "|"]
    lines += ["| " + " | ".join([method, *row]) + " |" for method, row in zip(cells.index, cells.to_numpy())]
    return "\n".join([*lines, "", describe_table(results, metric, missing), ""])


def html_table(results: pd.DataFrame, metric: str, missing: Iterable[str] = ()) -> str:
    """One metric as an HTML table: methods x sets with intervals, the best of each column in bold."""
    cells = _cells(results, metric, missing, bold="<b>{}</b>".format, escape=html.escape)
    cells.index.name = cells.columns.name = None
    return cells.to_html(escape=False, border=0)


def latex_table(results: pd.DataFrame, metric: str, missing: Iterable[str] = ()) -> str:
    """One metric as a LaTeX booktabs table with the best of each column in bold."""
    cells = _cells(results, metric, missing, bold=r"\textbf{{{}}}".format, escape=_latex)
    rows = [" & ".join([method, *row]) + r" \\" for method, row in zip(cells.index, cells.to_numpy())]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(describe_table(results, metric, missing))}}}",
            rf"\begin{{tabular}}{{l{'r' * len(cells.columns)}}}",
            r"\toprule",
            " & ".join(["method", *cells.columns]) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex(text: str) -> str:
    replacements = {"\\": r"\textbackslash{}", "–": "--", "±": r"$\pm$"}
    replacements |= {character: "\\" + character for character in "&%$#_{}"}
    return "".join(replacements.get(character, character) for character in text)


def describe_table(results: pd.DataFrame, metric: str, missing: Iterable[str] = ()) -> str:
    """What a table shows, in two or three sentences: metric and direction, ID set size, intervals, missing sets."""
    name, direction = METRICS[metric]
    seeds = sorted(results.seed.unique())
    varies = results.groupby(["method", "ood_set"])[metric].nunique().max() > 1
    interval = "mean ± standard deviation over seeds" if varies else "95 % bootstrap interval"
    sizes = results.drop_duplicates("ood_set")
    sizes = ", ".join(f"{row.ood_set} {row.n_ood:,}" for row in sizes.itertuples())
    text = (
        f"{name} in percent ({direction}), {interval}; experiment {results.experiment.iloc[0]}, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}, "
        f"ID accuracy {results.id_accuracy.mean():.2f} %, {results.n_id.iloc[0]:,} ID images, OOD images: {sizes}."
    )
    missing = list(missing)
    return text + (f" Without {', '.join(missing)}: not found and skipped." if missing else "")


def export_tables(
    results: pd.DataFrame, directory: Path, stem: str, missing: Iterable[str] = ()
) -> list[Path]:
    """Write the FPR95 and AUROC tables as CSV, Markdown and LaTeX: `directory`/`stem`_fpr95.csv and so on."""
    missing, written = list(missing), []
    for metric in METRICS:
        wide = wide_table(results, metric)
        for name in missing:
            wide[name] = None
        texts = {
            "csv": wide.to_csv(float_format="%.6g", lineterminator="\n"),
            "md": markdown_table(results, metric, missing),
            "tex": latex_table(results, metric, missing),
        }
        for suffix, text in texts.items():
            path = Path(directory) / f"{stem}_{metric}.{suffix}"
            write_text(path, text)
            written.append(path)
    return written
