"""The figures: what they show for known input, and that saving them is reproducible."""

import itertools

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
from ood_helpers.mos.groups import Groups

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


def colliding(figure: Figure) -> list[tuple[str, str]]:
    """Texts inside and beside axes, tick labels included, that cover one another."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    shown = {}
    for axes in figure.axes:
        axes.get_tightbbox(renderer)  # brings the tick labels to their places
        labels = [label for axis in (axes.xaxis, axes.yaxis) for label in visible_labels(axis)]
        for text in [*axes.texts, *labels]:
            text.get_window_extent(renderer)  # moves an annotation to its place, but counts its line as text
            shown[text] = Text.get_window_extent(text, renderer)
    return [
        (first.get_text(), second.get_text())
        for (first, box), (second, other) in itertools.combinations(shown.items(), 2)
        if first.get_text().strip()
        and second.get_text().strip()
        and box.padded(-1).overlaps(other.padded(-1))
    ]


def visible_labels(axis) -> list[Text]:
    """The labels of the ticks in view, as far as they are drawn."""
    if not axis.axes.axison:
        return []
    low, high = sorted(axis.get_view_interval())
    return [
        label
        for tick in axis.get_major_ticks()
        for label in (tick.label1, tick.label2)
        if label.get_visible() and low <= tick.get_loc() <= high
    ]


def sweep_table(values, sets, **columns) -> pd.DataFrame:
    """A line a value and set: FPR95 is 10 for the first value, 20 for the second, ..., + 2 per set; AUROC 100 - FPR95."""
    lines = [
        {"value": value, "ood_set": name, "group": group, "fpr95": 10.0 * (place + 1) + 2 * index}
        for place, value in enumerate(values)
        for index, (name, group) in enumerate(sets.items())
    ]
    table = pd.DataFrame(lines).astype({"value": object}).assign(**columns)
    return table.assign(auroc=100 - table.fpr95)


def rank_table(methods) -> pd.DataFrame:
    ranks = np.arange(1.0, len(methods) + 1)
    return pd.DataFrame({"method": methods, "mean_rank": ranks, "low": ranks - 0.5, "high": ranks + 0.25})


def difference_table(methods) -> pd.DataFrame:
    """The n-th method is 4 points better than the next; the interval is as wide as the difference between neighbours."""
    columns = ["method_a", "method_b", "difference", "low", "high"]
    lines = [
        (a, b, -4.0 * (j - i), -4.0 * (j - i) - 5, -4.0 * (j - i) + 5)
        for (i, a), (j, b) in itertools.combinations(enumerate(methods), 2)
    ]
    return pd.DataFrame(lines, columns=columns)


def cost_table(methods) -> pd.DataFrame:
    """Scoring takes 1 s for the first method, 10 s for the second, ...; the second needs 3 passes more."""
    places = np.arange(len(methods))
    costs = {"method": methods, "fit_seconds": 0.5 * places, "seconds_per_10k": 10.0 ** (places % 5)}
    return pd.DataFrame(costs).assign(extra_passes=3 * (places == 1), forward_seconds_per_10k=20.0)


def tuning_table(methods, sets) -> pd.DataFrame:
    """Tuning takes 6 points off each FPR95 of `results_table` and adds 3 to each AUROC."""
    default = results_table(methods, sets).assign(tuned=False)
    tuned = default.assign(
        tuned=True, method=default.method + " (tuned)", fpr95=default.fpr95 - 6, auroc=default.auroc + 3
    )
    return pd.concat([default, tuned], ignore_index=True)


def others_table(groups, sets) -> pd.DataFrame:
    """ID images are others by 0.1 in their own group and by 0.9 in the rest; OOD images by 0.8, 0.85, 0.8, ..."""
    lines = [(f"{own} images", "ID", name, 0.1 if name == own else 0.9) for own in groups for name in groups]
    lines += [(ood, "OOD", name, 0.8 + 0.05 * (n % 2)) for ood in sets for n, name in enumerate(groups)]
    table = pd.DataFrame(lines, columns=["set", "kind", "group", "mean"])
    return table.assign(q25=table["mean"] - 0.05, q75=table["mean"] + 0.1)


def fine_tuning_history(rates, scale=1.0) -> pd.DataFrame:
    """A row of 100 steps a learning rate; the loss is `scale` / epoch, in validation twice that."""
    epochs = np.arange(1, len(rates) + 1)
    losses = {"train_loss": scale / epochs, "validation_loss": 2 * scale / epochs}
    history = pd.DataFrame({"epoch": epochs, "step": 100 * epochs, "learning_rate": rates} | losses)
    return history.assign(validation_accuracy=80.0 + epochs)


def group_numbers() -> pd.DataFrame:
    """FPR95 is 10 a group and 2 a draw, for random groups 5 more; the taxonomy has 2 groups and 15."""
    lines = [("taxonomy", 2, 0, 15.0)]
    for strategy, more in (("k-means", 0), ("random", 5)):
        lines += [
            (strategy, number, draw, 10.0 * number + 2 * draw + more)
            for number in (2, 4, 8)
            for draw in (0, 1)
        ]
    table = pd.DataFrame(lines, columns=["strategy", "groups", "draw", "fpr95"])
    return table.assign(auroc=100 - table.fpr95 / 2)


def depth_table(depths, sets) -> pd.DataFrame:
    """FPR95 of MOS is 20, 30, ... by depth, of MSP 70 at every depth, + 1 a set; ID accuracy 90, 91, ... by depth."""
    lines = [
        (depth, method, name, group, (70.0 if method == "MSP" else 20.0 + 10 * place) + index, 90.0 + place)
        for place, depth in enumerate(depths)
        for method in ("MOS", "MSP")
        for index, (name, group) in enumerate(sets.items())
    ]
    return pd.DataFrame(lines, columns=["depth", "method", "ood_set", "group", "fpr95", "id_accuracy"])


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
                row |= {
                    "published_fpr95": np.nan,
                    "published_auroc": np.nan,
                    "fpr95_ood_positive": 2 * fpr / 3,
                }
                if published and group == "far":
                    row |= {"published_fpr95": fpr + 5, "published_auroc": 90.0}
                rows.append(row)
    return pd.DataFrame(rows)


def share_table(classes) -> pd.DataFrame:
    """Class 0 has 20 % foreground, class 1 20.05 %, ...; quartiles 5 points either way; 10 images a class, one empty in 1."""
    table = pd.DataFrame({"class": range(classes), "mean": 20 + 0.05 * np.arange(classes), "images": 10})
    return table.assign(q25=table["mean"] - 5, q75=table["mean"] + 5, empty=(table["class"] == 1).astype(int))


def dense_history() -> pd.DataFrame:
    """That of `fine_tuning_history` with accuracies of pixels and images and the mIoU."""
    history = fine_tuning_history([0.1, 0.1, 0.01, 0.001])
    steps = np.arange(4)
    history = history.assign(train_pixel_accuracy=60.0 + steps, train_accuracy=70.0 + steps)
    return history.assign(validation_pixel_accuracy=50.0 + steps, validation_miou=30.0 + steps)


SCORES = ["host on the backbone", "S_foreground", "S_background", "S", "S, tuned"]


def host_table(hosts, sets, scores=SCORES) -> pd.DataFrame:
    """AUROC is 90 for the first host, 91 for the second, ..., + 0.1 a score, - 1 a set; the interval is 1 either way."""
    lines = [
        (host, score, name, group, 90.0 + place + 0.1 * lane - index)
        for place, host in enumerate(hosts)
        for lane, score in enumerate(scores)
        for index, (name, group) in enumerate(sets.items())
    ]
    table = pd.DataFrame(lines, columns=["host", "score", "ood_set", "group", "auroc"])
    table = table.assign(auroc_lo=table.auroc - 1, auroc_hi=table.auroc + 1, fpr95=100 - table.auroc)
    return table.assign(fpr95_lo=table.fpr95 - 1, fpr95_hi=table.fpr95 + 2)


def weight_table(hosts, sets, temperatures) -> pd.DataFrame:
    """AUROC is 80 + sigma / T, + 1 a set."""
    lines = [
        (host, name, group, sigma, temperature, 80 + sigma / temperature + index)
        for host in hosts
        for index, (name, group) in enumerate(sets.items())
        for sigma in (1, -1)
        for temperature in temperatures
    ]
    return pd.DataFrame(lines, columns=["host", "ood_set", "group", "sigma", "temperature", "auroc"])


def stage_table(epochs, sets) -> pd.DataFrame:
    """AUROC is 90 at epoch 3 and falls to either side, - 1 a set; FPR95 is 100 - AUROC, the loss 1 / (epoch + 1)."""
    lines = [
        (epoch, name, group, 90.0 - 10 * abs(epoch - 3) / max(epochs) - index, 10.0 + epoch, 1 / (epoch + 1))
        for epoch in epochs
        for index, (name, group) in enumerate(sets.items())
    ]
    columns = ["epoch", "ood_set", "group", "auroc", "id_accuracy", "cross_entropy"]
    table = pd.DataFrame(lines, columns=columns).assign(fpr95=lambda table: 100 - table.auroc)
    return table.assign(id_score=10.0 + table.epoch, ood_score=5.0)


def constraint_table(rates) -> pd.DataFrame:
    """The loss is 0.01 without a mask, else the share that is dropped, 2 % less or more in the two draws."""
    lines = [(rate, draw, (1 - rate) * (0.98 + 0.04 * draw)) for rate in rates if rate < 1 for draw in (0, 1)]
    lines += [(rate, 0, 0.01) for rate in rates if rate == 1]
    table = pd.DataFrame(lines, columns=["keep_rate", "draw", "cross_entropy"])
    return table.assign(chosen=table.keep_rate == 0.9)


def unleashing_history(epochs, **columns) -> pd.DataFrame:
    """The loss is 1 / epoch, the accuracy 80 + epoch / 10, in validation 5 less."""
    table = pd.DataFrame({"epoch": np.arange(1, epochs + 1)})
    table = table.assign(train_cross_entropy=1 / table.epoch, train_accuracy=80 + table.epoch / 10)
    return table.assign(**{"validation_accuracy": table.train_accuracy - 5} | columns)


def network_table(detectors, networks, sets) -> pd.DataFrame:
    return host_table(detectors, sets, networks).rename(columns={"host": "detector", "score": "network"})


def recipe_table(values, sets) -> pd.DataFrame:
    """That of `sweep_table` with intervals of 1 either way and ID accuracies 90, 91, ... by value."""
    table = sweep_table(values, sets)
    ends = {
        f"{metric}{end}": table[metric] + by
        for metric in plots.METRICS
        for end, by in (("_lo", -1), ("_hi", 1))
    }
    return table.assign(**ends, id_accuracy=90.0 + np.arange(len(table)) // len(sets))


METHODS = ["LINe", "HIMPLoS", "HIM only", "PLoS only", "DICE", "ReAct", "Energy", "MaxLogit", "MSP"]
MANY = [
    *METHODS[:-1],
    *(f"ASH-S, variant {n}" for n in range(12)),
    "Mahalanobis (ensemble)",
    "KNN (pytorch-ood)",
]
SETS = {"SVHN": "far", "CIFAR-100": "near", "Textures": "far", "Tiny ImageNet": "near", "Places365": "far"}
SETS |= {"Tiny ImageNet (resized)": "far"}


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
    sweep = sweep_table([50, 70, 85, 90, 95, 99, None], sets)
    pairs = pd.concat([sweep.assign(other=other) for other in (0.5, 1.0, None)])
    sample_sizes = sweep_table([1, 2, 5, 10, 100, 1000], sets, draw=0)
    sample_sizes = sample_sizes.rename(columns={"value": "images_per_class"})
    sample_sizes = pd.concat([sample_sizes.assign(method=method) for method in methods[:8]])
    common = {"caption": CAPTION, "title": "A title"}
    near_far = common | {"groups": sets}
    mask = weight >= np.percentile(weight, 60, axis=1, keepdims=True)
    ood = {name: features[name] for name in sets}
    cuts = np.split(np.arange(classes), [classes // 2, classes // 2 + max(classes // 5, 1)])
    members = tuple(tuple(map(int, cut)) for cut in cuts if len(cut))
    groups = Groups(("animals", "geological formations", "plants")[: len(members)], members)
    heads = ["flat", "group (taxonomy)", "group (k-means)", "group (random)"]
    tuning_history = fine_tuning_history([0.1, 0.1, 0.01, 0.001])
    depths = ["head", "last block", "last 2 blocks", "everything"]
    maps = {name: rng.uniform(size=(14, 8, 8)) for name in images}
    words = {name: [names[n % classes] + "\nh = -12.3" for n in range(14)] for name in images}
    predictions = rng.integers(0, classes + 1, (14, 8, 8))
    parts = dict.fromkeys(SCORES[1:4], (id_scores, scores))
    rates = {part: dict.fromkeys(sets, 91.23) for part in parts}
    hosts = methods[:6]
    weights = weight_table(hosts, sets, [0.01, 0.1, 0.5, 1, 10, 100, np.inf])
    networks = ["backbone", "plain, same budget", "UM", "UMAP (keep rate 0.8)", "OE (energy) + UM"]
    trainings = [unleashing_history(100, train_ascending=40.0) for _ in networks[:4]]
    trainings.append(unleashing_history(10, train_outlier_loss=2.3))
    keep_rates = [1, 0.999, 0.99, 0.98, 0.965, 0.95, 0.9, 0.8, 0.5]
    backbone = {"auroc": 70.0, "fpr95": 60.0, "id_accuracy": 95.0}
    pool = rng.uniform(0, 1, 5000)
    selected = {
        "random": pool[:500],
        "POEM: near the boundary": np.sort(pool)[:500],
        "NTOM": np.sort(pool)[500:999],
    }
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
        "fpr_conventions": plots.fpr_conventions(results, **common),
        "tuning_effect": plots.tuning_effect(tuning_table(methods, sets), **common),
        "near_far": plots.near_far(results, **common),
        "method_cost": plots.method_cost(cost_table(methods), **common),
        "sweep_curves": plots.sweep_curves(sweep, "value", default=90, **common),
        "sweep_heatmap": plots.sweep_heatmap(pairs, "value", "other", default=(90, 1.0), **common),
        "sensitivity": plots.sensitivity(
            dict.fromkeys(methods, sweep.assign(parameter="activation_percentile", is_default=False)),
            **common,
        ),
        "sample_size": plots.sample_size(sample_sizes, **common),
        "paired_differences": plots.paired_differences(difference_table(methods), **common),
        "rank_intervals": plots.rank_intervals(
            rank_table(methods), cliques=[methods[:2]], nemenyi=3.0, **common
        ),
        "group_layout": plots.group_layout(groups, names, **common),
        "others_probability": plots.others_probability(others_table(groups.names, sets), **common),
        "fine_tuning_curves": plots.fine_tuning_curves(dict.fromkeys(heads, tuning_history), **common),
        "number_of_groups": plots.number_of_groups(group_numbers(), **common),
        "fine_tuning_depth": plots.fine_tuning_depth(depth_table(depths, sets), **common),
        "pseudo_masks": plots.pseudo_masks(
            images["ID"],
            maps["ID"],
            maps["ID"] > 0.5,
            names=[names[n % classes] for n in range(14)],
            predictions=predictions,
            class_names=names,
            **common,
        ),
        "dense_overlays": plots.dense_overlays(images, maps, labels=words, **near_far),
        "foreground_share": plots.foreground_share(share_table(classes), names, **common),
        "dense_training": plots.dense_training(dense_history(), plain=dense_history(), **common),
        "score_parts": plots.score_parts(parts, metrics=rates, **near_far),
        "host_comparison": plots.host_comparison(host_table(hosts, sets), **common),
        "background_weight": plots.background_weight(weights, {hosts[0]: (1, 3.7)}, **common),
        "training_stages": plots.training_stages(stage_table(range(101), sets), **common),
        "loss_constraint": plots.loss_constraint(constraint_table(keep_rates), **common),
        "unleashing_curves": plots.unleashing_curves(dict(zip(networks, trainings)), 0.123, **common),
        "network_comparison": plots.network_comparison(network_table(hosts, networks, sets), **common),
        "recipe_sweep": plots.recipe_sweep(
            recipe_table([0.001, 0.01, 0.05, 0.1, 0.5, None], sets),
            "loss constraint u",
            log=True,
            baselines={"backbone": backbone, "plain, same budget": {"auroc": 71.0}},
            **common,
        ),
        "selected_outliers": plots.selected_outliers(
            pool,
            selected,
            id_scores=id_scores,
            label="probability of the outlier class (lower = harder)",
            **common,
        ),
        "forgetting": plots.forgetting(
            pool, pool**2, labels=("backbone", "Unleashing Mask, epoch 100 of 100"), **common
        ),
    }


@pytest.mark.parametrize(
    ("classes", "count", "methods"),
    [(2, 1, ["MSP"]), (100, 6, MANY)],
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
    assert {name: colliding(figure) for name, figure in figures.items() if colliding(figure)} == {}


def test_saving_twice_gives_the_same_bytes(rng, tmp_path):
    figures = every_figure(rng, 3, {"SVHN": "far"}, METHODS[:2])
    kinds = [*list(figures)[::6], "tuning_effect"]  # all are saved by one function
    for name, figure in ((name, figures[name]) for name in kinds):
        first = [path.read_bytes() for path in plots.save_figure(figure, tmp_path / "first", name)]
        second = [path.read_bytes() for path in plots.save_figure(figure, tmp_path / "second", name)]
        assert first == second, name
        assert b"Software" not in first[0] and b"Matplotlib" not in first[1] and b"<dc:date>" not in first[1]
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert (
        len(names) == 2 * len(kinds) and {"tuning_effect.png", "tuning_effect.svg"} <= names
    )  # no temporary file stays
    with Image.open(tmp_path / "first" / "tuning_effect.png") as image:
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
    assert [text.get_text() for text in incomplete.texts].count("–") == 3  # the set, its group and the mean
    with pytest.raises(InputError, match="did you mean 'auroc'"):
        plots.results_heatmap(results, "aurocs", caption=CAPTION)


def cells(axes) -> list[list[str]]:
    """The texts of a table's cells, row by row."""
    rows = {}
    for text in axes.texts:
        rows.setdefault(text.get_position()[1], []).append(text.get_text())
    return [rows[y] for y in sorted(rows)]


