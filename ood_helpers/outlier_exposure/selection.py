"""Which auxiliary outliers an epoch of outlier exposure is trained on: any, hard ones, or those near a drawn boundary.

Rows are chosen first, and images are loaded a batch at a time, so that a pool of any size fits in memory.

Sources: Chen et al., "ATOM: Robustifying Out-of-distribution Detection Using Outlier Mining", ECML PKDD 2021, arXiv
2006.15207 (hard outliers, there called NTOM without adversarial images); Ming, Fan and Li, "POEM: Out-of-Distribution
Detection with Posterior Sampling", ICML 2022, arXiv 2206.13687.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ood_helpers.backbones.base import Classifier
from ood_helpers.data.image_set import ImageSet
from ood_helpers.data.transforms import Transform
from ood_helpers.outlier_exposure.recipe import OutlierExposureRecipe, PosteriorSample
from ood_helpers.training.batches import load_images, to_inputs

PRIOR_MEAN_STD = 0.01  # of the boundary of POEM's first epoch, in the public code


def repeated(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the rows in random order; where there are fewer, all of them, again in a new order, until there are
    enough."""
    orders = (torch.randperm(len(rows), generator=generator) for _ in range(math.ceil(count / len(rows))))
    return torch.cat([rows[order] for order in orders])[:count]


def outlier_probability(logits: Tensor, outlier_output: bool) -> Tensor:
    """How surely a classifier tells outliers, [B] float64 in 0 to 1, of logits [B, L]; low for those it takes for ID.

    The softmax probability of the last output where that is the outliers' (`outlier_output`), else 1 - max softmax.
    """
    probabilities = logits.double().softmax(dim=1)
    return probabilities[:, -1] if outlier_output else 1 - probabilities.amax(dim=1)


def boundary_distance(features: Tensor, beta: Tensor) -> Tensor:
    """|beta . h| of features h [B, D] and beta [D], float64 [B]: 0 on the boundary. Source: POEM, arXiv 2206.13687."""
    return (features.double() @ beta.to(features.device)).abs()


def posterior(gram: Tensor, moment: Tensor, settings: PosteriorSample) -> tuple[Tensor, Tensor]:
    """Mean [D] and precision A [D, D] of the weights of a Bayesian linear regression of y on Z, float64.

    A = Z'Z / noise_variance + I / prior_variance, mean = A^-1 Z'y / noise_variance; the covariance is A^-1. (The public
    code of POEM takes prior_variance A^-1 for the covariance.)

    Parameters
    ----------
    gram : Z'Z [D, D], float64
    moment : Z'y [D], float64

    Source: POEM, arXiv 2206.13687.
    """
    precision = (
        gram / settings.noise_variance + torch.eye(len(gram), dtype=gram.dtype) / settings.prior_variance
    )
    factor = torch.linalg.cholesky(precision)
    mean = torch.cholesky_solve(moment[:, None] / settings.noise_variance, factor)[:, 0]
    return mean, precision


def draw(mean: Tensor, precision: Tensor, generator: torch.Generator) -> Tensor:
    """One draw [D] from the normal distribution with this mean [D] and precision A = L L' [D, D]: mean + L'^-1 noise."""
    noise = torch.randn(len(mean), 1, dtype=mean.dtype, generator=generator)
    factor = torch.linalg.cholesky(precision)
    return mean + torch.linalg.solve_triangular(factor.mT, noise, upper=True)[:, 0]


