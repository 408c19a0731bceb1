"""The networks of an experiment, each with its head and the feature banks of the experiment's image sets.

There is the backbone, and there are networks made from it by fine-tuning. One whose features are the backbone's shares
its banks: only the logits are taken anew, by its own head.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from ood_helpers.backbones import Classifier, build, load_checkpoint, weights_fingerprint
from ood_helpers.cam import CAM_VERSION, ClassMaps, PseudoMasks, StoredMaps, maps_key, stored_maps
from ood_helpers.config import (
    BackboneConfig,
    DenseConfig,
    EpochTrainingConfig,
    FineTuningConfig,
    MasksConfig,
    NetworkRecipe,
    OutlierExposureConfig,
    UnleashingMaskConfig,
    resolve_path,
)
from ood_helpers.data import ImageSet, image_batches
from ood_helpers.data.imagenet import devkit_to_sorted
from ood_helpers.errors import InputError
from ood_helpers.features import (
    Head,
    ImageBank,
    OtherHeadBank,
    PixelNetwork,
    StoredBank,
    accuracy,
    bank_key,
    extract,
    float32_products,
    pass_batch_size,
)
from ood_helpers.files import locked, sha256_of_json
from ood_helpers.foreground import ForegroundBank, foreground_classifier, foreground_head
from ood_helpers.groups import Groups, make_groups
from ood_helpers.progress import track
from ood_helpers.training import (
    ESTIMATE_VERSION,
    TRAINING_VERSION,
    apply_masks,
    approximation,
    default_schedule,
    dense_logits,
    detach_masks,
    evaluate_dense,
    exact_on_features,
    expose,
    fine_tune,
    load_images,
    load_weights,
    mixup_alpha,
    on_map,
    prepare_masks,
    saved_epochs,
    train_classifier,
    train_dense,
    train_dense_head,
    train_head,
    unleash,
    zero_head,
)

if TYPE_CHECKING:
    from ood_helpers.pipeline import Experiment

SHORT = 20  # hexadecimal digits of a fingerprint in a folder's name


class ExperimentNetwork:
    """A classifier in eval mode, its head, and a feature bank for every image set of the experiment.

    A subclass gives `network` and, where it is trained here, `model_directory`.
    """

    groups: Groups | None = None
    trained_here: bool

    def __init__(self, experiment: "Experiment", title: str, setting: str) -> None:
        self.experiment, self.title, self.setting = experiment, title, setting
        self._banks: dict[str, StoredBank] = {}
        self._keys: dict[str, str] = {}

    @property
    def network(self) -> Classifier:
        raise NotImplementedError

    @property
    def model_directory(self) -> Path:
        """Where a network trained here keeps weights.safetensors and history.csv."""
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        """Whether its weights are there without any training."""
        return not self.trained_here or (self.model_directory / "weights.safetensors").exists()

    @cached_property
    def head(self) -> Head:
        """The head that detectors are given."""
        return self.whole_head

    @cached_property
    def whole_head(self) -> Head:
        """All outputs of the network's last layer."""
        return Head.of(self.network, self.groups)

    @property
    def classifier(self) -> Classifier:
        """The network with the outputs of `head`."""
        return self.network

    @property
    def training_history(self) -> pd.DataFrame | None:
        """The learning curve; None for a network that was not trained here."""
        if not self.trained_here:
            return None
        _ = self.network
        return pd.read_csv(self.model_directory / "history.csv")

    @cached_property
    def saved_epochs(self) -> dict[int, Path]:
        """Epoch (0 = before the training) -> weights, of those its training has saved; empty for one that was not trained
        here."""
        if not self.trained_here:
            return {}
        _ = self.network
        return saved_epochs(self.model_directory)

    def _untrained(self) -> Classifier:
        """A new network in the form in which its training saves weights."""
        return copy.deepcopy(self.network)

    def _with_weights(self, path: Path) -> Classifier:
        network = self._untrained()
        load_weights(network, path)
        return network.eval().to(self.experiment.device)

    def at_epoch(self, epoch: int) -> Classifier:
        """`classifier` as it was behind one of the `saved_epochs` of its training, in eval mode.

        Raises
        ------
        InputError : an epoch that was not saved
        """
        if epoch not in self.saved_epochs:
            raise InputError(
                f"{self.title} has saved the epochs {list(self.saved_epochs)}, not {epoch}; take one of them, or set save_every."
            )
        network = self._with_weights(self.saved_epochs[epoch])
        apply_masks(network)
        return network

    def bank(self, name: str) -> StoredBank | OtherHeadBank:
        """The feature bank of an image set; the forward pass runs if it has not yet.

        Raises
        ------
        InputError : see features.extract
        """
        if name not in self._banks:
            self._banks[name] = extract(
                self.network,
                self.experiment.image_set(name),
                self.experiment.transform,
                self.bank_directory(name),
                self.experiment.config.features,
                self.experiment.device,
            )
        return self._banks[name]

    def bank_directory(self, name: str) -> Path:
        return self.experiment.run_dir / "banks" / self.key(name)

    def key(self, name: str) -> str:
        """What features and logits of an image set rest on, as the first digits of a SHA-256."""
        if name not in self._keys:
            self._keys[name] = self._key(name)
        return self._keys[name]

    def _key(self, name: str) -> str:
        run = self.experiment
        options = run.config.features
        return bank_key(self.network, run.image_set(name), run.transform, options, run.device)[:SHORT]

    def image_bank(self, name: str) -> ImageBank:
        """The bank of an image set with its images and the network, for methods that differentiate by the input."""
        run = self.experiment
        image_set, options = run.image_set(name), run.config.features
        batch_size = pass_batch_size(options, run.device)

        def batches(start: int, stop: int) -> Iterator[torch.Tensor]:
            return image_batches(image_set, run.transform, start, stop, batch_size, options.workers)

        network = PixelNetwork(self.classifier, run.transform, run.device)
        return ImageBank(self.bank(name), network, batches, image_set.name)

    @torch.no_grad()
    def pass_to_maps(self, name: str) -> Iterator[torch.Tensor]:
        """The last feature maps [B, D, h, w] of an image set, batch by batch; nothing is kept."""
        run = self.experiment
        image_set, batch_size = run.image_set(name), pass_batch_size(run.config.features, run.device)
        with track(
            description=f"Feature maps of {image_set.name}", total=len(image_set), unit="image"
        ) as bar:
            for images in image_batches(image_set, run.transform, 0, len(image_set), batch_size):
                inputs = run.transform.normalise(images.to(run.device))
                with float32_products():  # not while the caller has the maps
                    maps = self.network.feature_map(inputs.contiguous(memory_format=torch.channels_last))
                yield maps
                bar.update(len(images))

    def activation_maps(self, name: str, config: MasksConfig) -> StoredMaps:
        """The class activation maps of an image set; the passes at all scales run if they have not yet.

        Raises
        ------
        InputError : see cam.stored_maps
        """
        run = self.experiment
        image_set, batch_size = run.image_set(name), pass_batch_size(run.config.features, run.device)
        key = maps_key(self.network, image_set, run.transform, config.scales, run.device)[:SHORT]
        directory = run.run_dir / "maps" / key
        return stored_maps(self.network, image_set, run.transform, directory, config, run.device, batch_size)

    @cached_property
    def id_accuracy(self) -> float:
        """Percent of ID test images classified correctly, held against the config's expectation.

        Raises
        ------
        InputError : further than `tolerance` from `expected_accuracy`; of a checkpoint without one, less than half of
            the backbone's
        """
        found = accuracy(self.bank("test"), self.head)
        self._check_accuracy(found)
        return found

    def _check_accuracy(self, found: float) -> None:
        expected, tolerance = self._expected_accuracy
        if expected is not None and abs(found - expected) > tolerance:
            raise InputError(
                f"The ID accuracy of {self.title} is {found:.2f} %, expected {expected:.2f} ± {tolerance:.2f} %: "
                "check the label order, the normalisation (transform.mean, transform.std) and the checkpoint, "
                f"or correct {self.setting}.expected_accuracy."
            )

    @property
    def _expected_accuracy(self) -> tuple[float | None, float]:
        raise NotImplementedError


