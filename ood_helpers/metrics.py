"""Metrics of OOD detection: exact FPR at a TPR, AUROC, AUPR, detection error, thresholds, confidence intervals.

A score is higher for more in-distribution (ID) samples; ID is the positive class. Samples of equal score are
counted together, so the order of ties never matters; counts are int64, ratios float64. Scores may be numpy
arrays, tensors or lists. Functions that return one number give fractions in [0, 1]; `evaluate` and
`resampled`, whose dicts fill the results table, give percent.

Every function raises InputError for empty scores and for NaN or infinite ones.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from math import ceil, sqrt

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import pdtr

from ood_helpers.errors import InputError, nearest

COMPAT_RULES = ("oe", "dice")
CHUNK = 16  # bootstrap resamples drawn from one random stream, the piece of work of a thread
BLOCK_ELEMENTS = 1 << 18  # draws looked at together; larger blocks leave the CPU's cache
THREADED_FROM = 1 << 15  # scores; with fewer, threads wait for each other more than they save
MAX_THREADS = 8  # each holds the draws of its chunk
UNDECIDED = 128  # above every Poisson count that occurs


class _Counts:
    """The distinct scores [K] in descending order; how many ID and OOD samples have each, or at least it."""

    def __init__(self, scores: np.ndarray, id_counts: np.ndarray, ood_counts: np.ndarray) -> None:
        self.scores, self.id, self.ood = scores, id_counts, ood_counts
        self.accepted_id, self.accepted_ood = np.cumsum(id_counts), np.cumsum(ood_counts)
        self.n_id, self.n_ood = int(self.accepted_id[-1]), int(self.accepted_ood[-1])


def _checked(scores: ArrayLike, name: str) -> np.ndarray:
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().cpu()
    scores = np.asarray(scores, dtype=np.float64).ravel()
    if not len(scores):
        raise InputError(f"There are no {name} scores, expected at least one; check that the set has images.")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise InputError(
            f"{len(bad)} of {len(scores)} {name} scores are NaN or infinite (first: number {bad[0]}), "
            "expected finite scores; check the features they come from."
        )
    return scores


def _level(tpr: float) -> Fraction:
    """The rate as the decimal number that was written: 0.95 is 19/20, not the binary double next to it."""
    if not 0 < tpr <= 1:
        raise InputError(
            f"The TPR level is {tpr}, expected a fraction above 0 and at most 1, for example 0.95."
        )
    return Fraction(repr(float(tpr)))


def _group(id_scores: ArrayLike, ood_scores: ArrayLike) -> _Counts:
    id_scores, ood_scores = _checked(id_scores, "ID"), _checked(ood_scores, "OOD")
    pooled = np.concatenate([id_scores, ood_scores])
    order = np.argsort(-pooled)
    pooled = pooled[order]
    starts = np.flatnonzero(np.concatenate([[True], pooled[1:] != pooled[:-1]]))
    id_counts = np.add.reduceat((order < len(id_scores)).astype(np.int64), starts)
    return _Counts(pooled[starts], id_counts, np.diff(starts, append=len(pooled)) - id_counts)


def _swapped(counts: _Counts) -> _Counts:
    """OOD as the positive class, with negated scores."""
    return _Counts(-counts.scores[::-1], counts.ood[::-1], counts.id[::-1])


def _threshold_index(counts: _Counts, tpr: float) -> int:
    """Index of the largest distinct score t with TPR(score >= t) >= tpr."""
    return int(np.searchsorted(counts.accepted_id, ceil(_level(tpr) * counts.n_id)))


def _fpr(counts: _Counts, tpr: float, compat: str | None) -> float:
    true_positives, n_id, n_ood = counts.accepted_id, counts.n_id, counts.n_ood
    if compat is None:
        return float(counts.accepted_ood[_threshold_index(counts, tpr)] / n_ood)
    if compat == "oe":
        # Walk up from the highest threshold of full recall, as the reference does: the first nearest recall
        # wins, hence the lowest threshold of a plateau; equally near recalls are left to float64 rounding.
        recall = true_positives[: np.searchsorted(true_positives, n_id) + 1] / n_id
        steps_up = np.argmin(np.abs(recall - float(tpr))[::-1])
        return float(counts.accepted_ood[len(recall) - 1 - steps_up] / n_ood)
    if compat == "dice":
        rank = min(round((1 - _level(tpr)) * n_id), n_id - 1)  # of the threshold among ascending ID scores
        index = np.searchsorted(true_positives, n_id - rank)
        return float((counts.accepted_ood[index] - counts.ood[index]) / n_ood)
    raise InputError(
        f"No FPR rule {compat!r}, expected None (exact) or one of the papers' own; {nearest(str(compat), COMPAT_RULES)}"
    )


def _auroc(counts: _Counts) -> float:
    # Twice the pairs that ID wins, a tie being half a win; 2 n_id n_ood fits int64 up to 2e9 scores each.
    doubled_wins = np.dot(counts.ood, 2 * counts.accepted_id - counts.id)
    return float(doubled_wins / (2 * counts.n_id * counts.n_ood))


def _average_precision(counts: _Counts) -> float:
    precision = counts.accepted_id / (counts.accepted_id + counts.accepted_ood)
    return float(np.dot(counts.id, precision) / counts.n_id)


def _detection_error(counts: _Counts) -> float:
    missed, accepted = 1 - counts.accepted_id / counts.n_id, counts.accepted_ood / counts.n_ood
    return float(min(0.5, ((missed + accepted) / 2).min()))  # 0.5: nothing accepted


def threshold_at_tpr(id_scores: ArrayLike, tpr: float = 0.95) -> float:
    """The largest threshold t that accepts (score >= t) at least the fraction `tpr` of the ID scores.

    t is the ceil(tpr n)-th largest ID score, with tpr read as the decimal number it is written as.

    Parameters
    ----------
    id_scores : [n]
    tpr : in (0, 1]
    """
    scores = np.sort(_checked(id_scores, "ID"))
    return float(scores[len(scores) - ceil(_level(tpr) * len(scores))])


def fpr_at_tpr(
    id_scores: ArrayLike, ood_scores: ArrayLike, tpr: float = 0.95, compat: str | None = None
) -> float:
    """Fraction of OOD samples accepted at the threshold that accepts the fraction `tpr` of ID samples.

    Parameters
    ----------
    id_scores, ood_scores : [n], [m]
    tpr : in (0, 1]
    compat : None = OOD at or above `threshold_at_tpr`;
        "oe" = at or above the score whose recall is nearest to `tpr`, the lowest such score when several have
        that recall (code of MOS, HIMPLoS, DFB, Unleashing Mask, from Outlier Exposure);
        "dice" = strictly above the ID score of ascending rank round((1 - tpr) n), counted from 0 and rounded
        half to even (code of DICE and LINe)
    """
    return _fpr(_group(id_scores, ood_scores), tpr, compat)


def auroc(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Probability that an ID sample scores higher than an OOD sample, ties counting one half."""
    return _auroc(_group(id_scores, ood_scores))


