"""What every detector shares: hyper-parameters as dataclass fields, fit, score_samples, threshold, predict."""

import copy
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ood_helpers.backbones.precision import float32_products
from ood_helpers.banks import Bank, FeatureBank, Head, ImageShard
from ood_helpers.config.rows import OF_ROWS
from ood_helpers.errors import InputError, nearest
from ood_helpers.kernels.launch import runs_on_triton
from ood_helpers.metrics import threshold_at_tpr
from ood_helpers.progress import track
from ood_helpers.registry import Registry
from ood_helpers.statistics import class_means


def _check_class(name: str, cls: "type[Detector]") -> None:
    """Raise InputError for a class whose hyper-parameters or whose title would not be seen."""
    wrong = f"The detector {name!r}: {cls.__qualname__}"
    if "__dataclass_fields__" not in vars(cls):
        raise InputError(f"{wrong} is not a dataclass, expected one; put @dataclass above it.")
    known = {field.name for field in fields(cls)}
    if "title" in known or cls.title == Detector.title:
        raise InputError(f"{wrong} has no title, expected its name in tables as title: ClassVar[str].")
    for reserved in known.intersection(OF_ROWS):
        raise InputError(
            f"{wrong} has a hyper-parameter {reserved!r}, a key of every row; choose another name."
        )


DETECTORS = Registry("detector", folder="detectors", check=_check_class)  # name -> class
FAMILIES = Registry("detector", folder="detectors")  # name before a dot -> class for several methods