class Backbone(ExperimentNetwork):
    """A network trained here (resumed if interrupted) or loaded from its checkpoint: that of the config, or another one."""

    def __init__(self, experiment: "Experiment", config: BackboneConfig | None = None) -> None:
        super().__init__(experiment, experiment.config.name, "backbone")
        self.config = experiment.config.backbone if config is None else config
        self.trained_here = self.config.training is not None
        self._feature_maps: dict[str, torch.Tensor] = {}

    @cached_property
    def network(self) -> Classifier:
        run = self.experiment
        torch.manual_seed(run.seed)
        network = build(self.config, run.config.id.num_classes)
        if self.config.training is not None:
            with locked(self.model_directory):
                train_classifier(
                    network,
                    run.image_set("train"),
                    run.image_set("validation") if run.config.id.validation else None,
                    run.transform,
                    self.config.training,
                    seed=run.seed,
                    device=run.device,
                    directory=self.model_directory,
                )
        elif self.config.checkpoint is not None:
            load_checkpoint(network, resolve_path(self.config.checkpoint))
        return network.eval().to(run.device)

    def feature_maps(self, name: str) -> torch.Tensor:
        """The last feature maps [N, D, h, w] of an image set, on the CPU; all in memory, where they stay."""
        if name not in self._feature_maps:
            maps, start = None, 0
            for batch in self.pass_to_maps(name):
                if maps is None:
                    maps = torch.empty(len(self.experiment.image_set(name)), *batch.shape[1:])
                maps[start : start + len(batch)] = batch
                start += len(batch)
            self._feature_maps[name] = maps
        return self._feature_maps[name]

    @property
    def model_directory(self) -> Path:
        run = self.experiment
        sets = [run.image_set(name).fingerprint for name in run.id_names if name != "test"]
        backbone = self.config.model_dump(exclude={"expected_accuracy", "tolerance"})
        settings = [backbone, run.config.id.num_classes, sets, run.transform.fingerprint, run.seed]
        key = sha256_of_json([*settings, run.device.type, TRAINING_VERSION])
        return run.run_dir / "models" / key[:SHORT]

    @property
    def _expected_accuracy(self) -> tuple[float | None, float]:
        return self.config.expected_accuracy, self.config.tolerance


