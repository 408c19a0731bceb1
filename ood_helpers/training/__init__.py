"""Training: the shared loop and the plain classifier."""

from ood_helpers.training.classifier import (
    augment,
    augmented_batches,
    check_labels,
    cross_entropy,
    evaluate,
    load_images,
    percent_correct,
    steps_per_epoch,
    train_classifier,
)
from ood_helpers.training.loop import TRAINING_VERSION, train

__all__ = [
    "TRAINING_VERSION",
    "augment",
    "augmented_batches",
    "check_labels",
    "cross_entropy",
    "evaluate",
    "load_images",
    "percent_correct",
    "steps_per_epoch",
    "train",
    "train_classifier",
]
