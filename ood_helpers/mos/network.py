"""The networks of MOS and of its baselines: the backbone with a new head, a group or a flat softmax."""

import functools
from collections.abc import Iterable

import pandas as pd
import torch
from torch import nn

from ood_helpers.backbones.base import Classifier
from ood_helpers.banks import Head
from ood_helpers.data.imagenet import devkit_to_sorted
from ood_helpers.files import sha256_of_json
from ood_helpers.mos.groups import GroupHead, Groups, make_groups
from ood_helpers.mos.recipe import ClassifierCheckpoint, ClassifierRecipe
from ood_helpers.mos.training import fine_tune, train_head
from ood_helpers.networks.base import NETWORKS, once
from ood_helpers.networks.fine_tuned import FineTunedNetwork
from ood_helpers.statistics import class_means
from ood_helpers.storage import DIGITS, Entry
from ood_helpers.training.fine_tuning import reorder


@NETWORKS.register("classifier")
class ClassifierNetwork(FineTunedNetwork):
    """A network with a flat or a group softmax; see `ood_helpers.mos.recipe`."""

    recipe: ClassifierRecipe | ClassifierCheckpoint

    @once
    def groups(self) -> Groups | None:
        """The groups of a group softmax; None for a flat one."""
        recipe, run, classes = self.recipe.groups, self.context, self.context.config.id.num_classes
        if recipe is None:
            return None
        bank = functools.partial(self.backbone.bank, "train")
        return make_groups(recipe, run.class_names(), classes, lambda: class_means(bank(), classes)[0])

    def check(self) -> None:
        if self.recipe.groups is not None and self.recipe.groups.strategy == "taxonomy":
            self.groups()  # reads the file

    def others_probability(self, ood_sets: Iterable[str]) -> pd.DataFrame:
        """How probable "others" is in each group of a group softmax, for the ID test images and some OOD sets.

        Returns
        -------
        one line per set and group: set (the ID test images of each group are a set of their own), kind (ID or OOD), group,
        and mean, q25 and q75 (the quartiles) of p("others"), in [0, 1]
        """
        self.check_accuracy()
        groups, sets, test = self.groups(), {}, self.bank("test").load()
        for number, name in enumerate(groups.names):
            own = groups.group_of_class[test.labels] == number
            if own.any():
                sets[f"{self.context.config.id.name}: {name}"] = "ID", test.logits[own]
        for name in ood_sets:
            sets[name] = "OOD", self.bank(name).load().logits
        tables = []
        for name, (kind, logits) in sets.items():
            others = groups.others_probability(logits.double())
            low, high = others.quantile(torch.tensor([0.25, 0.75], dtype=others.dtype), dim=0).tolist()
            columns = {"mean": [float(column.mean()) for column in others.T], "q25": low, "q75": high}
            tables.append(pd.DataFrame({"set": name, "kind": kind, "group": groups.names, **columns}))
        return pd.concat(tables, ignore_index=True)

    def _num_logits(self) -> int:
        return super()._num_logits() if self.groups() is None else self.groups().num_logits

    def _whole_head(self) -> Head:
        if self.groups() is None:
            return super()._whole_head()
        return GroupHead.of(self.model(), groups=self.groups())

    def _order_columns(self, head: nn.Linear) -> None:
        if self.recipe.class_numbering == "ilsvrc2012_devkit":
            reorder(head, torch.from_numpy(devkit_to_sorted()))

    def _train(self, network: Classifier) -> None:
        recipe, (train, held_out) = self._training_recipe(), self._id_sets()
        how = {"recipe": recipe, "groups": self.groups(), **self._training_options()}
        if recipe.images is None:
            names = ["train", self._held_out()]
            banks = [functools.partial(self.backbone.bank, name) if name else None for name in names]
            train_head(network.head, *banks, len(train), **how)
        else:
            fine_tune(network, train, held_out, self.context.transform, **how)

    def _training_recipe(self) -> ClassifierRecipe:
        """On features where that gives the same head, as they are in a bank."""
        if self.recipe.exact_on_features(len(self.context.image_sets["train"])):
            return self.recipe.model_copy(update={"images": None})
        return self.recipe

    def training_entry(self) -> Entry:
        recipe, names = self._training_recipe(), filter(None, ["train", self._held_out()])
        return self._training_entry(
            ["ood_helpers.mos.training"],
            self.backbone.model(),
            recipe=recipe.settings(),
            features={name: self.backbone.key(name) for name in names} if recipe.images is None else {},
            precision=self.context.config.features.precision if recipe.images is None else "",
            groups=None if self.groups() is None else self.groups().members,
        )

    @once
    def key(self, name: str) -> str:
        key = super().key(name)
        return key if self.groups() is None else sha256_of_json([key, self.groups().members])[:DIGITS]