class OutlierSampler:
    """The outliers of each epoch: from a random pool, by `sample`, chosen with the network as it is then.

    `random`: any. `ntom`: those of lowest `outlier_probability`, behind the skipped quantile. `poem`: those nearest to the
    boundary beta . h = 0, with beta drawn from its `boundary` of the epoch.

    Parameters
    ----------
    count : outliers of an epoch; a smaller pool is repeated

    Attributes
    ----------
    buffer : for POEM, rows int64 [buffer_epochs, count] of the last epochs; all that it remembers
    """

    def __init__(
        self,
        train: ImageSet,
        outliers: ImageSet,
        transform: Transform,
        recipe: OutlierExposureRecipe,
        count: int,
        device: str | torch.device,
    ) -> None:
        self.train, self.outliers, self.transform, self.device = train, outliers, transform, device
        self.sample, self.count, self.batch_size = recipe.sample, count, recipe.batch_size
        self.outlier_output = recipe.background
        # Epoch e is at (e - 1) mod the number of epochs that are kept.
        self.buffer = torch.zeros(getattr(recipe.sample, "buffer_epochs", 0), count, dtype=torch.int64)

    def rows(self, epoch: int, network: Classifier, generator: torch.Generator) -> Tensor:
        """Rows int64 [count] for an epoch (from 1), in random order; the network's mode stays what it is."""
        size = getattr(self.sample, "pool_size", self.count)
        chosen = torch.randperm(len(self.outliers), generator=generator)[:size]
        training = network.training
        network.eval()
        match self.sample.kind:
            case "ntom":
                chosen = self.smallest(
                    chosen,
                    lambda inputs: outlier_probability(network(inputs), self.outlier_output),
                    self.sample.quantile,
                )
            case "poem":
                beta = draw(*self.boundary(epoch, network, generator), generator)
                chosen = self.smallest(
                    chosen, lambda inputs: boundary_distance(network.features(inputs), beta)
                )
        network.train(training)
        rows = repeated(chosen, self.count, generator)
        if len(self.buffer):
            self.buffer[(epoch - 1) % len(self.buffer)] = rows
        return rows

    @torch.no_grad()
    def smallest(self, pool: Tensor, score: Callable[[Tensor], Tensor], quantile: float = 0.0) -> Tensor:
        """The `count` outliers of a pool with the smallest scores; of equal scores the smaller row.

        Parameters
        ----------
        pool : distinct rows of the outliers, int64
        score : normalised images [B, 3, h, w] -> [B]
        quantile : share of the pool, from the smallest score on, that is skipped; less where too few would be left

        Returns
        -------
        int64 [min(count, len(pool))], ascending by score: ranks floor(quantile len(pool)) and on, of the pool
        """
        pool = pool.sort().values  # the order of the files or of a memory-mapped array
        scores = [
            score(self._inputs(self.outliers, rows)).double().cpu() for rows in pool.split(self.batch_size)
        ]
        first = min(int(quantile * len(pool)), max(len(pool) - self.count, 0))
        return pool[torch.cat(scores).argsort(stable=True)][first : first + self.count]

    def boundary(self, epoch: int, network: Classifier, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean [D] and precision [D, D] of POEM's beta in an epoch, float64; the network in eval mode.

        The posterior of a regression on the features h of the ID training images (target -confidence + nu) and of the
        outliers in the buffer (confidence + nu), both of the same total weight, nu ~ N(0, noise_variance) once an epoch.
        In the first epoch, which has no outliers yet, the prior.
        """
        sample, dim = self.sample, network.feature_dim
        if epoch == 1:
            mean = PRIOR_MEAN_STD * torch.randn(dim, dtype=torch.float64, generator=generator)
            return mean, torch.eye(dim, dtype=torch.float64) / sample.prior_variance
        buffered = self.buffer[: epoch - 1]
        of_outliers = self.feature_sums(network, self.outliers, *buffered.unique(return_counts=True))
        share = torch.full((len(self.train),), buffered.numel() / len(self.train), dtype=torch.float64)
        of_images = self.feature_sums(network, self.train, torch.arange(len(self.train)), share)
        noise = math.sqrt(sample.noise_variance) * float(torch.randn((), generator=generator))
        moment = (noise + sample.confidence) * of_outliers[1] + (noise - sample.confidence) * of_images[1]
        return posterior(of_outliers[0] + of_images[0], moment, sample)

    @torch.no_grad()
    def feature_sums(
        self, network: Classifier, image_set: ImageSet, rows: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """sum_i w_i h_i h_i' [D, D] and sum_i w_i h_i [D] of the penultimate features h of the images `rows`, float64 on
        the CPU; the network in eval mode."""
        gram, total = torch.zeros(()), torch.zeros(())
        parts = zip(rows.split(self.batch_size), weights.double().split(self.batch_size), strict=True)
        for part, weight in parts:
            features = network.features(self._inputs(image_set, part)).double()
            weighted = features * weight.to(features.device)[:, None]
            gram, total = gram + (weighted.T @ features).cpu(), total + weighted.sum(dim=0).cpu()
        return gram, total

    def _inputs(self, image_set: ImageSet, rows: Tensor) -> Tensor:
        return to_inputs(load_images(image_set, self.transform, rows), self.transform, self.device)
