"""KL matching: the distance of the softmax distribution to that of each class."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ood_helpers.banks import Bank, FeatureBank, MappedBank
from ood_helpers.detectors.base import DETECTORS, Detector
from ood_helpers.errors import InputError

TEMPLATES = {"train": "train", "test_leak": "test"}  # value of the hyper-parameter -> image set


@DETECTORS.register("kl_matching")
@dataclass
class KLMatching(Detector):
    """Score S = -min_c KL(p || d_c) with p = softmax(z) and d_c the mean p of the images of class c.

    Hyper-parameters
    ----------------
    templates : "train" = d_c from the ID training images; "test_leak" = from the labelled ID test images, as the
        code of MOS does. The second has seen the labels of what it is evaluated on, each image being part of its
        template: for comparison only. It decides what `fit` is given (`fit_set`), so a change of it asks for a new fit

    Learned
    -------
    templates_ : d [C, C] float64, row c sums to 1
    """

    templates: str = "train"

    title: ClassVar[str] = "KL matching"
    source: ClassVar[str] = "Hendrycks et al., ICML 2022, arXiv 1911.11132"

    @property
    def label(self) -> str:
        return "KL matching (test leak)" if self.templates == "test_leak" else self.title

    def _check(self) -> None:
        self._check_choice("templates", tuple(TEMPLATES))

    @property
    def fit_set(self) -> str:
        return TEMPLATES[self.templates]

    def _fit(self, train_bank: Bank) -> None:
        self.templates_ = self._class_means(MappedBank(train_bank, _probabilities))
        self._fitted_templates = self.templates

    def _score(self, shard: FeatureBank) -> Tensor:
        if self.templates != self._fitted_templates:
            raise InputError(
                f"{self.title}: found templates {self.templates!r} after a fit with {self._fitted_templates!r}, expected "
                "the same; fit again on the other image set."
            )
        return kl_matching_score(shard.logits.softmax(dim=1), self.templates_)


def kl_matching_score(probabilities: Tensor, templates: Tensor) -> Tensor:
    """S = -min_c KL(p || d_c) of probabilities p [N, C] and templates d [K, C] -> [N].

    KL(p || d) = sum p log p - p . log d, with 0 log 0 = 0, so that all templates cost one matrix product. A zero in d
    counts as the smallest positive number: the distance is then large and finite.
    """
    logs = templates.to(probabilities).clamp(min=torch.finfo(probabilities.dtype).tiny).log()
    own = torch.xlogy(probabilities, probabilities).sum(dim=1)
    return -(own - (probabilities @ logs.T).amax(dim=1))


def _probabilities(shard: FeatureBank) -> FeatureBank:
    return FeatureBank(shard.logits.double().softmax(dim=1), shard.logits, shard.labels)
