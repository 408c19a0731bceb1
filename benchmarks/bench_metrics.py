"""How long do bootstrap intervals take, against a loop over scikit-learn?

    python benchmarks/bench_metrics.py

Times, in one run and on the same scores, 1,000 bootstrap resamples of FPR95 and AUROC by `metrics.resampled` and by
a Python loop that draws the images and calls scikit-learn's roc_curve and roc_auc_score. The loop runs for a few
resamples only (column loop_resamples) and its time is extrapolated to all. Peak memory is that of `metrics.resampled`
beside the scores. Prints the table and writes benchmarks/results/metrics.csv with machine, versions and command.
"""

import argparse
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pandas as pd
import sklearn
import torch
from recording import record
from sklearn.metrics import roc_auc_score, roc_curve

from ood_helpers import metrics

RESAMPLES = 1000


def loop(id_scores: np.ndarray, ood_scores: np.ndarray, resamples: int) -> None:
    """What one would write without thinking of time."""
    generator = np.random.default_rng(0)
    truth = np.r_[np.ones(len(id_scores)), np.zeros(len(ood_scores))]
    for _ in range(resamples):
        scores = np.r_[
            generator.choice(id_scores, len(id_scores)), generator.choice(ood_scores, len(ood_scores))
        ]
        false_positive, true_positive, _ = roc_curve(truth, scores, drop_intermediate=False)
        false_positive[np.argmax(true_positive >= 0.95)]
        roc_auc_score(truth, scores)


def seconds(function: Callable, *arguments) -> float:
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


def peak_bytes(function: Callable, *arguments) -> int:
    tracemalloc.start()
    function(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure(size: int) -> dict[str, float]:
    """A row of the table: `size` ID and as many OOD scores."""
    generator = np.random.default_rng(0)
    scores = generator.normal(1, 1, size), generator.normal(0, 1, size)
    loop_resamples, threads = max(3, 300_000 // size), torch.get_num_threads()
    metrics.resampled(*scores, metrics.CHUNK)  # warm-up
    loop(*scores, 1)
    row = {"id_scores": size, "ood_scores": size, "resamples": RESAMPLES}
    row["seconds"] = seconds(metrics.resampled, *scores, RESAMPLES)
    torch.set_num_threads(1)
    row["seconds_one_thread"] = seconds(metrics.resampled, *scores, RESAMPLES)
    torch.set_num_threads(threads)
    row["loop_seconds"] = seconds(loop, *scores, loop_resamples) / loop_resamples * RESAMPLES
    row["loop_resamples"] = loop_resamples
    row["times_faster"] = row["loop_seconds"] / row["seconds"]
    row["peak_megabytes"] = peak_bytes(metrics.resampled, *scores, 4 * threads * metrics.CHUNK) / 1e6
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--config", "--data-root"):
        parser.add_argument(name, help="not used: `make bench` gives it to every benchmark")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    arguments = parser.parse_args()
    table = pd.DataFrame([measure(size) for size in arguments.sizes])
    print(table.round(3).to_string(index=False))
    versions = {"numpy": np.__version__, "scikit-learn": sklearn.__version__}
    command = f"bench_metrics.py --sizes {' '.join(map(str, arguments.sizes))}"
    record(table, "metrics", "cpu", versions, command)


if __name__ == "__main__":
    main()
