"""An experiment, as notebooks open it: image sets -> networks -> banks -> rows -> results, each computed once and kept."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ood_helpers import plots, results
from ood_helpers.backbones.precision import resolve_device
from ood_helpers.banks import Bank
from ood_helpers.config.base import PROJECT_ROOT, resolve_path
from ood_helpers.config.experiment import ExperimentConfig
from ood_helpers.config.loader import changes_as_name, listed, load_config
from ood_helpers.config.networks import NetworkRecipe
from ood_helpers.data.image_set import ImageSet
from ood_helpers.detectors.base import DETECTORS, Detector
from ood_helpers.errors import InputError, nearest
from ood_helpers.image_sets import ImageSets
from ood_helpers.networks.backbone import Backbone
from ood_helpers.networks.base import NETWORKS, Context, Network
from ood_helpers.rows import Row, TunedRow, check_tuned_apart, make_row, make_rows, row_of
from ood_helpers.storage import Shipped, Store


class Experiment:
    """One experiment with one seed.

    Below `run_dir`: banks/, models/ and others (shared by all, see `storage`), cache/ (unpacked arrays, hashes of files) and
    <name>/ with results.csv. Figures and tables go to `figures_dir`/<name>/, of other seeds than 0 to seed<n>/ below it. Changed settings are part of the name: a trial never writes over the experiment.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        run_dir: Path,
        figures_dir: Path,
        *,
        seed: int = 0,
        device: str = "auto",
        skip_missing: bool = False,
        skip_unreadable: bool = False,
        changes: tuple[str, ...] = (),
        image_sets: ImageSets | None = None,
    ) -> None:
        self.config, self.seed, self.changes = config, seed, changes
        self.run_dir, self.figures_root = Path(run_dir), Path(figures_dir)
        self.image_sets = image_sets or ImageSets(
            config, self.run_dir / "cache", skip_missing=skip_missing, skip_unreadable=skip_unreadable
        )
        store = Store(self.run_dir, Shipped.of(config.weights))
        self.context = Context(config, seed, resolve_device(device), store, self.image_sets)
        self.backbone = Backbone(self.context)
        self._networks: dict[str, Network] = {}
        self._rows = make_rows(config, self.network)
        self._others: dict[Any, Row] = {}

    @classmethod
    def open(
        cls,
        experiment: str | Path = "digits",
        *,
        data_root: str = "",
        run_dir: str = "",
        figures_dir: str = "",
        seed: int = 0,
        device: str = "auto",
        overrides: str | Iterable[str] = (),
        skip_missing: bool = False,
        skip_unreadable: bool = False,
    ) -> "Experiment":
        """Open an experiment by name or config path; empty folders mean data/, runs/ and runs/figures/ of the project.

        Raises
        ------
        InputError : unknown experiment, wrong setting, device that is not there
        """
        runs, changes = resolve_path(run_dir or PROJECT_ROOT / "runs"), listed(overrides)
        return cls(
            load_config(experiment, data_root or None, changes),
            runs,
            resolve_path(figures_dir or runs / "figures"),
            changes=changes,
            seed=seed,
            device=device,
            skip_missing=skip_missing,
            skip_unreadable=skip_unreadable,
        )

    def with_seed(self, seed: int) -> "Experiment":
        """The same experiment with another seed."""
        if seed == self.seed:
            return self
        same = {"device": str(self.context.device), "changes": self.changes, "image_sets": self.image_sets}
        return Experiment(self.config, self.run_dir, self.figures_root, seed=seed, **same)

    # ---- folders and names ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """That of the config and of the settings that were changed."""
        return "+".join([self.config.name, *filter(None, [changes_as_name(self.changes)])])

    @property
    def directory(self) -> Path:
        """What this experiment writes: results.csv, means.csv, report.html, executed notebooks."""
        return self.run_dir / self.name

    @property
    def figures_directory(self) -> Path:
        directory = self.figures_root / self.name
        return directory if self.seed == 0 else directory / f"seed{self.seed}"

    @property
    def caption(self) -> str:
        """What every figure says of its origin."""
        precision = self.config.features.precision
        rounded = "" if precision == "float32" else f" · forward pass in {precision}"
        changed = f" · changed: {', '.join(self.changes)}" if self.changes else ""
        return f"{self.config.name} · seed {self.seed}{rounded}{changed}"

    # ---- image sets -------------------------------------------------------------------------------------

    def check(self) -> None:
        """Open (and fetch) every image set, find every checkpoint and read every file of groups, before anything long
        starts.

        Raises
        ------
        InputError : names all that is missing, each with its folder and command; sets that must be apart are not
        """
        self.image_sets.check()
        self.tuned_rows()
        for name in self.config.networks:
            self.network(name).check()

    def image_set(self, name: str) -> ImageSet:
        """An image set by name: train, validation, test, tuning, outliers or an OOD set; see `ImageSets`."""
        return self.image_sets[name]

    def ood_sets(self) -> dict[str, str]:
        """OOD set -> near or far, without those that are missing and skipped; near sets first."""
        return self.image_sets.ood_sets()

    def class_names(self) -> tuple[str, ...]:
        """The names of the ID classes."""
        return self.context.class_names()

    # ---- networks and banks -----------------------------------------------------------------------------

    def network(self, name: str | NetworkRecipe = "") -> Network:
        """A network by its name in the config or by a recipe, the backbone by an empty name.

        Raises
        ------
        InputError : no such network
        """
        recipes = self.config.all_networks()
        if isinstance(name, NetworkRecipe):
            known = [other for other, recipe in recipes.items() if recipe == name]
            if not known:  # what the config expects is of its own network
                recipe = name.model_copy(update={"expected_accuracy": None})
                return self._make_network(recipe, "made for a comparison")
            name = known[0]
        if not name:
            return self.backbone
        if name not in recipes:
            raise InputError(f"No network {name!r} in {self.config.name}; {nearest(name, recipes)}")
        if name not in self._networks:
            self._networks[name] = self._make_network(recipes[name], name)
        return self._networks[name]

    def _make_network(self, recipe: NetworkRecipe, name: str) -> Network:
        return NETWORKS[recipe.method](self.context, recipe, name, self.backbone)

    def training_methods(self) -> set[str]:
        """How those networks of the config and of rows are made that a notebook has something to show of: `dense`, ..."""
        names = {*self.config.networks, *(row.network.name for row in self._rows.values())}
        recipes = [recipe for name, recipe in self.config.all_networks().items() if name in names]
        return {
            recipe.method
            for recipe in recipes
            if recipe.has_notebook and not set(recipe.image_sets) & self.image_sets.missing.keys()
        }

    def bank(self, name: str) -> Bank:
        """The backbone's feature bank of an image set, computed on first use."""
        return self.backbone.bank(name)

    def check_accuracy(self) -> float:
        """Percent of ID test images that the backbone classifies correctly, compared with the config's expectation.

        Raises
        ------
        InputError : further than `tolerance` from `expected_accuracy`
        """
        return self.backbone.check_accuracy()

    # ---- rows -------------------------------------------------------------------------------------------

    def rows(self) -> dict[str, Row]:
        """The rows of the config by name, in order; see `tuned_rows` for those beside them."""
        return dict(self._rows)

    def tuned_rows(self) -> dict[str, TunedRow]:
        """Row that has a grid -> the row beside it, with the hyper-parameters that are best on the grid."""
        return self._tuned if self.image_sets.has("tuning") else {}

    @cached_property
    def _tuned(self) -> dict[str, TunedRow]:
        check_tuned_apart(self._rows, self.image_sets)
        return {name: TunedRow(self._rows[name]) for name in self.config.tuning.grids}

    def row(self, name: str) -> Row:
        """A row of the config, a tuned one, or a method that the config leaves out with its defaults.

        Raises
        ------
        InputError : neither a row nor a method
        """
        if name in self._rows:
            return self._rows[name]
        tuned = {row.name: row for row in self.tuned_rows().values()}
        if name in tuned:
            return tuned[name]
        if name not in self._others:
            if name not in DETECTORS:
                valid = [*self._rows, *tuned, *DETECTORS]
                raise InputError(f"No detector {name!r} in {self.config.name}; {nearest(name, valid)}")
            self._others[name] = make_row(name, {}, self.network)
        return self._others[name]

    def row_of(self, detector: Detector, network: str | None = None, label: str | None = None) -> Row:
        """The row of a detector (not fitted) on a network, by default the detector's own: that of the config where it has
        one."""
        wanted = row_of(detector, self.network, network, label)
        for row in self._rows.values():
            if row.network is wanted.network and row.same_detector(detector):
                return row
        return self._others.setdefault((wanted.label, wanted.network, repr(detector)), wanted)

    def detector(self, name: str) -> Detector:
        """The detector of a row, fitted on the ID training bank."""
        return self.row(name).fitted()

    def scores(self, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """ID test scores [N] and OOD set -> scores of a row; higher = more in-distribution."""
        return self.row(name).scores()

    # ---- results ----------------------------------------------------------------------------------------

    def results(self, rows: Sequence[str | Row] | None = None) -> pd.DataFrame:
        """The long-form results of some rows (default: all of the config and the tuned ones), one line per method and OOD
        set."""
        lines = [line for row in self._chosen(rows) for line in row.results()]
        return results.with_published(pd.DataFrame(lines), self.config.published)

    def _chosen(self, rows: Sequence[str | Row] | None) -> list[Row]:
        if rows is None:
            return [*self._rows.values(), *self.tuned_rows().values()]
        return [row if isinstance(row, Row) else self.row(row) for row in rows]

    def resamples(self, table: pd.DataFrame, metric: str) -> dict[str, pd.DataFrame]:
        """One metric in percent on the bootstrap resamples of the methods in a results table, mean over its seeds.

        Every method is evaluated on the same resampled images, so differences between methods are paired.

        Returns
        -------
        method -> one column per OOD set, one line per resample
        """
        runs, averaged = [self.with_seed(int(seed)) for seed in table.seed.unique()], {}
        of_label = [{row.label: row for row in run._chosen(None)} for run in runs]
        for method, own in table.groupby("method", sort=False).ood_set:
            drawn = [rows[method].resamples() for rows in of_label]
            columns = {
                name: np.mean([found[f"{metric}/{name}"] for found in drawn], axis=0) for name in own.unique()
            }
            averaged[method] = pd.DataFrame(columns)
        return averaged

    # ---- figures and tables -----------------------------------------------------------------------------

    def save_figure(self, figure: Figure, name: str) -> Figure:
        """Write figures/<experiment>/<name>.png and .svg and hand the figure back to be shown.

        `name` starts with the notebook's own name, for example 12_line_masks: so run_all.py knows whose it is.
        """
        plots.save_figure(figure, self.figures_directory, name)
        return figure

    def export_tables(self, table: pd.DataFrame, stem: str, means: pd.DataFrame | None = None) -> None:
        """Write a results table to figures/<experiment>/<stem>_fpr95 and _auroc as CSV, Markdown and LaTeX."""
        results.export_tables(table, self.figures_directory, stem, self.image_sets.missing_ood(), means)
