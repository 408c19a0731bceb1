"""Training: the shared loop, the plain classifier, fine-tuning with a flat or a group softmax, dense training, Unleashing
Mask, outlier exposure."""

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
from ood_helpers.training.dense import (
    IGNORED,
    confusion,
    dense_logits,
    dense_losses,
    evaluate_dense,
    on_map,
    segmentation_metrics,
    train_dense,
    train_dense_head,
)
from ood_helpers.training.exposure import expose
from ood_helpers.training.fine_tuning import (
    approximation,
    default_schedule,
    exact_on_features,
    fine_tune,
    mixup_alpha,
    train_head,
    zero_head,
)
from ood_helpers.training.loop import (
    TRAINING_VERSION,
    checkpoint_path,
    load_weights,
    saved_epochs,
    train,
)
from ood_helpers.training.outliers import OutlierSampler
from ood_helpers.training.unleashing import (
    ESTIMATE_VERSION,
    LossConstraint,
    estimate_constraint,
    prepare_masks,
    unleash,
)
from ood_helpers.training.weight_masks import apply_masks, detach_masks

__all__ = [
    "ESTIMATE_VERSION",
    "IGNORED",
    "TRAINING_VERSION",
    "LossConstraint",
    "OutlierSampler",
    "apply_masks",
    "approximation",
    "augment",
    "augmented_batches",
    "check_labels",
    "checkpoint_path",
    "confusion",
    "cross_entropy",
    "default_schedule",
    "dense_logits",
    "dense_losses",
    "detach_masks",
    "estimate_constraint",
    "evaluate",
    "evaluate_dense",
    "exact_on_features",
    "expose",
    "fine_tune",
    "load_images",
    "load_weights",
    "mixup_alpha",
    "on_map",
    "percent_correct",
    "prepare_masks",
    "saved_epochs",
    "segmentation_metrics",
    "softmax_losses",
    "steps_per_epoch",
    "train",
    "train_classifier",
    "train_dense",
    "train_dense_head",
    "train_head",
    "unleash",
    "zero_head",
]
