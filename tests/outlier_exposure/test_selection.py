"""The choice of outliers: hand-made vectors of POEM, the smallest scores, the regression's sums, and the buffer."""

import numpy as np
import pytest
import torch
from pictures import TRANSFORM, Pictures
from torch import Tensor, nn

from ood_helpers.backbones.base import Classifier
from ood_helpers.outlier_exposure.recipe import OutlierExposureRecipe, PosteriorSample
from ood_helpers.outlier_exposure.selection import (
    OutlierSampler,
    boundary_distance,
    draw,
    outlier_probability,
    posterior,
    repeated,
)
from ood_helpers.training.batches import to_inputs

POEM = {"kind": "poem", "pool_size": 30}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Channels(Classifier):
    """Its features are the mean of each channel; dropout, too, tells whether it is in eval mode."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(3, outputs)
        self.seen: list[tuple[bool, bool]] = []

    def feature_map(self, images):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return self.dropout(images)


class Recorder:
    """An array of images that notes how many are taken at a time."""

    def __init__(self, pixels):
        self.pixels, self.shape, self.taken = pixels, pixels.shape, []

    def __getitem__(self, rows):
        self.taken.append(rows)
        return self.pixels[rows]


def features_of(pictures: Pictures, rows=None) -> Tensor:
    pixels = torch.from_numpy(pictures.pixels)
    with torch.no_grad():
        inputs = to_inputs(pixels if rows is None else pixels[rows], TRANSFORM, "cpu")
        return Channels().eval().features(inputs).double()


def sampler(
    outliers: Pictures | None = None, count: int = 12, train: int = 18, sample="random", **settings
) -> OutlierSampler:
    recipe = OutlierExposureRecipe(**{"batch_size": 8, "sample": sample} | settings)
    sets = Pictures(train, 0), Pictures(40, 1) if outliers is None else outliers
    return OutlierSampler(*sets, TRANSFORM, recipe, count, "cpu")


# ---- rows --------------------------------------------------------------------------------------------------


def test_few_rows_are_repeated_in_new_orders():
    rows = torch.tensor([3, 8, 5, 11, 2, 6])
    found = repeated(rows, 15, seeded())
    assert len(found) == 15
    rounds = found[:6], found[6:12], found[12:]
    assert all(sorted(part.tolist()) == [2, 3, 5, 6, 8, 11] for part in rounds[:2])
    assert rounds[0].tolist() != rounds[1].tolist()
    assert len(rounds[2].unique()) == 3
    assert len(repeated(rows, 4, seeded()).unique()) == 4


def test_random_outliers_are_others_each_epoch():
    chooser, generator = sampler(), seeded()
    first, second = (chooser.rows(epoch, Channels(), generator) for epoch in (1, 2))
    assert len(first.unique()) == len(second.unique()) == 12
    assert set(first.tolist()) != set(second.tolist())
    few = sampler(Pictures(5, 1)).rows(1, Channels(), generator)
    assert sorted(few.tolist()) == sorted(list(range(5)) * 2 + few[10:].tolist())


@pytest.mark.parametrize("sample", ["random", POEM, {"kind": "ntom", "pool_size": 30}])
def test_rows_are_seeded(sample):
    first, again, other = (sampler(sample=sample).rows(1, Channels(), seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_pool_is_drawn_from_all_outliers():
    """And has no image twice: a tenth of the pool is chosen, all of them different."""
    rows = sampler(Pictures(300, 1), count=10, sample={"kind": "poem", "pool_size": 100}).rows(
        1, Channels(), seeded()
    )
    assert len(rows.unique()) == 10 and rows.max() > 150 > rows.min()


# ---- scores ------------------------------------------------------------------------------------------------


def test_probability_of_outliers():
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 1.2, 0.3]])
    assert outlier_probability(logits, False).tolist() == pytest.approx(
        [1 - 0.785597, 1 - 0.574897], abs=1e-6
    )
    last = np.exp([-1.0, 0.3]) / np.exp(logits.numpy()).sum(axis=1)
    assert outlier_probability(logits, True).tolist() == pytest.approx(last, abs=1e-6)


def test_distance_from_a_boundary():  # V9
    pool = torch.tensor([[1, 1], [0.5, 0.7], [2, 0], [0.1, 0.1], [0, 1]], dtype=torch.float64)
    distances = boundary_distance(pool, torch.tensor([-2.0, 1.5], dtype=torch.float64))
    assert distances.tolist() == pytest.approx([0.5, 0.05, 4, 0.05, 1.5])
    assert sorted(distances.argsort()[:3].tolist()) == [0, 1, 3]


# ---- the smallest scores -----------------------------------------------------------------------------------


def brightness(inputs: Tensor) -> Tensor:
    """Sum of the pixel values, a whole number."""
    assert not torch.is_grad_enabled()
    return (inputs * 0.25 + 0.5).mul(255).round().sum(dim=(1, 2, 3))


def test_the_smallest_are_ranks_of_the_pool_and_no_image_outside_it_is_loaded():
    pictures = Pictures(60, 3)
    pictures.array = Recorder(pictures.pixels)
    pool = torch.randperm(60, generator=seeded())[:40]
    sums = pictures.pixels[pool.numpy()].sum(axis=(1, 2, 3))
    ordered = pool[np.lexsort((pool.numpy(), sums))].tolist()

    def chosen(count, quantile):
        return sampler(pictures, count, batch_size=16).smallest(pool, brightness, quantile).tolist()

    assert chosen(10, 0.0) == ordered[:10]
    assert chosen(10, 0.13) == ordered[5:15]
    assert chosen(38, 0.5) == ordered[2:]  # a skip that leaves enough
    assert chosen(50, 0.5) == ordered
    assert max(len(rows) for rows in pictures.array.taken) == 16
    assert set(np.concatenate(pictures.array.taken).tolist()) == set(pool.tolist())


@pytest.mark.parametrize("batch_size", [2, 7, 100, 1000])
def test_of_equal_scores_the_smaller_row_is_chosen(batch_size):
    pictures, rng = Pictures(300, 3), np.random.default_rng(0)
    pictures.pixels[:] = rng.integers(0, 40, 300)[:, None, None, None]  # a few levels of grey
    pool = torch.from_numpy(rng.permutation(300)[:200])
    levels = pictures.pixels[pool.numpy(), 0, 0, 0]
    found = sampler(pictures, 50, batch_size=batch_size).smallest(pool, brightness)
    assert found.tolist() == pool[np.lexsort((pool.numpy(), levels))][:50].tolist()


def test_one_batch_of_decoded_images_is_held():
    pictures, loaded, seen = Pictures(30, 3, decoded=True), [], []
    open_image = pictures.image
    pictures.image = lambda i: loaded.append(i) or open_image(i)

    def score(inputs):
        seen.append(len(inputs))
        assert len(loaded) == sum(seen)  # none has been loaded ahead
        return inputs.sum(dim=(1, 2, 3))

    sampler(pictures, 4).smallest(torch.arange(30), score)
    assert seen == [8, 8, 8, 6]


def test_hard_outliers_are_those_taken_for_id():
    network, sample = Channels(4).train(), {"kind": "ntom", "pool_size": 30, "quantile": 0.2}
    chooser = sampler(sample=sample, objective="ntom", count=6)
    pool = torch.randperm(40, generator=seeded())[:30]
    rows = chooser.rows(1, network, seeded())
    assert network.training and set(network.seen) == {(False, False)}  # eval mode, without gradients
    with torch.no_grad():
        scores = network.head(features_of(chooser.outliers, pool).float()).softmax(dim=1)[:, -1]
    assert sorted(rows.tolist()) == sorted(pool[scores.argsort()][6:12].tolist())


# ---- the regression of POEM --------------------------------------------------------------------------------


def test_posterior_of_a_regression():  # V9
    z = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    y = torch.tensor([-3.9, 3.9, 0.5], dtype=torch.float64)
    mean, precision = posterior(z.T @ z, z.T @ y, PosteriorSample(kind="poem"))
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
    pictures = Pictures(20, 3)
    rows, weights = torch.tensor([2, 5, 11, 19, 7]), torch.tensor([1, 3, 2, 1, 4])
    gram, total = sampler(batch_size=2).feature_sums(Channels().eval(), pictures, rows, weights)
    z = features_of(pictures, rows.repeat_interleave(weights))
    assert gram.dtype == total.dtype == torch.float64
    torch.testing.assert_close(gram, z.T @ z)
    torch.testing.assert_close(total, z.sum(dim=0))


def noises_of_the_targets(variance: float) -> list[float]:
    """nu of two epochs, got back from the posteriors. These are held against explicit rows: the buffer as it is, and ID
    images tiled to the same number."""
    # Of a pool of 30 images some are taken twice.
    sample = POEM | {"noise_variance": variance, "confidence": 3.0}
    chooser = sampler(sample=sample, objective="energy", count=36)
    network = Channels().eval()
    mean, precision = chooser.boundary(1, network, seeded())
    torch.testing.assert_close(precision, torch.eye(3, dtype=torch.float64) / 20)
    assert 0 < mean.abs().max() < 0.05
    chosen, noises = [], []
    for epoch in (1, 2):
        chosen.append(chooser.rows(epoch, network, seeded(epoch)))
        mean, precision = chooser.boundary(epoch + 1, network, seeded(10 + epoch))
        id_rows = torch.arange(18).repeat(2 * epoch)
        of_outliers = features_of(chooser.outliers, torch.cat(chosen))
        z = torch.cat([of_outliers, features_of(chooser.train, id_rows)])
        torch.testing.assert_close(precision, z.T @ z / variance + torch.eye(3) / 20)
        signs = torch.where(torch.arange(len(z)) < len(z) // 2, 1.0, -1.0).double()
        rest = variance * precision @ mean - 3.0 * z.T @ signs  # Z' nu
        noise = rest / z.sum(dim=0)
        torch.testing.assert_close(noise, noise[:1].expand(3))
        noises.append(float(noise[0]))
    return noises


def test_boundary_is_drawn_from_the_regression_on_the_buffer():
    noises = noises_of_the_targets(0.5)
    assert abs(noises[0] - noises[1]) > 0.01
    assert noises_of_the_targets(8.0) == pytest.approx([4 * noise for noise in noises])


def test_outliers_nearest_to_the_drawn_boundary_are_chosen():
    chooser, network = sampler(sample=POEM, objective="energy"), Channels().eval()
    for epoch in (1, 2):
        rows, generator = chooser.rows(epoch, network, seeded(epoch)), seeded(epoch)
        pool = torch.randperm(40, generator=generator)[:30]
        beta = draw(*chooser.boundary(epoch, network, generator), generator)
        distances = boundary_distance(features_of(chooser.outliers, pool), beta)
        assert sorted(rows.tolist()) == sorted(pool[distances.argsort()][:12].tolist())


def test_buffer_is_a_ring_of_the_last_epochs():
    chooser = sampler(sample=POEM | {"buffer_epochs": 2}, objective="energy")
    generator, network = seeded(), Channels()
    chosen = [chooser.rows(epoch, network, generator) for epoch in range(1, 5)]
    assert torch.equal(chooser.buffer, torch.stack([chosen[2], chosen[3]]))
    chosen.append(chooser.rows(5, network, generator))
    assert torch.equal(chooser.buffer, torch.stack([chosen[4], chosen[3]]))
    assert network.training and set(network.seen) == {(False, False)}


def test_the_buffer_is_all_that_is_remembered():
    whole, network = sampler(sample=POEM, objective="energy"), Channels()
    for epoch in (1, 2):
        whole.rows(epoch, network, seeded(epoch))
    parts = sampler(sample=POEM, objective="energy")
    parts.buffer = whole.buffer.clone()
    expected = whole.rows(3, network, seeded(3))
    assert torch.equal(parts.rows(3, network, seeded(3)), expected)
    assert not torch.equal(sampler(sample=POEM, objective="energy").rows(3, network, seeded(3)), expected)
