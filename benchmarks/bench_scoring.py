"""What does scoring cost beside the forward pass that fills the banks?

    python benchmarks/bench_scoring.py --config cifar10_npz --data-root ../shared

Times, in one run, the forward pass over a sample of the experiment's images and everything that follows from cached banks:
fit, scores, metrics and bootstrap intervals of every method on every set, tuning included, for the backbone and all networks
made from it; `images` are those of the banks that a row's network has filled, the backbone for heads on its features. Methods
that pass the images again (ODIN, the Mahalanobis ensemble) are left out. Prints the ratio and
writes benchmarks/results/scoring_<config>.csv with machine, versions and command.
"""

import ood_helpers  # noqa: F401 - first: it says how threads wait, which is read when torch is loaded

# isort: split
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from recording import experiment_options, record

from ood_helpers.features import OtherHeadBank, extract
from ood_helpers.pipeline import TUNED, Experiment


def main() -> None:
    parser = experiment_options(__doc__)
    parser.add_argument(
        "--images", type=int, default=512, help="images of the ID test set that are passed and timed"
    )
    arguments = parser.parse_args()
    run = Experiment.open(arguments.config, arguments.data_root, device=arguments.device)
    rows = [
        row
        for row in [*run.detectors, *run.tuned_rows]
        if not run.detectors[row.removesuffix(TUNED)].needs_images
    ]
    network_of = {row: run.detectors[row.removesuffix(TUNED)].network for row in rows}
    images = dict.fromkeys(network_of.values(), 0)
    for name in images:  # trained here, and banks filled, if need be
        banks = [(run.fine_tuned(name) if name else run).bank(image_set) for image_set in run.bank_names]
        images[name] = sum(len(bank) for bank in banks if not isinstance(bank, OtherHeadBank))

    sample = run.image_set("test").take(range(min(arguments.images, len(run.image_set("test")))))
    with tempfile.TemporaryDirectory() as folder:
        extract(run.network, sample, run.transform, Path(folder) / "warm-up", run.config.features, run.device)
        bank = extract(
            run.network, sample, run.transform, Path(folder) / "timed", run.config.features, run.device
        )
    an_image = bank.record["seconds"] / len(sample)

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        run.run_dir = Path(folder)  # no score is there yet; the banks stay open
        for row in rows:
            begin = time.perf_counter()
            run.results([row])
            lines.append({"method": run.labels([row])[0], "seconds": time.perf_counter() - begin})
            lines[-1]["images"] = images[network_of[row]] or images[""]
    table = pd.DataFrame(lines)
    of_backbone = [not images[name] or not name for name in network_of.values()]
    totals = {
        "methods on the backbone": (of_backbone, images[""]),
        "all methods": (..., sum(images.values())),
    }
    for name, (taken, count) in totals.items():
        seconds = table.seconds[: len(rows)].to_numpy()[taken].sum()
        table.loc[len(table)] = {"method": name, "seconds": seconds, "images": count}
    table["forward_pass_seconds"] = an_image * table.images
    table["share_of_forward_pass"] = table.seconds / table.forward_pass_seconds
    print(table.round(4).to_string(index=False), file=sys.stdout)
    print(f"{1000 * an_image:.2f} ms an image, measured on {len(sample)}")
    command = f"bench_scoring.py --config {arguments.config}"
    record(table, f"scoring_{arguments.config}", run.device, {"torch": torch.__version__}, command)


if __name__ == "__main__":
    main()
