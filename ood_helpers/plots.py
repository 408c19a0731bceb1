"""Every figure of the kit, one function each; each returns a matplotlib Figure and shows nothing by itself.

A figure is shown by Jupyter when it is the last value of a cell, once. Scores are drawn with higher = more
in-distribution; rates are percentages. `caption` (experiment and seed, for example "digits · seed 0") stands
in the upper right corner of every figure. Arrays may be numpy arrays or tensors on any device.
"""

import functools
import io
import itertools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, Normalize, PowerNorm, TwoSlopeNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox
from PIL import Image

from ood_helpers.errors import InputError, nearest
from ood_helpers.files import atomic_path
from ood_helpers.metrics import fpr_at_tpr
from ood_helpers.mos.groups import Groups
from ood_helpers.results import METRICS, ordered_sets, tuned_label, wide_table

WIDTH = 7.0  # inches: the text width of a page
SAVED_DPI = 150
SCORE = "score (higher = more in-distribution)"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that figures look alike everywhere
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "lines.linewidth": 1.5,
    "image.cmap": "cividis",
    "svg.hashsalt": "ood_helpers",  # without it the identifiers in an SVG are random
}
# seaborn's "colorblind" palette: blue for the ID data, the others (less its pale yellow) for the OOD sets
ID_COLOUR = "#0173B2"
COLOURS = ["#DE8F05", "#029E73", "#CC78BC", "#D55E00", "#56B4E9", "#CA9161", "#949494", "#FBAFE4"]
PUBLISHED_COLOUR = "#D55E00"
PART_LOOKS = {
    "host on the backbone": ("0.5", "o"),
    "S_foreground": (ID_COLOUR, "s"),
    "S_background": (COLOURS[0], "^"),
    "S": ("black", "D"),
    "plain, same budget": (COLOURS[2], "v"),
}
PICTURE_GAP = 0.06  # between images in a row, in image widths
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "*"]


class NotebookFigure(Figure):
    """A Figure that Jupyter shows as PNG although pyplot, which registers the display of figures, does not know it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        FigureCanvasAgg(self).print_png(buffer, metadata={"Software": None})
        return buffer.getvalue()


def _figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the kit's style, then freeze the layout: a figure looks the same each time it is shown or saved."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        with style.context(["default", STYLE]):
            figure = draw(*args, **kwargs)
            _settle(figure)
        return figure

    return drawn


def _settle(figure: Figure) -> None:
    """Place the axes and keep their ticks, which otherwise depend on the style in force at each later drawing."""
    shown, figure.dpi = (
        figure.dpi,
        SAVED_DPI,
    )  # letters are rounded to pixels: widths differ with the resolution
    figure.get_layout_engine().execute(figure)
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        axis.set_major_locator(FixedLocator(axis.get_majorticklocs()))
    # the first pass measured the tick labels of the places before it
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine(None)  # or each saving would draw twice
    figure.dpi = shown


def save_figure(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write `directory`/`name`.png (SAVED_DPI, 256 colours: a third of the bytes) and .svg, atomically; the same figure gives
    the same bytes."""
    paths = []
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        path = Path(directory) / f"{name}.{suffix}"
        with rc_context({"svg.hashsalt": STYLE["svg.hashsalt"]}), atomic_path(path) as temporary:
            figure.savefig(temporary, format=suffix, dpi=SAVED_DPI, metadata=metadata)
            if suffix == "png":
                with Image.open(temporary) as image:
                    reduced = image.convert("RGB").quantize(
                        256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
                    )
                reduced.save(temporary, "PNG", optimize=True, dpi=(SAVED_DPI, SAVED_DPI))
        paths.append(path)
    return paths