def marks(axes, marker) -> list[float]:
    """Where the single markers of a kind stand along x."""
    lines = [line for line in axes.lines if line.get_marker() == marker and len(line.get_xdata()) == 1]
    return [float(line.get_xdata()[0]) for line in lines]


def test_results_intervals_leave_out_what_is_missing():
    results = results_table(["LINe", "MSP"], {"SVHN": "far", "noise": "far"}).iloc[:3]
    fpr = plots.results_intervals(results, caption=CAPTION).axes[0]
    # LINe on both sets and in the mean; MSP on one set, of which there is no mean over the sets
    assert marks(fpr, "o") == [10.0, 20.0] and marks(fpr, "s") == [11.0] and marks(fpr, "D") == [10.5]


def test_ranking_averages_ties_and_orders_by_mean_rank():
    results = results_table(["MSP", "Energy", "LINe"], {"SVHN": "far", "noise": "far"})
    results["fpr95"] = [30.0, 20.0, 30.0, 10.0, 5.0, 40.0]  # SVHN: 2.5 2.5 1, noise: 2 1 3
    axes, bar = plots.ranking(results, caption=CAPTION).axes
    assert tick_names(axes.yaxis) == ["Energy", "LINe", "MSP"]
    assert tick_names(axes.xaxis) == ["SVHN\n(far)", "noise\n(far)", "mean\nrank"]
    assert cells(axes) == [["2.5", "1", "1.8"], ["1", "3", "2"], ["2.5", "2", "2.2"]]
    assert bar.get_ylabel() == "rank by FPR95,\n1 = best"
    lacking = plots.ranking(results.iloc[1:], caption=CAPTION).axes[0]
    assert tick_names(lacking.yaxis)[-1] == "MSP" and cells(lacking)[-1] == ["2", "–", "–"]


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


