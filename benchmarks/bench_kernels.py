"""How fast are the kernels, beside plain torch, beside what public codes do, and beside what the machine can do?

    python benchmarks/bench_kernels.py

Times, in one run, in float32 and on random features, each kernel of ood_helpers.kernels at the sizes of CIFAR-10, CIFAR-100
and ImageNet ("ours"); the same in torch as one writes it with care, but with all logits at once and no grouping ("plain
torch"); and in the form that the methods' public codes have ("as public codes"): a [C, C, D] table of masked weights and [B, C, D]
products in batches (LINe; also without batches, which have to be allocated anew), loops over samples (LINe, HIMPLoS, KNN),
copies of shaped features (ASH), scores that batches append to a list. Where the table passes half of --memory it is made
in chunks of classes. All ways are compared before anything is timed.

A slow way runs on part of the samples (column samples_measured) and its time is extrapolated linearly; the time of LINe's
table, which does not grow with the samples, is measured apart and added. `times_faster` is that of ours. Bytes are the inputs
read once and the outputs written once, FLOP those of the dense products, or of the sums where there is none; `roofline_share` is the time these need at the
measured rates of a float32 matrix product and of a copy, as a share of the measured time. On CUDA, where tf32 is there, it
has rows of its own. Writes benchmarks/results/kernels.csv and .png with machine, versions and command.
"""

import ood_helpers  # noqa: F401 - first: it says how threads wait, which is read when torch is loaded

# isort: split
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import EllipsisType
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from recording import experiment_options, record, record_figure, repeated
from torch import Tensor

from ood_helpers.backbones.precision import resolve_device
from ood_helpers.kernels.group_score import group_score
from ood_helpers.kernels.kth_cosine import BLOCK, CHUNK, kth_cosine
from ood_helpers.kernels.largest_entries import largest_entries
from ood_helpers.kernels.line_head import line_head
from ood_helpers.kernels.prototype_cosine import prototype_cosine
from ood_helpers.kernels.shaped_energy import Shaping, shaped_energy
from ood_helpers.plots import COLOURS, ID_COLOUR

BATCH = 64  # of the public codes
BATCHED = 10_000  # samples that their loops over batches are measured on, at most
PLAIN, REFERENCE, ALONE = "plain torch", "as public codes", "as public codes, without a batch"


@dataclass(frozen=True)
class Size:
    """samples N, classes C, features D; groups of MOS; percentiles of LINe's features and weights, and its clip; queries,
    training features and neighbours of KNN; the most samples that loops over samples, and LINe's, are measured on."""

    name: str
    samples: int
    classes: int
    features: int
    groups: int
    pruned: int
    clip: float
    queries: int
    train: int
    neighbours: int
    looped: int
    line_samples: int

    @property
    def slices(self) -> list[tuple[int, int]]:
        ends = np.linspace(0, self.classes, self.groups + 1).round().astype(int) + np.arange(self.groups + 1)
        return list(zip(ends[:-1].tolist(), ends[1:].tolist()))


SIZES = {
    size.name: size
    for size in (
        Size("cifar10", 10_000, 10, 342, 2, 90, 1.0, 2048, 8336, 50, 2048, 2048),
        Size("cifar100", 10_000, 100, 342, 10, 90, 1.0, 2048, 8336, 200, 2048, 2048),
        Size("imagenet", 50_000, 1000, 2048, 8, 10, 0.8, 256, 50_000, 1000, 1024, 128),
    )
}


@dataclass(frozen=True)
class Way:
    """One way to compute a kernel's output.

    run : gives it for `rows`; compared : takes it to a tensor, a value a row, in which all ways should agree, None = it is
    a part of the work only
    fixed : what is done `times` times for any number of rows, and is not in `run`
    """

    name: str
    run: Callable[[], Any]
    rows: Tensor | slice | EllipsisType = ...
    fixed: Callable[[], object] | None = None
    times: float = 0
    precision: str = "ieee"
    compared: Callable[[Any], Tensor] | None = lambda output: output


