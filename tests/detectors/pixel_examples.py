"""Image banks and small networks for the tests of detectors that differentiate the network."""

import torch
from detector_examples import Shards
from torch import nn

from ood_helpers.backbones.base import Classifier
from ood_helpers.backbones.pixels import PixelNetwork
from ood_helpers.banks import FeatureBank, Head, ImageBank, ImageShard

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
LAYERS = ("stem", "deep", "features")


class LinearNetwork:
    """logits = W x + b of "pixels" x [B, 1, 1, D], which are the output of every layer."""

    device = torch.device("cpu")

    def __init__(self, weight, bias=0.0):
        self.weight = torch.tensor(weight, dtype=torch.float64)
        self.bias = torch.zeros(len(weight), dtype=torch.float64) + torch.tensor(bias, dtype=torch.float64)

    def logits(self, pixels):
        return pixels.flatten(1) @ self.weight.T + self.bias

    def pooled(self, pixels, names):
        return dict.fromkeys(names, pixels.flatten(1))

    @property
    def head(self):
        return Head(self.weight, self.bias)


class Given(ImageShard):
    """Images that are given as numbers, of any range."""

    def pixels(self):
        yield from self.batches()


def given(network, rows):
    x = torch.tensor(rows, dtype=torch.float64)
    return Given(x, network.logits(x), network=network, batches=lambda: iter([x[:, None, None]]))


def given_pixels(network, pixels, labels):
    """The bank of a PixelNetwork of pixels [N, 3, H, W], together with these."""
    bank = vars(bank_of_pixels(network, pixels, labels))
    return Given(**bank, network=network, batches=lambda: iter(pixels.split(7)))


class SmallNetwork(Classifier):
    """Two convolutions, the output of the first changed in place."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.head = nn.Linear(6, classes)

    def feature_map(self, images):
        return nn.functional.gelu(self.deep(self.stem(images).relu_()))


def normalised(pixels):
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def bank_of_pixels(network, pixels, labels, taps=LAYERS[:2]):
    """The bank of a PixelNetwork of pixels [N, 3, H, W] in [0, 1]."""
    with torch.no_grad():
        logits = network.logits(pixels)
        outputs = network.pooled(pixels, (*taps, "features"))
    return FeatureBank(outputs.pop("features"), logits, labels.to(logits.device), outputs)


def image_bank(network, count, seed, device="cpu", mean=MEAN, std=STD, size=6, taps=LAYERS[:2]):
    """Images whose colours follow their class, all of them in shards and batches of uneven sizes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    colours = 40 + 60 * torch.stack([labels == 0, labels == 1, labels == 2], dim=1)
    noise = torch.randint(0, 40, (count, 3, size, size), generator=generator)
    images = (colours[:, :, None, None] + noise).to(torch.uint8)
    network = PixelNetwork(network, mean, std, device)
    bank = bank_of_pixels(network, images.to(device) / 255, labels, taps)
    return ImageBank(bank, network, lambda start, stop: iter(images[start:stop].split(7)), "made")


def shards_of(bank, *sizes):
    """The same image bank in several shards."""
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0).tolist()
    pieces = tuple(bank.bank.take(slice(start, start + size)) for start, size in zip(starts, sizes))
    assert sum(sizes) == len(bank)
    return ImageBank(Shards(pieces), bank.network, bank.batches, bank.name)


def all_pixels(bank):
    return torch.cat(list(bank.batches(0, len(bank)))) / 255