def evaluate(id_scores: ArrayLike, ood_scores: ArrayLike, compat: str | None = None) -> dict[str, float]:
    """All metrics of the results table from one sort, rates in percent.

    Returns
    -------
    fpr95, auroc : see `fpr_at_tpr` and `auroc`; `compat` changes fpr95 only
    aupr_in : average precision, sum_n (R_n - R_(n-1)) P_n over the distinct scores, with ID positive
    aupr_out : the same with OOD positive and negated scores
    detection_error : smallest mean of the two error rates, min_t (1 - TPR + FPR) / 2; in [0, 50]
    fpr95_ood_positive : ID samples rejected at the threshold that rejects at least 95 % of OOD samples, which
        OpenOOD and pytorch-ood print as FPR95; not the quantity of the five papers
    threshold95 : score; the threshold to deploy, `threshold_at_tpr(id_scores)`
    """
    counts = _group(id_scores, ood_scores)
    return {
        "fpr95": 100 * _fpr(counts, 0.95, compat),
        "auroc": 100 * _auroc(counts),
        "aupr_in": 100 * _average_precision(counts),
        "aupr_out": 100 * _average_precision(_swapped(counts)),
        "detection_error": 100 * _detection_error(counts),
        "fpr95_ood_positive": 100 * _fpr(_swapped(counts), 0.95, None),
        "threshold95": float(counts.scores[_threshold_index(counts, 0.95)]),
    }


