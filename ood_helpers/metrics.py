"""Metrics of OOD detection: exact FPR at a TPR, AUROC, AUPR, detection error, thresholds, confidence intervals.

A score is higher for more in-distribution (ID) samples; ID is the positive class. Samples of equal score are
counted together, so the order of ties never matters; counts are int64, ratios float64. Scores may be numpy
arrays, tensors or lists. Functions that return one number give fractions in [0, 1]; the two that return a
dict for the results table, `evaluate` and `bootstrap`, give percent.

Every function raises InputError for empty scores and for NaN or infinite ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import ArrayLike

from ood_helpers.errors import InputError, nearest

COMPAT_RULES = ("oe", "dice")
BLOCK_ELEMENTS = 1 << 18  # bootstrap draws (and counts) held at once; larger blocks leave the CPU's cache


@dataclass(frozen=True)
class _Counts:
    """The distinct scores [K] in descending order and how many ID and OOD samples have each (int64 [K])."""

    scores: np.ndarray
    id: np.ndarray
    ood: np.ndarray

    @property
    def n_id(self) -> int:
        return int(self.id.sum())

    @property
    def n_ood(self) -> int:
        return int(self.ood.sum())


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
    return int(np.searchsorted(np.cumsum(counts.id), ceil(_level(tpr) * counts.n_id)))


def _fpr(counts: _Counts, tpr: float, compat: str | None) -> float:
    true_positives, false_positives = np.cumsum(counts.id), np.cumsum(counts.ood)
    n_id, n_ood = counts.n_id, counts.n_ood
    if compat is None:
        return float(false_positives[_threshold_index(counts, tpr)] / n_ood)
    if compat == "oe":
        # Walk up from the highest threshold of full recall, as the reference does: the first nearest recall
        # wins, hence the lowest threshold of a plateau; equally near recalls are left to float64 rounding.
        recall = true_positives[: np.searchsorted(true_positives, n_id) + 1] / n_id
        steps_up = np.argmin(np.abs(recall - float(tpr))[::-1])
        return float(false_positives[len(recall) - 1 - steps_up] / n_ood)
    if compat == "dice":
        rank = min(round((1 - _level(tpr)) * n_id), n_id - 1)  # of the threshold among ascending ID scores
        index = np.searchsorted(true_positives, n_id - rank)
        return float((false_positives[index] - counts.ood[index]) / n_ood)
    raise InputError(
        f"No FPR rule {compat!r}, expected None (exact) or one of the papers' own; {nearest(str(compat), COMPAT_RULES)}"
    )


def _auroc(counts: _Counts) -> float:
    id_at_or_above = np.cumsum(counts.id)
    # Twice the pairs that ID wins, a tie being half a win; 2 n_id n_ood fits int64 up to 2e9 scores each.
    doubled_wins = np.dot(counts.ood, 2 * id_at_or_above - counts.id)
    return float(doubled_wins / (2 * counts.n_id * counts.n_ood))


def _average_precision(counts: _Counts) -> float:
    true_positives, false_positives = np.cumsum(counts.id), np.cumsum(counts.ood)
    precision = true_positives / (true_positives + false_positives)
    return float(np.dot(counts.id, precision) / counts.n_id)


def _detection_error(counts: _Counts) -> float:
    true_positive_rate, false_positive_rate = (
        np.cumsum(counts.id) / counts.n_id,
        np.cumsum(counts.ood) / counts.n_ood,
    )
    return float(
        min(0.5, ((1 - true_positive_rate + false_positive_rate) / 2).min())
    )  # 0.5: nothing accepted


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


def fpr95_ood_positive(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Fraction of ID samples rejected at the threshold that rejects at least 95 % of OOD samples.

    This is what OpenOOD and pytorch-ood print as FPR95, with OOD as the positive class; it is not the
    quantity of the five papers, `fpr_at_tpr`.
    """
    return _fpr(_swapped(_group(id_scores, ood_scores)), 0.95, None)


