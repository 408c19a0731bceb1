"""ResNet-18 for 32 x 32 images: a 3 x 3 stem without max pooling, D = 512.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1. The parameter
names are those of the CIFAR checkpoints that OpenOOD, KNN and ReAct use.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ood_helpers.backbones.base import Classifier, initialise


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions added to the input, or to its 1 x 1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(residual + self.shortcut(x), inplace=True)


class CifarResNet18(Classifier):
    """Four groups of two basic blocks with 64, 128, 256 and 512 channels."""

    blocks = (("conv1", "bn1", "layer1"), ("layer2",), ("layer3",), ("layer4",))

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.head = nn.Linear(512, num_classes)
        initialise(self)

    def feature_map(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))
