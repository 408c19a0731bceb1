"""The groups of a group softmax (MOS): which class is in which, and the softmax of each with its "others".

Huang and Li, CVPR 2021, arXiv 2105.01879, section 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ood_helpers.banks import Head
from ood_helpers.config.base import read_yaml
from ood_helpers.errors import InputError, nearest
from ood_helpers.kernels.group_score import log_odds
from ood_helpers.mos.recipe import GroupsRecipe, group_path


def _index(compute: Callable[["Groups"], Tensor]) -> cached_property:
    """A tensor computed once; outside torch.inference_mode, whose tensors cannot be used in training later."""
    return cached_property(torch.inference_mode(False)(compute))


@dataclass(frozen=True)
class Groups:
    """C classes in K groups, and the layout of a head with a softmax in each: C + K logits, group by group, where
    the first of a group's n_k + 1 columns is "others" and the rest are its classes in the order of `members`.

    names : of the groups; members : the classes of each

    Raises
    ------
    InputError : a class of 0, ..., C - 1 in no group or in two, a group without classes or without a name of its own
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.members) or len(set(self.names)) != len(self.names):
            raise InputError(
                f"{len(self.members)} groups are named {', '.join(self.names) or 'nothing'}; give each a name of its own."
            )
        group_of: dict[int, str] = {}
        for name, members in zip(self.names, self.members):
            if not members:
                raise InputError(f"The group {name!r} has no class; expected one or more, or remove it.")
            for number in members:
                if number in group_of:
                    where = " and ".join(map(repr, dict.fromkeys([group_of[number], name])))
                    raise InputError(
                        f"Class {number} is listed twice in the groups ({where}), expected once; remove one of them."
                    )
                group_of[number] = name
        if set(group_of) != set(range(len(group_of))):
            raise InputError(
                f"The groups have {len(group_of)} classes, numbered {min(group_of)} to "
                f"{max(group_of)}, expected 0, 1, ... without a gap; add the missing ones."
            )

    @property
    def num_classes(self) -> int:
        return sum(self.sizes)

    @property
    def num_groups(self) -> int:
        return len(self.members)

    @property
    def num_logits(self) -> int:
        return self.num_classes + self.num_groups

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of classes in each group, without "others"."""
        return tuple(len(members) for members in self.members)

    @property
    def slices(self) -> list[tuple[int, int]]:
        """First and one past the last column of each group."""
        ends = np.cumsum(np.array(self.sizes) + 1).tolist()
        return list(zip([0, *ends[:-1]], ends))

    @_index
    def others(self) -> Tensor:
        """Column [K] of each group's "others", int64."""
        return torch.tensor([start for start, _ in self.slices])

    @_index
    def columns(self) -> Tensor:
        """Column [C] of each class, int64."""
        return self.others[self.group_of_class] + 1 + self.place_in_group

    @_index
    def group_of_class(self) -> Tensor:
        """Group [C] of each class, int64."""
        return torch.arange(self.num_groups).repeat_interleave(torch.tensor(self.sizes))[self._order]

    @_index
    def place_in_group(self) -> Tensor:
        """Place [C] of each class among those of its group, from 0, int64."""
        return torch.cat([torch.arange(size) for size in self.sizes])[self._order]

    @_index
    def _classes(self) -> Tensor:
        """Class [C] of each column that is not an "others"."""
        return torch.tensor([number for members in self.members for number in members])

    @_index
    def _order(self) -> Tensor:
        """Place [C] of each class among all columns that are not an "others"."""
        return self._classes.argsort()

    def targets(self, labels: Tensor) -> Tensor:
        """Place in the softmax of each group [N, K] int64 of labels [N]: of the class in its own, 0 = "others" in all
        other groups."""
        group = self.group_of_class.to(labels.device)[labels]
        place = self.place_in_group.to(labels.device)[labels]
        return F.one_hot(group, self.num_groups) * (place + 1)[:, None]

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Logarithm of the softmax over the columns of each group [N, C + K], of logits [N, C + K]."""
        return torch.cat([logits[:, start:end].log_softmax(dim=1) for start, end in self.slices], dim=1)

    def log_odds(self, logits: Tensor) -> Tensor:
        """g_k = logsumexp(z_k without "others") - z_k of "others" [N, K], of logits [N, C + K].

        p_k("others") = 1 / (1 + exp(g_k)); g_k still differs where p_k is rounded to 0 or 1.
        """
        return log_odds(logits, self.slices)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each sample [B], of logits [B, C + K] and labels [B]: the sum over the groups k of
        -log softmax(z_k)_{y_k}, where y_k is the class in its own group and "others" in all others. Unweighted."""
        columns = self.others.to(labels.device) + self.targets(labels)
        return -self.log_softmax(logits).gather(1, columns).sum(dim=1)

    def others_probability(self, logits: Tensor) -> Tensor:
        """p_k("others") [N, K] in [0, 1], of logits [N, C + K]."""
        return torch.sigmoid(-self.log_odds(logits))

    def classify(self, logits: Tensor) -> Tensor:
        """Class [N] int64 with the largest probability in the softmax of its group, of logits [N, C + K].

        The probabilities of a group's classes sum up to 1 - p_k("others"); of equal ones the first column's is taken.
        In float64, as float32 makes equal what is near 1.
        """
        classes = self._classes.to(logits.device)
        columns = self.columns.to(logits.device)[classes]
        return classes[self.log_softmax(logits.double()).index_select(1, columns).argmax(dim=1)]