def test_published_comparison_of_many_pairs_is_a_table_of_differences():
    methods, sets = [f"method {n}" for n in range(21)], {"SVHN": "far", "noise": "far"}
    results = results_table(methods, sets, published=True)
    results.loc[1, "published_fpr95"] = np.nan
    fpr, auroc, bar = plots.published_comparison(results, caption=CAPTION).axes
    assert [fpr.get_title(), auroc.get_title()] == ["FPR95", "AUROC"]
    assert cells(fpr)[:2] == [["-5.0", "–"], ["-5.0", "-5.0"]]
    assert cells(auroc)[0] == ["+5.0", "+4.5"] and tick_names(fpr.yaxis) == methods
    assert "measured − published" in bar.get_ylabel()


def test_published_comparison_says_when_there_is_nothing_to_compare():
    # a column of None is what a table without published values holds
    results = results_table(["LINe"], {"SVHN": "far"}).assign(published_fpr95=None, published_auroc=None)
    figure = plots.published_comparison(results, caption=CAPTION)
    assert any(text.startswith("No published values") for text in texts(figure))


def test_fpr_conventions_shows_both_means_and_both_ranks():
    results = results_table(["MSP", "LINe"], {"SVHN": "far", "noise": "far"})
    results["fpr95_ood_positive"] = [9.0, 11.0, 4.0, 6.0]
    figure = plots.fpr_conventions(results, caption=CAPTION)
    axes = figure.axes[0]
    assert tick_names(axes.yaxis) == ["MSP", "LINe"]
    assert marks(axes, "o") == [10.5, 20.5] and marks(axes, "D") == [10.0, 5.0]
    assert [text.get_text() for text in axes.texts] == ["1 → 2", "2 → 1", "rank"]
    first, second = (text.get_text() for text in figure.legends[0].get_texts())
    assert first.startswith("fpr95: ID positive") and second.startswith("fpr95_ood_positive: OOD positive")


def test_tuning_effect_joins_default_and_tuned():
    table = tuning_table(["LINe", "MSP"], {"SVHN": "far", "noise": "far"})
    table.loc[table.tuned & table.method.str.startswith("LINe"), "fpr95"] += 30
    fpr, auroc = plots.tuning_effect(table, caption=CAPTION).axes
    # MSP is the best once tuned
    assert tick_names(fpr.yaxis) == ["MSP", "LINe"]
    assert marks(fpr, "o") == [20, 14, 21, 15, 10, 34, 11, 35] and marks(fpr, "D") == [20.5, 14.5, 10.5, 34.5]
    assert marks(auroc, "D") == [89.75, 92.75, 94.75, 97.75]
    lacking = plots.tuning_effect(table.drop(index=3), caption=CAPTION).axes[0]  # MSP on noise, not tuned
    assert np.isnan(marks(lacking, "o")[2]) and np.isnan(marks(lacking, "D")[0])
    default, tuned = (line for line in fpr.lines[:3] if line.get_marker() == "o")
    assert default.get_markerfacecolor() == "white" and tuned.get_markerfacecolor() != "white"


def test_near_far_places_a_named_point_a_method():
    results = results_table(["MSP", "LINe"], {"SVHN": "far", "noise": "far", "CIFAR-100": "near"})
    axes = plots.near_far(results, caption=CAPTION).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[10.5, 12], [20.5, 22]])
    assert [(text.get_text(), *text.xy) for text in axes.texts] == [("MSP", 10.5, 12), ("LINe", 20.5, 22)]
    assert axes.get_xlabel() == "mean FPR95 on the far sets (%), lower is better"
    far = results[results.group == "far"]
    assert any("no near or no far" in text for text in texts(plots.near_far(far, caption=CAPTION)))


def test_near_far_leads_lines_to_crowded_points():
    results = results_table(MANY, {"SVHN": "far", "CIFAR-100": "near"})
    results[["fpr95", "auroc"]] = 50.0  # every point at one place
    figure = plots.near_far(results, caption=CAPTION)
    assert colliding(figure) == []
    assert sum(text.arrow_patch is not None for text in figure.axes[0].texts) >= len(MANY) - 8


def test_method_cost_orders_bars_and_counts_passes():
    costs = cost_table(["MSP", "ODIN", "KNN"]).iloc[[2, 1, 0]]
    figure = plots.method_cost(costs, caption=CAPTION)
    scoring, fit = figure.axes
    assert tick_names(scoring.yaxis) == ["MSP", "ODIN", "KNN"] and scoring.get_xscale() == "log"
    bars = [[bar.get_width() for bar in axes.containers[0]] for axes in (scoring, fit)]
    assert bars == [[1, 10, 100], [0, 0.5, 1]]
    assert [(text.get_text(), text.xy) for text in scoring.texts] == [("+3 passes", (10, 1))]
    assert list(scoring.lines[0].get_xdata()) == [20, 20]
    assert "forward pass, shared: 20 s" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_sweep_curves_draw_the_sets_the_mean_and_the_default():
    sweep = sweep_table([90, 50, None, 70], {"SVHN": "far", "CIFAR-100": "near"})
    figure = plots.sweep_curves(sweep, "value", default=70, caption=CAPTION, label="percentile")
    fpr, auroc = figure.axes
    assert fpr.get_xlabel() == "percentile" and tick_names(fpr.xaxis) == ["50", "70", "90", "off"]
    near, near_off, far, _, mean, mean_off, default = fpr.lines
    np.testing.assert_array_equal(near.get_xydata(), [[50, 22], [70, 42], [90, 12]])
    assert near.get_markerfacecolor() == "white" and far.get_markerfacecolor() != "white"
    # off is no limit of the numbers: it stands apart, without a line to them
    assert near_off.get_xdata()[0] > 90 and list(near_off.get_ydata()) == [32]
    assert list(mean.get_ydata()) == [21, 41, 11] and list(mean_off.get_ydata()) == [31]
    assert list(default.get_xdata()) == [70, 70]
    assert list(auroc.lines[4].get_ydata()) == [79, 59, 89]
    off = plots.sweep_curves(sweep, "value", caption=CAPTION).axes[0]
    assert off.lines[-1].get_xdata()[0] == near_off.get_xdata()[0]


