"""Metrics against the hand-made vectors, scikit-learn and plain loops."""

import math
import tracemalloc

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from ood_helpers import metrics
from ood_helpers.errors import InputError

HUNDRED = range(1, 101)
THIRTY = range(1, 31)
TWENTY = range(1, 21)

# id scores, ood scores, auroc, aupr_in, aupr_out, fpr95 by the "oe" rule, exact fpr95
VECTORS = {
    "M1": ([0.9, 0.8, 0.7, 0.6], [0.65, 0.5, 0.4], 0.916667, 0.95, 0.916667, 0.333333, 0.333333),
    "M2": (np.arange(20, 0, -1) / 20, [0.99, 0.12, 0.08, 0.07, 0.03], 0.77, 0.884518, 0.658333, 0.8, 0.4),
    "M3": (np.arange(10, 0, -1) / 10, [0.95, 0.25, 0.15, 0.05], 0.7, 0.825844, 0.643590, 0.75, 0.75),
    "M4": ([0.9, 0.9, 0.5, 0.5, 0.3], [0.9, 0.5, 0.2, 0.2], 0.7, 0.676190, 0.736111, 0.5, 0.5),
    "M5": ([0.5] * 4, [0.5] * 2, 0.5, 0.666667, 0.333333, 1, 1),
    "M6": ([3, 4, 5], [0, 1], 1, 1, 1, 0, 0),
    "M7": ([0, 1], [3, 4, 5], 0, 0.325, 0.477778, 1, 1),
    "M8": (THIRTY, [1.5, 2.5, 3.5, 40], 0.7, 0.893159, 0.404412, 0.75, 0.75),
    "M9": (HUNDRED, [5.5, 6.5, 4.5, 99.5, -1], 0.772, 0.961566, 0.431282, 0.6, 0.4),
    "V6 A": (range(20, 0, -1), [15.5, 10.5, 2.5, 1.5, 0.5], 0.72, 0.906902, 0.560476, 0.8, 0.6),
    "V6 B": (range(15, 0, -1), [12.5, 3.5, 1, 0.5], 0.741667, 0.898547, 0.604167, 0.5, 0.75),
    "V6 C": ([0.9, 0.8, 0.8, 0.7], [0.8, 0.6, 0.6], 0.833333, 0.825, 0.833333, 0.333333, 0.333333),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name):
    id_scores, ood_scores, auroc, aupr_in, aupr_out, oe, exact = VECTORS[name]
    id_scores, ood_scores = list(id_scores), list(ood_scores)
    assert metrics.auroc(id_scores, ood_scores) == pytest.approx(auroc, abs=1e-6)
    assert metrics.fpr_at_tpr(id_scores, ood_scores, compat="oe") == pytest.approx(oe, abs=1e-6)
    assert metrics.fpr_at_tpr(id_scores, ood_scores) == pytest.approx(exact, abs=1e-6)
    found = metrics.evaluate(id_scores, ood_scores)
    assert found["aupr_in"] == pytest.approx(100 * aupr_in, abs=1e-4)
    assert found["aupr_out"] == pytest.approx(100 * aupr_out, abs=1e-4)


RULES = {
    "A": (TWENTY, np.arange(10) + 0.5, {"dice": 0.8, "oe": 0.9}),
    "Q": (range(1, 12), [0.5, 1.0], {None: 0.5, "oe": 0, "dice": 0}),
    "R": (THIRTY, [0.5, 1, 1.5, 2, 2.5], {None: 0.4, "oe": 0.2, "dice": 0}),
    "S": (TWENTY, [2.0] * 20, {None: 1, "oe": 1, "dice": 0}),
    "constant": ([7.0] * 13, [7.0] * 5, {None: 1, "dice": 0}),
    "constant, one each": ([-3.0], [-3.0], {None: 1, "dice": 0}),
}


@pytest.mark.parametrize("name", RULES)
def test_the_three_fpr_rules(name):
    id_scores, ood_scores, expected = RULES[name]
    for compat, value in expected.items():
        assert metrics.fpr_at_tpr(list(id_scores), list(ood_scores), compat=compat) == pytest.approx(
            value, abs=1e-12
        ), compat


def test_ood_positive_fpr_is_another_quantity():
    found = metrics.evaluate(list(TWENTY), np.arange(10) + 0.5)
    assert (found["fpr95_ood_positive"], found["auroc"]) == (pytest.approx(45), pytest.approx(77.5))
    assert metrics.evaluate(list(HUNDRED), list(HUNDRED))["fpr95_ood_positive"] == pytest.approx(95)