def resampled(
    id_scores: ArrayLike, ood_scores: ArrayLike, resamples: int = 1000, seed: int = 0, ood_set: int = 0
) -> dict[str, np.ndarray]:
    """fpr95 and auroc of stratified bootstrap resamples: ID and OOD images are drawn apart, with replacement.

    Resample r draws the same images whatever their scores: for two methods that score the same images in the same
    order the values are paired, and a - b is the methods' difference on equal images. The ID draws depend on n,
    `seed` and r only, so several OOD sets share them. More resamples leave the first ones as they are.

    A resample is how often each image was drawn. The scores are ranked once; cumulative sums of the ID draws, from
    the highest score down, then give both metrics exactly, as `evaluate` would on the drawn scores.

    Threads: torch.get_num_threads(), at most 8, from 32,768 scores on; the values do not depend on their number.
    Memory: 32 (n + m) bytes and in each thread 16 (n + m) + 16 max(2^18, n + m), whatever `resamples` is: at most
    0.2 GB for a million scores each and two threads.

    Parameters
    ----------
    id_scores, ood_scores : [n], [m], at most 1e9 each
    resamples : R, at least 1
    seed : at least 0
    ood_set : number of the OOD set, at least 0; sets of different number are drawn independently

    Returns
    -------
    {"fpr95": [R], "auroc": [R]} float64, percent
    """
    if resamples < 1:
        raise InputError(f"{resamples} resamples were asked for, expected at least 1, for example 1000.")
    id_scores, ood_scores = _checked(id_scores, "ID"), _checked(ood_scores, "OOD")
    ranking = _Ranking(id_scores, ood_scores)

    def chunk(number: int) -> np.ndarray:
        id_draws = image_draws(len(id_scores), [0, number, seed])
        return ranking.metrics(id_draws, image_draws(len(ood_scores), [1, number, seed, ood_set]))

    chunks = range(ceil(resamples / CHUNK))
    if len(id_scores) + len(ood_scores) < THREADED_FROM:
        values = [chunk(number) for number in chunks]
    else:
        with ThreadPoolExecutor(min(torch.get_num_threads(), MAX_THREADS)) as threads:
            values = list(threads.map(chunk, chunks))
    fpr95, areas = 100 * np.concatenate(values, axis=1)[:, :resamples]
    return {"fpr95": fpr95, "auroc": areas}


class _Ranking:
    """What the metrics of resamples need of the scores; int64 arrays.

    id_order [n], ood_order [m] : the images from the highest score down
    id_above, id_at_or_above [m] : how many ID images score above (or equal) each OOD image of `ood_order`
    ood_at_or_above [n] : how many OOD images score above or equal each ID image of `id_order`
    """

    def __init__(self, id_scores: np.ndarray, ood_scores: np.ndarray) -> None:
        self.id_order, self.ood_order = np.argsort(-id_scores), np.argsort(-ood_scores)
        id_negated, ood_negated = -id_scores[self.id_order], -ood_scores[self.ood_order]  # ascending
        self.id_above = np.searchsorted(id_negated, ood_negated, side="left")
        self.id_at_or_above = np.searchsorted(id_negated, ood_negated, side="right")
        self.ood_at_or_above = np.searchsorted(ood_negated, id_negated, side="right")

    def metrics(self, id_draws: np.ndarray, ood_draws: np.ndarray) -> np.ndarray:
        """fpr95 and auroc [2, R] as fractions, from how often R resamples drew each image, [R, n] and [R, m]."""
        n_id, n_ood = len(self.id_order), len(self.ood_order)
        accepted = ceil(_level(0.95) * n_id)
        values = np.empty((2, len(id_draws)))
        for rows in _blocks(len(id_draws), n_id + n_ood):
            id_ranked = id_draws[rows].take(self.id_order, axis=1)
            ood_ranked = ood_draws[rows].take(self.ood_order, axis=1)
            # Draws among the first 0, 1, .., n ID images.
            id_drawn = np.zeros((len(id_ranked), n_id + 1), dtype=np.int32)
            np.cumsum(id_ranked, axis=1, out=id_drawn[:, 1:])
            for row, id_row, ood_row in zip(range(rows.start, rows.stop), id_drawn, ood_ranked):
                threshold = np.searchsorted(id_row, accepted) - 1
                values[0, row] = ood_row[: self.ood_at_or_above[threshold]].sum(dtype=np.int64) / n_ood
            doubled_wins = id_drawn.take(self.id_above, axis=1)
            doubled_wins += id_drawn.take(self.id_at_or_above, axis=1)
            doubled_wins = np.einsum("rm,rm->r", ood_ranked, doubled_wins, dtype=np.int64)
            values[1, rows] = doubled_wins / (2 * n_id * n_ood)
        return values


