"""Image classifiers that show their penultimate layer, and the reading of their published weights."""

from ood_helpers.backbones.base import Classifier
from ood_helpers.backbones.bit import BiT
from ood_helpers.backbones.checkpoints import load_checkpoint, weights_fingerprint
from ood_helpers.backbones.densenet import DenseNet
from ood_helpers.backbones.imagenet import MobileNetV2, ResNet50, load_torchvision_weights
from ood_helpers.backbones.resnet_cifar import CifarResNet18
from ood_helpers.backbones.wide_resnet import WideResNet
from ood_helpers.config.backbones import ArchitectureConfig, BackboneConfig

__all__ = ["ARCHITECTURES", "Classifier", "build", "load_checkpoint", "weights_fingerprint"]

ARCHITECTURES: dict[str, type[Classifier]] = {
    "densenet_bc": DenseNet,
    "wide_resnet": WideResNet,
    "resnet18_cifar": CifarResNet18,
    "resnet50": ResNet50,
    "mobilenet_v2": MobileNetV2,
    "bit": BiT,
}


def build(config: BackboneConfig, num_classes: int) -> Classifier:
    """The network of a config, with torchvision's weights if it names them, otherwise freshly initialised.

    A checkpoint is not loaded here; see `load_checkpoint`. The fresh weights depend on torch's random
    state: call torch.manual_seed first.

    Raises
    ------
    InputError : unknown weights, or weights with another number of classes
    MissingDataError : weights that could not be downloaded
    """
    settings = config.model_dump(exclude={"architecture", "weights", *ArchitectureConfig.model_fields})
    network = ARCHITECTURES[config.architecture](num_classes, **settings)
    if getattr(config, "weights", None) is not None:
        load_torchvision_weights(network, config.architecture, config.weights)
    return network
