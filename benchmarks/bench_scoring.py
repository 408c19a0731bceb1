"""How much does scoring cost, compared with the forward pass that fills the banks?

    python benchmarks/bench_scoring.py --config cifar10_npz --data-root ../shared

Times, in one run, the forward pass over a sample of the experiment's images and everything that follows from cached banks:
fit, scores, metrics and bootstrap intervals of every method on every set, tuning included, for the backbone and all networks
derived from it. `images` counts the images of the banks that a row's network has filled; for heads on the backbone's features
these are the backbone's. Methods that pass the images again (ODIN, the Mahalanobis ensemble) are left out. Prints the ratio
and writes benchmarks/results/scoring_<config>.csv with machine, versions and command.
"""

import ood_helpers  # noqa: F401 - first: it says how threads wait, which is read when torch is loaded

# isort: split
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from recording import experiment_options, record

from ood_helpers.experiment import Experiment
from ood_helpers.extract import extract
from ood_helpers.networks.base import Network
from ood_helpers.storage import Store
from ood_helpers.studies import bank_names


def images_of(network: Network, run: Experiment) -> int:
    """Images in the banks that a network has filled: trained and filled here, if need be."""
    images = sum(len(network.bank(name)) for name in bank_names(run))
    return 0 if getattr(network, "shares_features", False) else images


def main() -> None:
    parser = experiment_options(__doc__)
    parser.add_argument(
        "--images", type=int, default=512, help="images of the ID test set that are passed and timed"
    )
    arguments = parser.parse_args()
    run = Experiment.open(arguments.config, data_root=arguments.data_root, device=arguments.device)
    context, backbone = run.context, run.backbone
    tuned = run.tuned_rows()
    names = [name for name, row in run.rows().items() if not row.detector.needs_images]
    rows = [run.row(name) for name in names] + [tuned[name] for name in names if name in tuned]
    networks = dict.fromkeys([backbone, *(row.network for row in rows)])
    images = {network: images_of(network, run) for network in networks}

    sample = run.image_set("test").take(range(min(arguments.images, len(run.image_set("test")))))
    for _ in ("warm-up", "timed"):
        with tempfile.TemporaryDirectory() as folder:
            how = context.transform, Store(Path(folder)), context.config.features, context.device
            bank = extract(backbone.model(), sample, *how)
    an_image = bank.record["seconds"] / len(sample)

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        context.store.root = Path(folder)  # no score is there yet; the banks stay open
        for row in rows:
            begin = time.perf_counter()
            run.results([row])
            lines.append({"method": row.label, "seconds": time.perf_counter() - begin})
            lines[-1]["images"] = images[row.network] or images[backbone]
    table = pd.DataFrame(lines)
    of_backbone = [row.network is backbone or not images[row.network] for row in rows]
    totals = {
        "methods on the backbone": (of_backbone, images[backbone]),
        "all methods": (..., sum(images.values())),
    }
    for name, (taken, count) in totals.items():
        seconds = table.seconds[: len(rows)].to_numpy()[taken].sum()
        table.loc[len(table)] = {"method": name, "seconds": seconds, "images": count}
    table["forward_pass_seconds"] = an_image * table.images
    table["share_of_forward_pass"] = table.seconds / table.forward_pass_seconds
    print(table.round(4).to_string(index=False))
    print(f"{1000 * an_image:.2f} ms an image, measured on {len(sample)}")
    command = f"bench_scoring.py --config {arguments.config}"
    record(table, f"scoring_{arguments.config}", context.device, {"torch": torch.__version__}, command)


if __name__ == "__main__":
    main()
