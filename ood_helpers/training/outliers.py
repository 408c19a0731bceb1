"""Which auxiliary outliers an epoch of outlier exposure is trained on: any, hard ones, or those near a drawn boundary.

Rows are chosen first, and images are loaded a batch at a time, so that a pool of any size fits in memory.

Sources: Chen et al., "ATOM: Robustifying Out-of-distribution Detection Using Outlier Mining", ECML PKDD 2021, arXiv
2006.15207 (hard outliers, there called NTOM without adversarial images); Ming, Fan and Li, "POEM: Out-of-Distribution
Detection with Posterior Sampling", ICML 2022, arXiv 2206.13687.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ood_helpers.backbones import Classifier
from ood_helpers.config import OutlierExposureConfig, PosteriorConfig
from ood_helpers.data import ImageSet, Transform
from ood_helpers.training.classifier import load_images

PRIOR_MEAN_STD = 0.01  # of the boundary of POEM's first epoch, in the public code

Score = Callable[[Classifier, Tensor], Tensor]


def pool_rows(available: int, size: int, generator: torch.Generator) -> Tensor:
    """min(size, available) distinct rows of 0 .. available - 1 in random order, int64."""
    return torch.randperm(available, generator=generator)[:size]


def repeated(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the rows in random order; where there are fewer, all of them, again in a new order, until there are
    enough."""
    orders = (torch.randperm(len(rows), generator=generator) for _ in range(math.ceil(count / len(rows))))
    return torch.cat([rows[order] for order in orders])[:count]


