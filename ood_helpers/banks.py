"""Feature banks: what one forward pass per image set leaves behind, read by every detector, and views of them.

A bank holds the pooled penultimate features [N, D], the logits [N, C] and the labels [N] of one image set. Whatever it is
(in memory, on disk, with another head, together with its images), it is read in shards that fit in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from ood_helpers.backbones.base import Classifier
from ood_helpers.backbones.pixels import PixelNetwork
from ood_helpers.errors import InputError
from ood_helpers.storage import Shards


@dataclass(frozen=True)
class Head:
    """The linear classifier on the pooled features: logits = features weight^T + bias.

    weight [L, D], bias [L]; L is the number of classes C, unless a subclass says otherwise.
    """

    weight: Tensor
    bias: Tensor

    softmax: ClassVar[str] = "flat"  # over all classes; that of MOS is "group"

    @classmethod
    def of(cls, network: Classifier, **more: Any) -> Self:
        """The head of a classifier, detached, on the CPU."""
        weight, bias = network.head.weight, network.head.bias
        return cls(weight.detach().cpu().clone(), bias.detach().cpu().clone(), **more)

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[:1]:
            found = f"weight {tuple(self.weight.shape)} and bias {tuple(self.bias.shape)}"
            raise InputError(
                f"A head has {found}, expected [C, D] and [C]; pass the weights of a linear layer."
            )

    @property
    def num_logits(self) -> int:
        return self.weight.shape[0]

    @property
    def num_classes(self) -> int:
        return self.num_logits

    @property
    def feature_dim(self) -> int:
        return self.weight.shape[1]

    def to(self, *args, **kwargs) -> Self:
        """The head in another dtype or on another device, as torch.Tensor.to."""
        return replace(self, weight=self.weight.to(*args, **kwargs), bias=self.bias.to(*args, **kwargs))

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, L] of features [N, D]."""
        return features @ self.weight.T + self.bias

    def classify(self, logits: Tensor) -> Tensor:
        """Predicted classes [N] of logits [N, L]."""
        return logits.argmax(dim=1)


class Bank(Protocol):
    """What every bank offers.

    key : what tells banks on disk apart; None for one in memory
    features : [N, D]
    logits : [N, L]
    labels : int64 [N], or None
    """

    key: str | None
    features: Tensor
    logits: Tensor
    labels: Tensor | None

    def __len__(self) -> int: ...

    def shards(self) -> Iterator["FeatureBank"]:
        """The bank in pieces that fit in memory, in order."""
        ...

    def load(self) -> "FeatureBank":
        """The whole bank in memory."""
        ...


@dataclass(frozen=True)
class FeatureBank:
    """A bank in memory.

    features : [N, D]
    logits : [N, L]
    labels : int64 [N], or None
    taps : {module: pooled outputs [N, D_l]}
    background : [N], the logit of a background or outlier class that is no class of the head, or None
    """

    features: Tensor
    logits: Tensor
    labels: Tensor | None = None
    taps: dict[str, Tensor] = field(default_factory=dict)
    background: Tensor | None = None

    key: ClassVar[None] = None

    def __post_init__(self) -> None:
        images, numbers = len(self.features), {"labels": self.labels, "background": self.background}
        for name, tensor in {"logits": self.logits, **numbers, **self.taps}.items():
            if tensor is not None and (len(tensor) != images or (name in numbers and tensor.ndim > 1)):
                raise InputError(
                    f"A feature bank has {images} rows of features and {len(tensor)} of {name} "
                    f"{[*tensor.shape]}, expected one row per image, of labels and background one number."
                )

    def __len__(self) -> int:
        return len(self.features)

    def shards(self) -> Iterator["FeatureBank"]:
        """This bank, as a single piece."""
        yield self

    def load(self) -> "FeatureBank":
        """This bank."""
        return self

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The bank with all its tensors changed alike."""

        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: function(tensor) for name, tensor in value.items()}
            return function(value) if isinstance(value, Tensor) else value

        return replace(self, **{item.name: changed(getattr(self, item.name)) for item in fields(self)})

    def to(self, device: torch.device | str) -> Self:
        """The bank with all its tensors on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def take(self, rows: Any) -> Self:
        """Some images of the bank, as an index of a tensor names them."""
        return self.map(lambda tensor: tensor[rows])

    @staticmethod
    def joined(shards: "Sequence[FeatureBank]") -> "FeatureBank":
        """The samples of several shards as one FeatureBank; a single shard is given back as it is."""
        if len(shards) == 1:
            return shards[0]

        def all_of(name: str) -> Tensor | None:
            parts = [getattr(shard, name) for shard in shards]
            return None if parts[0] is None else torch.cat(parts)

        columns = {name: all_of(name) for name in ("features", "logits", "labels", "background")}
        taps = {name: torch.cat([shard.taps[name] for shard in shards]) for name in shards[0].taps}
        return FeatureBank(**columns, taps=taps)


