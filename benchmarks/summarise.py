"""The main ratios of benchmarks/results, those of the CPU, as the table that README.md has.

    python benchmarks/summarise.py

Writes benchmarks/results/summary.md; tests/test_readme.py holds it against the README. Needs the results of bench_kernels.py
and, for cifar10_npz, of bench_precompute.py, bench_protocol.py, bench_scoring.py and bench_forward.py --compile.
"""

import pandas as pd
from recording import RESULTS, short

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
    faster = precompute.times_faster_than_autograd
    table_form = line.times_faster[line.index.str.startswith("as public codes")]
    rows = [
        ("LINe head, N = 50,000, C = 1,000, D = 2,048",
         "table of masked weights [C, C, D] in chunks, sample by sample (extrapolated from 128)",
         f"{short(table_form.min(), 2)} times faster"),
        ("the same", "as above, [B, C, D] products of a batch (extrapolated from 128)",
         f"{short(table_form.max(), 2)} times faster"),
        ("the same", "masked product for each class, plain torch",
         f"{short(line.times_faster['plain torch'], 2)} times faster"),
        ("LINe's contributions from the bank, an image", "forward and backward pass of a batch of 1",
         f"{short(faster['class means, from the bank'], 2)} times faster"),
        ("the same with the pass that fills the bank", "as above",
         f"{short(faster['class means, with the forward pass in batches'], 2)} times faster"),
        ("methods on the backbone that read banks, from there to intervals, with tuning",
         "forward pass into the banks (extrapolated from 512 images)",
         f"{short(100 * scoring.share_of_forward_pass['methods on the backbone'], 2)} % of the time"),
        ("CIFAR-10 sample, 19 methods, images to table",
         "a pass for each method and OOD set (extrapolated from one method)",
         f"{short(protocol.ratio_to_ours.iloc[-1], 2)} times faster"),
        ("pass into a bank, DenseNet-101", "bare network, same batches",
         f"{short(100 * forward.throughput_of_bare['extract, float32'], 2)} % of the throughput"),
        ("pass in bfloat16", "pass in float32",
         f"{short(forward.times_faster_than_float32['extract, bfloat16'], 2)} times faster"),
        ("pass compiled", "pass not compiled",
         f"{short(forward.times_faster_than_float32['extract, compiled'], 2)} times faster"),
    ]  # fmt: skip
    tables = kernels, scoring, precompute, protocol, forward
    machines = " · ".join(sorted({machine for table in tables for machine in table.machine}))
    lines = ["| what | against | ratio |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*lines, "", f"{machines}."]) + "\n"


if __name__ == "__main__":
    write_text(RESULTS / "summary.md", summary())
    print(summary())
