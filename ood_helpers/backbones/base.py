"""The interface of every backbone."""

from typing import ClassVar

from torch import Tensor, nn


class Classifier(nn.Module):
    """An image classifier that shows its penultimate layer: forward(x) = head(pool(feature_map(x))).

    A subclass defines `feature_map` and sets `head`, a linear layer with weight [C, D] and bias [C].
    Images are normalised float tensors [N, 3, H, W].
    """

    head: nn.Linear
    # Start of a parameter name in public checkpoints -> its start here, where the two differ.
    checkpoint_names: ClassVar[dict[str, str]] = {}

    def feature_map(self, images: Tensor) -> Tensor:
        """The last feature map before global pooling, [N, D, h, w]."""
        raise NotImplementedError

    def pool(self, feature_map: Tensor) -> Tensor:
        """Global average pooling: [N, D, h, w] -> [N, D]."""
        return feature_map.mean(dim=(2, 3))

    def features(self, images: Tensor) -> Tensor:
        """The penultimate features [N, D]."""
        return self.pool(self.feature_map(images))

    def forward(self, images: Tensor) -> Tensor:
        """The logits [N, C]."""
        return self.head(self.features(images))

    @property
    def feature_dim(self) -> int:
        """D, the number of penultimate features."""
        return self.head.in_features

    @property
    def num_classes(self) -> int:
        """C, the number of logits."""
        return self.head.out_features


def initialise(network: nn.Module) -> None:
    """He initialisation for training from scratch: convolutions ~ N(0, 2 / fan_out), head bias = 0.

    Source: He et al., "Delving Deep into Rectifiers", 2015, section 2.2.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
