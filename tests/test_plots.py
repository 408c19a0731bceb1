"""The figures: what they show for known input, and that saving them is reproducible."""

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.text import Text
from nbclient import NotebookClient
from PIL import Image

from ood_helpers import plots
from ood_helpers.config import PROJECT_ROOT
from ood_helpers.errors import InputError

CAPTION = "digits · seed 0"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def tick_names(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def clipped(figure: Figure) -> list[str]:
    """What reaches over the edge of the figure by more than a pixel: axes with their labels, legends, texts."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    width, height = figure.bbox.size
    boxes = {
        str(item): item.get_tightbbox(renderer) for item in [*figure.axes, *figure.legends, *figure.texts]
    }
    return [
        name
        for name, box in boxes.items()
        if box is not None and (min(box.x0, box.y0) < -1 or box.x1 > width + 1 or box.y1 > height + 1)
    ]


def results_table(methods, sets, seeds=(0,), published=False) -> pd.DataFrame:
    """FPR95 is 10 for the first method, 20 for the second, ..., + 1 per set, + 1 per seed; AUROC 100 - FPR95 / 2."""
    rows = []
    for place, method in enumerate(methods):
        for index, (name, group) in enumerate(sets.items()):
            for seed in seeds:
                fpr = 10.0 * (place + 1) + index + seed
                row = {
                    "experiment": "digits",
                    "seed": seed,
                    "method": method,
                    "ood_set": name,
                    "group": group,
                }
                row |= {"fpr95": fpr, "fpr95_lo": fpr - 2, "fpr95_hi": fpr + 3}
                row |= {"auroc": 100 - fpr / 2, "auroc_lo": 99 - fpr / 2, "auroc_hi": 101 - fpr / 2}
                row |= {"published_fpr95": np.nan, "published_auroc": np.nan}
                if published and group == "far":
                    row |= {"published_fpr95": fpr + 5, "published_auroc": 90.0}
                rows.append(row)
    return pd.DataFrame(rows)


METHODS = ["LINe", "HIMPLoS", "HIM only", "PLoS only", "DICE", "ReAct", "Energy", "MaxLogit", "MSP"]
SETS = {"SVHN": "far", "CIFAR-100": "near", "Textures": "far", "Tiny ImageNet": "near", "Places365": "far"}


def every_figure(rng, classes: int, sets: dict[str, str], methods: list[str]) -> dict[str, Figure]:
    """Each function once, with this many classes, OOD sets and methods."""
    names = [f"class {index}" for index in range(classes)]
    labels = rng.integers(0, classes, 200)
    weight = rng.normal(size=(classes, 48))
    features = {name: rng.normal(size=(60, 48)) for name in ("ID", *sets)}
    scores = {name: rng.normal(size=100) for name in sets}
    logits = {name: rng.normal(size=(50, classes)) for name in ("ID", *sets)}
    images = {name: rng.integers(0, 256, (14, 8, 8, 3), dtype=np.uint8) for name in ("ID", *sets)}
    id_scores = rng.normal(2, 1, 100)
    history = pd.DataFrame({"epoch": [1, 2], "learning_rate": 0.1, "train_loss": [2, 1.0]})
    history = history.assign(
        train_accuracy=[50, 60.0], validation_loss=[2, 1.5], validation_accuracy=[40, 50.0]
    )
    results = results_table(methods, sets, published=True)
    common = {"caption": CAPTION, "title": "A title"}
    near_far = common | {"groups": sets}
    mask = weight >= np.percentile(weight, 60, axis=1, keepdims=True)
    ood = {name: features[name] for name in sets}
    return {
        "sample_grid": plots.sample_grid(images, **near_far),
        "learning_curve": plots.learning_curve(history, **common),
        "confusion_matrix": plots.confusion_matrix(labels, labels[::-1], names, **common),
        "similarity_heatmap": plots.similarity_heatmap(np.corrcoef(weight), names, **common),
        "feature_projection": plots.feature_projection(
            features["ID"], ood, **near_far, id_labels=labels[:60]
        ),
        "score_histograms": plots.score_histograms(id_scores, scores, threshold=0.5, **near_far),
        "roc_curves": plots.roc_curves(id_scores, scores, **common),
        "score_grid": plots.score_grid(dict.fromkeys(methods[:3], (id_scores, scores)), **near_far),
        "head_mask": plots.head_mask(weight, mask, names, **common),
        "class_heatmap": plots.class_heatmap(weight, names, colour_label="contribution", **common),
        "logits_before_after": plots.logits_before_after(logits, logits, **near_far),
        "line_masks": plots.line_masks(mask, rng.uniform(0, 100, (classes, classes)), names, **common),
        "results_intervals": plots.results_intervals(results, **common),
        "results_heatmap": plots.results_heatmap(results, "auroc", **common),
        "ranking": plots.ranking(results, **common),
        "published_comparison": plots.published_comparison(results, **common),
    }


@pytest.mark.parametrize(
    ("classes", "count", "methods"), [(10, 5, METHODS), (2, 1, ["MSP"]), (100, 2, ["MSP", "LINe"])]
)
def test_every_figure_is_complete_and_readable(rng, classes, count, methods):
    sets = dict(list(SETS.items())[:count])
    with matplotlib.rc_context():
        before = dict(matplotlib.rcParams)
        figures = every_figure(rng, classes, sets, methods)
        assert dict(matplotlib.rcParams) == before
    functions = {
        name
        for name, value in vars(plots).items()
        if hasattr(value, "__wrapped__") and value.__module__ == plots.__name__
    }
    assert set(figures) == functions
    for name, figure in figures.items():
        assert isinstance(figure, Figure)
        assert {CAPTION, "A title"} <= set(texts(figure)), name
        assert figure.get_figwidth() <= 7.0
        small = {
            text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_fontsize() < 8
        }
        assert not small, name
    assert {name: clipped(figure) for name, figure in figures.items() if clipped(figure)} == {}


def test_saving_twice_gives_the_same_bytes(rng, tmp_path):
    for name, figure in every_figure(rng, 3, {"SVHN": "far"}, METHODS[:2]).items():
        first = [path.read_bytes() for path in plots.save_figure(figure, tmp_path / "first", name)]
        second = [path.read_bytes() for path in plots.save_figure(figure, tmp_path / "second", name)]
        assert first == second, name
        assert b"Software" not in first[0] and b"Matplotlib" not in first[1] and b"<dc:date>" not in first[1]
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert len(names) == 2 * 16 and {"ranking.png", "ranking.svg"} <= names  # no temporary file stays
    with Image.open(tmp_path / "first" / "ranking.png") as image:
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1) and image.width == 1050


def test_drawing_again_gives_the_same_bytes(tmp_path):
    results = results_table(METHODS, SETS)
    saved = []
    for folder in ("first", "second"):
        figure = plots.results_intervals(results, caption=CAPTION)
        saved.append([path.read_bytes() for path in plots.save_figure(figure, tmp_path / folder, "figure")])
    assert saved[0] == saved[1]


def test_a_notebook_shows_the_figure_once():
    draw = """
import pandas as pd
from ood_helpers import plots
history = pd.DataFrame({"epoch": [1], "learning_rate": [0.1], "train_loss": [1.0], "train_accuracy": [50.0]})
plots.learning_curve(history, caption="digits")"""
    # as the kernel starts, and after pyplot's own display is set up
    cells = [nbformat.v4.new_code_cell(code) for code in (draw, "%matplotlib inline\n" + draw)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(PROJECT_ROOT)}}
    NotebookClient(notebook, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        outputs = [output for output in cell.outputs if output.output_type != "stream"]
        assert ["image/png" in output.data for output in outputs] == [True]


def test_sample_grid_shows_the_pixels_in_blocks(rng):
    images = {
        "digits": rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8),
        "noise": np.zeros((2, 4, 8, 3), np.uint8),
    }
    titles = {"noise": ["left", "right"]}
    figure = plots.sample_grid(
        images, caption=CAPTION, groups={"noise": "far"}, image_titles=titles, columns=3
    )
    first, second = figure.axes
    assert [len(axes.images) for axes in figure.axes] == [5, 2]
    assert all(image.get_interpolation() == "nearest" for image in first.images)
    np.testing.assert_array_equal(first.images[3].get_array(), images["digits"][3])
    assert (
        first.images[3].get_extent()[3] < first.images[0].get_extent()[2]
    )  # the fourth starts the second row
    assert first.images[3].get_extent()[0] == 0
    assert [first.get_ylabel(), second.get_ylabel()] == ["digits", "noise\nfar"]
    assert [text.get_text() for text in second.texts] == ["left", "right"]
    with pytest.raises(InputError, match=r"noise are float64 \[2, 4, 8, 3\], expected uint8"):
        plots.sample_grid({"noise": np.zeros((2, 4, 8, 3))}, caption=CAPTION)


def test_learning_curve_leaves_out_a_validation_set_that_is_not_there():
    history = pd.DataFrame({"epoch": [1, 2], "learning_rate": [0.1, 0.05], "train_loss": [2.0, 1.0]})
    history = history.assign(
        train_accuracy=[50.0, 60.0], validation_loss=[2.0, 1.5], validation_accuracy=np.nan
    )
    loss, accuracy, rate = plots.learning_curve(history, caption=CAPTION).axes
    assert [line.get_label() for line in loss.lines] == ["train", "validation"]
    assert [line.get_label() for line in accuracy.lines] == ["train"]
    np.testing.assert_array_equal(loss.lines[1].get_ydata(), [2.0, 1.5])
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), [0.1, 0.05])
    with pytest.raises(InputError, match="no column train_loss"):
        plots.learning_curve(history.drop(columns="train_loss"), caption=CAPTION)


def test_confusion_matrix_in_percent_of_the_row():
    labels, predictions = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 1])
    figure = plots.confusion_matrix(labels, predictions, ["cat", "dog", "ant"], caption=CAPTION)
    matrix = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    np.testing.assert_array_equal(matrix, [[75, 25, 0], [0, 100, 0], [np.nan] * 3])
    assert [text.get_text() for text in figure.axes[0].texts] == ["75.0", "25.0", "100.0"]
    assert tick_names(figure.axes[0].yaxis) == ["cat", "dog", "ant"]
    assert figure.axes[0].get_title() == "accuracy 80.00 % of 5 images"
    assert not plots.confusion_matrix([30], [30], [*range(31)], caption=CAPTION).axes[0].texts
    with pytest.raises(InputError, match=r"in 0\.\.1"):
        plots.confusion_matrix([0, 2], [0, 1], ["cat", "dog"], caption=CAPTION)
    with pytest.raises(InputError, match="differ in shape"):
        plots.confusion_matrix([0, 1], [0], ["cat", "dog"], caption=CAPTION)


def test_similarity_heatmap_spreads_its_colours_over_the_different_classes():
    values = torch.tensor([[1.0, 0.2, 0.4], [0.2, 1.0, 0.3], [0.4, 0.3, 1.0]])
    axes, bar = plots.similarity_heatmap(values, ["cat", "dog", "ant"], caption=CAPTION).axes
    np.testing.assert_allclose(axes.images[0].get_clim(), (0.2, 0.4))
    assert [text.get_text() for text in axes.texts][:3] == ["1.00", "0.20", "0.40"]
    assert bar.get_ylabel() == "cosine similarity"


def test_feature_projection_is_the_pca_of_the_id_features(rng):
    id_features = rng.normal(size=(300, 3)) * [1, 5, 3] + 7
    ood = {"SVHN": torch.tensor([[7.0, 7.0, 7.0], [7.0, 17.0, 7.0]])}
    figure = plots.feature_projection(id_features, ood, caption=CAPTION, id_labels=np.arange(300) % 2)
    by_class, panel = figure.axes
    centred = id_features - id_features.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(centred.T))
    shown = panel.collections[0].get_offsets()
    np.testing.assert_allclose(np.abs(shown), np.abs(centred @ vectors[:, [2, 1]]), atol=1e-9)
    assert f"({100 * values[2] / values.sum():.1f} % of variance)" in panel.get_xlabel()
    step = np.diff(panel.collections[1].get_offsets(), axis=0)[0]
    assert step[0] == pytest.approx(10 * np.abs(vectors[1, 2])) and panel.get_title() == "SVHN"
    assert len(np.unique(by_class.collections[0].get_facecolors(), axis=0)) == 2
    fewer = plots.feature_projection(id_features, ood, caption=CAPTION, max_points=50).axes
    assert len(fewer) == 1 and len(fewer[0].collections[0].get_offsets()) == 50


def test_score_histograms_share_bins_and_mark_the_threshold():
    ood = {"SVHN": np.zeros(10), "noise": np.linspace(0, 1, 10)}
    metrics = {"SVHN": (12.34, 98.76)}
    figure = plots.score_histograms(
        torch.linspace(1, 2, 100),
        ood,
        threshold=1.05,
        caption=CAPTION,
        metrics=metrics,
        groups={"SVHN": "far"},
    )
    left, right = figure.axes
    assert left.get_title() == "SVHN (far)\nFPR95 12.3 % · AUROC 98.8 %" and right.get_title() == "noise"
    assert left.lines[0].get_xdata() == [1.05, 1.05]
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    assert "higher = more in-distribution" in left.get_xlabel()
    # all OOD images in the first bin: 100 %
    assert max(vertex[1] for vertex in left.patches[2].get_xy()) == pytest.approx(100)


def test_roc_curves_pass_through_the_known_points():
    figure = plots.roc_curves(np.arange(1, 21), {"SVHN": np.arange(0.5, 10)}, caption=CAPTION)
    axes = figure.axes[0]
    points = set(zip(*(axes.lines[0].get_data())))
    assert {(0.0, 0.0), (0.0, 55.0), (80.0, 95.0), (100.0, 100.0)} <= points
    assert [float(value[0]) for value in axes.lines[1].get_data()] == [80.0, 95.0]
    assert "SVHN, FPR95 80.0 %" in texts(figure)


def test_score_grid_has_a_row_a_method_and_a_column_a_set(rng):
    ood = {"SVHN": np.full(50, -9.0), "noise": np.full(50, 9.0)}
    scores = {"MSP": (rng.normal(size=100), ood), "LINe": (1000 + rng.normal(size=100), ood)}
    figure = plots.score_grid(scores, caption=CAPTION)
    assert len(figure.axes) == 4
    assert [figure.axes[0].get_ylabel(), figure.axes[2].get_ylabel()] == ["MSP", "LINe"]
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["0 %", "100 %", "0 %", "0 %"]


def test_head_mask_greys_what_is_masked():
    weight = np.array([[0.9, 0.1, 0.5, -0.4], [0.2, 0.8, -0.3, 0.6]])
    mask = np.array([[True, False, True, False], [True, True, False, False]])
    figure = plots.head_mask(torch.tensor(weight), torch.tensor(mask), ["cat", "dog"], caption=CAPTION)
    shown = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    # features 0 and 2 belong to class 0, features 1 and 3 to class 1
    np.testing.assert_array_equal(shown, [[0.9, 0.5, np.nan, np.nan], [0.2, np.nan, 0.8, np.nan]])
    image = figure.axes[0].images[0]
    assert same_color(image.cmap(np.ma.masked_invalid([np.nan]))[0], "0.7")
    assert image.norm.vmin == -image.norm.vmax
    counts = figure.axes[1].collections[0].get_paths()[0].vertices[:, 1]
    assert counts.max() == 2 and "50 % of the head weights" in figure.axes[0].get_title()
    with pytest.raises(InputError, match=r"\[2, 4\] and mask \[2, 3\] differ"):
        plots.head_mask(weight, mask[:, :3], caption=CAPTION)
    with pytest.raises(InputError, match="Found 1 class names, expected 2"):
        plots.head_mask(weight, mask, ["cat"], caption=CAPTION)


def test_class_heatmap_limits_are_robust_and_centred(rng):
    values = rng.uniform(-1, 1, (4, 700))
    values[2, 3] = 1e6
    figure = plots.class_heatmap(values, colour_label="contribution", caption=CAPTION)
    image = figure.axes[0].images[0]
    assert image.norm.vmax == pytest.approx(1, abs=0.02) and image.norm.vmin == -image.norm.vmax
    assert figure.axes[1].get_ylabel() == "contribution"
    order = np.lexsort((-values.max(axis=0), values.argmax(axis=0)))
    np.testing.assert_array_equal(
        image.get_array()[::100], values[:, order]
    )  # rows are repeated to stay sharp
    positive = plots.class_heatmap(np.abs(values), colour_label="mean feature", caption=CAPTION)
    assert positive.axes[0].images[0].norm.vmin == 0


def test_logits_before_after_states_the_gap():
    before = {
        "CIFAR-10": np.array([[1.0, -50.0], [3.0, -50.0]]),
        "SVHN": np.array([[0.0, -50.0], [0.0, -50.0]]),
    }
    after = {name: torch.tensor(2 * logits) for name, logits in before.items()}
    after["SVHN"] = torch.full((2, 2), -2.0)
    figure = plots.logits_before_after(before, after, caption=CAPTION, groups={"SVHN": "far"})
    largest, energy = figure.axes
    # before: (2 - 0) / 1; after: (4 - -2) / 2, and log 2 less for the energy
    assert tick_names(largest.xaxis) == ["CIFAR-10\n(ID)", "SVHN\n(far)\ngap 2.0 → 3.0"]
    assert tick_names(energy.xaxis)[1] == "SVHN\n(far)\ngap 2.0 → 2.7"
    assert len(largest.findobj(PolyCollection)) == 4
    with pytest.raises(InputError, match="pass the same sets in the same order"):
        plots.logits_before_after(before, {"SVHN": after["SVHN"]}, caption=CAPTION)


def test_line_masks_count_the_shared_neurons():
    mask = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=bool)
    share = np.array([[30.0, 5.0], [10.0, 40.0]])
    figure = plots.line_masks(mask, share, ["cat", "dog"], caption=CAPTION)
    neurons, overlap, weights = figure.axes[:3]
    np.testing.assert_array_equal(
        np.ma.filled(overlap.images[0].get_array(), np.nan), [[np.nan, 50], [25, np.nan]]
    )
    np.testing.assert_array_equal(weights.images[0].get_array(), share)
    assert "60 % per class, 100 % by at least one class" in neurons.get_title()
    assert (~neurons.images[0].get_array()).sum() == mask.sum()
    with pytest.raises(InputError, match=r"Found kept_weight_share \[1, 2\] for 2 classes"):
        plots.line_masks(mask, share[:1], caption=CAPTION)


def test_results_intervals_plot_values_bars_and_means():
    results = results_table(["MSP", "LINe"], {"SVHN": "far", "CIFAR-100": "near"}, seeds=(0, 2))
    results.loc[results.method == "LINe", ["fpr95", "fpr95_lo", "fpr95_hi"]] -= 15  # LINe becomes the best
    figure = plots.results_intervals(results, caption=CAPTION)
    fpr, auroc = figure.axes
    assert tick_names(fpr.yaxis) == ["LINe", "MSP"] and fpr.yaxis_inverted()
    assert (
        fpr.get_xlabel() == "FPR95 (%), lower is better"
        and auroc.get_xlabel() == "AUROC (%), higher is better"
    )
    markers = [
        (line.get_marker(), *map(float, line.get_xdata())) for line in fpr.lines if len(line.get_xdata()) == 1
    ]
    # near first, mean over the seeds, then the mean of the sets in black
    assert markers == [("o", 7.0), ("s", 6.0), ("D", 6.5), ("o", 12.0), ("s", 11.0), ("D", 11.5)]
    bars = [tuple(line.get_xdata()) for line in fpr.lines if line.get_marker() == "None"]
    assert bars == [(5.0, 10.0), (4.0, 9.0), (10.0, 15.0), (9.0, 14.0)]
    seeds = [sorted(line.get_xdata()) for line in fpr.lines if line.get_marker() == "|"]
    assert seeds[0] == [6.0, 8.0]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["CIFAR-100 (near)", "SVHN (far)", "mean of the sets", "95 % interval", "one seed"]
    near, far = figure.legends[0].legend_handles[:2]
    assert near.get_markerfacecolor() == "white" and far.get_markerfacecolor() != "white"


def test_results_heatmap_writes_values_means_and_the_best_in_bold():
    results = results_table(["LINe", "MSP"], {"SVHN": "far", "CIFAR-100": "near", "noise": "far"})
    axes = plots.results_heatmap(results, "fpr95", caption=CAPTION).axes[0]
    columns = ["CIFAR-100\n(near)", "SVHN\n(far)", "noise\n(far)", "mean\nnear", "mean\nfar", "mean"]
    assert tick_names(axes.xaxis) == columns
    numbers = [text.get_text() for text in axes.texts]
    assert numbers == [
        "11.0",
        "10.0",
        "12.0",
        "11.0",
        "11.0",
        "11.0",
        "21.0",
        "20.0",
        "22.0",
        "21.0",
        "21.0",
        "21.0",
    ]
    assert [text.get_fontweight() for text in axes.texts] == ["bold"] * 6 + ["normal"] * 6
    incomplete = plots.results_heatmap(results.iloc[1:], "auroc", caption=CAPTION).axes[0]
    assert len(incomplete.patches) == 12 and len(incomplete.texts) == 11
    with pytest.raises(InputError, match="did you mean 'auroc'"):
        plots.results_heatmap(results, "aurocs", caption=CAPTION)


def test_ranking_averages_ties_and_orders_by_mean_rank():
    results = results_table(["MSP", "Energy", "LINe"], {"SVHN": "far", "noise": "far"})
    results["fpr95"] = [30.0, 20.0, 30.0, 10.0, 5.0, 40.0]  # SVHN: 2.5 2.5 1, noise: 2 1 3
    axes = plots.ranking(results, caption=CAPTION).axes[0]
    assert [text.get_text() for text in axes.texts] == ["Energy (1.8)", "LINe (2.0)", "MSP (2.2)"]
    assert list(axes.lines[0].get_ydata()) == [2.5, 1.0]
    assert axes.get_ylabel() == "rank by FPR95 (1 = best)"


def test_published_comparison_shows_only_rows_with_published_values():
    results = results_table(["LINe", "MSP"], {"SVHN": "far", "CIFAR-100": "near"}, published=True)
    results.loc[results.method == "MSP", "published_auroc"] = np.nan
    fpr, auroc = plots.published_comparison(results, caption=CAPTION).axes
    assert tick_names(fpr.yaxis) == ["SVHN", "SVHN"]
    assert [text.get_text() for text in auroc.texts] == ["LINe", "MSP"]
    values = [
        [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "D"]
        for axes in (fpr, auroc)
    ]
    assert values == [[15.0, 25.0], [90.0]]
    assert [float(line.get_xdata()[0]) for line in fpr.lines if line.get_marker() == "o"] == [10.0, 20.0]


def test_published_comparison_says_when_there_is_nothing_to_compare():
    # a column of None is what a table without published values holds
    results = results_table(["LINe"], {"SVHN": "far"}).assign(published_fpr95=None, published_auroc=None)
    figure = plots.published_comparison(results, caption=CAPTION)
    assert any(text.startswith("No published values") for text in texts(figure))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.iloc[:0], "no rows"),
        (lambda table: table.drop(columns="fpr95_lo"), "no column fpr95_lo"),
        (lambda table: table.assign(experiment=["a", "b"]), "mix the experiments a, b"),
    ],
)
def test_a_table_that_cannot_be_drawn_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        plots.results_intervals(change(results_table(["LINe", "MSP"], {"SVHN": "far"})), caption=CAPTION)


def test_constant_scores_and_logits_can_be_drawn():
    same = np.ones(20)
    assert plots.score_histograms(same, {"SVHN": same}, threshold=1.0, caption=CAPTION).axes
    logits = {"ID": np.zeros((20, 2)), "SVHN": np.zeros((20, 2))}
    assert plots.logits_before_after(logits, logits, caption=CAPTION).axes