def test_sweep_curves_give_each_method_its_panels_and_default():
    sets = {"SVHN": "far"}
    both = pd.concat([sweep_table([1, 10], sets, method="KNN"), sweep_table([10, 100], sets, method="KNN+")])
    defaults = {"KNN": 10, "KNN+": 50}
    figure = plots.sweep_curves(both, "value", panels="method", default=defaults, log=True, caption=CAPTION)
    assert [axes.get_title() for axes in figure.axes] == ["KNN", "KNN", "KNN+", "KNN+"]
    assert [list(axes.lines[0].get_xdata()) for axes in figure.axes[::2]] == [[0, 1], [1, 2]]
    assert [axes.lines[-1].get_xdata()[0] for axes in figure.axes[::2]] == [1, pytest.approx(np.log10(50))]
    with pytest.raises(InputError, match="value = 0, expected values above 0 on a log scale"):
        plots.sweep_curves(sweep_table([0, 1], sets), "value", log=True, caption=CAPTION)


def test_sweep_heatmap_marks_the_best_and_the_default():
    sets = {"SVHN": "far", "noise": "far"}
    sweep = pd.concat(
        [sweep_table([0.8, None], sets, percentile=90), sweep_table([0.8], sets, percentile=10)]
    )
    sweep.loc[sweep.percentile == 10, "fpr95"] = 5.0
    draw = {"caption": CAPTION, "labels": ("clip", "percentile")}
    axes = plots.sweep_heatmap(sweep, "value", "percentile", default=(None, 90), **draw).axes[0]
    assert cells(axes) == [["5.0", "–"], ["11.0", "21.0"]]
    assert [text.get_text() for text in axes.texts if text.get_fontweight() == "bold"] == ["5.0"]
    assert tick_names(axes.xaxis) == ["0.8", "off"] and tick_names(axes.yaxis) == ["10", "90"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("clip", "percentile")
    assert axes.patches[-1].get_xy() == (0.5, 0.5)
    # a default that was not tried has no cell
    other = plots.sweep_heatmap(sweep, "value", "percentile", default=(0.5, 90), **draw)
    assert len(other.axes[0].patches) == 4 and not other.legends


def test_sensitivity_orders_by_range_and_marks_default_and_best():
    sets = {"SVHN": "far", "noise": "far"}
    narrow = sweep_table([1, 5], sets, parameter="k", is_default=False)
    wide = sweep_table(
        [50, None, 90], sets, parameter="percentile", is_default=[False, False, False, False, True, True]
    )
    axes = plots.sensitivity({"KNN": narrow, "DICE": wide}, caption=CAPTION).axes[0]
    assert tick_names(axes.yaxis) == ["DICE", "KNN"]
    assert [text.get_text() for text in axes.texts] == ["percentile 50 … 90, off", "k 1 … 5"]
    assert marks(axes, "|") == [31.0]
    rings = [line for line in axes.lines if line.get_markersize() == 9]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in rings] == [(11, 0), (11, 1)]
    dots = [line for line in axes.lines if line.get_markersize() == 5]
    assert [line.get_xdata()[0] for line in dots] == [11, 31, 21, 11, 21]
    assert [line.get_color() == "white" for line in dots] == [False, False, True, False, False]


def test_sample_size_shows_mean_and_range_over_the_draws():
    lines = [("LINe", 10, 0, 40.0, 90.0), ("LINe", 10, 1, 50.0, 80.0), ("LINe", 100, 0, 30.0, 95.0)]
    table = pd.DataFrame(lines, columns=["method", "images_per_class", "draw", "fpr95", "auroc"])
    fpr, auroc = plots.sample_size(table, caption=CAPTION).axes
    np.testing.assert_array_equal(fpr.lines[0].get_xydata(), [[1, 45], [2, 30]])
    np.testing.assert_array_equal(auroc.lines[0].get_xydata(), [[1, 85], [2, 95]])
    band = fpr.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[band[:, 0] == 1, 1].max()) == (30, 50)
    assert tick_names(fpr.xaxis) == ["10", "100"]


def test_paired_differences_are_row_minus_column_and_grey_where_undecided():
    differences = difference_table(["LINe", "DICE", "MSP"])
    # the same pair the other way round
    differences.loc[1, ["method_a", "method_b"]] = ["MSP", "LINe"]
    differences.loc[1, ["difference", "low", "high"]] = [8, 3, 13]
    axes = plots.paired_differences(differences, caption=CAPTION).axes[0]
    assert cells(axes) == [["4.0"], ["8.0", "4.0"]]
    assert tick_names(axes.xaxis) == ["LINe", "DICE"] and tick_names(axes.yaxis) == ["DICE", "MSP"]
    grey = [same_color(patch.get_facecolor(), "0.92") for patch in axes.patches]
    assert dict(zip([text.get_position() for text in axes.texts], grey)) == {
        (0, 1): True,
        (0, 2): False,
        (1, 2): True,
    }
    many = plots.paired_differences(difference_table(MANY), caption=CAPTION).axes[0]
    assert cells(many)[1] == ["8", "4"]
    alone = plots.paired_differences(difference_table(["MSP"]), caption=CAPTION)
    assert any(text.startswith("There is only one method") for text in texts(alone))


def test_rank_intervals_join_cliques_and_scale_the_nemenyi_distance():
    methods = ["LINe", "DICE", "KNN", "MSP"]
    ranks, cliques = (
        rank_table(methods).iloc[::-1],
        [["MSP", "KNN"], ["DICE", "KNN"], ["LINe"], ["LINe", "DICE"]],
    )
    axes, joined = plots.rank_intervals(ranks, cliques=cliques, nemenyi=2.5, caption=CAPTION).axes
    assert tick_names(axes.yaxis) == methods and marks(axes, "o") == [1, 2, 3, 4]
    bars = [tuple(line.get_xdata()) for line in axes.lines if line.get_marker() == "None"]
    assert bars[:4] == [(0.5, 1.25), (1.5, 2.25), (2.5, 3.25), (3.5, 4.25)]
    spans = [(line.get_xdata()[0], *line.get_ydata()) for line in joined.lines]
    # bars that share a method stand side by side
    assert spans == [(0, -0.3, 1.3), (1, 0.7, 2.3), (0, 1.7, 3.3)]
    scale = axes.containers[0].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(scale[:, 0], [1, 3.5])
    assert axes.texts[0].get_text() == "Nemenyi critical difference 2.5"
    without = plots.rank_intervals(ranks, cliques=[], nemenyi=None, caption=CAPTION)
    assert not without.axes[0].texts and not without.axes[1].lines


def boxes(axes, colour) -> list[tuple[float, float, float]]:
    """Left end, row and width of the rectangles with a face or, unfilled, with an edge of this colour."""
    return [
        (box.get_x(), box.get_y() + box.get_height() / 2, box.get_width())
        for box in axes.patches
        if same_color(box.get_facecolor() if box.get_facecolor()[3] else box.get_edgecolor(), colour)
    ]


def test_group_layout_has_a_cell_a_column_and_frames_the_targets():
    groups = Groups(("animals", "vehicles"), ((1, 3, 2), (4, 0)))
    names = ["truck", "cat", "dog, domestic dog", "oak_tree", "ship"]
    axes = plots.group_layout(groups, names, caption=CAPTION, example=2).axes[0]
    assert tick_names(axes.yaxis) == ["animals", "vehicles"] and axes.yaxis_inverted()
    words = [text.get_text() for text in axes.texts]
    # "others" first, the classes in the order of the columns
    assert words == [
        "others",
        "cat",
        "oak tree",
        "dog",
        "3 + 1",
        "others",
        "ship",
        "truck",
        "2 + 1",
        "columns",
    ]
    assert boxes(axes, plots.PUBLISHED_COLOUR) == [(3, 0, 1), (0, 1, 1)]
    assert boxes(axes, plots._pale(plots.ID_COLOUR)) == [
        (1, 0, 1),
        (2, 0, 1),
        (3, 0, 1),
        (1, 1, 1),
        (2, 1, 1),
    ]
    assert "5 classes + 2 × others = 7 columns" in axes.get_xlabel()
    with pytest.raises(InputError, match="Found 4 class names, expected 5"):
        plots.group_layout(groups, names[:4], caption=CAPTION)