def test_constant_scores_have_auroc_one_half():
    found = metrics.evaluate([2.0] * 9, [2.0] * 4)
    assert (found["auroc"], found["detection_error"]) == (50, 50)


def tied_scores(seed):
    """Scores on a coarse grid, so that most are tied within and across the two sets."""
    random = np.random.default_rng(seed)
    n_id, n_ood = random.integers(1, 400, size=2)
    return np.round(random.normal(0.7, 1, n_id), 1), np.round(random.normal(0, 1.2, n_ood), 1)


@pytest.mark.parametrize("seed", range(12))
def test_against_scikit_learn_on_tied_scores(seed):
    id_scores, ood_scores = tied_scores(seed)
    truth = np.r_[np.ones(len(id_scores)), np.zeros(len(ood_scores))]
    scores = np.r_[id_scores, ood_scores]
    false_positive, true_positive, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    result = metrics.evaluate(id_scores, ood_scores)
    assert result["auroc"] == pytest.approx(100 * roc_auc_score(truth, scores), abs=1e-10)
    assert result["aupr_in"] == pytest.approx(100 * average_precision_score(truth, scores), abs=1e-10)
    assert result["aupr_out"] == pytest.approx(100 * average_precision_score(1 - truth, -scores), abs=1e-10)
    first = np.flatnonzero(true_positive >= 0.95 - 1e-12)[0]
    assert result["fpr95"] == pytest.approx(100 * false_positive[first], abs=1e-10)
    assert result["threshold95"] == thresholds[first]
    assert result["detection_error"] == pytest.approx(
        100 * ((1 - true_positive + false_positive) / 2).min(), abs=1e-10
    )
    id_rejected, ood_rejected, _ = roc_curve(1 - truth, -scores, drop_intermediate=False)
    expected = id_rejected[ood_rejected >= 0.95 - 1e-12][0]
    assert result["fpr95_ood_positive"] == pytest.approx(100 * expected, abs=1e-10)


@pytest.mark.parametrize("seed", range(12))
def test_oe_rule_against_its_loop(seed):
    """Thresholds from the highest of full recall upwards; the first nearest recall wins."""
    id_scores, ood_scores = tied_scores(seed)
    full = id_scores.min()
    candidates = sorted({t for t in np.r_[id_scores, ood_scores] if t >= full})
    distances = [abs((id_scores >= t).sum() / len(id_scores) - 0.95) for t in candidates]
    chosen = candidates[distances.index(min(distances))]
    assert metrics.fpr_at_tpr(id_scores, ood_scores, compat="oe") == (ood_scores >= chosen).mean()


@pytest.mark.parametrize("seed", range(12))
def test_dice_rule_against_its_definition(seed):
    id_scores, ood_scores = tied_scores(seed)
    threshold = np.sort(id_scores)[round(0.05 * len(id_scores))]
    assert metrics.fpr_at_tpr(id_scores, ood_scores, compat="dice") == (ood_scores > threshold).mean()


def test_evaluate_gives_percent_of_the_single_functions():
    id_scores, ood_scores = tied_scores(3)
    exact = metrics.evaluate(id_scores, ood_scores)
    others = ["auroc", "aupr_in", "aupr_out", "detection_error", "fpr95_ood_positive", "threshold95"]
    assert list(exact) == ["fpr95", *others]
    assert exact["auroc"] == 100 * metrics.auroc(id_scores, ood_scores)
    assert exact["threshold95"] == metrics.threshold_at_tpr(id_scores)
    for compat in (None, "oe", "dice"):
        found = metrics.evaluate(id_scores, ood_scores, compat=compat)
        assert found["fpr95"] == 100 * metrics.fpr_at_tpr(id_scores, ood_scores, compat=compat)
        assert {name: found[name] for name in others} == {name: exact[name] for name in others}


@pytest.mark.parametrize("count", [1, 7, 19, 20, 21, 100, 1017])
@pytest.mark.parametrize("percent", [1, 5, 7, 29, 57, 80, 95, 99, 100])
def test_threshold_counts_exactly_at_every_level(count, percent):
    """Integers decide, not the rounding of tpr * n: 0.07 * 100 > 7 and 0.57 * 100 < 57 in float64."""
    scores = np.random.default_rng(count).permutation(count)
    accepted = (scores >= metrics.threshold_at_tpr(scores, percent / 100)).sum()
    assert 100 * accepted >= percent * count
    assert 100 * (accepted - 1) < percent * count