class BankView:
    """A bank that gives shards; the rest follows from them."""

    key: str | None

    def shards(self) -> Iterator[FeatureBank]:
        """The bank in pieces that fit in memory, in order."""
        raise NotImplementedError

    def load(self) -> FeatureBank:
        """The whole bank in memory; memory-mapped where it is a single shard on disk."""
        return FeatureBank.joined(list(self.shards()))

    @cached_property
    def features(self) -> Tensor:
        return self.load().features

    @cached_property
    def logits(self) -> Tensor:
        return self.load().logits

    @cached_property
    def labels(self) -> Tensor | None:
        return self.load().labels


@dataclass(frozen=True, eq=False)
class StoredBank(BankView):
    """A complete bank on disk.

    record : images, seconds and images per second of its pass
    """

    stored: Shards
    key: str

    @property
    def record(self) -> dict:
        return self.stored.record

    def __len__(self) -> int:
        return len(self.stored)

    def shards(self) -> Iterator[FeatureBank]:
        """One memory-mapped FeatureBank per shard, in order."""
        for shard in self.stored:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
            names = [name for name in tensors if name.startswith("taps.")]
            taps = {name.removeprefix("taps."): tensors.pop(name) for name in names}
            yield FeatureBank(**tensors, taps=taps)


@dataclass(frozen=True, eq=False)
class _Around(BankView):
    """A bank around another one."""

    bank: Bank

    def __len__(self) -> int:
        return len(self.bank)

    @property
    def key(self) -> str | None:
        return self.bank.key

    @property
    def record(self) -> dict:
        """That of the forward pass."""
        return self.bank.record


@dataclass(frozen=True, eq=False)
class HeadBank(_Around):
    """A bank with the logits of another head on the same features, computed whenever it is read."""

    head: Head
    own_key: str

    @property
    def key(self) -> str:
        return self.own_key

    def shards(self) -> Iterator[FeatureBank]:
        for shard in self.bank.shards():
            yield replace(shard, logits=self.head.logits(shard.features))


@dataclass(frozen=True, eq=False)
class BackgroundBank(_Around):
    """A bank of K + 1 logits, the last that of background or outliers, read as K logits and the background beside them."""

    def shards(self) -> Iterator[FeatureBank]:
        for shard in self.bank.shards():
            yield replace(shard, logits=shard.logits[:, :-1], background=shard.logits[:, -1])


@dataclass(frozen=True, eq=False)
class MappedBank(_Around):
    """A bank whose shards are changed by a function when they are read."""

    function: Callable[[FeatureBank], FeatureBank]

    key: ClassVar[None] = None

    def shards(self) -> Iterator[FeatureBank]:
        return map(self.function, self.bank.shards())


@dataclass(frozen=True, eq=False)
class DeviceBank(_Around):
    """A bank whose shards are moved to a device when they are read."""

    device: torch.device

    def shards(self) -> Iterator[FeatureBank]:
        for shard in self.bank.shards():
            yield shard.to(self.device)


@dataclass(frozen=True, kw_only=True)
class ImageShard(FeatureBank):
    """A piece of a bank together with the images it was made of and the network.

    network : the classifier of the bank, as a function of pixels
    batches : gives the images, uint8 [B, 3, H, W] in the order of the bank
    name : of the image set, for progress bars
    """

    network: PixelNetwork
    batches: Callable[[], Iterator[Tensor]]
    name: str = "images"

    def pixels(self) -> Iterator[Tensor]:
        """The images in batches, float32 [B, 3, H, W] in [0, 1] on the network's device."""
        for batch in self.batches():
            yield batch.to(self.network.device, non_blocking=True).to(torch.float32).div(255)


@dataclass(frozen=True, eq=False)
class ImageBank(_Around):
    """A bank whose shards also hold the images and the network, for methods that differentiate it.

    network : the classifier the bank was made with
    batches : (start, stop) -> images start, ..., stop - 1 of the set, uint8 [B, 3, H, W]
    name : of the image set, for progress bars
    """

    network: PixelNetwork
    batches: Callable[[int, int], Iterator[Tensor]]
    name: str = "images"

    def shards(self) -> Iterator[ImageShard]:
        start = 0
        for shard in self.bank.shards():
            stop = start + len(shard)
            values = {item.name: getattr(shard, item.name) for item in fields(FeatureBank)}
            yield ImageShard(
                **values, network=self.network, batches=partial(self.batches, start, stop), name=self.name
            )
            start = stop


def with_images(shard: FeatureBank, method: str, remedy: str) -> ImageShard:
    """The shard, which must hold images and network; raises InputError where it does not."""
    if not isinstance(shard, ImageShard):
        raise InputError(
            f"{method}: found a bank without images, expected an ImageBank, as the method differentiates the network "
            f"at the images; {remedy}."
        )
    return shard