class MadeNetwork(ExperimentNetwork):
    """A network made from the backbone by a recipe, or the checkpoint of one that was made elsewhere."""

    def __init__(self, experiment: "Experiment", recipe: NetworkRecipe, name: str) -> None:
        super().__init__(experiment, f"the network {name} of {experiment.config.name}", f"networks.{name}")
        self.recipe, self.trained_here = recipe, recipe.checkpoint is None

    @property
    def described(self) -> dict:
        """How it was made, ready for JSON: the recipe that was in force, or the name of the checkpoint."""
        raise NotImplementedError

    @property
    def approximation(self) -> str:
        """What makes its training another one than the recipe's; empty where nothing does."""
        return ""

    @property
    def _training_options(self) -> dict:
        run = self.experiment
        return {"seed": run.seed, "device": run.device, "directory": self.model_directory}

    @property
    def _held_out(self) -> str | None:
        return "validation" if "validation" in self.experiment.id_names else None

    @property
    def _trained_on(self) -> list[str]:
        """Fingerprints of the image sets that its weights depend on."""
        run = self.experiment
        return [run.image_set(name).fingerprint for name in run.id_names if name != "test"]

    def _check_accuracy(self, found: float) -> None:
        super()._check_accuracy(found)
        backbone = self.experiment.id_accuracy
        if not self.trained_here and self.recipe.expected_accuracy is None and found < backbone / 2:
            raise InputError(
                f"The ID accuracy of {self.title} is {found:.2f} %, the backbone's {backbone:.2f} %: check that its groups "
                f"and the order of its classes are those of the checkpoint, or set {self.setting}.expected_accuracy."
            )

    @property
    def _expected_accuracy(self) -> tuple[float | None, float]:
        return self.recipe.expected_accuracy, self.recipe.tolerance


class ForegroundOutputs(ExperimentNetwork):
    """A network of K + 1 outputs, of which detectors see the first K in `head` and in the banks, which hold the last logit,
    of background or of outliers, beside them."""

    @property
    def classifier(self) -> Classifier:
        return foreground_classifier(self.network)

    def at_epoch(self, epoch: int) -> Classifier:
        return foreground_classifier(super().at_epoch(epoch))

    @cached_property
    def head(self) -> Head:
        return foreground_head(self.whole_head)

    def bank(self, name: str) -> ForegroundBank:
        return ForegroundBank(super().bank(name))


