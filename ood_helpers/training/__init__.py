"""Training: the shared loop, the plain classifier, and fine-tuning with a flat or a group softmax."""

from ood_helpers.training.classifier import (
    augment,
    augmented_batches,
    check_labels,
    cross_entropy,
    evaluate,
    load_images,
    percent_correct,
    softmax_losses,
    steps_per_epoch,
    train_classifier,
)
from ood_helpers.training.fine_tuning import (
    approximation,
    default_schedule,
    exact_on_features,
    fine_tune,
    mixup_alpha,
    train_head,
    zero_head,
)
from ood_helpers.training.loop import TRAINING_VERSION, train

__all__ = [
    "TRAINING_VERSION",
    "approximation",
    "augment",
    "augmented_batches",
    "check_labels",
    "cross_entropy",
    "default_schedule",
    "evaluate",
    "exact_on_features",
    "fine_tune",
    "load_images",
    "mixup_alpha",
    "percent_correct",
    "softmax_losses",
    "steps_per_epoch",
    "train",
    "train_classifier",
    "train_head",
    "zero_head",
]
