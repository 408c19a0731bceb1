"""The image sets of an experiment: opened when they are first needed, all of them checked before anything long starts."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from ood_helpers.config.base import DownloadedFile, resolve_path
from ood_helpers.config.experiment import ID_SETS, ExperimentConfig
from ood_helpers.data.archives import provide
from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.sources import open_image_set
from ood_helpers.errors import InputError, MissingDataError, nearest
from ood_helpers.training.batches import check_labels

SHARED = 0.01  # share of equal images that is overlooked, as a few occur in public sets


class ImageSets(Mapping[str, ImageSet]):
    """`train`, `validation`, `test`, `tuning` (the outliers to tune on), `outliers` (to train with) and the OOD sets by
    name.

    Parameters
    ----------
    cache_dir : for unpacked arrays and hashes of files
    skip_missing : continue without OOD sets, and outliers, that are not there
    skip_unreadable : leave images out that cannot be decoded

    Attributes
    ----------
    missing : name -> what is missing and how to get it, of all sets that are left out
    """

    def __init__(
        self,
        config: ExperimentConfig,
        cache_dir: Path,
        *,
        skip_missing: bool = False,
        skip_unreadable: bool = False,
    ) -> None:
        self.config, self.cache_dir = config, cache_dir
        self.skip_missing, self.skip_unreadable = skip_missing, skip_unreadable
        self.missing: dict[str, str] = {}
        self._sources = config.sources()
        self._opened: dict[str, ImageSet] = {}
        self._checked = False

    def __getitem__(self, name: str) -> ImageSet:
        """An image set, opened on first use.

        Raises
        ------
        MissingDataError : not on disk and not to be fetched; names the folder and the command
        InputError : unknown name, damaged data, class names in another order than the config's
        """
        if name not in self._opened:
            if name not in self._sources:
                raise InputError(
                    f"No image set {name!r} in {self.config.name}; {nearest(name, self._sources)}"
                )
            image_set = open_image_set(
                self._sources[name],
                self.title(name),
                cache_dir=self.cache_dir,
                skip_unreadable=self.skip_unreadable,
            )
            if name in ID_SETS:
                self._check_labels(image_set)
            self._opened[name] = image_set
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def opened(self) -> dict[str, ImageSet]:
        """The sets that have been opened so far."""
        return dict(self._opened)

    def title(self, name: str) -> str:
        """The name of a set in tables."""
        if name in ID_SETS:
            return f"{self.config.id.name} {name}"
        return getattr(self.config, name).name if name in ("tuning", "outliers") else name

    def check(self) -> None:
        """Open (and fetch) every image set, and find (or fetch) every checkpoint.

        Raises
        ------
        MissingDataError : names all that is missing, each with its folder and command
        InputError : what networks or hyper-parameters are chosen on is also reported
        """
        if self._checked:
            return
        problems = [
            f"No checkpoint {path}, expected the weights of the network; put the file there."
            for path in checkpoints(self.config)
            if isinstance(path, str) and not resolve_path(path).exists()
        ]
        local = [
            name for name, images in self._sources.items() if images.source not in ("torchvision", "archive")
        ]
        missing: dict[str, str] = {}
        self._open(local, missing, problems)
        if not problems and (not missing or self.skip_missing):  # else nothing is fetched for nothing
            self._open([name for name in self._sources if name not in local], missing, problems)
            for file in checkpoints(self.config):
                try:
                    provide(file)
                except MissingDataError as error:
                    problems.append(str(error))
        if missing and not self.skip_missing:
            hint = "To continue without the missing OOD sets, add --skip-missing (skip_missing=True)."
            problems += [*missing.values(), hint]
        if problems:
            problems.append(
                "If the files are elsewhere, name the folder with --data-root (data_root in a notebook)."
            )
            raise MissingDataError("\n".join(dict.fromkeys(problems)))
        self.missing = missing
        if all(ood.name in missing for ood in self.config.ood):
            raise MissingDataError(
                "All OOD sets are missing, expected at least one:\n" + "\n".join(missing.values())
            )
        self._check_apart()
        self._checked = True

    def _open(self, names: list[str], missing: dict[str, str], problems: list[str]) -> None:
        for name in names:
            try:
                self[name]
            except MissingDataError as error:
                if name in ID_SETS or (name in ("tuning", "outliers") and not self.skip_missing):
                    problems.append(str(error))
                else:
                    missing[name] = str(error)

    def _check_labels(self, image_set: ImageSet) -> None:
        expected, number = self.config.id.class_names, self.config.id.num_classes
        check_labels(image_set, number)
        if len(image_set) == 0:
            raise InputError(f"{image_set.name} has no images, expected at least one; check its source.")
        if expected is None or image_set.class_names is None or tuple(image_set.class_names) == expected:
            return
        found = image_set.class_names
        pairs = itertools.zip_longest(found, expected)
        place = next(i for i, (ours, wanted) in enumerate(pairs) if ours != wanted)
        raise InputError(
            f"{image_set.name} has {len(found)} classes with {found[place : place + 1]} at label {place}, expected "
            f"{len(expected)} with {expected[place : place + 1]} (id.class_names): the label order differs; "
            "reorder the labels or the config's class_names."
        )

    def _check_apart(self) -> None:
        """What is chosen on images, or trained with them, must not be reported on them."""
        chosen_on = [name for name in ("validation", "tuning", "outliers") if name in self._opened]
        reported = ["test", *(ood.name for ood in self.config.ood if ood.name in self._opened)]
        for ours, theirs in itertools.product(chosen_on, reported):
            one, other = self[ours], self[theirs]
            shared = one.shared_with(other)
            if shared > SHARED * min(len(one), len(other)):
                raise InputError(
                    f"{shared:,} of the {len(one):,} images of {one.name} ({ours}), on which networks or hyper-parameters are "
                    f"chosen, are also in {other.name}, which is reported, expected other images; change one of the two."
                )

    def id_names(self) -> list[str]:
        """Those of train, validation and test that the config has."""
        return [name for name in ID_SETS if name in self._sources]

    def ood_sets(self) -> dict[str, str]:
        """OOD set -> near or far, without those that are missing and skipped; near sets first. Checks all sets."""
        self.check()
        groups = {ood.name: ood.group for ood in self.config.ood if ood.name not in self.missing}
        return dict(sorted(groups.items(), key=lambda item: item[1] == "far"))

    def missing_ood(self) -> list[str]:
        """The OOD sets that are left out."""
        return [name for name in self.missing if name not in ("tuning", "outliers")]

    def has(self, name: str) -> bool:
        """Whether `tuning` or `outliers` is needed and there. Checks all sets."""
        self.check()
        return name in self._sources and name not in self.missing

    def describe(self) -> pd.DataFrame:
        """One row per image set: group, source, count, size, SHA-256 (first digits), status."""
        groups = {**dict.fromkeys(self.id_names(), "ID"), **self.ood_sets()}
        extra = {"tuning": "to tune on", "outliers": "to train with"}
        groups |= {name: group for name, group in extra.items() if self.has(name)}
        rows = []
        for name, group in groups.items():
            image_set = self[name]
            width, height = image_set.image(0).size
            skipped = f", {len(image_set.skipped)} unreadable skipped" if image_set.skipped else ""
            rows.append(
                {
                    "set": image_set.name,
                    "group": group,
                    "source": image_set.source,
                    "images": len(image_set),
                    "size": f"{width} x {height}" if image_set.array is not None else "varies",
                    "sha256": image_set.fingerprint[:12],
                    "status": "ready" + skipped,
                }
            )
        for name, problem in self.missing.items():
            left_out = {"group": "", "source": problem, "images": 0, "status": "missing, skipped"}
            rows.append({"set": self.title(name), **left_out})
        return pd.DataFrame(rows).fillna("")


def checkpoints(config: ExperimentConfig) -> list[str | DownloadedFile]:
    """The files of weights that an experiment needs: of the backbone, of networks, and those that trainings start from."""
    files = [] if config.backbone.checkpoint is None else [config.backbone.checkpoint]
    return files + [file for recipe in config.networks.values() for file in recipe.files]
