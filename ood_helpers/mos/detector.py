"""MOS: how unlikely "others" is in the group that fits best."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ood_helpers.banks import FeatureBank
from ood_helpers.detectors.base import DETECTORS, Detector
from ood_helpers.kernels.group_score import group_score
from ood_helpers.mos.groups import Groups


@DETECTORS.register("mos")
@dataclass
class MOS(Detector):
    """Score S = max_k g_k, with g_k = logsumexp of the class logits of group k, minus the logit of its "others".

    The minimum others score of the paper, -min_k p(others in group k) = -1 / (1 + exp S) in [-1, 0], rises with S and
    ranks alike, but in float32 it is exactly -1 for all images that are surely "others" in every group; S keeps them
    apart.

    The head is one with a group softmax, trained so that an image is "others" in every group but its own; see
    `ood_helpers.mos.training`.
    """

    title: ClassVar[str] = "MOS"
    source: ClassVar[str] = "Huang and Li, CVPR 2021, arXiv 2105.01879, section 3"
    softmax: ClassVar[str] = "group"
    default_network: ClassVar[str] = "group"
    float32_on_cuda: ClassVar[bool] = True

    def _score(self, shard: FeatureBank) -> Tensor:
        groups: Groups = self.head_.groups
        return group_score(shard.logits, groups.slices)
