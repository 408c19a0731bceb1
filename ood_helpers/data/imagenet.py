"""The two numberings of ImageNet's 1,000 classes (ILSVRC2012).

The kit and torchvision number a class by its place in the sorted WordNet ids, as class folders do. The devkit of the
challenge numbers them 1 to 1,000 in another order, which the image lists and checkpoints of MOS follow (minus 1). No
class has the same number in both.
"""

import csv
from functools import cache
from pathlib import Path

import numpy as np

CLASSES_PATH = Path(__file__).with_name("imagenet_classes.csv")


def wnids() -> tuple[str, ...]:
    """WordNet ids of the classes, sorted: names of the class folders, [0] is n01440764, a tench."""
    return tuple(wnid for wnid, _ in _classes())


def devkit_to_sorted() -> np.ndarray:
    """Place [1000] int64 in the sorted WordNet ids of each class of the devkit: [devkit id - 1] -> class number."""
    return np.argsort([devkit_id for _, devkit_id in _classes()])


@cache
def _classes() -> tuple[tuple[str, int], ...]:
    with open(CLASSES_PATH, encoding="utf-8", newline="") as file:
        return tuple((row["wnid"], int(row["devkit_id"])) for row in csv.DictReader(file))