@dataclass(frozen=True)
class GroupHead(Head):
    """A head with a softmax in each group of classes: L = C + K logits, the layout of `Groups`."""

    groups: Groups

    softmax: ClassVar[str] = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups.num_logits != self.num_logits:
            raise InputError(
                f"A head has {self.num_logits} logits, expected {self.groups.num_logits} for "
                f"{self.groups.num_classes} classes in {self.groups.num_groups} groups; pass the groups it was trained with."
            )

    @property
    def num_classes(self) -> int:
        return self.groups.num_classes

    def classify(self, logits: Tensor) -> Tensor:
        """Predicted classes [N] of logits [N, C + K], by the rule of the group softmax."""
        return self.groups.classify(logits)


def make_groups(
    recipe: GroupsRecipe,
    class_names: Sequence[str] | None,
    num_classes: int,
    class_means: Callable[[], Tensor],
) -> Groups:
    """The groups of a recipe: from its file, by k-means, or at random.

    class_means : gives the mean training features [C, D] of each class, called for k-means only
    """
    if recipe.strategy == "taxonomy":
        return read_groups(recipe.file, class_names, num_classes)
    if recipe.strategy == "kmeans":
        return kmeans_groups(class_means(), recipe.number, recipe.seed)
    return random_groups(num_classes, recipe.number, recipe.seed)


def read_groups(file: str | Path, class_names: Sequence[str] | None, num_classes: int) -> Groups:
    """Read a group file: `source`, where the grouping comes from, and `groups`, {name: [class, ...]}, in the order of the
    head's columns.

    file : see group_path; class_names : of the classes 0, 1, ...; None if the file gives classes by number only

    Raises
    ------
    InputError : no such file, not of this form, an unknown class, a class in no group or in two
    """
    path = group_path(file)
    content = read_yaml(path)
    listed = content.get("groups") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(classes, list) for classes in listed.values()):
        raise InputError(
            f"{path} holds no groups; expected a mapping `groups` of names to lists of classes, beside `source`."
        )
    numbers = {name: number for number, name in enumerate(class_names or ())}
    number = partial(_class_number, numbers=numbers, num_classes=num_classes, path=path)
    members = tuple(tuple(map(number, classes)) for classes in listed.values())
    missing = sorted(set(range(num_classes)).difference(*members))
    if missing:
        first = class_names[missing[0]] if class_names else missing[0]
        raise InputError(
            f"{path} leaves out {len(missing)} of the {num_classes} classes, the first is {first!r}; add them to groups."
        )
    try:
        return Groups(tuple(str(name) for name in listed), members)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _class_number(entry: str | int, numbers: dict[str, int], num_classes: int, path: Path) -> int:
    if isinstance(entry, int):
        if 0 <= entry < num_classes:
            return entry
        raise InputError(f"{path} has the class number {entry}, expected 0 to {num_classes - 1}; correct it.")
    name = str(entry)
    if name not in numbers:
        hint = nearest(name, numbers) if numbers else "the ID set has no class names, so give its number."
        raise InputError(f"{path} names the class {entry!r}; {hint}")
    return numbers[name]


def kmeans_groups(means: Tensor, number: int, seed: int) -> Groups:
    """Classes whose mean training features [C, D] are near each other, by k-means (the best of ten starts); the clusters
    are numbered by their smallest class.

    Raises
    ------
    InputError : more clusters than different class means, or a mean that is not finite, of a class without images
    """
    from sklearn.cluster import KMeans  # late: importing scikit-learn takes a second

    _check_number(number, len(means))
    points = means.detach().cpu().double().numpy()
    empty = np.flatnonzero(~np.isfinite(points).all(axis=1)).tolist()
    if empty:
        raise InputError(
            f"Class {empty[0]} has no mean training feature ({len(empty)} of {len(points)} have none), expected one of each "
            "class; take training images of all classes, or groups by another strategy."
        )
    distinct = len(np.unique(points, axis=0))
    if number > distinct:
        raise InputError(
            f"{number} clusters of {distinct} different class means would leave some empty, expected at most {distinct}; lower number."
        )
    clusters = KMeans(number, n_init=10, random_state=seed).fit_predict(points)
    members = sorted(np.flatnonzero(clusters == cluster).tolist() for cluster in range(number))
    return _numbered("cluster", members)


def random_groups(num_classes: int, number: int, seed: int) -> Groups:
    """Classes drawn at random into groups whose sizes differ by one at most.

    Raises
    ------
    InputError : more groups than classes
    """
    _check_number(number, num_classes)
    shuffled = np.random.default_rng(seed).permutation(num_classes)
    return _numbered("random", [sorted(part.tolist()) for part in np.array_split(shuffled, number)])


def _check_number(number: int, num_classes: int) -> None:
    if number > num_classes:
        raise InputError(
            f"{number} groups of {num_classes} classes would leave some empty, expected at most {num_classes}; lower number."
        )


def _numbered(prefix: str, members: list[list[int]]) -> Groups:
    names = tuple(f"{prefix} {number}" for number, _ in enumerate(members, 1))
    return Groups(names, tuple(map(tuple, members)))