class FineTunedNetwork(MadeNetwork):
    """A network made from the backbone with a new head, or the checkpoint of one that was made elsewhere.

    Parameters
    ----------
    recipe : how; see config.FineTuningConfig
    """

    recipe: FineTuningConfig

    @cached_property
    def groups(self) -> Groups | None:
        """The groups of a group softmax; None for a flat one."""
        run = self.experiment
        if self.recipe.groups is None:
            return None
        return make_groups(
            self.recipe.groups, run.class_names, run.config.id.num_classes, lambda: run.class_means()[0]
        )

    @property
    def described(self) -> dict:
        recipe, images = self.recipe, len(self.experiment.image_set("train"))
        if not self.trained_here:
            described = recipe.model_dump(mode="json", include={"groups", "class_numbering"})
            return described | {"checkpoint": Path(recipe.checkpoint).name}
        steps = recipe.schedule or default_schedule(images)
        recipe = recipe.model_copy(update={"schedule": steps, "mixup": mixup_alpha(recipe, images)})
        described = recipe.model_dump(
            mode="json", exclude_none=True, exclude={"tolerance", "class_numbering"}
        )
        return described | ({"approximation": self.approximation} if self.approximation else {})

    @property
    def approximation(self) -> str:
        return approximation(self.recipe, len(self.experiment.image_set("train")))

    @cached_property
    def network(self) -> Classifier:
        backbone = self.experiment.network
        with torch.random.fork_rng(devices=[]):  # a new linear layer draws numbers before it is set to zero
            head = zero_head(backbone.feature_dim, self._outputs, self.groups)
        network = copy.deepcopy(backbone)
        network.head = head
        if not self.trained_here:
            load_checkpoint(network, resolve_path(self.recipe.checkpoint))
            self._order_columns(network.head)
        else:
            with locked(self.model_directory):
                self._train(network)
        return network.eval().to(self.experiment.device)

    @property
    def _outputs(self) -> int:
        """Outputs of the head, without the "others" of groups."""
        return self.experiment.config.id.num_classes

    def _order_columns(self, head: torch.nn.Linear) -> None:
        """Put the outputs of a checkpoint into the order they have here."""
        if self.recipe.class_numbering == "ilsvrc2012_devkit":
            _reorder(head, torch.from_numpy(devkit_to_sorted()))

    def _train(self, network: Classifier) -> None:
        run, recipe, validation = self.experiment, self._training_recipe, self._held_out
        if recipe.inputs == "features":
            held_out = (lambda: run.bank(validation)) if validation else None
            images, options = len(run.image_set("train")), self._training_options
            train_head(
                network.head, lambda: run.bank("train"), held_out, images, recipe, self.groups, **options
            )
        else:
            held_out = run.image_set(validation) if validation else None
            train, options = run.image_set("train"), self._training_options
            fine_tune(network, train, held_out, run.transform, recipe, self.groups, **options)

    @property
    def _training_recipe(self) -> FineTuningConfig:
        """The recipe without what the weights do not depend on; on features where that is the same and they are in a bank."""
        changes = {"expected_accuracy": None, "tolerance": 0.0}
        if not isinstance(self.recipe, DenseConfig) and exact_on_features(
            self.recipe, len(self.experiment.image_set("train"))
        ):
            changes |= {"inputs": "features", "micro_batch_size": None}
        return self.recipe.model_copy(update=changes)

    @property
    def model_directory(self) -> Path:
        run = self.experiment
        groups = None if self.groups is None else self.groups.members
        settings = [
            weights_fingerprint(run.network),
            self._training_recipe.model_dump(),
            groups,
            self._trained_on,
        ]
        settings += self._more_settings
        key = sha256_of_json(
            [*settings, run.transform.fingerprint, run.seed, run.device.type, TRAINING_VERSION]
        )
        return run.run_dir / "models" / key[:SHORT]

    @property
    def _more_settings(self) -> list:
        """What else the weights depend on; ready for JSON."""
        return []

    @cached_property
    def shares_features(self) -> bool:
        """Whether its features are the backbone's, bit for bit."""
        if self.trained_here:
            return self.recipe.depth == 0
        ours, theirs = self.network.state_dict(), self.experiment.network.state_dict()
        return all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("head."))

    def bank(self, name: str) -> StoredBank | OtherHeadBank:
        if self.shares_features:
            return OtherHeadBank(self.experiment.bank(name), self.whole_head)
        return super().bank(name)

    def _key(self, name: str) -> str:
        groups = None if self.groups is None else self.groups.members
        return sha256_of_json([super()._key(name), groups])[:SHORT]


