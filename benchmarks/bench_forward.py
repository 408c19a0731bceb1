"""What does a feature bank cost beside the bare network?

    python benchmarks/bench_forward.py --config cifar10_npz --data-root ../shared

Times, in one run and by turns, the same batches through the bare network (already loaded, normalised, channels_last, on
the device) and through `features.extract`, which loads, transforms, copies, computes, checks and writes; in each kind of
arithmetic that the config offers. Medians of --repeats; `first_seconds` is the first pass, with what compiling takes.
`throughput_of_bare` is that of the bare network of the same arithmetic. Prints the table and writes
benchmarks/results/forward_<config>.csv and .png with machine, versions and command.
"""

import ood_helpers  # noqa: F401 - first: it says how threads wait, which is read when torch is loaded

# isort: split
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from recording import draw_bars, experiment_options, record, record_figure, seconds, short

from ood_helpers.backbones.precision import float32_products, network_in
from ood_helpers.config.experiment import FeaturesConfig
from ood_helpers.data.transforms import image_batches
from ood_helpers.experiment import Experiment
from ood_helpers.extract import extract, pass_batch_size
from ood_helpers.storage import Store


def draw(figure: Figure, table: pd.DataFrame) -> None:
    values, names = table.milliseconds_per_image, table["pass"]
    texts = [
        f"{short(value)} ms" + f", {share:.0%} of bare throughput" * name.startswith("extract")
        for name, value, share in zip(names, values, table.throughput_of_bare)
    ]
    ours = [name for name in names if name.startswith("extract")]
    draw_bars(figure, names, values, texts, label="time for an image (ms)", ours=ours, log=False)


def main() -> None:
    parser = experiment_options(__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile, too, which takes a minute before it runs"
    )
    arguments = parser.parse_args()
    run = Experiment.open(arguments.config, data_root=arguments.data_root, device=arguments.device)
    network, transform, device = run.backbone.start().eval(), run.context.transform, run.context.device
    network.to(device, memory_format=torch.channels_last)
    images = run.image_set("train").take(range(min(arguments.images, len(run.image_set("train")))))
    plain = run.config.features.model_copy(update={"precision": "float32", "compile": False})
    size = pass_batch_size(plain, device)
    batches = [
        transform.normalise(batch.to(device)).contiguous(memory_format=torch.channels_last)
        for batch in image_batches(images, transform, 0, len(images), size, plain.workers)
    ]

    choices = {"float32": plain, "bfloat16": plain.model_copy(update={"precision": "bfloat16"})}
    if device.type == "cuda":
        choices["tf32"] = plain.model_copy(update={"precision": "tf32"})
    if arguments.compile:
        choices["compiled"] = plain.model_copy(update={"compile": True})

    def bare(choice: FeaturesConfig) -> Callable[[], None]:
        forward = network_in(network, choice.precision, choice.compile, device, size)

        @torch.inference_mode()
        def pass_once() -> None:
            with float32_products():
                for batch in batches:
                    network.head(forward(batch))

        return pass_once

    def banked(choice: FeaturesConfig) -> Callable[[], None]:
        def pass_once() -> None:
            with tempfile.TemporaryDirectory() as folder:
                extract(network, images, transform, Store(Path(folder)), choice, device)

        return pass_once

    passes = {}
    for name, choice in choices.items():
        passes |= {f"bare network, {name}": bare(choice), f"extract, {name}": banked(choice)}
    first = {name: seconds(function, device) for name, function in passes.items()}
    times = {name: [] for name in passes}
    for _ in range(arguments.repeats):
        for name, function in passes.items():
            times[name].append(seconds(function, device))
    bare_times = {name: pd.Series(times[f"bare network, {name.split(', ')[1]}"]) for name in times}
    table = pd.DataFrame(
        {
            "pass": name,
            "images": len(images),
            "batch_size": size,
            "milliseconds_per_image": 1000 * pd.Series(taken).median() / len(images),
            # By turns, so that each pass is compared with its neighbour in time.
            "throughput_of_bare": (bare_times[name] / pd.Series(taken)).median(),
            "times_faster_than_float32": (
                pd.Series(times["bare network, float32"]) / pd.Series(taken)
            ).median(),
            "first_seconds": first[name],
        }
        for name, taken in times.items()
    )
    print(table.round(4).to_string(index=False))
    versions, name = {"torch": torch.__version__}, f"forward_{arguments.config}"
    command = f"bench_forward.py --config {arguments.config}{' --compile' * arguments.compile}"
    record(table, name, device, versions, command)
    record_figure(partial(draw, table=table), name, device, versions, height=0.6 + 0.4 * len(table))


if __name__ == "__main__":
    main()