@_figure
def sample_grid(
    sets: Mapping[str, Any],
    *,
    caption: str,
    title: str = "",
    groups: Mapping[str, str] | None = None,
    image_titles: Mapping[str, Sequence[str]] | None = None,
    columns: int = 12,
) -> Figure:
    """Images of each set, unsmoothed: a row a set, or a block of rows where there are more than `columns` images.

    sets: name -> uint8 [n, H, W, 3]; groups: name -> "near", "far" or any word; image_titles: name -> n short texts.
    """
    arrays = {name: _array(images) for name, images in sets.items()}
    for name, images in arrays.items():
        _check_images(name, images)
    columns = min(columns, max(map(len, arrays.values())))
    gap = PICTURE_GAP
    cell = min(5.8 / columns / (1 + gap), 1.2)  # inches an image is wide; lengths below are in image widths
    title_height = {name: 0.17 / cell if image_titles and name in image_titles else 0 for name in arrays}
    steps = {
        name: image.shape[1] / image.shape[2] + gap + title_height[name] for name, image in arrays.items()
    }
    blocks = {name: -(-len(images) // columns) * steps[name] for name, images in arrays.items()}
    figure = _new_figure(cell * sum(blocks.values()) + 0.09 * len(blocks) + 0.15, caption, title)
    all_axes = figure.subplots(len(arrays), 1, squeeze=False, height_ratios=list(blocks.values()))[:, 0]
    for axes, (name, images) in zip(all_axes, arrays.items()):
        for index, image in enumerate(images):
            row, column = divmod(index, columns)
            left, bottom = column * (1 + gap), -row * steps[name]
            extent = (left, left + 1, bottom, bottom + image.shape[0] / image.shape[1])
            axes.imshow(image, interpolation="nearest", extent=extent)
            if image_titles and name in image_titles:
                text = image_titles[name][index]
                axes.text(left + 0.5, extent[3] + 0.03, text, ha="center", va="bottom", fontsize=8)
        axes.set(
            xlim=(0, columns * (1 + gap)),
            ylim=(bottom - gap / 2, steps[name] - gap / 2),
            xticks=[],
            yticks=[],
        )
        axes.set_anchor("W")
        axes.spines[:].set_visible(False)
        label = f"{name}\n{groups[name]}" if groups and name in groups else name
        axes.set_ylabel(label, rotation=0, ha="right", va="center", linespacing=1.4)
    return figure


@_figure
def learning_curve(history: pd.DataFrame, *, caption: str, title: str = "") -> Figure:
    """Loss, accuracy and learning rate against the epoch.

    history: columns epoch, learning_rate, train_loss, train_accuracy and, where there was a validation set,
    validation_loss, validation_accuracy; accuracies in percent.
    """
    _require(history, ["epoch", "learning_rate", "train_loss", "train_accuracy"], "training history")
    figure = _new_figure(2.4, caption, title)
    marker = "." if len(history) <= 40 else None
    panels = {"loss": "cross-entropy loss", "accuracy": "accuracy (%)"}
    loss_axes, accuracy_axes, rate_axes = figure.subplots(1, 3)
    for axes, (quantity, label) in zip((loss_axes, accuracy_axes), panels.items()):
        for split, colour, dashes in (("train", ID_COLOUR, "-"), ("validation", COLOURS[0], "--")):
            column = f"{split}_{quantity}"
            if _known(history, column):
                axes.plot(history.epoch, history[column], dashes, marker=marker, color=colour, label=split)
        axes.set_ylabel(label)
        axes.legend()
    rate_axes.plot(history.epoch, history.learning_rate, marker=marker, color="0.3")
    rate_axes.set_ylabel("learning rate")
    for axes in (loss_axes, rate_axes):
        axes.set_ylim(0, 1.06 * max(line.get_ydata().max() for line in axes.lines))
    for axes in (loss_axes, accuracy_axes, rate_axes):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(True)
    return figure


@_figure
def confusion_matrix(
    labels: Any, predictions: Any, class_names: Sequence[str], *, caption: str, title: str = ""
) -> Figure:
    """Confusion matrix in percent of the row (true class); numbers are written up to 20 classes.

    labels, predictions: int [N] in 0 .. C-1; class_names: C names. A class without images is left blank.
    """
    labels, predictions, count = _array(labels), _array(predictions), len(class_names)
    if labels.shape != predictions.shape or labels.ndim != 1:
        raise InputError(
            f"Labels {list(labels.shape)} and predictions {list(predictions.shape)} differ in shape, expected both [N]; "
            "pass one prediction per label."
        )
    if (
        len(labels) == 0
        or not 0 <= min(labels.min(), predictions.min()) <= max(labels.max(), predictions.max()) < count
    ):
        raise InputError(f"Expected labels and predictions in 0..{count - 1}; pass the names of all classes.")
    matrix = np.zeros((count, count))
    np.add.at(matrix, (labels, predictions), 1)
    totals = matrix.sum(axis=1, keepdims=True)
    percent = np.full_like(matrix, np.nan)
    np.divide(100 * matrix, totals, out=percent, where=totals > 0)
    figure = _square_figure(class_names, caption, title)
    axes = figure.subplots()
    # the root makes the rare mistakes visible beside the diagonal
    norm = PowerNorm(0.5, 0, 100)
    image = axes.imshow(
        percent, norm=norm, cmap=_with_grey("cividis"), aspect="auto", interpolation="nearest"
    )
    figure.colorbar(image, ax=axes, label="share of the true class (%)", ticks=[0, 1, 5, 20, 50, 100])
    if count <= 20:
        _write_values(axes, image, percent, "{:.1f}" if count <= 12 else "{:.0f}", skip_zero=True)
    accuracy = 100 * np.mean(labels == predictions)
    axes.set_title(f"accuracy {accuracy:.2f} % of {len(labels):,} images")
    _class_ticks(axes.xaxis, class_names, count, "predicted class")
    _class_ticks(axes.yaxis, class_names, count, "true class")
    return figure


@_figure
def similarity_heatmap(values: Any, class_names: Sequence[str], *, caption: str, title: str = "") -> Figure:
    """Cosine similarity between classes [C, C]; numbers are written up to 12 classes."""
    values = _array(values).astype(float)
    count = len(values)
    figure = _square_figure(class_names, caption, title)
    axes = figure.subplots()
    off_diagonal = values[~np.eye(count, dtype=bool)] if count > 1 else values.ravel()
    limits = {"vmin": off_diagonal.min(), "vmax": off_diagonal.max()}
    image = axes.imshow(values, cmap="cividis", aspect="auto", interpolation="nearest", **limits)
    figure.colorbar(image, ax=axes, label="cosine similarity", extend="max")
    if count <= 12:
        _write_values(axes, image, values, "{:.2f}")
    _class_ticks(axes.xaxis, class_names, count, "class")
    _class_ticks(axes.yaxis, class_names, count, "class")
    return figure


@_figure
def feature_projection(
    id_features: Any,
    ood_features: Mapping[str, Any],
    *,
    caption: str,
    title: str = "",
    id_labels: Any = None,
    class_names: Sequence[str] | None = None,
    groups: Mapping[str, str] | None = None,
    max_points: int = 1500,
) -> Figure:
    """Features on the first two principal components of the ID features: a panel an OOD set, the ID data behind it.

    id_features [n, D]; ood_features: name -> [m, D]; id_labels int [n] add a panel of the ID data by class.
    At most `max_points` a set are drawn and 20,000 fitted, evenly spaced over the set.
    """
    id_features = _array(id_features)
    fitted = id_features[_evenly(len(id_features), 20_000)].astype(np.float64)
    mean = fitted.mean(axis=0)
    variances, vectors = np.linalg.eigh((fitted - mean).T @ (fitted - mean))
    basis = vectors[:, [-1, -2]]
    # the sign of an eigenvector is arbitrary: its largest entry is made positive
    basis *= np.sign(basis[np.abs(basis).argmax(axis=0), [0, 1]])
    explained = 100 * variances[[-1, -2]] / max(variances.sum(), np.finfo(float).tiny)

    def points(features: np.ndarray) -> np.ndarray:
        return (features[_evenly(len(features), max_points)].astype(np.float64) - mean) @ basis

    id_points = points(id_features)
    panels = len(ood_features) + (id_labels is not None)
    figure, all_axes = _panels(panels, caption, title, panel_height=2.0, sharex=True, sharey=True)
    remaining = list(all_axes)
    handles = []
    if id_labels is not None:
        axes = remaining.pop(0)
        labels = _array(id_labels)[_evenly(len(id_features), max_points)]
        classes = np.unique(_array(id_labels))
        palette = [ID_COLOUR, *COLOURS, "#ECE133"]
        by_class = len(classes) <= len(palette)
        colours = [palette[np.searchsorted(classes, label)] for label in labels] if by_class else ID_COLOUR
        axes.scatter(*id_points.T, s=5, c=colours, linewidths=0, rasterized=True)
        axes.set_title("in-distribution, by class" if by_class else "in-distribution")
        if by_class:
            names = [str(label) if class_names is None else class_names[label] for label in classes]
            handles = [_dot(colour, "o", name) for colour, name in zip(palette, names)]
    for axes, (index, name) in zip(remaining, enumerate(ood_features)):
        axes.scatter(*id_points.T, s=5, color="0.75", linewidths=0, rasterized=True)
        look = {"marker": _marker(index), "color": _colour(index), "linewidths": 0, "alpha": 0.5}
        axes.scatter(*points(_array(ood_features[name])).T, s=5, **look, rasterized=True)
        axes.set_title(_set_title(name, groups))
    first, second = (f"{share:.1f} %" for share in explained)
    _label_outer(all_axes, f"component 1 ({first} of variance)", f"component 2 ({second})")
    handles += [_dot("0.75", "o", "in-distribution"), _dot(*_ood_entry(ood_features, "o"))]
    figure.legend(handles=handles, loc="outside lower center", ncols=6 if len(all_axes) > 1 else 3)
    return figure


@_figure
def score_histograms(
    id_scores: Any,
    ood_scores: Mapping[str, Any],
    *,
    threshold: float,
    caption: str,
    title: str = "",
    metrics: Mapping[str, tuple[float, float]] | None = None,
    groups: Mapping[str, str] | None = None,
    label: str = SCORE,
) -> Figure:
    """Scores of the ID test set and of one OOD set a panel, with the threshold that keeps 95 % of the ID images.

    id_scores [n]; ood_scores: name -> [m]; metrics: name -> (FPR95, AUROC) in percent, written above the panel;
    label: what the score is.
    """
    id_scores = _array(id_scores)
    ood_scores = {name: _array(scores) for name, scores in ood_scores.items()}
    bins = _bins([id_scores, *ood_scores.values(), np.array([threshold])], 50)
    figure, all_axes = _panels(len(ood_scores), caption, title, panel_height=1.7, sharex=True, sharey=True)
    for axes, (index, (name, scores)) in zip(all_axes, enumerate(ood_scores.items())):
        _histogram(axes, id_scores, bins, ID_COLOUR)
        _histogram(axes, scores, bins, _colour(index))
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1)
        heading = _set_title(name, groups)
        if metrics and name in metrics:
            heading += "\nFPR95 {:.1f} % · AUROC {:.1f} %".format(*metrics[name])
        axes.set_title(heading)
    _label_outer(all_axes, label.replace(" (", "\n("), "images per bin (%)")
    colour, _, name = _ood_entry(ood_scores)
    handles = [
        Patch(facecolor=ID_COLOUR, alpha=0.5, label="in-distribution"),
        Patch(facecolor=colour, alpha=0.5, label=name),
        Line2D([], [], color="black", linestyle="--", linewidth=1, label="95 % TPR threshold"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@_figure
def roc_curves(id_scores: Any, ood_scores: Mapping[str, Any], *, caption: str, title: str = "") -> Figure:
    """ROC curve of each OOD set (ID positive), with FPR95 marked on the line of 95 % TPR.

    id_scores [n]; ood_scores: name -> [m].
    """
    figure = _new_figure(3.3, caption, title, width=5.9)
    axes = figure.subplots()
    for index, (name, scores) in enumerate(ood_scores.items()):
        fpr, tpr = _roc(_array(id_scores), _array(scores))
        fpr95 = 100 * fpr_at_tpr(_array(id_scores), _array(scores))
        look = {
            "color": _colour(index),
            "marker": _marker(index),
            "markersize": 7,
            "markeredgecolor": "white",
        }
        axes.plot(fpr, tpr, color=_colour(index))
        axes.plot(fpr95, tpr[np.argmax(tpr >= 95)], **look, linestyle="", clip_on=False)
        axes.plot([], [], **look, label=f"{name}, FPR95 {fpr95:.1f} %")
    axes.plot([0, 100], [0, 100], color="0.6", linestyle=":", linewidth=1, label="chance")
    axes.axhline(95, color="black", linestyle="--", linewidth=1, zorder=1, label="TPR 95 %")
    axes.set(xlim=(0, 100), ylim=(0, 100.5))
    axes.set_xlabel("FPR: OOD images accepted as ID (%)")
    axes.set_ylabel("TPR: ID images accepted (%)")
    axes.grid(True)
    figure.legend(loc="outside right center")
    return figure


@_figure
def score_grid(
    scores: Mapping[str, tuple[Any, Mapping[str, Any]]],
    *,
    caption: str,
    title: str = "",
    groups: Mapping[str, str] | None = None,
) -> Figure:
    """Score histograms of many methods: a row a method, a column an OOD set, FPR95 in each panel's corner.

    scores: method -> (ID scores [n], {OOD set -> scores [m]}); every method with the same sets.
    """
    methods, sets = list(scores), list(next(iter(scores.values()))[1])
    figure = _new_figure((0.62 if len(methods) <= 12 else 0.5) * len(methods) + 0.9, caption, title)
    grid = figure.subplots(len(methods), len(sets), squeeze=False, sharex="row", sharey="row")
    for row, method in enumerate(methods):
        id_scores = _array(scores[method][0])
        ood_scores = {name: _array(values) for name, values in scores[method][1].items()}
        bins = _bins([id_scores, *ood_scores.values()], 40)
        for column, name in enumerate(sets):
            axes = grid[row, column]
            _histogram(axes, id_scores, bins, ID_COLOUR)
            _histogram(axes, ood_scores[name], bins, _colour(column))
            fpr95 = f"{100 * fpr_at_tpr(id_scores, ood_scores[name]):.0f} %"
            axes.text(0.02, 0.97, fpr95, transform=axes.transAxes, va="top", fontsize=8)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(2))
            axes.tick_params(labelbottom=column == 0)  # the scale is the same along the row
        grid[row, 0].set_ylim(top=1.6 * grid[row, 0].get_ylim()[1])
        grid[row, 0].set_ylabel(method, rotation=0, ha="right", va="center")
    for axes, name in zip(grid[0], sets):
        axes.set_title(_set_title(name, groups, "\n", letters=14))
    explanation = f"{SCORE} · blue: in-distribution · number: FPR95 (lower is better)"
    figure.supxlabel(explanation, fontsize=9)
    return figure


@_figure
def head_mask(
    head_weight: Any, mask: Any, class_names: Sequence[str] | None = None, *, caption: str, title: str = ""
) -> Figure:
    """The head's weights with the masked ones greyed out (HIM, DICE), and how many classes keep each feature.

    head_weight [C, D]; mask bool [C, D], True = kept, for HIM when that class is predicted. The features are
    ordered by the class that weights them most, then by that weight.
    """
    weight, mask = _array(head_weight).astype(float), _array(mask).astype(bool)
    if weight.shape != mask.shape:
        raise InputError(
            f"Head weight {list(weight.shape)} and mask {list(mask.shape)} differ, expected both [C, D]; "
            "pass one mask row per class."
        )
    order = _feature_order(weight)
    shown = np.where(mask, weight, np.nan)[:, order]
    figure = _new_figure(_class_height(len(weight)) + 2.1, caption, title)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[_class_height(len(weight)), 0.9])
    _class_image(figure, top, shown, class_names, "head weight", _limit(weight))
    kept = 100 * mask.mean()
    top.set_title(f"kept: {kept:.0f} % of the head weights; grey: masked")
    classes = mask.sum(axis=0)[order]
    bottom.fill_between(np.arange(len(classes)), classes, step="mid", color=ID_COLOUR, linewidth=0)
    bottom.set(ylabel="classes\nkeeping it", xlabel="feature, ordered by the class that weights it most")
    bottom.set_ylim(0, len(weight))
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


@_figure
def class_heatmap(
    values: Any, class_names: Sequence[str] | None = None, *, colour_label: str, caption: str, title: str = ""
) -> Figure:
    """A table of values per class and feature: LINe's contributions, class prototypes, head weights.

    values [C, D]. Colours diverge around 0 (one-sided where nothing is negative) and end at the 99.5th
    percentile of |values|. The features are ordered by the class with the largest value, then by that value.
    """
    values = _array(values).astype(float)
    figure = _new_figure(_class_height(len(values)) + 1.0, caption, title)
    axes = figure.subplots()
    shown, one_sided = values[:, _feature_order(values)], bool(values.min() >= 0)
    _class_image(figure, axes, shown, class_names, colour_label, _limit(values), one_sided)
    axes.set_xlabel("feature, ordered by the class with its largest value")
    return figure


@_figure
def logits_before_after(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    caption: str,
    title: str = "",
    groups: Mapping[str, str] | None = None,
) -> Figure:
    """Largest logit and energy (logsumexp of the logits) before and after a method, for the ID and the OOD sets.

    before, after: set name -> logits [N, C], the ID set first. Below each OOD set stands its gap to the ID set,
    (median ID - median OOD) / standard deviation ID, before -> after.
    """
    if list(before) != list(after):
        raise InputError(
            f"Found sets {list(before)} before and {list(after)} after; pass the same sets in the same order."
        )
    names = list(before)
    quantities = {"largest logit": lambda z: z.max(axis=1), "energy score": _logsumexp}
    figure = _new_figure(4.9, caption, title)
    for axes, (label, quantity) in zip(figure.subplots(2, 1), quantities.items()):
        samples = [[quantity(_array(z[name]).astype(float)) for name in names] for z in (before, after)]
        for values, side in zip(samples, ("low", "high")):
            look = {"side": side, "widths": 0.85, "showextrema": False, "points": 120}
            violins = axes.violinplot([_trim(value) for value in values], range(len(names)), **look)
            for index, body in enumerate(violins["bodies"]):
                colour = "0.75" if side == "low" else (ID_COLOUR if index == 0 else _colour(index - 1))
                body.set(facecolor=colour, alpha=1, edgecolor="0.3", linewidth=0.5)
            for position, value in enumerate(values):
                ends = (position - 0.3, position) if side == "low" else (position, position + 0.3)
                axes.hlines(np.median(value), *ends, color="black", linewidth=1.5)
        ticks = [f"{textwrap.fill(names[0], 12)}\n(ID)"]
        for index, name in enumerate(names[1:], start=1):
            gaps = [(np.median(v[0]) - np.median(v[index])) / max(v[0].std(), 1e-12) for v in samples]
            heading = _set_title(name, groups, "\n", letters=12)
            ticks.append(f"{heading}\ngap {gaps[0]:.1f} → {gaps[1]:.1f}")
        axes.set_xticks(range(len(names)), ticks)
        axes.set_ylabel(f"{label}\n(higher = more ID)")
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(True, axis="y")
    handles = [
        Patch(facecolor="0.75", edgecolor="0.3", label="left half: before"),
        Patch(facecolor=COLOURS[0], edgecolor="0.3", label="right half: after"),
        Line2D([], [], color="black", label="median"),
    ]
    axes.set_xlabel("gap: (median ID − median OOD) / standard deviation ID, before → after")
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@_figure
def line_masks(
    activation_mask: Any,
    kept_weight_share: Any,
    class_names: Sequence[str] | None = None,
    *,
    caption: str,
    title: str = "",
) -> Figure:
    """What LINe keeps: the neurons of each class, the neurons two classes share, and the head weights left.

    activation_mask bool [C, D]; kept_weight_share [C, C]: percentage of the weights of logit c (column) kept
    for images predicted as class k (row). Shared neurons: those of the row's class that the column's keeps too;
    the diagonal, 100 %, is left out.
    """
    mask, share = _array(activation_mask).astype(bool), _array(kept_weight_share).astype(float)
    count = len(mask)
    if share.shape != (count, count):
        raise InputError(
            f"Found kept_weight_share {list(share.shape)} for {count} classes, expected [{count}, {count}]."
        )
    first = np.where(mask.any(axis=0), mask.argmax(axis=0), count)
    order = np.lexsort((mask.sum(axis=0), first))
    sizes = mask.sum(axis=1, keepdims=True)
    overlap = np.full((count, count), np.nan)
    np.divide(100.0 * (mask.astype(int) @ mask.T.astype(int)), sizes, out=overlap, where=sizes > 0)
    np.fill_diagonal(overlap, np.nan)

    height = _class_height(count)
    figure = _new_figure(height + 4.4, caption, title)
    rows = [["neurons", "neurons"], ["overlap", "weights"]]
    layout = figure.subplot_mosaic(rows, height_ratios=[height, 2.9])
    axes = layout["neurons"]
    _rows_image(axes, ~mask[:, order], cmap="gray", norm=Normalize(-0.2, 1))
    kept, used = 100 * mask.mean(), 100 * mask.any(axis=0).mean()
    axes.set_title(f"neurons kept (dark): {kept:.0f} % per class, {used:.0f} % by at least one class")
    axes.set_xlabel("neuron, ordered by the first class that keeps it")
    _class_ticks(axes.yaxis, class_names, count, "predicted class")
    panels = {
        "overlap": (
            overlap,
            "neurons shared by two classes",
            "share of the row's neurons (%)",
            "other class",
        ),
        "weights": (share, "head weights kept", "weights kept (%)", "logit"),
    }
    for name, (values, heading, label, column) in panels.items():
        axes = layout[name]
        norm = Normalize(0, max(np.nanmax(values, initial=0), 1))
        look = {"cmap": _with_grey("cividis"), "aspect": "auto", "interpolation": "nearest"}
        image = axes.imshow(values, norm=norm, **look)
        figure.colorbar(image, ax=axes, label=label)
        if count <= 10:
            _write_values(axes, image, values, "{:.0f}")
        axes.set_title(heading)
        _class_ticks(axes.xaxis, class_names, count, column)
        _class_ticks(axes.yaxis, class_names, count, "predicted class" if name == "overlap" else "")
    layout["weights"].tick_params(labelleft=False)
    return figure


@_figure
def results_intervals(results: pd.DataFrame, *, caption: str, title: str = "") -> Figure:
    """The results: FPR95 and AUROC of every method on every OOD set with their 95 % intervals, and the mean.

    results: the long-form table. Methods stand in the order of their mean FPR95, best first. With several
    seeds a point is the mean over seeds, its bar the mean interval, and a tick marks each seed. A method that lacks a
    set has no mean.
    """
    _require_results(results, ["fpr95", "fpr95_lo", "fpr95_hi", "auroc", "auroc_lo", "auroc_hi"])
    sets, methods = ordered_sets(results), _ordered_methods(results)
    several_seeds = results.groupby(["method", "ood_set"]).size().max() > 1
    lanes = len(sets) + 1
    lane = 0.8 / lanes
    height = (0.078 if len(methods) <= 12 else 0.054) * lanes + 0.07
    figure = _new_figure(height * len(methods) + 1.2, caption, title)
    both = figure.subplots(1, 2, sharey=True)
    for axes, metric in zip(both, METRICS):
        _method_rows(axes, methods, _metric_label(metric))
        for row, method in enumerate(methods):
            of_method = results[results.method == method]
            means = []
            for index, (name, group) in enumerate(sets.items()):
                rows = of_method[(of_method.ood_set == name) & of_method[metric].notna()]
                if len(rows) == 0:
                    continue
                value, low, high = (rows[metric + end].mean() for end in ("", "_lo", "_hi"))
                means.append(value)
                y, colour = row - 0.4 + (index + 0.5) * lane, _colour(index)
                look = {"color": colour, "clip_on": False}
                axes.plot([low, high], [y, y], **look, linewidth=1.2, solid_capstyle="butt")
                if several_seeds:
                    axes.plot(rows[metric], np.full(len(rows), y), "|", **look, markersize=4)
                axes.plot(value, y, **_set_marker(index, group), clip_on=False)
            y = row - 0.4 + (lanes - 0.5) * lane
            if len(means) == len(sets):
                axes.plot(np.mean(means), y, "D", color="black", markersize=5, clip_on=False)
        _end_at_best(axes, metric)
    handles = [*_set_handles(sets), _dot("black", "D", "mean of the sets")]
    handles.append(Line2D([], [], color="0.3", linewidth=1.2, label="95 % interval"))
    if several_seeds:
        handles.append(_dot("0.3", "|", "one seed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


@_figure
def results_heatmap(results: pd.DataFrame, metric: str = "fpr95", *, caption: str, title: str = "") -> Figure:
    """One metric, methods x OOD sets, mean over seeds, with the means of the near, the far and all sets; best in bold.

    results: the long-form table. Methods stand in the order of their mean FPR95, best first.
    """
    _require_results(results, [metric], metric)
    sets = ordered_sets(results)
    table = wide_table(results, metric).loc[_ordered_methods(results)]
    if len(set(sets.values())) == 1:
        table = table.drop(columns=f"mean {next(iter(sets.values()))}")
    return _method_table(
        table, sets, _metric_label(metric), metric == "fpr95", "{:.1f}".format, caption, title
    )


@_figure
def ranking(results: pd.DataFrame, metric: str = "fpr95", *, caption: str, title: str = "") -> Figure:
    """Rank of each method on each OOD set (1 = best, ties share their mean rank), mean over seeds of the metric first.

    results: the long-form table. Methods stand in the order of their mean rank; a method that lacks a set has no
    rank there and no mean rank.
    """
    _require_results(results, [metric], metric)
    sets = ordered_sets(results)
    ranks = wide_table(results, metric)[list(sets)].rank(ascending=metric == "fpr95")
    ranks["mean rank"] = ranks.mean(axis=1, skipna=False)
    ranks = ranks.sort_values("mean rank", kind="stable")
    label = f"rank by {METRICS[metric][0]}, 1 = best"
    return _method_table(ranks, sets, label, True, _rank_name, caption, title)


@_figure
def published_comparison(results: pd.DataFrame, *, caption: str, title: str = "") -> Figure:
    """Measured FPR95 and AUROC (with 95 % interval) beside the published ones, method by method and set by set.

    results: the long-form table; only rows with a published value are drawn, and a message when there is none. More
    than 40 pairs of a method and a set are shown as a table of measured - published.
    """
    published = [f"published_{metric}" for metric in METRICS]
    _require_results(results, ["fpr95", "fpr95_lo", "fpr95_hi", "auroc", "auroc_lo", "auroc_hi", *published])
    numeric = results.assign(**{column: pd.to_numeric(results[column]) for column in published})
    known = numeric[numeric[published].notna().any(axis=1)]
    if len(known) == 0:
        message = "No published values for the methods and OOD sets of this experiment."
        return _message_figure(message, caption, title)
    sets, methods = ordered_sets(known), _ordered_methods(known)
    columns = [metric + end for metric in METRICS for end in ("", "_lo", "_hi")] + published
    means = known.groupby(["method", "ood_set"])[columns].mean()
    pairs = [(method, name) for method in methods for name in sets if (method, name) in means.index]
    if len(pairs) > 40:
        return _published_differences(means, sets, methods, caption, title)
    figure = _new_figure(0.17 * len(pairs) + 0.1 * len(methods) + 1.2, caption, title)
    both = figure.subplots(1, 2, sharey=True)
    # half a row between methods
    rows = [index + 0.6 * methods.index(method) for index, (method, _) in enumerate(pairs)]
    for axes, metric in zip(both, METRICS):
        for y, pair in zip(rows, pairs):
            row = means.loc[pair]
            value, reference = row[metric], row[f"published_{metric}"]
            if np.isfinite(reference):
                axes.plot([value, reference], [y, y], color="0.8", linewidth=1, zorder=1, clip_on=False)
                look = {"markerfacecolor": "none", "markeredgecolor": PUBLISHED_COLOUR, "markersize": 6}
                axes.plot(reference, y, "D", **look, zorder=3, clip_on=False)
            interval = [row[f"{metric}_lo"], row[f"{metric}_hi"]]
            axes.plot(interval, [y, y], color=ID_COLOUR, linewidth=2, clip_on=False)
            axes.plot(value, y, "o", color=ID_COLOUR, markersize=4.5, clip_on=False)
        for place, method in enumerate(methods):
            if place % 2 == 0:
                own = [y for y, pair in zip(rows, pairs) if pair[0] == method]
                axes.axhspan(own[0] - 0.8, own[-1] + 0.8, color="0.95", linewidth=0, zorder=0)
        axes.set_xlabel(_metric_label(metric))
        axes.grid(True, axis="x", color="0.85")
        axes.set_ylim(rows[-1] + 0.8, -0.8)
        axes.tick_params(axis="y", length=0, pad=7)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        _end_at_best(axes, metric)
    both[0].set_yticks(rows, [name for _, name in pairs])
    for method in methods:
        own = [y for y, pair in zip(rows, pairs) if pair[0] == method]
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        both[1].annotate(method, (1, np.mean(own)), (7, 0), **place)
    measured = {"color": ID_COLOUR, "marker": "o", "markersize": 4.5, "linewidth": 2}
    handles = [
        Line2D([], [], **measured, label="measured, 95 % interval"),
        _dot(PUBLISHED_COLOUR, "D", "published", markerfacecolor="none"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@_figure
def fpr_conventions(results: pd.DataFrame, *, caption: str, title: str = "") -> Figure:
    """The two quantities that are printed as FPR95, mean over the OOD sets, and the rank of each method by both.

    results: the long-form table with fpr95 (ID positive, as in the papers) and fpr95_ood_positive (OOD positive, as
    in OpenOOD and pytorch-ood), percent. Methods stand in the order of fpr95, best first.
    """
    looks = {
        "fpr95": {"marker": "o", "color": ID_COLOUR, "label": "fpr95: ID positive (the papers)"},
        "fpr95_ood_positive": {
            "marker": "D",
            "color": PUBLISHED_COLOUR,
            "markerfacecolor": "white",
            "label": "fpr95_ood_positive: OOD positive (OpenOOD, pytorch-ood)",
        },
    }
    _require_results(results, list(looks))
    means = pd.DataFrame({name: wide_table(results, name)["mean"] for name in looks})
    means = means.loc[_ordered_methods(results)]
    ranks = means.rank()
    figure = _new_figure(0.21 * len(means) + 1.15, caption, title)
    axes = figure.subplots()
    _method_rows(axes, means.index, "FPR95 (%), lower is better; mean of the OOD sets")
    for row, method in enumerate(means.index):
        _dumbbell(axes, row, means.loc[method], looks.values())
        first, second = map(_rank_name, ranks.loc[method])
        _margin_text(axes, row, first if first == second else f"{first} → {second}")
    _margin_text(axes, -0.75, "rank")
    axes.set_xlim(left=0)
    handles = [Line2D([], [], linestyle="", markersize=5, **look) for look in looks.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@_figure
def tuning_effect(results: pd.DataFrame, *, caption: str, title: str = "") -> Figure:
    """What tuning changes: FPR95 and AUROC from default to tuned, on each OOD set and in the mean.

    results: the rows of `results.tuning_pairs`: long-form with a column tuned (bool), two rows a method and OOD set.
    Methods stand in the order of their tuned mean FPR95, best first.
    """
    _require_results(results, ["auroc", "tuned"])
    results = results.assign(method=results.method.str.removesuffix(tuned_label("")))
    sets, methods = ordered_sets(results), _ordered_methods(results[results.tuned])
    lanes = len(sets) + 1
    figure = _new_figure((0.07 * lanes + 0.08) * len(methods) + 1.2, caption, title)
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), METRICS):
        _method_rows(axes, methods, _metric_label(metric))
        by_set = results.groupby(["method", "ood_set", "tuned"])[metric].mean()
        means = _mean_over_sets(results, ["method", "tuned"], metric)
        for row, method in enumerate(methods):
            pairs = [by_set.reindex([(method, name, tuned) for tuned in (False, True)]) for name in sets]
            pairs.append(means.reindex([(method, False), (method, True)]))
            for lane, pair in enumerate(pairs):
                look, width = {"marker": "o", "color": _colour(lane), "markersize": 3}, 0.8
                if lane == len(sets):
                    look, width = {"marker": "D", "color": "black", "markersize": 4.5}, 1.6
                y = row - 0.4 + 0.8 * (lane + 0.5) / lanes
                looks = [look | {"markerfacecolor": "white"}, look]
                _dumbbell(axes, y, pair, looks, look["color"], width)
        _end_at_best(axes, metric)
    handles = [
        Line2D([], [], color=_colour(index), label=f"{name} ({group})")
        for index, (name, group) in enumerate(sets.items())
    ]
    handles += [
        Line2D([], [], color="black", label="mean of the sets"),
        _dot("0.3", "o", "default", markerfacecolor="white"),
        _dot("0.3", "o", "tuned"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


@_figure
def near_far(results: pd.DataFrame, metric: str = "fpr95", *, caption: str, title: str = "") -> Figure:
    """One metric, the mean over the near against the mean over the far OOD sets: a point a method.

    results: the long-form table; with sets of one group only, a message says so. On the dotted line a method does
    equally well on both.
    """
    _require_results(results, [metric], metric)
    table = wide_table(results, metric)
    if not {"mean near", "mean far"} <= set(table):
        return _message_figure("This experiment has no near or no far OOD sets to compare.", caption, title)
    points = table[["mean far", "mean near"]].dropna()
    figure = _new_figure(4.6, caption, title)
    axes = figure.subplots()
    axes.plot(points["mean far"], points["mean near"], "o", color=ID_COLOUR, markersize=5)
    axes.margins(0.12)
    axes.axline((50, 50), slope=1, color="0.6", linestyle=":", linewidth=1, zorder=1)
    for set_label, group in ((axes.set_xlabel, "far"), (axes.set_ylabel, "near")):
        set_label(f"mean {_metric_label(metric).replace('(%)', f'on the {group} sets (%)')}")
    axes.grid(True)
    _label_points(figure, axes, points.to_numpy(), points.index)
    return figure


@_figure
def method_cost(costs: pd.DataFrame, *, caption: str, title: str = "") -> Figure:
    """Seconds to score 10,000 images and to fit, on a log scale; the passes that a method needs beyond the shared one.

    costs: a row a method, columns method, fit_seconds, seconds_per_10k (beyond the forward pass that all share),
    extra_passes (forward or backward passes an image, included in seconds_per_10k) and forward_seconds_per_10k (that
    forward pass, one number). Methods stand in the order of seconds_per_10k, cheapest first.
    """
    columns = ["method", "fit_seconds", "seconds_per_10k", "extra_passes", "forward_seconds_per_10k"]
    _require(costs, columns, "table of costs")
    costs = costs.sort_values("seconds_per_10k", kind="stable")
    forward = costs.forward_seconds_per_10k.iloc[0]
    figure = _new_figure(0.21 * len(costs) + 1.15, caption, title)
    labels = {"seconds_per_10k": "scoring 10,000 images (s)", "fit_seconds": "fit (s)"}
    for axes, (column, label) in zip(
        figure.subplots(1, 2, sharey=True, width_ratios=[1.6, 1]), labels.items()
    ):
        _method_rows(axes, costs.method.to_list(), f"{label}, log scale,\nlower is better")
        known = [*costs[column][costs[column] > 0], *([forward] if column == "seconds_per_10k" else [])]
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        # bars on a log scale need a common start; the text of extra passes needs room
        low, high = min(known, default=1), max(known, default=1)
        axes.set_xlim(10 ** np.floor(np.log10(low) - 0.1), 8 * high)
        axes.barh(range(len(costs)), costs[column], height=0.6, color=ID_COLOUR)
    scoring = figure.axes[0]
    scoring.axvline(forward, color="black", linestyle="--", linewidth=1)
    for row, (seconds, passes) in enumerate(zip(costs.seconds_per_10k, costs.extra_passes)):
        if passes:
            text = f"+{passes:.0f} pass{'es' if passes > 1 else ''}"
            place = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            scoring.annotate(text, (seconds, row), (3, 0), **place)
    handles = [
        Line2D(
            [], [], color="black", linestyle="--", linewidth=1, label=f"forward pass, shared: {forward:.3g} s"
        ),
        Patch(facecolor=ID_COLOUR, label="beyond it; +n passes: more passes through the network, included"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@_figure
def sweep_curves(
    sweep: pd.DataFrame,
    parameter: str,
    *,
    caption: str,
    title: str = "",
    default: Any = None,
    label: str = "",
    log: bool = False,
    panels: str | None = None,
) -> Figure:
    """FPR95 and AUROC against a hyper-parameter, on each OOD set and in the mean; the default is marked.

    sweep: columns `parameter` (numbers; None = off), ood_set, group, fpr95, auroc in percent; default: the default
    value, None where it is off, or panel -> default value; label: the axis name, `parameter` unless given; panels: a
    column of which each value gets a row of panels.
    """
    _require(
        sweep,
        [parameter, "ood_set", "group", *METRICS, *([panels] if panels else [])],
        f"sweep of {parameter}",
    )
    sweep = _with_off(sweep, [parameter])
    sets = ordered_sets(sweep)
    names = sweep[panels].unique() if panels else [None]
    defaults = default if isinstance(default, Mapping) else dict.fromkeys(names, default)
    marked = {name: value for name, value in defaults.items() if value is not None}
    places = _value_places([*sweep[parameter], *marked.values()], parameter, log)
    if "off" in places:
        marked = dict.fromkeys(names, "off") | marked
    height = 2.3 if len(names) == 1 else 1.5
    figure = _new_figure(height * len(names) + 0.8, caption, title)
    grid = figure.subplots(len(names), 2, squeeze=False, sharex=True, sharey="col")
    for name, row in zip(names, grid):
        rows = sweep if panels is None else sweep[sweep[panels] == name]
        for axes, metric in zip(row, METRICS):
            curves = rows.pivot_table(index=parameter, columns="ood_set", values=metric, sort=False)
            curves = curves.reindex([value for value in places if value in curves.index])
            for index, (ood_set, group) in enumerate(sets.items()):
                if ood_set in curves:
                    look = _set_marker(index, group) | {"linewidth": 1.1}
                    _value_line(axes, places, curves[ood_set], **look)
            if len(sets) > 1:
                look = {"color": "black", "marker": "D", "markersize": 4, "linewidth": 2}
                _value_line(axes, places, curves.mean(axis=1), **look)
            if name in marked:
                axes.axvline(places[marked[name]], color="black", linestyle="--", linewidth=1, zorder=1)
            axes.set_title(name or "")
            axes.set_ylabel(_metric_label(metric).replace(", ", ",\n"))
            axes.grid(True)
    for axes in grid[-1]:
        axes.set_xlabel(label or parameter)
        _value_ticks(axes.xaxis, places, inches=2.5)
    handles = _set_handles(sets)
    if len(sets) > 1:
        handles.append(_dot("black", "D", "mean of the sets"))
    if marked:
        handles.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label="default"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


@_figure
def sweep_heatmap(
    sweep: pd.DataFrame,
    x: str,
    y: str,
    *,
    caption: str,
    title: str = "",
    metric: str = "fpr95",
    default: tuple[Any, Any] | None = None,
    labels: tuple[str, str] | None = None,
) -> Figure:
    """One metric, mean over the OOD sets, over two hyper-parameters; best in bold, the default framed.

    sweep: columns `x`, `y` (numbers; None = off), ood_set and the metric in percent; default: (x, y), None where it is
    off, framed if it was tried; labels: the two axis names, `x` and `y` unless given.
    """
    _check_metric(metric)
    _require(sweep, [x, y, "ood_set", metric], f"sweep of {x} and {y}")
    sweep = _with_off(sweep, [x, y])
    columns, rows = _ordered_values(sweep[x]), _ordered_values(sweep[y])
    means = _mean_over_sets(sweep, [y, x], metric)
    values = np.array([[means.get((row, column), np.nan) for column in columns] for row in rows], dtype=float)
    width = min(WIDTH, 2.3 + 0.55 * len(columns))
    figure = _new_figure(max(0.3 * len(rows) + 0.9, 2.0), caption, title, max(width, 4.0))
    axes = figure.subplots()
    label = f"mean {_metric_label(metric)}"
    _value_cells(
        figure, axes, values, range(len(columns)), "{:.1f}".format, label, metric == "fpr95", best_of=None
    )
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.5, len(rows) - 0.5))
    x_label, y_label = labels or (x, y)
    axes.set_xticks(range(len(columns)), [_value_name(value) for value in columns])
    axes.set_yticks(range(len(rows)), [_value_name(value) for value in rows])
    axes.set(xlabel=x_label, ylabel=y_label)
    framed = default and tuple("off" if value is None else value for value in default)
    if framed and framed[::-1] in means.index:
        corner = (columns.index(framed[0]) - 0.5, rows.index(framed[1]) - 0.5)
        frame = {"facecolor": "none", "edgecolor": PUBLISHED_COLOUR, "linewidth": 2, "clip_on": False}
        axes.add_patch(Rectangle(corner, 1, 1, **frame))
        figure.legend(handles=[Patch(**frame, label="default")], loc="outside lower center")
    return figure


@_figure
def sensitivity(
    sweeps: Mapping[str, pd.DataFrame], *, caption: str, title: str = "", metric: str = "fpr95"
) -> Figure:
    """How much each method depends on its main hyper-parameter: the mean of a metric at every value that was tried.

    sweeps: method -> columns parameter (its name), value (number; None = off), is_default (bool), ood_set and the
    metric in percent. The method that depends most on its hyper-parameter stands on top.
    """
    _check_metric(metric)
    means = {}
    for method, sweep in sweeps.items():
        _require(sweep, ["parameter", "value", "is_default", "ood_set", metric], f"sweep of {method}")
        means[method] = _mean_over_sets(_with_off(sweep, ["value"]), ["value"], metric)
    methods = sorted(means, key=lambda method: -np.ptp(means[method]))
    figure = _new_figure(0.24 * len(methods) + 1.2, caption, title)
    axes = figure.subplots()
    _method_rows(axes, methods, f"mean {_metric_label(metric)}")
    colours = colormaps["viridis_r"]
    for row, method in enumerate(methods):
        tried, sweep = means[method], _with_off(sweeps[method], ["value"])
        axes.plot([tried.min(), tried.max()], [row, row], color="0.7", linewidth=1.5, zorder=1)
        best = tried.min() if metric == "fpr95" else tried.max()
        axes.plot(best, row, "o", markersize=9, markerfacecolor="none", markeredgecolor=PUBLISHED_COLOUR)
        values = _ordered_values(tried.index)
        numbers = [value for value in values if value != "off"]
        for place, value in enumerate(values):
            colour = "white" if value == "off" else colours(place / max(len(numbers) - 1, 1))
            look = {"color": colour, "markersize": 5, "markeredgecolor": "0.4", "markeredgewidth": 0.4}
            axes.plot(tried[value], row, "o", **look)
        for value in set(sweep.value[sweep.is_default]):
            axes.plot(tried[value], row, "|", color="black", markersize=12, markeredgewidth=1.8, zorder=3)
        ends = " … ".join(map(_value_name, [*numbers[:1], *numbers[1:][-1:]]))
        off = ["off"] if "off" in values else []
        _margin_text(axes, row, f"{sweep.parameter.iloc[0]} {', '.join([ends, *off])}")
    handles = [
        _dot(colours(0.0), "o", "lowest"),
        _dot(colours(0.5), "o", "middle"),
        _dot(colours(1.0), "o", "highest value"),
        _dot("white", "o", "off", markeredgecolor="0.4"),
        _dot("black", "|", "default", markersize=11, markeredgewidth=1.8),
        _dot(PUBLISHED_COLOUR, "o", "best value", markerfacecolor="none", markersize=9),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, columnspacing=1.2)
    return figure


@_figure
def sample_size(table: pd.DataFrame, *, caption: str, title: str = "") -> Figure:
    """FPR95 and AUROC against the number of training images a class: mean and range over the draws of them.

    table: columns method, images_per_class, draw, fpr95 and auroc (percent, means over the OOD sets).
    """
    _require(table, ["method", "images_per_class", "draw", *METRICS], "table of sample sizes")
    methods = list(table.method.unique())
    figure = _new_figure(3.0 + 0.17 * -(-len(methods) // 4), caption, title)
    places = _value_places(table.images_per_class, "images_per_class", log=True)
    for axes, metric in zip(figure.subplots(1, 2), METRICS):
        for index, method in enumerate(methods):
            draws = table[table.method == method].groupby("images_per_class")[metric]
            means, x = draws.mean(), [places[size] for size in draws.groups]
            colour = _line_colour(index)
            look = {"color": colour, "marker": _marker(index), "markersize": 4}
            look["linestyle"] = "-" if index <= len(COLOURS) else "--"
            axes.fill_between(x, draws.min(), draws.max(), color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, means, **look, label=method if axes is figure.axes[0] else None)
        axes.set_ylabel(_metric_label(metric).replace(", ", ",\n"))
        axes.set_xlabel("training images a class (log scale)")
        _value_ticks(axes.xaxis, places, inches=2.7)
        axes.grid(True)
    handles = figure.axes[0].get_legend_handles_labels()[0]
    handles.append(Patch(facecolor="0.3", alpha=0.25, linewidth=0, label="range over the draws"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


@_figure
def paired_differences(
    differences: pd.DataFrame, metric: str = "fpr95", *, caption: str, title: str = ""
) -> Figure:
    """Differences in a mean metric between every two methods; grey where the interval contains 0.

    differences: columns method_a, method_b, difference, low, high: metric of a - metric of b in points with its 95 %
    interval. Methods stand in the order of their first appearance, best first; a cell is row - column.
    """
    if len(differences) == 0:
        return _message_figure("There is only one method, and so no difference between two.", caption, title)
    _require(differences, ["method_a", "method_b", "difference", "low", "high"], "table of differences")
    methods = list(pd.unique(differences[["method_a", "method_b"]].to_numpy().ravel()))
    places, count = {method: place for place, method in enumerate(methods)}, len(methods)
    undecided = (differences.low <= 0) & (differences.high >= 0)
    limit = differences.difference[~undecided].abs().max() if not undecided.all() else 1
    colours = colormaps["RdBu_r" if metric == "fpr95" else "RdBu"]  # red where the row is worse
    norm = TwoSlopeNorm(0, -limit, limit)
    names = 0.075 * max(map(len, methods))
    cell = min(0.5, (WIDTH - names - 1.2) / count)
    figure = _new_figure(
        max(cell * count, 2.0) + names + 0.6,
        caption,
        title,
        width=float(np.clip(cell * count + names + 1.3, 4.2, WIDTH)),
    )
    axes = figure.subplots()
    form = "{:z.1f}" if count <= 14 else "{:z.0f}"
    for a, b, difference, grey in zip(
        differences.method_a, differences.method_b, differences.difference, undecided
    ):
        row, column = max(places[a], places[b]), min(places[a], places[b])
        value = difference if row == places[a] else -difference
        look = {"colour": "0.92", "ink": "0.45"} if grey else {"colour": colours(norm(value))}
        _cell(axes, column, row, form.format(value), **look)
    axes.set(xlim=(-0.5, count - 1.5), ylim=(count - 0.5, 0.5))
    axes.set_xticks(range(count - 1), methods[:-1], rotation=90)
    axes.set_yticks(range(1, count), methods[1:])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    sign = "negative" if metric == "fpr95" else "positive"
    label = f"{METRICS[metric][0]}, row − column (points)\n{sign}: the row is better"
    look = {"ticks": MaxNLocator(5), "pad": 0.02, "shrink": 0.7 if count > 8 else 1, "anchor": (0, 1)}
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label=label, **look)
    handle = Patch(facecolor="0.92", label="grey: the 95 % interval of the difference contains 0")
    figure.legend(handles=[handle], loc="outside lower center")
    return figure


@_figure
def rank_intervals(
    ranks: pd.DataFrame,
    *,
    cliques: Sequence[Sequence[str]],
    nemenyi: float | None,
    caption: str,
    title: str = "",
) -> Figure:
    """Mean rank of each method over the OOD sets with its interval; a bar at the right joins what cannot be told apart.

    ranks: columns method, mean_rank, low, high (1 = best); cliques: runs of neighbours of which no two differ;
    nemenyi: the critical difference of the Nemenyi test in ranks, drawn to scale, or None.
    """
    _require(ranks, ["method", "mean_rank", "low", "high"], "table of ranks")
    ranks = ranks.sort_values("mean_rank", kind="stable")
    methods = ranks.method.to_list()
    spans = [sorted(methods.index(method) for method in clique) for clique in cliques if len(clique) > 1]
    bars = _lanes(sorted((span[0], span[-1]) for span in spans))
    figure = _new_figure(0.21 * len(methods) + 1.0, caption, title)
    widths = [1, 0.03 * (1 + max(bars.values(), default=0))]
    axes, joined = figure.subplots(1, 2, sharey=True, width_ratios=widths)
    _method_rows(axes, methods, "mean rank over the OOD sets, 1 = best; bar: 95 % interval")
    for row, (mean, low, high) in enumerate(zip(ranks.mean_rank, ranks.low, ranks.high)):
        axes.plot([low, high], [row, row], color=ID_COLOUR, linewidth=1.5, clip_on=False)
        axes.plot(mean, row, "o", color=ID_COLOUR, markersize=5, clip_on=False)
    for (first, last), lane in bars.items():
        joined.plot([lane, lane], [first - 0.3, last + 0.3], color="0.3", linewidth=3, solid_capstyle="butt")
    joined.set_xlim(-0.5, max(bars.values(), default=0) + 0.5)
    joined.axis("off")
    right = max(len(methods), ranks.high.max(), 1 + (nemenyi or 0))
    axes.set_xlim(0.5, right + 0.5)
    if nemenyi is not None:
        axes.set_ylim(top=-2)
        axes.errorbar(1 + nemenyi / 2, -0.8, xerr=nemenyi / 2, color="black", capsize=3)
        text = f"Nemenyi critical difference {nemenyi:.1f}"
        axes.text(1, -1.1, text, ha="left", va="bottom", fontsize=8)
    handles = [
        Line2D(
            [],
            [],
            color="0.3",
            linewidth=3,
            label="bar at the right: no two of its methods can be told apart",
        )
    ]
    figure.legend(handles=handles, loc="outside lower center")
    return figure


@_figure
def group_layout(
    groups: Groups,
    class_names: Sequence[str] | None = None,
    *,
    caption: str,
    title: str = "",
    example: int = 0,
) -> Figure:
    """The head of a group softmax: a row a group, which is one softmax over "others" and the classes of the group.

    class_names: C names, or None for the numbers of the classes. Framed is what an image of class `example` should be:
    that class in its own group, "others" in all other groups. Up to 12 classes in a group each has a cell; beyond, a
    row is a bar as long as the group has classes. Classes stand in the order of the head's columns.
    """
    _check_class_names(class_names, groups.num_classes)
    names = [
        _class_title(name) for name in (range(groups.num_classes) if class_names is None else class_names)
    ]
    group_names = [textwrap.fill(name, 24) for name in groups.names]
    largest = max(groups.sizes)
    by_name = largest <= 12
    others = 1 if by_name else 0.1 * largest  # wide enough for its name
    inches = (WIDTH - 0.9 - 0.07 * _longest_line(group_names)) / (others + largest)
    upright = by_name and 0.06 * _longest_line(" ".join(names).split()) > inches
    cells = [_short(name, 14 if upright else int(inches / 0.068), 2) for name in names]
    two_lines = by_name and any("\n" in text for text in cells)
    row_height = 0.15 + 0.07 * _longest_line(cells) if upright else 0.26 + 0.13 * two_lines
    figure = _new_figure(row_height * groups.num_groups + 0.9, caption, title)
    axes = figure.subplots()
    hatched = {"facecolor": "0.94", "edgecolor": "0.7", "hatch": "////", "linewidth": 0.5}
    blue = {"facecolor": _pale(ID_COLOUR), "edgecolor": "white"}
    frame = {
        "facecolor": "none",
        "edgecolor": PUBLISHED_COLOUR,
        "linewidth": 2,
        "clip_on": False,
        "zorder": 3,
    }
    text = {"ha": "center", "va": "center", "fontsize": 8}
    for row, members in enumerate(groups.members):
        axes.add_patch(Rectangle((0, row - 0.4), others, 0.8, **hatched))
        plain = {"facecolor": "0.94", "edgecolor": "none", "pad": 1}  # no hatch behind the word
        axes.text(others / 2, row, "others", **text, bbox=plain)
        if by_name:
            for place, label in enumerate(members, start=1):
                axes.add_patch(Rectangle((place, row - 0.4), 1, 0.8, **blue))
                axes.text(place + 0.5, row, cells[label], **text, rotation=90 if upright else 0)
        else:
            axes.add_patch(Rectangle((others, row - 0.4), len(members), 0.8, **blue))
            inside = len(members) > largest / 2
            room = inches * (len(members) if inside else largest - len(members))
            known = [] if class_names is None else [names[label] for label in members]
            start = (others if inside else others + len(members), row)
            place = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(_class_list(len(members), known, room), start, (4, 0), **place)
        left, width = (others + members.index(example), 1) if example in members else (0, others)
        axes.add_patch(Rectangle((left, row - 0.4), width, 0.8, **frame))
        _margin_text(axes, row, f"{len(members)} + 1")
    _margin_text(axes, -0.5 - 0.1 / row_height, "columns")
    axes.set(xlim=(0, others + largest), ylim=(groups.num_groups - 0.5, -0.5), xticks=[])
    axes.set_yticks(range(groups.num_groups), group_names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    total = f"{groups.num_classes:,} classes + {groups.num_groups} × others = {groups.num_logits:,} columns"
    axes.set_xlabel(f"a row is one softmax, its probabilities sum to 1; {total}")
    handles = [
        Patch(**hatched, label="others: a class of another group"),
        Patch(**blue, label="classes of the group"),
        Patch(**frame, label=f"targets of an image of class {names[example]}"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@_figure
def others_probability(table: pd.DataFrame, *, caption: str, title: str = "") -> Figure:
    """Mean probability of "others" in each group, for the ID images of each group and for the OOD sets.

    table: a row a set and group; columns set, kind ("ID" or "OOD"), group, mean in [0, 1] and, to draw the
    inter-quartile range, q25 and q75. The ID sets stand on top. The lowest group of a set is drawn in full colour: an
    ID image is "others" in all groups but one, an OOD image in all of them (MOS, arXiv 2105.01879, section 3).
    """
    _require(table, ["set", "kind", "group", "mean"], 'table of "others" probabilities')
    ordered = table.sort_values("kind", key=lambda kind: kind != "ID", kind="stable")
    sets, groups = list(ordered["set"].unique()), list(table.group.unique())
    lowest = table.groupby("set")["mean"].min()
    inches = (WIDTH - 0.2 - 0.065 * _longest_line(sets)) / len(groups)
    upright = 0.061 * _longest_line(" ".join(groups).split()) > inches
    headings = [
        _short(group, 26) if upright else textwrap.fill(group, int(inches / 0.061)) for group in groups
    ]
    height = 0.061 * _longest_line(headings) if upright else 0.13 * max(text.count("\n") for text in headings)
    figure = _new_figure(0.2 * len(sets) + height + 1.35, caption, title)
    figure.get_layout_engine().set(w_pad=0.05 if inches > 0.4 else 0.02)
    for axes, group, heading in zip(
        figure.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups, headings
    ):
        _method_rows(axes, sets, "")
        for line in ordered[ordered.group == group].to_dict("records"):
            row, mean = sets.index(line["set"]), line["mean"]
            colour = ID_COLOUR if line["kind"] == "ID" else COLOURS[0]
            full = mean == lowest[line["set"]]
            axes.barh(row, mean, height=0.62, color=colour if full else _pale(colour))
            if "q25" in line:
                axes.plot([line["q25"], line["q75"]], [row, row], color="black", linewidth=1, clip_on=False)
        axes.axhline((ordered.drop_duplicates("set").kind == "ID").sum() - 0.5, color="0.4", linewidth=1)
        axes.set_title(heading, rotation=90 * upright, fontsize=8)
        axes.set(xlim=(0, 1))
        axes.set_xticks([0, 1], ["0", "1"] if inches > 0.4 else [])
        for label, side in zip(axes.get_xticklabels(), ("left", "right")):
            label.set_horizontalalignment(side)  # apart from the number of the next panel
    handles = [
        Patch(facecolor=ID_COLOUR, label="in-distribution, expected low in one group"),
        Patch(facecolor=COLOURS[0], label="OOD, expected high in all"),
    ]
    if "q25" in table:
        handles.append(Line2D([], [], color="black", linewidth=1, label="inter-quartile range"))
    explanation = (
        'mean probability of "others" in each group, from 0 to 1; full colour: the lowest group of the set'
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=3, title=explanation)
    return figure


@_figure
def fine_tuning_curves(histories: Mapping[str, pd.DataFrame], *, caption: str, title: str = "") -> Figure:
    """Loss of each head against the step, a panel a head, and the validation accuracy of all of them in the last panel.

    histories: head -> columns step, learning_rate, train_loss and, where there was a validation set, validation_loss,
    validation_accuracy (percent). The loss of a group softmax is a sum over its groups. A drop of the learning rate
    (to less than half) is marked in the middle between the rows before and after it.
    """
    for name, history in histories.items():
        _require(history, ["step", "learning_rate", "train_loss"], f"training history of {name}")
    validated = [name for name, history in histories.items() if _known(history, "validation_accuracy")]
    figure, all_axes = _panels(len(histories) + bool(validated), caption, title, panel_height=1.75)
    for index, (axes, (name, history)) in enumerate(zip(all_axes, histories.items())):
        axes.plot(history.step, history.train_loss, color=_line_colour(index))
        if _known(history, "validation_loss"):
            axes.plot(history.step, history.validation_loss, "--", color=_line_colour(index))
        axes.set_ylim(0, 1.06 * max(line.get_ydata().max() for line in axes.lines))
        for step in _rate_drops(history):
            axes.axvline(step, color="0.5", linestyle=":", linewidth=1, zorder=1)
        axes.set(title=name, ylabel="loss (cross-entropy)")
    for name in validated:
        colour, history = _line_colour(list(histories).index(name)), histories[name]
        all_axes[-1].plot(history.step, history.validation_accuracy, color=colour)
        all_axes[-1].set(title="all heads", ylabel="validation accuracy (%)")
    for axes in all_axes:
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        axes.grid(True)
    handles = [Line2D([], [], color=_line_colour(index), label=name) for index, name in enumerate(histories)]
    handles.append(Line2D([], [], color="0.3", label="training loss"))
    if any(_known(history, "validation_loss") for history in histories.values()):
        handles.append(Line2D([], [], color="0.3", linestyle="--", label="validation loss"))
    if any(map(_rate_drops, histories.values())):
        look = {"color": "0.5", "linestyle": ":", "linewidth": 1}
        handles.append(Line2D([], [], **look, label="learning rate drops"))
    note = "the loss of a group softmax is a sum over its groups: compare shapes, not heights"
    figure.legend(handles=handles, loc="outside lower center", ncols=4, title=note)
    return figure


@_figure
def number_of_groups(table: pd.DataFrame, *, caption: str, title: str = "") -> Figure:
    """FPR95 and AUROC of MOS against the number of groups: the mean of each grouping strategy and its single draws.

    table: columns strategy, groups (their number), draw, fpr95 and auroc (percent, means over the OOD sets). A
    strategy with one number of groups, such as a taxonomy, is a single large marker.
    """
    _require(table, ["strategy", "groups", "draw", *METRICS], "table of numbers of groups")
    figure = _new_figure(2.9, caption, title)
    places = _value_places(table.groups, "groups", log=True)
    several_draws = table.groupby(["strategy", "groups"]).size().max() > 1
    for axes, metric in zip(figure.subplots(1, 2), METRICS):
        for index, (strategy, rows) in enumerate(table.groupby("strategy", sort=False)):
            look = {"color": _line_colour(index), "marker": _marker(index)}
            means = rows.groupby("groups")[metric].mean()
            axes.plot(rows.groups.map(places), rows[metric], **look, linestyle="", markersize=4, alpha=0.3)
            look |= {"markersize": 5} if len(means) > 1 else {"markersize": 8, "linestyle": ""}
            axes.plot([places[number] for number in means.index], means, **look, label=strategy)
        axes.set_ylabel(_metric_label(metric).replace(", ", ",\n"))
        axes.set_xlabel("groups (log scale)")
        _value_ticks(axes.xaxis, places, inches=2.7)
        axes.grid(True)
    handles = figure.axes[0].get_legend_handles_labels()[0]
    if several_draws:
        handles.append(_dot("0.3", "o", "one draw", alpha=0.3, markersize=4))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


@_figure
def fine_tuning_depth(table: pd.DataFrame, *, caption: str, title: str = "") -> Figure:
    """FPR95 on each OOD set against how much of the network is fine-tuned, a panel a method, and the ID accuracy.

    table: columns depth (a label, in order of first appearance), method, ood_set, group, fpr95 and id_accuracy, both in
    percent.
    """
    _require(table, ["depth", "method", "ood_set", "group", "fpr95", "id_accuracy"], "table of depths")
    depths, methods, sets = list(table.depth.unique()), list(table.method.unique()), ordered_sets(table)
    upright = 0.075 * sum(map(len, depths)) > (WIDTH - 1) / (len(methods) + 1)
    figure = _new_figure(3.0 + 0.06 * _longest_line(depths) * upright, caption, title)
    *panels, accuracy_axes = figure.subplots(1, len(methods) + 1)
    for axes, method in zip(panels, methods):
        rows = table[table.method == method]
        curves = rows.pivot_table(index="depth", columns="ood_set", values="fpr95").reindex(depths)
        for index, (name, group) in enumerate(sets.items()):
            if name in curves:
                axes.plot(range(len(depths)), curves[name], **_set_marker(index, group), linewidth=1.1)
        if len(sets) > 1:
            mean = curves.mean(axis=1, skipna=False)
            axes.plot(range(len(depths)), mean, color="black", marker="D", markersize=4, linewidth=2)
        axes.set_title(method)
        axes.sharey(panels[0])
    panels[0].set_ylabel(_metric_label("fpr95").replace(", ", ",\n"))
    accuracy = table.pivot_table(index="depth", columns="method", values="id_accuracy").reindex(depths)
    for index, method in enumerate(methods):
        look = {"color": "0.3", "linestyle": ["-", "--", ":"][index % 3], "marker": ".", "label": method}
        accuracy_axes.plot(range(len(depths)), accuracy[method], **look)
    accuracy_axes.set(title="ID accuracy", ylabel="ID accuracy (%),\nhigher is better")
    accuracy_axes.legend()
    for axes in (*panels, accuracy_axes):
        axes.set_xticks(range(len(depths)), depths, rotation=90 * upright)
        axes.set_xlabel("what is fine-tuned")
        axes.margins(x=0.1)
        axes.grid(True)
    handles = _set_handles(sets)
    if len(sets) > 1:
        handles.append(_dot("black", "D", "mean of the sets"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


@_figure
def pseudo_masks(
    images: Any,
    maps: Any,
    masks: Any,
    *,
    names: Sequence[str],
    caption: str,
    title: str = "",
    predictions: Any = None,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Images, their class activation maps (CAM) and the pseudo masks made of them: a column an image, the first ten.

    images: uint8 [N, H, W, 3]; maps [N, H, W] in [0, 1]; masks: bool [N, H, W], True = foreground; names: the class of
    each image. predictions: int [N, H, W], the classes 0 .. K-1 or K = background that a dense network gives each pixel;
    they need `class_names`, K names that hold those of the images. The background of a mask is faded. Raises InputError
    where shapes differ or a map leaves [0, 1].
    """
    images, maps, masks, names = _array(images), _array(maps), _array(masks), list(names)
    _check_images("the pseudo masks", images)
    _check_shape("The CAMs", maps.shape, images.shape[:3])
    _check_unit("The CAMs", maps)
    _check_shape("The pseudo masks", masks.shape, images.shape[:3])
    _check_shape("The names", (len(names),), images.shape[:1])
    masks = masks.astype(bool)
    grey, heat = images.mean(axis=3, keepdims=True) / 255, colormaps["inferno"](maps)[..., :3]
    rows = {
        "image": images,
        "CAM,\nmin-max\nnormalised": 0.35 * grey + 0.65 * heat,
        "pseudo\nmask": np.where(masks[..., None], images / 255, 0.7 + 0.3 * images / 255),
    }
    kinds = {
        "the image's class": ID_COLOUR,
        "another class": PUBLISHED_COLOUR,
        "background": "0.85",
    }
    if predictions is not None:
        predictions, known = _array(predictions), list(class_names or [])
        _check_shape("The predictions", predictions.shape, images.shape[:3])
        for name in names:
            if name not in known:
                raise InputError(
                    f"Found no {name!r} in class_names, expected the class of every image; {nearest(name, known)}"
                )
        own = np.array([known.index(name) for name in names])[:, None, None]
        kind = np.select([predictions == own, predictions < len(known)], [0, 1], 2)
        rows["dense\nprediction"] = np.array([to_rgb(colour) for colour in kinds.values()])[kind]

    count, height = min(len(images), 10), images.shape[1] / images.shape[2]
    cell = min(5.5 / count / (1 + PICTURE_GAP), 0.9)  # inches an image is wide
    words = [_class_title(name) for name in names[:count]]
    upright = _longest_line(" ".join(words).split()) > cell / 0.065
    words = [_short(word, 16 if upright else int(cell / 0.065), 2) for word in words]
    step, lines = height + PICTURE_GAP, 1 + max(word.count("\n") for word in words)
    inches = cell * step * len(rows) + (0.065 * _longest_line(words) if upright else 0.14 * lines) + 0.15
    width = max(cell * (1 + PICTURE_GAP) * count + 1.5, 4.6)
    figure = _new_figure(inches + 0.25 * (predictions is not None), caption, title, width)
    axes = _picture_axes(figure, count, -step * len(rows))
    bottoms = [-step * (row + 1) + PICTURE_GAP / 2 for row in range(len(rows))]
    for bottom, pictures in zip(bottoms, rows.values()):
        _pictures(axes, pictures[:count], bottom, height)
    for bottom, (column, mask) in itertools.product(bottoms[2:], enumerate(masks[:count])):
        corner = [column * (1 + PICTURE_GAP), bottom + height]
        segments = corner + _outline(mask) * [1, -1] / mask.shape[1]
        axes.add_collection(LineCollection(segments, colors="black", linewidths=1.3, snap=False))
    axes.set_yticks([bottom + height / 2 for bottom in bottoms], list(rows))
    axes.set_xticks(np.arange(count) * (1 + PICTURE_GAP) + 0.5, words, rotation=90 * upright)
    axes.tick_params(labeltop=True, labelbottom=False)
    beside = axes.inset_axes(
        [count * (1 + PICTURE_GAP), bottoms[1], 0.1 / cell, height], transform=axes.transData
    )
    figure.colorbar(ScalarMappable(Normalize(0, 1), "inferno"), cax=beside, ticks=[0, 0.5, 1])
    if predictions is not None:
        handles = [Patch(facecolor=colour, label=kind) for kind, colour in kinds.items()]
        handles.append(Line2D([], [], color="black", label="outline: pseudo mask"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2)
    return figure


@_figure
def dense_overlays(
    sets: Mapping[str, Any],
    foreground: Mapping[str, Any],
    *,
    caption: str,
    title: str = "",
    groups: Mapping[str, str] | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """The first images of each set, and under each one where a dense network sees foreground.

    sets: name -> uint8 [n, H, W, 3], the ID set first; foreground: name -> [n, h, w] in [0, 1], the probability
    1 - p(background) at each position of the image or of a coarser map; labels: name -> n texts to stand above the
    images, such as the predicted class and the background logit. Ten images are drawn, fewer where words of the texts
    are long. Raises InputError where a set has no map for each image or a map leaves [0, 1].
    """
    images = {name: _array(values) for name, values in sets.items()}
    maps = {name: _array(foreground.get(name, np.empty((0, 0, 0)))) for name in sets}
    for name in sets:
        _check_images(name, images[name])
        _check_shape(f"The maps of {name}", maps[name].shape[:1], images[name].shape[:1])
        _check_unit(f"The maps of {name}", maps[name])
    texts = {name: list(labels[name]) for name in sets if labels and name in labels}
    longest = max((len(word) for row in texts.values() for text in row for word in text.split()), default=0)
    letters = min(longest, 14)
    room = 5.0 / (1 + PICTURE_GAP)  # inches for the images side by side
    count = min(max(map(len, images.values())), 10, int(room / (0.065 * letters + 0.01)))
    cell = min(room / count, max(0.55, 0.065 * letters))  # inches an image is wide
    words = {
        name: [_fill_lines(text, int(cell / 0.064)) for text in row[:count]] for name, row in texts.items()
    }
    middles, bottom = [], 0.0
    for name in sets:
        lines = max((1 + text.count("\n") for text in words.get(name, [])), default=0)
        bottom -= images[name].shape[1] / images[name].shape[2] + (0.1 + 0.14 * lines) / cell
        middles.append(bottom - PICTURE_GAP / 2)
        bottom -= images[name].shape[1] / images[name].shape[2] + PICTURE_GAP
    inches = -bottom * cell
    figure = _new_figure(inches + 0.15, caption, title, max(cell * (1 + PICTURE_GAP) * count + 2.0, 4.6))
    axes = _picture_axes(figure, count, bottom)
    for name, middle in zip(sets, middles):
        height = images[name].shape[1] / images[name].shape[2]
        _pictures(axes, images[name][:count], middle + PICTURE_GAP / 2, height)
        _pictures(axes, maps[name][:count], middle - PICTURE_GAP / 2 - height, height, vmin=0, vmax=1)
        look = {"ha": "center", "va": "bottom", "fontsize": 8, "linespacing": 1.1}
        for column, text in enumerate(words.get(name, [])):
            axes.text(column * (1 + PICTURE_GAP) + 0.5, middle + height + PICTURE_GAP, text, **look)
    axes.set_yticks(middles, [_set_title(name, groups, "\n", 12) for name in sets])
    bar = figure.colorbar(axes.images[-1], ax=axes, ticks=[0, 0.5, 1], pad=0.02, shrink=min(1, 2.6 / inches))
    bar.set_label("probability of foreground\n= 1 − p(background)")
    return figure


@_figure
def foreground_share(
    table: pd.DataFrame, class_names: Sequence[str], *, caption: str, title: str = ""
) -> Figure:
    """How much of the images is foreground in their pseudo masks: mean and quartiles of each class, largest first.

    table: a row a class: class (its number), mean, q25 and q75 in percent of the pixels, images and empty (numbers of
    images and of those without foreground). Of more than 40 classes the 15 at either end are drawn.
    """
    _require(table, ["class", "mean", "q25", "q75", "images", "empty"], "table of foreground shares")
    if table["class"].max() >= len(class_names):
        raise InputError(
            f"Found class {table['class'].max()} and {len(class_names)} class names; pass the names of all classes."
        )
    ordered = table[table.images > 0].sort_values("mean", ascending=False, kind="stable")
    if len(ordered) == 0:
        return _message_figure("No class has an image with a pseudo mask.", caption, title)
    rows = ordered.assign(row=np.arange(len(ordered)))
    cut = len(ordered) > 40
    if cut:  # a gap of two rows in the middle
        rows = pd.concat([rows.head(15), rows.tail(15).assign(row=np.arange(17, 32))])
    figure = _new_figure(0.165 * (rows.row.max() + 1) + 1.0, caption, title)
    axes = figure.subplots()
    names = [_short(_class_title(class_names[label]), 28) for label in rows["class"]]
    _method_rows(axes, names, "foreground in a pseudo mask (% of the pixels)")
    axes.set_yticks(rows.row, names)
    axes.set_ylim(rows.row.max() + 0.5, -0.5)
    axes.hlines(rows.row, rows.q25, rows.q75, color=ID_COLOUR, linewidth=1.5, clip_on=False)
    axes.plot(rows["mean"], rows.row, "o", color=ID_COLOUR, markersize=4.5, clip_on=False)
    mean = np.average(ordered["mean"], weights=ordered.images)
    axes.axvline(mean, color="black", linestyle="--", linewidth=1, zorder=1)
    axes.set_xlim(left=0)
    if cut:
        low, high = ordered["mean"].iloc[-16], ordered["mean"].iloc[15]
        text = f"{len(ordered) - 30} more classes, means of {low:.0f} to {high:.0f} %"
        axes.axhspan(14.5, 16.5, color="white", linewidth=0, zorder=1.5)
        axes.text(0.02, 15.5, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    if (rows["empty"] > 0).any():
        for row, count in zip(rows.row, rows["empty"]):
            _margin_text(axes, row, f"{count:,}")
        _margin_text(axes, -1, "empty masks")
    handles = [
        _dot(ID_COLOUR, "o", "mean of the class"),
        Line2D([], [], color=ID_COLOUR, label="quartiles"),
        Line2D([], [], color="black", linestyle="--", linewidth=1, label=f"mean of all images: {mean:.1f} %"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@_figure
def dense_training(
    history: pd.DataFrame, *, caption: str, title: str = "", plain: pd.DataFrame | None = None
) -> Figure:
    """Training of a dense network: its loss, its pixels, and its accuracy once it is an image-level classifier.

    history: columns step, learning_rate, train_loss, train_pixel_accuracy, train_accuracy and, where there was a
    validation set, validation_loss, validation_pixel_accuracy, validation_miou, validation_accuracy; plain: step,
    train_accuracy and validation_accuracy of the plain classifier by the same budget. Accuracies and the mean
    intersection over union (mIoU) in percent.
    """
    needed = ["step", "learning_rate", "train_loss", "train_pixel_accuracy", "train_accuracy"]
    _require(history, needed, "training history of the dense network")
    if plain is not None:
        _require(plain, ["step", "train_accuracy"], "training history of the plain classifier")
    figure = _new_figure(2.65, caption, title)
    panels = {
        "loss": "loss",
        "pixel_accuracy": "accuracy, mIoU (%)" if _known(history, "validation_miou") else "accuracy (%)",
        "accuracy": "accuracy (%)",
    }
    headings = ("loss over the pixels", "pixels, against the masks", "image-level classifier")
    for axes, heading, (quantity, label) in zip(figure.subplots(1, 3), headings, panels.items()):
        curves = [(history, quantity, ID_COLOUR)]
        if quantity == "pixel_accuracy":
            curves.append((history, "miou", COLOURS[1]))
        elif quantity == "accuracy" and plain is not None:
            curves.append((plain, quantity, COLOURS[0]))
        for rows, column, colour in curves:
            marker = "." if len(rows) <= 12 else None
            for split, dashes in (("train", "-"), ("validation", "--")):
                if _known(rows, f"{split}_{column}"):
                    axes.plot(rows.step, rows[f"{split}_{column}"], dashes, color=colour, marker=marker)
        if quantity == "loss":
            axes.set_ylim(0, 1.06 * max(line.get_ydata().max() for line in axes.lines))
        for step in _rate_drops(history):
            axes.axvline(step, color="0.5", linestyle=":", linewidth=1, zorder=1)
        axes.set(title=heading, xlabel="step", ylabel=label)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        axes.grid(True)
    handles = [Line2D([], [], color=ID_COLOUR, label="dense network")]
    if _known(history, "validation_miou"):
        handles.append(Line2D([], [], color=COLOURS[1], label="mIoU of it"))
    if plain is not None:
        handles.append(Line2D([], [], color=COLOURS[0], label="plain classifier"))
    handles.append(Line2D([], [], color="0.3", label="training"))
    if any(line.get_linestyle() == "--" for axes in figure.axes for line in axes.lines):
        handles.append(Line2D([], [], color="0.3", linestyle="--", label="validation"))
    if _rate_drops(history):
        look = {"color": "0.5", "linestyle": ":", "linewidth": 1}
        handles.append(Line2D([], [], **look, label="learning rate drops"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, columnspacing=1.2)
    return figure


@_figure
def score_parts(
    parts: Mapping[str, tuple[Any, Mapping[str, Any]]],
    *,
    caption: str,
    title: str = "",
    groups: Mapping[str, str] | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """The parts of a joint score side by side: ID scores filled, a line an OOD set, and which part separates which set.

    parts: name of the part, such as S_foreground -> (ID scores [n], {OOD set -> scores [m]}), every part with the same
    sets; metrics: part -> {OOD set -> AUROC in percent}, a table under the panels, the best part of each set in bold.
    Drawn are the central 99 % of every set.
    """
    sets = list(next(iter(parts.values()))[1])
    for part, (_, ood_scores) in parts.items():
        if list(ood_scores) != sets:
            raise InputError(
                f"Found OOD sets {list(ood_scores)} in {part}, expected {sets}; pass the same in every part."
            )
    names = [_set_title(name, groups) for name in sets]
    dashes = ["--" if groups and groups.get(name) == "near" else "-" for name in sets]
    rows = 0.19 * len(sets)
    figure = _new_figure(2.85 + (rows + 0.35 if metrics else 0.17 * (len(sets) // 3)), caption, title)
    ratios = [1.8, rows] if metrics else [1]
    grid = figure.subplots(len(ratios), len(parts), squeeze=False, height_ratios=ratios)
    if metrics:
        best = {name: max(round(metrics[part][name], 1) for part in parts) for name in sets}
    for column, (part, (id_scores, ood_scores)) in enumerate(parts.items()):
        axes, id_scores = grid[0, column], _array(id_scores)
        ood_scores = {name: _array(scores) for name, scores in ood_scores.items()}
        bins = _bins([id_scores, *ood_scores.values()], 40)
        _histogram(axes, id_scores, bins, ID_COLOUR)
        for index, scores in enumerate(ood_scores.values()):
            weights = np.full(len(scores), 100 / len(scores))
            look = {"edgecolor": _colour(index), "linestyle": dashes[index], "linewidth": 1.3}
            axes.hist(scores, bins, weights=weights, histtype="step", **look)
        axes.set(title=part, xlabel="score\n(higher = more ID)")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if metrics:
            below = grid[1, column]
            for row, name in enumerate(sets):
                below.plot([0.12, 0.34], [row, row], dashes[row], color=_colour(row), linewidth=2)
                value = round(metrics[part][name], 1)
                weight = "bold" if value == best[name] else "normal"
                below.text(0.6, row, f"{value:.1f}", ha="center", va="center", fontsize=8, fontweight=weight)
            below.set(xlim=(0, 1), ylim=(len(sets) - 0.5, -0.5), xticks=[])
            below.set_yticks(range(len(sets)), names if column == 0 else [""] * len(sets))
            below.tick_params(length=0)
            below.spines[:].set_visible(False)
            below.set_title(_metric_label("auroc").replace(", ", ",\n"), fontsize=8)
    grid[0, 0].set_ylabel("images per bin (%)")
    handles = [Patch(facecolor=ID_COLOUR, alpha=0.5, label="in-distribution")]
    if not metrics:
        handles += [
            Line2D([], [], color=_colour(index), linestyle=dashes[index], label=name)
            for index, name in enumerate(names)
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@_figure
def host_comparison(table: pd.DataFrame, metric: str = "auroc", *, caption: str, title: str = "") -> Figure:
    """A metric of each host alone, of the parts of its joint score and of the whole: a panel an OOD set, a row a host.

    table: columns host, score (such as "host on the backbone", "S_foreground", "S_background", "S" and "S, tuned"),
    ood_set, group, and the metric with its 95 % interval, such as auroc, auroc_lo, auroc_hi, in percent. Hosts and
    scores stand in the order of their first appearance; of several seeds the mean is drawn.
    """
    _check_metric(metric)
    _require(table, ["host", "score", "ood_set", "group", *_with_interval(metric)], "table of hosts")
    looks = {score: _part_look(index, score) for index, score in enumerate(table.score.unique())}
    return _interval_rows(table, "host", "score", looks, metric, caption, title)


@_figure
def background_weight(
    table: pd.DataFrame,
    chosen: Mapping[str, tuple[float, float]] | None = None,
    *,
    caption: str,
    title: str = "",
) -> Figure:
    """AUROC of S = S_foreground + sigma h / T_bg against the signed weight sigma / T_bg of the background: a panel a host.

    table: columns host, ood_set, group, sigma (+1 or -1), temperature (T_bg > 0, inf = the foreground alone) and auroc in
    percent; chosen: host -> (sigma, temperature), marked as is the default (+1, 1). The axis is logarithmic on both
    sides of 0 and linear between the smallest weights.
    """
    _require(table, ["host", "ood_set", "group", "sigma", "temperature", "auroc"], "table of temperatures")
    if not (table.temperature > 0).all():
        raise InputError(
            f"Found temperature {table.temperature.min():g}, expected all above 0; use inf for the foreground alone."
        )
    table = table.assign(weight=table.sigma / table.temperature)
    hosts, sets = list(table.host.unique()), ordered_sets(table)
    figure, all_axes = _panels(len(hosts), caption, title, panel_height=2.0, sharey=True)
    for axes, host in zip(all_axes, hosts):
        curves = table[table.host == host].pivot_table(index="weight", columns="ood_set", values="auroc")
        for index, (name, group) in enumerate(sets.items()):
            if name in curves:
                known = curves[name].dropna()
                look = _set_marker(index, group) | {"linewidth": 1.1, "markersize": 3}
                axes.plot(known.index, known, **look)
        if len(sets) > 1:
            axes.plot(curves.index, curves.mean(axis=1, skipna=False), color="black", linewidth=2)
        axes.axvline(1, color="black", linestyle="--", linewidth=1, zorder=1)
        if chosen and host in chosen:
            sigma, temperature = chosen[host]
            axes.axvline(sigma / temperature, color="0.8", linewidth=5, zorder=0.5)
        axes.axvline(0, color="0.4", linestyle=":", linewidth=1, zorder=1)
        axes.set_title(host)
        axes.grid(True, axis="y")
        sizes = np.abs([*curves.index[curves.index != 0], 1.0])  # each host has weights of its own size
        decades = np.arange(np.ceil(np.log10(sizes.min())), np.floor(np.log10(sizes.max())) + 1)
        labelled = 10.0 ** np.sort(
            decades[:: -max(1, -(-len(decades) // 2))]
        )  # up to two labels on either side, from the outside
        ticks = [*-labelled[::-1], 0, *labelled]
        axes.set_xscale("symlog", linthresh=sizes.min(), linscale=1.5)
        axes.set_xticks(ticks, [f"{tick:g}".replace("-", "−").replace("e−0", "e−") for tick in ticks])
        axes.minorticks_off()
    _label_outer(
        all_axes,
        "← σ = −1 · σ = +1 →\nσ / T_bg (log scale)",
        _metric_label("auroc").replace(", ", ",\n"),
    )
    for axes in all_axes:
        axes.tick_params(labelbottom=True)
    handles = _set_handles(sets)
    if len(sets) > 1:
        handles.append(Line2D([], [], color="black", linewidth=2, label="mean of the sets"))
    handles += [
        Line2D([], [], color="0.4", linestyle=":", linewidth=1, label="0: foreground alone"),
        Line2D([], [], color="black", linestyle="--", linewidth=1, label="default: σ = +1, T_bg = 1"),
    ]
    if chosen:
        handles.append(Line2D([], [], color="0.8", linewidth=5, label="chosen"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if len(all_axes) > 1 else 2)
    return figure


@_figure
def training_stages(table: pd.DataFrame, *, caption: str, title: str = "") -> Figure:
    """Detection along a training: AUROC, FPR95, mean scores, ID accuracy and training loss against the epoch, above each
    other.

    table: columns epoch (0 = before the training), ood_set, group, auroc, fpr95, id_accuracy (percent) and cross_entropy
    (of the training images, in nats; NaN where unknown, and no panel where it always is), id_score and ood_score (means of
    the ID test images and of the set). The best epoch of the mean over the sets is marked, and said with the last one; an
    epoch that lacks a set has no mean.
    """
    scores = ["id_score", "ood_score"]
    columns = ["epoch", "ood_set", "group", *METRICS, *scores, "id_accuracy", "cross_entropy"]
    _require(table, columns, "table of training stages")
    sets = ordered_sets(table)
    below = {"id_accuracy": "ID accuracy\n(%)"}
    if _known(table, "cross_entropy"):
        below["cross_entropy"] = "training cross-\nentropy (log)"
    ratios = [1.55, 1.55, 1.3, *[1.15] * len(below)]
    figure = _new_figure(sum(ratios) + 0.9 + 0.17 * (len(sets) // 4), caption, title)
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    epochs = {epoch: epoch for epoch in table.epoch}
    for axes, metric in zip(panels, ("auroc", "fpr95")):
        mean = _set_curves(axes, table, "epoch", metric, sets, epochs)
        if len(mean):
            best = mean.idxmin() if metric == "fpr95" else mean.idxmax()
            look = {"color": "black", "markeredgecolor": "white", "markersize": 13}
            axes.plot(best, mean[best], "*", **look, zorder=4, clip_on=False)
            name = "mean of the sets" if len(sets) > 1 else next(iter(sets))
            ends = (
                f"{word} {mean[at]:.1f} % (epoch {at:g})"
                for word, at in (("best", best), ("last", mean.index[-1]))
            )
            axes.set_title(f"{name}: {', '.join(ends)}")
        axes.set_ylabel(_metric_label(metric).replace(", ", ",\n"))
        axes.margins(y=0.1)
    _set_curves(panels[2], table, "epoch", "ood_score", sets, epochs)
    of_id = table.groupby("epoch").id_score.mean()
    look = {"color": ID_COLOUR, "marker": "o", "markersize": 4, "linewidth": 2}
    panels[2].plot(of_id.index, of_id, **look, markevery=_every(of_id))
    panels[2].set_ylabel("mean score")
    for axes, (column, label) in zip(panels[3:], below.items()):
        curve = table.groupby("epoch")[column].mean().dropna()
        look = {"color": ID_COLOUR if column == "id_accuracy" else "0.3", "marker": "o", "markersize": 3.5}
        axes.plot(curve.index, curve, **look, markevery=_every(curve))
        axes.set_ylabel(label)
    if "cross_entropy" in below:
        _log_values(panels[-1])
    for axes in panels:
        axes.grid(True)
    panels[-1].set_xlabel("epoch (0 = before the training)")
    panels[-1].xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    figure.align_ylabels(panels)
    handles = [*_sets_and_mean_handles(sets), _dot(ID_COLOUR, "o", "in-distribution")]
    star = {"markeredgecolor": "white", "markersize": 11}
    handles.append(_dot("black", "*", "best epoch" + " of the mean" * (len(sets) > 1), **star))
    _legend_below(figure, handles, 4)
    return figure


@_figure
def loss_constraint(table: pd.DataFrame, *, caption: str, title: str = "") -> Figure:
    """The estimate of the loss constraint u: the loss of the network under random masks, by the weights that they keep.

    table: a row a draw, columns keep_rate (in (0, 1], 1 = no mask), draw, cross_entropy (mean over the training images, in
    nats) and, to mark the keep rate in use, chosen (bool). Drawn are the draws, their mean and their standard deviation
    (of a sample); the axis is logarithmic in the share of the dropped weights.
    """
    _require(table, ["keep_rate", "draw", "cross_entropy"], "table of loss constraints")
    by_rate = table.groupby("keep_rate").cross_entropy.agg(["mean", "std"]).fillna({"std": 0.0})
    dropped = {rate: np.log10(1 - rate) for rate in sorted(by_rate.index, reverse=True) if rate < 1}
    ends = list(dropped.values())
    # no mask has no place on a log axis: it stands before the others
    unmasked = {1.0: ends[0] - max(0.1 * (ends[-1] - ends[0]), 0.1) if ends else 0.0}
    places = (unmasked if 1 in by_rate.index else {}) | dropped
    figure = _new_figure(2.8, caption, title)
    axes = figure.subplots()
    span = np.ptp(list(places.values())) or 1.0
    # beside their mean, which would cover them
    x = table.keep_rate.map(places) - 0.01 * span
    axes.plot(x, table.cross_entropy, "o", color=_pale(ID_COLOUR), markersize=4)
    look = {"color": ID_COLOUR, "markersize": 4, "capsize": 3, "elinewidth": 1.2}
    ordered = by_rate.loc[list(places)]
    for joined in (ordered.index < 1, ordered.index == 1):
        rows = ordered[joined]
        line = [places[rate] for rate in rows.index], rows["mean"]
        axes.errorbar(*line, yerr=rows["std"], fmt="D-", **look, linewidth=1)
    handles = [
        _dot(_pale(ID_COLOUR), "o", "one draw of the mask"),
        _dot(ID_COLOUR, "D", "mean ± standard deviation"),
    ]
    for rate in table.keep_rate[table.chosen].unique() if "chosen" in table else []:
        mean, spread = by_rate.loc[rate]
        axes.axhline(mean, color="black", linestyle="--", linewidth=1, zorder=1)
        axes.plot(places[rate], mean, "D", markersize=10, markerfacecolor="none", markeredgecolor="black")
        u = f"u = {mean:.3f} ± {spread:.3f}" if spread else f"u = {mean:.3f}"
        look = {"color": "black", "linestyle": "--", "linewidth": 1, "marker": "D", "markerfacecolor": "none"}
        handles.append(Line2D([], [], **look, label=f"{u}, keep rate {rate:g}"))
    if 1 in by_rate.index:
        look = {"color": PUBLISHED_COLOUR, "linestyle": ":", "linewidth": 1.2}
        axes.axhline(by_rate["mean"][1], **look, zorder=1)
        handles.append(Line2D([], [], **look, label=f"no mask: {by_rate['mean'][1]:.3f}"))
    axes.set(xlabel="share of the weights that the mask keeps", ylabel="training cross-entropy\n(log scale)")
    margin = 0.06 * span if len(places) > 1 else 0.5
    axes.set_xlim(min(places.values()) - margin, max(places.values()) + margin)
    _value_ticks(axes.xaxis, places, inches=5.3)
    _log_values(axes)
    axes.grid(True)
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@_figure
def unleashing_curves(
    histories: Mapping[str, pd.DataFrame], constraint: float | None = None, *, caption: str, title: str = ""
) -> Figure:
    """Trainings side by side: loss of the ID batches, share of those that ascend, loss of the outliers, ID accuracy.

    histories: label -> columns epoch, train_cross_entropy (of the ID batches, in nats, without a constraint), train_accuracy
    and, where there are any, validation_accuracy, train_ascending (share of the batches whose loss was raised) and
    train_outlier_loss; accuracies and shares in percent. A quantity that no history has gets no panel; constraint: u of
    the loss |beta c - u| + u.
    """
    _check_any("training histories", histories)
    for name, history in histories.items():
        columns = ["epoch", "train_cross_entropy", "train_accuracy"]
        _require(history, columns, f"training history of {name}")
    labels = {
        "train_cross_entropy": "cross-entropy of the\nID batches (log scale)",
        "train_ascending": "ID batches whose\nloss is raised (%)",
        "train_outlier_loss": "loss of the\noutliers",
        "validation_accuracy": "ID accuracy (%),\nhigher is better",
    }
    shown = [
        column
        for column in labels
        if column == "validation_accuracy" or any(_known(history, column) for history in histories.values())
    ]
    figure, all_axes = _panels(len(shown), caption, title, panel_height=1.8)
    for axes, column in zip(all_axes, shown):
        for index, history in enumerate(histories.values()):
            colour, marker = _line_colour(index), _marker(index)
            if column == "validation_accuracy":
                axes.plot(history.epoch, history.train_accuracy, color=_pale(colour), zorder=1)
            if _known(history, column):
                look = {"color": colour, "marker": marker, "markersize": 4, "markevery": _every(history)}
                axes.plot(history.epoch, history[column], **look)
        axes.set(xlabel="epoch", ylabel=labels[column])
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.grid(True)
    losses = all_axes[0]
    handles = [
        Line2D([], [], color=_line_colour(index), marker=_marker(index), markersize=4, label=name)
        for index, name in enumerate(histories)
    ]
    if constraint is not None:
        look = {"color": "black", "linestyle": "--", "linewidth": 1}
        losses.axhline(constraint, **look, zorder=3)
        handles.append(Line2D([], [], **look, label=f"loss constraint u = {constraint:.3g}"))
    _log_values(losses)
    handles.append(Line2D([], [], color=_pale("0.3"), label="pale: accuracy on training images"))
    _legend_below(figure, handles, 3)
    return figure


@_figure
def network_comparison(
    table: pd.DataFrame, metric: str = "auroc", *, caption: str, title: str = ""
) -> Figure:
    """A metric of each detector on networks trained in different ways: a panel an OOD set, a row a detector.

    table: columns detector, network, ood_set, group, and the metric with its 95 % interval, such as auroc, auroc_lo,
    auroc_hi, in percent. Detectors and networks stand in the order of their first appearance, the first network, the one
    before, in grey; of several seeds the mean is drawn.
    """
    _check_metric(metric)
    columns = ["detector", "network", "ood_set", "group", *_with_interval(metric)]
    _require(table, columns, "table of networks")
    colours = ["0.5", *map(_line_colour, range(table.network.nunique() - 1))]
    looks = {
        network: {"color": colour, "marker": _marker(index), "markersize": 4.2}
        for index, (network, colour) in enumerate(zip(table.network.unique(), colours))
    }
    return _interval_rows(table, "detector", "network", looks, metric, caption, title)


@_figure
def recipe_sweep(
    table: pd.DataFrame,
    parameter: str,
    *,
    caption: str,
    title: str = "",
    log: bool = False,
    baselines: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """AUROC, FPR95 and ID accuracy against one number of a training recipe, a training a value.

    table: columns value (numbers; None = off), ood_set, group, id_accuracy, and auroc and fpr95 with their 95 % intervals,
    such as auroc_lo, auroc_hi, in percent; parameter: the axis name; baselines: label -> {"auroc", "fpr95" (means over the
    sets), "id_accuracy"}, each a horizontal line. A value that lacks a set has no mean.
    """
    columns = [column for metric in METRICS for column in _with_interval(metric)]
    _require(table, ["value", "ood_set", "group", *columns, "id_accuracy"], f"sweep of {parameter}")
    table = _with_off(table, ["value"])
    sets, baselines = ordered_sets(table), baselines or {}
    places = _value_places(table.value, parameter, log)
    figure = _new_figure(2.7 + 0.17 * ((len(sets) + len(baselines)) // 4), caption, title)
    figure.get_layout_engine().set(w_pad=0.09)
    *panels, accuracy_axes = all_axes = figure.subplots(1, 3)
    for axes, metric in zip(panels, ("auroc", "fpr95")):
        ends = table.groupby(["ood_set", "value"])[_with_interval(metric)[1:]].mean()
        for index, name in enumerate(sets):
            of_set = ends.loc[name]
            x = [places[value] for value in of_set.index]
            axes.vlines(x, *of_set.to_numpy().T, color=_pale(_colour(index)), linewidth=1.5, zorder=1)
        _set_curves(axes, table, "value", metric, sets, places)
        axes.set_ylabel(_metric_label(metric).replace(", ", ",\n"))
    accuracy = table.groupby("value").id_accuracy.mean().reindex(_ordered_values(table.value))
    _value_line(accuracy_axes, places, accuracy, color=ID_COLOUR, marker="o", markersize=4)
    accuracy_axes.set_ylabel("ID accuracy (%),\nhigher is better")
    handles = _sets_and_mean_handles(sets)
    handles.append(Line2D([], [], color="0.7", linewidth=1.5, label="95 % interval"))
    for index, (label, values) in enumerate(baselines.items()):
        look = {"color": "0.35", "linestyle": ["--", ":", "-."][index % 3], "linewidth": 1.3}
        handles.append(Line2D([], [], **look, label=label))
        for axes, column in zip(all_axes, ("auroc", "fpr95", "id_accuracy")):
            if column in values:
                axes.axhline(values[column], **look, zorder=1)
    for axes in all_axes:
        axes.set_xlabel(textwrap.fill(parameter, 24) + "\n(log scale)" * log)
        _value_ticks(axes.xaxis, places, inches=1.5)
        axes.margins(x=0.08)
        axes.grid(True)
    _legend_below(figure, handles, 4)
    return figure


@_figure
def selected_outliers(
    pool: Any,
    selected: Mapping[str, Any],
    *,
    caption: str,
    title: str = "",
    label: str,
    id_scores: Any = None,
) -> Figure:
    """Which outliers a selection takes from a pool: a panel a strategy, all with the same axes.

    pool: scores [N] of all candidates; selected: strategy -> scores [n] of those it took; id_scores: [m] of ID images, drawn
    as an outline; label: what the score is. Images are counted on a log scale, so that a bin taken as a whole is as
    high as the pool. Drawn are the central 99 % of every sample.
    """
    pool, selected = _array(pool), {name: _array(scores) for name, scores in selected.items()}
    _check_any("strategies", selected)
    samples = {"pool": pool} | {f"selection {name!r}": scores for name, scores in selected.items()}
    if id_scores is not None:
        samples["ID images"] = id_scores = _array(id_scores)
    for name, scores in samples.items():
        _check_any(f"scores of the {name}", scores)
    bins = _bins(list(samples.values()), 50)
    figure, all_axes = _panels(len(selected), caption, title, panel_height=1.8, sharex=True, sharey=True)
    for index, (axes, (name, scores)) in enumerate(zip(all_axes, selected.items())):
        axes.hist(pool, bins, color="0.85")
        axes.hist(scores, bins, color=_colour(index))
        if id_scores is not None:
            axes.hist(id_scores, bins, histtype="step", edgecolor=ID_COLOUR, linewidth=1.3)
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        share = 100 * len(scores) / len(pool)
        axes.set_title(f"{textwrap.fill(name, 26)}\n{len(scores):,} of {len(pool):,} ({share:.3g} %)")
    all_axes[0].set_ylim(bottom=0.7)
    _label_outer(all_axes, textwrap.fill(label, 36), "images per bin\n(log scale)")
    handles = [Patch(facecolor="0.85", label="pool"), Patch(facecolor=_colour(0), label="selected")]
    if len(selected) > 1:
        handles[1] = Patch(facecolor="0.4", label="in colour: selected")
    if id_scores is not None:
        handles.append(Line2D([], [], color=ID_COLOUR, linewidth=1.3, label="in-distribution"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@_figure
def forgetting(
    before: Any, after: Any, *, caption: str, title: str = "", labels: tuple[str, str] = ("before", "after")
) -> Figure:
    """Which training images a network forgets: the probability of the right class before and after, image by image.

    before, after: float [N] in [0, 1], of the same images; labels: what the two networks are called. Colours and the
    histograms at the margins count images on a log scale; an image below the dotted line lost more than half.
    """
    before, after = _array(before).astype(float), _array(after).astype(float)
    if before.ndim != 1 or before.shape != after.shape:
        raise InputError(
            f"Found probabilities {list(before.shape)} before and {list(after.shape)} after, expected both [N]; "
            "pass one of each per image."
        )
    _check_any("probabilities", before)
    for when, values in (("before", before), ("after", after)):
        _check_unit(f"The probabilities {when}", values)
    figure = _new_figure(4.2, caption, title, width=5.2)
    look = {"width_ratios": [1, 0.22], "height_ratios": [0.22, 1]}
    (top, corner), (axes, right) = figure.subplots(2, 2, sharex="col", sharey="row", **look)
    corner.remove()
    bins = np.linspace(0, 1, 41)
    counts, _, _ = np.histogram2d(before, after, bins=[bins, bins])
    norm = LogNorm(1, max(counts.max(), 10))
    image = axes.pcolormesh(bins, bins, np.where(counts.T > 0, counts.T, np.nan), norm=norm, cmap="viridis_r")
    figure.colorbar(image, ax=[axes, right], label="images (log scale)", pad=0.02)
    axes.plot([0, 1], [0, 1], color="black", linewidth=1)
    axes.plot([0, 1], [0, 0.5], color="black", linestyle=":", linewidth=1)
    margins = {"color": ID_COLOUR, "log": True}
    top.hist(before, bins, **margins)
    right.hist(after, bins, **margins, orientation="horizontal")
    top.set_ylabel("images")
    top.tick_params(bottom=False)
    right.set_xlabel("images")
    right.tick_params(left=False)
    for axis in (top.yaxis, right.xaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set(xlim=(0, 1), ylim=(0, 1))
    names = [textwrap.fill(name, 34) for name in labels]
    axes.set_xlabel(f"probability of the right class,\n{names[0]}")
    axes.set_ylabel(f"probability of the right class,\n{names[1]}")
    lost = after < before / 2
    share = f"{100 * lost.mean():.2f} % of {len(lost):,} images lost more"
    handles = [
        Line2D([], [], color="black", linewidth=1, label="as before"),
        Line2D([], [], color="black", linestyle=":", linewidth=1, label=f"lost half; {share}"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


# Building blocks


def _new_figure(height: float, caption: str, title: str, width: float = WIDTH) -> Figure:
    """An empty figure with the title upper left and the caption upper right, in a strip kept free of axes."""
    lines = 2 if title and 0.083 * len(title) + 0.067 * len(caption) > width - 0.3 else 1
    strip = 0.08 + 0.16 * lines
    height += strip
    figure = NotebookFigure(figsize=(width, height), dpi=110, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - strip / height), h_pad=0.05, w_pad=0.05)
    figure.text(0.05 / width, 1 - 0.05 / height, title, ha="left", va="top", fontsize=9.5, fontweight="bold")
    top = 1 - (0.06 + 0.17 * (lines - 1)) / height
    figure.text(1 - 0.05 / width, top, caption, ha="right", va="top", fontsize=8, color="0.4")
    return figure


def _message_figure(message: str, caption: str, title: str) -> Figure:
    """A sentence where there is nothing to draw."""
    figure = _new_figure(1.4, caption, title)
    axes = figure.subplots()
    axes.axis("off")
    axes.text(0.5, 0.5, message, ha="center", va="center", transform=axes.transAxes)
    return figure


def _square_figure(class_names: Sequence[str], caption: str, title: str) -> Figure:
    """An empty figure for a matrix classes x classes with their names at both sides."""
    count = len(class_names)
    side = float(np.clip(0.38 * count, 2.0, 5.0))
    names = 0.075 * max(len(str(name)) for name in class_names) if count <= 25 else 0.2
    return _new_figure(side + names + 0.6, caption, title, width=min(WIDTH, side + names + 1.5))


def _panels(
    count: int, caption: str, title: str, panel_height: float, **sharing: bool
) -> tuple[Figure, list[Axes]]:
    """`count` panels, up to three a row, filled row by row."""
    columns = _columns(count)
    rows = -(-count // columns)
    figure = _new_figure(panel_height * rows + 0.9, caption, title, width=WIDTH if columns > 1 else 4.5)
    grid = figure.subplots(rows, columns, squeeze=False, **sharing).ravel()
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def _columns(count: int) -> int:
    return 2 if count in (2, 4) else min(count, 3)


def _interval_rows(
    table: pd.DataFrame,
    row: str,
    mark: str,
    looks: Mapping[str, Mapping[str, Any]],
    metric: str,
    caption: str,
    title: str,
) -> Figure:
    """A panel an OOD set, a row a value of the column `row`, and in it a lane for each value of the column `mark`.

    looks: value of `mark` -> how its marker looks; of several seeds the mean is drawn.
    """
    rows, sets = list(table[row].unique()), ordered_sets(table)
    means = table.groupby(["ood_set", mark, row])[_with_interval(metric)].mean()
    height = (0.085 * len(looks) + 0.05) * len(rows) + 0.45
    figure, all_axes = _panels(len(sets), caption, title, panel_height=height, sharey=True)
    for index, (axes, (ood_set, group)) in enumerate(zip(all_axes, sets.items())):
        lowest = index + _columns(len(sets)) >= len(sets)
        _method_rows(axes, rows, _metric_label(metric) if lowest else "")
        for (place, name), (lane, marked) in itertools.product(enumerate(rows), enumerate(looks)):
            if (ood_set, marked, name) in means.index:
                value, low, high = means.loc[(ood_set, marked, name)]
                y = place - 0.4 + 0.8 * (lane + 0.5) / len(looks)
                bar = {"color": looks[marked]["color"], "linewidth": 1.2, "solid_capstyle": "butt"}
                axes.plot([low, high], [y, y], **bar, clip_on=False)
                axes.plot(value, y, **looks[marked], clip_on=False)
        axes.set_title(f"{ood_set} ({group})")
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        _end_at_best(axes, metric)
        if metric == "auroc":
            axes.set_xlim(axes.get_xlim())  # chance is marked where it is in view
            axes.axvline(50, color="0.4", linestyle=":", linewidth=1, zorder=1)
    handles = [_dot(look["color"], look["marker"], name, **look) for name, look in looks.items()]
    handles.append(Line2D([], [], color="0.3", linewidth=1.2, label="95 % interval"))
    if metric == "auroc" and any(axes.get_xlim()[0] < 50 for axes in all_axes):
        handles.append(Line2D([], [], color="0.4", linestyle=":", linewidth=1, label="chance"))
    _legend_below(figure, handles, 4 if len(all_axes) > 1 else 2)
    return figure


def _set_curves(
    axes: Axes,
    table: pd.DataFrame,
    column: str,
    metric: str,
    sets: Mapping[str, str],
    places: Mapping[Any, float],
) -> pd.Series:
    """A metric of each OOD set against a column whose values stand at `places`, and their mean in black where there are
    several; returns the mean, without the values that lack a set."""
    curves = table.pivot_table(index=column, columns="ood_set", values=metric, sort=False)
    curves = curves.reindex(_ordered_values(curves.index))
    for index, (name, group) in enumerate(sets.items()):
        if name in curves:
            look = _set_marker(index, group) | {"linewidth": 1.1}
            known = curves[name].dropna()
            _value_line(axes, places, known, **look, markevery=_every(known))
    mean = curves.mean(axis=1, skipna=False).dropna()
    if len(sets) > 1:
        look = {"color": "black", "marker": "D", "markersize": 4, "linewidth": 2, "markevery": _every(mean)}
        _value_line(axes, places, mean, **look)
    return mean


def _every(curve: Any) -> int:
    """Of how many points of a long curve one gets a marker."""
    return max(1, -(-len(curve) // 14))


def _log_values(axes: Axes) -> None:
    """A log scale along y, with at least two numbers at its ticks; call it once everything is drawn."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)))
    for steps in ([1], [1, 3], [1, 2, 5]):
        ticks = [tick for tick in np.outer(decades, steps).ravel() if low <= tick <= high]
        if len(ticks) >= 3:
            break
    else:
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:.6g}" for tick in ticks])
    axes.minorticks_off()


def _label_outer(all_axes: Sequence[Axes], x: str, y: str) -> None:
    """Axis names at the left and below the last row; numbers at the lowest panel of each column."""
    columns, count = _columns(len(all_axes)), len(all_axes)
    for index, axes in enumerate(all_axes):
        axes.tick_params(labelbottom=index + columns >= count)
        if index // columns == (count - 1) // columns:
            axes.set_xlabel(x, fontsize=8)
        if index % columns == 0:
            axes.set_ylabel(y)


def _check_images(name: str, images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) == 0:
        raise InputError(
            f"The images of {name} are {images.dtype} {list(images.shape)}, expected uint8 [n, H, W, 3] with n > 0; "
            "pass raw images."
        )


def _check_shape(what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise InputError(
            f"{what} are {list(found)}, expected {list(expected)}; pass those of the images, in their order."
        )


def _check_unit(what: str, values: np.ndarray) -> None:
    if not (values.min() >= 0 and values.max() <= 1):
        raise InputError(
            f"{what} are between {values.min():.3g} and {values.max():.3g}, expected values in [0, 1]; normalise them."
        )


def _picture_axes(figure: Figure, columns: int, bottom: float) -> Axes:
    """Axes without frame or ticks, for pictures one unit wide from (0, 0) to the right and down to `bottom`."""
    axes = figure.subplots()
    axes.set(xlim=(0, columns * (1 + PICTURE_GAP)), ylim=(bottom, 0), xticks=[], aspect="equal", anchor="W")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_autoscale_on(False)
    return axes


def _pictures(axes: Axes, pictures: Iterable[np.ndarray], bottom: float, height: float, **look: Any) -> None:
    """Images side by side, unsmoothed, each one unit wide."""
    for column, picture in enumerate(pictures):
        left = column * (1 + PICTURE_GAP)
        extent = (left, left + 1, bottom, bottom + height)
        axes.imshow(picture, interpolation="nearest", extent=extent, aspect="equal", **look)


def _outline(mask: np.ndarray) -> np.ndarray:
    """The edges [n, 2, 2] between the pixels of a mask [H, W] and their surroundings, as (x, y) from the upper left corner."""
    padded = np.pad(mask, 1).astype(int)
    y, x = np.nonzero(np.diff(padded, axis=0)[:, 1:-1])
    level = np.stack([np.stack([x, y], 1), np.stack([x + 1, y], 1)], 1)
    y, x = np.nonzero(np.diff(padded, axis=1)[1:-1])
    upright = np.stack([np.stack([x, y], 1), np.stack([x, y + 1], 1)], 1)
    return np.concatenate([level, upright]).astype(float)


def _part_look(index: int, score: str) -> dict[str, Any]:
    """The marker of a part of a joint score, open where it is tuned; other scores by their place."""
    base = score.removesuffix(", tuned")
    colour, marker = PART_LOOKS.get(base, (_line_colour(index), _marker(index)))
    face = colour if base == score else "white"
    return {"color": colour, "marker": marker, "markerfacecolor": face, "markersize": 4.2}


def _array(values: Any) -> np.ndarray:
    """A numpy array of an array or a tensor on any device."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _line_colour(index: int) -> str:
    """The colour of a curve that is not of an OOD set."""
    return [ID_COLOUR, *COLOURS][index % (1 + len(COLOURS))]


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def _set_marker(index: int, group: str) -> dict[str, Any]:
    """Near sets have open markers, far sets filled ones."""
    face = "white" if group == "near" else _colour(index)
    return {
        "marker": _marker(index),
        "color": _colour(index),
        "markerfacecolor": face,
        "markersize": 4.2,
        "markeredgewidth": 1.1,
    }


def _set_handles(sets: Mapping[str, str]) -> list[Line2D]:
    """A legend entry an OOD set, marked by `_set_marker`."""
    return [
        _dot(_colour(index), _marker(index), f"{name} ({group})", **_set_marker(index, group))
        for index, (name, group) in enumerate(sets.items())
    ]


def _dot(colour: str, marker: str, label: str, /, **look: Any) -> Line2D:
    """A legend entry without a line."""
    return Line2D(
        [], [], **{"linestyle": "", "marker": marker, "color": colour, "markersize": 5} | look, label=label
    )


def _legend_below(figure: Figure, handles: Sequence[Any], columns: int) -> None:
    """A legend below the axes, in up to so many columns as their names leave room for."""
    for count in range(columns, 0, -1):
        # matplotlib fills the columns one by one; a letter is 0.06 inches wide, a marker with its spaces 0.53
        parts = np.array_split([len(handle.get_label()) for handle in handles], count)
        if sum(0.53 + 0.06 * part.max(initial=0) for part in parts) <= figure.get_figwidth():
            break
    figure.legend(handles=handles, loc="outside lower center", ncols=count)


def _sets_and_mean_handles(sets: Mapping[str, str]) -> list[Line2D]:
    """The legend of `_set_curves`."""
    mean = [_dot("black", "D", "mean of the sets")] if len(sets) > 1 else []
    return [*_set_handles(sets), *mean]


def _ood_entry(sets: Mapping[str, Any], marker: str = "s") -> tuple[str, str, str]:
    """Colour, marker and words for the OOD sets in a legend: one set by its name, several by their panels."""
    return (_colour(0), marker, next(iter(sets))) if len(sets) == 1 else ("0.3", marker, "other colours: OOD")


def _set_title(name: str, groups: Mapping[str, str] | None, separator: str = " ", letters: int = 100) -> str:
    """Name and group of an OOD set, the name in lines of at most so many letters."""
    lines = textwrap.fill(name, letters)
    return f"{lines}{separator}({groups[name]})" if groups and name in groups else lines


def _evenly(count: int, at_most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int))


def _trim(values: np.ndarray) -> np.ndarray:
    """Without the outermost half percent at each end, which would flatten a violin."""
    cut = len(values) // 200
    kept = np.sort(values)[cut : len(values) - cut]
    # the density of a constant does not exist
    return kept if np.ptp(kept) > 0 else kept + np.linspace(-1e-6, 1e-6, len(kept))


def _bins(samples: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Common bin edges over the central 99 % of every sample."""
    low = min(np.percentile(sample, 0.5) for sample in samples)
    high = max(np.percentile(sample, 99.5) for sample in samples)
    margin = 0.02 * (high - low)
    # no bin beyond the extremes: a softmax probability ends at 1
    low, high = max(low - margin, min(map(np.min, samples))), min(high + margin, max(map(np.max, samples)))
    return np.linspace(low, high, count + 1) if high > low else np.linspace(low - 0.5, low + 0.5, count + 1)


def _histogram(axes: Axes, scores: np.ndarray, bins: np.ndarray, colour: str) -> None:
    weights = np.full(len(scores), 100 / len(scores))
    axes.hist(scores, bins, weights=weights, histtype="stepfilled", facecolor=colour, alpha=0.5)
    axes.hist(scores, bins, weights=weights, histtype="step", edgecolor=colour, linewidth=1)


def _roc(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FPR and TPR in percent at each distinct score from the highest down, from (0, 0)."""
    thresholds = np.unique(np.concatenate([id_scores, ood_scores]))[::-1]
    rates = []
    for scores in (ood_scores, id_scores):
        below = np.searchsorted(np.sort(scores), thresholds, side="left")
        rates.append(np.concatenate([[0.0], 100 * (len(scores) - below) / len(scores)]))
    return rates[0], rates[1]


def _logsumexp(logits: np.ndarray) -> np.ndarray:
    largest = logits.max(axis=1)
    return largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))


def _feature_order(values: np.ndarray) -> np.ndarray:
    """Features by the class with their largest value, within a class by that value, largest first."""
    return np.lexsort((-values.max(axis=0), values.argmax(axis=0)))


def _limit(values: np.ndarray) -> float:
    return float(max(np.nanpercentile(np.abs(values), 99.5), 1e-12))


def _with_grey(name: str) -> Any:
    return colormaps[name].with_extremes(bad="0.7")


def _class_height(count: int) -> float:
    return float(np.clip(0.2 * count, 1.1, 4.0))


def _class_image(
    figure: Figure,
    axes: Axes,
    values: np.ndarray,
    class_names: Sequence[str] | None,
    label: str,
    limit: float,
    one_sided: bool = False,
) -> None:
    """values [C, D] as colours with a colour bar; NaN is grey."""
    norm = Normalize(0, limit) if one_sided else TwoSlopeNorm(0, -limit, limit)
    cmap = _with_grey("viridis" if one_sided else "RdBu_r")
    image = _rows_image(axes, values, cmap=cmap, norm=norm)
    extend = "max" if one_sided else "both"
    figure.colorbar(image, ax=axes, label=label, extend=extend, ticks=MaxNLocator(5), pad=0.02)
    _class_ticks(axes.yaxis, class_names, len(values), "class")


def _rows_image(axes: Axes, values: np.ndarray, **colours: Any) -> Any:
    """values [C, D] as an image; where there are more columns than pixels, their colours are averaged."""
    height, width = values.shape
    look = {"aspect": "auto", "extent": (-0.5, width - 0.5, height - 0.5, -0.5)} | colours
    if width <= 500:
        return axes.imshow(values, interpolation="nearest", **look)
    # the averaging blurs rows as well; on repeated rows that stays invisible
    return axes.imshow(np.repeat(values, -(-400 // height), axis=0), interpolation_stage="rgba", **look)


def _class_ticks(axis: Any, class_names: Sequence[str] | None, count: int, label: str) -> None:
    """Class names up to 25 classes, otherwise some class numbers."""
    _check_class_names(class_names, count)
    axis.set_label_text(f"{label} (number)" if label and count > 25 else label)
    if count > 25:
        axis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        return
    names = [str(name) for name in (class_names if class_names is not None else range(count))]
    axis.set_ticks(range(count), names)
    if axis.axis_name == "x" and max(map(len, names)) > 2:
        axis.set_tick_params(rotation=90)


def _check_class_names(class_names: Sequence[str] | None, count: int) -> None:
    if class_names is not None and len(class_names) != count:
        raise InputError(f"Found {len(class_names)} class names, expected {count}; pass one name per class.")


def _class_title(name: Any) -> str:
    """The first of a class's names, as a word of a figure: "tench, Tinca tinca" -> "tench", "oak_tree" -> "oak tree"."""
    return str(name).split(",")[0].replace("_", " ")


def _class_list(count: int, names: Sequence[str], inches: float) -> str:
    """The number of classes and as many of their names as there is room for."""
    number = "1 class" if count == 1 else f"{count} classes"
    return _short(f"{number}: {', '.join(names)}", int(inches / 0.065)) if names else number


def _short(text: str, letters: int, lines: int = 1) -> str:
    """A text in at most so many lines of about so many letters; what does not fit is left out, no word is broken."""
    whole_words = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, max(letters, 3), max_lines=lines, placeholder=" …", **whole_words)


def _fill_lines(text: str, letters: int) -> str:
    """A text in lines of at most so many letters, its own line breaks kept."""
    return "\n".join(textwrap.fill(line, letters) for line in text.split("\n"))


def _longest_line(texts: Iterable[str]) -> int:
    return max(len(line) for text in texts for line in text.split("\n"))


def _pale(colour: str) -> tuple[float, ...]:
    """A colour mixed with white, which unlike transparency looks alike on any ground."""
    return tuple(0.65 + 0.35 * part for part in to_rgb(colour))


def _known(history: pd.DataFrame, column: str) -> bool:
    return column in history and bool(history[column].notna().any())


def _rate_drops(history: pd.DataFrame) -> list[float]:
    """The steps at which the learning rate falls to less than half, each halfway between the rows around it."""
    dropped = history.learning_rate < 0.5 * history.learning_rate.shift()
    return ((history.step + history.step.shift()) / 2)[dropped].to_list()


def _ink(colour: Any) -> str:
    """Black or white, whichever contrasts more with the colour (WCAG relative luminance)."""
    luminance = np.dot(np.power(to_rgb(colour), 2.2), [0.2126, 0.7152, 0.0722])
    return "black" if luminance > 0.18 else "white"


def _write_values(axes: Axes, image: Any, values: np.ndarray, form: str, skip_zero: bool = False) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value) and not (skip_zero and value == 0):
            colour = _ink(image.cmap(image.norm(value)))
            axes.text(column, row, form.format(value), ha="center", va="center", fontsize=8, color=colour)


def _published_differences(
    means: pd.DataFrame, sets: Mapping[str, str], methods: Sequence[str], caption: str, title: str
) -> Figure:
    """Measured - published FPR95 and AUROC, methods x OOD sets, in points; means: indexed by (method, ood_set)."""
    figure = _new_figure(0.22 * len(methods) + 1.7, caption, title)
    both = figure.subplots(1, 2, sharey=True)
    gaps = {metric: means[metric] - means[f"published_{metric}"] for metric in METRICS}
    limit = max(gap.abs().max() for gap in gaps.values())
    colours, norm = colormaps["RdBu_r"], TwoSlopeNorm(0, -limit, limit)
    for axes, (metric, gap) in zip(both, gaps.items()):
        for (row, method), (column, name) in itertools.product(enumerate(methods), enumerate(sets)):
            value = gap.get((method, name), np.nan)
            known = np.isfinite(value)
            text, colour = (f"{value:+.1f}", colours(norm(value))) if known else ("–", "0.92")
            _cell(axes, column, row, text, colour)
        axes.set(xlim=(-0.5, len(sets) - 0.5), ylim=(len(methods) - 0.5, -0.5))
        axes.set_xticks(range(len(sets)), [textwrap.fill(name, 14) for name in sets], rotation=90)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_title(METRICS[metric][0])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    label = "measured − published\n(points)"
    figure.colorbar(ScalarMappable(norm, colours), ax=both, label=label, ticks=MaxNLocator(5), pad=0.02)
    return figure


def _method_table(
    table: pd.DataFrame,
    sets: Mapping[str, str],
    label: str,
    lower_is_better: bool,
    form: Callable[[float], str],
    caption: str,
    title: str,
) -> Figure:
    """A table methods x OOD sets and their means as coloured cells; the best of each column in bold."""
    values = table.to_numpy(dtype=float)
    # a gap separates the sets from the means
    columns = [column + (0.25 if column >= len(sets) else 0) for column in range(values.shape[1])]
    widest = max(len(word) for name in sets for word in textwrap.wrap(name, 11))
    upright = 0.065 * widest > 4.6 / values.shape[1]  # inches: the names are too wide for so narrow columns
    height = (0.27 if len(table) <= 12 else 0.22) * len(table) + (1.4 if upright else 0.9)
    figure = _new_figure(max(height, 1.9), caption, title, min(WIDTH, 2.7 + 0.75 * values.shape[1]))
    axes = figure.subplots()
    _value_cells(figure, axes, values, columns, form, label, lower_is_better, best_of=0)
    axes.set(xlim=(-0.5, columns[-1] + 0.5), ylim=(len(table) - 0.5, -0.5))
    letters = 18 if upright else 11
    names = [
        _set_title(name, sets, "\n", letters) if name in sets else name.replace(" ", "\n") for name in table
    ]
    axes.set_xticks(columns, names, rotation=90 if upright else 0)
    axes.set_yticks(range(len(table)), table.index)
    axes.tick_params(labeltop=True, labelbottom=False)
    return figure


def _value_cells(
    figure: Figure,
    axes: Axes,
    values: np.ndarray,
    columns: Sequence[float],
    form: Callable[[float], str],
    label: str,
    lower_is_better: bool,
    best_of: int | None,
) -> None:
    """Numbers on their colours with a colour bar: bright is good, bold the best of each column (0) or of all (None)."""
    colours = colormaps["cividis_r" if lower_is_better else "cividis"]
    norm = Normalize(np.nanmin(values), max(np.nanmax(values), np.nanmin(values) + 1))
    rounded = np.round(values, 1)
    best = (np.nanmin if lower_is_better else np.nanmax)(rounded, axis=best_of, keepdims=True)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            bold = (rounded == best)[row, column]
            _cell(axes, columns[column], row, form(value), colours(norm(value)), bold)
        else:
            _cell(axes, columns[column], row, "–", "0.92")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    label = label.replace(", ", ",\n")
    figure.colorbar(
        ScalarMappable(norm, colours),
        ax=axes,
        label=label,
        ticks=MaxNLocator(5, steps=[1, 2, 5, 10]),
        pad=0.02,
    )


def _rank_name(rank: float) -> str:
    return f"{rank:.1f}".removesuffix(".0") if np.isfinite(rank) else "–"


def _cell(
    axes: Axes, x: float, y: float, text: str, colour: Any, bold: bool = False, ink: str | None = None
) -> None:
    """A text on a coloured unit square, in whichever of black and white reads better unless `ink` is given."""
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
    look = {"ha": "center", "va": "center", "fontsize": 8, "fontweight": "bold" if bold else "normal"}
    axes.text(x, y, text, **look, color=ink or _ink(colour))


def _method_rows(axes: Axes, methods: Sequence[str], label: str) -> None:
    """A row a method from the top down, every other one shaded; the quantity `label` along x."""
    for row in range(0, len(methods), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="0.95", linewidth=0, zorder=0)
    axes.set_xlabel(label)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(True, axis="x", color="0.85")
    axes.tick_params(axis="y", length=0, pad=7)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def _end_at_best(axes: Axes, metric: str) -> None:
    """End the x axis at the best possible value; call it once everything is drawn."""
    axes.set_xlim(**({"left": 0} if metric == "fpr95" else {"right": 100}))


def _margin_text(axes: Axes, row: float, text: str) -> None:
    """A text at the right of a row of `_method_rows`."""
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (1, row), (7, 0), **place, fontsize=8, annotation_clip=False)


def _dumbbell(
    axes: Axes,
    y: float,
    ends: Sequence[float],
    looks: Iterable[Mapping[str, Any]],
    colour: str = "0.7",
    width: float = 1.5,
) -> None:
    """Two markers joined by a line."""
    axes.plot(ends, [y, y], color=colour, linewidth=width, zorder=1, clip_on=False)
    for end, look in zip(ends, looks):
        axes.plot(end, y, **{"markersize": 5} | look, clip_on=False)


def _label_points(figure: Figure, axes: Axes, points: np.ndarray, names: Sequence[str]) -> None:
    """Write each name beside its point where it covers no other name or point; a line leads to a name further off."""
    figure.get_layout_engine().execute(figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    pixel = figure.dpi / 72  # pixels a point of type
    centres = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in centres]
    nearest_first = [
        (distance, np.cos(angle), np.sin(angle))
        for distance in range(7, 90, 6)
        for angle in np.arange(0, 2 * np.pi, np.pi / 8)
    ]

    def box_and_cost(index: int, size: np.ndarray, place: tuple[float, float, float]) -> tuple[Bbox, float]:
        distance, cosine, sine = place
        end = centres[index] + distance * pixel * np.array([cosine, sine])
        # the line ends at the left, right or middle of the text, whichever faces the point
        box = Bbox.from_bounds(*(end - size * [0.5 - 0.5 * cosine, 0.5]), *size)
        outside = not (axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max))
        covered = sum(box.overlaps(other) for other in taken)
        to_others = np.linspace(centres[index], end, 9)[:, None] - np.delete(centres, index, axis=0)
        crossed = (np.linalg.norm(to_others, axis=2) < 5).any(axis=0).sum()
        return box, 1000 * outside + 100 * covered + 20 * crossed + distance

    line = {"arrowstyle": "-", "color": "0.4", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
    look = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 8}
    for index, name in enumerate(names):
        measured = axes.text(0, 0, name, fontsize=8)
        size = measured.get_window_extent(renderer).size
        measured.remove()
        costs = [box_and_cost(index, size, place)[1] for place in nearest_first]
        place = nearest_first[int(np.argmin(costs))]
        box, _ = box_and_cost(index, size, place)
        taken.append(box.padded(2))
        offset = ((box.min + box.max) / 2 - centres[index]) / pixel
        axes.annotate(name, points[index], offset, **look, arrowprops=line if place[0] > 7 else None)


def _with_off(sweep: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The hyper-parameters `columns` as Python values, "off" where a value is missing."""
    return sweep.assign(
        **{name: sweep[name].astype(object).where(sweep[name].notna(), "off") for name in columns}
    )


def _ordered_values(values: Iterable[Any]) -> list[Any]:
    """The distinct values, numbers in ascending order, then "off"."""
    return sorted(set(values), key=lambda value: (value == "off", 0 if value == "off" else value))


def _value_name(value: Any) -> str:
    return value if value == "off" else f"{value:g}"


def _value_places(values: Iterable[Any], parameter: str, log: bool) -> dict[Any, float]:
    """Where the distinct values stand on an axis: numbers to scale (their logarithm with `log`), "off" beyond them."""
    ordered = _ordered_values(values)
    numbers = [value for value in ordered if value != "off"]
    if log and numbers and numbers[0] <= 0:
        raise InputError(
            f"Found {parameter} = {numbers[0]:g}, expected values above 0 on a log scale; pass log=False."
        )
    places = {value: float(np.log10(value) if log else value) for value in numbers}
    if "off" in ordered:
        ends = list(places.values()) or [0.0]
        places["off"] = ends[-1] + (0.12 * (ends[-1] - ends[0]) or 1)
    return places


def _value_ticks(axis: Any, places: Mapping[Any, float], inches: float) -> None:
    """A tick at each place of an axis `inches` long, labelled where there is room, from the last one back."""
    span = max(places.values()) - min(places.values()) or 1
    names, free = [], np.inf
    for value, place in reversed(places.items()):
        name, x = _value_name(value), place / span * inches
        half = 0.04 * len(name)
        names.insert(0, name if x + half <= free else "")
        free = x - half - 0.04 if names[0] else free
    axis.set_ticks(list(places.values()), names)


def _value_line(axes: Axes, places: Mapping[Any, float], curve: pd.Series, **look: Any) -> None:
    """A curve over the values of a hyper-parameter; "off" stands apart, as it is no limit of the others."""
    numbers = curve.drop("off", errors="ignore")
    axes.plot([places[value] for value in numbers.index], numbers, **look)
    if "off" in curve:
        axes.plot(places["off"], curve["off"], **look | {"linestyle": ""})


def _lanes(spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """For spans in ascending order the first lane in which each touches no earlier one."""
    lanes, ends = {}, []
    for span in spans:
        lane = next((lane for lane, end in enumerate(ends) if end < span[0]), len(ends))
        ends[lane : lane + 1] = [span[1]]
        lanes[span] = lane
    return lanes


def _metric_label(metric: str) -> str:
    name, direction = METRICS[metric]
    return f"{name} (%), {direction}"


def _with_interval(metric: str) -> list[str]:
    """The columns of a metric and of the ends of its interval."""
    return [metric, f"{metric}_lo", f"{metric}_hi"]


def _mean_over_sets(table: pd.DataFrame, keys: list[str], column: str) -> pd.Series:
    """Mean over the OOD sets of the mean over the seeds, for each value of the keys; NaN where a set is lacking."""
    by_set = table.pivot_table(index=keys, columns="ood_set", values=column, sort=False)
    return by_set.mean(axis=1, skipna=False)


def _ordered_methods(results: pd.DataFrame) -> list[str]:
    """Methods by their mean FPR95 over the sets, best first; those that lack a set last."""
    return wide_table(results, "fpr95")["mean"].sort_values(kind="stable").index.to_list()


def _require(table: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing or len(table) == 0:
        found = f"no column {', '.join(missing)}" if missing else "no rows"
        raise InputError(
            f"The {what} has {found}, expected {', '.join(columns)} in at least one row; run the stage that writes it."
        )


def _check_any(what: str, values: Any) -> None:
    if len(values) == 0:
        raise InputError(f"Found no {what}, expected at least one; run the stage that writes them.")


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise InputError(f"There is no figure of {metric!r}; {nearest(metric, METRICS)}")


def _require_results(results: pd.DataFrame, columns: Sequence[str], metric: str = "fpr95") -> None:
    _check_metric(metric)
    _require(results, ["method", "ood_set", "group", "fpr95", *columns], "results table")
    if "experiment" in results and results.experiment.nunique() > 1:
        names = ", ".join(map(str, results.experiment.unique()))
        raise InputError(
            f"The results mix the experiments {names}, expected one; select the rows of one of them."
        )