class DenseNetwork(ForegroundOutputs, FineTunedNetwork):
    """A network of DFB: trained on pseudo masks at every position, then read as a classifier of images.

    Parameters
    ----------
    recipe : how; see config.DenseConfig
    """

    recipe: DenseConfig

    @property
    def _outputs(self) -> int:
        return super()._outputs + 1

    @property
    def _more_settings(self) -> list:
        return [CAM_VERSION]

    def _order_columns(self, head: torch.nn.Linear) -> None:
        if self.recipe.background_column == "first":
            _reorder(head, torch.arange(len(head.bias)).roll(1))

    @property
    def described(self) -> dict:
        facts = {"method": self.recipe.method, "background_column": self.recipe.background_column}
        return super().described | ({} if self.trained_here else facts)

    @property
    def approximation(self) -> str:
        reduced = self.trained_here and self.recipe.loss_resolution == "reduced"
        parts = [super().approximation, "loss at the resolution of the feature map" if reduced else ""]
        return " and ".join(filter(None, parts))

    def _train(self, network: Classifier) -> None:
        run, recipe, options = self.experiment, self._training_recipe, self._training_options
        names = ["train", self._held_out]
        sets, masks = zip(
            *((run.image_set(name), _LaterMasks(self, name)) if name else (None, None) for name in names)
        )
        if recipe.inputs == "features":
            maps = [functools.partial(run.backbone.feature_maps, name) if name else None for name in names]
            train_dense_head(network.head, *maps, *sets, recipe, *masks, **options)
        else:
            train_dense(network, *sets, run.transform, recipe, *masks, **options)

    def masks(self, name: str) -> PseudoMasks:
        """The pseudo masks of an image set, from the class activation maps of the backbone."""
        maps = self._stored_maps(name)
        key = sha256_of_json(self.recipe.masks.model_dump())[:SHORT]
        path = maps.directory / f"masks-{key}.safetensors"
        if not path.exists():
            loaded = maps.load(self.recipe.masks.label)
            PseudoMasks.of(loaded, self.recipe.masks, self.experiment.device).save(path)
        return PseudoMasks.load(path)

    def maps(self, name: str) -> ClassMaps:
        """The class activation maps that the masks are made of."""
        return self._stored_maps(name).load(self.recipe.masks.label)

    def _stored_maps(self, name: str) -> StoredMaps:
        return self.experiment.backbone.activation_maps(name, self.recipe.masks)

    def segmentation(self, name: str) -> dict[str, float]:
        """Pixel accuracy, mean class accuracy and miou against the pseudo masks of a labelled image set, and the accuracy
        of the classifier of images, in percent."""
        run, recipe = self.experiment, self.recipe
        batch_size = recipe.micro_batch_size or recipe.batch_size
        values = evaluate_dense(
            self.network, run.image_set(name), self.masks(name), run.transform, batch_size, run.device
        )
        return {key: value for key, value in values.items() if key != "loss"}

    @torch.no_grad()
    def position_accuracy(self, name: str) -> float:
        """Percent of images classified correctly by the probabilities of the classes, averaged over the positions, of
        which those of the background have little: what the mean of the logits loses shows beside `id_accuracy`."""
        votes = [
            on_map(self.network.head, maps).softmax(dim=1)[:, :-1].mean(dim=(2, 3)).argmax(dim=1).cpu()
            for maps in self.pass_to_maps(name)
        ]
        labels = torch.as_tensor(self.experiment.image_set(name).labels)
        return 100 * int((torch.cat(votes) == labels).sum()) / len(labels)

    def images(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Images of a set as the network is shown them, uint8 [n, H, W, 3]."""
        return load_images(self.experiment.image_set(name), self.experiment.transform, rows)

    @torch.no_grad()
    def probabilities(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Probabilities [n, K + 1, H, W] of the classes and, last, the background at each pixel of some images."""
        run, images = self.experiment, self.images(name, rows)
        inputs = run.transform.normalise(images.to(run.device).permute(0, 3, 1, 2))
        return dense_logits(self.network, inputs, size=tuple(images.shape[1:3])).softmax(dim=1).cpu()


class ContinuedNetwork(MadeNetwork):
    """A network made by going on with the training of the backbone, head included.

    Parameters
    ----------
    recipe : how; see config.EpochTrainingConfig
    """

    recipe: EpochTrainingConfig

    @property
    def described(self) -> dict:
        if not self.trained_here:
            return {"method": self.recipe.method, "checkpoint": Path(self.recipe.checkpoint).name}
        constraint = {} if self.constraint is None else {"loss_constraint": self.constraint}
        return self.recipe.in_force() | constraint

    @cached_property
    def constraint(self) -> float | None:
        """u in nats, given or estimated; None where the loss has none."""
        if self.recipe.id_loss != "um" or self.recipe.loss_constraint is not None:
            return self.recipe.loss_constraint
        return self.experiment.loss_constraint(self.recipe.estimate, self.recipe.start).mean

    @cached_property
    def network(self) -> Classifier:
        network = self._untrained()
        if not self.trained_here:
            load_checkpoint(network, resolve_path(self.recipe.checkpoint))
        else:
            with locked(self.model_directory):
                self._train(network)
        apply_masks(network)
        return network.eval().to(self.experiment.device)

    def _untrained(self) -> Classifier:
        return self.experiment.start_network(self.recipe.start)

    def _train(self, network: Classifier) -> None:
        raise NotImplementedError

    def _train_by(self, training: Callable[..., pd.DataFrame], network: Classifier, *sets: ImageSet) -> None:
        """Train on the ID images and further image sets."""
        run = self.experiment
        validation = run.image_set(self._held_out) if self._held_out else None
        images = run.image_set("train"), validation, *sets
        recipe, options = self.recipe.trained_by(), self._training_options
        training(network, *images, run.transform, recipe, self.constraint, **options)

    @cached_property
    def model_directory(self) -> Path:
        run = self.experiment
        start = weights_fingerprint(run.start_network(self.recipe.start))
        dropout = getattr(run.config.backbone, "dropout", 0.0)
        settings = [start, self.recipe.in_force(), dropout, self._trained_on, run.transform.fingerprint]
        key = sha256_of_json([*settings, run.seed, run.device.type, TRAINING_VERSION, ESTIMATE_VERSION])
        return run.run_dir / "models" / key[:SHORT]


class UnleashedNetwork(ContinuedNetwork):
    """A network of Unleashing Mask, whose weights (UM) or masks over them (UMAP) are trained.

    With masks `network` has the masked weights.

    Parameters
    ----------
    recipe : how; see config.UnleashingMaskConfig
    """

    recipe: UnleashingMaskConfig

    def _train(self, network: Classifier) -> None:
        self._train_by(unleash, network)

    def _untrained(self) -> Classifier:
        network = super()._untrained()
        prepare_masks(network, self.recipe, self.experiment.seed)
        return network

    def detached(self) -> Classifier:
        """The network without its masks, which is the one it was made from, bit for bit: to classify ID images as before.

        Raises
        ------
        InputError : no masks, or weights that were trained with them
        """
        if not self.trained_here or self.recipe.keep_rate is None or not self.recipe.freeze_weights:
            raise InputError(
                f"{self.title} has no masks over frozen weights, expected some to detach; set keep_rate and leave freeze_weights true."
            )
        _ = self.network
        network = self._with_weights(self.model_directory / "weights.safetensors")
        detach_masks(network)
        return network


class ExposedNetwork(ContinuedNetwork):
    """A network trained with auxiliary outliers.

    Parameters
    ----------
    recipe : how; see config.OutlierExposureConfig
    """

    recipe: OutlierExposureConfig

    @property
    def described(self) -> dict:
        outliers = self.experiment.config.outliers
        return super().described | ({"outliers": outliers.name} if self.trained_here else {})

    @property
    def _trained_on(self) -> list[str]:
        return [*super()._trained_on, self.experiment.image_set("outliers").fingerprint]

    def _train(self, network: Classifier) -> None:
        self._train_by(expose, network, self.experiment.image_set("outliers"))


class OutlierClassNetwork(ForegroundOutputs, ExposedNetwork):
    """A network trained with auxiliary outliers as a class of their own, its last output, which starts from zero."""

    def _untrained(self) -> Classifier:
        network = super()._untrained()
        old = network.head
        with torch.random.fork_rng(devices=[]):
            network.head = torch.nn.Linear(old.in_features, old.out_features + 1).to(old.weight)
        with torch.no_grad():
            for new, known in ((network.head.weight, old.weight), (network.head.bias, old.bias)):
                new.zero_()[:-1] = known
        return network


class _LaterMasks:
    """The masks of an image set, made when they are first looked at: a training that is finished does not."""

    def __init__(self, network: DenseNetwork, name: str) -> None:
        self._make = functools.cache(functools.partial(network.masks, name))

    def __len__(self) -> int:
        return len(self._make())

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._make(), attribute)


def _reorder(head: torch.nn.Linear, columns: torch.Tensor) -> None:
    """Move output i of a head to column columns[i]."""
    with torch.no_grad():
        for values in (head.weight, head.bias):
            values[columns] = values.clone()
