"""DFB: any score of the foreground classes, joined with the logit of a background class."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor

from ood_helpers.banks import Bank, FeatureBank, ImageBank
from ood_helpers.detectors.base import DETECTORS, Detector, create
from ood_helpers.errors import InputError

BACKGROUNDS = ("logit", "log_softmax")


class _WithBackground(Detector):
    """What DFB and its background alone share: sigma, h and the check of the bank."""

    sigma: int
    background: str

    source: ClassVar[str] = "Ding and Pang, ACM MM 2024, arXiv 2303.08727"
    default_network: ClassVar[str] = "dfb"
    needs_background: ClassVar[bool] = True

    def _check(self) -> None:
        if isinstance(self.sigma, bool) or self.sigma not in (1, -1):
            raise InputError(f"{self.title}: sigma is {self.sigma!r}, expected 1 or -1.")
        self._check_choice("background", BACKGROUNDS)

    def background_scores(self, bank: Bank) -> Tensor:
        """S_bg = sigma * h [N] of a bank, float64, before any division; raises like `score_samples`."""
        return self._over_shards(bank, self._signed_background, "background scores")

    def _fit(self, train_bank: Bank) -> None:
        self._background_of(next(iter(train_bank.shards())))

    def _signed_background(self, shard: FeatureBank) -> Tensor:
        background = self._background_of(shard).double()
        if self.background == "log_softmax":
            logits = torch.cat([shard.logits, background[:, None]], dim=1)
            background = logits.log_softmax(dim=1)[:, -1]
        return self.sigma * background

    def _background_of(self, shard: FeatureBank) -> Tensor:
        if shard.background is None:
            raise InputError(
                f"{self.title}: found a bank without the logit of a background, expected one with it; score a network "
                "with method: dense (networks in the config)."
            )
        return shard.background


@DETECTORS.register("dfb_background")
@dataclass
class DFBBackground(_WithBackground):
    """Score S = sigma * h: the background's logit alone, the part that `DFB` adds to its host.

    Hyper-parameters
    ----------------
    sigma, background : as for `DFB`
    """

    sigma: int = 1
    background: str = "logit"

    title: ClassVar[str] = "DFB background"

    @property
    def learns(self) -> bool:
        return False

    def _score(self, shard: FeatureBank) -> Tensor:
        return self._signed_background(shard)


@DETECTORS.register("dfb")
@dataclass
class DFB(_WithBackground):
    """Score S = S_fg + S_bg / T_bg with S_bg = sigma * h: what the host says of the foreground, and the background's logit.

    S_fg is the score of the host, any other detector, which sees the K foreground classes only: their logits, and the
    rows of the head that give them. h is high on ID background, so with sigma = +1 a low h, foreign background, counts
    against an image; sigma = -1 is the control, for OOD objects that the network takes for background.

    The bank has K logits and, beside them, the `background`; for a host that needs images it is an ImageBank whose network
    has the K outputs. The head has the K foreground classes.

    Hyper-parameters
    ----------------
    host : the name of a detector, or {"detector": name, hyper-parameter: value, ...}; "label" renames it in tables
    sigma : +1 or -1
    temperature : T_bg, above 0; None = std of S_bg / std of S_fg over the ID training images, whatever their scales are
    background : "logit" = h; "log_softmax" = log of the softmax of all K + 1 logits at the background, at most 0

    Learned, for the present hyper-parameters
    -----------------------------------------
    host_ : the fitted host
    temperature_ : the T_bg in use

    `fit` keeps a reference to the training bank (`train_bank_`), from which a host that is set later is fitted.

    The paper leaves sign, scale and form of the sum open; these are the kit's. The "ODIN" of its public code has no
    input noise: it is the host {"detector": "odin", "temperature": 2, "noise": 0}.
    """

    host: str | dict[str, Any] = "msp"
    sigma: int = 1
    temperature: float | None = 1.0
    background: str = "logit"

    title: ClassVar[str] = "DFB"

    @property
    def label(self) -> str:
        return f"{self.host_label} + DFB"

    @property
    def host_label(self) -> str:
        """The host's name in tables."""
        return self._host_settings()[1].get("label", self.make_host().label)

    def _check(self) -> None:
        super()._check()
        if self.temperature is not None:
            self._check_number("temperature", 0, inf, open_low=True)
        self.make_host()

    def make_host(self) -> Detector:
        """The host of the present hyper-parameters, not fitted.

        Raises
        ------
        InputError : unknown name or hyper-parameter, value out of range, a method that has no foreground score
        """
        name, settings = self._host_settings()
        settings.pop("label", None)
        try:
            host = create(name, **settings)
        except InputError as error:
            raise InputError(f"{self.title}: host: {error}") from None
        if host.softmax != "flat" or host.needs_background:
            what = "the background itself" if host.needs_background else f"a {host.softmax} softmax"
            raise InputError(
                f"{self.title}: host is {name!r}, which scores {what}, expected a method that scores the foreground classes "
                "by a flat softmax, logits or features; name another, such as msp."
            )
        return host

    def _host_settings(self) -> tuple[str, dict[str, Any]]:
        settings = {"detector": self.host} if isinstance(self.host, str) else self.host
        if not (isinstance(settings, Mapping) and isinstance(settings.get("detector"), str)):
            raise InputError(
                f"{self.title}: host is {self.host!r}, expected the name of a detector, or a mapping with its name under the "
                "key detector and its hyper-parameters."
            )
        settings = dict(settings)
        return settings.pop("detector"), settings

    @property
    def learns(self) -> bool:
        return self.temperature is None or self.make_host().learns

    @property
    def needs_images(self) -> bool:
        return self.make_host().needs_images

    @property
    def needs_training_images(self) -> bool:
        return self.temperature is None and self.needs_images

    @property
    def needs_validation(self) -> bool:
        return self.make_host().needs_validation

    @property
    def fit_set(self) -> str:
        return self.make_host().fit_set

    @property
    def extra_passes(self) -> int:
        return (self.host_ if hasattr(self, "head_") else self.make_host()).extra_passes

    @property
    def parts(self) -> dict[str, Detector]:
        """S_fg and S_bg, as detectors that are not fitted."""
        return {
            "foreground": self.make_host(),
            "background": DFBBackground(sigma=self.sigma, background=self.background),
        }

    @property
    def learned(self) -> dict[str, Any]:
        learned = {"temperature": self.temperature_} if self.temperature is None else {}
        host = self.host_.learned
        return learned | ({"host": host} if host else {})

    def hyperparameters(self) -> dict[str, Any]:
        """The fields and their present values, and all those of the host, ready for JSON."""
        name, _ = self._host_settings()
        return {**asdict(self), "host": {"detector": name, **self.make_host().hyperparameters()}}

    @property
    def host_(self) -> Detector:
        """The host of the present hyper-parameters, fitted when it is first asked for.

        Raises
        ------
        InputError : not fitted; as the host's `fit`
        """
        self._check_fitted()
        host = self.make_host()
        if host.fit_set != self._fitted_on:
            raise InputError(
                f"{self.title}: found a host that learns from the {host.fit_set} set after a fit to the {self._fitted_on} "
                "set, expected the same; call fit again."
            )
        return self._cached(
            ("host", repr(host)), lambda: host.fit(self.train_bank_, self.head_, self.validation_bank_)
        )

    @property
    def temperature_(self) -> float:
        """The T_bg in use.

        Raises
        ------
        InputError : not fitted; to be learned, but one of the scores does not vary, or the host needs images that the
            training bank does not have
        """
        self._check_fitted()
        if self.temperature is not None:
            return self.temperature
        return self._cached(("temperature", repr(self.host_), self.background), self._learn_temperature)

    def _learn_temperature(self) -> float:
        if self.needs_images and not isinstance(self.train_bank_, ImageBank):
            raise InputError(
                f"{self.title}: temperature is None and the host {self.host_.title} needs images, expected an ImageBank of "
                "the training images to learn it from; give a number."
            )
        scores = self.background_scores(self.train_bank_), self.foreground_scores(self.train_bank_)
        background, foreground = (float(score.std(correction=0)) for score in scores)
        temperature = background / foreground if foreground else inf
        if not (isfinite(temperature) and temperature > 0):
            raise InputError(
                f"{self.title}: the standard deviations of background and foreground score over the training images are "
                f"{background:g} and {foreground:g}, expected both above 0 to learn temperature from; give a number."
            )
        return temperature

    def _fit(self, train_bank: Bank) -> None:
        super()._fit(train_bank)
        self.train_bank_, self._fitted_on = train_bank, self.fit_set
        if self.validation_bank_ is not None:
            self._check_network(self.validation_bank_)
        _ = self.host_, self.temperature_  # what they refuse is refused here

    def foreground_scores(self, bank: Bank) -> Tensor:
        """S_fg [N] of a bank, float64: the score of the host; raises like `score_samples`."""
        self._check_network(bank)
        return self.host_.score_samples(bank)

    def score_samples(self, bank: Bank) -> Tensor:
        """Scores [N], see `Detector`; refuses a bank without background, too, and what the host refuses."""
        # The background first: its checks of the bank name this method, not the host.
        background = self.background_scores(bank)
        return self.join({"background": background, "foreground": self.foreground_scores(bank)})

    def join(self, scores: Mapping[str, Tensor]) -> Tensor:
        """S_fg + S_bg / T_bg [N] of the scores of the two parts."""
        joined = scores["foreground"] + scores["background"] / self.temperature_
        self._check_finite(joined, "scores", 0)
        return joined

    def _check_network(self, bank: Bank) -> None:
        """The gradients of a network that still has the background would be those of a softmax with it."""
        if isinstance(bank, ImageBank):
            found, expected = bank.network.network.num_classes, self.head_.num_logits
            if found != expected:
                raise InputError(
                    f"{self.title}: the network of the images has {found} outputs, expected the {expected} of the foreground "
                    "classes; pass its foreground_classifier."
                )
