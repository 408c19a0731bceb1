"""An experiment as stages: image sets -> backbone -> banks -> scores -> results, each done once and kept.

A stage's output lies under a fingerprint of everything it depends on; it is written atomically and found
again by the next notebook, run or process. Nothing is computed before it is asked for.
"""

import copy
import inspect
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ood_helpers import features, foreground, groups, metrics, networks, plots, results
from ood_helpers.backbones import ARCHITECTURES, Classifier, load_checkpoint, weights_fingerprint
from ood_helpers.config import (
    PROJECT_ROOT,
    DenseConfig,
    EpochTrainingConfig,
    ExperimentConfig,
    FineTuningConfig,
    GroupsConfig,
    Images,
    LossConstraintConfig,
    NetworkRecipe,
    OutlierExposureConfig,
    UnleashingMaskConfig,
    load_config,
    resolve_path,
    training_method,
)
from ood_helpers.data import ImageSet, Transform, image_batches, open_image_set
from ood_helpers.detectors import DETECTORS, DFB, Detector, DFBBackground, create, create_all
from ood_helpers.errors import InputError, MissingDataError, nearest
from ood_helpers.features import (
    Bank,
    FeatureBank,
    Head,
    ImageBank,
    StoredBank,
    accuracy,
    class_means,
    pass_batch_size,
    resolve_device,
)
from ood_helpers.files import atomic_path, locked, sha256_of_json, write_json, write_text
from ood_helpers.networks import (
    SHORT,
    Backbone,
    DenseNetwork,
    ExperimentNetwork,
    ExposedNetwork,
    FineTunedNetwork,
    MadeNetwork,
    OutlierClassNetwork,
    UnleashedNetwork,
)
from ood_helpers.progress import track
from ood_helpers.training import (
    ESTIMATE_VERSION,
    LossConstraint,
    check_labels,
    checkpoint_path,
    estimate_constraint,
    load_weights,
)

ID_SETS = ("train", "validation", "test")
TUNED = "_tuned"  # ends the name of a row whose hyper-parameters were chosen on a grid


