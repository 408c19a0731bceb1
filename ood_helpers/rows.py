"""A row of the results: a detector on a network, fitted, scored and evaluated on first use, each once."""

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ood_helpers import metrics
from ood_helpers.banks import Bank, DeviceBank
from ood_helpers.config.experiment import ExperimentConfig
from ood_helpers.config.rows import OF_ROWS
from ood_helpers.detectors.base import Detector, create, variants
from ood_helpers.errors import InputError
from ood_helpers.files import sha256_of_json
from ood_helpers.image_sets import ImageSets
from ood_helpers.networks.base import Context, Network, once
from ood_helpers.progress import track
from ood_helpers.results import METRICS, tuned_label
from ood_helpers.storage import Arrays, Entry, Facts

TUNED = "_tuned"  # ends the name of a row whose hyper-parameters were chosen on a grid


class Row:
    """A detector on a network.

    Parameters
    ----------
    name : of the row in the config
    label : the name in tables and figures
    detector : not fitted; it stays so
    """

    tuned = False

    def __init__(self, name: str, label: str, detector: Detector, network: Network) -> None:
        self.name, self.label, self.network = name, label, network
        self._detector = detector
        self._parts: dict[str, Row] = {}
        self.kept: dict[tuple, Any] = {}

    @property
    def context(self) -> Context:
        return self.network.context

    @property
    def detector(self) -> Detector:
        """The detector, not fitted."""
        return self._detector

    def same_detector(self, detector: Detector) -> bool:
        """Whether it scores by the same method with the same hyper-parameters."""
        own = self.detector
        return type(own) is type(detector) and own.hyperparameters() == detector.hyperparameters()

    # ---- what it rests on -------------------------------------------------------------------------------

    def ood_sets(self) -> dict[str, str]:
        """OOD set -> group of those that it is reported on."""
        unreported = self.network.unreported()
        sets = self.context.image_sets.ood_sets()
        return {name: group for name, group in sets.items() if name not in unreported}

    def fitted_on(self) -> list[str]:
        """The image sets that its detector learns from."""
        validates = self.detector.needs_validation and "validation" in self.context.image_sets.id_names()
        return [self.detector.fit_set, *(["validation"] if validates else [])]

    def rests_on(self) -> list[str]:
        """The image sets that its detector learns from or was tuned on."""
        return self.fitted_on()

    def bank(self, name: str) -> Bank:
        """The bank of an image set as the detector takes it."""
        return (
            self.network.image_bank(name)
            if self.detector.needs_images
            else self._placed(self.network.bank(name))
        )

    def _placed(self, bank: Bank) -> Bank:
        device = self.context.device
        return bank if device.type == "cpu" else DeviceBank(bank, device)

    # ---- fitting and scoring ----------------------------------------------------------------------------

    def fitted(self) -> Detector:
        """The detector, fitted."""
        return self._fitted()[0]

    @once
    def _fitted(self) -> tuple[Detector, float]:
        return self.fit(copy.copy(self.detector))

    def fit(self, detector: Detector, train_bank: Bank | None = None) -> tuple[Detector, float]:
        """Fit a detector on the network's banks, or another training bank; it and the seconds, with those of what it
        computes at its first score."""
        validation_bank = None
        if detector.needs_validation and "validation" in self.context.image_sets.id_names():
            validation_bank = self.network.image_bank("validation")
        if train_bank is None:
            # One that learns nothing needs no pass of the training images.
            name = detector.fit_set if detector.learns else "test"
            banks = self.network.image_bank if detector.needs_training_images else self.network.bank
            train_bank = banks(name)
        first = next(self.network.bank("test").shards()).take(slice(1))
        begin = time.perf_counter()
        detector.fit(train_bank, self.network.head(), validation_bank)
        if not detector.needs_images:
            detector.score_samples(self._placed(first))
        return detector, time.perf_counter() - begin

    def scores_of(self, detector: Detector, name: str) -> Tensor:
        """Scores [N] of an image set, on the CPU, by a detector that was fitted as this row is; those of its parts are taken
        from the store."""
        if not detector.parts:
            return detector.score_samples(self.bank(name)).cpu()
        parts = {part: self._part(spec)._stored(name)[0] for part, spec in detector.parts.items()}
        return detector.join({part: torch.from_numpy(scores) for part, scores in parts.items()})

    def _part(self, detector: Detector) -> "Row":
        key = repr(detector)
        if key not in self._parts:
            self._parts[key] = Row(self.name, detector.label, detector, self.network)
        return self._parts[key]

    def _code(self) -> list[Any]:
        """What computes scores from the banks of its network."""
        detectors = self.detector, *self.detector.parts.values()
        return [*map(type, detectors), *self.network.code]

    @cached_property
    def _entry(self) -> Entry:
        return self.context.store.entry(
            "scores",
            code=[*self._code(), Row.fit, Row.scores_of],
            detector=[type(self.detector).__name__, self.detector.hyperparameters()],
            fitted_on={name: self.network.key(name) for name in self.fitted_on()},
        )

    def _stored(self, name: str) -> tuple[np.ndarray, float]:
        """Scores of an image set, and the seconds they took; computed once."""

        def compute() -> tuple[Arrays, Facts]:
            detector, _ = self.fitted(), self.bank(name)  # the forward pass is not its cost
            begin = time.perf_counter()
            scores = self.scores_of(detector, name)
            seconds = time.perf_counter() - begin
            # Those of its parts may have been there already.
            for spec in detector.parts.values():
                seconds += self._part(spec)._stored(name)[1]
            return {"scores": scores.numpy()}, {"seconds": seconds}

        for spec in self.detector.parts.values():  # outside the clock
            self._part(spec)._stored(name)
        arrays, facts = self._entry.arrays(self.network.key(name), compute)
        return arrays["scores"], facts["seconds"]

    @once
    def _fit_facts(self) -> Facts:
        """What fitting it took and what it has learned; computed once."""

        def compute() -> Facts:
            detector, seconds = self._fitted()
            return {"seconds": seconds, "learned": detector.learned, "extra_passes": detector.extra_passes}

        return self._entry.json("fit", compute, ("seconds", "learned", "extra_passes"))

    def scores(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """ID test scores [N] and OOD set -> scores; higher = more in-distribution."""
        self.network.check_accuracy()
        self._fit_facts()  # by the clock, before anything is scored
        return self._stored("test")[0], {name: self._stored(name)[0] for name in self.ood_sets()}

    # ---- results ----------------------------------------------------------------------------------------

    def tuned_on(self) -> str:
        """On what its hyper-parameters were chosen; empty for the config's own."""
        ones = self.detector, *self.detector.parts.values()
        against = next((one.tuned_against for one in ones if one.tuned_against), "")
        images = len(self.context.image_sets["validation"]) if against else 0
        return self._leak() or (f"ID validation ({images} images) against {against}" if against else "")

    def _leak(self) -> str:
        fit_set = self.detector.fit_set
        return "" if fit_set == "train" else f"fitted on the labelled ID {fit_set} set, a leak"

    def hyperparameters(self) -> dict[str, Any]:
        """Those of the detector, what it has learned, and how its network was made; ready for JSON."""
        settings = self.detector.hyperparameters()
        if self.network.name:
            settings["network"] = {"name": self.network.name, **self.network.settings()}
        learned = self._fit_facts()["learned"]
        return settings | ({"learned": learned} if learned else {})

    @once
    def resamples(self) -> dict[str, np.ndarray]:
        """The bootstrap resamples {"fpr95/<set>": [R], "auroc/<set>": [R]} in percent; computed once."""
        id_scores, ood_scores = self.scores()
        options = self.context.config.metrics
        order = [
            ood.name for ood in self.context.config.ood
        ]  # its place decides a set's draws, whatever is missing

        def compute() -> tuple[Arrays, Facts]:
            found: Arrays = {}
            for name, scores in ood_scores.items():
                drawn = metrics.resampled(
                    id_scores,
                    scores,
                    resamples=options.bootstrap_resamples,
                    seed=options.bootstrap_seed,
                    ood_set=order.index(name),
                )
                found |= {f"{metric}/{name}": draws for metric, draws in drawn.items()}
            return found, {}

        entry = self.context.store.entry(
            "intervals",
            code=["ood_helpers.metrics"],
            scores=self._entry.name,
            sets={name: [order.index(name), self.network.key(name)] for name in ood_scores},
            test=self.network.key("test"),
            options=options.model_dump(),
        )
        return entry.arrays("resamples", compute)[0]

    def results(self) -> list[dict[str, Any]]:
        """One line of the results per OOD set that it is reported on."""
        accuracy = self.network.check_accuracy()
        (id_scores, ood_scores), drawn, groups = self.scores(), self.resamples(), self.ood_sets()
        lines = []
        for name, scores in ood_scores.items():
            values = metrics.evaluate(id_scores, scores)
            for metric in METRICS:
                values[f"{metric}_lo"], values[f"{metric}_hi"] = metrics.interval(drawn[f"{metric}/{name}"])
            sets = [*self.rests_on(), "test", name]
            images = [self.context.image_sets[image_set].fingerprint for image_set in sets]
            lines.append(
                {
                    "experiment": self.context.config.name,
                    "seed": self.context.seed,
                    "method": self.label,
                    "ood_set": name,
                    "group": groups[name],
                    "n_id": len(id_scores),
                    "n_ood": len(scores),
                    **values,
                    "id_accuracy": accuracy,
                    "score_seconds": self._stored(name)[1],
                    "hyperparameters": json.dumps(self.hyperparameters()),
                    "data_sha256": sha256_of_json(images)[:16],
                    "tuned_on": self.tuned_on(),
                    "fit_seconds": self.fit_seconds(),
                    "extra_passes": self._fit_facts()["extra_passes"],
                }
            )
        return lines

    def fit_seconds(self) -> float:
        """What fitting it took."""
        return self._fit_facts()["seconds"]

    # ---- grids ------------------------------------------------------------------------------------------

    def sweep(
        self, grid: Mapping[str, Sequence[Any]], id_set: str, ood_sets: Mapping[str, str]
    ) -> pd.DataFrame:
        """FPR95 and AUROC in percent of every combination of hyper-parameter values; see `studies.sweep`."""
        lines, refusal = [], None
        combinations = variants(self.fitted(), grid)
        for settings, detector in track(combinations, description=f"{self.label} sweep", unit="setting"):
            try:
                compared = comparison(partial(self.scores_of, detector), id_set, ood_sets)
            except InputError as error:
                refusal, nothing = error, {"fpr95": np.nan, "auroc": np.nan}
                compared = [{"ood_set": name, "group": group} | nothing for name, group in ood_sets.items()]
            lines += [settings | line for line in compared]
        if refusal and all(np.isnan(line["auroc"]) for line in lines):
            raise refusal
        # objects, so that None (off) and the type of each value survive
        table = pd.DataFrame(lines, dtype=object)
        return table.astype({"ood_set": str, "group": str, "fpr95": float, "auroc": float})


def comparison(
    scores_of: Callable[[str], Tensor], id_set: str, ood_sets: Mapping[str, str]
) -> list[dict[str, Any]]:
    """FPR95 and AUROC in percent of the scores [N] of image sets, one line per OOD set."""
    id_scores, lines = scores_of(id_set), []
    for name, group in ood_sets.items():
        values = metrics.evaluate(id_scores, scores_of(name))
        lines.append({"ood_set": name, "group": group, "fpr95": values["fpr95"], "auroc": values["auroc"]})
    return lines


class TunedRow(Row):
    """A row with the hyper-parameters that are best on a grid, beside the row that has the config's.

    Parameters
    ----------
    base : the row whose grid it is
    """

    tuned = True

    def __init__(self, base: Row) -> None:
        super().__init__(base.name + TUNED, tuned_label(base.label), base.detector, base.network)
        self.base, self.tuning = base, base.context.config.tuning

    @property
    def detector(self) -> Detector:
        """The detector with the chosen values, not fitted."""
        return self._chosen

    @cached_property
    def _chosen(self) -> Detector:
        table, grid = self.table(), self.tuning.grids[self.base.name]
        best = table.index[table.chosen].item()
        return variants(self.base.detector, grid)[best][1]

    def table(self) -> pd.DataFrame:
        """The grid on the ID validation images against the outliers to tune on: one line per combination, with the
        hyper-parameters, fpr95 and auroc in percent, and whether it is the `chosen` one, the first of the best."""
        table = pd.DataFrame(self._grid["lines"], dtype=object).astype({"fpr95": float, "auroc": float})
        values = table[self.tuning.metric]
        best = values.idxmin() if self.tuning.metric == "fpr95" else values.idxmax()
        return table.assign(chosen=table.index == best)

    @cached_property
    def _grid(self) -> Facts:
        base, grid = self.base, self.tuning.grids[self.base.name]

        def compute() -> Facts:
            for name in ("validation", "tuning"):
                base.bank(name)
            base.fitted()
            begin = time.perf_counter()
            table = base.sweep(grid, "validation", {"tuning": self.tuning.name})
            lines = table.drop(columns=["ood_set", "group"]).to_dict("records")
            return {"seconds": time.perf_counter() - begin, "lines": lines}

        entry = self.context.store.entry(
            "grids",
            code=["ood_helpers.metrics", *base._code(), Row.fit, Row.scores_of, Row.sweep, comparison],
            detector=[type(base.detector).__name__, base.detector.hyperparameters()],
            grid=list(grid.items()),  # the first of the best is chosen, so their order counts
            banks={name: base.network.key(name) for name in (*base.fitted_on(), "validation", "tuning")},
        )
        return entry.json("grid", compute, ("seconds", "lines"))

    def ood_sets(self) -> dict[str, str]:
        return {name: group for name, group in super().ood_sets().items() if name not in self.tuning.related}

    def rests_on(self) -> list[str]:
        return list(dict.fromkeys([*self.base.fitted_on(), "validation", "tuning"]))

    def tuned_on(self) -> str:
        image_sets, leak = self.context.image_sets, self._leak()
        images, outliers = len(image_sets["validation"]), len(image_sets["tuning"])
        return leak or (
            f"{METRICS[self.tuning.metric][0]} on {images:,} ID validation images against "
            f"{outliers:,} of {self.tuning.name}"
        )

    def fit_seconds(self) -> float:
        return self.base.fit_seconds() + self._grid["seconds"]


def make_row(name: str, settings: Mapping[str, Any], network: Callable[[str], Network]) -> Row:
    """A row of a config.

    Parameters
    ----------
    settings : hyper-parameters, and three keys that are none: `detector`, the name of the detector where it is not that of
        the row; `network`, the one that is scored (default: the backbone, for MOS `group`, for DFB `dfb`); and `label`, the
        name shown in tables and figures (default: the method's own, and the network's where it is not the default). For
        example {"detector": "himplos", "smoothing": False, "label": "HIM only"}
    network : gives a network by its name, the backbone by an empty one

    Raises
    ------
    InputError : as `create`, or a network of another kind than the detector scores
    """
    settings = dict(settings)
    kind, chosen, label = (settings.pop(key, None) for key in OF_ROWS)
    try:
        detector = create(kind or name, **settings)
        return row_of(detector, network, chosen, label, name)
    except InputError as error:
        raise InputError(f"detectors.{name}: {error}") from None


def row_of(
    detector: Detector,
    network: Callable[[str], Network],
    network_name: str | None = None,
    label: str | None = None,
    name: str | None = None,
) -> Row:
    """A row of a detector that is not fitted; parameters as for `make_row`."""
    chosen = detector.default_network if network_name is None else network_name
    of_network = network(chosen)
    recipe, where = of_network.recipe, chosen or "of the backbone"
    if detector.needs_background and not getattr(recipe, "background", False):
        raise InputError(
            f"{detector.title} scores a network with a background class, but the network {where} has none; name one with "
            "method: dense, or objective: ntom."
        )
    softmax = getattr(recipe, "softmax", "flat")
    if softmax != detector.softmax:
        raise InputError(
            f"{detector.title} scores a {detector.softmax} softmax, but the network {where} has a {softmax} softmax; name "
            "another network."
        )
    if label is None:
        label = detector.label
        if chosen != detector.default_network:
            own, closing = label.removesuffix(")"), label.endswith(")")
            label = f"{own}, {chosen})" if closing else f"{own} ({chosen})"
    return Row(name or str(label), str(label), detector, of_network)


def make_rows(config: ExperimentConfig, network: Callable[[str], Network]) -> dict[str, Row]:
    """The rows of a config, by name and in order.

    Raises
    ------
    InputError : as `make_row`, two rows with the same label, or a grid that a detector refuses
    """
    rows: dict[str, Row] = {}
    for name, settings in config.detectors.items():
        row = make_row(name, settings, network)
        for other in rows.values():
            if other.label == row.label:
                raise InputError(
                    f"The detectors {other.name!r} and {name!r} have the same label {row.label!r}, expected distinct ones; "
                    f"give one of them its own, for example label: {name}."
                )
        rows[name] = row
    for name, grid in ({} if config.tuning is None else config.tuning.grids).items():
        if name + TUNED in rows:
            raise InputError(f"The row {name + TUNED} is taken by the tuned {name}; give it another name.")
        try:  # a wrong grid is refused before anything long starts
            variants(rows[name].detector, grid)
        except InputError as error:
            raise InputError(f"tuning.grids.{name}: {error}") from None
    return rows


def check_tuned_apart(rows: Mapping[str, Row], image_sets: ImageSets) -> None:
    """Raise InputError where a network that was trained with outliers is tuned on the same ones."""
    if not (image_sets.has("tuning") and image_sets.has("outliers")):
        return
    exposed = [
        name for name, row in rows.items() if "outliers" in getattr(row.network.recipe, "image_sets", ())
    ]
    exposed = [name for name in exposed if name in image_sets.config.tuning.grids]
    shared = image_sets["tuning"].shared_with(image_sets["outliers"]) if exposed else 0
    if shared:
        raise InputError(
            f"tuning.grids.{exposed[0]} tunes a network trained with outliers on {shared:,} of the same images, expected "
            "others; take other images for tuning or outliers, or remove the grid."
        )
