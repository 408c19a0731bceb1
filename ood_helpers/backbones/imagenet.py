"""torchvision's ResNet-50 and MobileNetV2 as classifiers, with torchvision's weights or a local file."""

import re
from pathlib import Path

import torch
from torch import Tensor

from ood_helpers.backbones.base import Classifier
from ood_helpers.backbones.checkpoints import load_checkpoint
from ood_helpers.errors import InputError, MissingDataError, nearest


class ResNet50(Classifier):
    """ResNet-50 (He et al., CVPR 2016), D = 2048."""

    blocks = (("conv1", "bn1", "layer1"), ("layer2",), ("layer3",), ("layer4",))

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        from torchvision.models import resnet50  # late: importing torchvision takes a second

        network = resnet50(num_classes=num_classes)
        self.conv1, self.bn1 = network.conv1, network.bn1
        self.relu, self.maxpool = network.relu, network.maxpool
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4
        self.head = network.fc

    def feature_map(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class MobileNetV2(Classifier):
    """MobileNetV2 (Sandler et al., CVPR 2018), D = 1280, without torchvision's dropout before the head."""

    # A block begins where the resolution is halved; the last one has the convolution to D channels, too.
    blocks = tuple(
        tuple(f"layers.{layer}" for layer in range(first, last + 1))
        for first, last in ((0, 1), (2, 3), (4, 6), (7, 13), (14, 18))
    )

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        from torchvision.models import mobilenet_v2

        network = mobilenet_v2(num_classes=num_classes)
        self.layers = network.features
        self.head = network.classifier[1]

    def feature_map(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def own_name(self, name: str) -> str:
        # Here `features` is the method that every classifier has.
        return re.sub(r"^features\.", "layers.", name)


def load_torchvision_weights(network: Classifier, architecture: str, weights: str) -> None:
    """Load torchvision's weights, such as IMAGENET1K_V1; downloaded to torch's hub folder when not there.

    Raises
    ------
    InputError : no such name, or the network's number of classes is not that of the weights
    MissingDataError : the download failed
    """
    from torchvision.models import get_model_weights

    enum = get_model_weights(architecture)
    if weights not in enum.__members__:
        raise InputError(
            f"torchvision has no weights {weights!r} for {architecture}; {nearest(weights, enum.__members__)}"
        )
    entry = enum[weights]
    classes = len(entry.meta["categories"])
    if network.num_classes != classes:
        raise InputError(
            f"The weights {weights} of {architecture} have {classes} classes, the experiment has num_classes="
            f"{network.num_classes}; set num_classes: {classes} or give a checkpoint with {network.num_classes} classes."
        )
    path = Path(torch.hub.get_dir(), "checkpoints", entry.url.rsplit("/", 1)[1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # The file name ends in the start of its SHA-256; torch writes beside `path` and renames.
            torch.hub.download_url_to_file(entry.url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1])
        except (OSError, RuntimeError) as error:
            raise MissingDataError(
                f"Could not download {entry.url} ({error}); put this file at {path}, or give its place as "
                "backbone.checkpoint instead of backbone.weights."
            ) from None
    load_checkpoint(network, path)
