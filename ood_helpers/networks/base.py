"""A network of an experiment: a classifier with its head, and a feature bank for every image set."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ood_helpers.backbones.base import Classifier
from ood_helpers.backbones.checkpoints import load_checkpoint, weights_fingerprint
from ood_helpers.backbones.pixels import PixelNetwork
from ood_helpers.banks import Bank, Head, ImageBank
from ood_helpers.config.base import resolve_path
from ood_helpers.config.experiment import ExperimentConfig
from ood_helpers.config.networks import NetworkRecipe
from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.transforms import Transform, image_batches
from ood_helpers.errors import InputError
from ood_helpers.extract import bank_entry, extract, pass_batch_size
from ood_helpers.image_sets import ImageSets
from ood_helpers.registry import Registry
from ood_helpers.statistics import accuracy
from ood_helpers.storage import Entry, Store, notice
from ood_helpers.training.loop import finished
from ood_helpers.training.tracking import DamagedWeights, load_weights, saved_epochs

NETWORKS = Registry("network")  # training method -> network


@dataclass(frozen=True)
class Context:
    """What a network needs of its experiment."""

    config: ExperimentConfig
    seed: int
    device: torch.device
    store: Store
    image_sets: ImageSets

    @cached_property
    def transform(self) -> Transform:
        return Transform(**dict(self.config.transform))

    @property
    def batch_size(self) -> int:
        """Images in a batch of a forward pass."""
        return pass_batch_size(self.config.features, self.device)

    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, their numbers where neither the config nor the test set has any."""
        names = self.config.id.class_names or self.image_sets["test"].class_names
        return names or tuple(map(str, range(self.config.id.num_classes)))


def once(method: Callable) -> Callable:
    """A method of a network or a row whose value is computed once for the same arguments, and stays in its `kept`."""

    @wraps(method)
    def kept(self: Any, *arguments: Any) -> Any:
        key = method.__qualname__, *arguments
        if key not in self.kept:
            self.kept[key] = method(self, *arguments)
        return self.kept[key]

    return kept


class Network:
    """A classifier in eval mode, its head, and a feature bank for every image set of the experiment.

    A subclass gives `_make` and, where it is trained here, `training_entry`.

    Parameters
    ----------
    name : in the config; empty for the backbone
    title : for messages
    setting : the place in the config that describes it
    recipe : with the accuracy that it must reach
    """

    trained_here: bool
    code: tuple[Callable, ...] = ()  # functions that stand between its banks and what detectors see

    def __init__(self, context: Context, name: str, title: str, setting: str, recipe: Any) -> None:
        self.context, self.name, self.title = context, name, title
        self.setting, self.recipe = setting, recipe
        self.kept: dict[tuple, Any] = {}

    # ---- weights and training ---------------------------------------------------------------------------

    @once
    def model(self) -> Classifier:
        """The network in eval mode: loaded, or trained here (resumed if interrupted)."""
        return self._make().eval().to(self.context.device)

    def _make(self) -> Classifier:
        raise NotImplementedError

    def ready(self) -> bool:
        """Whether its weights are there without any training."""
        return not self.trained_here or self.shipped() or finished(self.training_entry().directory)

    def shipped(self) -> bool:
        """Whether its training came with the kit."""
        return self.trained_here and self.training_entry().restore is not None

    @once
    def head(self) -> Head:
        """The head that detectors are given."""
        return self._whole_head()

    def _whole_head(self) -> Head:
        """All outputs of the network's last layer."""
        return Head.of(self.model())

    def classifier(self) -> Classifier:
        """The network with the outputs of `head`."""
        return self._classifier_of(self.model())

    def _classifier_of(self, network: Classifier) -> Classifier:
        return network

    def training_entry(self) -> Entry:
        """Where a network trained here keeps its weights and history."""
        raise NotImplementedError

    def _entry_of_training(self, code: list, image_sets: tuple[str, ...] = (), **key: Any) -> Entry:
        """Where a training by some modules with the ID sets and others is kept."""
        run = self.context
        names = *(name for name in run.image_sets.id_names() if name != "test"), *image_sets
        return run.store.entry(
            "models",
            code=code,
            images={name: run.image_sets[name].fingerprint for name in names},
            transform=run.transform.fingerprint,
            seed=run.seed,
            device=run.device.type,
            **key,
        )

    def _training_options(self) -> dict[str, Any]:
        run = self.context
        return {"seed": run.seed, "device": run.device, "directory": self.training_entry().directory}

    def _held_out(self) -> str | None:
        return "validation" if "validation" in self.context.image_sets.id_names() else None

    def _id_sets(self) -> tuple[ImageSet, ImageSet | None]:
        """The ID images to train on and to validate with."""
        sets, held_out = self.context.image_sets, self._held_out()
        return sets["train"], sets[held_out] if held_out else None

    def history(self) -> pd.DataFrame | None:
        """The learning curve; None for a network that was not trained here."""
        if not self.trained_here:
            return None
        self.model()
        return pd.read_csv(self.training_entry().directory / "history.csv")

    def epochs(self) -> dict[int, Path]:
        """Epoch (0 = before the training) -> weights, of those its training has saved; none without a training. What is shipped
        has none: the network is trained here for them."""
        if not self.trained_here:
            return {}
        own = self._trained_again() if self.shipped() else self
        own.model()
        return saved_epochs(own.training_entry().directory)

    @once
    def _trained_again(self) -> "Network":
        """The network by a training of its own, where one was shipped."""
        own = copy.copy(self)
        own.context = replace(self.context, store=Store(self.context.store.root))
        own.kept = {}
        return own

    def at_epoch(self, epoch: int) -> Classifier:
        """`classifier` as it was after one of the `epochs` of its training, in eval mode.

        Raises
        ------
        InputError : an epoch that was not saved
        """
        paths = self.epochs()
        if epoch not in paths:
            raise InputError(
                f"{self.title} has saved the epochs {list(paths)}, not {epoch}; take one of them, or set save_every."
            )
        return self._classifier_of(self._with_weights(paths[epoch]))

    def _with_weights(self, path: Path) -> Classifier:
        network = self._untrained()
        try:
            load_weights(network, path)
        except DamagedWeights:
            notice(path)
            self._train_again()
            network = self._untrained()
            load_weights(network, path)
        return network.eval().to(self.context.device)

    def _train_again(self) -> None:
        directory = self.training_entry().directory
        for path in [*directory.glob("checkpoints/*"), directory / "record.json"]:
            path.unlink(missing_ok=True)
        self.kept.clear()
        self.model()

    def _untrained(self) -> Classifier:
        """A new network in the form in which its training saves weights."""
        return copy.deepcopy(self.model())

    # ---- banks ------------------------------------------------------------------------------------------

    @once
    def bank(self, name: str) -> Bank:
        """The feature bank of an image set, computed on first use; see `ood_helpers.extract`."""
        return extract(*self._pass(name))

    def bank_entry(self, name: str) -> Entry:
        """Where the forward pass of an image set is kept."""
        return bank_entry(*self._pass(name))

    def _pass(self, name: str) -> tuple[Any, ...]:
        run = self.context
        options = run.transform, run.store, run.config.features, run.device
        return self.model(), run.image_sets[name], *options

    @once
    def key(self, name: str) -> str:
        """What tells the features and logits of an image set apart from others."""
        return self.bank_entry(name).name

    def image_bank(self, name: str) -> ImageBank:
        """The bank of an image set with its images and the network, for methods that differentiate by the input."""
        run = self.context
        image_set = run.image_sets[name]
        options = {"batch_size": run.batch_size, "workers": run.config.features.workers}
        batches = partial(image_batches, image_set, run.transform, **options)
        network = PixelNetwork(self.classifier(), run.transform.mean, run.transform.std, run.device)
        return ImageBank(self.bank(name), network, batches, image_set.name)

    def unreported(self) -> tuple[str, ...]:
        """OOD sets on which it is not reported, as it has learned from images like these."""
        return ()

    @once
    def check_accuracy(self) -> float:
        """Percent of ID test images classified correctly, compared with the config's expectation.

        Raises
        ------
        InputError : further than `tolerance` from `expected_accuracy`
        """
        found = accuracy(self.bank("test"), self.head())
        expected, tolerance = self.recipe.expected_accuracy, self.recipe.tolerance
        if expected is not None and abs(found - expected) > tolerance:
            raise InputError(
                f"The ID accuracy of {self.title} is {found:.2f} %, expected {expected:.2f} ± {tolerance:.2f} %: "
                "check the label order, the normalisation (transform.mean, transform.std) and the checkpoint, "
                f"or correct {self.setting}.expected_accuracy."
            )
        return found