def _blocks(rows: int, row_length: int) -> Iterator[slice]:
    """Slices of as many rows as have BLOCK_ELEMENTS elements, at least one."""
    height = max(1, BLOCK_ELEMENTS // row_length)
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def image_draws(images: int, stream: list[int]) -> np.ndarray:
    """How often each image is drawn in CHUNK resamples of `images` draws, uint8 [CHUNK, images]: exactly multinomial.

    Poisson counts of one rate are multinomial given their sum, and so is their sum with further uniform draws. With
    a rate a little below 1 few draws are missing, about 4 sqrt(images); a resample that has too many by then (3 in
    100,000) is replaced by `images` uniform draws, which are multinomial, too.
    """
    generator = np.random.Generator(np.random.SFC64(stream))
    table, cumulative = poisson_table(max(0.0, 1 - 4 / sqrt(images)))
    draws = np.empty((CHUNK, images), dtype=np.uint8)
    for rows in _blocks(CHUNK, images):
        # Whole words for every resample, so that the draws do not depend on the size of a block.
        words = generator.integers(1 << 64, size=(rows.stop - rows.start, ceil(images / 4)), dtype=np.uint64)
        table.take(words.view(np.uint16)[:, :images], out=draws[rows], mode="clip")
    del words  # what follows has its own peak of memory
    flat = draws.ravel()
    undecided = np.flatnonzero(flat >= UNDECIDED)
    first_bits = np.floor(cumulative[flat[undecided] - UNDECIDED] * 2**16)
    uniform = first_bits / 2**16 + generator.integers(1 << 37, size=len(undecided)) / 2**53
    flat[undecided] = np.searchsorted(cumulative, uniform, side="right")
    missing = images - draws.sum(axis=1, dtype=np.int64)
    draws[missing < 0] = 0
    missing[missing < 0] = images
    starts = np.repeat(images * np.arange(CHUNK), missing)
    np.add.at(flat, starts + generator.integers(images, size=len(starts)), np.uint8(1))
    return draws


@lru_cache(maxsize=16)
def poisson_table(rate: float) -> tuple[np.ndarray, np.ndarray]:
    """The Poisson count that 16 random bits decide, uint8 [65,536], and the cumulative probabilities of the counts.

    The bits are the first of a uniform number in [0, 1), the count how many cumulative probabilities it reaches.
    Where a cumulative probability has the same first bits they leave the count open: the table then has UNDECIDED
    plus the smallest count, and further bits decide.
    """
    cumulative = pdtr(np.arange(32), rate)
    table = np.searchsorted(cumulative, np.arange(2**16) / 2**16, side="right").astype(np.uint8)
    table[np.unique(np.floor(cumulative[cumulative < 1] * 2**16).astype(np.int64))] += UNDECIDED
    return table, cumulative


def interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled values: their quantiles (1 - confidence) / 2 and (1 + confidence) / 2.

    Parameters
    ----------
    values : [R], such as one metric of `resampled` or the difference of two methods'
    confidence : in (0, 1)
    """
    if not 0 < confidence < 1:
        raise InputError(
            f"The confidence is {confidence}, expected a fraction between 0 and 1, for example 0.95."
        )
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