class Experiment:
    """One experiment with one seed: what the notebooks open in their first cell.

    Folders below `run_dir`: banks/ and models/ (shared by all experiments, named by content), cache/ (unpacked
    arrays and hashes of files), <experiment>/seed<n>/ (scores) and <experiment>/results.csv. Figures and tables
    go to `figures_dir`/<experiment>/, those of a seed other than 0 to seed<n>/ below it.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        run_dir: Path,
        figures_dir: Path,
        seed: int = 0,
        device: str = "auto",
        skip_missing: bool = False,
        skip_unreadable: bool = False,
    ) -> None:
        self.config, self.seed = config, seed
        self.device = resolve_device(device)
        self.run_dir, self.figures_root = Path(run_dir), Path(figures_dir)
        self.skip_missing, self.skip_unreadable = skip_missing, skip_unreadable
        self.detectors: dict[str, Detector] = create_all(config.detectors)
        for row, detector in self.detectors.items():
            self._check_softmax(row, detector)
        self._check_depths()
        self._defaults: dict[str, Detector] = {}
        self._tuned: dict[str, Detector] = {}
        self._fit_seconds: dict[str, float] = {}
        if config.tuning is not None:
            for row, grid in config.tuning.grids.items():
                try:  # a wrong grid is refused before anything long starts
                    list(self.detectors[row].variants(grid))
                except InputError as error:
                    raise InputError(f"tuning.grids.{row}: {error}") from None
        self.transform = Transform(**dict(config.transform))
        self.missing: dict[str, str] = {}
        self.tuning_missing, self.outliers_missing = "", ""
        self._checked = False
        self._image_sets: dict[str, ImageSet] = {}
        self.backbone = Backbone(self)
        self._fine_tuned: dict[str, MadeNetwork] = {}
        self._starts: dict[str | int, Classifier] = {}

    def _check_softmax(self, row: str, detector: Detector) -> None:
        """A wrong kind of head is refused before anything long starts; `fit` would refuse it, too."""
        recipe = self.networks[detector.network] if detector.network else None
        if isinstance(detector, DFB | DFBBackground) and not (recipe is not None and recipe.background):
            raise InputError(
                f"detectors.{row}: {detector.title} scores a network with a background class, but the network "
                f"{detector.network or 'of the backbone'} has none; name one with method: dense, or objective: ntom."
            )
        if isinstance(detector, DFB) and detector.temperature is None and detector.needs_images:
            raise InputError(
                f"detectors.{row}: temperature is null and its host needs images, expected a number: the banks of the "
                "training images, from which it would be learned, hold none; give one."
            )
        grouped = recipe is not None and recipe.softmax_groups is not None
        if grouped != detector.group_softmax:
            kinds = ["a flat softmax", "a group softmax"]
            raise InputError(
                f"detectors.{row}: {detector.title} scores {kinds[detector.group_softmax]}, but the network "
                f"{detector.network or 'of the backbone'} has {kinds[grouped]}; name another network."
            )

    def _check_depths(self) -> None:
        """As for the softmax: a depth that the backbone does not have."""
        architecture = self.config.backbone.architecture
        blocks, ablations = len(ARCHITECTURES[architecture].blocks), self.config.mos_ablations
        depths = {
            f"networks.{name}.depth": recipe.depth
            for name, recipe in self.config.networks.items()
            if isinstance(recipe, FineTuningConfig)
        }
        depths |= {"mos_ablations.depths": max(ablations.depths, default=0)} if ablations else {}
        if self.config.dfb_ablations:
            depths["dfb_ablations.recipe.depth"] = self.config.dfb_ablations.recipe.depth
        for key, depth in depths.items():
            if depth > blocks:
                raise InputError(
                    f"{key} is {depth}, expected -1 to {blocks}, the number of blocks of {architecture}; lower it."
                )

    @classmethod
    def open(
        cls,
        experiment: str | Path = "digits",
        data_root: str = "",
        run_dir: str = "",
        figures_dir: str = "",
        seed: int = 0,
        device: str = "auto",
        overrides: Iterable[str] = (),
        skip_missing: bool = False,
        skip_unreadable: bool = False,
    ) -> "Experiment":
        """Open an experiment by name or config path; empty folders mean data/, runs/ and figures/ of the project.

        Raises
        ------
        InputError : unknown experiment, wrong setting, device that is not there
        """
        config = load_config(experiment, data_root or None, overrides)
        folders = (
            resolve_path(run_dir or PROJECT_ROOT / "runs"),
            resolve_path(figures_dir or PROJECT_ROOT / "figures"),
        )
        return cls(config, *folders, seed, device, skip_missing, skip_unreadable)

    def with_seed(self, seed: int) -> "Experiment":
        """The same experiment with another seed."""
        if seed == self.seed:
            return self
        other = Experiment(
            self.config,
            self.run_dir,
            self.figures_root,
            seed,
            str(self.device),
            self.skip_missing,
            self.skip_unreadable,
        )
        other.missing, other.tuning_missing = self.missing, self.tuning_missing
        other.outliers_missing = self.outliers_missing
        other._image_sets, other._checked = self._image_sets, self._checked
        return other

    # ---- folders and names ------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        """What this experiment writes: results.csv, means.csv, report.html, executed notebooks."""
        return self.run_dir / self.config.name

    @property
    def seed_directory(self) -> Path:
        return self.directory / f"seed{self.seed}"

    def scores_directory(self, row: str) -> Path:
        """Where a row's scores are kept: for each seed where a network is trained here, else once for all."""
        network = self._network_of(self._unfitted(self._base(row)))
        trained = self.backbone.trained_here or network.trained_here
        return (self.seed_directory if trained else self.directory) / "scores"

    @property
    def figures_directory(self) -> Path:
        directory = self.figures_root / self.config.name
        return directory if self.seed == 0 else directory / f"seed{self.seed}"

    @property
    def caption(self) -> str:
        """What every figure says of its origin."""
        precision = self.config.features.precision
        rounded = "" if precision == "float32" else f" · forward pass in {precision}"
        return f"{self.config.name} · seed {self.seed}{rounded}"

    @property
    def class_names(self) -> tuple[str, ...]:
        names = self.config.id.class_names or self.image_set("test").class_names
        return names or tuple(map(str, range(self.config.id.num_classes)))

    @property
    def id_names(self) -> list[str]:
        """Those of train, validation and test that the config has."""
        return [name for name in ID_SETS if getattr(self.config.id, name) is not None]

    @property
    def checkpoints(self) -> list[str]:
        """Those of the backbone, of the networks that are not trained here, and those that trainings start from."""
        recipes = self.config.networks.values()
        starts = [recipe.start for recipe in recipes if isinstance(recipe, EpochTrainingConfig)]
        files = [
            entry.checkpoint for entry in (self.config.backbone, *recipes) if entry.checkpoint is not None
        ]
        return files + [start for start in starts if isinstance(start, str) and start not in ("last", "best")]

    @property
    def ood_groups(self) -> dict[str, str]:
        """OOD set -> near or far, without those that are missing and skipped; near sets first."""
        self.check_images()
        groups = {ood.name: ood.group for ood in self.config.ood if ood.name not in self.missing}
        return dict(sorted(groups.items(), key=lambda item: item[1] == "far"))

    # ---- image sets -------------------------------------------------------------------------------------

    def _sources(self) -> dict[str, Images]:
        sources = {name: getattr(self.config.id, name) for name in self.id_names}
        if self.config.tuning is not None:
            sources["tuning"] = self.config.tuning.images
        if "outlier_exposure" in self.training_methods:
            sources["outliers"] = self.config.outliers.images
        return sources | {ood.name: ood.images for ood in self.config.ood}

    def image_set(self, name: str) -> ImageSet:
        """`train`, `validation`, `test`, `tuning` (the outliers to tune on), `outliers` (to train with) or an OOD set by name.

        Raises
        ------
        MissingDataError : not on disk and not to be fetched; names the folder and the command
        InputError : unknown name, damaged data, class names in another order than the config's
        """
        if name not in self._image_sets:
            sources = self._sources()
            if name not in sources:
                raise InputError(f"No image set {name!r} in {self.config.name}; {nearest(name, sources)}")
            title = f"{self.config.id.name} {name}" if name in ID_SETS else name
            if name in ("tuning", "outliers"):
                title = getattr(self.config, name).name
            image_set = open_image_set(
                sources[name], title, cache_dir=self.run_dir / "cache", skip_unreadable=self.skip_unreadable
            )
            if name in ID_SETS:
                self._check_labels(image_set)
            self._image_sets[name] = image_set
        return self._image_sets[name]

    def _check_labels(self, image_set: ImageSet) -> None:
        expected, number = self.config.id.class_names, self.config.id.num_classes
        check_labels(image_set, number)
        if len(image_set) == 0:
            raise InputError(f"{image_set.name} has no images, expected at least one; check its source.")
        if expected is None or image_set.class_names is None or tuple(image_set.class_names) == expected:
            return
        found = image_set.class_names
        place = next(
            (i for i, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]),
            min(len(found), len(expected)),
        )
        raise InputError(
            f"{image_set.name} has {len(found)} classes with {found[place : place + 1]} at label {place}, expected "
            f"{len(expected)} with {expected[place : place + 1]} (id.class_names): the label order differs; "
            "reorder the labels or the config's class_names."
        )

    def check_images(self) -> None:
        """Open (and fetch) every image set and find the checkpoint, before anything long starts.

        OOD sets that are missing are collected; with `skip_missing` the experiment goes on without them.

        Raises
        ------
        MissingDataError : names all that is missing, each with its folder and command
        """
        if self._checked:
            return
        problems = []
        for checkpoint in self.checkpoints:
            if not resolve_path(checkpoint).exists():
                problems.append(
                    f"No checkpoint {checkpoint}, expected the weights of the network; put the file there."
                )
        sources = self._sources()
        local = [name for name, images in sources.items() if images.source not in ("torchvision", "archive")]
        self._open_all(local, problems)
        if not problems and (not self.missing or self.skip_missing):  # else nothing is fetched for nothing
            self._open_all([name for name in sources if name not in local], problems)
        if self.missing and not self.skip_missing:
            problems += self.missing.values()
            problems.append("To go on without the missing OOD sets, add --skip-missing (skip_missing=True).")
        if problems:
            problems.append(
                "If the files lie below another folder, name it with --data-root (data_root in a notebook)."
            )
            raise MissingDataError("\n".join(dict.fromkeys(problems)))
        if all(ood.name in self.missing for ood in self.config.ood):
            raise MissingDataError(
                "All OOD sets are missing, expected at least one:\n" + "\n".join(self.missing.values())
            )
        self._check_apart()
        self._check_tuned_apart()
        for name, recipe in self.config.networks.items():
            if recipe.softmax_groups is not None and recipe.softmax_groups.strategy == "taxonomy":
                _ = self.fine_tuned(name).groups
        self._checked = True

    def _check_apart(self) -> None:
        """What is chosen on images, or trained with them, must not be reported on them; a few equal images occur in public
        sets."""
        chosen_on = [name for name in ("validation", "tuning", "outliers") if name in self._image_sets]
        reported = ["test", *(ood.name for ood in self.config.ood if ood.name in self._image_sets)]
        for ours, theirs in itertools.product(chosen_on, reported):
            one, other = self.image_set(ours), self.image_set(theirs)
            shared = one.shared_with(other)
            if shared > 0.01 * min(len(one), len(other)):
                raise InputError(
                    f"{shared:,} of the {len(one):,} images of {one.name} ({ours}), on which networks or hyper-parameters are "
                    f"chosen, are also in {other.name}, which is reported, expected other images; change one of the two."
                )

    def _check_tuned_apart(self) -> None:
        """A network that was trained with outliers is not tuned on the same ones."""
        if not {"tuning", "outliers"} <= self._image_sets.keys():
            return
        exposed = [
            row
            for row in self.config.tuning.grids
            if isinstance(self.networks.get(self._unfitted(row).network), OutlierExposureConfig)
        ]
        shared = self.image_set("tuning").shared_with(self.image_set("outliers")) if exposed else 0
        if shared:
            raise InputError(
                f"tuning.grids.{exposed[0]} tunes a network trained with outliers on {shared:,} of the same images, expected "
                "others; take other images for tuning or outliers, or remove the grid."
            )

    def _open_all(self, names: list[str], problems: list[str]) -> None:
        for name in names:
            try:
                self.image_set(name)
            except MissingDataError as error:
                to_do_without = self.skip_missing and name not in ID_SETS
                if name in (*ID_SETS, "tuning", "outliers") and not to_do_without:
                    problems.append(str(error))
                elif name == "tuning":
                    self.tuning_missing = str(error)
                elif name == "outliers":
                    self.outliers_missing = str(error)
                else:
                    self.missing[name] = str(error)

    def describe_image_sets(self) -> pd.DataFrame:
        """One row an image set: group, source, count, size, SHA-256 (first digits), status."""
        rows = []
        groups = {**dict.fromkeys(self.id_names, "ID"), **self.ood_groups}
        if self.tuned_rows:
            groups["tuning"] = "to tune on"
        if "outliers" in self._sources():
            groups["outliers"] = "to train with"
        for name, group in groups.items():
            image_set = self.image_set(name)
            size = image_set.image(0).size
            skipped = f", {len(image_set.skipped)} unreadable skipped" if image_set.skipped else ""
            rows.append(
                {
                    "set": image_set.name,
                    "group": group,
                    "source": image_set.source,
                    "images": len(image_set),
                    "size": f"{size[0]} x {size[1]}" if image_set.array is not None else "varies",
                    "sha256": image_set.fingerprint[:12],
                    "status": "ready" + skipped,
                }
            )
        missing = self.missing | (
            {self.config.tuning.name: self.tuning_missing} if self.tuning_missing else {}
        )
        for name, problem in missing.items():
            rows.append(
                {"set": name, "group": "", "source": problem, "images": 0, "status": "missing, skipped"}
            )
        return pd.DataFrame(rows).fillna("")

    # ---- networks and banks -------------------------------------------------------------------------------

    @property
    def network(self) -> Classifier:
        """The backbone in eval mode: trained here (resumed if interrupted) or loaded from its checkpoint."""
        return self.backbone.network

    @property
    def head(self) -> Head:
        """That of the backbone."""
        return self.backbone.head

    @property
    def training_history(self) -> pd.DataFrame | None:
        """The backbone's learning curve, one row an epoch; None for a network that was not trained here."""
        return self.backbone.training_history

    @property
    def id_accuracy(self) -> float:
        """Percent of ID test images that the backbone classifies correctly, held against the config's expectation.

        Raises
        ------
        InputError : further than `tolerance` from `expected_accuracy`
        """
        return self.backbone.id_accuracy

    def bank(self, name: str) -> StoredBank:
        """The backbone's feature bank of an image set; the forward pass runs if it has not yet.

        Raises
        ------
        InputError : see features.extract
        """
        return self.backbone.bank(name)

    def image_bank(self, name: str) -> ImageBank:
        """The bank of an image set with its images and the backbone, for methods that differentiate by the input."""
        return self.backbone.image_bank(name)

    @cached_property
    def networks(self) -> dict[str, NetworkRecipe]:
        """Those of the config, and where it does not have them `group` and `flat` of MOS, with k-means groups, and `dfb`."""
        number = max(2, round(self.config.id.num_classes**0.5))
        group = FineTuningConfig(groups=GroupsConfig(strategy="kmeans", number=number))
        return {"group": group, "flat": FineTuningConfig(), "dfb": DenseConfig()} | self.config.networks

    @property
    def training_methods(self) -> set[str]:
        """How the networks are made that the config describes or a row scores: `classifier`, `dense`, ..."""
        scored = {detector.network for detector in self.detectors.values() if detector.network}
        methods = {training_method(self.networks[name]) for name in {*self.config.networks, *scored}}
        return methods - {"outlier_exposure"} if self.outliers_missing else methods

    def fine_tuned(self, network: str | NetworkRecipe) -> MadeNetwork:
        """A network made from the backbone, by its name in `networks` or by a recipe; trained when first asked for.

        Raises
        ------
        InputError : no such network
        """
        if isinstance(network, NetworkRecipe):
            known = [name for name, named in self.networks.items() if named == network]
            if not known:  # what the config expects is of its own network
                recipe = network.model_copy(update={"expected_accuracy": None})
                return self._made(recipe, "made for a comparison")
            network = known[0]
        if network not in self.networks:
            raise InputError(
                f"No network {network!r} in {self.config.name}; {nearest(network, self.networks)}"
            )
        if network not in self._fine_tuned:
            self._fine_tuned[network] = self._made(self.networks[network], network)
        return self._fine_tuned[network]

    def _made(self, recipe: NetworkRecipe, name: str) -> MadeNetwork:
        kinds = {
            DenseConfig: DenseNetwork,
            FineTuningConfig: FineTunedNetwork,
            UnleashingMaskConfig: UnleashedNetwork,
            OutlierExposureConfig: OutlierClassNetwork if recipe.background else ExposedNetwork,
        }
        return kinds[type(recipe)](self, recipe, name)

    def start_network(self, start: str | int = "last") -> Classifier:
        """A copy of the backbone with the weights that a training is to start from; see config.EpochTrainingConfig.start.

        Raises
        ------
        InputError : `best` or an epoch of a backbone that was not trained here, or an epoch it has not saved
        """
        if start not in self._starts:
            network = copy.deepcopy(self.network)
            if start == "best" or isinstance(start, int):
                network = self._backbone_at(network, start)
            elif start != "last":
                load_checkpoint(network, resolve_path(start))
            self._starts[start] = network
        # a network that was differentiated by its input has been frozen for that
        return copy.deepcopy(self._starts[start]).requires_grad_(True)

    def _backbone_at(self, network: Classifier, start: str | int) -> Classifier:
        if not self.backbone.trained_here:
            raise InputError(
                f"Found start: {start}, but the backbone is a checkpoint and has no epochs, expected `last` or the path of "
                "another checkpoint; change start."
            )
        saved = self.backbone.saved_epochs | {"best": checkpoint_path(self.backbone.model_directory, "best")}
        path = saved.get(start)
        if path is None or not path.exists():
            raise InputError(
                f"The training of the backbone has not saved epoch {start}, only {list(self.backbone.saved_epochs)} and the "
                "best; set backbone.training.save_every, or start from another one."
            )
        load_weights(network, path)
        return network

    def loss_constraint(self, config: LossConstraintConfig, start: str | int = "last") -> LossConstraint:
        """The loss constraint of Unleashing Mask for a start network on the ID training images; estimated once, and kept
        in models/<fingerprint of the start weights>/, with how it was estimated.

        Raises
        ------
        InputError : see training.estimate_constraint; an unreadable file
        """
        network, image_set = self.start_network(start), self.image_set("train")
        settings = [config.model_dump(), image_set.fingerprint, self.transform.fingerprint, ESTIMATE_VERSION]
        key = sha256_of_json([*settings, self.device.type])[:SHORT]
        directory = self.run_dir / "models" / weights_fingerprint(network)[:SHORT]
        path = directory / f"loss_constraint-{key}.json"
        with locked(path):
            if not path.exists():
                batch_size = pass_batch_size(self.config.features, self.device)
                found = estimate_constraint(
                    network, image_set, self.transform, config, batch_size=batch_size, device=self.device
                )
                made_of = {"start": start, "images": image_set.fingerprint, "estimate": config.model_dump()}
                write_json(path, asdict(found) | made_of)
            try:
                stored = json.loads(path.read_text())
                return LossConstraint(tuple(stored["draws"]), stored["unmasked"], stored["keep_rate"])
            except (ValueError, KeyError):
                raise InputError(
                    f"The loss constraint {path} is unreadable, expected the draws of an estimate; delete this file to estimate "
                    "it again."
                ) from None

    def along_training(
        self, network: ExperimentNetwork, images: int | None = None, rows: Sequence[str] = ("msp", "energy")
    ) -> pd.DataFrame:
        """Detection and accuracy of the epochs that a network's training has saved; computed once.

        Parameters
        ----------
        images : how many of the ID test set and of each OOD set, evenly spaced; None = all
        rows : detectors of the config that score logits or features and learn nothing

        Returns
        -------
        one line an epoch (0 = before), detector and OOD set: epoch, detector, ood_set, group, fpr95, auroc and id_accuracy
        in percent, id_score and ood_score (means), and cross_entropy, that of the epoch's training batches (NaN of epoch 0)

        Raises
        ------
        InputError : a network that was not trained here, or a detector that learns or needs images
        """
        if not network.saved_epochs:
            raise InputError(
                f"{network.title} has saved no epochs, expected a network that was trained here and tracked; take another one."
            )
        for row in rows:
            detector = self._unfitted(row)
            if _learns(detector) or detector.needs_images:
                raise InputError(
                    f"{self._label(row)} learns from training images or needs images, expected a detector of logits such as "
                    "energy along a training; name another one."
                )
        ood_sets = self._sets_for(getattr(network, "recipe", None))
        path = network.model_directory / f"along-{self._along_key(network, images, rows, ood_sets)}.csv"
        with locked(path):
            if not path.exists():
                lines = []
                for epoch in track(network.saved_epochs, description="Saved epochs", unit="epoch"):
                    lines += self._detection_at(network, epoch, images, rows, ood_sets)
                write_text(path, pd.DataFrame(lines).to_csv(index=False))
        history = network.training_history.set_index("epoch")
        column = "train_cross_entropy" if "train_cross_entropy" in history else "train_loss"
        table = pd.read_csv(path)
        return table.assign(cross_entropy=table.epoch.map(history[column]))

    def _along_key(
        self,
        network: ExperimentNetwork,
        images: int | None,
        rows: Sequence[str],
        ood_sets: Mapping[str, str],
    ) -> str:
        sets = [self.image_set(name).fingerprint for name in ("test", *ood_sets)]
        detectors = [[self._label(row), self._unfitted(row).hyperparameters()] for row in rows]
        code = [_code_of(type(self._unfitted(row))) for row in rows] + [_hash_of([metrics])]
        epochs = [weights_file.name for weights_file in network.saved_epochs.values()]
        return sha256_of_json([images, "evenly spaced", sets, detectors, code, epochs, ood_sets])[:SHORT]

    @torch.no_grad()
    def _detection_at(
        self,
        network: ExperimentNetwork,
        epoch: int,
        images: int | None,
        rows: Sequence[str],
        ood_sets: Mapping[str, str],
    ) -> list[dict]:
        classifier, batch_size = network.at_epoch(epoch), pass_batch_size(self.config.features, self.device)
        head = Head.of(classifier)

        def bank_of(name: str) -> FeatureBank:
            image_set = self.image_set(name)
            count = len(image_set) if images is None else min(images, len(image_set))
            taken = image_set.take(np.linspace(0, len(image_set) - 1, count).astype(np.int64))
            with features.float32_products():
                values = torch.cat(
                    [
                        classifier.features(self.transform.normalise(pixels.to(self.device))).cpu()
                        for pixels in image_batches(taken, self.transform, 0, count, batch_size)
                    ]
                )
            labels = None if name != "test" else torch.as_tensor(taken.labels)
            return FeatureBank(values, head.to("cpu").logits(values), labels)

        test, lines = bank_of("test"), []
        id_accuracy = accuracy(test, head)
        fitted = {row: copy.copy(self._unfitted(row)).fit(test, head) for row in rows}
        id_scores = {row: detector.score_samples(test) for row, detector in fitted.items()}
        for name, group in ood_sets.items():
            bank = bank_of(name)
            for row, detector in fitted.items():
                ood_scores = detector.score_samples(bank)
                values = metrics.evaluate(id_scores[row], ood_scores)
                lines.append(
                    {"epoch": epoch, "detector": self._label(row), "ood_set": name, "group": group}
                    | {"fpr95": values["fpr95"], "auroc": values["auroc"], "id_accuracy": id_accuracy}
                    | {"id_score": float(id_scores[row].mean()), "ood_score": float(ood_scores.mean())}
                )
        return lines

    def _network_of(self, detector: Detector) -> ExperimentNetwork:
        return self.fine_tuned(detector.network) if detector.network else self.backbone

    @property
    def bank_names(self) -> list[str]:
        """The image sets that have a bank: ID, OOD and, with tuned rows, the outliers to tune on."""
        return [*self.id_names, *(["tuning"] if self.tuned_rows else []), *self.ood_groups]

    def describe_banks(self) -> pd.DataFrame:
        """One row a bank: images, features, seconds and images a second of its forward pass."""
        rows = []
        for name in self.bank_names:
            bank = self.bank(name)
            rows.append(
                {
                    "set": self.image_set(name).name,
                    **{key: bank.record[key] for key in ("images", "seconds", "images_per_second", "device")},
                    "features": self.head.feature_dim,
                    "bank": bank.directory.name[:12],
                }
            )
        return pd.DataFrame(rows)

    def class_means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean feature [C, D] (float64) and number of training images [C] of each class."""
        return class_means(self.bank("train"), self.config.id.num_classes)

    # ---- detectors --------------------------------------------------------------------------------------

    @property
    def tuned_rows(self) -> list[str]:
        """Rows beside those of the config: `<row>_tuned`, with the hyper-parameters that are best on a grid."""
        if self.config.tuning is None:
            return []
        self.check_images()
        return [] if self.tuning_missing else [row + TUNED for row in self.config.tuning.grids]

    def detector(self, row: str) -> Detector:
        """The detector of a row, fitted on the ID training bank (and tuned, for one of `tuned_rows`).

        A method that the config leaves out comes with its defaults, so that its notebook runs all the same.

        Raises
        ------
        InputError : neither a row nor a method
        """
        if row in self.tuned_rows:
            return self._tuned_detector(row)
        detector = self._unfitted(row)
        if not hasattr(detector, "head_"):
            self._fit_seconds[row] = self._fit(detector)
        return detector

    def _unfitted(self, row: str) -> Detector:
        if row in self.detectors or row in self._defaults:
            return self.detectors.get(row) or self._defaults[row]
        if row not in DETECTORS:
            rows = [*self.detectors, *self.tuned_rows, *DETECTORS]
            raise InputError(f"No detector {row!r} in {self.config.name}; {nearest(row, rows)}")
        self._defaults[row] = create(row)
        return self._defaults[row]

    def _fit(self, detector: Detector, train_bank: Bank | None = None) -> float:
        """Fit a detector; returns the seconds, with those of what it computes at its first score."""
        network, validation_bank = self._network_of(detector), None
        if detector.needs_validation and "validation" in self.id_names:
            validation_bank = network.image_bank("validation")
        train_bank = network.bank(detector.fit_set) if train_bank is None else train_bank
        shard = next(network.bank("test").shards())
        if self.device.type == "cuda":
            detector.device = self.device
        begin = time.perf_counter()
        detector.fit(train_bank, network.head, validation_bank)
        if not detector.needs_images:
            detector.score_samples(_rows(shard, slice(1)))
        return time.perf_counter() - begin

    def _tuned_detector(self, row: str) -> Detector:
        if row not in self._tuned:
            base, table = self._base(row), self.tune(self._base(row))
            variants = list(self.detector(base).variants(self.config.tuning.grids[base]))
            chosen, _ = variants[table.index[table.chosen].item()]
            # Of a grid of its own, as the variants of one grid may share what each of them costs.
            _, detector = next(
                self.detector(base).variants({name: [value] for name, value in chosen.items()})
            )
            detector.label = self._label(row)
            images, outliers = len(self.image_set("validation")), len(self.image_set("tuning"))
            detector.tuned_on = (
                f"{results.METRICS[self.config.tuning.metric][0]} on {images:,} ID validation images against "
                f"{outliers:,} of {self.config.tuning.name}"
            )
            self._tuned[row] = detector
            self._fit_seconds[row] = self._fit_seconds[base] + self._grid(base)["seconds"]
        return self._tuned[row]

    def _base(self, row: str) -> str:
        """The row that a tuned one stands beside; any other row itself."""
        return row.removesuffix(TUNED) if row in self.tuned_rows else row

    def _label(self, row: str) -> str:
        label = self._unfitted(self._base(row)).label
        return results.tuned_label(label) if row in self.tuned_rows else label

    def labels(self, rows: Iterable[str] | None = None) -> list[str]:
        """The names in tables and figures of some rows (default: those of the config)."""
        return [self._label(row) for row in (self.detectors if rows is None else rows)]

    def sweep(
        self,
        row: str,
        grid: Mapping[str, Sequence[Any]],
        id_set: str = "test",
        ood_sets: Mapping[str, str] | None = None,
    ) -> pd.DataFrame:
        """FPR95 and AUROC in percent of every combination of hyper-parameter values, from the cached banks.

        Parameters
        ----------
        row : a row of the config or a method; its other hyper-parameters stay as they are
        grid : hyper-parameter -> values
        id_set, ood_sets : the sets compared; OOD set -> group, default: all that are reported

        Returns
        -------
        one line a combination and OOD set: the hyper-parameters, ood_set, group, fpr95, auroc; these two are NaN where
        the detector refuses the values, k beyond the number of training images for example

        Raises
        ------
        InputError : unknown hyper-parameter, value out of range, or every combination refused
        """
        ood_sets, lines, refusal = self.ood_groups if ood_sets is None else ood_sets, [], None
        variants = list(self.detector(row).variants(grid))
        for settings, detector in track(variants, description=f"{self._label(row)} sweep", unit="setting"):
            try:
                compared = self.compare(detector, id_set, ood_sets).to_dict("records")
            except InputError as error:
                refusal, nothing = error, {"fpr95": np.nan, "auroc": np.nan}
                compared = [{"ood_set": name, "group": group} | nothing for name, group in ood_sets.items()]
            lines += [settings | line for line in compared]
        if refusal and all(np.isnan(line["auroc"]) for line in lines):
            raise refusal
        # objects, so that None (off) and the type of each value survive
        table = pd.DataFrame(lines, dtype=object)
        return table.astype({"ood_set": str, "group": str, "fpr95": float, "auroc": float})

    def compare(
        self, detector: Detector, id_set: str = "test", ood_sets: Mapping[str, str] | None = None
    ) -> pd.DataFrame:
        """FPR95 and AUROC in percent of any fitted detector; parameters and columns as for `sweep`."""
        id_scores, lines = detector.score_samples(self._bank_for(detector, id_set)), []
        for name, group in (self.ood_groups if ood_sets is None else ood_sets).items():
            values = metrics.evaluate(id_scores, detector.score_samples(self._bank_for(detector, name)))
            lines.append(
                {"ood_set": name, "group": group, "fpr95": values["fpr95"], "auroc": values["auroc"]}
            )
        return pd.DataFrame(lines)

    def compare_networks(
        self, recipes: Mapping[str, NetworkRecipe], scored_by: Detector | None = None
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """FPR95 and AUROC in percent of networks made by several recipes.

        Parameters
        ----------
        recipes : label -> recipe; each network is trained when it is not yet
        scored_by : a detector that scores banks; None = MOS where there is a group softmax, else MSP

        Returns
        -------
        one line a network and OOD set (without those related to the outliers that a network was trained with), with the
        columns of results.csv that apply, `method` being the label; and the means over OOD sets, see results.mean_table
        """
        _ = self.id_accuracy  # the guard
        lines, resamples = [], {metric: {} for metric in results.METRICS}
        for label, recipe in track(list(recipes.items()), description="networks", unit="network"):
            network = self.fine_tuned(recipe)
            facts = {"id_accuracy": network.id_accuracy, "tuned_on": ""}
            facts["hyperparameters"] = json.dumps({"network": network.described})
            detector = copy.copy(scored_by) or create("msp" if recipe.softmax_groups is None else "mos")
            test = network.bank("test")
            detector.fit(network.bank("train") if _learns(detector) else test, network.head)
            id_scores, of_sets = detector.score_samples(test).numpy(), {}
            for name, group in self._sets_for(recipe).items():
                ood_scores = detector.score_samples(network.bank(name)).numpy()
                of_sets[name], values = self._with_intervals(id_scores, ood_scores, name)
                lines.append(
                    {"experiment": self.config.name, "seed": self.seed, "method": label, "ood_set": name}
                    | {"group": group, "n_id": len(id_scores), "n_ood": len(ood_scores), **values}
                    | facts
                )
            for metric, of_methods in resamples.items():
                of_methods[label] = pd.DataFrame({name: draws[metric] for name, draws in of_sets.items()})
        table = pd.DataFrame(lines)
        return table, results.mean_table(table, resamples)

    def dfb_parts(self, row: str) -> dict[str, str]:
        """The rows that a row of DFB is to be seen with: "host on the backbone", "S_foreground" (the host on the network of
        DFB), "S_background", and "S", the row itself. What the config does not list is made, as rows of no table."""
        detector = self._unfitted(row)
        host, network = detector.make_host(), detector.network
        background = DFBBackground(sigma=detector.sigma, background=detector.background)
        background.label += f" of {detector.label}"
        wanted = {
            "host on the backbone": (host, "", host.label),
            "S_foreground": (detector.make_host(), network, f"{host.label} ({network})"),
            "S_background": (background, network, background.label),
        }
        found = {}
        for part, (like, name, label) in wanted.items():
            like.network, like.label = name, label
            same = [
                key
                for key, other in self.detectors.items()
                if (type(other), other.hyperparameters(), other.network)
                == (type(like), like.hyperparameters(), name)
            ]
            found[part] = same[0] if same else f"{row}, {part}"
            if not same:
                self._defaults.setdefault(found[part], like)
        return found | {"S": row}

    def others_probability(self, network: FineTunedNetwork) -> pd.DataFrame:
        """How probable "others" is in each group of a network with a group softmax, for the images of every set.

        Returns
        -------
        one line a set and group: set (the ID test images of each group are a set of their own), kind (ID or OOD), group,
        and mean, q25 and q75 (the quartiles) of p("others"), in [0, 1]
        """
        _ = self.id_accuracy, network.id_accuracy  # the guard
        groups, sets = network.groups, {}
        test = network.bank("test").load()
        for number, name in enumerate(groups.names):
            own = groups.group_of_class[test.labels] == number
            if own.any():
                sets[f"{self.config.id.name}: {name}"] = "ID", test.logits[own]
        for name in self.ood_groups:
            sets[name] = "OOD", network.bank(name).load().logits
        lines = []
        for name, (kind, logits) in sets.items():
            others = groups.others_probability(logits.double())
            quartiles = others.quantile(torch.tensor([0.25, 0.75], dtype=others.dtype), dim=0)
            for place, group in enumerate(groups.names):
                low, high = quartiles[:, place].tolist()
                line = {"set": name, "kind": kind, "group": group, "mean": float(others[:, place].mean())}
                lines.append(line | {"q25": low, "q75": high})
        return pd.DataFrame(lines)

    def tune(self, row: str) -> pd.DataFrame:
        """The grid of a row on the ID validation images against the outliers to tune on; `chosen` marks the best.

        Raises
        ------
        InputError : the config has no grid for the row
        """
        table = pd.DataFrame(self._grid(row)["lines"], dtype=object)
        table = table.astype({"fpr95": float, "auroc": float})
        values = table[self.config.tuning.metric]
        best = values.idxmin() if self.config.tuning.metric == "fpr95" else values.idxmax()
        return table.assign(chosen=table.index == best)

    def _grid(self, row: str) -> dict:
        """The lines of a row's grid and the seconds they took; computed once."""
        grids = {} if self.config.tuning is None else self.config.tuning.grids
        if row not in grids:
            raise InputError(
                f"There is no grid for {row!r} in {self.config.name}; add tuning.grids.{row} to the config."
            )

        def compute() -> tuple[dict, dict]:
            begin = time.perf_counter()
            table = self.sweep(row, grids[row], "validation", {"tuning": self.config.tuning.name})
            lines = table.drop(columns=["ood_set", "group"]).to_dict("records")
            return {}, {"seconds": time.perf_counter() - begin, "lines": lines}

        return self._kept(row + TUNED, ".grid", self._score_fingerprint(row + TUNED), compute)[1]

    def sample_size(
        self, rows: Iterable[str], images_per_class: Iterable[int], draws: int = 3
    ) -> pd.DataFrame:
        """How many ID training images a method needs: fits on random subsets of the training bank.

        Returns
        -------
        one line a method, number of images and draw: method, images_per_class, draw, and the mean over OOD sets
        of fpr95 and auroc in percent, NaN where a method refuses so few images, and why in `refused`
        """
        rows, lines, generator = list(rows), [], np.random.default_rng(self.seed)
        networks = {row: self._network_of(self._unfitted(row)) for row in rows}
        banks = {network: network.bank("train").load() for network in networks.values()}
        labels = self.bank("train").load().labels.numpy()
        by_class = [np.flatnonzero(labels == k) for k in range(self.config.id.num_classes)]
        subsets = [
            (count, draw, np.sort(np.concatenate([generator.permutation(own)[:count] for own in by_class])))
            for count in images_per_class
            for draw in range(draws)
        ]
        for row, (count, draw, taken) in track(
            list(itertools.product(rows, subsets)), description="sample size", unit="fit"
        ):
            subset = _rows(banks[networks[row]], taken)
            detector = copy.copy(self._unfitted(row))
            line = {"method": self._label(row), "images_per_class": count, "draw": draw, "refused": ""}
            try:
                self._fit(detector, subset)
                lines.append(line | self.compare(detector)[["fpr95", "auroc"]].mean().to_dict())
            except InputError as error:
                lines.append(line | {"fpr95": np.nan, "auroc": np.nan, "refused": str(error)})
        return pd.DataFrame(lines)

    # ---- scores and results -----------------------------------------------------------------------------

    def _bank_for(self, detector: Detector, name: str) -> Bank:
        network = self._network_of(detector)
        return network.image_bank(name) if detector.needs_images else network.bank(name)

    def _sets_of(self, row: str) -> dict[str, str]:
        """OOD set -> group of those a row is reported on."""
        network = self._unfitted(self._base(row)).network
        related = self.config.tuning.related if row in self.tuned_rows else ()
        sets = self._sets_for(self.networks[network] if network else None)
        return {name: group for name, group in sets.items() if name not in related}

    def _sets_for(self, recipe: NetworkRecipe | None) -> dict[str, str]:
        """OOD set -> group of those a network is reported on: not on sets like the outliers it was trained with."""
        exposed = isinstance(recipe, OutlierExposureConfig)
        related = self.config.outliers.related if exposed and self.config.outliers else ()
        return {name: group for name, group in self.ood_groups.items() if name not in related}

    def _score_fingerprint(self, row: str) -> str:
        base = self._unfitted(self._base(row))
        choice, code = [], [_code_of(type(base))]
        if base.network and self.networks[base.network].background:
            code.append(_hash_of([foreground]))
        if isinstance(base, DFB):
            code.append(_code_of(type(base.make_host())))
        if base.group_softmax:
            code.append(_hash_of([groups]))
        if base.needs_validation or row in self.tuned_rows:  # the metrics have a say in what is chosen
            code.append(_hash_of([metrics]))
        if row in self.tuned_rows:
            tuning = self.config.tuning
            choice = [tuning.grids[self._base(row)], tuning.metric]
            code.append(_hash_of([Experiment.tune, Experiment.sweep, Experiment.compare]))
        sets = sorted({*self._fitted_on(row), "test", *self._sets_of(row)})
        return sha256_of_json(
            {
                "row": [self._label(row), base.hyperparameters(), choice],
                "banks": {name: self._network_of(base).key(name) for name in sets},
                "code": code,
            }
        )

    def _fitted_on(self, row: str) -> list[str]:
        """The image sets that a row's detector learns from."""
        base = self._unfitted(self._base(row))
        sets = [base.fit_set]
        if (base.needs_validation and "validation" in self.id_names) or row in self.tuned_rows:
            sets.append("validation")
        return [*sets, "tuning"] if row in self.tuned_rows else sets

    def _scored(self, row: str) -> tuple[dict[str, np.ndarray], dict]:
        """Scores of the ID test set and the OOD sets, and what they rest on and cost; computed once."""
        self._check_accuracy(row)
        return self._kept(row, "", self._score_fingerprint(row), lambda: self._score(row))

    def _check_accuracy(self, row: str) -> float:
        """The ID accuracy of a row's network; a wrong one stops here, before anything is scored or read."""
        _ = self.id_accuracy
        return self._network_of(self._unfitted(self._base(row))).id_accuracy

    def _score(self, row: str) -> tuple[dict[str, np.ndarray], dict]:
        detector = self.detector(row)
        if isinstance(detector, DFB):
            self._share_foreground_scores(row, detector)
        scores, seconds = {}, {}
        for name in ("test", *self._sets_of(row)):
            begin = time.perf_counter()
            bank = self._bank_for(detector, name)
            scores[name] = detector.score_samples(bank).cpu().numpy()
            seconds[name] = time.perf_counter() - begin
            if isinstance(detector, DFB):  # its host's scores may be those of an earlier row
                seconds[name] = max(seconds[name], detector.host_seconds(bank))
        settings, tuned_on = detector.hyperparameters(), detector.tuned_on
        if detector.network:
            settings["network"] = {"name": detector.network} | self.fine_tuned(detector.network).described
        if detector.learned:
            settings["learned"] = detector.learned
        if detector.fit_set != "train":
            tuned_on = f"fitted on the labelled ID {detector.fit_set} set, a leak"
        facts = {
            "hyperparameters": settings,
            "tuned_on": tuned_on,
            "extra_passes": detector.extra_passes,
            "fit_seconds": self._fit_seconds.get(row),
            "seconds": seconds,
        }
        return scores, facts

    def _share_foreground_scores(self, row: str, detector: DFB) -> None:
        """S_foreground is a row of its own: where its host is costly, it is scored once for both."""
        foreground = self.dfb_parts(self._base(row))["S_foreground"]
        if detector.make_host().hyperparameters() != self._unfitted(foreground).hyperparameters():
            return  # tuned to another host
        scores, facts = self._scored(foreground)
        for name in ("test", *self._sets_of(row)):
            bank, seconds = self._bank_for(detector, name), facts["seconds"][name]
            detector.keep_foreground_scores(bank, torch.from_numpy(scores[name]), seconds)

    def _evaluated(self, row: str) -> tuple[dict[str, np.ndarray], dict]:
        """The bootstrap resamples {"fpr95/<set>": [R], "auroc/<set>": [R]} of a row and its lines of the results."""
        self._check_accuracy(row)
        parts = [self._score_fingerprint(row), self.config.name, self.ood_groups]
        parts += [self.config.metrics.model_dump(), [ood.name for ood in self.config.ood]]
        code = _hash_of([metrics, results, groups, networks, sys.modules[__name__]])
        fingerprint = sha256_of_json([*parts, code])
        return self._kept(row, ".metrics", fingerprint, lambda: self._evaluate(row))

    def _evaluate(self, row: str) -> tuple[dict[str, np.ndarray], dict]:
        scores, facts = self._scored(row)
        resamples, lines = {}, []
        for name, group in self._sets_of(row).items():
            drawn, values = self._with_intervals(scores["test"], scores[name], name)
            resamples |= {f"{metric}/{name}": draws for metric, draws in drawn.items()}
            lines.append(
                {
                    "experiment": self.config.name,
                    "method": self._label(row),
                    "ood_set": name,
                    "group": group,
                    "n_id": len(scores["test"]),
                    "n_ood": len(scores[name]),
                    **values,
                    "id_accuracy": self._check_accuracy(row),
                    "score_seconds": facts["seconds"][name],
                    "hyperparameters": json.dumps(facts["hyperparameters"]),
                    "data_sha256": self._data_hash([*self._fitted_on(row), "test", name]),
                    "tuned_on": facts["tuned_on"],
                    "fit_seconds": facts["fit_seconds"],
                    "extra_passes": facts["extra_passes"],
                }
            )
        return resamples, {"lines": lines}

    def _with_intervals(
        self, id_scores: np.ndarray, ood_scores: np.ndarray, ood_set: str
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """The bootstrap resamples {metric: [R]} on an OOD set, and all metrics with the intervals of the two resampled."""
        order = [ood.name for ood in self.config.ood]  # its place decides a set's draws, whatever is missing
        drawn = metrics.resampled(
            id_scores,
            ood_scores,
            resamples=self.config.metrics.bootstrap_resamples,
            seed=self.config.metrics.bootstrap_seed,
            ood_set=order.index(ood_set),
        )
        values = metrics.evaluate(id_scores, ood_scores)
        for metric, draws in drawn.items():
            values[f"{metric}_lo"], values[f"{metric}_hi"] = metrics.interval(draws)
        return drawn, values

    def _kept(
        self,
        row: str,
        suffix: str,
        fingerprint: str,
        compute: Callable[[], tuple[dict[str, np.ndarray], dict]],
    ) -> tuple[dict[str, np.ndarray], dict]:
        """Arrays and facts from scores/<row><suffix>.safetensors while their fingerprint is there, else computed and kept.

        A second process that asks for the same waits for the first.
        """
        path = self.scores_directory(row) / f"{row}{suffix}.safetensors"
        with locked(path):
            return self._read(path, fingerprint) or self._keep(path, fingerprint, *compute())

    def _read(self, path: Path, fingerprint: str) -> tuple[dict[str, np.ndarray], dict] | None:
        if path.exists():
            try:
                with safe_open(path, framework="np") as stored:
                    metadata = stored.metadata()
                    if metadata["fingerprint"] == fingerprint:
                        arrays = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
                        return arrays, json.loads(metadata["facts"])
            except SafetensorError:
                print(f"{path} is damaged and computed anew.", file=sys.stderr)
        return None

    def _keep(
        self, path: Path, fingerprint: str, arrays: dict[str, np.ndarray], facts: dict
    ) -> tuple[dict[str, np.ndarray], dict]:
        with atomic_path(path) as temporary:
            save_file(
                {key: np.ascontiguousarray(value) for key, value in arrays.items()},
                temporary,
                metadata={"fingerprint": fingerprint, "facts": json.dumps(facts)},
            )
        return arrays, facts

    def _data_hash(self, names: Iterable[str]) -> str:
        """The first digits of a SHA-256 over the images that a result rests on."""
        return sha256_of_json([self.image_set(name).fingerprint for name in names])[:16]

    def scores(self, row: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """ID test scores [N] and OOD set -> scores of a row's detector; higher = more in-distribution."""
        scores = self._scored(row)[0]
        return scores["test"], {name: scores[name] for name in self._sets_of(row)}

    def results(self, rows: Sequence[str] | None = None) -> pd.DataFrame:
        """The long-form results of some rows (default: all of the config and the tuned ones), a line a method and OOD set."""
        rows = [*self.detectors, *self.tuned_rows] if rows is None else rows
        lines = [line for row in rows for line in self._evaluated(row)[1]["lines"]]
        published = [
            results.published_values(self.config.published, line["method"], line["ood_set"]) for line in lines
        ]
        table = pd.DataFrame([line | values for line, values in zip(lines, published)])
        return table.assign(seed=self.seed)[results.COLUMNS]

    def resamples(self, table: pd.DataFrame, metric: str) -> dict[str, pd.DataFrame]:
        """One metric in percent on the bootstrap resamples of the methods in a results table, mean over its seeds.

        Every method is evaluated on the same resampled images, so differences between methods are paired.

        Returns
        -------
        method -> a column an OOD set, a line a resample
        """
        rows = {self._label(row): row for row in [*self.detectors, *self.tuned_rows]}
        runs, averaged = [self.with_seed(int(seed)) for seed in table.seed.unique()], {}
        for method, own in table.groupby("method", sort=False).ood_set:
            drawn = [run._evaluated(rows[method])[0] for run in runs]
            averaged[method] = pd.DataFrame(
                {
                    name: np.mean([arrays[f"{metric}/{name}"] for arrays in drawn], axis=0)
                    for name in own.unique()
                }
            )
        return averaged

    def collect_results(self, seeds: Iterable[int] | None = None) -> pd.DataFrame:
        """The results of all methods and seeds, written to results.csv and returned."""
        seeds = [self.seed] if seeds is None else list(seeds)
        table = pd.concat([self.with_seed(seed).results() for seed in seeds], ignore_index=True)
        path = self.directory / "results.csv"
        results.write_results(table, path)
        return results.read_results(path)  # what is in the file, so that tables, figures and report agree

    def collect_means(self, table: pd.DataFrame) -> pd.DataFrame:
        """The means over OOD sets with their intervals, see results.mean_table, written to means.csv and returned.

        Parameters
        ----------
        table : the results of all methods, as collect_results returns them; tuned rows and those they stand beside
            have means over the sets that the tuned ones are reported on
        """
        parts = [part for part in (results.defaults(table), results.tuning_pairs(table)) if len(part)]
        means = pd.concat(
            results.mean_table(part, {metric: self.resamples(part, metric) for metric in results.METRICS})
            for part in parts
        ).drop_duplicates(["method", "ood_sets"])
        path = self.directory / "means.csv"
        write_text(path, means.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
        return pd.read_csv(path)

    # ---- figures and tables -----------------------------------------------------------------------------

    def save_figure(self, figure: Figure, name: str) -> Figure:
        """Write figures/<experiment>/<name>.png and .svg and hand the figure back to be shown.

        `name` starts with the notebook's own name, for example 12_line_masks: so run_all.py knows whose it is.
        """
        plots.save_figure(figure, self.figures_directory, name)
        return figure

    def export_tables(self, table: pd.DataFrame, stem: str, means: pd.DataFrame | None = None) -> None:
        """Write a results table to figures/<experiment>/<stem>_fpr95 and _auroc as CSV, Markdown and LaTeX."""
        results.export_tables(table, self.figures_directory, stem, self.missing, means)

    def record(self) -> dict:
        """What the results rest on, for manifest.json: image sets, weights, accuracy, banks and their forward passes.

        Only what is there is recorded; nothing is trained or passed for it.
        """
        sets = self.bank_names
        described = {
            name: {
                "source": self.image_set(name).source,
                "images": len(self.image_set(name)),
                "sha256": self.image_set(name).fingerprint,
                "skipped": self.image_set(name).skipped,
            }
            for name in [*sets, *(["outliers"] if "outliers" in self._sources() else [])]
        }
        record = {"image_sets": described, "missing": self.missing}
        if not self.backbone.ready:
            return record
        opened = {name: StoredBank.open(self.backbone.bank_directory(name)) for name in sets}
        banks = {name: {"key": bank.directory.name, **bank.record} for name, bank in opened.items() if bank}
        record |= {"weights_sha256": weights_fingerprint(self.network), "banks": banks}
        if not (opened["test"] and opened["train"]):
            return record
        return record | {
            "id_accuracy": accuracy(opened["test"], self.head),
            "networks": self._record_networks(),
        }

    def _record_networks(self) -> dict:
        made = {name: self.fine_tuned(name) for name in self.config.networks}
        return {
            name: {
                "weights_sha256": weights_fingerprint(network.network),
                "approximation": network.approximation,
            }
            for name, network in made.items()
            if network.ready
        }


def _rows(bank: FeatureBank, rows: Any) -> FeatureBank:
    """Some rows of a bank in memory, of whatever it holds."""

    def taken(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: value[rows] for name, value in value.items()}
        return None if value is None else value[rows]

    return replace(bank, **{field.name: taken(getattr(bank, field.name)) for field in fields(bank)})


def _learns(detector: Detector) -> bool:
    """Whether a detector learns anything from the bank it is fitted on."""
    return type(detector)._fit is not Detector._fit


def _code_of(detector_class: type[Detector]) -> str:
    """SHA-256 over the code a score depends on, so that changed code is run again: the detector's module, those of
    this package's detectors, kernels and groups that it imports, and the reading of banks."""
    package, found = ("ood_helpers.detectors.", "ood_helpers.kernels.", "ood_helpers.groups"), {}
    waiting = [sys.modules[detector_class.__module__]]
    while waiting:
        module = waiting.pop()
        found[module.__name__] = module
        names = {getattr(value, "__module__", None) or "" for value in vars(module).values()}
        waiting += [sys.modules[name] for name in names if name.startswith(package) and name not in found]
    return _hash_of([*(found[name] for name in sorted(found)), features])


def _hash_of(modules: Iterable[ModuleType]) -> str:
    texts = []
    for module in modules:
        try:
            texts.append(inspect.getsource(module))
        except (
            OSError,
            TypeError,
        ):  # defined in a notebook: its cells are no file, so never taken for unchanged
            texts.append(str(time.time_ns()))
    return sha256_of_json(texts)