class DerivedNetwork(Network):
    """A network derived from the backbone by a recipe, or the checkpoint of one that was trained elsewhere."""

    recipe: NetworkRecipe

    def __init__(self, context: Context, recipe: NetworkRecipe, name: str, backbone: "Network") -> None:
        title = f"the network {name} of {context.config.name}"
        super().__init__(context, name, title, f"networks.{name}", recipe)
        self.backbone, self.trained_here = backbone, recipe.trained_here

    def settings(self) -> dict[str, Any]:
        """How it was made, ready for JSON: the settings that took effect, or the name of the checkpoint."""
        settings = self.recipe.settings()
        if not self.trained_here:
            settings["checkpoint"] = Path(settings["checkpoint"]).name
        return settings

    def unreported(self) -> tuple[str, ...]:
        return self.recipe.unreported(self.context.config)

    def approximation(self) -> str:
        """What makes its training another one than the recipe's; empty where nothing does."""
        return ""

    def check(self) -> None:
        """Raise InputError for what can be refused before anything long starts."""

    def _make(self) -> Classifier:
        network = self._untrained()
        if self.trained_here:
            with self.training_entry().locked():
                self._train(network)
        else:
            load_checkpoint(network, resolve_path(self.recipe.checkpoint))
            self._order_columns(network.head)
        return network

    def _train(self, network: Classifier) -> None:
        raise NotImplementedError

    def _order_columns(self, head: nn.Linear) -> None:
        """Put the outputs of a checkpoint into the order they have here."""

    def _training_entry(self, code: list, start: Classifier, **key: Any) -> Entry:
        """Where the training by some modules, from the weights of a network, is kept."""
        key = {"start": weights_fingerprint(start), "recipe": self.recipe.settings(), **key}
        return self._entry_of_training([*code, type(start)], self.recipe.image_sets, **key)

    @once
    def check_accuracy(self) -> float:
        backbone = self.backbone.check_accuracy()  # first: without it nothing else is worth a training
        found = super().check_accuracy()
        if not self.trained_here and self.recipe.expected_accuracy is None and found < backbone / 2:
            raise InputError(
                f"The ID accuracy of {self.title} is {found:.2f} %, the backbone's {backbone:.2f} %: check that its groups "
                f"and the order of its classes are those of the checkpoint, or set {self.setting}.expected_accuracy."
            )
        return found
