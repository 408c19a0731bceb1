"""ReAct: rectified activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

from torch import Tensor

from ood_helpers.banks import Bank, FeatureBank
from ood_helpers.detectors.base import DETECTORS, Detector
from ood_helpers.errors import InputError
from ood_helpers.kernels.shaped_energy import Shaping, shaped_energy
from ood_helpers.statistics import activation_percentile


@DETECTORS.register("react")
@dataclass
class ReAct(Detector):
    """Score S = logsumexp(min(f, c) W^T + b): unusually large activations, typical of OOD input, are cut at c.

    Hyper-parameters, exactly one of
    --------------------------------
    percentile : in [0, 100]; c = this percentile of all activations of the ID training bank (90 when neither is given)
    clip : c itself, above 0

    `fit` keeps a reference to the training bank (`train_bank_`), from which any percentile is read exactly.
    """

    percentile: float | None = None
    clip: float | None = None

    title: ClassVar[str] = "ReAct"
    source: ClassVar[str] = "Sun, Guo and Li, NeurIPS 2021, arXiv 2111.12797"
    float32_on_cuda: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.percentile is None and self.clip is None:
            self.percentile = 90.0
        super().__post_init__()

    def _check(self) -> None:
        if (self.percentile is None) == (self.clip is None):
            found = "neither" if self.clip is None else f"both ({self.percentile!r} and {self.clip!r})"
            raise InputError(
                f"ReAct: found {found} of percentile and clip, expected one; set the other to None."
            )
        self._check_number("percentile", 0, 100, optional=True)
        self._check_number("clip", 0, inf, optional=True, open_low=True)

    def _change(self, settings: Mapping[str, Any]) -> None:
        """As for any detector; a value of one rule switches the other off."""
        other = {"percentile": "clip", "clip": "percentile"}
        super()._change({other[name]: None for name in other if name in settings} | dict(settings))

    def _fit(self, train_bank: Bank) -> None:
        self._check_training_features(train_bank)
        self.train_bank_ = train_bank

    def clip_value(self) -> float:
        """The c in use: `clip`, or the percentile of the training activations. Raises InputError if not fitted or out
        of range."""
        self._check_fitted()
        if self.clip is not None:
            return self.clip
        return self._cached(self.percentile, lambda: activation_percentile(self.train_bank_, self.percentile))

    @property
    def learned(self) -> dict[str, Any]:
        return {"clip": self.clip_value()}

    def _score(self, shard: FeatureBank) -> Tensor:
        head = self.head_.to(shard.features)
        return shaped_energy(shard.features, head.weight, head.bias, Shaping(self.clip_value()))
