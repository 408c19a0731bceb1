"""Studies on an experiment: grids of hyper-parameters, comparisons of networks, numbers of training images, and the
detection along a training. Those of banks take seconds, as they never run the network again."""

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ood_helpers import metrics, results
from ood_helpers.backbones.base import Classifier
from ood_helpers.backbones.checkpoints import weights_fingerprint
from ood_helpers.backbones.precision import float32_products
from ood_helpers.banks import FeatureBank, Head
from ood_helpers.config.networks import NetworkRecipe
from ood_helpers.data.transforms import image_batches
from ood_helpers.detectors.base import Detector, create
from ood_helpers.errors import InputError
from ood_helpers.experiment import Experiment
from ood_helpers.files import write_text
from ood_helpers.networks.base import Network
from ood_helpers.progress import track
from ood_helpers.rows import Row, comparison, row_of
from ood_helpers.shipping import seed_results
from ood_helpers.statistics import accuracy
from ood_helpers.storage import Entry

CODE_ALONG = [f"ood_helpers.{module}" for module in ("metrics", "statistics", "banks", "data.transforms")]


def sweep(
    run: Experiment,
    row: str,
    grid: Mapping[str, Sequence[Any]],
    id_set: str = "test",
    ood_sets: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """FPR95 and AUROC in percent of every combination of hyper-parameter values, from the banks.

    Parameters
    ----------
    row : a row of the config or a method; its other hyper-parameters stay as they are
    grid : hyper-parameter -> values
    id_set, ood_sets : the sets compared; OOD set -> group, default: all that are reported

    Returns
    -------
    one line per combination and OOD set: the hyper-parameters, ood_set, group, fpr95, auroc; these two are NaN where
    the detector refuses the values, k beyond the number of training images for example

    Raises
    ------
    InputError : unknown hyper-parameter, value out of range, or every combination refused
    """
    return run.row(row).sweep(grid, id_set, run.ood_sets() if ood_sets is None else ood_sets)


def compare(run: Experiment, detector: Detector) -> pd.DataFrame:
    """FPR95 and AUROC in percent of a detector (not fitted) on its network; one line per OOD set."""
    row = row_of(detector, run.network)
    return pd.DataFrame(comparison(partial(row.scores_of, row.fitted()), "test", run.ood_sets()))


def compare_networks(
    run: Experiment, recipes: Mapping[str, NetworkRecipe], scored_by: Detector | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """FPR95 and AUROC in percent of networks made by several recipes.

    Parameters
    ----------
    recipes : label -> recipe; each network is trained when it is not yet
    scored_by : a detector that scores banks, not fitted; None = what a recipe names: MOS for a group softmax, else MSP

    Returns
    -------
    the results, `method` being the label (without OOD sets related to the outliers that a network was trained with); and
    the means over OOD sets, see results.mean_table
    """
    run.check_accuracy()
    networks = {label: run.network(recipe) for label, recipe in recipes.items()}
    rows = {
        label: Row(label, label, scored_by or create(network.recipe.scored_by), network)
        for label, network in networks.items()
    }

    def compute() -> tuple[pd.DataFrame, pd.DataFrame]:
        lines, resamples = [], {metric: {} for metric in results.METRICS}
        for label, row in track(list(rows.items()), description="networks", unit="network"):
            lines += row.results()
            drawn = row.resamples()
            for metric, of_methods in resamples.items():
                columns = {name: drawn[f"{metric}/{name}"] for name in row.ood_sets()}
                of_methods[label] = pd.DataFrame(columns)
        table = results.with_published(pd.DataFrame(lines), None)
        return table, results.mean_table(table, resamples)

    entry = _comparison_entry(run, networks, {label: row.detector for label, row in rows.items()})
    computed = cache(compute)
    table = entry.table("results", lambda: computed()[0], texts=["method", "tuned_on"]).fillna(
        {"tuned_on": ""}
    )
    return table, entry.table("means", lambda: computed()[1], texts=["method"])


def compare_held_out(
    run: Experiment, recipes: Mapping[Any, NetworkRecipe], detector: Detector
) -> pd.DataFrame:
    """FPR95 and AUROC in percent of networks made by several recipes, ID validation images against the outliers to tune on:
    what a setting may be chosen by.

    Parameters
    ----------
    recipes : label -> recipe
    detector : of logits or features, which learns nothing

    Returns
    -------
    one line per recipe: label, fpr95, auroc
    """
    networks = {str(label): run.network(recipe) for label, recipe in recipes.items()}

    def compute() -> pd.DataFrame:
        lines = []
        for label, network in networks.items():
            bank = network.bank("validation")
            fitted = copy.copy(detector).fit(bank, network.head())
            values = metrics.evaluate(*map(fitted.score_samples, (bank, network.bank("tuning"))))
            lines.append({"label": label, "fpr95": values["fpr95"], "auroc": values["auroc"]})
        return pd.DataFrame(lines)

    detectors = dict.fromkeys(networks, detector)
    entry = _comparison_entry(run, networks, detectors, sets=("validation", "tuning"))
    table = entry.table("held_out", compute)
    return table.assign(label=list(recipes))


def _comparison_entry(
    run: Experiment,
    networks: Mapping[str, Network],
    detectors: Mapping[str, Detector],
    sets: Sequence[str] | None = None,
) -> Entry:
    """Where a comparison of networks is kept."""
    trained = {label: network.training_entry() for label, network in networks.items() if network.trained_here}
    ood_sets = run.ood_sets()
    names = [*run.context.image_sets.id_names(), *ood_sets] if sets is None else sets
    return run.context.store.entry(
        "comparisons",
        code=[
            *("ood_helpers.rows", "ood_helpers.results"),
            *(type(detector) for detector in detectors.values()),
            *(code for network in networks.values() for code in network.code),
        ],
        experiment=[run.config.name, run.seed],
        precision=run.config.features.precision,
        order=[list(networks), [ood.name for ood in run.config.ood]],  # of lines, and of bootstrap draws
        networks={
            label: trained[label].inputs if label in trained else weights_fingerprint(network.model())
            for label, network in networks.items()
        },
        training={label: entry.name for label, entry in trained.items()},
        detectors={
            label: [type(detector).__name__, detector.hyperparameters()]
            for label, detector in detectors.items()
        },
        groups=ood_sets,
        unreported={label: network.unreported() for label, network in networks.items()},
        metrics=run.config.metrics.model_dump(),
        transform=run.context.transform.fingerprint,
        sets={name: run.image_set(name).fingerprint for name in names},
        device=run.context.device.type,
    )


def sample_size(
    run: Experiment, rows: Iterable[str], images_per_class: Iterable[int], draws: int = 3
) -> pd.DataFrame:
    """How many ID training images a method needs: fits on random subsets of the training bank.

    Returns
    -------
    one line per method, number of images and draw: method, images_per_class, draw, and the mean over OOD sets
    of fpr95 and auroc in percent, NaN where a method refuses so few images, and why in `refused`
    """
    chosen, lines, generator = [run.row(name) for name in rows], [], np.random.default_rng(run.seed)
    labels = run.bank("train").load().labels.numpy()
    by_class = [np.flatnonzero(labels == k) for k in range(run.config.id.num_classes)]
    subsets = [
        (count, draw, np.sort(np.concatenate([generator.permutation(own)[:count] for own in by_class])))
        for count in images_per_class
        for draw in range(draws)
    ]
    pairs = list(itertools.product(chosen, subsets))
    for row, (count, draw, taken) in track(pairs, description="sample size", unit="fit"):
        subset = row.network.bank("train").load().take(torch.from_numpy(taken))
        line = {"method": row.label, "images_per_class": count, "draw": draw, "refused": ""}
        try:
            detector, _ = row.fit(copy.copy(row.detector), subset)

            def scores_of(name: str, row: Row = row, detector: Detector = detector) -> Tensor:
                return detector.score_samples(row.bank(name)).cpu()

            compared = pd.DataFrame(comparison(scores_of, "test", run.ood_sets()))
            lines.append(line | compared[["fpr95", "auroc"]].mean().to_dict())
        except InputError as error:
            lines.append(line | {"fpr95": np.nan, "auroc": np.nan, "refused": str(error)})
    return pd.DataFrame(lines)


def describe_banks(run: Experiment) -> pd.DataFrame:
    """One row per bank of the backbone: images, features, seconds and images per second of its forward pass."""
    rows = []
    for name in bank_names(run):
        bank = run.bank(name)
        facts = {key: bank.record[key] for key in ("images", "seconds", "images_per_second", "device")}
        features = run.backbone.head().feature_dim
        rows.append({"set": run.image_set(name).name, **facts, "features": features, "bank": bank.key[:12]})
    return pd.DataFrame(rows)


def bank_names(run: Experiment) -> list[str]:
    """The image sets that have a bank: ID, OOD and, with tuned rows, the outliers to tune on."""
    return [*run.context.image_sets.id_names(), *(["tuning"] if run.tuned_rows() else []), *run.ood_sets()]


def along_training(
    run: Experiment,
    network: Network,
    images: int | None = None,
    detectors: Mapping[str, Detector] | None = None,
) -> pd.DataFrame:
    """Detection and accuracy after each epoch that a network's training has saved; computed once.

    Parameters
    ----------
    images : how many of the ID test set and of each OOD set, evenly spaced; None = all
    detectors : label -> a detector of logits or features that learns nothing; None = MSP and Energy

    Returns
    -------
    one line per epoch (0 = before), detector and OOD set: epoch, detector, ood_set, group, fpr95, auroc and id_accuracy
    in percent, id_score and ood_score (means), and cross_entropy, that of the epoch's training batches (NaN of epoch 0)

    Raises
    ------
    InputError : a network that was not trained here, or a detector that learns or needs images
    """
    if detectors is None:
        detectors = {row.label: row.detector for row in map(run.row, ("msp", "energy"))}
    if not network.trained_here:
        raise InputError(
            f"{network.title} has saved no epochs, expected a network that was trained here and tracked; take another one."
        )
    for label, detector in detectors.items():
        if detector.learns or detector.needs_images:
            raise InputError(
                f"{label} learns from training images or needs images, expected a detector of logits such as "
                "energy along a training; name another one."
            )
    unreported = network.unreported()
    ood_sets = {name: group for name, group in run.ood_sets().items() if name not in unreported}

    def compute() -> pd.DataFrame:
        lines, epochs = [], network.epochs()
        for epoch in track(epochs, description="Saved epochs", unit="epoch"):
            lines += _detection(run, network.at_epoch(epoch), images, detectors, ood_sets, epoch)
        return pd.DataFrame(lines)

    entry = run.context.store.entry(
        "along",
        code=[*CODE_ALONG, _detection, *network.code, *map(type, detectors.values())],
        training=network.training_entry().name,
        network=network.training_entry().inputs,
        images=images,
        sets={name: run.image_set(name).fingerprint for name in ("test", *ood_sets)},
        groups=ood_sets,
        detectors={
            label: [type(detector).__name__, detector.hyperparameters()]
            for label, detector in detectors.items()
        },
    )
    table, history = entry.table("detection", compute), network.history().set_index("epoch")
    column = "train_cross_entropy" if "train_cross_entropy" in history else "train_loss"
    return table.assign(cross_entropy=table.epoch.map(history[column]))


@torch.no_grad()
def _detection(
    run: Experiment,
    classifier: Classifier,
    images: int | None,
    detectors: Mapping[str, Detector],
    ood_sets: Mapping[str, str],
    epoch: int,
) -> list[dict]:
    head, context = Head.of(classifier), run.context

    def bank_of(name: str) -> FeatureBank:
        image_set = run.image_set(name)
        count = len(image_set) if images is None else min(images, len(image_set))
        taken = image_set.take(np.linspace(0, len(image_set) - 1, count).astype(np.int64))
        with float32_products():
            values = torch.cat(
                [
                    classifier.features(context.transform.normalise(pixels.to(context.device))).cpu()
                    for pixels in image_batches(taken, context.transform, 0, count, context.batch_size)
                ]
            )
        labels = None if name != "test" else torch.as_tensor(taken.labels)
        return FeatureBank(values, head.logits(values), labels)

    test, lines = bank_of("test"), []
    id_accuracy = accuracy(test, head)
    fitted = {label: copy.copy(detector).fit(test, head) for label, detector in detectors.items()}
    id_scores = {label: detector.score_samples(test) for label, detector in fitted.items()}
    for name, group in ood_sets.items():
        bank = bank_of(name)
        for label, detector in fitted.items():
            ood_scores = detector.score_samples(bank)
            values = metrics.evaluate(id_scores[label], ood_scores)
            lines.append(
                {"epoch": epoch, "detector": label, "ood_set": name, "group": group}
                | {"fpr95": values["fpr95"], "auroc": values["auroc"], "id_accuracy": id_accuracy}
                | {"id_score": float(id_scores[label].mean()), "ood_score": float(ood_scores.mean())}
            )
    return lines


def collect_results(run: Experiment, seeds: Iterable[int] | None = None) -> pd.DataFrame:
    """The results of all methods and seeds, written to results.csv and returned."""
    seeds = [run.seed] if seeds is None else list(seeds)
    table = pd.concat([run.with_seed(seed).results() for seed in seeds], ignore_index=True)
    path = run.directory / "results.csv"
    results.write_results(table, path)
    return results.read_results(path)  # what is in the file, so that tables, figures and report agree


def collect_means(run: Experiment, table: pd.DataFrame) -> pd.DataFrame:
    """The means over OOD sets with their intervals, see results.mean_table, and with those of the shipped seeds, written to
    means.csv and returned.

    Parameters
    ----------
    table : the results of all methods, as collect_results returns them; tuned rows and those they stand beside
        have means over the sets that the tuned ones are reported on
    """
    parts = [part for part in (results.defaults(table), results.tuning_pairs(table)) if len(part)]
    means = pd.concat(
        results.mean_table(part, {metric: run.resamples(part, metric) for metric in results.METRICS})
        for part in parts
    ).drop_duplicates(["method", "ood_sets"], ignore_index=True)
    by_seed = seed_results(run)
    if by_seed is not None and table.seed.nunique() == 1:
        means = results.with_seeds(means, by_seed)
    path = run.directory / "means.csv"
    write_text(path, means.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    return pd.read_csv(path)
