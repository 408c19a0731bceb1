"""Any detector of the library pytorch-ood that works on logits or pooled features, as a row of an experiment."""

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ood_helpers.banks import Bank, FeatureBank, Head
from ood_helpers.detectors.base import FAMILIES, Detector
from ood_helpers.errors import InputError, nearest

PREFIX = "pytorch_ood."  # of the names that configs and `create` know these detectors by
CHUNK = 2**25  # numbers in the largest array a chunk makes of theirs, their DICE's [chunk, C, D]: 128 MiB

# On maps of one position, which pooled features are, the rank-1 part that RankFeat removes is everything.
NEEDS_FEATURE_MAPS = ("RankFeat",)


@FAMILIES.register("pytorch_ood")
@dataclass
class PyTorchOOD(Detector):
    """Score S = minus the outlier score of a pytorch-ood detector, fed from banks in float32 on the CPU.

    What theirs is fed with follows from its base class in pytorch-ood:

    - LogitsDetector (EnergyBased, GEN, KLMatching, OpenMax, ...): logits [N, C]
    - FeaturesDetector (KNN, ViM, DICE, Mahalanobis, NNGuide, ...): pooled features [N, D]
    - FeatureMapsDetector (ASH, ReAct, SCALE, VRA): pooled features as maps of one position [N, D, 1, 1]

    Their model, encoder or backbone is left out; `head`, or `w` and `b`, is the head that `fit` gets. Detectors that
    take gradients, several layers or repeated passes (ODIN, Gram, MCD, ...) cannot run on banks.

    Hyper-parameters
    ----------------
    class_name : as in `pytorch_ood.detector`, for example "KNN"
    arguments : constructor arguments of that class by name: numbers, text, lists, None; a list where theirs expects a
        tensor becomes one

    Memory: `fit` hands over the whole training bank at once, N D (or N C) floats, because theirs takes it so; scoring
    goes in chunks. The fitted detector of theirs is kept until an argument changes, and is then fitted again.
    """

    class_name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.class_name} (pytorch-ood)"

    @property
    def source(self) -> str:
        """Their citation of the paper; empty where they give none."""
        paper = _their_class(self.class_name)[0].info.paper
        return f"{paper.title}, {paper.venue} {paper.year}" if paper else ""

    def hyperparameters(self) -> dict[str, Any]:
        """The arguments, the class they are for, and the version of pytorch-ood, on which the defaults depend."""
        import pytorch_ood

        return {"detector": PREFIX + self.class_name, "version": pytorch_ood.__version__, **self.arguments}

    def _change(self, settings: Mapping[str, Any]) -> None:
        """As for any detector, with constructor arguments of theirs as the hyper-parameters."""
        self.arguments = self.arguments | dict(settings)
        self._check()

    def _check(self) -> None:
        # Theirs checks its arguments where it is made, so it is made once before any long work, for any head.
        self._make(Head(torch.zeros(2, 2), torch.zeros(2)))

    def _fit(self, train_bank: Bank) -> None:
        self.train_bank_ = train_bank
        self._fitted()

    def _score(self, shard: FeatureBank) -> Tensor:
        theirs, (_, representation) = self._fitted(), _their_class(self.class_name)
        inputs, predict = _inputs(shard, representation), getattr(theirs, f"predict_{representation}")
        width = self.head_.num_classes if representation == "logits" else self.head_.weight.numel()
        # Their OpenMax takes a class that no sample of its batch is predicted as to be at distance 0, so that scores
        # would depend on the chunks; a sample of each class goes along with every chunk.
        company = torch.eye(self.head_.num_classes) if self.class_name == "OpenMax" else inputs[:0]
        scores = []
        with self._named_errors("scoring"):
            for chunk in inputs.split(max(1, min(1024, CHUNK // width))):
                scores.append(predict(torch.cat([chunk, company]))[: len(chunk)])
        return -torch.cat(scores).to(shard.features)

    def _fitted(self) -> Any:
        key = (self.class_name, json.dumps(self.arguments, sort_keys=True))
        if key not in self._cache:
            self._cache.clear()  # theirs may hold a copy of the training bank: one is enough
        return self._cached(key, self._fit_theirs)

    @torch.enable_grad()  # TemperatureScaling fits by gradient descent, also when it is fitted again while scoring
    def _fit_theirs(self) -> Any:
        theirs, (_, representation) = self._make(self.head_), _their_class(self.class_name)
        # A ReAct that is given its threshold counts as fitted, and fitting would replace that threshold.
        if not theirs.requires_fit or getattr(theirs, "_is_fitted", False):
            return theirs
        inputs, labels = [], []
        for shard in self.train_bank_.shards():
            if shard.labels is None:
                raise InputError(
                    f"{self.title}: the training bank has no labels, expected the labels of the ID training images; "
                    "add them to the set."
                )
            inputs.append(_inputs(shard, representation))
            labels.append(shard.labels.cpu())
        inputs, labels = torch.cat(inputs), torch.cat(labels)
        what = "training logits" if representation == "logits" else "training features"
        self._check_finite(inputs, what, 0)
        with self._named_errors("fitting"):
            getattr(theirs, f"fit_{representation}")(inputs, labels)
        return theirs

    def _make(self, head: Head) -> Any:
        """Their detector for a head, not yet fitted."""
        their_class, representation = _their_class(self.class_name)
        parameters = inspect.signature(their_class).parameters
        supplied = {"model": None, "encoder": None, "backbone": None, **_head_arguments(head, representation)}
        supplied = {name: value for name, value in supplied.items() if name in parameters}
        taken = (*supplied, "detector")  # which maps logits to scores by a function: a config cannot hold it
        own = {name: p for name, p in parameters.items() if name not in taken and p.kind is not p.VAR_KEYWORD}
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name in self.arguments:
            if name in taken or (name not in own and not passes_on):
                hint = nearest(name, own) if own else "it has none."
                raise InputError(f"{self.title} has no argument {name!r}; {hint}")
        missing = [name for name, p in own.items() if p.default is p.empty and name not in self.arguments]
        if missing:
            raise InputError(
                f"{self.title}: {' and '.join(missing)} not given, which pytorch-ood has no default for; add it, for "
                f"example under {PREFIX}{self.class_name} in the config."
            )
        with self._named_errors("construction", f"its own arguments are: {', '.join(own) or 'none'}"):
            given = {
                name: torch.tensor(value) if name in own and own[name].annotation is Tensor else value
                for name, value in self.arguments.items()
            }
            return their_class(**supplied, **given)

    @contextmanager
    def _named_errors(self, step: str, advice: str = "check whether they suit the bank") -> Iterator[None]:
        """Whatever theirs raises, as an InputError that names the method and the step."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".removesuffix(": ").splitlines()[0]
            raise InputError(
                f"{self.title}: {step} failed in pytorch-ood ({reason}) with arguments {self.arguments}; {advice}."
            ) from error


def _their_class(name: str) -> tuple[type, str]:
    """A detector class of pytorch-ood and what it is fed with: logits, features or feature_maps."""
    try:
        from pytorch_ood import api, detector
    except ImportError as error:
        raise InputError(
            f"The detector {PREFIX + name!r} needs the library pytorch-ood, which cannot be imported ({error}); "
            "run pip install 'pytorch-ood>=0.4', or install this package with its extra pytorch-ood."
        ) from None
    bases = {
        api.LogitsDetector: "logits",
        api.FeaturesDetector: "features",
        api.FeatureMapsDetector: "feature_maps",
    }
    classes = dict(inspect.getmembers(detector, inspect.isclass))
    usable = {
        key: (value, representation)
        for key, value in classes.items()
        for base, representation in bases.items()
        if issubclass(value, base) and key not in NEEDS_FEATURE_MAPS
    }
    if name in usable:
        return usable[name]
    if name in classes:
        raise InputError(
            f"The detector {PREFIX + name!r} needs images, feature maps or gradients of the network, expected one that "
            f"works on logits or pooled features, which banks hold: {', '.join(sorted(usable))}."
        )
    spelling = next((key for key in usable if key.lower() == name.lower()), name)
    raise InputError(f"There is no detector {name!r} in pytorch-ood; {nearest(spelling, usable)}")


def _inputs(shard: FeatureBank, representation: str) -> Tensor:
    """What theirs is fed with: logits [N, C], features [N, D] or feature maps [N, D, 1, 1], float32 on the CPU."""
    values = shard.logits if representation == "logits" else shard.features
    values = values.detach().cpu().float()
    return values[:, :, None, None] if representation == "feature_maps" else values


def _head_arguments(head: Head, representation: str) -> dict[str, Any]:
    """The head under the names that constructors of theirs have for it."""
    weight, bias = (values.detach().cpu().float() for values in (head.weight, head.bias))
    # On the meta device no random weights are drawn, which would move the global generator.
    linear = nn.Linear(head.feature_dim, head.num_classes, device="meta")
    linear.weight, linear.bias = (nn.Parameter(values, requires_grad=False) for values in (weight, bias))
    as_module = nn.Sequential(nn.Flatten(), linear) if representation == "feature_maps" else linear
    return {"head": as_module, "w": weight, "b": bias}
