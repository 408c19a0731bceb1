"""How long do pseudo masks take in batches, and how long image by image, as in DFB's public code?

    python benchmarks/bench_cam.py --config digits

Times, in one run and in float32, the maps and masks of training images of their true classes. First as the kit makes them:
in batches, the class chosen before anything is enlarged. Then image by image: for each scale a pass of the image and its
mirror image, the maps of all classes, all of them enlarged to two resolutions, one kept, then scipy's Gaussian filter. Both
end in the same masks except for pixels that rounding decides, whose share is printed. Writes
benchmarks/results/cam_<config>.csv with machine, versions and command.
"""

import copy
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from recording import experiment_options, record
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ood_helpers.backbones import Classifier
from ood_helpers.data import ImageSet, Transform, image_batches
from ood_helpers.dfb.activation_maps import stored_maps
from ood_helpers.dfb.pseudo_masks import PseudoMasks
from ood_helpers.dfb.recipe import MasksRecipe
from ood_helpers.experiment import Experiment
from ood_helpers.storage import Store


def one_by_one(network: Classifier, image: Tensor, label: int, recipe: MasksRecipe) -> np.ndarray:
    """The mask [H, W] of a normalised image [1, 3, H, W]."""
    height, width = image.shape[2:]
    weight, bias = network.head.weight[:, :, None, None], network.head.bias
    low, high = 0, 0
    for scale in recipe.scales:
        size = round(height * scale), round(width * scale)
        scaled = F.interpolate(image, size, mode="bicubic", align_corners=False)
        features = network.feature_map(torch.cat([scaled, scaled.flip(3)]))
        network.head(network.pool(features))
        maps = F.conv2d(features, weight, bias).relu()
        merged = maps[:1] + maps[1:].flip(3)
        low = low + F.interpolate(merged, (height // 4, width // 4), mode="bilinear", align_corners=False)
        high = high + F.interpolate(merged, (height, width), mode="bilinear", align_corners=False)
    low, high = low[0, label].cpu().numpy(), high[0, label].cpu().numpy()
    low, high = low / (low.max() + 1e-5), high / (high.max() + 1e-5)
    value = gaussian_filter(high, height / 32 if recipe.sigma is None else recipe.sigma, mode="reflect")
    value -= value.min()
    return value / max(value.max(), 1e-12) > recipe.threshold


def main() -> None:
    parser = experiment_options(__doc__)
    parser.add_argument("--images", type=int, default=1024, help="in batches")
    parser.add_argument("--images-one-by-one", type=int, default=100)
    arguments = parser.parse_args()
    run = Experiment.open(arguments.config, data_root=arguments.data_root, device=arguments.device)
    train, recipe = run.image_set("train"), MasksRecipe()
    images = train.take(np.arange(min(arguments.images, len(train))))
    alone = images.take(np.arange(min(arguments.images_one_by_one, len(images))))
    transform, device = run.context.transform, run.context.device

    def batched(image_set: ImageSet) -> PseudoMasks:
        with tempfile.TemporaryDirectory() as folder:
            options = transform, Store(Path(folder)), recipe.scales, device, run.context.batch_size
            return PseudoMasks.of(stored_maps(network, image_set, *options).load(), recipe)

    network = copy.deepcopy(run.backbone.model())
    batched(alone)  # warm-up
    begin = time.perf_counter()
    masks = batched(images)
    per_image = {"batched": (time.perf_counter() - begin) / len(images)}

    # In the memory format and with the batches of the public code.
    plain = copy.deepcopy(run.backbone.model()).to(memory_format=torch.contiguous_format)
    found = []
    with torch.inference_mode():
        one_by_one(plain, *_input(alone, 0, transform, device), recipe)  # warm-up
        begin = time.perf_counter()
        for i in range(len(alone)):
            found.append(one_by_one(plain, *_input(alone, i, transform, device), recipe))
    per_image["one by one"] = (time.perf_counter() - begin) / len(alone)

    differing = float((masks.foreground(slice(len(alone))).numpy() != np.stack(found)).mean())
    print(f"{100 * differing:.3f} % of the pixels differ")
    table = pd.DataFrame(
        {
            "masks": list(per_image),
            "images": [len(images), len(alone)],
            "milliseconds_per_image": [1000 * seconds for seconds in per_image.values()],
            "ratio": [per_image["one by one"] / seconds for seconds in per_image.values()],
        }
    )
    print(table.round(3).to_string(index=False))
    counts = f"--images {arguments.images} --images-one-by-one {arguments.images_one_by_one}"
    command = f"bench_cam.py --config {arguments.config} {counts}"
    record(table, f"cam_{arguments.config}", device, {"torch": torch.__version__}, command)


def _input(images: ImageSet, i: int, transform: Transform, device: torch.device) -> tuple[Tensor, int]:
    """Image i, normalised, as a batch of one, and its label."""
    pixels = next(image_batches(images, transform, i, i + 1, 1))
    return transform.normalise(pixels.to(device)), int(images.labels[i])


if __name__ == "__main__":
    main()