def test_fpr_agrees_with_the_threshold_at_other_levels():
    id_scores, ood_scores = tied_scores(5)
    for tpr in (0.5, 0.8, 0.99, 1.0):
        threshold = metrics.threshold_at_tpr(id_scores, tpr)
        assert metrics.fpr_at_tpr(id_scores, ood_scores, tpr) == (ood_scores >= threshold).mean()


def test_order_and_container_of_the_scores_do_not_matter():
    id_scores, ood_scores = tied_scores(8)
    expected = metrics.evaluate(id_scores, ood_scores)
    assert metrics.evaluate(id_scores[::-1], list(np.sort(ood_scores))) == expected
    assert (
        metrics.evaluate(torch.from_numpy(id_scores), torch.from_numpy(ood_scores).requires_grad_())
        == expected
    )


@pytest.mark.parametrize("name", ["fpr_at_tpr", "auroc", "evaluate", "resampled"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_an_error(name, bad):
    function = getattr(metrics, name)
    with pytest.raises(InputError, match=r"1 of 3 OOD scores are NaN or infinite \(first: number 2\)"):
        function([1.0, 2.0], [0.0, 1.0, bad])
    with pytest.raises(InputError, match="2 of 2 ID scores"):
        function([bad, bad], [0.0])


def test_empty_scores_and_wrong_settings_are_errors():
    with pytest.raises(InputError, match="no ID scores"):
        metrics.threshold_at_tpr([])
    with pytest.raises(InputError, match="no OOD scores"):
        metrics.resampled([1.0], [])
    for tpr in (0, 1.5, math.nan):
        with pytest.raises(InputError, match="TPR level"):
            metrics.threshold_at_tpr([1.0], tpr)
    with pytest.raises(InputError, match="did you mean 'dice'"):
        metrics.evaluate([1.0], [0.0], compat="dise")
    with pytest.raises(InputError, match="0 resamples"):
        metrics.resampled([1.0], [0.0], resamples=0)
    for confidence in (0, 1, 95):
        with pytest.raises(InputError, match=f"confidence is {confidence}"):
            metrics.interval([1.0], confidence)


def bootstrap(id_scores, ood_scores, resamples=1000, confidence=0.95, seed=0):
    """The percentile intervals of the results table, metric -> (low, high)."""
    drawn = metrics.resampled(id_scores, ood_scores, resamples, seed)
    return {name: metrics.interval(values, confidence) for name, values in drawn.items()}


def delong_interval(id_scores, ood_scores):
    """95 % interval of the AUROC in percent by DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988)."""
    wins = 100 * ((id_scores[:, None] > ood_scores) + 0.5 * (id_scores[:, None] == ood_scores))
    variance = wins.mean(1).var(ddof=1) / len(id_scores) + wins.mean(0).var(ddof=1) / len(ood_scores)
    return scipy.stats.norm.interval(0.95, wins.mean(), np.sqrt(variance))


def all_draws(images, resamples, stream=0, seed=0):
    """How often each image is drawn, [resamples, images], in the order of `resampled`."""
    chunks = range(math.ceil(resamples / metrics.CHUNK))
    suffix = [seed] if stream == 0 else [seed, stream - 1]
    draws = [metrics.image_draws(images, [min(stream, 1), chunk, *suffix]) for chunk in chunks]
    return np.concatenate(draws)[:resamples]


@pytest.mark.parametrize("sizes", [None, (1, 1), (1, 30), (17, 1), (64, 64), (1017, 333)])
@pytest.mark.parametrize("seed", [0, 1])
def test_resamples_equal_a_plain_loop_over_the_same_draws(sizes, seed):
    id_scores, ood_scores = tied_scores(seed + 20)
    if sizes is not None:
        id_scores, ood_scores = np.resize(id_scores, sizes[0]), np.resize(ood_scores, sizes[1])
    id_draws = all_draws(len(id_scores), 50, seed=seed)
    ood_draws = all_draws(len(ood_scores), 50, stream=1, seed=seed)
    rates, areas = [], []
    for id_row, ood_row in zip(id_draws, ood_draws, strict=True):
        drawn_id, drawn_ood = np.repeat(id_scores, id_row), np.repeat(ood_scores, ood_row)
        rates.append(100 * metrics.fpr_at_tpr(drawn_id, drawn_ood))
        areas.append(100 * metrics.auroc(drawn_id, drawn_ood))
    drawn = metrics.resampled(id_scores, ood_scores, resamples=50, seed=seed)
    assert list(drawn) == ["fpr95", "auroc"]
    np.testing.assert_allclose(drawn["fpr95"], rates, rtol=1e-14)
    np.testing.assert_allclose(drawn["auroc"], areas, rtol=1e-14)
    interval = bootstrap(id_scores, ood_scores, resamples=50, confidence=0.9, seed=seed)
    assert interval["fpr95"] == pytest.approx(tuple(np.quantile(rates, [0.05, 0.95])), abs=1e-9)
    assert interval["auroc"] == pytest.approx(tuple(np.quantile(areas, [0.05, 0.95])), abs=1e-9)


RATES = {"usual rate": None, "so high a rate that half of the resamples are replaced": 1.0}


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@pytest.mark.parametrize("images", [5, 40, 700])
def test_draws_are_multinomial(images, rate, monkeypatch):
    """Of n draws a set of images with the share p gets Binomial(n, p), whichever images they are."""
    if rate is not None:
        table = metrics.poisson_table
        monkeypatch.setattr(metrics, "poisson_table", lambda _: table(rate))
    draws = all_draws(images, 8000)
    assert draws.shape == (8000, images)
    np.testing.assert_array_equal(draws.sum(axis=1), images)
    for members in (slice(1), slice(images - 1, images), slice(0, images // 2), slice(0, images, 2)):
        of_set = draws[:, members]
        expected = scipy.stats.binom(images, of_set.shape[1] / images)
        # Cut where fewer than ten resamples are expected, as a chi-square test wants.
        low, high = int(expected.ppf(10 / 8000)), int(expected.isf(10 / 8000))
        found = np.bincount(of_set.sum(axis=1).clip(low, high) - low, minlength=high - low + 1)
        probabilities = np.diff(expected.cdf(np.arange(low, high)), prepend=0, append=1)
        assert scipy.stats.chisquare(found, 8000 * probabilities).pvalue > 1e-3, members
    # Two images of one resample: negatively related, 4 sigma.
    assert np.cov(draws[:, 0], draws[:, -1])[0, 1] == pytest.approx(-1 / images, abs=4 / math.sqrt(8000))


@pytest.mark.parametrize("rate", [0.0, 0.03, 0.6, 0.996, 1.0])
def test_sixteen_bits_decide_a_poisson_count_only_where_all_further_bits_agree(rate):
    table, cumulative = metrics.poisson_table(rate)
    np.testing.assert_allclose(
        np.diff(cumulative, prepend=0), scipy.stats.poisson(rate).pmf(range(32)), atol=1e-15
    )
    low, high = np.arange(2**16) / 2**16, np.arange(1, 2**16 + 1) / 2**16
    undecided = table >= metrics.UNDECIDED
    count = table.astype(int) - metrics.UNDECIDED * undecided
    below = np.concatenate([[0], cumulative])
    assert (below[count] <= low).all()
    assert (high[~undecided] <= cumulative[count[~undecided]]).all()
    assert (high[undecided] > cumulative[count[undecided]]).all()
    assert undecided.sum() <= 9


def test_large_counts_are_as_frequent_as_they_should_be():
    """8 and more draws of an image, 1 in 100,000, all lie in one cell of the table, which leaves them open."""
    images = 100_000
    frequencies = np.bincount(all_draws(images, 8 * metrics.CHUNK).ravel())
    assert frequencies[9] > 0
    expected = scipy.stats.binom(images, 1 / images).pmf(range(8)) * frequencies.sum()
    found = [*frequencies[:8], frequencies[8:].sum()]
    assert scipy.stats.chisquare(found, [*expected, frequencies.sum() - expected.sum()]).pvalue > 1e-3


def test_resamples_of_two_methods_are_paired():
    random = np.random.default_rng(0)
    id_scores, ood_scores = random.normal(1, 1, 600), random.normal(0, 1, 500)
    first = metrics.resampled(id_scores, ood_scores)
    same = metrics.resampled(
        np.exp(id_scores).astype(np.float32), torch.from_numpy(np.exp(ood_scores)).float()
    )
    similar = metrics.resampled(id_scores + random.normal(0, 0.05, 600), ood_scores)
    for metric in ("fpr95", "auroc"):
        np.testing.assert_array_equal(same[metric], first[metric])
        low, high = metrics.interval(first[metric] - similar[metric])
        unpaired = metrics.interval(first[metric] - similar[metric][::-1])
        assert high - low < 0.5 * (unpaired[1] - unpaired[0])


def test_id_draws_do_not_depend_on_the_ood_set_nor_ood_draws_on_the_id_set():
    """Against a constant the AUROC tells only how the other set was drawn."""
    scores = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=300)

    def of_id(n_ood, **options):
        return metrics.resampled(scores, np.zeros(n_ood), resamples=100, **options)["auroc"]

    def of_ood(n_id, **options):
        return metrics.resampled(np.zeros(n_id), scores, resamples=100, **options)["auroc"]

    np.testing.assert_array_equal(of_id(20), of_id(300))
    np.testing.assert_array_equal(of_id(20), of_id(50, ood_set=7))
    np.testing.assert_array_equal(of_ood(20, ood_set=2), of_ood(300, ood_set=2))
    independent = [100 - of_id(300), of_ood(300), of_ood(300, ood_set=1), of_ood(300, ood_set=2)]
    independent += [of_ood(300, seed=1), of_ood(300, seed=1, ood_set=1)]
    correlation = np.corrcoef(independent) - np.eye(len(independent))
    assert np.abs(correlation).max() < 0.4  # four standard deviations of 100 independent pairs


def test_resamples_depend_on_the_seed_but_not_on_threads_block_size_or_their_number(monkeypatch):
    id_scores, ood_scores = tied_scores(31)
    expected = metrics.resampled(id_scores, ood_scores, resamples=200, seed=4)["auroc"]
    assert len(expected) == 200 and expected.dtype == np.float64

    def auroc(resamples=200, seed=4):
        return metrics.resampled(id_scores, ood_scores, resamples, seed)["auroc"]

    assert (auroc(seed=5) != expected).mean() > 0.9
    np.testing.assert_array_equal(auroc(resamples=37), expected[:37])
    np.testing.assert_array_equal(auroc(resamples=1), expected[:1])
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 1000)
    np.testing.assert_array_equal(auroc(), expected)
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(metrics, "THREADED_FROM", 0)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        np.testing.assert_array_equal(auroc(), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("n_id", "n_ood", "threads"), [(100_000, 100_000, 2), (200_000, 2000, 1), (30_000, 300_000, 3)]
)
def test_memory_of_resamples_is_as_documented(n_id, n_ood, threads, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    random = np.random.default_rng(0)
    id_scores, ood_scores = random.normal(1, 1, n_id).astype(dtype), random.normal(0, 1, n_ood).astype(dtype)
    tracemalloc.start()
    metrics.resampled(id_scores, ood_scores, resamples=4 * threads * metrics.CHUNK)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total = n_id + n_ood
    assert peak < 32 * total + threads * (16 * total + 16 * max(2**18, total))


def test_interval_is_that_of_percentiles():
    assert metrics.interval(range(101)) == pytest.approx((2.5, 97.5))
    assert metrics.interval(np.arange(100, -1, -1), confidence=0.8) == pytest.approx((10, 90))


def test_bootstrap_agrees_with_delong():
    random = np.random.default_rng(0)
    id_scores, ood_scores = random.normal(1, 1, 1500), random.normal(0, 1, 2000)
    low, high = bootstrap(id_scores, ood_scores, resamples=2000)["auroc"]
    delong_low, delong_high = delong_interval(id_scores, ood_scores)
    width = delong_high - delong_low
    assert high - low == pytest.approx(width, rel=0.1)
    assert (low + high) / 2 == pytest.approx((delong_low + delong_high) / 2, abs=0.1 * width)
    assert low < 100 * metrics.auroc(id_scores, ood_scores) < high


def test_intervals_cover_the_true_auroc():
    """Normal scores one standard deviation apart: AUROC = Phi(1 / sqrt 2); 95 % of 200 studies, give or take 4 sigma."""
    truth = 0.5 * (1 + math.erf(0.5))
    random = np.random.default_rng(1)
    covered = 0
    for study in range(200):
        id_scores, ood_scores = random.normal(1, 1, 100), random.normal(0, 1, 120)
        low, high = bootstrap(id_scores, ood_scores, resamples=300, seed=study)["auroc"]
        covered += low <= 100 * truth <= high
    assert 178 <= covered <= 200
