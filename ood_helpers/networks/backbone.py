"""The backbone of an experiment: trained here, or loaded from its checkpoint."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from ood_helpers.backbones import ARCHITECTURES, build
from ood_helpers.backbones.base import Classifier
from ood_helpers.backbones.checkpoints import load_checkpoint
from ood_helpers.backbones.precision import float32_products
from ood_helpers.config.backbones import BackboneConfig
from ood_helpers.config.base import resolve_path
from ood_helpers.data.archives import provide
from ood_helpers.data.transforms import image_batches
from ood_helpers.errors import InputError
from ood_helpers.networks.base import Context, Network, once
from ood_helpers.progress import track
from ood_helpers.storage import Entry
from ood_helpers.training.classifier import train_classifier
from ood_helpers.training.tracking import checkpoint_path


class Backbone(Network):
    """A network trained here (resumed if interrupted) or loaded from its checkpoint: that of the config, or another one."""

    recipe: BackboneConfig

    def __init__(self, context: Context, recipe: BackboneConfig | None = None) -> None:
        recipe = context.config.backbone if recipe is None else recipe
        super().__init__(context, "", context.config.name, "backbone", recipe)
        self.trained_here = recipe.training is not None

    def _make(self) -> Classifier:
        run = self.context
        torch.manual_seed(run.seed)
        network = build(self.recipe, run.config.id.num_classes)
        if self.trained_here:
            with self.training_entry().locked():
                sets, options = self._id_sets(), self._training_options()
                train_classifier(network, *sets, run.transform, self.recipe.training, **options)
        elif self.recipe.checkpoint is not None:
            load_checkpoint(network, provide(self.recipe.checkpoint))
        return network

    def training_entry(self) -> Entry:
        return self._entry_of_training(
            ["ood_helpers.training.classifier", ARCHITECTURES[self.recipe.architecture]],
            backbone=self.recipe.model_dump(exclude={"expected_accuracy", "tolerance"}),
            classes=self.context.config.id.num_classes,
        )

    def start(self, which: str | int = "last") -> Classifier:
        """A copy of the backbone with the weights that a training starts from; see recipes.EpochTrainingRecipe.start.

        Raises
        ------
        InputError : `best` or an epoch of a backbone that was not trained here, or an epoch it has not saved
        """
        # a network that was differentiated by its input has been frozen for that
        return copy.deepcopy(self._start(which)).requires_grad_(True)

    @once
    def _start(self, which: str | int) -> Classifier:
        if isinstance(which, str) and which != "best":
            network = copy.deepcopy(self.model())
            if which != "last":
                load_checkpoint(network, resolve_path(which))
            return network
        if not self.trained_here:
            raise InputError(
                f"Found start: {which}, but the backbone is a checkpoint and has no epochs, expected `last` or the path of "
                "another checkpoint; change start."
            )
        epochs = self.epochs()
        saved = epochs | {"best": checkpoint_path(self.training_entry().directory, "best")}
        path = saved.get(which)
        if path is None or not path.exists():
            raise InputError(
                f"The training of the backbone has not saved epoch {which}, only {list(epochs)} and the "
                "best; set backbone.training.save_every, or start from another one."
            )
        return self._with_weights(path)

    @once
    def feature_maps(self, name: str) -> Tensor:
        """The last feature maps [N, D, h, w] of an image set, on the CPU; all in memory, where they stay."""
        maps, start = None, 0
        for batch in pass_to_maps(self, name):
            if maps is None:
                maps = torch.empty(len(self.context.image_sets[name]), *batch.shape[1:])
            maps[start : start + len(batch)] = batch
            start += len(batch)
        return maps


@torch.no_grad()
def pass_to_maps(network: Network, name: str) -> Iterator[Tensor]:
    """The last feature maps [B, D, h, w] of an image set, batch by batch; nothing is kept."""
    run = network.context
    image_set = run.image_sets[name]
    with track(description=f"Feature maps of {image_set.name}", total=len(image_set), unit="image") as bar:
        for images in image_batches(image_set, run.transform, 0, len(image_set), run.batch_size):
            inputs = run.transform.normalise(images.to(run.device))
            with float32_products():  # not while the caller has the maps
                maps = network.model().feature_map(inputs.contiguous(memory_format=torch.channels_last))
            yield maps
            bar.update(len(images))
