"""The two numberings of ImageNet's 1,000 classes (ILSVRC2012).

The kit and torchvision number a class by its place in the sorted WordNet ids, as class folders do. The devkit of the
challenge numbers them 1 to 1,000 in another order, which the image lists and checkpoints of MOS follow (minus 1). No
class has the same number in both.
"""

import csv
from pathlib import Path

import numpy as np

CLASSES_PATH = Path(__file__).with_name("imagenet_classes.csv")  # the classes by sorted WordNet id


def devkit_to_sorted() -> np.ndarray:
    """Place [1000] int64 in the sorted WordNet ids of each class of the devkit: [devkit id - 1] -> class number."""
    with open(CLASSES_PATH, encoding="utf-8", newline="") as file:
        return np.argsort([int(row["devkit_id"]) for row in csv.DictReader(file)])
