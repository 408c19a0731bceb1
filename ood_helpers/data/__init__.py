"""Image sets: where they come from, how they are verified, and how they become network input."""

from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.sources import open_image_set
from ood_helpers.data.transforms import Transform, image_batches, spanned_batches

__all__ = ["ImageSet", "Transform", "image_batches", "open_image_set", "spanned_batches"]
