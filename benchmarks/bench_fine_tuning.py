"""What does it save to train a head on the features in the bank?

    python benchmarks/bench_fine_tuning.py --config cifar10_npz --data-root ../shared

Times, in one run, steps of the head-only recipe of MOS on the features in the bank and on the images, as its public code
trains (a forward pass through the frozen backbone for every image of every step). Without mixup and augmentation both
end in the same head. Prints the ratio and writes benchmarks/results/fine_tuning_<config>.csv with machine, versions and
command.
"""

import copy
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from recording import experiment_options, record

from ood_helpers.experiment import Experiment
from ood_helpers.mos.training import fine_tune, train_head
from ood_helpers.training.fine_tuning import zero_head
from ood_helpers.training.recipes import TrainingImages


def main() -> None:
    parser = experiment_options(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="on images; 20 times as many on features")
    arguments = parser.parse_args()
    run = Experiment.open(arguments.config, data_root=arguments.data_root, device=arguments.device)
    bank = run.bank("train")  # filled if need be
    train, backbone, device = run.image_set("train"), run.backbone.model(), run.context.device
    rows = []
    for name in ("flat", "group"):
        groups, seconds = run.network(name).groups, {}
        recipe = run.network(name).recipe.model_copy(update={"mixup": 0.0, "images": None})
        on_images = TrainingImages(micro_batch_size=run.context.batch_size)
        for inputs, steps in (
            ("warm-up", 5),
            ("features", 20 * arguments.steps),
            ("images", arguments.steps),
        ):
            recipe = recipe.model_copy(update={"schedule": (1, 2, 3, 4, steps)})
            network = copy.deepcopy(backbone)
            logits = run.config.id.num_classes if groups is None else groups.num_logits
            network.head = zero_head(network.feature_dim, logits)
            with tempfile.TemporaryDirectory() as folder:
                # No validation set: it would be passed 20 times for few steps as for many.
                options = {"seed": 0, "device": device, "directory": Path(folder)}
                begin = time.perf_counter()
                if inputs != "images":
                    train_head(network.head, lambda: bank, None, len(train), recipe, groups, **options)
                else:
                    recipe = recipe.model_copy(update={"images": on_images})
                    fine_tune(network, train, None, run.context.transform, recipe, groups, **options)
                seconds[inputs] = (time.perf_counter() - begin) / steps
        rows.append(
            {
                "softmax": name,
                "batch_size": recipe.batch_size,
                "seconds_per_step_features": seconds["features"],
                "seconds_per_step_images": seconds["images"],
                "ratio": seconds["images"] / seconds["features"],
            }
        )
    table = pd.DataFrame(rows)
    print(table.round(5).to_string(index=False))
    command = f"bench_fine_tuning.py --config {arguments.config}"
    record(table, f"fine_tuning_{arguments.config}", device, {"torch": torch.__version__}, command)


if __name__ == "__main__":
    main()
