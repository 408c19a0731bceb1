"""What does scoring cost beside the forward pass that fills the banks?

    python benchmarks/bench_scoring.py --config cifar10_npz --data-root ../shared

Times, in one run, the network's forward pass over a sample of the experiment's images and everything that follows
from cached banks: fit, scores, metrics and bootstrap intervals of every method on every set, tuning included. Methods
that pass the images again (ODIN, the Mahalanobis ensemble) are left out. Prints the ratio and
writes benchmarks/results/scoring_<config>.csv with machine, versions and command.
"""

import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from recording import experiment_options, record

from ood_helpers.features import extract
from ood_helpers.pipeline import Experiment


def main() -> None:
    parser = experiment_options(__doc__)
    parser.add_argument(
        "--images", type=int, default=512, help="images of the ID test set that are passed and timed"
    )
    arguments = parser.parse_args()
    run = Experiment.open(arguments.config, arguments.data_root, device=arguments.device)
    images = sum(len(run.bank(name)) for name in run.bank_names)  # fills the banks if need be
    for detector in run.detectors.values():  # and trains the heads
        if detector.network:
            _ = run.fine_tuned(detector.network).network

    sample = run.image_set("test").take(range(min(arguments.images, len(run.image_set("test")))))
    with tempfile.TemporaryDirectory() as folder:
        extract(run.network, sample, run.transform, Path(folder) / "warm-up", run.config.features, run.device)
        bank = extract(
            run.network, sample, run.transform, Path(folder) / "timed", run.config.features, run.device
        )
    forward = bank.record["seconds"] / len(sample) * images

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run.run_dir = Path(folder)  # no score is there yet; the banks stay open
        for row in [*run.detectors, *run.tuned_rows]:
            if row in run.detectors and run.detectors[row].needs_images:
                continue
            begin = time.perf_counter()
            run.results([row])
            rows.append({"method": run.labels([row])[0], "seconds": time.perf_counter() - begin})
    table = pd.DataFrame([*rows, {"method": "all methods", "seconds": sum(row["seconds"] for row in rows)}])
    table["share_of_forward_pass"] = table.seconds / forward
    table["forward_pass_seconds"] = forward
    table["images"] = images
    print(
        table[["method", "seconds", "share_of_forward_pass"]].round(4).to_string(index=False), file=sys.stdout
    )
    print(f"forward pass of {images:,} images: {forward:.1f} s, extrapolated from {len(sample)}")
    command = f"bench_scoring.py --config {arguments.config}"
    record(table, f"scoring_{arguments.config}", run.device, {"torch": torch.__version__}, command)


if __name__ == "__main__":
    main()