@dataclass(frozen=True)
class Case:
    """A kernel at a size. `flop` in the precision of the way, `flop_ieee` in full float32 always."""

    kernel: str
    samples: int
    inputs: tuple[Tensor, ...]
    flop: float
    ways: list[Way]
    flop_ieee: float = 0.0
    output_bytes: int = 4  # a sample

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.inputs) + self.output_bytes * self.samples


class Inputs:
    """Random features behind a ReLU, in classes that a head tells apart."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device, self.generator = size, device, torch.Generator(device).manual_seed(0)
        self.prototypes = self._random(size.classes, size.features).abs()
        self.weight = 4 / size.features * (self.prototypes - self.prototypes.mean(dim=0))
        self.bias = 0.1 * self._random(size.classes)
        self.features = self.draw(size.samples)
        self.predicted = torch.cat([self.logits(part).argmax(dim=1) for part in self.features.split(4096)])

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def draw(self, count: int) -> Tensor:
        labels = torch.randint(self.size.classes, (count,), generator=self.generator, device=self.device)
        noise = self._random(count, self.size.features)
        return noise.mul_(0.5).sub_(0.2).add_(self.prototypes[labels]).relu_()

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


def energy(logits: Tensor) -> Tensor:
    return logits.logsumexp(dim=1)


def in_batches(step: Callable[[Tensor], Tensor], *tensors: Tensor) -> Tensor:
    """Scores batch by batch, collected in a list as the public codes do."""
    scores: list[float] = []
    for batch in zip(*(tensor[:BATCHED].split(BATCH) for tensor in tensors)):
        scores.extend(step(*batch).cpu().numpy())
    return torch.from_numpy(np.asarray(scores)).to(tensors[0].device)


def line_case(data: Inputs, memory: float) -> Case:
    size, weight, bias = data.size, data.weight, data.bias
    importance = (weight * data.prototypes).abs()
    rank = max(1, round(size.pruned / 100 * size.features))
    kept = importance > importance.kthvalue(rank, dim=1).values[:, None]
    some = weight[:: max(1, size.classes // 32)].T  # the percentile of a part of the weights will do here
    of_some = [(row[:, None] * some).flatten() for row in importance]
    floors = torch.stack(
        [row.kthvalue(max(1, round(size.pruned / 100 * len(row)))).values for row in of_some]
    )
    arguments = (weight, bias, importance, kept, floors, size.clip)
    clipped_to = partial(torch.clamp, max=size.clip)
    predicted = torch.cat([data.logits(clipped_to(part)).argmax(dim=1) for part in data.features.split(4096)])

    def plain() -> Tensor:
        clipped = clipped_to(data.features)
        classes, logits = (
            data.logits(clipped).argmax(dim=1),
            data.features.new_empty(size.samples, size.classes),
        )
        for k in classes.unique().tolist():
            rows = classes == k
            logits[rows] = F.linear(
                clipped[rows] * kept[k], weight * (importance[k] * weight > floors[k]), bias
            )
        return energy(logits)

    # Half of the memory for the table, half for the products.
    classes = max(1, min(size.classes, int(memory / 2 / weight.nbytes)))
    batch = max(1, min(BATCH, int(memory / 4 / weight.nbytes)))
    table = weight.new_empty(classes, *weight.shape)
    rows = (predicted < classes).nonzero().flatten()[: size.line_samples]

    def fill_table() -> None:
        for k in range(classes):
            table[k] = weight * (importance[k] * weight > floors[k])

    def reference() -> Tensor:
        scores = []
        for features in data.features[rows].split(batch):
            clipped = clipped_to(features)
            found = ((clipped[:, None, :] * weight).sum(dim=2) + bias).argmax(dim=1).tolist()
            products = weight.new_zeros(len(features), *weight.shape)
            for i, k in enumerate(found):
                products[i] = clipped[i] * kept[k] * table[k]
            scores.append(energy(products.sum(dim=2) + bias))
        return torch.cat(scores)

    def without_batch() -> Tensor:
        scores = []
        for features in data.features[rows]:
            clipped = clipped_to(features)
            k = int(((clipped * weight).sum(dim=1) + bias).argmax())
            scores.append(((clipped * kept[k] * table[k]).sum(dim=1) + bias).logsumexp(dim=0))
        return torch.stack(scores)

    fill_table()
    chunks = size.classes / classes
    ways = [
        *in_precisions(data, lambda precision: line_head(data.features, *arguments, precision=precision)),
        Way(PLAIN, plain),
        Way(REFERENCE, reference, rows, fill_table, chunks),
        Way(ALONE, without_batch, rows, fill_table, chunks),
    ]
    product = 2.0 * size.samples * size.classes * size.features
    inputs = (data.features, weight, bias, importance, kept, floors)
    return Case("LINe head", size.samples, inputs, product, ways, flop_ieee=product)


def himplos_case(data: Inputs) -> Case:
    size, weight, bias, prototypes = data.size, data.weight, data.bias, data.prototypes
    features, predicted = data.features, data.predicted
    kept = weight >= weight.kthvalue(round(0.6 * size.features), dim=1).values[:, None]

    def ours(precision: str) -> Tensor:
        cosines = prototype_cosine(features, prototypes, predicted)
        shaping = Shaping(size.clip, kept, predicted, scale=cosines)
        return shaped_energy(features, weight, bias, shaping, precision=precision)

    def plain() -> Tensor:
        masked = (features * kept[predicted]).clamp(max=size.clip)
        cosines = F.cosine_similarity(features, prototypes[predicted], dim=1)
        return energy(data.logits(masked) * cosines[:, None])

    def reference() -> Tensor:
        def step(batch: Tensor, classes: Tensor) -> Tensor:
            masks, cosines = torch.zeros_like(batch), []
            for i, k in enumerate(classes.tolist()):
                masks[i] = kept[k]
                cosines.append(F.cosine_similarity(batch[i], prototypes[k], dim=0))
            return energy(data.logits((batch * masks).clamp(max=size.clip)) * torch.stack(cosines)[:, None])

        return in_batches(step, features[: size.looped], predicted[: size.looped])

    ways = [*in_precisions(data, ours), Way(PLAIN, plain), Way(REFERENCE, reference, slice(size.looped))]
    inputs = (features, weight, bias, kept, prototypes, predicted)
    return Case(
        "HIMPLoS energy", size.samples, inputs, 2.0 * size.samples * size.classes * size.features, ways
    )


def react_case(data: Inputs) -> Case:
    size, features = data.size, data.features

    def step(part: Tensor) -> Tensor:
        return energy(data.logits(part.clamp(max=size.clip)))

    def ours(precision: str) -> Tensor:
        return shaped_energy(features, data.weight, data.bias, Shaping(size.clip), precision=precision)

    ways = [
        *in_precisions(data, ours),
        Way(PLAIN, lambda: step(features)),
        Way(REFERENCE, lambda: in_batches(step, features), slice(BATCHED)),
    ]
    inputs = (features, data.weight, data.bias)
    return Case("ReAct energy", size.samples, inputs, 2.0 * size.samples * size.classes * size.features, ways)


def ash_cases(data: Inputs) -> Iterator[Case]:
    """The sums alone, then the energy with them."""
    size, features = data.size, data.features
    count = size.features - round(0.9 * size.features)

    def shaped(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = part.sum(dim=1)
        kept = part.topk(count, dim=1)
        result = torch.zeros_like(part).scatter_(1, kept.indices, kept.values)
        return before, result.sum(dim=1), result

    def plain_sums() -> tuple[Tensor, Tensor]:
        return features.sum(dim=1), features.topk(count, dim=1, sorted=False).values.sum(dim=1)

    def reference_sums() -> tuple[Tensor, Tensor]:
        sums = [shaped(part)[:2] for part in features[:BATCHED].split(BATCH)]
        return torch.cat([total for total, _ in sums]), torch.cat([kept for _, kept in sums])

    def gained_energy(part: Tensor) -> Tensor:
        before, after, result = shaped(part)
        return energy(data.logits(result * (before / after).exp()[:, None]))

    def ours(precision: str) -> Tensor:
        found = largest_entries(features, count)
        gain = (found.total / found.kept_total).exp()
        shaping = Shaping(largest=found, gain=gain)
        return shaped_energy(features, data.weight, data.bias, shaping, precision=precision)

    ways = [
        Way(
            "ours",
            lambda: largest_entries(features, count),
            compared=lambda found: found.kept_total / found.total,
        ),
        Way(PLAIN, plain_sums, compared=lambda sums: sums[1] / sums[0]),
        Way(REFERENCE, reference_sums, slice(BATCHED), compared=lambda sums: sums[1] / sums[0]),
    ]
    sums = 2.0 * size.samples * size.features
    yield Case("largest entries", size.samples, (features,), sums, ways, output_bytes=20)
    ways = [
        *in_precisions(data, ours),
        Way(PLAIN, lambda: gained_energy(features)),
        Way(REFERENCE, lambda: in_batches(gained_energy, features), slice(BATCHED)),
    ]
    inputs = (features, data.weight, data.bias)
    yield Case("ASH-S energy", size.samples, inputs, sums * size.classes, ways)


def cosine_case(data: Inputs) -> Case:
    size, features, prototypes, predicted = data.size, data.features, data.prototypes, data.predicted

    def reference() -> Tensor:
        pairs = zip(features[: size.looped], predicted[: size.looped].tolist())
        return torch.stack([F.cosine_similarity(f, prototypes[k], dim=0) for f, k in pairs])

    ways = [
        Way("ours", lambda: prototype_cosine(features, prototypes, predicted)),
        Way(PLAIN, lambda: F.cosine_similarity(features, prototypes[predicted], dim=1)),
        Way(REFERENCE, reference, slice(size.looped)),
    ]
    inputs = (features, prototypes, predicted)
    return Case("prototype cosine", size.samples, inputs, 4.0 * features.numel(), ways)


def group_case(data: Inputs) -> Case:
    """Compared as the probability of "others", the score of the public code, which float32 rounds more coarsely."""
    size = data.size
    shape = size.samples, size.classes + size.groups
    logits = torch.randn(*shape, generator=data.generator, device=data.device)

    def plain() -> Tensor:
        odds = [
            (logits[:, first + 1 : end] - logits[:, first, None]).logsumexp(dim=1)
            for first, end in size.slices
        ]
        return torch.stack(odds, dim=1).amax(dim=1)

    def others(score: Tensor) -> Tensor:
        return torch.sigmoid(-score)

    def step(part: Tensor) -> Tensor:
        in_group = [part[:, first:end].softmax(dim=1)[:, 0] for first, end in size.slices]
        return torch.stack(in_group, dim=1).amin(dim=1)

    ways = [
        Way("ours", lambda: group_score(logits, size.slices), compared=others),
        Way(PLAIN, plain, compared=others),
        Way(REFERENCE, lambda: in_batches(step, logits), slice(BATCHED)),
    ]
    return Case("group score", size.samples, (logits,), 3.0 * logits.numel(), ways)


def neighbour_case(data: Inputs) -> Case:
    size = data.size
    queries, train = data.draw(size.queries), data.draw(size.train)
    unit_queries, unit_train = F.normalize(queries, dim=1), F.normalize(train, dim=1)
    looped = min(size.queries, 4 if size.name == "imagenet" else 64)

    def reference() -> Tensor:
        distances = [(unit_train - query).norm(dim=1).sort().values for query in unit_queries[:looped]]
        return torch.stack([ordered[size.neighbours - 1] for ordered in distances])

    def plain() -> Tensor:
        cosines = F.normalize(queries, dim=1) @ F.normalize(train, dim=1).T
        return cosines.topk(size.neighbours, dim=1).values[:, -1]

    def multiply(queries: Tensor, train: Tensor, cosines: Tensor) -> None:
        for some in queries.split(CHUNK):
            for block in train.split(BLOCK):
                torch.mm(some, block.T, out=cosines[: len(some) * len(block)].view(len(some), len(block)))

    def product() -> None:
        multiply(queries, train, cosines)

    def product_of_doubles() -> None:
        multiply(*doubles, double_cosines)

    cosines = queries.new_empty(CHUNK * BLOCK)
    doubles, double_cosines = (queries.double(), train.double()), cosines.double()
    ways = [
        Way("ours", lambda: kth_cosine(queries, [train], [size.neighbours])[:, 0]),
        Way("product alone", product, compared=None),
        Way("ours, float64", lambda: kth_cosine(doubles[0], [doubles[1]], [size.neighbours])[:, 0].float()),
        Way("product alone, float64", product_of_doubles, compared=None),
        Way(PLAIN, plain),
        Way(REFERENCE, reference, slice(looped), compared=lambda distance: 1 - distance**2 / 2),
    ]
    flop = 2.0 * size.queries * size.train * size.features
    return Case("k-th cosine", size.queries, (queries, train), flop, ways)


def in_precisions(data: Inputs, run: Callable[[str], Tensor]) -> list[Way]:
    ways = [Way("ours", lambda: run("ieee"))]
    if data.device.type == "cuda":
        ways.append(Way("ours, tf32", lambda: run("tf32"), precision="tf32"))
    return ways


def cases(data: Inputs, memory: float) -> Iterator[Case]:
    """One after the other, so that only one needs its memory."""
    yield line_case(data, memory)
    yield himplos_case(data)
    yield react_case(data)
    yield from ash_cases(data)
    yield cosine_case(data)
    yield group_case(data)
    yield neighbour_case(data)


def machine_rates(device: torch.device) -> dict[str, float]:
    """FLOP a second of a large matrix product ("ieee", on CUDA also "tf32"), and bytes a second of a copy ("copy")."""
    n = 8192 if device.type == "cuda" else 4096
    left, right = torch.randn(2, n, n, device=device)
    product, rates = torch.empty_like(left), {}
    for precision in ("ieee", "tf32") if device.type == "cuda" else ("ieee",):
        torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
        torch.mm(left, right, out=product)  # warm-up
        rates[precision] = 2.0 * n**3 / repeated(lambda: torch.mm(left, right, out=product), device)
    torch.set_float32_matmul_precision("highest")
    source = torch.ones(2**28, device=device)  # 1 GiB, more than any cache
    target = torch.zeros_like(source)
    rates["copy"] = 2.0 * source.nbytes / repeated(lambda: target.copy_(source), device)
    return rates


def check(case: Case, device: torch.device) -> None:
    """Stop unless all ways agree, for all samples that they compute but one in a thousand: of equal entries at the border
    of ASH, which random numbers have, topk may take any."""
    ours = case.ways[0]
    expected = ours.compared(ours.run())
    for way in case.ways[1:]:
        if way.compared is None:
            continue
        tolerance = 1e-2 if way.precision == "tf32" else 1e-4
        found = way.compared(way.run())
        agree = torch.isclose(found, expected[way.rows], rtol=tolerance, atol=tolerance)
        if int((~agree).sum()) > len(agree) / 1000:
            sys.exit(
                f"{case.kernel}: {way.name} differs from ours for {1 - float(agree.float().mean()):.1%} of the samples, expected "
                "the same to float32 rounding; nothing is recorded: run tests/kernels."
            )


def measure(case: Case, rates: dict[str, float], device: torch.device) -> list[dict[str, object]]:
    """A row for each way."""
    check(case, device)
    rows = []
    for way in case.ways:
        measured = len(torch.empty(case.samples, device="meta")[way.rows])
        time = repeated(way.run, device) * case.samples / measured
        if way.fixed is not None:
            time += way.times * repeated(way.fixed, device)
        products = case.flop_ieee / rates["ieee"] + case.flop / rates[way.precision]
        row = {
            "kernel": case.kernel,
            "way": way.name,
            "samples_measured": measured,
            "seconds": time,
            "megabytes": case.bytes / 1e6,
            "gigaflop": (case.flop + case.flop_ieee) / 1e9,
            "roofline_share": max(products, case.bytes / rates["copy"]) / time,
        }
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            way.run()
            row["peak_extra_megabytes"] = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        rows.append(row)
    return [{**row, "times_faster": row["seconds"] / rows[0]["seconds"]} for row in rows]


def draw(figure: Figure, table: pd.DataFrame) -> None:
    """A panel a size: how many times faster ours is than the other ways, the fastest of them where there are several."""
    kernels, colours = list(table.kernel.unique()), {PLAIN: COLOURS[0], REFERENCE: ID_COLOUR}
    all_axes = figure.subplots(1, table["size"].nunique(), sharey=True, squeeze=False)[0]
    ratios = table[table.way.str.startswith(tuple(colours))]
    limits = 0.7 * min(1, ratios.times_faster.min()), 8 * ratios.times_faster.max()
    for axes, (name, rows) in zip(all_axes, ratios.groupby("size", sort=False)):
        for offset, (way, colour) in zip((-0.19, 0.19), colours.items()):
            of_way = rows[rows.way.str.startswith(way)].groupby("kernel").times_faster.min().reindex(kernels)
            places = np.arange(len(kernels)) + offset
            axes.barh(places, of_way - 1, left=1, height=0.36, color=colour, label=way)
            for place, value in zip(places, of_way):
                text = f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"
                beside = {"textcoords": "offset points", "va": "center", "fontsize": 7}
                axes.annotate(text, (max(value, 1), place), (2, 0), **beside)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", xlim=limits)
        axes.xaxis.set_minor_formatter(NullFormatter())
        n, c, d = rows[["samples", "classes", "features"]].max()
        axes.set_title(f"{name}\nN = {n:,}\nC = {c:,}, D = {d:,}")
        axes.grid(True, axis="x")
    all_axes[0].set_yticks(range(len(kernels)), kernels)
    all_axes[0].invert_yaxis()
    all_axes[len(all_axes) // 2].set_xlabel(
        "time of the other way / time of ours, log scale; right of 1 ours is faster"
    )
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)


def main() -> None:
    parser = experiment_options(__doc__, used=False)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["cifar10", "cifar100", "imagenet"])
    parser.add_argument("--memory", type=float, default=4.0, help="GB for LINe's table and products")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    rates = machine_rates(device)
    print(", ".join(f"{name} {rate / 1e9:,.0f} G/s" for name, rate in rates.items()))
    rows = []
    for name in arguments.sizes:
        data = Inputs(SIZES[name], device)
        for case in cases(data, 1e9 * arguments.memory):
            shape = {"classes": data.size.classes, "features": data.size.features}
            for row in measure(case, rates, device):
                rows.append({"size": name, "samples": case.samples, **shape, **row})
    table = pd.DataFrame(rows)
    table["matrix_product_gigaflops"] = rates["ieee"] / 1e9
    if "tf32" in rates:
        table["tf32_product_gigaflops"] = rates["tf32"] / 1e9
    table["copy_gigabytes_per_second"] = rates["copy"] / 1e9
    shown = ["kernel", "size", "way", "samples_measured", "seconds", "times_faster", "roofline_share"]
    print(table[shown].to_string(index=False, float_format="{:.4g}".format))
    versions = {"torch": torch.__version__}
    if device.type == "cuda":
        import triton

        versions["triton"] = triton.__version__
    command = f"bench_kernels.py --sizes {' '.join(arguments.sizes)} --memory {arguments.memory:g}"
    record(table, "kernels", device, versions, command)
    record_figure(lambda figure: draw(figure, table), "kernels", device, versions, height=4.0)


if __name__ == "__main__":
    main()
