"""Mahalanobis over several layers, weighted by a logistic regression that tunes itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ood_helpers.backbones.pixels import PixelNetwork, fgsm, input_gradient, step_by_sign
from ood_helpers.banks import Bank, FeatureBank, MappedBank, with_images
from ood_helpers.detectors.base import DETECTORS, Detector
from ood_helpers.detectors.mahalanobis import ClassGaussians
from ood_helpers.detectors.odin import error_margin
from ood_helpers.errors import InputError
from ood_helpers.metrics import fpr_at_tpr
from ood_helpers.progress import track

FOLDS = 5  # of the cross-validation that chooses the regression's penalty
PENALTIES = np.logspace(-4, 4, 10)  # inverse penalties C to choose from, scikit-learn's own default


@DETECTORS.register("mahalanobis_ensemble")
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
    regression_ : the noise in use, w float64 [L] and b of the raw M

    MOS clips the adversarial copies to [0, 1] where its pixels run from -1 to 1, which turns all that is darker than
    grey into grey; here they are clipped to the range of pixels.
    """

    layers: Sequence[str] | None = None
    noise: float | None = None
    noise_grid: Sequence[float] = (0.0, 0.005, 0.0025, 0.001, 0.0007, 0.0005, 0.00025)
    outlier_step: float = 0.025

    title: ClassVar[str] = "Mahalanobis (ensemble)"
    source: ClassVar[str] = "Lee et al., NeurIPS 2018, arXiv 1807.03888; protocol of MOS, arXiv 2105.01879"
    tuned_against: ClassVar[str] = "FGSM copies of them"

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
    def extra_passes(self) -> int:
        """1 + 2 L with noise, else 0; before `fit` the noise counts as above 0 and the layers as one if not given."""
        fitted = hasattr(self, "head_")
        if (self.regression_.noise if fitted else self.noise) == 0:
            return 0
        return 1 + 2 * len(self.layers_ if fitted else self.layers or ("features",))

    @property
    def layers_(self) -> tuple[str, ...]:
        """The layers in use [L]. Raises InputError if not fitted or for one that the training bank lacks."""
        self._check_fitted()
        available = (*next(iter(self.train_bank_.shards())).taps, "features")
        for name in self.layers or ():
            self._check_layer(name, available)
        return available if self.layers is None else tuple(self.layers)

    @property
    def learned(self) -> dict[str, Any]:
        found = self.regression_
        values = {"weights": found.weights.tolist(), "intercept": found.intercept}
        return {"noise": found.noise, "layers": self.layers_, **values}

    @property
    def regression_(self) -> "OutlierRegression":
        """The noise in use and its regression; raises InputError if not fitted."""
        noises = self.noise_grid if self.noise is None else (self.noise,)
        key = (self.layers_, tuple(noises), self.outlier_step)
        return self._cached(key, lambda: self._tune(noises))

    def _fit(self, train_bank: Bank) -> None:
        found, least = len(self.validation_bank_), 2 * FOLDS
        if found < least:
            raise InputError(
                f"{self.title}: the validation bank has {found} images, expected at least {least} to tune on; take more."
            )
        self.train_bank_ = train_bank
        _ = self.regression_

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
        def of_layer(shard: FeatureBank) -> FeatureBank:
            return FeatureBank(_outputs(shard, name), shard.logits, shard.labels)

        layer = MappedBank(self.train_bank_, of_layer)
        return ClassGaussians.fit(layer, self._class_means(layer))

    def _tune(self, noises: Sequence[float]) -> "OutlierRegression":
        inside, outside = self._validation_scores(noises)
        candidates = []
        for noise, id_scores, copy_scores in zip(noises, inside, outside, strict=True):
            regression = OutlierRegression.fit(noise, id_scores[::2], copy_scores[::2])
            fpr = fpr_at_tpr(regression.score(id_scores[1::2]), regression.score(copy_scores[1::2]))
            candidates.append((fpr, regression))
        return min(candidates, key=lambda candidate: candidate[0])[1]

    def _validation_scores(self, noises: Sequence[float]) -> tuple[Tensor, Tensor]:
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
        regression, layers, device = self.regression_, self.layers_, shard.logits.device
        if regression.noise == 0:
            for name in layers:
                self._check_layer(name, (*shard.taps, "features"))
            gaussians = self._gaussians(device)
            columns = [gaussians[name].log_densities(_outputs(shard, name)).amax(dim=1) for name in layers]
            return regression.score(torch.stack(columns, dim=1))
        shard = with_images(shard, self.title, "give one, or set noise to 0")
        gaussians = self._gaussians(shard.network.device)

        def score(pixels: Tensor) -> Tensor:
            (at_noise,) = layer_scores(shard.network, pixels, gaussians, (regression.noise,))
            return regression.score(at_noise)

        return self._over_images(shard, score)


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


@dataclass(frozen=True)
class OutlierRegression:
    """The log-odds of "out", w . M + b, at a noise."""

    noise: float
    weights: Tensor
    intercept: float

    @classmethod
    def fit(cls, noise: float, inside: Tensor, outside: Tensor) -> "OutlierRegression":
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


def _outputs(shard: FeatureBank, layer: str) -> Tensor:
    return shard.features if layer == "features" else shard.taps[layer]
