"""DenseNet-BC for 32 x 32 images.

Source: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, sections 3 and 4. The
parameter names are those of the public CIFAR checkpoints of DICE, LINe and HIMPLoS.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ood_helpers.backbones.base import Classifier, initialise
from ood_helpers.errors import InputError


class Bottleneck(nn.Module):
    """BN-ReLU-1x1 convolution to 4 k channels, BN-ReLU-3x3 convolution to k, appended to the input."""

    def __init__(self, channels: int, growth_rate: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth_rate, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth_rate)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        new = self.dropout(self.conv1(F.relu(self.bn1(x), inplace=True)))
        new = self.dropout(self.conv2(F.relu(self.bn2(new), inplace=True)))
        return torch.cat((x, new), dim=1)


class DenseBlock(nn.Module):
    """A chain of bottlenecks, each of which sees the outputs of all before it."""

    def __init__(self, channels: int, depth: int, growth_rate: int, dropout: float):
        super().__init__()
        self.layer = nn.Sequential(
            *(Bottleneck(channels + i * growth_rate, growth_rate, dropout) for i in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Transition(nn.Module):
    """BN-ReLU-1x1 convolution to half the channels, 2 x 2 average pooling."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.dropout(self.conv1(F.relu(self.bn1(x), inplace=True))), 2)


class DenseNet(Classifier):
    """DenseNet-BC: 3 x 3 stem of 2 k channels, three dense blocks, reduction 0.5.

    Parameters
    ----------
    depth : number of layers, 6 n + 4 with n bottlenecks a block; 100 is the "DenseNet-101" of the OOD papers
    growth_rate : k, channels that a bottleneck adds; depth 100 and k = 12 give D = 342
    dropout : rate in [0, 1) behind every convolution of a block or transition, in training only

    Raises
    ------
    InputError : depth is not 6 n + 4
    """

    blocks = (("conv1", "block1"), ("trans1", "block2"), ("trans2", "block3", "bn1"))

    def __init__(self, num_classes: int, depth: int = 100, growth_rate: int = 12, dropout: float = 0.0):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise InputError(
                f"Found DenseNet depth {depth}, expected 6 n + 4 with n >= 1, for example 22, 40 or 100."
            )
        bottlenecks = (depth - 4) // 6
        grown = bottlenecks * growth_rate
        channels = 2 * growth_rate
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.block1 = DenseBlock(channels, bottlenecks, growth_rate, dropout)
        self.trans1 = Transition(channels + grown, dropout)
        channels = (channels + grown) // 2
        self.block2 = DenseBlock(channels, bottlenecks, growth_rate, dropout)
        self.trans2 = Transition(channels + grown, dropout)
        channels = (channels + grown) // 2
        self.block3 = DenseBlock(channels, bottlenecks, growth_rate, dropout)
        self.bn1 = nn.BatchNorm2d(channels + grown)
        self.head = nn.Linear(channels + grown, num_classes)
        initialise(self)

    def feature_map(self, images: Tensor) -> Tensor:
        x = self.trans1(self.block1(self.conv1(images)))
        x = self.block3(self.trans2(self.block2(x)))
        return F.relu(self.bn1(x), inplace=True)
