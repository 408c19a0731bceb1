"""The main ratios of benchmarks/results, those of the CPU, as the table that README.md has.

    python benchmarks/summarise.py

Writes benchmarks/results/summary.md; tests/test_readme.py holds it against the README.
"""

import pandas as pd
from recording import RESULTS

from ood_helpers.files import write_text

CONFIG = "cifar10_npz"


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / f"{name}.csv")


def summary() -> str:
    """The table, Markdown."""
    kernels, scoring = read("kernels"), read(f"scoring_{CONFIG}").set_index("method")
    precompute, protocol = read(f"precompute_{CONFIG}").set_index("table"), read(f"protocol_{CONFIG}")
    forward = read(f"forward_{CONFIG}").set_index("pass")
    line = kernels[(kernels["size"] == "imagenet") & (kernels.kernel == "LINe head")].set_index("way")
    table_form = line.times_faster[line.index.str.startswith("reference")]
    faster = precompute.times_faster_than_autograd
    rows = [
        ("LINe head, N = 50,000, C = 1,000, D = 2,048", "table of masked weights [C, C, D] in chunks, sample by sample",
         f"{table_form.min():.0f} times faster"),
        ("the same", "as above, [B, C, D] products of a batch", f"{table_form.max():.0f} times faster"),
        ("the same", "masked product for each class, plain torch", f"{line.times_faster['plain torch']:.1f} times faster"),
        ("LINe's contributions from the bank, an image", "forward and backward pass of a batch of 1",
         f"{faster['class means, from the bank']:,.0f} times faster"),
        ("the same with the pass that fills the bank", "as above",
         f"{faster['class means, with the forward pass in batches']:.1f} times faster"),
        ("methods on the backbone, from banks to intervals, with tuning", "forward pass into the banks",
         f"{scoring.share_of_forward_pass['methods on the backbone']:.1%} of the time"),
        ("methods on all networks, likewise", "forward passes of all networks",
         f"{scoring.share_of_forward_pass['all methods']:.1%} of the time"),
        ("CIFAR-10 sample, images to table", "a pass for each method and OOD set",
         f"{protocol.ratio_to_ours.iloc[-1]:.0f} times faster"),
        ("pass into a bank", "bare network, same batches",
         f"{forward.throughput_of_bare['extract, float32']:.1%} of the throughput"),
        ("pass in bfloat16", "pass in float32", f"{forward.times_faster_than_float32['extract, bfloat16']:.1f} times faster"),
        ("pass compiled", "pass not compiled", f"{forward.times_faster_than_float32['extract, compiled']:.2f} times faster"),
    ]  # fmt: skip
    machines = " · ".join(
        sorted({*kernels.machine, *scoring.machine, *precompute.machine, *protocol.machine})
    )
    lines = ["| what | against | ratio |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*lines, "", f"{machines}."]) + "\n"


if __name__ == "__main__":
    write_text(RESULTS / "summary.md", summary())
    print(summary())
