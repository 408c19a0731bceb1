"""Networks of K + 1 outputs, the last of background or outliers, of which detectors see the first K.

The last output never enters a softmax of the K classes: an image that is all background would become a confident one.
"""

import copy

import torch
from torch import nn

from ood_helpers.backbones.base import Classifier
from ood_helpers.banks import BackgroundBank, Bank, Head
from ood_helpers.networks.base import Network, once


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


class BackgroundOutput(Network):
    """A network of K + 1 outputs, of which detectors see the first K in `head` and in the banks, which hold the last logit
    beside them."""

    code = (foreground_head, foreground_classifier)

    def _classifier_of(self, network: Classifier) -> Classifier:
        return foreground_classifier(network)

    @once
    def head(self) -> Head:
        return foreground_head(self._whole_head())

    @once
    def bank(self, name: str) -> Bank:
        return BackgroundBank(super().bank(name))
