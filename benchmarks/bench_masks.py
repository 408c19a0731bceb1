"""What do the masks of UMAP cost, and what does it save to make them anew only when their scores have changed?

    python benchmarks/bench_masks.py --config cifar10_npz --data-root ../shared

Times, in one run, on the backbone: a pass in eval mode without masks, with masks that are kept, and with masks that are
made at each forward pass, as the public code does; and a training step without and with masks. Prints the ratios to the
network without masks and writes benchmarks/results/masks_<config>.csv with machine, versions and command.
"""

from collections.abc import Callable

import pandas as pd
import torch
from recording import experiment_options, record, seconds

from ood_helpers.experiment import Experiment
from ood_helpers.training.batches import load_images, to_network
from ood_helpers.unleashing_mask.weight_masks import attach_masks, freeze_weights, masks_of


def main() -> None:
    parser = experiment_options(__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    run = Experiment.open(arguments.config, data_root=arguments.data_root, device=arguments.device)
    transform, device = run.context.transform, run.context.device
    train_set, rows = run.image_set("train"), torch.arange(arguments.batch_size)
    images = load_images(train_set, transform, rows)
    images, labels = to_network(images, train_set, rows, transform, device)
    plain, masked = run.backbone.start(), run.backbone.start()
    attach_masks(masked, 0.8, torch.Generator().manual_seed(0))
    freeze_weights(masked)

    def evaluate(network: torch.nn.Module, forget: bool = False) -> Callable[[], None]:
        @torch.no_grad()
        def step() -> None:
            network.eval()
            for mask in masks_of(network).values() if forget else ():
                mask.scores.add_(0)  # changed, as far as the mask can tell
            network(images)

        return step

    def train(network: torch.nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-6)

        def step() -> None:
            network.train()
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()

        return step

    cases = {
        ("pass", "without masks"): evaluate(plain),
        ("pass", "masks kept"): evaluate(masked),
        ("pass", "masks made at each pass"): evaluate(masked, forget=True),
        ("training step", "without masks"): train(plain),
        ("training step", "with masks"): train(masked),
    }
    medians = {}
    for case, step in cases.items():
        step()  # warm-up
        times = [seconds(step, device) for _ in range(arguments.repeats)]
        medians[case] = float(pd.Series(times).median())
    table = pd.DataFrame(
        {
            "what": what,
            "network": network,
            "batch_size": arguments.batch_size,
            "seconds": value,
            "ratio_to_without": value / medians[what, "without masks"],
        }
        for (what, network), value in medians.items()
    )
    print(table.round(4).to_string(index=False))
    command = f"bench_masks.py --config {arguments.config}"
    record(table, f"masks_{arguments.config}", device, {"torch": torch.__version__}, command)


if __name__ == "__main__":
    main()
