"""Pseudo masks: which part of a training image is foreground, made from class activation maps.

Source: Ding and Pang, ACM MM 2024, arXiv 2303.08727, and its public code.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from ood_helpers.dfb.activation_maps import ClassMaps, Rows, StoredMaps
from ood_helpers.dfb.recipe import MasksRecipe
from ood_helpers.errors import InputError
from ood_helpers.storage import Arrays, Facts, Store

PIXELS_AT_ONCE = 2**25  # of maps that are made into masks
ROUNDING = 1e-5  # a map that varies by less than this part of its maximum is constant up to float32 rounding


def smoothed(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian filter of each map, truncated at 4 sigma, with the map mirrored at its borders (their pixels repeated).

    maps : float [N, H, W]
    sigma : in pixels; 0 = the maps as they are

    It equals scipy.ndimage.gaussian_filter(map, sigma, mode="reflect") up to rounding: filter and border are one matrix
    for the rows and one for the columns, which scipy makes of the identity.
    """
    if sigma == 0:
        return maps
    rows, columns = (
        torch.from_numpy(gaussian_filter1d(np.eye(side), sigma, axis=0, mode="reflect")).to(maps)
        for side in maps.shape[1:]
    )
    return rows @ maps @ columns.T


def min_max(maps: Tensor) -> Tensor:
    """Each map of [N, H, W] between 0 at its minimum and 1 at its maximum; a constant one becomes 0.

    Constant is a map whose values lie within 1e-5 of its maximum: rounding alone would otherwise become a mask.
    """
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    spread = high - low
    constant = spread <= ROUNDING * high.abs()
    return torch.where(constant, 0, (maps - low) / torch.where(constant, 1, spread))


@dataclass(frozen=True)
class PseudoMasks:
    """Which pixels of each image are foreground, and of which class.

    packed : uint8 [N, ceil(H W / 8)], one bit per pixel, row by row, the first in the highest bit
    classes : of the foreground, int64 [N]
    size : height and width
    """

    packed: Tensor
    classes: Tensor
    size: tuple[int, int]

    def __post_init__(self) -> None:
        expected = (len(self.classes), -(-self.size[0] * self.size[1] // 8))
        if self.packed.dtype != torch.uint8 or tuple(self.packed.shape) != expected:
            raise InputError(
                f"Pseudo masks have bits {tuple(self.packed.shape)} {self.packed.dtype}, expected {expected} torch.uint8 for "
                f"{expected[0]} classes and {self.size[0]} x {self.size[1]} pixels; make them with PseudoMasks.of."
            )

    @classmethod
    def of(
        cls,
        maps: ClassMaps,
        recipe: MasksRecipe = MasksRecipe(),  # noqa: B008 - frozen
        device: torch.device | str = "cpu",
    ) -> "PseudoMasks":
        """foreground = min_max(smoothed(fused maps)) > threshold.

        Parameters
        ----------
        recipe : of which `sigma` (None = H / 32) and `threshold` count
        device : where it is computed

        A constant map gives a mask without foreground; any other has at least a pixel of it, whatever the image shows,
        for the threshold is relative to the map's own range.

        Source: the public code of DFB, sigma 4 and threshold 0.5 at 128 x 128 pixels.
        """
        sigma = maps.size[0] / 32 if recipe.sigma is None else recipe.sigma
        chunk = max(1, PIXELS_AT_ONCE // (maps.size[0] * maps.size[1]))
        bits = []
        for start in range(0, len(maps), chunk):
            fused = maps.fused(slice(start, start + chunk), device)
            foreground = min_max(smoothed(fused, sigma)) > recipe.threshold
            bits.append(np.packbits(foreground.flatten(1).cpu().numpy(), axis=1))
        return cls(torch.from_numpy(np.concatenate(bits)), maps.classes, maps.size)

    def __len__(self) -> int:
        return len(self.classes)

    def foreground(self, rows: Rows = None) -> Tensor:
        """Bool [n, H, W] of the images `rows`; None = all."""
        packed = self.packed if rows is None else self.packed[rows]
        bits = np.unpackbits(packed.numpy(), axis=1, count=self.size[0] * self.size[1])
        return torch.from_numpy(bits).bool().unflatten(1, self.size)

    def pixels(self) -> Tensor:
        """How many pixels of each image are foreground, int64 [N]."""
        return torch.from_numpy(np.bitwise_count(self.packed.numpy()).sum(axis=1, dtype=np.int64))

    def share(self) -> Tensor:
        """The part of each image that is foreground, float64 [N] in [0, 1]."""
        return self.pixels().double() / (self.size[0] * self.size[1])

    def share_per_class(self, num_classes: int) -> pd.DataFrame:
        """The foreground's share of the images of each class.

        Returns
        -------
        One row per class: class, images, mean, q25 and q75 (quartiles) of the share in percent, NaN where there are no
        images, and empty, the number of images without foreground.
        """
        share = pd.Series(100 * self.share().numpy()).groupby(self.classes.numpy())
        table = pd.DataFrame(
            {
                "images": share.size(),
                "mean": share.mean(),
                "q25": share.quantile(0.25),
                "q75": share.quantile(0.75),
                "empty": share.agg(lambda values: (values == 0).sum()),
            }
        ).reindex(pd.RangeIndex(num_classes, name="class"))
        return table.fillna({"images": 0, "empty": 0}).astype({"images": int, "empty": int}).reset_index()


def stored_masks(
    maps: StoredMaps, recipe: MasksRecipe, store: Store, device: torch.device | str = "cpu"
) -> PseudoMasks:
    """The masks that a recipe makes of the maps of an image set, made on first use.

    Raises
    ------
    InputError : see StoredMaps.load
    """

    def compute() -> tuple[Arrays, Facts]:
        masks = PseudoMasks.of(maps.load(recipe.label), recipe, device)
        return {"packed": masks.packed.numpy(), "classes": masks.classes.numpy()}, {"size": masks.size}

    entry = store.entry("masks", code=[__name__], maps=maps.key, recipe=recipe.model_dump())
    arrays, facts = entry.arrays("masks", compute)
    packed, classes = (torch.from_numpy(arrays[name]) for name in ("packed", "classes"))
    return PseudoMasks(packed, classes, tuple(facts["size"]))
