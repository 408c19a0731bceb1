"""What does LINe's table of contributions cost from class means, and what image by image through autograd?

    python benchmarks/bench_precompute.py --config cifar10_npz --data-root ../shared

Times, in one run and on the experiment's network and training images, the table A [C, D] = the mean over the images of a
class of f_d * d(logit of the class) / d(f_d): by class means, as the kit makes it (the head is linear, so A = W * class
means), with and without the forward pass in batches that fills the bank; and as the public code of LINe makes it, with a
forward pass of one image and a backward pass of its logit to the features. Both tables are compared before anything is
recorded. Writes benchmarks/results/precompute_<config>.csv and .png with machine, versions and command.
"""

import ood_helpers  # noqa: F401 - first: it says how threads wait, which is read when torch is loaded

# isort: split
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from recording import draw_bars, experiment_options, record, record_figure, seconds, short
from torch import Tensor

from ood_helpers.backbones.base import Classifier
from ood_helpers.backbones.precision import float32_products
from ood_helpers.banks import Bank
from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.transforms import image_batches
from ood_helpers.experiment import Experiment
from ood_helpers.extract import extract
from ood_helpers.statistics import class_means
from ood_helpers.storage import Store

AUTOGRAD = "forward and backward pass, image by image"
FORWARD = "forward pass alone, image by image"
WITH_PASS = "class means, with the forward pass in batches"
FROM_BANK = "class means, from the bank"


def from_means(bank: Bank, weight: Tensor) -> Tensor:
    """A [C, D] float64 of a bank, as LINe's `fit`; NaN for a class without images."""
    return weight.cpu().double() * class_means(bank, len(weight))[0]


@float32_products()
def by_autograd(network: Classifier, inputs: list[Tensor], labels: list[int]) -> Tensor:
    """The same from normalised images [1, 3, H, W] and their labels."""
    total = torch.zeros(network.num_classes, network.feature_dim, dtype=torch.float64)
    count = torch.zeros(network.num_classes, 1, dtype=torch.float64)
    for image, label in zip(inputs, labels):
        features = network.features(image)
        (gradient,) = torch.autograd.grad(network.head(features)[0, label], features)
        total[label] += (features * gradient)[0].detach().cpu()
        count[label] += 1
    return total / count


def normalised(run: Experiment, images: ImageSet) -> list[Tensor]:
    """Images one by one, on the device and in the memory format that the network has."""
    transform = run.context.transform
    batches = image_batches(images, transform, 0, len(images), 1)
    return [
        transform.normalise(image.to(run.context.device)).contiguous(memory_format=torch.channels_last)
        for image in batches
    ]


def draw(figure: Figure, table: pd.DataFrame) -> None:
    texts = [
        f"{short(row.milliseconds_per_image, 2)} ms"
        + f", {short(row.times_faster_than_autograd, 2)} times faster" * (row.table != AUTOGRAD)
        for row in table.itertuples()
    ]
    label, ours = "time for an image (ms)", [WITH_PASS, FROM_BANK]
    draw_bars(figure, table.table, table.milliseconds_per_image, texts, label=label, ours=ours)


def main() -> None:
    parser = experiment_options(__doc__)
    parser.add_argument("--images", type=int, default=64, help="that are passed, in batches and one by one")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    run = Experiment.open(arguments.config, data_root=arguments.data_root, device=arguments.device)
    train, options = run.image_set("train"), run.config.features
    places = np.linspace(0, len(train) - 1, min(arguments.images, len(train))).round().astype(int)
    sample = train.take(places)
    context, device = run.context, run.context.device
    network = run.backbone.model().to(memory_format=torch.channels_last)
    weight = network.head.weight.detach()
    inputs, labels = normalised(run, sample), sample.labels.tolist()
    network.requires_grad_(True)  # as a network is after loading

    def forward() -> None:
        with torch.inference_mode(), float32_products():
            for image in inputs:
                network(image)

    passed = []
    with tempfile.TemporaryDirectory() as folder:

        def fill_bank() -> None:
            store = Store(Path(folder) / str(len(passed)))
            passed.append(extract(network, sample, context.transform, store, options, device))

        def pass_and_means() -> None:
            fill_bank()
            from_means(passed[-1], weight)

        fill_bank()
        expected, found = by_autograd(network, inputs, labels), from_means(passed[0], weight)
        error = float((found - expected).abs().nan_to_num().max() / expected.abs().nan_to_num().max())
        if not (torch.equal(found.isnan(), expected.isnan()) and error < 1e-4):
            sys.exit(
                f"The two tables differ by {error:.2g} of the largest entry, expected float32 rounding; nothing is recorded: "
                "run tests/detectors/test_line.py."
            )
        print(f"the two tables differ by {error:.1g} of the largest entry")

        bank, batch_size = run.bank("train"), context.batch_size
        steps = {
            AUTOGRAD: (lambda: by_autograd(network, inputs, labels), len(sample), 1),
            FORWARD: (forward, len(sample), 1),
            WITH_PASS: (pass_and_means, len(sample), min(batch_size, len(sample))),
            FROM_BANK: (lambda: from_means(bank, weight), len(bank), None),
        }
        rows = []
        for name, (step, images, batch) in steps.items():
            step()  # warm-up
            times = [seconds(step, device) for _ in range(arguments.repeats)]
            rows.append((name, images, batch, 1000 * float(np.median(times)) / images))

    table = pd.DataFrame(rows, columns=["table", "images", "batch_size", "milliseconds_per_image"])
    table.batch_size = table.batch_size.astype("Int64")
    table["times_faster_than_autograd"] = table.milliseconds_per_image[0] / table.milliseconds_per_image
    print(table.round(5).to_string(index=False))
    versions, name = {"torch": torch.__version__}, f"precompute_{arguments.config}"
    command = f"bench_precompute.py --config {arguments.config} --images {arguments.images}"
    record(table, name, device, versions, command)
    record_figure(partial(draw, table=table), name, device, versions, height=2.2)


if __name__ == "__main__":
    main()
