"""What does it save to train a head on the features in the bank?

    python benchmarks/bench_fine_tuning.py --config cifar10_npz --data-root ../shared

Times, in one run, steps of the head-only recipe of MOS on the features in the bank and on the images, as its public code
trains (a forward pass through the frozen backbone for every image of every step). Without mixup and augmentation both
end in the same head. Prints the ratio and writes benchmarks/results/fine_tuning_<config>.csv with machine, versions and
command.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from ood_helpers.config import PROJECT_ROOT
from ood_helpers.files import write_text
from ood_helpers.pipeline import Experiment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="digits")
    parser.add_argument("--data-root", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=10, help="on images; 20 times as many on features")
    arguments = parser.parse_args()
    run = Experiment.open(arguments.config, arguments.data_root, device=arguments.device)
    _ = run.bank("train")  # filled if need be
    # no validation set, which would be passed as often for few steps as for many
    options = {"overrides": ["tuning=null", "id.validation=null"], "device": arguments.device}

    rows = []
    for softmax, name in (("flat", "flat"), ("group", "group")):
        seconds = {}
        for inputs, steps in (("features", 20 * arguments.steps), ("images", arguments.steps)):
            changes = {"inputs": inputs, "mixup": 0.0, "schedule": (1, 2, 3, 4, steps)}
            recipe = run.networks[name].model_copy(update=changes)
            with tempfile.TemporaryDirectory() as folder:
                own = Experiment.open(arguments.config, arguments.data_root, **options)
                own.backbone = run.backbone
                own.run_dir = Path(folder)  # nothing is trained there yet; the banks stay open
                network = own.fine_tuned(recipe)
                _ = own.image_set("train"), network.groups
                begin = time.perf_counter()
                _ = network.network
                seconds[inputs] = (time.perf_counter() - begin) / steps
        rows.append(
            {
                "softmax": softmax,
                "batch_size": recipe.batch_size,
                "seconds_per_step_features": seconds["features"],
                "seconds_per_step_images": seconds["images"],
                "ratio": seconds["images"] / seconds["features"],
            }
        )
    table = pd.DataFrame(rows)
    table["machine"] = (
        f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {run.device}"
    )
    table["versions"] = f"python {platform.python_version()}, torch {torch.__version__}"
    table["command"] = f"python benchmarks/bench_fine_tuning.py --config {arguments.config}"
    print(table.iloc[:, :5].round(5).to_string(index=False))
    path = PROJECT_ROOT / "benchmarks" / "results" / f"fine_tuning_{arguments.config}.csv"
    write_text(path, table.to_csv(index=False, float_format="%.4g", lineterminator="\n"))


if __name__ == "__main__":
    main()