def auroc(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Probability that an ID sample scores higher than an OOD sample, ties counting one half."""
    return _auroc(_group(id_scores, ood_scores))


def aupr_in(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Average precision, sum_n (R_n - R_(n-1)) P_n over the distinct scores, with ID positive."""
    return _average_precision(_group(id_scores, ood_scores))


def aupr_out(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Average precision with OOD positive and negated scores."""
    return _average_precision(_swapped(_group(id_scores, ood_scores)))


def detection_error(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Smallest mean of the two error rates over all thresholds, min_t (1 - TPR + FPR) / 2; in [0, 0.5]."""
    return _detection_error(_group(id_scores, ood_scores))


def evaluate(id_scores: ArrayLike, ood_scores: ArrayLike, compat: str | None = None) -> dict[str, float]:
    """All metrics of the results table from one sort, rates in percent.

    Returns
    -------
    fpr95, auroc, aupr_in, aupr_out, detection_error : percent
    threshold95 : score; the threshold to deploy, `threshold_at_tpr(id_scores)`, whatever `compat` is

    `compat` changes fpr95 only, see `fpr_at_tpr`.
    """
    counts = _group(id_scores, ood_scores)
    return {
        "fpr95": 100 * _fpr(counts, 0.95, compat),
        "auroc": 100 * _auroc(counts),
        "aupr_in": 100 * _average_precision(counts),
        "aupr_out": 100 * _average_precision(_swapped(counts)),
        "detection_error": 100 * _detection_error(counts),
        "threshold95": float(counts.scores[_threshold_index(counts, 0.95)]),
    }


def bootstrap(
    id_scores: ArrayLike,
    ood_scores: ArrayLike,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Stratified bootstrap percentile intervals of fpr95 and auroc, in percent.

    ID and OOD samples are drawn with replacement separately. The pooled scores are sorted once; a resample is
    the number of times each distinct score was drawn, from which cumulative sums give both metrics exactly.
    The intervals depend on the scores and the seed, not on the order of the scores.

    Memory: some 8 arrays of max(2^18, n_id + n_ood) int64 elements, whatever `resamples` is; 16 MB up to
    262,144 scores.

    Parameters
    ----------
    id_scores, ood_scores : [n], [m]
    resamples : at least 1
    confidence : in (0, 1)
    seed : at least 0

    Returns
    -------
    {"fpr95": (low, high), "auroc": (low, high)}
    """
    if resamples < 1:
        raise InputError(
            f"bootstrap was asked for {resamples} resamples, expected at least 1, for example 1000."
        )
    _check_confidence(confidence)
    counts = _group(id_scores, ood_scores)
    n_id, n_ood = counts.n_id, counts.n_ood
    accepted = ceil(_level(0.95) * n_id)
    false_positive_rates, aurocs = [], []
    for id_counts, ood_counts in _resampled_counts(counts, resamples, seed):
        id_above = np.cumsum(id_counts, axis=1)
        id_above -= id_counts
        # A score is at or above the threshold as long as fewer than `accepted` ID samples lie above it.
        false_positive_rates.append(np.einsum("rk,rk->r", ood_counts, id_above < accepted) / n_ood)
        id_above *= 2
        id_above += id_counts
        aurocs.append(np.einsum("rk,rk->r", ood_counts, id_above) / (2 * n_id * n_ood))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    return {
        name: tuple(map(float, 100 * np.quantile(np.concatenate(values), tails)))
        for name, values in {"fpr95": false_positive_rates, "auroc": aurocs}.items()
    }


def _resampled_counts(counts: _Counts, resamples: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of resamples: how often ID and OOD samples of each distinct score were drawn, two int64 [R, K]."""
    distinct = len(counts.scores)
    block = max(1, BLOCK_ELEMENTS // (counts.n_id + counts.n_ood))
    # One stream each, so that the draws do not depend on the size of a block.
    streams = [
        (np.repeat(np.arange(distinct), number), np.random.default_rng([seed, stream]))
        for stream, number in enumerate((counts.id, counts.ood))
    ]
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        offsets = distinct * np.arange(rows)[:, None]
        drawn = []
        for ranks, generator in streams:
            cells = ranks[generator.integers(len(ranks), size=(rows, len(ranks)), dtype=np.uint32)]
            cells += offsets
            drawn.append(np.bincount(cells.ravel(), minlength=rows * distinct).reshape(rows, distinct))
        yield drawn[0], drawn[1]


def delong_interval(
    id_scores: ArrayLike, ood_scores: ArrayLike, confidence: float = 0.95
) -> tuple[float, float]:
    """Normal interval of the AUROC with DeLong's variance, as fractions clipped to [0, 1].

    var = var(v) / n + var(w) / m, where v_i is the fraction of OOD samples that ID sample i beats, w_j the
    fraction of ID samples that beat OOD sample j (ties one half), and var has n - 1 in the denominator.

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988).

    Raises
    ------
    InputError : fewer than two ID or two OOD scores
    """
    _check_confidence(confidence)
    counts = _group(id_scores, ood_scores)
    if min(counts.n_id, counts.n_ood) < 2:
        raise InputError(
            f"There are {counts.n_id} ID and {counts.n_ood} OOD scores, expected at least 2 of each for a variance; "
            "take more images."
        )
    area = _auroc(counts)
    id_wins = (counts.n_ood - np.cumsum(counts.ood) + counts.ood / 2) / counts.n_ood
    ood_losses = (np.cumsum(counts.id) - counts.id / 2) / counts.n_id
    variance = sum(
        np.dot(number, (placement - area) ** 2) / (number.sum() - 1) / number.sum()
        for number, placement in ((counts.id, id_wins), (counts.ood, ood_losses))
    )
    half_width = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.sqrt(variance))
    return max(0.0, area - half_width), min(1.0, area + half_width)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(
            f"The confidence is {confidence}, expected a fraction between 0 and 1, for example 0.95."
        )
