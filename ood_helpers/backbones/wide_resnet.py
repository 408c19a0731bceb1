"""WideResNet for 32 x 32 images.

Source: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, section 2. The parameter names are
those of the checkpoints published with Outlier Exposure (Hendrycks et al., 2019) and its successors.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ood_helpers.backbones.base import Classifier, initialise
from ood_helpers.errors import InputError


class BasicBlock(nn.Module):
    """Two pre-activated 3 x 3 convolutions with dropout between them, added to the input.

    Where the number of channels changes, a 1 x 1 convolution of the activated input replaces the input.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.convShortcut = (
            None if in_channels == channels else nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        residual = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(activated)), inplace=True)))
        return residual + (x if self.convShortcut is None else self.convShortcut(activated))


class Group(nn.Module):
    """A chain of basic blocks, the first of which changes the resolution and the number of channels."""

    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int, dropout: float):
        super().__init__()
        self.layer = nn.Sequential(
            BasicBlock(in_channels, channels, stride, dropout),
            *(BasicBlock(channels, channels, 1, dropout) for _ in range(blocks - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(Classifier):
    """WideResNet-depth-widen_factor with D = 64 widen_factor features.

    Parameters
    ----------
    depth : number of layers, 6 n + 4 with n basic blocks a group
    widen_factor : the three groups have 16, 32 and 64 times this many channels
    dropout : rate in [0, 1) between the convolutions of a block, in training only

    Raises
    ------
    InputError : depth is not 6 n + 4
    """

    blocks = (("conv1", "block1"), ("block2",), ("block3", "bn1"))

    def __init__(self, num_classes: int, depth: int = 40, widen_factor: int = 2, dropout: float = 0.0):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise InputError(
                f"Found WideResNet depth {depth}, expected 6 n + 4 with n >= 1, for example 16, 28 or 40."
            )
        blocks = (depth - 4) // 6
        narrow, middle, wide = 16 * widen_factor, 32 * widen_factor, 64 * widen_factor
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = Group(16, narrow, blocks, 1, dropout)
        self.block2 = Group(narrow, middle, blocks, 2, dropout)
        self.block3 = Group(middle, wide, blocks, 2, dropout)
        self.bn1 = nn.BatchNorm2d(wide)
        self.head = nn.Linear(wide, num_classes)
        initialise(self)

    def feature_map(self, images: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        return F.relu(self.bn1(x), inplace=True)
