"""What does a whole comparison cost, against one forward pass for each method and OOD set?

    python benchmarks/bench_protocol.py --config cifar10_npz --data-root ../shared

Ours, from images to the table: one pass over the training images, the ID test set and each OOD set, then fit, scores,
metrics and intervals of every method that scores banks of the backbone. The other way is that of the reference codes: for
each method and OOD set the ID test images and the OOD images pass through the network; it is timed for one method
(energy), on the bare network, the ID test images once, and multiplied by the number of methods and sets. What else the reference codes spend, as passes over
the training images for LINe and HIMPLoS, is left out. Both in one run. Prints the table and writes
benchmarks/results/protocol_<config>.csv and .png with machine, versions and command.
"""

import ood_helpers  # noqa: F401 - first: it says how threads wait, which is read when torch is loaded

# isort: split
import tempfile
from functools import partial

import pandas as pd
import torch
from matplotlib.figure import Figure
from recording import draw_bars, experiment_options, record, record_figure, seconds, short
from torch import Tensor

from ood_helpers.backbones.precision import float32_products
from ood_helpers.data.transforms import image_batches
from ood_helpers.detectors.energy import energy_score
from ood_helpers.experiment import Experiment
from ood_helpers.progress import track


@torch.inference_mode()
def pass_and_score(run: Experiment, name: str) -> Tensor:
    """Energy scores of an image set, straight from its images."""
    image_set, context, network = run.image_set(name), run.context, run.backbone.model()
    batches = image_batches(
        image_set, context.transform, 0, len(image_set), context.batch_size, run.config.features.workers
    )
    with float32_products():
        scores = [
            energy_score(
                network(
                    context.transform.normalise(batch.to(context.device)).contiguous(
                        memory_format=torch.channels_last
                    )
                )
            )
            for batch in batches
        ]
    return torch.cat(scores).cpu()


def draw(figure: Figure, table: pd.DataFrame) -> None:
    texts = [f"{short(row.seconds)} s, {short(row.ratio_to_ours, 2)} of ours" for row in table.itertuples()]
    draw_bars(figure, table.way, table.seconds, texts, label="time (s)", ours=list(table.way[:3]))


def main() -> None:
    parser = experiment_options(__doc__)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # nothing is there yet: no bank, no score
        folders = {"data_root": arguments.data_root, "run_dir": folder, "figures_dir": folder}
        run = Experiment.open(arguments.config, **folders, device=arguments.device)
        device, ood_sets = run.context.device, run.ood_sets()
        run.backbone.model().to(memory_format=torch.channels_last)  # trained first, where it is trained here
        rows = [
            name
            for name, row in run.rows().items()
            if row.network is run.backbone and not row.detector.needs_images
        ]
        images, banked, passed, per_method = 0, 0.0, 0, 0.0
        for name in track(["train", "test", *ood_sets], description="sets", unit="set"):
            # By turns, so that both ways see the machine in the same state.
            banked += seconds(lambda name=name: run.bank(name), device)
            images += len(run.bank(name))
            if name != "train":
                times = len(ood_sets) if name == "test" else 1  # the ID images once for each OOD set
                per_method += times * seconds(lambda name=name: pass_and_score(run, name), device)
                passed += times * len(run.bank(name))
        scored = seconds(lambda: run.results(rows), device)
    every = f"a pass for each OOD set, {len(rows)} methods (extrapolated)"
    table = pd.DataFrame(
        [
            ("forward passes into banks", images, banked),
            (f"{len(rows)} methods from banks to table", 0, scored),
            ("ours, both", images, banked + scored),
            ("a pass for each OOD set, one method", passed, per_method),
            (every, passed * len(rows), per_method * len(rows)),
        ],
        columns=["way", "images", "seconds"],
    )
    table["ratio_to_ours"] = table.seconds / (banked + scored)
    print(table.round(3).to_string(index=False))
    versions, name = {"torch": torch.__version__}, f"protocol_{arguments.config}"
    record(table, name, device, versions, f"bench_protocol.py --config {arguments.config}")
    record_figure(partial(draw, table=table), name, device, versions, height=2.4)


if __name__ == "__main__":
    main()
