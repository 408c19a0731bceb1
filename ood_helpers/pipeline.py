"""An experiment as stages: image sets -> backbone -> banks -> scores -> results, each done once and kept.

A stage's output lies under a fingerprint of everything it depends on; it is written atomically and found
again by the next notebook, run or process. Nothing is computed before it is asked for.
"""

import inspect
import json
import sys
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ood_helpers import metrics, plots, results
from ood_helpers.backbones import Classifier, build, load_checkpoint, weights_fingerprint
from ood_helpers.config import PROJECT_ROOT, ExperimentConfig, Images, load_config, resolve_path
from ood_helpers.data import ImageSet, Transform, open_image_set
from ood_helpers.detectors import DETECTORS, Detector, create, create_all
from ood_helpers.errors import InputError, MissingDataError, nearest
from ood_helpers.features import Head, StoredBank, accuracy, bank_key, class_means, extract, resolve_device
from ood_helpers.files import atomic_path, locked, sha256_of_file, sha256_of_json
from ood_helpers.training import TRAINING_VERSION, check_labels, train_classifier

ID_SETS = ("train", "validation", "test")
SHORT = 20  # hexadecimal digits of a fingerprint in a folder's name


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
        self._defaults: dict[str, Detector] = {}
        self.transform = Transform(**dict(config.transform))
        self.missing: dict[str, str] = {}
        self._checked = False
        self._image_sets: dict[str, ImageSet] = {}
        self._banks: dict[str, StoredBank] = {}

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
        other.missing, other._image_sets, other._checked = self.missing, self._image_sets, self._checked
        return other

    # ---- folders and names ------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        """What this experiment writes: results.csv, report.html, executed notebooks."""
        return self.run_dir / self.config.name

    @property
    def seed_directory(self) -> Path:
        return self.directory / f"seed{self.seed}"

    @property
    def figures_directory(self) -> Path:
        directory = self.figures_root / self.config.name
        return directory if self.seed == 0 else directory / f"seed{self.seed}"

    @property
    def caption(self) -> str:
        """What every figure says of its origin."""
        return f"{self.config.name} · seed {self.seed}"

    @property
    def class_names(self) -> tuple[str, ...]:
        names = self.config.id.class_names or self.image_set("test").class_names
        return names or tuple(map(str, range(self.config.id.num_classes)))

    @property
    def id_names(self) -> list[str]:
        """Those of train, validation and test that the config has."""
        return [name for name in ID_SETS if getattr(self.config.id, name) is not None]

    @property
    def ood_groups(self) -> dict[str, str]:
        """OOD set -> near or far, without those that are missing and skipped; near sets first."""
        self.check_images()
        groups = {ood.name: ood.group for ood in self.config.ood if ood.name not in self.missing}
        return dict(sorted(groups.items(), key=lambda item: item[1] == "far"))

    # ---- image sets -------------------------------------------------------------------------------------

    def _sources(self) -> dict[str, Images]:
        sources = {name: getattr(self.config.id, name) for name in self.id_names}
        return sources | {ood.name: ood.images for ood in self.config.ood}

    def image_set(self, name: str) -> ImageSet:
        """`train`, `validation`, `test` or an OOD set by name.

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
        checkpoint = self.config.backbone.checkpoint
        if checkpoint and not resolve_path(checkpoint).exists():
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
        if len(self.missing) == len(self.config.ood):
            raise MissingDataError(
                "All OOD sets are missing, expected at least one:\n" + "\n".join(self.missing.values())
            )
        self._checked = True

    def _open_all(self, names: list[str], problems: list[str]) -> None:
        for name in names:
            try:
                self.image_set(name)
            except MissingDataError as error:
                if name in ID_SETS:
                    problems.append(str(error))
                else:
                    self.missing[name] = str(error)

    def describe_image_sets(self) -> pd.DataFrame:
        """One row an image set: group, source, count, size, SHA-256 (first digits), status."""
        rows = []
        for name in [*self.id_names, *self.ood_groups]:
            image_set = self.image_set(name)
            size = image_set.image(0).size
            skipped = f", {len(image_set.skipped)} unreadable skipped" if image_set.skipped else ""
            rows.append(
                {
                    "set": image_set.name,
                    "group": "ID" if name in ID_SETS else self.ood_groups[name],
                    "source": image_set.source,
                    "images": len(image_set),
                    "size": f"{size[0]} x {size[1]}" if image_set.array is not None else "varies",
                    "sha256": image_set.fingerprint[:12],
                    "status": "ready" + skipped,
                }
            )
        for name, problem in self.missing.items():
            rows.append(
                {"set": name, "group": "", "source": problem, "images": 0, "status": "missing, skipped"}
            )
        return pd.DataFrame(rows).fillna("")

    # ---- backbone ---------------------------------------------------------------------------------------

    @cached_property
    def network(self) -> Classifier:
        """The classifier in eval mode: trained here (resumed if interrupted) or loaded from its checkpoint."""
        torch.manual_seed(self.seed)
        network = build(self.config.backbone, self.config.id.num_classes)
        if self.config.backbone.training is not None:
            with locked(self.model_directory):
                train_classifier(
                    network,
                    self.image_set("train"),
                    self.image_set("validation") if self.config.id.validation else None,
                    self.transform,
                    self.config.backbone.training,
                    seed=self.seed,
                    device=self.device,
                    directory=self.model_directory,
                )
        elif self.config.backbone.checkpoint is not None:
            load_checkpoint(network, resolve_path(self.config.backbone.checkpoint))
        return network.eval().to(self.device)

    @property
    def model_directory(self) -> Path:
        """Where a network trained here keeps weights.safetensors and history.csv."""
        sets = [self.image_set(name).fingerprint for name in self.id_names if name != "test"]
        backbone = self.config.backbone.model_dump(exclude={"expected_accuracy", "tolerance"})
        settings = [backbone, self.config.id.num_classes, sets, self.transform.fingerprint, self.seed]
        key = sha256_of_json([*settings, self.device.type, TRAINING_VERSION])
        return self.run_dir / "models" / key[:SHORT]

    @property
    def training_history(self) -> pd.DataFrame | None:
        """The learning curve, one row an epoch; None for a network that was not trained here."""
        if self.config.backbone.training is None:
            return None
        _ = self.network
        return pd.read_csv(self.model_directory / "history.csv")

    @cached_property
    def head(self) -> Head:
        return Head.of(self.network)

    # ---- banks ------------------------------------------------------------------------------------------

    def bank(self, name: str) -> StoredBank:
        """The feature bank of an image set; the forward pass runs if it has not yet.

        Raises
        ------
        InputError : see features.extract
        """
        if name not in self._banks:
            self._banks[name] = extract(
                self.network,
                self.image_set(name),
                self.transform,
                self._bank_directory(name),
                self.config.features,
                self.device,
            )
        return self._banks[name]

    def _bank_directory(self, name: str) -> Path:
        taps = self.config.features.taps
        key = bank_key(self.network, self.image_set(name), self.transform, taps, self.device)
        return self.run_dir / "banks" / key[:SHORT]

    @cached_property
    def id_accuracy(self) -> float:
        """Percent of ID test images classified correctly, held against the config's expectation.

        Raises
        ------
        InputError : further than `tolerance` from `expected_accuracy`
        """
        found = accuracy(self.bank("test"))
        expected, tolerance = self.config.backbone.expected_accuracy, self.config.backbone.tolerance
        if expected is not None and abs(found - expected) > tolerance:
            raise InputError(
                f"The ID accuracy of {self.config.name} is {found:.2f} %, expected {expected:.2f} ± {tolerance:.2f} %: "
                "check the label order, the normalisation (transform.mean, transform.std) and the checkpoint, "
                "or correct backbone.expected_accuracy."
            )
        return found

    def describe_banks(self) -> pd.DataFrame:
        """One row a bank: images, features, seconds and images a second of its forward pass."""
        rows = []
        for name in ["train", "test", *self.ood_groups]:
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

    # ---- scores and results -----------------------------------------------------------------------------

    def detector(self, row: str) -> Detector:
        """The detector of a row of the config, fitted on the ID training bank.

        A method that the config leaves out comes with its defaults, so that its notebook runs all the same.

        Raises
        ------
        InputError : neither a row of the config nor a method
        """
        detector = self._unfitted(row)
        if not hasattr(detector, "head_"):
            detector.fit(self.bank("train"), self.head)
        return detector

    def _unfitted(self, row: str) -> Detector:
        if row in self.detectors:
            return self.detectors[row]
        if row not in DETECTORS:
            raise InputError(
                f"No detector {row!r} in {self.config.name}; {nearest(row, [*self.detectors, *DETECTORS])}"
            )
        return self._defaults.setdefault(row, create(row))

    def _score_fingerprint(self, row: str) -> str:
        detector = self._unfitted(row)
        sets = ["train", "test", *self.ood_groups]
        return sha256_of_json(
            {
                "experiment": [self.config.name, self.seed, detector.label, detector.hyperparameters()],
                "banks": {name: self.bank(name).directory.name for name in sets},
                "groups": self.ood_groups,
                "metrics": self.config.metrics.model_dump(),
                "code": _code_hash(type(detector)),
            }
        )

    def _score(self, row: str) -> tuple[dict[str, np.ndarray], list[dict]]:
        """Scores of every set and the rows of the results table, from disk when their fingerprint is there."""
        path = self.seed_directory / "scores" / f"{row}.safetensors"
        id_accuracy = self.id_accuracy  # the guard stops here, before anything is scored or read
        fingerprint = self._score_fingerprint(row)
        if path.exists():
            try:
                with safe_open(path, framework="np") as stored:
                    metadata = stored.metadata()
                    if metadata["fingerprint"] == fingerprint:
                        names = ("test", *self.ood_groups)
                        return {name: stored.get_tensor(name) for name in names}, json.loads(metadata["rows"])
            except SafetensorError:
                print(f"{path} is damaged and computed anew.", file=sys.stderr)
        detector = self.detector(row)
        scores = {"test": detector.score_samples(self.bank("test")).cpu()}
        rows = []
        for ood_set, group in self.ood_groups.items():
            begin = time.perf_counter()
            scores[ood_set] = detector.score_samples(self.bank(ood_set)).cpu()
            seconds = time.perf_counter() - begin
            pair = scores["test"].numpy(), scores[ood_set].numpy()
            values = metrics.evaluate(*pair)
            resampled = metrics.bootstrap(
                *pair,
                resamples=self.config.metrics.bootstrap_resamples,
                seed=self.seed,
            )
            intervals = {
                f"{metric}_{end}": bound
                for metric, bounds in resampled.items()
                for end, bound in zip(("lo", "hi"), bounds)
            }
            rows.append(
                {
                    "experiment": self.config.name,
                    "seed": self.seed,
                    "method": detector.label,
                    "ood_set": ood_set,
                    "group": group,
                    "n_id": len(pair[0]),
                    "n_ood": len(pair[1]),
                    **values,
                    **intervals,
                    "id_accuracy": id_accuracy,
                    "score_seconds": seconds,
                    "hyperparameters": json.dumps(detector.hyperparameters()),
                    "data_sha256": self._data_hash(ood_set),
                }
            )
        metadata = {"fingerprint": fingerprint, "rows": json.dumps(rows)}
        with atomic_path(path) as temporary:
            save_file(
                {name: value.contiguous() for name, value in scores.items()}, temporary, metadata=metadata
            )
        return {name: value.numpy() for name, value in scores.items()}, rows

    def _data_hash(self, ood_set: str) -> str:
        """The first digits of a SHA-256 over the training, test and OOD images that a result rests on."""
        return sha256_of_json([self.image_set(name).fingerprint for name in ("train", "test", ood_set)])[:16]

    def scores(self, row: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """ID test scores [N] and OOD set -> scores of a row's detector; higher = more in-distribution."""
        scores = dict(self._score(row)[0])
        return scores.pop("test"), scores

    def results(self, rows: Sequence[str] | None = None) -> pd.DataFrame:
        """The long-form results of some rows of the config (default: all), one line a method and OOD set."""
        lines = [line for row in rows or self.detectors for line in self._score(row)[1]]
        published = [
            results.published_values(self.config.published, line["method"], line["ood_set"]) for line in lines
        ]
        return pd.DataFrame([line | values for line, values in zip(lines, published)])[results.COLUMNS]

    def collect_results(self, seeds: Iterable[int] | None = None) -> pd.DataFrame:
        """The results of all methods and seeds, written to results.csv and returned."""
        seeds = [self.seed] if seeds is None else list(seeds)
        table = pd.concat([self.with_seed(seed).results() for seed in seeds], ignore_index=True)
        path = self.directory / "results.csv"
        results.write_results(table, path)
        return results.read_results(path)  # what is in the file, so that tables, figures and report agree

    # ---- figures and tables -----------------------------------------------------------------------------

    def save_figure(self, figure: Figure, name: str) -> Figure:
        """Write figures/<experiment>/<name>.png and .svg and hand the figure back to be shown.

        `name` starts with the notebook's own name, for example 12_line_masks: so run_all.py knows whose it is.
        """
        plots.save_figure(figure, self.figures_directory, name)
        return figure

    def export_tables(self, table: pd.DataFrame, stem: str) -> None:
        """Write a results table to figures/<experiment>/<stem>_fpr95 and _auroc as CSV, Markdown and LaTeX."""
        results.export_tables(table, self.figures_directory, stem, self.missing)

    def record(self) -> dict:
        """What the results rest on, for manifest.json: image sets, weights, accuracy, banks and their forward passes.

        Only what is there is recorded; nothing is trained or passed for it.
        """
        sets = [*self.id_names, *self.ood_groups]
        described = {
            name: {
                "source": self.image_set(name).source,
                "images": len(self.image_set(name)),
                "sha256": self.image_set(name).fingerprint,
                "skipped": self.image_set(name).skipped,
            }
            for name in sets
        }
        record = {"image_sets": described, "missing": self.missing}
        trained = self.model_directory / "weights.safetensors"
        if self.config.backbone.training is not None and not trained.exists():
            return record
        opened = {name: StoredBank.open(self._bank_directory(name)) for name in sets if name != "validation"}
        banks = {name: {"key": bank.directory.name, **bank.record} for name, bank in opened.items() if bank}
        record |= {"weights_sha256": weights_fingerprint(self.network), "banks": banks}
        return record | ({"id_accuracy": accuracy(opened["test"])} if opened["test"] else {})


def _code_hash(detector_class: type[Detector]) -> str:
    """SHA-256 over the code a score depends on, so that changed code is run again: detectors, features,
    metrics, results, this file, and the module of a detector that stands outside this package."""
    package = Path(__file__).parent
    names = ("features", "metrics", "results", "pipeline")
    files = [*sorted((package / "detectors").glob("*.py")), *(package / f"{name}.py" for name in names)]
    try:
        own = inspect.getsource(sys.modules[detector_class.__module__])
    except (OSError, TypeError):  # defined in a notebook: its cells are no file, so never taken for unchanged
        own = str(time.time_ns())
    return sha256_of_json([sha256_of_file(file) for file in files] + [own])