def test_group_layout_of_many_classes_draws_bars_to_scale():
    starts = np.cumsum([0, 398, 521, 9, 7, 52, 8, 3, 2])
    members = tuple(tuple(range(start, end)) for start, end in itertools.pairwise(starts.tolist()))
    words = ["animal", "artifact", "formation", "fungus", "misc", "natural object", "person", "plant"]
    groups, names = Groups(tuple(words), members), [f"class {n}, also {n}" for n in range(1000)]
    figure = plots.group_layout(groups, names, caption=CAPTION, example=400)
    axes = figure.axes[0]
    bars = boxes(axes, plots._pale(plots.ID_COLOUR))
    assert [width for _, _, width in bars] == [398, 521, 9, 7, 52, 8, 3, 2]
    targets = boxes(axes, plots.PUBLISHED_COLOUR)
    assert targets[1] == (bars[1][0] + 2, 1, 1)
    assert all(left == 0 for left, row, _ in targets if row != 1)
    shown = [text.get_text() for text in axes.texts]
    assert "2 classes: class 998, class 999" in shown
    assert any(text.startswith("521 classes: class 398, class 399") and text.endswith(" …") for text in shown)
    assert colliding(figure) == [] and clipped(figure) == []
    numbers = plots.group_layout(groups, caption=CAPTION).axes[0]
    assert "52 classes" in [text.get_text() for text in numbers.texts]


def test_group_layout_turns_names_that_are_too_wide():
    groups = Groups(("all",), (tuple(range(12)),))
    figure = plots.group_layout(groups, ["automobile"] * 12, caption=CAPTION)
    turned = [text for text in figure.axes[0].texts if text.get_text() == "automobile"]
    assert {text.get_rotation() for text in turned} == {90} and colliding(figure) == []
    short = plots.group_layout(groups, ["cat"] * 12, caption=CAPTION)
    assert {text.get_rotation() for text in short.axes[0].texts} == {0}


def test_others_probability_shows_each_set_in_each_group_and_its_lowest():
    table = others_table(["animals", "plants"], ["SVHN"]).iloc[::-1]  # OOD first
    animals, plants = plots.others_probability(table, caption=CAPTION).axes[::-1]
    assert (animals.get_title(), plants.get_title()) == ("animals", "plants")
    assert tick_names(plants.yaxis) == ["plants images", "animals images", "SVHN"]
    bars = [
        [bar.get_width() for container in axes.containers for bar in container] for axes in (animals, plants)
    ]
    np.testing.assert_allclose(bars, [[0.9, 0.1, 0.8], [0.1, 0.9, 0.85]])
    full = [boxes(axes, plots.ID_COLOUR) for axes in (animals, plants)]
    assert full == [[(0, 1, 0.1)], [(0, 0, 0.1)]]
    assert [len(boxes(axes, plots.COLOURS[0])) for axes in (animals, plants)] == [1, 0]
    ranges = [line.get_xdata() for line in animals.lines if len(set(line.get_ydata())) == 1][:3]
    np.testing.assert_allclose(ranges, [[0.85, 1.0], [0.05, 0.2], [0.75, 0.9]])
    means = plots.others_probability(table.drop(columns=["q25", "q75"]), caption=CAPTION)
    assert all(len(axes.lines) == 1 for axes in means.axes)  # the line between ID and OOD
    with pytest.raises(InputError, match="no column kind"):
        plots.others_probability(table.drop(columns="kind"), caption=CAPTION)


@pytest.mark.parametrize(("groups", "sets"), [(2, 4), (3, 5), (8, 4), (20, 6)])
def test_others_probability_is_readable_for_many_groups(groups, sets):
    names = [f"large omnivores, group {n}" for n in range(groups)]
    table = others_table(names, [f"OOD set {n}" for n in range(sets)])
    figure = plots.others_probability(table, caption=CAPTION)
    assert clipped(figure) == [] and colliding(figure) == []
    headings = [axes.title.get_window_extent(FigureCanvasAgg(figure).get_renderer()) for axes in figure.axes]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(headings))
    assert all(axes.get_xlim() == (0, 1) for axes in figure.axes)


def test_fine_tuning_curves_have_a_loss_panel_a_head_and_mark_the_drops():
    histories = {
        "flat": fine_tuning_history([0.1, 0.1, 0.01, 0.001]),
        "group": fine_tuning_history([0.05, 0.1, 0.09], scale=4.0),  # a warm-up and a slow decay are no drops
    }
    histories["group"]["validation_loss"] = np.nan
    figure = plots.fine_tuning_curves(histories, caption=CAPTION)
    flat, group, accuracy = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["flat", "group", "all heads"]
    train, validation, *drops = flat.lines
    np.testing.assert_allclose(train.get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])
    np.testing.assert_allclose(validation.get_ydata(), [2, 1, 2 / 3, 1 / 2])
    assert [drop.get_xdata()[0] for drop in drops] == [250, 350]
    assert len(group.lines) == 1 and group.get_ylim() == (0, pytest.approx(4.24))
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[81, 82, 83, 84], [81, 82, 83]]
    assert accuracy.lines[1].get_color() == group.lines[0].get_color()
    assert "sum over its groups" in figure.legends[0].get_title().get_text()
    alone = {"flat": histories["flat"].drop(columns=["validation_loss", "validation_accuracy"])}
    figure = plots.fine_tuning_curves(alone, caption=CAPTION)
    assert len(figure.axes) == 1
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["flat", "training loss", "learning rate drops"]


