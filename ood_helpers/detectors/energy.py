"""Energy: the negative free energy of the logits."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from torch import Tensor

from ood_helpers.banks import FeatureBank
from ood_helpers.detectors.base import DETECTORS, Detector


def energy_score(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """S = T logsumexp_c(z_c / T) of logits [N, C] -> [N]; higher = more in-distribution."""
    return temperature * (logits / temperature).logsumexp(dim=1)


@DETECTORS.register("energy")
@dataclass
class Energy(Detector):
    """Score S = T logsumexp_c(z_c / T).

    Hyper-parameters
    ----------------
    temperature : T, above 0
    """

    temperature: float = 1.0

    title: ClassVar[str] = "Energy"
    source: ClassVar[str] = "Liu et al., NeurIPS 2020, arXiv 2010.03759"

    def _check(self) -> None:
        self._check_number("temperature", 0, inf, open_low=True)

    def _score(self, shard: FeatureBank) -> Tensor:
        return energy_score(shard.logits, self.temperature)
