"""Mahalanobis: the distance to the nearest class mean, at the last layer or combined over several layers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ood_helpers.detectors.base import Detector
from ood_helpers.detectors.odin import error_margin, input_gradient, step_by_sign, with_images
from ood_helpers.errors import InputError
from ood_helpers.features import Bank, FeatureBank, PixelNetwork
from ood_helpers.metrics import fpr_at_tpr
from ood_helpers.progress import track

FOLDS = 5  # of the cross-validation that chooses the regression's penalty
PENALTIES = np.logspace(-4, 4, 10)  # inverse penalties C to choose from, scikit-learn's own default


@dataclass(frozen=True)
class ClassGaussians:
    """Gaussians with a mean for each class and one covariance for all, ready to score features.

    centre : global mean [D], subtracted first so that far means do not cost digits
    whitening : W [D, R] with W W^T = P, the (pseudo-)inverse of the covariance of rank R
    means : class means, centred and whitened [C, R]; everything float64
    """

    centre: Tensor
    whitening: Tensor
    means: Tensor

    @classmethod
    @torch.no_grad()
    def fit(cls, train_bank: Bank, means: Tensor) -> "ClassGaussians":
        """Tied covariance (1 / N) sum_i (f_i - mu_y_i)(f_i - mu_y_i)^T of a labelled bank with class means [C, D].

        Eigenvalues up to D * 2.2e-16 times the largest count as zero: features that are constant within the
        classes, or a sum of others, have no part in the distance.
        """
        scatter = torch.zeros(means.shape[1], means.shape[1], dtype=torch.float64)
        total = torch.zeros(means.shape[1], dtype=torch.float64)
        for shard in train_bank.shards():
            features = shard.features.cpu().double()
            residuals = features - means[shard.labels.cpu()]
            scatter += residuals.T @ residuals
            total += features.sum(dim=0)
        variances, axes = torch.linalg.eigh(scatter / len(train_bank))
        kept = variances > len(variances) * torch.finfo(torch.float64).eps * variances[-1]
        if not kept.any():
            raise InputError(
                "Mahalanobis: the features do not vary within the classes, expected a covariance; take more training images."
            )
        whitening = axes[:, kept] / variances[kept].sqrt()
        centre = total / len(train_bank)
        return cls(centre, whitening, (means - centre) @ whitening)

    def to(self, device: torch.device) -> "ClassGaussians":
        return ClassGaussians(self.centre.to(device), self.whitening.to(device), self.means.to(device))

    def log_densities(self, features: Tensor) -> Tensor:
        """G_c = -(f - mu_c)^T P (f - mu_c) / 2 of features [N, D] -> [N, C] float64; differentiable."""
        whitened = (features.double() - self.centre) @ self.whitening
        squares = whitened.square().sum(dim=1, keepdim=True) + self.means.square().sum(dim=1)
        return whitened @ self.means.T - squares / 2


@dataclass
class Mahalanobis(Detector):
    """Score S = max_c -(f - mu_c)^T P (f - mu_c) / 2.

    mu_c is the mean training feature of class c, P the (pseudo-)inverse of the covariance that all classes
    share, (1 / N) sum over the training images of (f - mu_y)(f - mu_y)^T. This is the plain form, at the
    last layer and without input noise; `MahalanobisEnsemble` is the tuned one.

    Learned
    -------
    gaussians_ : ClassGaussians, from which the features are whitened, so that a shard costs one [N, D] x [D, D]
        and one [N, D] x [D, C] product
    """

    title: ClassVar[str] = "Mahalanobis"
    source: ClassVar[str] = "Lee et al., NeurIPS 2018, arXiv 1807.03888"

    def _fit(self, train_bank: Bank) -> None:
        self.gaussians_ = ClassGaussians.fit(train_bank, self._class_means(train_bank))

    def _score(self, shard: FeatureBank) -> Tensor:
        gaussians = self.gaussians_.to(shard.features.device)
        return gaussians.log_densities(shard.features).amax(dim=1)


@dataclass
class MahalanobisEnsemble(Detector):
    """Score S = -(w . M + b): Mahalanobis scores M_l of several layers, weighted by a logistic regression.

    1. G_{l,c}(x) = -(f_l - mu_{l,c})^T P_l (f_l - mu_{l,c}) / 2 with f_l the pooled output of layer l, as in `Mahalanobis`
    2. x'_l = x - noise * sign(-grad_x max_c G_{l,c}(x)) with sign(0) = +1, a step towards the nearest class, not clipped
    3. M_l = max_c G_{l,c}(x'_l), the class being chosen anew
    4. w . M + b = log-odds of "out" in a logistic regression of ID validation images against adversarial copies of
       them, min(max(x + outlier_step * sign(grad_x CE(z, y)), 0), 1), with an L2 penalty on the weights of the
       standardised M (of the raw M in MOS) that 5-fold cross-validation chooses

    Every other validation image trains the regression, the others choose the noise: the value of least FPR95 against
    their adversarial copies, the earliest of equal ones. S ranks as -P(out | M) does, the score of the paper, but does
    not saturate.

    Hyper-parameters
    ----------------
    layers : modules among the taps of the training bank, and `features` for the last layer; None = every tap, then
        `features`
    noise : in [0, 1], in pixels; None = chosen from `noise_grid`. With 0, given or chosen, the bank's taps are
        scored; else an image costs 1 + 2 L passes for L layers, many of which end at an early layer
    noise_grid : pixels; the values of MOS, halved as its pixels run from -1 to 1
    outlier_step : pixels, above 0 and at most 1; half the 0.05 of MOS

    Learned, for the present hyper-parameters
    -----------------------------------------
    layers_ : names [L]
    weights_, intercept_ : w float64 [L] and b of the raw M
    noise_ : the noise in use

    MOS clips the adversarial copies to [0, 1] where its pixels run from -1 to 1, which turns all that is darker than
    grey into grey; here they are clipped to the range of pixels.
    """

    layers: Sequence[str] | None = None
    noise: float | None = None
    noise_grid: Sequence[float] = (0.0, 0.005, 0.0025, 0.001, 0.0007, 0.0005, 0.00025)
    outlier_step: float = 0.025

    title: ClassVar[str] = "Mahalanobis (ensemble)"
    source: ClassVar[str] = "Lee et al., NeurIPS 2018, arXiv 1807.03888; protocol of MOS, arXiv 2105.01879"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layers = None if self.layers is None else tuple(self.layers)
        self.noise_grid = tuple(self.noise_grid)

    def _check(self) -> None:
        if self.layers is not None and not (isinstance(self.layers, list | tuple) and self.layers):
            raise InputError(
                f"{self.title}: layers is {self.layers!r}, expected a list of names or None (every tap, then features)."
            )
        if self.noise is not None:
            self._check_number("noise", 0, 1)
        grid = self.noise_grid
        if not (isinstance(grid, list | tuple) and grid and all(0 <= noise <= 1 for noise in grid)):
            raise InputError(f"{self.title}: noise_grid is {grid!r}, expected a list of numbers from 0 to 1.")
        self._check_number("outlier_step", 0, 1, open_low=True)

    @property
    def needs_images(self) -> bool:
        return self.noise != 0

    @property
    def needs_validation(self) -> bool:
        return True

    @property
    def extra_passes(self) -> int:
        """1 + 2 L with noise, else 0; before `fit` the noise counts as above 0 and the layers as one if not given."""
        fitted = hasattr(self, "head_")
        if (self.noise_ if fitted else self.noise) == 0:
            return 0
        return 1 + 2 * len(self.layers_ if fitted else self.layers or ("features",))

    @property
    def layers_(self) -> tuple[str, ...]:
        """The layers in use [L].

        Raises
        ------
        InputError : not fitted; a layer that the training bank does not have
        """
        self._check_fitted()
        available = (*next(iter(self.train_bank_.shards())).taps, "features")
        for name in self.layers or ():
            self._check_layer(name, available)
        return available if self.layers is None else tuple(self.layers)

    @property
    def learned(self) -> dict[str, Any]:
        return {
            "noise": self.noise_,
            "layers": self.layers_,
            "weights": self.weights_.tolist(),
            "intercept": self.intercept_,
        }

    @property
    def weights_(self) -> Tensor:
        """w float64 [L]."""
        return self._regression().weights

    @property
    def intercept_(self) -> float:
        """b."""
        return self._regression().intercept

    @property
    def noise_(self) -> float:
        """The noise in use, in pixels."""
        return self._regression().noise

    def _fit(self, train_bank: Bank) -> None:
        found, least = len(self.validation_bank_), 2 * FOLDS
        if found < least:
            raise InputError(
                f"{self.title}: the validation bank has {found} images, expected at least {least} to tune on; take more."
            )
        self.train_bank_ = train_bank
        self._regression()
        self.tuned_on = f"ID validation ({found} images) against FGSM copies of them"

    def _check_layer(self, name: str, available: Sequence[str]) -> None:
        if name not in available:
            raise InputError(
                f"{self.title}: found no layer {name!r} in the bank, expected one of {', '.join(available)}; add it to "
                "features.taps in the config or remove it from layers."
            )

    def _gaussians(self, device: torch.device) -> dict[str, ClassGaussians]:
        """Those of every layer in use."""
        return {
            name: self._cached(("gaussians", name), partial(self._fit_layer, name)).to(device)
            for name in self.layers_
        }

    def _fit_layer(self, name: str) -> ClassGaussians:
        layer = _Layer(self.train_bank_, name)
        return ClassGaussians.fit(layer, self._class_means(layer))

    def _regression(self) -> "_Regression":
        noises = tuple(self.noise_grid) if self.noise is None else (self.noise,)
        key = (self.layers_, noises, self.outlier_step)
        return self._cached(key, lambda: self._tune(noises))

    def _tune(self, noises: tuple[float, ...]) -> "_Regression":
        inside, outside = self._validation_scores(noises)
        candidates = []
        for noise, id_scores, copy_scores in zip(noises, inside, outside, strict=True):
            regression = _Regression.fit(noise, id_scores[::2], copy_scores[::2])
            fpr = fpr_at_tpr(regression.score(id_scores[1::2]), regression.score(copy_scores[1::2]))
            candidates.append((fpr, regression))
        return min(candidates, key=lambda candidate: candidate[0])[1]

    def _validation_scores(self, noises: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """M of the validation images and of their adversarial copies at every noise, each [noises, N, L]."""
        bank, remedy = self.validation_bank_, "give one as validation bank"
        inside, outside = [], []
        with track(description=f"{self.title}, tuning", total=len(bank), unit="image") as bar:
            for shard in bank.shards():
                shard = with_images(shard, self.title, remedy)
                if shard.labels is None:
                    raise InputError(
                        f"{self.title}: the validation bank has no labels, expected those of ID images; add them to the set."
                    )
                gaussians, start = self._gaussians(shard.network.device), 0
                for pixels in shard.pixels():
                    labels = shard.labels[start : start + len(pixels)].to(pixels.device)
                    copies = adversarial_copies(shard.network, pixels, labels, self.outlier_step)
                    inside.append(layer_scores(shard.network, pixels, gaussians, noises).cpu())
                    outside.append(layer_scores(shard.network, copies, gaussians, noises).cpu())
                    start += len(pixels)
                    bar.update(len(pixels))
        return torch.cat(inside, dim=1), torch.cat(outside, dim=1)

    def _score(self, shard: FeatureBank) -> Tensor:
        regression, layers, device = self._regression(), self.layers_, shard.logits.device
        if regression.noise == 0:
            for name in layers:
                self._check_layer(name, (*shard.taps, "features"))
            gaussians = self._gaussians(device)
            columns = [gaussians[name].log_densities(_outputs(shard, name)).amax(dim=1) for name in layers]
            return regression.score(torch.stack(columns, dim=1))
        shard, scores = with_images(shard, self.title, "give one, or set noise to 0"), []
        gaussians = self._gaussians(shard.network.device)
        with track(description=f"{self.title}, {shard.name}", total=len(shard), unit="image") as bar:
            for pixels in shard.pixels():
                (layer,) = layer_scores(shard.network, pixels, gaussians, (regression.noise,))
                scores.append(regression.score(layer))
                bar.update(len(pixels))
        return torch.cat(scores).to(device)


def layer_scores(
    network: PixelNetwork, pixels: Tensor, gaussians: dict[str, ClassGaussians], noises: Sequence[float]
) -> Tensor:
    """M_l of pixels [B, 3, H, W] for every noise and layer, float64 [noises, B, L].

    One pass without noise serves the gradients of all layers, each of which then takes a pass for every noise
    above 0, as far as that layer.
    """
    with torch.enable_grad():
        pixels = pixels.detach().requires_grad_(any(noises))
        outputs = network.pooled(pixels, tuple(gaussians))
        clean = [layer.log_densities(outputs[name]).amax(dim=1) for name, layer in gaussians.items()]
    columns = []
    for (name, layer), scores in zip(gaussians.items(), clean, strict=True):
        if any(noises):
            down = -torch.ones_like(scores)
            (gradient,) = torch.autograd.grad(scores, pixels, down, retain_graph=True)
        column = []
        for noise in noises:
            if noise > 0:
                with torch.no_grad():
                    moved = step_by_sign(pixels, gradient, -noise)
                    column.append(layer.log_densities(network.pooled(moved, (name,))[name]).amax(dim=1))
            else:
                column.append(scores.detach())
        columns.append(torch.stack(column))
    return torch.stack(columns, dim=2)


def adversarial_copies(network: PixelNetwork, pixels: Tensor, labels: Tensor, step: float) -> Tensor:
    """Pixels [B, 3, H, W] moved by the fast gradient sign method so that the cross-entropy of labels [B] rises."""
    return fgsm(pixels, input_gradient(lambda x: error_margin(network.logits(x), labels), pixels), step)


def fgsm(pixels: Tensor, gradient: Tensor, step: float) -> Tensor:
    """min(max(x + step * sign(gradient), 0), 1), with sign(0) = +1 (Goodfellow et al., 2015, arXiv 1412.6572)."""
    return step_by_sign(pixels, gradient, step).clamp(0, 1)


@dataclass(frozen=True)
class _Regression:
    """The log-odds of "out", w . M + b, at a noise."""

    noise: float
    weights: Tensor
    intercept: float

    @classmethod
    def fit(cls, noise: float, inside: Tensor, outside: Tensor) -> "_Regression":
        """From M [n, L] of ID images and of their adversarial copies."""
        # late: importing scikit-learn takes a second
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        scores = torch.cat([inside, outside]).numpy()
        out = np.repeat([0, 1], [len(inside), len(outside)])
        # The solver needs columns of one scale; w and b are for the raw ones.
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        search = GridSearchCV(model, {"logisticregression__C": PENALTIES}, scoring="accuracy", cv=FOLDS)
        scaler, regression = search.fit(scores, out).best_estimator_
        weights = regression.coef_[0] / scaler.scale_
        return cls(noise, torch.from_numpy(weights), float(regression.intercept_[0] - weights @ scaler.mean_))

    def score(self, scores: Tensor) -> Tensor:
        """S = -(w . M + b) of M [N, L] -> [N]."""
        return -(scores @ self.weights.to(scores.device)) - self.intercept


@dataclass(frozen=True)
class _Layer:
    """A bank with the outputs of one layer in place of the features."""

    bank: Bank
    name: str

    def __len__(self) -> int:
        return len(self.bank)

    def shards(self) -> Iterator[FeatureBank]:
        for shard in self.bank.shards():
            yield FeatureBank(_outputs(shard, self.name), shard.logits, shard.labels)


def _outputs(shard: FeatureBank, layer: str) -> Tensor:
    return shard.features if layer == "features" else shard.taps[layer]
