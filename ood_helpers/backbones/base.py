"""The interface of every backbone."""

from typing import ClassVar

from torch import Tensor, nn

from ood_helpers.errors import InputError


class Classifier(nn.Module):
    """An image classifier that shows its penultimate layer: forward(x) = head(pool(feature_map(x))).

    A subclass defines `feature_map` and sets `head`, a linear layer with weight [C, D] and bias [C].
    Images are normalised float tensors [N, 3, H, W].
    """

    head: nn.Linear
    variant = ""  # what changes the outputs and is not in the weights
    # The modules of each block, from the input to the output: together all of the network but the head.
    blocks: ClassVar[tuple[tuple[str, ...], ...]]

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

    def own_name(self, name: str) -> str:
        """The name here of a parameter that public checkpoints call `name`."""
        return name

    def last_parameters(self, depth: int) -> list[nn.Parameter]:
        """The parameters of the last `depth` blocks; 0 = none, -1 = all. Those of the head are not among them.

        Raises
        ------
        InputError : the network has fewer blocks
        """
        if not -1 <= depth <= len(self.blocks):
            raise InputError(
                f"Found depth {depth}, expected 0 to {len(self.blocks)}, the number of blocks of "
                f"{type(self).__name__}, or -1 for all of it."
            )
        opened = self.blocks if depth == -1 else self.blocks[len(self.blocks) - depth :]
        names = [name for block in opened for name in block]
        return [parameter for name in names for parameter in self.get_submodule(name).parameters()]

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
