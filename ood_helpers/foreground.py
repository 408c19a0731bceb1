"""A network with a background class as an image-level classifier: K foreground classes, and the background beside them.

A dense network of DFB gives K + 1 logits at each position. Its head is affine, so their mean over the positions is the
head applied to the pooled features: without any loss the network is a classifier of K + 1 outputs. The last one, the
background, never enters a softmax of the K classes: an image that is all background would become a confident one.

Source: Ding and Pang, "Improving Out-of-Distribution Detection with Disentangled Foreground and Background Features",
ACM MM 2024, arXiv 2303.08727.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from ood_helpers.backbones import Classifier
from ood_helpers.errors import InputError
from ood_helpers.features import FeatureBank, Head, OtherHeadBank, StoredBank


@dataclass(frozen=True, kw_only=True)
class ForegroundShard(FeatureBank):
    """A bank whose logits are those of the K foreground classes; `background` [N] is the logit of the background."""

    background: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.background.shape != (len(self),):
            raise InputError(
                f"A bank of {len(self)} images has the background logits {list(self.background.shape)}, expected one an "
                f"image, [{len(self)}]; pass the column of the background."
            )


@dataclass(frozen=True)
class ForegroundBank:
    """A bank of K + 1 logits, the last that of the background, read as K logits and the background."""

    bank: FeatureBank | StoredBank | OtherHeadBank

    @property
    def record(self) -> dict:
        """That of the forward pass."""
        return self.bank.record

    def __len__(self) -> int:
        return len(self.bank)

    def shards(self) -> Iterator[ForegroundShard]:
        """One ForegroundShard for every shard of the bank, in order."""
        return map(_split, self.bank.shards())

    def load(self) -> ForegroundShard:
        """The whole bank in memory."""
        return _split(self.bank if isinstance(self.bank, FeatureBank) else self.bank.load())


def _split(shard: FeatureBank) -> ForegroundShard:
    values = {field.name: getattr(shard, field.name) for field in fields(FeatureBank)}
    values["logits"], background = shard.logits[:, :-1], shard.logits[:, -1]
    return ForegroundShard(**values, background=background)


def foreground_head(head: Head) -> Head:
    """The head of the K foreground classes, of one of K + 1 outputs."""
    return Head(head.weight[:-1], head.bias[:-1])


def foreground_classifier(network: Classifier) -> Classifier:
    """The same network with the outputs of the K foreground classes alone; everything but the head is shared."""
    view, weight = copy.copy(network), network.head.weight
    view._modules = dict(network._modules)
    # Uninitialised: random weights would move the global generator.
    view.head = nn.utils.skip_init(
        nn.Linear, weight.shape[1], len(weight) - 1, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        view.head.weight.copy_(network.head.weight[:-1])
        view.head.bias.copy_(network.head.bias[:-1])
    return view