class SmallestScores:
    """The `count` rows of smallest score of those added so far; of equal scores the smaller row. Memory O(count + chunk)."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._rows = torch.empty(0, dtype=torch.int64)
        self._scores = torch.empty(0, dtype=torch.float64)
        self._added: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, scores: Tensor) -> None:
        """Rows int64 [B] and their scores [B], on any device."""
        self._added.append((rows.cpu(), scores.double().cpu()))
        # Not sorted for each chunk: a chunk is small beside `count`.
        if sum(len(rows) for rows, _ in self._added) >= self.count:
            self._merge()

    @property
    def rows(self) -> Tensor:
        """int64, at most [count], ascending by score."""
        self._merge()
        return self._rows

    def _merge(self) -> None:
        rows, scores = (
            torch.cat(parts) for parts in zip((self._rows, self._scores), *self._added, strict=True)
        )
        by_row = rows.argsort()
        order = by_row[scores[by_row].argsort(stable=True)][: self.count]
        self._rows, self._scores, self._added = rows[order], scores[order], []


def outlier_probability(logits: Tensor, outlier_output: bool) -> Tensor:
    """How surely a classifier tells outliers, [B] float64 in 0 to 1, of logits [B, L]; low for those it takes for ID.

    The softmax probability of the last output where that is the outliers' (`outlier_output`), else 1 - max softmax.
    """
    probabilities = logits.double().softmax(dim=1)
    return probabilities[:, -1] if outlier_output else 1 - probabilities.amax(dim=1)


def boundary_distance(features: Tensor, beta: Tensor) -> Tensor:
    """|beta . h| of features h [B, D] and beta [D], float64 [B]: 0 on the boundary. Source: POEM, arXiv 2206.13687."""
    return (features.double() @ beta.to(features.device)).abs()


def select(
    network: Classifier,
    outliers: ImageSet,
    transform: Transform,
    pool: Tensor,
    score: Score,
    count: int,
    *,
    batch_size: int,
    device: str | torch.device,
    quantile: float = 0.0,
) -> Tensor:
    """The rows of the pool with the smallest scores, of a pass of the network in eval mode; a batch of images at a time.

    Parameters
    ----------
    pool : distinct rows of `outliers`, int64
    score : (network, normalised images [B, 3, h, w]) -> [B], the smaller the sooner chosen
    quantile : share of the pool, from the smallest score on, that is skipped; less where too few would be left

    Returns
    -------
    int64 [min(count, len(pool))], ascending by score: ranks floor(quantile len(pool)) and on, of the pool
    """
    first = min(int(quantile * len(pool)), max(len(pool) - count, 0))
    smallest = SmallestScores(first + count)
    with _evaluating(network):
        # In order of the files or of a memory-mapped array.
        for rows in pool.sort().values.split(batch_size):
            smallest.add(rows, score(network, load_inputs(outliers, transform, rows, device)))
    return smallest.rows[first:]


def feature_sums(
    network: Classifier,
    image_set: ImageSet,
    transform: Transform,
    rows: Tensor,
    weights: Tensor,
    *,
    batch_size: int,
    device: str | torch.device,
) -> tuple[Tensor, Tensor]:
    """sum_i w_i h_i h_i' [D, D] and sum_i w_i h_i [D] of the penultimate features h of the images `rows`, float64 on the
    CPU; the network in eval mode."""
    gram, total = torch.zeros(()), torch.zeros(())
    with _evaluating(network):
        for part, weight in zip(rows.split(batch_size), weights.double().split(batch_size), strict=True):
            features = network.features(load_inputs(image_set, transform, part, device)).double()
            weighted = features * weight.to(features.device)[:, None]
            gram, total = gram + (weighted.T @ features).cpu(), total + weighted.sum(dim=0).cpu()
    return gram, total


def posterior(gram: Tensor, moment: Tensor, config: PosteriorConfig) -> tuple[Tensor, Tensor]:
    """Mean [D] and precision A [D, D] of the weights of a Bayesian linear regression of y on Z, float64.

    A = Z'Z / noise_variance + I / prior_variance, mean = A^-1 Z'y / noise_variance; the covariance is A^-1. (The public
    code of POEM takes prior_variance A^-1 for the covariance.)

    Parameters
    ----------
    gram : Z'Z [D, D]
    moment : Z'y [D]

    Source: POEM, arXiv 2206.13687.
    """
    gram, moment = gram.double(), moment.double()
    precision = gram / config.noise_variance + torch.eye(len(gram), dtype=gram.dtype) / config.prior_variance
    factor = torch.linalg.cholesky(precision)
    mean = torch.cholesky_solve(moment[:, None] / config.noise_variance, factor)[:, 0]
    return mean, precision


def draw(mean: Tensor, precision: Tensor, generator: torch.Generator) -> Tensor:
    """One draw [D] from the normal distribution with this mean [D] and precision A = L L' [D, D]: mean + L'^-1 noise."""
    noise = torch.randn(len(mean), 1, dtype=mean.dtype, generator=generator)
    factor = torch.linalg.cholesky(precision)
    return mean + torch.linalg.solve_triangular(factor.mT, noise, upper=True)[:, 0]


class OutlierSampler:
    """The outliers of each epoch: from a random pool, by `sample`, chosen with the network as it is then.

    `random`: any. `ntom`: those of lowest `outlier_probability`, behind the skipped quantile. `poem`: those nearest to the
    boundary beta . h = 0, with beta drawn from the posterior of a regression on the features h of the ID training images
    (target -confidence + nu) and of the outliers chosen in the last `buffer_epochs` epochs (confidence + nu), both of the
    same total weight, nu ~ N(0, noise_variance) once an epoch. In the first epoch, which has no outliers yet, beta is
    drawn from the prior.

    Parameters
    ----------
    count : outliers of an epoch; a smaller pool is repeated
    """

    def __init__(
        self,
        train: ImageSet,
        outliers: ImageSet,
        transform: Transform,
        config: OutlierExposureConfig,
        count: int,
        device: str | torch.device,
    ) -> None:
        self.train, self.outliers, self.transform = train, outliers, transform
        self.config, self.count = config, count
        self.passes = {"batch_size": config.batch_size, "device": device}
        self.buffer = torch.zeros(config.posterior.buffer_epochs, count, dtype=torch.int64)

    def rows(self, epoch: int, network: Classifier, generator: torch.Generator) -> Tensor:
        """Rows int64 [count] for an epoch (from 1), in random order."""
        pool = pool_rows(len(self.outliers), self.config.pool_size, generator)
        match self.config.sample:
            case "random":
                chosen = pool[: self.count]
            case "ntom":
                outlier_output = self.config.objective == "ntom"
                chosen = self._select(
                    network,
                    pool,
                    lambda network, inputs: outlier_probability(network(inputs), outlier_output),
                )
            case "poem":
                beta = self._boundary(epoch, network, generator)
                chosen = self._select(
                    network, pool, lambda network, inputs: boundary_distance(network.features(inputs), beta)
                )
        rows = repeated(chosen, self.count, generator)
        self.buffer[(epoch - 1) % len(self.buffer)] = rows
        return rows

    def _select(self, network: Classifier, pool: Tensor, score: Score) -> Tensor:
        quantile = self.config.quantile if self.config.sample == "ntom" else 0.0
        return select(
            network,
            self.outliers,
            self.transform,
            pool,
            score,
            self.count,
            quantile=quantile,
            **self.passes,
        )

    def _boundary(self, epoch: int, network: Classifier, generator: torch.Generator) -> Tensor:
        """beta [D] of an epoch, float64."""
        config, dim = self.config.posterior, network.feature_dim
        if epoch == 1:
            mean = PRIOR_MEAN_STD * torch.randn(dim, dtype=torch.float64, generator=generator)
            return draw(mean, torch.eye(dim, dtype=torch.float64) / config.prior_variance, generator)
        buffered = self.buffer[: epoch - 1]
        rows, repeats = buffered.unique(return_counts=True)
        of_outliers = feature_sums(network, self.outliers, self.transform, rows, repeats, **self.passes)
        share = torch.full((len(self.train),), buffered.numel() / len(self.train), dtype=torch.float64)
        of_images = feature_sums(
            network, self.train, self.transform, torch.arange(len(self.train)), share, **self.passes
        )
        noise = math.sqrt(config.noise_variance) * float(torch.randn((), generator=generator))
        moment = (noise + config.confidence) * of_outliers[1] + (noise - config.confidence) * of_images[1]
        return draw(*posterior(of_outliers[0] + of_images[0], moment, config), generator)

    def state_dict(self) -> dict[str, Any]:
        """The rows chosen in the last epochs, [buffer_epochs, count]; epoch e is at (e - 1) mod buffer_epochs."""
        return {"buffer": self.buffer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of an interrupted training."""
        self.buffer = state["buffer"].clone()


def load_inputs(
    image_set: ImageSet, transform: Transform, rows: Tensor, device: str | torch.device
) -> Tensor:
    """The images `rows`, not augmented, as `to_inputs`."""
    return to_inputs(load_images(image_set, transform, rows), transform, device)


def to_inputs(images: Tensor, transform: Transform, device: str | torch.device) -> Tensor:
    """uint8 [B, h, w, 3] -> normalised float [B, 3, h, w] in channels_last on `device`."""
    inputs = transform.normalise(images.to(device).permute(0, 3, 1, 2))
    return inputs.contiguous(memory_format=torch.channels_last)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """The network in eval mode and without gradients, then in the mode it was in."""
    training = network.training
    network.eval()
    with torch.no_grad():
        yield
    network.train(training)