@dataclass
class Detector:
    """Base of the post-hoc detectors: scores feature banks, HIGHER = MORE IN-DISTRIBUTION.

    A subclass is a dataclass whose fields are its hyper-parameters. It sets `title` (the method's name in
    tables) and `source` (citation), gives `_score(shard) -> [N]`, and where needed `_fit(train_bank)` for what
    it learns (attributes with a trailing underscore) and `_check()` for the ranges of its fields.

    Nothing that depends on a hyper-parameter outlives a change of it: set a field after `fit` and the next
    score uses it. Scores are float64, on the device of the bank that is scored: features and logits come to `_score`
    as float64, so that rounding ties no samples. With `float32_on_cuda` a float32 bank on CUDA comes as it is, for the
    kernels, and its scores agree with those of the CPU to float32 rounding. What `_fit` learns is on the CPU; `_score` moves
    it to the shard, as in `self.means_.to(shard.features)`.

    What a method needs beyond banks and heads it declares, in class variables or properties of their names.
    """

    title: ClassVar[str] = "Detector"
    source: ClassVar[str] = ""
    softmax: ClassVar[str] = "flat"  # of the head that is scored; "group" = one for each group of classes
    default_network: ClassVar[str] = ""  # scored where the row names none; empty = the backbone
    fit_set: ClassVar[str] = "train"  # whose bank `fit` takes; "test" is a leak, and the title has to say so
    needs_images: ClassVar[bool] = False  # whether `score_samples` takes an ImageBank
    needs_training_images: ClassVar[bool] = False  # whether `fit` takes an ImageBank, too
    needs_background: ClassVar[bool] = False  # whether banks must hold the logit of a background class
    tuned_against: ClassVar[str] = (
        ""  # the outliers that a method tunes itself with, beside the validation images
    )
    extra_passes: ClassVar[int] = 0  # forward and backward passes per image beyond the one in its bank
    float32_on_cuda: ClassVar[bool] = False  # whether scoring goes through a Triton kernel there
    joined_features: ClassVar[int] = 0  # shards are scored together up to so many feature values

    def __post_init__(self) -> None:
        self._check()

    @property
    def label(self) -> str:
        """The name in tables, where hyper-parameters say which variant of the method it is."""
        return self.title

    @property
    def learns(self) -> bool:
        """Whether `fit` learns anything from the training bank."""
        return type(self)._fit is not Detector._fit

    @property
    def needs_validation(self) -> bool:
        """Whether `fit` needs `validation_bank`, an ImageBank of labelled ID images outside training and test set."""
        return bool(self.tuned_against)

    @property
    def learned(self) -> dict[str, Any]:
        """Values that the present hyper-parameters leave to the data, as None or a percentile does; ready for JSON.
        Raises InputError if not fitted."""
        return {}

    @property
    def parts(self) -> dict[str, "Detector"]:
        """Detectors whose scores this one joins, by name; see `join`. Empty for a method that scores banks itself."""
        return {}

    def join(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Scores [N] from those of the `parts` on the same samples."""
        raise NotImplementedError(f"{type(self).__name__} has no parts")

    def hyperparameters(self) -> dict[str, Any]:
        """The fields and their present values, ready for JSON."""
        return asdict(self)

    def fit(self, train_bank: Bank, head: Head, validation_bank: Bank | None = None) -> Self:
        """Learn from the features of the ID training images and the classifier's head.

        Parameters
        ----------
        train_bank : features [N, D], logits [N, C], and labels [N] for methods with class means
        head : weight [C, D], bias [C]
        validation_bank : for methods that tune themselves (`needs_validation`), ignored by all others

        Raises
        ------
        InputError : sizes of bank and head differ; labels are missing; a class without images; NaN or infinite
            features; no validation bank where one is needed; a head of another kind of softmax
        """
        if head.softmax != self.softmax:
            raise InputError(
                f"{self.title}: found a head with a {head.softmax} softmax, expected a {self.softmax} softmax; "
                "set network to one that has it (networks in the config)."
            )
        if self.needs_validation and validation_bank is None:
            raise InputError(
                f"{self.title}: found no validation bank, expected labelled ID images outside the training and the test "
                "set to tune on; add id.validation to the config."
            )
        if not len(train_bank):
            raise InputError(
                f"{self.title}: the training bank has no samples, expected some; check its image set."
            )
        for shard in train_bank.shards():
            self._check_sizes(shard, head)
        self.head_, self.validation_bank_ = head, validation_bank
        self._cache: dict[Hashable, Any] = {}
        with float32_products():
            self._fit(train_bank)
        return self

    def score_samples(self, bank: Bank) -> Tensor:
        """Scores [N] of a bank's samples, in order; higher = more in-distribution.

        Raises
        ------
        InputError : not fitted; a hyper-parameter out of range; sizes differ from the head's; NaN or infinite
            features, logits or scores; other than one score per sample
        """
        return self._over_shards(bank, self._one_per_sample, "scores")

    def threshold(self, id_scores: Tensor, tpr: float = 0.95) -> float:
        """The largest threshold that accepts at least the fraction `tpr` of the ID scores; see metrics."""
        return threshold_at_tpr(id_scores, tpr)

    def predict(self, bank: Bank, threshold: float) -> Tensor:
        """+1 (in-distribution, score >= threshold) or -1 (out-of-distribution) for each sample, int64 [N]."""
        return torch.where(self.score_samples(bank) >= threshold, 1, -1)

    def _change(self, settings: Mapping[str, Any]) -> None:
        """Change hyper-parameters, in a copy; raises InputError for an unknown one and a value out of range."""
        _check_known(settings, type(self), self.title)
        for name, value in settings.items():
            setattr(self, name, value)
        self._check()

    @staticmethod
    def _share(variants: "Sequence[Detector]") -> None:
        """Let the fitted variants of one grid share what each of them would compute again."""

    def _fit(self, train_bank: Bank) -> None:
        """Learn what the method needs from the training bank; `head_` is set."""

    def _one_per_sample(self, shard: FeatureBank) -> Tensor:
        scores = self._score(shard)
        if scores.shape != (len(shard),):
            raise InputError(
                f"{self.title}: _score gave a tensor of shape {tuple(scores.shape)} for {len(shard)} samples, expected one "
                "score per sample."
            )
        return scores

    def _score(self, shard: FeatureBank) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has to define _score(shard): one score per sample")

    def _check(self) -> None:
        """Raise InputError for hyper-parameters out of range."""

    def _check_number(
        self, field: str, low: float, high: float, *, optional: bool = False, open_low: bool = False
    ) -> None:
        """Raise InputError unless a field is a finite number in [low, high] ((low, high] with `open_low`)."""
        value = getattr(self, field)
        if value is None and optional:
            return
        number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        if not number or value > high or value < low or (open_low and value == low):
            bounds = f"above {low:g}" if open_low else f"from {low:g}"
            bounds += f" to {high:g}" if isfinite(high) else ""
            none = " or None (off)" if optional else ""
            raise InputError(f"{self.title}: {field} is {value!r}, expected a number {bounds}{none}.")

    def _check_integer(self, field: str, low: int, *, optional: bool = False) -> None:
        value = getattr(self, field)
        if value is None and optional:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            none = " or None" if optional else ""
            raise InputError(f"{self.title}: {field} is {value!r}, expected a whole number from {low}{none}.")

    def _check_choice(self, field: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in choices:
            raise InputError(f"{self.title}: {field} is {value!r}; {nearest(str(value), choices)}")

    def _check_flag(self, field: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, bool):
            raise InputError(f"{self.title}: {field} is {value!r}, expected True or False.")

    def _check_sizes(self, shard: FeatureBank, head: Head) -> None:
        expected = (head.feature_dim, head.num_logits)
        found = (shard.features.shape[1], shard.logits.shape[1])
        if found != expected:
            raise InputError(
                f"{self.title}: the bank has {found[0]} features and {found[1]} logits per sample, the head {expected[0]} "
                f"and {expected[1]}; extract the bank with the network the head belongs to."
            )

    def _check_finite(self, values: Tensor, what: str, start: int) -> None:
        # A finite sum has only finite terms, and is much faster to see than each of them.
        if not values.sum().isfinite():
            bad = ~values.isfinite().reshape(len(values), -1).all(1)
            if bad.any():
                first = start + int(bad.nonzero()[0])
                raise InputError(
                    f"{self.title}: {int(bad.sum())} of samples {start} to {start + len(values) - 1} have NaN or infinite "
                    f"{what} (first: sample {first}), expected finite numbers; check the network and its input."
                )

    def _check_fitted(self) -> None:
        if not hasattr(self, "head_"):
            raise InputError(f"{self.title} is not fitted; call fit(train_bank, head) before anything else.")
        self._check()

    def _over_images(self, shard: ImageShard, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function to the pixels of a shard, batch by batch, and concatenate; on the device of the bank."""
        outputs = []
        with track(description=f"{self.title}, {shard.name}", total=len(shard), unit="image") as bar:
            for pixels in shard.pixels():
                outputs.append(function(pixels))
                bar.update(len(pixels))
        return torch.cat(outputs).to(shard.logits.device)

    @torch.no_grad()
    def _over_shards(self, bank: Bank, function: Callable[[FeatureBank], Tensor], what: str) -> Tensor:
        """Apply a function to every shard, checking what goes in and what comes out, and concatenate."""
        self._check_fitted()
        outputs, start = [], 0
        for shard in self._joined(self._checked(bank)):
            if not (self.float32_on_cuda and runs_on_triton(shard.features)):
                shard = replace(shard, features=shard.features.double(), logits=shard.logits.double())
            with float32_products():
                outputs.append(function(shard).double())
            self._check_finite(outputs[-1], what, start)
            start += len(shard)
        if not outputs:
            raise InputError(f"{self.title}: the bank has no samples, expected some; check its image set.")
        return torch.cat(outputs)

    def _checked(self, bank: Bank) -> Iterator[FeatureBank]:
        """The shards of a bank, each checked before it is given out."""
        start = 0
        for shard in bank.shards():
            self._check_sizes(shard, self.head_)
            self._check_finite(shard.features, "features", start)
            self._check_finite(shard.logits, "logits", start)
            yield shard
            start += len(shard)

    def _joined(self, shards: Iterator[FeatureBank]) -> Iterator[FeatureBank]:
        """The shards, several as one up to `joined_features` numbers."""
        waiting: list[FeatureBank] = []
        for shard in shards:
            numbers = sum(map(len, (*waiting, shard))) * shard.features.shape[1]
            if waiting and numbers > self.joined_features:
                piece, waiting = FeatureBank.joined(waiting), []
                yield piece
            waiting.append(shard)
            if not self.joined_features:  # at once, as one more would have to be in memory
                yield waiting.pop()
        if waiting:
            yield FeatureBank.joined(waiting)

    def _class_means(self, train_bank: Bank) -> Tensor:
        """Mean training feature of each class [C, D] float64; every class must have images."""
        means, counts = class_means(train_bank, self.head_.num_classes)
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            names = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
            raise InputError(
                f"{self.title}: no training image of class {names}, expected at least one of each of the "
                f"{self.head_.num_classes} classes; take more training images."
            )
        if not means.isfinite().all():
            self._check_training_features(train_bank)
        return means

    def _check_training_features(self, train_bank: Bank) -> None:
        start = 0
        for shard in train_bank.shards():
            self._check_finite(shard.features, "training features", start)
            start += len(shard)

    def _cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """A small result kept until the next fit; the key holds every hyper-parameter it depends on."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


def variants(detector: Detector, grid: Mapping[str, Sequence[Any]]) -> list[tuple[dict[str, Any], Detector]]:
    """[({hyper-parameter: value}, copy)] for every combination of values, in the order of the grid; what was fitted is
    shared. Raises InputError for an unknown hyper-parameter and a value out of range."""
    found = []
    for values in itertools.product(*grid.values()):
        variant, settings = copy.copy(detector), dict(zip(grid, values, strict=True))
        variant._change(settings)
        found.append((settings, variant))
    detector._share([variant for _, variant in found])
    return found


def create(name: str, **hyperparameters: Any) -> Detector:
    """A detector by its name in `DETECTORS`, or by one such as `pytorch_ood.KNN`, not yet fitted.

    Raises
    ------
    InputError : unknown name, unknown hyper-parameter, value out of range
    """
    family, _, member = str(name).partition(".")
    if member and family in FAMILIES:
        return FAMILIES[family](member, hyperparameters)
    if name not in DETECTORS:
        raise InputError(f"There is no detector {name!r}; {nearest(str(name), DETECTORS)}")
    _check_known(hyperparameters, DETECTORS[name], f"The detector {name!r}")
    return DETECTORS[name](**hyperparameters)


def _check_known(names: Iterable[str], cls: type[Detector], title: str) -> None:
    known = [field.name for field in fields(cls)]
    for name in names:
        if name not in known:
            hint = nearest(str(name), known) if known else "it has none."
            raise InputError(f"{title} has no hyper-parameter {name!r}; {hint}")