def test_number_of_groups_draws_means_single_draws_and_the_taxonomy():
    figure = plots.number_of_groups(group_numbers(), caption=CAPTION)
    fpr, auroc = figure.axes
    _, taxonomy, kmeans_draws, kmeans, _, chance = fpr.lines
    np.testing.assert_allclose(taxonomy.get_xydata(), [[np.log10(2), 15]])
    assert taxonomy.get_linestyle() == "None" and taxonomy.get_markersize() > kmeans.get_markersize()
    assert list(kmeans.get_ydata()) == [21, 41, 81] and list(chance.get_ydata()) == [26, 46, 86]
    assert list(kmeans_draws.get_ydata()) == [20, 22, 40, 42, 80, 82]
    assert kmeans_draws.get_alpha() < 1 and kmeans_draws.get_linestyle() == "None"
    assert list(auroc.lines[3].get_ydata()) == [89.5, 79.5, 59.5]
    assert tick_names(fpr.xaxis) == ["2", "4", "8"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["taxonomy", "k-means", "random", "one draw"]


def test_fine_tuning_depth_has_a_panel_a_method_and_the_accuracy():
    table = depth_table(["head", "last block", "everything"], {"SVHN": "far", "CIFAR-100": "near"})
    figure = plots.fine_tuning_depth(table, caption=CAPTION)
    mos, msp, accuracy = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["MOS", "MSP", "ID accuracy"]
    # near first, then far, then the mean
    assert [list(line.get_ydata()) for line in mos.lines] == [[21, 31, 41], [20, 30, 40], [20.5, 30.5, 40.5]]
    assert [list(line.get_ydata()) for line in msp.lines] == [[71] * 3, [70] * 3, [70.5] * 3]
    assert mos.get_ylim() == msp.get_ylim()
    assert [(line.get_label(), *line.get_ydata()) for line in accuracy.lines] == [
        ("MOS", 90, 91, 92),
        ("MSP", 90, 91, 92),
    ]
    assert tick_names(accuracy.xaxis) == ["head", "last block", "everything"]
    lacking = plots.fine_tuning_depth(table.iloc[1:], caption=CAPTION).axes[0]  # MOS on SVHN, head only
    assert np.isnan([line.get_ydata()[0] for line in lacking.lines]).tolist() == [False, True, True]


def test_pseudo_masks_show_map_mask_and_prediction_of_each_image():
    images = np.full((2, 2, 2, 3), 51, np.uint8)
    maps = torch.tensor([[[0.0, 1.0], [0.5, 0.25]]] * 2)
    masks = np.array([[[False, True], [False, False]]] * 2)
    predictions = np.array([[[0, 1], [2, 2]]] * 2)  # cat, dog, background
    draw = {"names": ["cat", "dog, domestic dog"], "caption": CAPTION}
    figure = plots.pseudo_masks(
        images, maps, masks, **draw, predictions=predictions, class_names=["cat", "dog, domestic dog"]
    )
    axes = figure.axes[0]
    assert tick_names(axes.xaxis) == ["cat", "dog"]
    assert [name.split("\n")[0] for name in tick_names(axes.yaxis)] == ["image", "CAM,", "pseudo", "dense"]
    image, _, cam, _, mask, _, of_cat, of_dog = [picture.get_array() for picture in axes.images]
    np.testing.assert_array_equal(image, images[0])
    heat = matplotlib.colormaps["inferno"]([[0.0, 1.0], [0.5, 0.25]])[..., :3]
    np.testing.assert_allclose(cam, 0.65 * heat + 0.35 * 0.2, atol=1e-9)
    # the foreground as it is, the background faded
    np.testing.assert_allclose(mask[..., 0], [[0.76, 0.2], [0.76, 0.76]])
    assert [same_color(of_cat[0, n], c) for n, c in enumerate((plots.ID_COLOUR, plots.PUBLISHED_COLOUR))] == [
        True
    ] * 2
    assert [same_color(of_dog[0, n], c) for n, c in enumerate((plots.PUBLISHED_COLOUR, plots.ID_COLOUR))] == [
        True
    ] * 2
    assert same_color(of_cat[1, 0], "0.85") and all(p.get_interpolation() == "nearest" for p in axes.images)
    # the outline goes around the upper right pixel, which is the upper right quarter of the picture
    left, right, bottom, top = axes.images[4].get_extent()
    edges = np.array(axes.collections[0].get_segments())
    assert edges.shape == (4, 2, 2)
    np.testing.assert_allclose(
        [edges.min((0, 1)), edges.max((0, 1))], [[(left + right) / 2, (bottom + top) / 2], [right, top]]
    )
    assert len(plots.pseudo_masks(images, maps, masks, **draw).axes[0].images) == 6
    refused = [
        ({"maps": 2 * maps}, r"The CAMs are between 0 and 2, expected values in \[0, 1\]"),
        ({"masks": masks[:1]}, r"The pseudo masks are \[1, 2, 2\], expected \[2, 2, 2\]"),
        ({"predictions": predictions}, "Found no 'cat' in class_names"),
        ({"images": images / 255}, "expected uint8"),
    ]
    for change, message in refused:
        given = {"images": images, "maps": maps, "masks": masks} | change
        with pytest.raises(InputError, match=message):
            plots.pseudo_masks(given.pop("images"), given.pop("maps"), given.pop("masks"), **given, **draw)


@pytest.mark.parametrize("shape", [(3, 3), (1, 4), (4, 1)])
def test_the_outline_of_a_mask_parts_every_two_pixels_that_differ(rng, shape):
    mask = rng.random(shape) < 0.5
    expected = set()
    for row, column in np.argwhere(mask).tolist():
        for step_row, step_column in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            other = (row + step_row, column + step_column)
            inside = 0 <= other[0] < shape[0] and 0 <= other[1] < shape[1]
            if not (inside and mask[other]):
                middle = (column + 0.5 + step_column / 2, row + 0.5 + step_row / 2)
                expected.add((middle, "upright" if step_column else "level"))
    edges = plots._outline(mask)
    found = {(tuple(edge.mean(axis=0)), "upright" if edge[0, 0] == edge[1, 0] else "level") for edge in edges}
    assert found == expected and len(edges) == len(expected)


def test_dense_overlays_place_the_map_under_its_image(rng):
    images = {name: rng.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8) for name in ("digits", "noise")}
    maps = {name: torch.rand(12, 2, 2) for name in images}
    labels = {"noise": ["automobile\nh = 1.0"] * 12}
    figure = plots.dense_overlays(images, maps, groups={"noise": "far"}, caption=CAPTION)
    axes, bar = figure.axes
    assert tick_names(axes.yaxis) == ["digits", "noise\n(far)"] and "1 − p(background)" in bar.get_ylabel()
    assert len(axes.images) == 40  # ten of twelve, and their maps
    image, foreground = axes.images[21], axes.images[31]
    np.testing.assert_array_equal(image.get_array(), images["noise"][1])
    np.testing.assert_array_equal(foreground.get_array(), maps["noise"][1])
    assert foreground.get_clim() == (0, 1) and foreground.get_interpolation() == "nearest"
    assert foreground.get_extent()[:2] == image.get_extent()[:2]
    assert foreground.get_extent()[3] < image.get_extent()[2]
    labelled = plots.dense_overlays(images, maps, labels=labels, caption=CAPTION)
    shown = [text.get_text() for text in labelled.axes[0].texts]
    # long words leave room for fewer images, and none is broken
    assert set(shown) == {"automobile\nh = 1.0"} and 4 * len(shown) == len(labelled.axes[0].images) < 40
    with pytest.raises(InputError, match=r"The maps of noise are \[0\], expected \[12\]"):
        plots.dense_overlays(images, {"digits": maps["digits"]}, caption=CAPTION)
    with pytest.raises(InputError, match="The maps of digits are between"):
        plots.dense_overlays(images, {name: values + 1 for name, values in maps.items()}, caption=CAPTION)


def test_foreground_share_orders_the_classes_and_marks_the_mean_of_all_images():
    table = share_table(3).assign(mean=[20.0, 40.0, np.nan], images=[30, 10, 0])
    figure = plots.foreground_share(table, ["cat", "dog", "ant"], caption=CAPTION)
    axes = figure.axes[0]
    assert tick_names(axes.yaxis) == ["dog", "cat"]  # ant has no images
    assert list(axes.lines[0].get_xdata()) == [40, 20]
    bars = np.array(axes.collections[0].get_segments())[:, :, 0]
    np.testing.assert_allclose(bars, [[15.05, 25.05], [15, 25]])
    assert list(axes.lines[1].get_xdata()) == [25, 25]
    assert "mean of all images: 25.0 %" in texts(figure)
    assert [text.get_text() for text in axes.texts] == ["1", "0", "empty masks"]
    without = plots.foreground_share(table.assign(empty=0), ["cat", "dog", "ant"], caption=CAPTION)
    assert not without.axes[0].texts
    nothing = plots.foreground_share(table.assign(images=0), ["cat", "dog", "ant"], caption=CAPTION)
    assert any(text.startswith("No class has an image") for text in texts(nothing))
    with pytest.raises(InputError, match="Found class 2 and 2 class names"):
        plots.foreground_share(table, ["cat", "dog"], caption=CAPTION)


def test_foreground_share_of_many_classes_shows_both_ends():
    names = [f"class {n}, also {n}" for n in range(1000)]
    figure = plots.foreground_share(share_table(1000), names, caption=CAPTION)
    axes = figure.axes[0]
    shown = [f"class {n}" for n in (*range(999, 984, -1), *range(14, -1, -1))]
    assert tick_names(axes.yaxis) == shown
    assert axes.texts[0].get_text() == "970 more classes, means of 21 to 69 %"
    assert list(axes.lines[1].get_xdata()) == pytest.approx([44.975] * 2)  # of all, not of those drawn
    assert colliding(figure) == [] and clipped(figure) == []
    named = plots.foreground_share(share_table(40), names[:40], caption=CAPTION).axes[0]
    assert len(tick_names(named.yaxis)) == 40


def test_dense_training_compares_the_dense_network_with_the_plain_classifier():
    plain = pd.DataFrame({"step": [100, 200], "train_accuracy": [75.0, 85.0]})
    figure = plots.dense_training(dense_history(), plain=plain, caption=CAPTION)
    loss, pixels, images = figure.axes
    train, validation, *drops = loss.lines
    np.testing.assert_allclose(train.get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])
    assert [drop.get_xdata()[0] for drop in drops] == [250, 350]
    assert loss.get_ylim() == (0, pytest.approx(2.12)) and validation.get_linestyle() == "--"
    assert [line.get_ydata()[0] for line in pixels.lines[:3]] == [60, 50, 30]
    assert pixels.lines[2].get_color() != pixels.lines[1].get_color()  # the mIoU
    assert [list(line.get_ydata()) for line in images.lines[:3]] == [
        [70, 71, 72, 73],
        [81, 82, 83, 84],
        [75, 85],
    ]
    assert images.lines[2].get_color() != images.lines[0].get_color()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[1:3] == ["mIoU of it", "plain classifier"] and "learning rate drops" in labels
    history = dense_history()
    alone = history.drop(columns=[name for name in history if name.startswith("validation")])
    labels = texts(plots.dense_training(alone, caption=CAPTION))
    assert not {"mIoU of it", "plain classifier", "validation"} & set(labels)
    with pytest.raises(InputError, match="plain classifier has no column step"):
        plots.dense_training(history, plain=plain.drop(columns="step"), caption=CAPTION)


