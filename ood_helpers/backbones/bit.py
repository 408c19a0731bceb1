"""BiT: timm's ResNet-v2 with group norm and weight standardisation, and the names in its public checkpoints.

Source: Kolesnikov et al., "Big Transfer (BiT)", ECCV 2020, arXiv 1912.11370, section 3.2; MOS (Huang and Li, CVPR 2021)
takes BiT-S-R101x1 and its relatives as backbones.
"""

import re
from functools import partial

from torch import Tensor, nn

from ood_helpers.backbones.base import Classifier
from ood_helpers.errors import InputError

UNITS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # depth -> bottlenecks a block

# How the name of a unit's parameter begins: resnet/block1/unit01/ in Google's .npz files, body.block1.unit01. in the
# PyTorch code of BiT and MOS.
UNIT = re.compile(r"^(?:resnet/|body\.)(block\d)[/.]unit(\d+)[/.]")
# The rest of it, or all of a name outside of the units -> the name here.
NAMES = {
    "resnet/root_block/standardized_conv2d/kernel": "root.conv.weight",
    "resnet/group_norm/gamma": "norm.weight",
    "resnet/group_norm/beta": "norm.bias",
    "resnet/head/conv2d/kernel": "head.weight",
    "resnet/head/conv2d/bias": "head.bias",
    "a/proj/standardized_conv2d/kernel": "downsample.conv.weight",
    "before_head.gn.weight": "norm.weight",
    "before_head.gn.bias": "norm.bias",
    "head.conv.weight": "head.weight",
    "head.conv.bias": "head.bias",
    "downsample.weight": "downsample.conv.weight",
}
for number, letter in enumerate("abc", start=1):
    NAMES |= {
        f"{letter}/standardized_conv2d/kernel": f"conv{number}.weight",
        f"{letter}/group_norm/gamma": f"norm{number}.weight",
        f"{letter}/group_norm/beta": f"norm{number}.bias",
        f"gn{number}.weight": f"norm{number}.weight",
        f"gn{number}.bias": f"norm{number}.bias",
    }


class BiT(Classifier):
    """ResNet-v2: a root, four blocks of pre-activated bottlenecks, group norm and ReLU; D = 2048 width.

    `root` and `block1` to `block4` give the residual stream as it is, with 64, 256, 512, 1024 and 2048 times `width`
    channels at 1/4, 1/4, 1/8, 1/16 and 1/32 of the resolution.

    Parameters
    ----------
    depth : number of layers, 50, 101 or 152
    width : factor of all numbers of channels, 1 to 4 in the public checkpoints
    half_stride : block4 keeps the resolution of block3, 1/16; the parameters are the same. DFB's public code has it as an
        option, off by default

    Raises
    ------
    InputError : another depth
    """

    blocks = (("root", "block1"), ("block2",), ("block3",), ("block4", "norm"))

    def __init__(self, num_classes: int, depth: int = 101, width: float = 1, half_stride: bool = False):
        super().__init__()
        if depth not in UNITS:
            raise InputError(f"Found BiT depth {depth}, expected one of {', '.join(map(str, UNITS))}.")
        from timm.layers import StdConv2d  # late: importing timm takes seconds
        from timm.models.resnetv2 import ResNetV2

        network = ResNetV2(
            UNITS[depth],
            num_classes=0,
            width_factor=width,
            # The max pool of the checkpoints sees zeros around the map, not minus infinity.
            stem_type="fixed",
            # timm's own BiT has 1e-8, Google's and the code of MOS this.
            conv_layer=partial(StdConv2d, eps=1e-10),
        )
        self.root = network.stem
        self.block1, self.block2, self.block3, self.block4 = network.stages
        if half_stride:  # timm's output_stride would dilate the convolutions of the block, too
            self.variant = "half_stride"
            first = self.block4.blocks[0]
            first.conv2.stride = first.downsample.conv.stride = (1, 1)
        self.norm = network.norm  # with the ReLU
        self.head = nn.Linear(network.num_features, num_classes)
        nn.init.zeros_(self.head.bias)

    def feature_map(self, images: Tensor) -> Tensor:
        x = self.block2(self.block1(self.root(images)))
        return self.norm(self.block4(self.block3(x)))

    def own_name(self, name: str) -> str:
        unit = UNIT.match(name)
        if unit is None:
            return NAMES.get(name, name)
        rest = name[unit.end() :]
        return f"{unit[1]}.blocks.{int(unit[2]) - 1}.{NAMES.get(rest, rest)}"

    def last_parameters(self, depth: int) -> list[nn.Parameter]:
        parameters = super().last_parameters(depth)
        if depth < 1:
            return parameters
        # MOS counts the first norm of a block, which sees the closed one's output, to the latter, and the root to no block.
        first_norm = getattr(self, f"block{5 - depth}").blocks[0].norm1
        closed = {id(parameter) for module in (self.root, first_norm) for parameter in module.parameters()}
        return [parameter for parameter in parameters if id(parameter) not in closed]
