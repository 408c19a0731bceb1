"""Training a classifier from scratch with cross-entropy."""

from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ood_helpers.backbones.base import Classifier
from ood_helpers.config.backbones import TrainingConfig
from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.transforms import Transform
from ood_helpers.training import batches, loop


def train_classifier(
    network: Classifier,
    train: ImageSet,
    validation: ImageSet | None,
    transform: Transform,
    config: TrainingConfig,
    *,
    seed: int,
    device: str | torch.device,
    directory: Path,
) -> pd.DataFrame:
    """Train `network` from the weights it has with mean cross-entropy; see `ood_helpers.training.loop.train`.

    Returns
    -------
    One row per epoch: epoch, step, learning_rate, train_loss, train_accuracy, validation_loss, validation_accuracy;
    accuracies in percent, the validation's NaN without a validation set.

    Raises
    ------
    InputError : fewer than two images, no labels, labels outside 0 .. C - 1, or a loss that is not finite
    """
    for image_set in (train, *([] if validation is None else [validation])):
        batches.check_labels(image_set, network.num_classes)

    def mean_cross_entropy(network: nn.Module, batch: loop.Batch) -> tuple[Tensor, loop.Values]:
        images, labels = batch
        logits = network(images)
        return F.cross_entropy(logits, labels), {"accuracy": batches.percent_correct(logits, labels)}

    def validate(network: nn.Module) -> dict[str, float]:
        if validation is None:
            return {"loss": float("nan"), "accuracy": float("nan")}
        return batches.evaluate(network, validation, transform, config.batch_size, device)

    per_epoch = batches.steps_per_epoch(len(train), config.batch_size)
    return loop.train(
        network,
        lambda epoch, generator: batches.augmented_batches(train, transform, config, generator, device),
        loop.descent(mean_cross_entropy),
        loop.Schedule.of(config, per_epoch, config.epochs * per_epoch, shape=config.schedule),
        seed=seed,
        device=device,
        directory=directory,
        validate=validate,
        tracking=loop.Tracking(config.save_every),
        settings={**config.model_dump(), "images": len(train)},
        description=f"Training {type(network).__name__}",
    )