def test_score_parts_tell_which_part_separates_which_set():
    ood = {"SVHN": np.zeros(10), "CIFAR-100": np.linspace(0, 1, 10)}
    parts = {"S_foreground": (torch.linspace(1, 2, 100), ood), "S_background": (np.linspace(4, 5, 50), ood)}
    rates = {
        "S_foreground": {"SVHN": 90.04, "CIFAR-100": 70.0},
        "S_background": {"SVHN": 90.0, "CIFAR-100": 80.0},
    }
    figure = plots.score_parts(
        parts, metrics=rates, groups={"SVHN": "far", "CIFAR-100": "near"}, caption=CAPTION
    )
    first, second, table, other = figure.axes
    assert [first.get_title(), second.get_title()] == ["S_foreground", "S_background"]
    assert "higher" in first.get_xlabel() and first.get_xlim() != second.get_xlim()
    assert tick_names(table.yaxis) == ["SVHN (far)", "CIFAR-100 (near)"]
    numbers = [(text.get_text(), text.get_fontweight()) for axes in (table, other) for text in axes.texts]
    assert numbers == [("90.0", "bold"), ("70.0", "normal"), ("90.0", "bold"), ("80.0", "bold")]
    # ID filled and outlined, then a line a set, in the colour and dashes of the table's row
    _, _, far, near = first.patches
    assert [line.get_linestyle() for line in table.lines] == ["-", "--"]
    assert far.get_linestyle()[1] is None and near.get_linestyle()[1] is not None
    assert [same_color(p.get_edgecolor(), line.get_color()) for p, line in zip((far, near), table.lines)] == [
        True
    ] * 2
    assert max(vertex[1] for vertex in far.get_xy()) == pytest.approx(100)  # all in the first bin
    plain = plots.score_parts(parts, caption=CAPTION)
    assert len(plain.axes) == 2 and {"SVHN", "CIFAR-100"} <= set(texts(plain))
    with pytest.raises(InputError, match=r"Found OOD sets \['SVHN'\] in S, expected \['SVHN', 'CIFAR-100'\]"):
        plots.score_parts(parts | {"S": (ood["SVHN"], {"SVHN": ood["SVHN"]})}, caption=CAPTION)


def test_host_comparison_has_a_panel_a_set_and_a_row_a_host():
    table = host_table(["MSP", "Energy"], {"SVHN": "far", "CIFAR-100": "near"})
    table = pd.concat([table, table.assign(auroc=table.auroc + 1)])  # two seeds
    figure = plots.host_comparison(table, caption=CAPTION)
    near, far = figure.axes
    assert [near.get_title(), far.get_title()] == ["CIFAR-100 (near)", "SVHN (far)"]
    assert tick_names(near.yaxis) == ["MSP", "Energy"] and near.yaxis_inverted()
    np.testing.assert_allclose(
        marks(far, "o") + marks(far, "s") + marks(far, "^"), [90.5, 91.5, 90.6, 91.6, 90.7, 91.7]
    )
    np.testing.assert_allclose(marks(near, "D"), [89.8, 89.9, 90.8, 90.9])
    whole, tuned = [line for line in far.lines if line.get_marker() == "D"][:2]
    assert (whole.get_markerfacecolor(), tuned.get_markerfacecolor()) == ("black", "white")
    assert whole.get_ydata()[0] < tuned.get_ydata()[0] < 0.5  # dodged within the row
    bars = [
        line.get_xdata()
        for line in far.lines
        if line.get_marker() == "None" and len(set(line.get_ydata())) == 1
    ]
    np.testing.assert_allclose(bars[0], [89, 91])
    assert "chance" not in texts(figure) and near.get_xlim()[1] == 100
    low = plots.host_comparison(table.assign(auroc_lo=30.0), caption=CAPTION)
    assert "chance" in texts(low) and low.axes[0].get_xlim()[0] < 50
    lacking = (table.host == "MSP") & (table.score == SCORES[0]) & (table.ood_set == "SVHN")
    fewer = plots.host_comparison(table[~lacking & (table.score != "S")], "fpr95", caption=CAPTION)
    of_near, of_far = fewer.axes
    np.testing.assert_allclose(marks(of_far, "o") + marks(of_near, "o"), [9, 11, 10])
    assert len(marks(of_far, "D")) == 2  # the tuned ones keep their marker
    assert fewer.axes[0].get_xlim()[0] == 0
    with pytest.raises(InputError, match="did you mean 'auroc'"):
        plots.host_comparison(table, "auc", caption=CAPTION)


def test_background_weight_runs_from_one_sign_over_the_foreground_alone_to_the_other():
    table = weight_table(["MSP", "Energy"], {"SVHN": "far", "noise": "far"}, [0.5, 1, 10, np.inf])
    figure = plots.background_weight(table, {"Energy": (-1, 4)}, caption=CAPTION)
    msp, energy = figure.axes
    assert [msp.get_title(), energy.get_title()] == ["MSP", "Energy"]
    weights = [-2, -1, -0.1, 0, 0.1, 1, 2]
    first, second, mean = msp.lines[:3]
    np.testing.assert_allclose(first.get_xydata(), [[x, 80 + x] for x in weights])
    np.testing.assert_allclose(second.get_ydata(), [81 + x for x in weights])
    np.testing.assert_allclose(mean.get_ydata(), [80.5 + x for x in weights])
    # mirrored logarithms: as far from 0.1 to 1 as from -0.1 to -1
    places = msp.transData.transform([(x, 80) for x in (-1, -0.1, 0, 0.1, 1)])[:, 0]
    np.testing.assert_allclose(np.diff(places), np.diff(places)[::-1])
    assert tick_names(msp.xaxis) == ["−1", "−0.1", "0", "0.1", "1"]
    assert [line.get_xdata()[0] for line in msp.lines[3:]] == [1, 0]
    assert [line.get_xdata()[0] for line in energy.lines[3:]] == [1, -0.25, 0]
    alone = plots.background_weight(table[table.host == "MSP"], caption=CAPTION)
    assert clipped(alone) == [] and "chosen" not in texts(alone)
    with pytest.raises(InputError, match="Found temperature 0, expected all above 0"):
        plots.background_weight(table.assign(temperature=0.0), caption=CAPTION)


def test_training_stages_mark_the_best_epoch_of_the_mean():
    table = stage_table(range(6), {"SVHN": "far", "CIFAR-100": "near"})
    figure = plots.training_stages(table, caption=CAPTION)
    auroc, fpr95, scores, accuracy, loss = figure.axes
    near, far, mean, best = auroc.lines
    np.testing.assert_allclose(near.get_ydata(), [83, 85, 87, 89, 87, 85])
    np.testing.assert_allclose(far.get_ydata(), [84, 86, 88, 90, 88, 86])
    np.testing.assert_allclose(mean.get_xydata()[-2:], [[4, 87.5], [5, 85.5]])
    assert same_color(mean.get_color(), "black") and best.get_xydata().tolist() == [[3, 89.5]]
    assert auroc.get_title() == "mean of the sets: best 89.5 % (epoch 3), last 85.5 % (epoch 5)"
    assert fpr95.get_title() == "mean of the sets: best 10.5 % (epoch 3), last 14.5 % (epoch 5)"
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), np.arange(10, 16))
    assert scores.lines[0].get_ydata().tolist() == [5] * 6
    np.testing.assert_allclose(scores.lines[-1].get_ydata(), np.arange(10, 16))
    assert loss.get_yscale() == "log" and len({axes.get_xlim() for axes in figure.axes}) == 1
    # the best epoch by the mean of all sets is none of those that lack one; no panel of an unknown loss
    lacking = table[(table.epoch != 3) | (table.ood_set == "SVHN")].assign(cross_entropy=np.nan)
    fewer = plots.training_stages(lacking, caption=CAPTION)
    assert len(fewer.axes) == 4
    assert fewer.axes[0].get_title() == "mean of the sets: best 87.5 % (epoch 2), last 85.5 % (epoch 5)"
    apart = table[(table.epoch < 3) == (table.ood_set == "SVHN")]
    assert plots.training_stages(apart, caption=CAPTION).axes[0].get_title() == ""
    alone = plots.training_stages(table[table.ood_set == "SVHN"], caption=CAPTION)
    assert alone.axes[0].get_title() == "SVHN: best 90.0 % (epoch 3), last 86.0 % (epoch 5)"
    assert "mean of the sets" not in texts(alone)
    with pytest.raises(InputError, match="has no column cross_entropy, expected epoch, "):
        plots.training_stages(table.drop(columns="cross_entropy"), caption=CAPTION)


