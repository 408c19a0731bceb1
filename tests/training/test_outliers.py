"""The choice of outliers: the sheet's vector of POEM, running selection, the regression's sums, and the buffer."""

import numpy as np
import pytest
import torch
from pictures import TRANSFORM, Pictures
from torch import nn

from ood_helpers.backbones import Classifier
from ood_helpers.config import OutlierExposureConfig, PosteriorConfig
from ood_helpers.training import outliers as module
from ood_helpers.training.outliers import (
    OutlierSampler,
    SmallestScores,
    boundary_distance,
    draw,
    feature_sums,
    load_inputs,
    outlier_probability,
    pool_rows,
    posterior,
    repeated,
    select,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Channels(Classifier):
    """Its features are the mean of each channel; dropout tells whether it is in eval mode."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(3, outputs)

    def feature_map(self, images):
        return self.dropout(images)


class Recorder:
    """An array of images that notes how many are taken at a time."""

    def __init__(self, pixels):
        self.pixels, self.shape, self.taken = pixels, pixels.shape, []

    def __getitem__(self, rows):
        self.taken.append(rows)
        return self.pixels[rows]


def features_of(pictures: Pictures, rows=None) -> torch.Tensor:
    rows = torch.arange(len(pictures)) if rows is None else rows
    with torch.no_grad():
        return Channels().eval().features(load_inputs(pictures, TRANSFORM, rows, "cpu")).double()


# ---- rows --------------------------------------------------------------------------------------------------


def test_pool_is_distinct_seeded_and_at_most_all():
    pool = pool_rows(1000, 100, seeded())
    assert len(pool.unique()) == 100
    assert pool.max() > 500
    assert torch.equal(pool, pool_rows(1000, 100, seeded()))
    assert not torch.equal(pool, pool_rows(1000, 100, seeded(1)))
    assert pool_rows(7, 100, seeded()).sort().values.tolist() == list(range(7))


def test_few_rows_are_repeated_in_new_orders():
    rows = torch.tensor([3, 8, 5, 11, 2, 6])
    found = repeated(rows, 15, seeded())
    assert len(found) == 15
    rounds = found[:6], found[6:12], found[12:]
    assert all(sorted(part.tolist()) == [2, 3, 5, 6, 8, 11] for part in rounds[:2])
    assert rounds[0].tolist() != rounds[1].tolist()
    assert len(rounds[2].unique()) == 3
    assert len(repeated(rows, 4, seeded()).unique()) == 4


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
def test_running_selection_is_that_of_a_full_sort(chunk):
    rng = np.random.default_rng(0)
    rows, scores = rng.permutation(300), rng.integers(0, 40, 300) / 8
    smallest = SmallestScores(50)
    for start in range(0, 300, chunk):
        smallest.add(
            torch.from_numpy(rows[start : start + chunk]), torch.from_numpy(scores[start : start + chunk])
        )
    assert smallest.rows.tolist() == rows[np.lexsort((rows, scores))][:50].tolist()


def test_selection_of_fewer_than_wanted():
    smallest = SmallestScores(5)
    smallest.add(torch.tensor([4, 1]), torch.tensor([0.5, -1.0]))
    assert smallest.rows.tolist() == [1, 4]


# ---- scores and streaming ----------------------------------------------------------------------------------


def test_scores():
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 1.2, 0.3]])
    assert outlier_probability(logits, False).tolist() == pytest.approx(
        [1 - 0.785597, 1 - 0.574897], abs=1e-6
    )
    last = np.exp([-1.0, 0.3]) / np.exp(logits.numpy()).sum(axis=1)
    assert outlier_probability(logits, True).tolist() == pytest.approx(last, abs=1e-6)


def test_selection_near_a_boundary():  # V9
    pool = torch.tensor([[1, 1], [0.5, 0.7], [2, 0], [0.1, 0.1], [0, 1]], dtype=torch.float64)
    distances = boundary_distance(pool, torch.tensor([-2.0, 1.5], dtype=torch.float64))
    assert distances.tolist() == pytest.approx([0.5, 0.05, 4, 0.05, 1.5])
    smallest = SmallestScores(3)
    smallest.add(torch.arange(5), distances)
    assert sorted(smallest.rows.tolist()) == [0, 1, 3]


def brightness(network, inputs):
    assert not network.training
    assert not torch.is_grad_enabled()
    return network.features(inputs).sum(dim=1)


def test_select_takes_ranks_of_the_pool_and_no_image_outside_it():
    pictures = Pictures(60, 3)
    expected = features_of(pictures).sum(dim=1)
    pictures.array = Recorder(pictures.pixels)
    pool, network = pool_rows(60, 40, seeded()), Channels().train()
    ordered = pool[expected[pool].argsort()].tolist()
    options = {"batch_size": 16, "device": "cpu"}

    def chosen(count, quantile):
        return select(
            network, pictures, TRANSFORM, pool, brightness, count, quantile=quantile, **options
        ).tolist()

    assert chosen(10, 0.0) == ordered[:10]
    assert chosen(10, 0.13) == ordered[5:15]
    assert chosen(38, 0.5) == ordered[2:]  # a skip that leaves enough
    assert chosen(50, 0.5) == ordered
    assert network.training
    assert max(len(rows) for rows in pictures.array.taken) == 16
    assert set(np.concatenate(pictures.array.taken).tolist()) == set(pool.tolist())


def test_select_holds_one_batch_of_decoded_images():
    pictures, loaded, seen = Pictures(30, 3, decoded=True), [], []
    open_image = pictures.image
    pictures.image = lambda i: loaded.append(i) or open_image(i)

    def score(_network, inputs):
        seen.append(len(inputs))
        assert len(loaded) == sum(seen)  # none has been loaded ahead
        return inputs.sum(dim=(1, 2, 3))

    select(Channels(), pictures, TRANSFORM, torch.arange(30), score, 4, batch_size=8, device="cpu")
    assert seen == [8, 8, 8, 6]


# ---- the regression of POEM --------------------------------------------------------------------------------


def test_posterior_of_the_sheet():  # V9
    z = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    y = torch.tensor([-3.9, 3.9, 0.5], dtype=torch.float64)
    mean, precision = posterior(z.T @ z, z.T @ y, PosteriorConfig())
    assert precision.tolist() == [pytest.approx([4.05, 2]), pytest.approx([2, 4.05])]
    assert mean.tolist() == pytest.approx([-3.639589, 3.970167], abs=1e-6)
    covariance = precision.inverse()
    assert covariance[0].tolist() == pytest.approx([0.326547, -0.161258], abs=1e-6)
    assert (20 * covariance)[0].tolist() == pytest.approx([6.530941, -3.225156], abs=1e-5)  # the public code


def test_draws_have_the_mean_and_the_covariance():
    precision = torch.tensor([[4.05, 2], [2, 4.05]], dtype=torch.float64)
    mean, generator = torch.tensor([-3.0, 5.0], dtype=torch.float64), seeded()
    draws = torch.stack([draw(mean, precision, generator) for _ in range(4000)])
    assert draws.mean(dim=0).tolist() == pytest.approx(mean.tolist(), abs=0.05)
    torch.testing.assert_close(draws.T.cov(), precision.inverse(), rtol=0, atol=0.03)


def test_sums_are_those_of_repeated_rows():
    pictures, network = Pictures(20, 3), Channels()
    rows, weights = torch.tensor([2, 5, 11, 19, 7]), torch.tensor([1, 3, 2, 1, 4])
    gram, total = feature_sums(network, pictures, TRANSFORM, rows, weights, batch_size=2, device="cpu")
    z = features_of(pictures, rows.repeat_interleave(weights))
    assert gram.dtype == total.dtype == torch.float64
    torch.testing.assert_close(gram, z.T @ z)
    torch.testing.assert_close(total, z.sum(dim=0))


def sampler(count: int = 12, available: int = 40, outputs: int = 3, train: int = 18, **config):
    posterior = config.pop("posterior", None)
    config = {"batch_size": 8, **config}
    if config.get("sample", "random") != "random":
        config["pool_size"] = 30
    if posterior is not None:
        config["posterior"] = posterior
    return OutlierSampler(
        Pictures(train, 0), Pictures(available, 1), TRANSFORM, OutlierExposureConfig(**config), count, "cpu"
    )


def noises_of_the_targets(variance: float, monkeypatch) -> list[float]:
    """nu of two epochs, got back from the posteriors. These are held against explicit rows: the buffer as it is, and ID
    images tiled to the same number."""
    drawn = []
    monkeypatch.setattr(module, "draw", lambda mean, precision, _: drawn.append((mean, precision)) or mean)
    # Of a pool of 30 images some are taken twice.
    chooser = sampler(
        sample="poem", objective="energy", count=36, posterior={"noise_variance": variance, "confidence": 3.0}
    )
    generator, network = seeded(), Channels()
    chosen = [chooser.rows(epoch, network, generator) for epoch in (1, 2, 3)]
    mean, precision = drawn[0]
    torch.testing.assert_close(precision, torch.eye(3, dtype=torch.float64) / 20)
    assert 0 < mean.abs().max() < 0.05
    noises = []
    for epoch, (mean, precision) in enumerate(drawn[1:], start=1):
        id_rows = torch.arange(18).repeat(2 * epoch)
        of_outliers = features_of(chooser.outliers, torch.cat(chosen[:epoch]))
        z = torch.cat([of_outliers, features_of(chooser.train, id_rows)])
        torch.testing.assert_close(precision, z.T @ z / variance + torch.eye(3) / 20)
        signs = torch.where(torch.arange(len(z)) < len(z) // 2, 1.0, -1.0).double()
        rest = variance * precision @ mean - 3.0 * z.T @ signs  # Z' nu
        noise = rest / z.sum(dim=0)
        torch.testing.assert_close(noise, noise[:1].expand(3))
        noises.append(float(noise[0]))
    return noises


def test_boundary_is_drawn_from_the_regression_on_the_buffer(monkeypatch):
    noises = noises_of_the_targets(0.5, monkeypatch)
    assert abs(noises[0] - noises[1]) > 0.01
    assert noises_of_the_targets(8.0, monkeypatch) == pytest.approx([4 * noise for noise in noises])


def test_buffer_is_a_ring_of_the_last_epochs():
    chooser = sampler(sample="poem", objective="energy", posterior={"buffer_epochs": 2})
    generator, network = seeded(), Channels()
    chosen = [chooser.rows(epoch, network, generator) for epoch in range(1, 5)]
    assert torch.equal(chooser.state_dict()["buffer"], torch.stack([chosen[2], chosen[3]]))
    chosen.append(chooser.rows(5, network, generator))
    assert torch.equal(chooser.state_dict()["buffer"], torch.stack([chosen[4], chosen[3]]))


def test_state_goes_on_where_it_was():
    whole, network = sampler(sample="poem", objective="energy"), Channels()
    for epoch in (1, 2):
        whole.rows(epoch, network, seeded(epoch))
    parts = sampler(sample="poem", objective="energy")
    parts.load_state_dict(whole.state_dict())
    expected = whole.rows(3, network, seeded(3))
    assert torch.equal(parts.rows(3, network, seeded(3)), expected)
    assert not torch.equal(sampler(sample="poem", objective="energy").rows(3, network, seeded(3)), expected)


def test_hard_outliers_are_those_taken_for_id():
    network, generator = Channels(4), seeded()
    chooser = sampler(sample="ntom", objective="ntom", quantile=0.2, count=6)
    pool = pool_rows(40, 30, seeded())
    rows = chooser.rows(1, network, generator)
    with torch.no_grad():
        scores = network.eval().head(features_of(chooser.outliers, pool).float()).softmax(dim=1)[:, -1]
    assert sorted(rows.tolist()) == sorted(pool[scores.argsort()][6:12].tolist())


def test_random_outliers_are_others_each_epoch():
    chooser, generator = sampler(), seeded()
    first, second = (chooser.rows(epoch, Channels(), generator) for epoch in (1, 2))
    assert len(first.unique()) == len(second.unique()) == 12
    assert set(first.tolist()) != set(second.tolist())
    few = sampler(available=5).rows(1, Channels(), generator)
    assert sorted(few.tolist()) == sorted(list(range(5)) * 2 + few[10:].tolist())