def test_loss_constraint_states_mean_and_spread_of_the_chosen_keep_rate():
    figure = plots.loss_constraint(constraint_table([0.99, 0.9, 1]), caption=CAPTION)
    (axes,) = figure.axes
    # draws 0.098 and 0.102: standard deviation of a sample 0.004 / sqrt(2)
    assert {"u = 0.100 ± 0.003, keep rate 0.9", "no mask: 0.010"} <= set(texts(figure))
    assert tick_names(axes.xaxis) == ["1", "0.99", "0.9"]
    unmasked, hundredth, tenth = axes.get_xticks()
    assert unmasked < hundredth and tenth - hundredth == pytest.approx(1)  # decades of 1 - keep rate
    flat = [line for line in axes.lines if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2]
    np.testing.assert_allclose([line.get_ydata()[0] for line in flat], [0.1, 0.01])
    assert axes.get_yscale() == "log"
    plain = plots.loss_constraint(constraint_table([0.9]).drop(columns="chosen"), caption=CAPTION)
    assert not any(text.startswith(("u =", "no mask")) for text in texts(plain)) and colliding(plain) == []
    bare = plots.loss_constraint(constraint_table([1]).assign(chosen=True), caption=CAPTION)
    assert "u = 0.010, keep rate 1" in texts(bare)


def test_unleashing_curves_have_panels_for_what_the_histories_know():
    plain, masked = unleashing_history(40), unleashing_history(4, train_ascending=[10.0, 20, 30, 40])
    figure = plots.unleashing_curves({"plain": plain, "UM": masked}, 0.25, caption=CAPTION)
    loss, ascending, accuracy = figure.axes
    first, second, constraint = loss.lines
    np.testing.assert_allclose(second.get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])
    assert list(constraint.get_ydata()) == [0.25, 0.25] and constraint.get_linestyle() == "--"
    assert loss.get_yscale() == "log" and "loss constraint u = 0.25" in texts(figure)
    (line,) = ascending.lines
    assert list(line.get_ydata()) == [10, 20, 30, 40] and same_color(line.get_color(), second.get_color())
    assert first.get_marker() != second.get_marker() and first.get_markevery() > 1 == second.get_markevery()
    pale, full, *_ = accuracy.lines
    assert (pale.get_ydata()[0], full.get_ydata()[0]) == (80.1, 75.1)
    assert same_color(full.get_color(), first.get_color())
    exposed = {"OE": unleashing_history(3, train_outlier_loss=2.3, validation_accuracy=np.nan)}
    assert [len(axes.lines) for axes in plots.unleashing_curves(exposed, caption=CAPTION).axes] == [1, 1, 1]
    with pytest.raises(InputError, match="training history of UM has no column train_accuracy"):
        plots.unleashing_curves({"UM": masked.drop(columns="train_accuracy")}, caption=CAPTION)
    with pytest.raises(InputError, match="Found no training histories, expected at least one"):
        plots.unleashing_curves({}, caption=CAPTION)


def test_network_comparison_has_a_row_a_detector_and_the_first_network_in_grey():
    table = network_table(["MSP", "Energy"], ["backbone", "UM", "UMAP"], {"SVHN": "far", "CIFAR-100": "near"})
    figure = plots.network_comparison(table, caption=CAPTION)
    near, far = figure.axes
    assert [near.get_title(), far.get_title()] == ["CIFAR-100 (near)", "SVHN (far)"]
    assert tick_names(near.yaxis) == ["MSP", "Energy"]
    np.testing.assert_allclose(marks(far, "o"), [90, 91])
    np.testing.assert_allclose(marks(near, "^"), [89.2, 90.2])
    before, after = (next(line for line in far.lines if line.get_marker() == marker) for marker in "os")
    assert same_color(before.get_color(), "0.5") and same_color(after.get_color(), plots.ID_COLOUR)
    with pytest.raises(InputError, match="table of networks has no column fpr95_hi"):
        plots.network_comparison(table.drop(columns="fpr95_hi"), "fpr95", caption=CAPTION)


def test_recipe_sweep_draws_sets_mean_accuracy_and_baselines():
    table = recipe_table([0.1, 10, None], {"SVHN": "far", "CIFAR-100": "near"})
    baselines = {"backbone": {"auroc": 70.0, "fpr95": 60.0, "id_accuracy": 95.0}, "plain": {"fpr95": 50.0}}
    figure = plots.recipe_sweep(table, "keep rate", log=True, baselines=baselines, caption=CAPTION)
    _, fpr95, accuracy = figure.axes
    black = [line for line in fpr95.lines if same_color(line.get_color(), "black")]
    np.testing.assert_allclose([*black[0].get_ydata(), *black[1].get_ydata()], [11, 21, 31])  # "off" apart
    np.testing.assert_allclose(np.diff(black[0].get_xdata()), 2)
    assert tick_names(fpr95.xaxis)[::2] == ["0.1", "off"] and "log scale" in fpr95.get_xlabel()
    intervals = [segment[:, 1].tolist() for item in fpr95.collections for segment in item.get_segments()]
    assert [11.0, 13.0] in intervals and [29.0, 31.0] in intervals and len(intervals) == 6
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [90, 91])
    grey = [
        [line.get_ydata()[0] for line in axes.lines if line.get_color() == "0.35"] for axes in figure.axes
    ]
    assert grey == [[70], [60, 50], [95]] and {"backbone", "plain"} <= set(texts(figure))
    lacking = table[(table.value != 10) | (table.ood_set == "SVHN")]
    fewer = plots.recipe_sweep(lacking, "keep rate", caption=CAPTION).axes[1]
    mean = next(line for line in fewer.lines if same_color(line.get_color(), "black"))
    assert list(mean.get_ydata()) == [11]
    with pytest.raises(InputError, match="Found keep rate = 0, expected values above 0 on a log scale"):
        plots.recipe_sweep(table.fillna({"value": 0}), "keep rate", log=True, caption=CAPTION)
    with pytest.raises(InputError, match="sweep of keep rate has no rows"):
        plots.recipe_sweep(table.iloc[:0], "keep rate", caption=CAPTION)


def test_selected_outliers_count_on_the_scale_of_the_pool():
    pool = torch.linspace(0, 1, 1000)
    selected = {"hardest": pool[:100], "random": pool[::10]}
    figure = plots.selected_outliers(pool, selected, label="|β·h|", id_scores=pool[500:], caption=CAPTION)
    hardest, random = figure.axes
    assert hardest.get_title() == "hardest\n100 of 1,000 (10 %)" and random.get_xlabel() == "|β·h|"
    assert hardest.get_yscale() == "log" and hardest.get_ylim() == random.get_ylim()
    heights = np.array([bar.get_height() for bar in hardest.patches[:100]]).reshape(2, 50)
    assert heights.sum(axis=1).tolist() == [1000, 100]
    assert heights[1][:4].tolist() == heights[0][:4].tolist() and heights[1][6:].max() == 0
    assert "in-distribution" in texts(figure)
    alone = plots.selected_outliers(pool, {"random": pool}, label="|β·h|", caption=CAPTION)
    assert {"selected", "pool"} <= set(texts(alone)) and "in-distribution" not in texts(alone)
    with pytest.raises(InputError, match="Found no scores of the selection 'none', expected at least one"):
        plots.selected_outliers(pool, {"none": pool[:0]}, label="|β·h|", caption=CAPTION)


def test_forgetting_counts_the_images_that_lost_more_than_half():
    before, after = torch.tensor([0.91, 0.91, 0.8, 0.5]), torch.tensor([0.91, 0.21, 0.4, 1.0])
    figure = plots.forgetting(before, after, labels=("backbone", "UM"), caption=CAPTION)
    axes = figure.axes[1]
    assert "lost half; 25.00 % of 4 images lost more" in texts(figure)
    counts = axes.collections[0].get_array()
    assert counts.sum() == 4 and counts[8, 36] == 1  # rows: after, columns: before, in fortieths
    assert axes.get_xlabel().endswith("backbone") and axes.get_ylabel().endswith("UM")
    assert [line.get_ydata()[-1] for line in axes.lines] == [1, 0.5]
    with pytest.raises(InputError, match=r"Found probabilities \[4\] before and \[3\] after"):
        plots.forgetting(before, after[:3], caption=CAPTION)
    with pytest.raises(InputError, match="The probabilities after are between"):
        plots.forgetting(before, after + 1, caption=CAPTION)
    with pytest.raises(InputError, match="Found no probabilities, expected at least one"):
        plots.forgetting(before[:0], after[:0], caption=CAPTION)


def test_a_legend_of_long_names_has_fewer_columns():
    names = [f"outlier exposure with energy margins and a loss constraint {n}" for n in range(4)]
    figure = plots.unleashing_curves(dict.fromkeys(names, unleashing_history(3)), 0.1, caption=CAPTION)
    assert clipped(figure) == []
    one_panel = network_table(["MSP"], names, {"SVHN": "far"})
    assert clipped(plots.network_comparison(one_panel, caption=CAPTION)) == []


def test_an_unknown_metric_is_refused():
    sweep = sweep_table([1, 2], {"SVHN": "far"}, parameter="k", is_default=False)
    with pytest.raises(InputError, match="did you mean 'auroc'"):
        plots.sensitivity({"KNN": sweep}, metric="auc", caption=CAPTION)


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
