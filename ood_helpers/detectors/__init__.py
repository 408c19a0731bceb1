"""Post-hoc OOD detectors: one file a method, and the registry that configs and notebooks create them from.

To add a method, write a dataclass that derives from `Detector` and register it: `DETECTORS["mine"] = Mine`.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ood_helpers.detectors.ash import ASH
from ood_helpers.detectors.base import Detector
from ood_helpers.detectors.dfb import DFB, DFBBackground
from ood_helpers.detectors.dice import DICE, DICEReAct
from ood_helpers.detectors.energy import Energy, energy_score
from ood_helpers.detectors.gen import GEN
from ood_helpers.detectors.gradnorm import GradNorm
from ood_helpers.detectors.himplos import HIMPLoS
from ood_helpers.detectors.kl_matching import KLMatching
from ood_helpers.detectors.knn import KNN
from ood_helpers.detectors.line import LINe
from ood_helpers.detectors.mahalanobis import Mahalanobis, MahalanobisEnsemble
from ood_helpers.detectors.max_logit import MaxLogit
from ood_helpers.detectors.mos import MOS
from ood_helpers.detectors.msp import MSP
from ood_helpers.detectors.odin import ODIN
from ood_helpers.detectors.pytorch_ood import PREFIX, PyTorchOOD
from ood_helpers.detectors.react import ReAct
from ood_helpers.detectors.scale import Scale
from ood_helpers.detectors.vim import ViM
from ood_helpers.errors import InputError, nearest

__all__ = [
    "ASH",
    "DETECTORS",
    "DFB",
    "DICE",
    "GEN",
    "KNN",
    "MOS",
    "MSP",
    "ODIN",
    "DFBBackground",
    "DICEReAct",
    "Detector",
    "Energy",
    "GradNorm",
    "HIMPLoS",
    "KLMatching",
    "LINe",
    "Mahalanobis",
    "MahalanobisEnsemble",
    "MaxLogit",
    "PyTorchOOD",
    "ReAct",
    "Scale",
    "ViM",
    "create",
    "create_all",
    "energy_score",
]

DETECTORS: dict[str, type[Detector]] = {
    "msp": MSP,
    "max_logit": MaxLogit,
    "energy": Energy,
    "gen": GEN,
    "kl_matching": KLMatching,
    "gradnorm": GradNorm,
    "odin": ODIN,
    "mahalanobis": Mahalanobis,
    "mahalanobis_ensemble": MahalanobisEnsemble,
    "knn": KNN,
    "vim": ViM,
    "react": ReAct,
    "dice": DICE,
    "dice_react": DICEReAct,
    "ash": ASH,
    "scale": Scale,
    "himplos": HIMPLoS,
    "line": LINe,
    "mos": MOS,
    "dfb": DFB,
    "dfb_background": DFBBackground,
}


def create(name: str, **hyperparameters: Any) -> Detector:
    """A detector by its name in `DETECTORS`, or by one such as `pytorch_ood.KNN`, not yet fitted.

    Raises
    ------
    InputError : unknown name, unknown hyper-parameter, value out of range
    """
    if str(name).startswith(PREFIX):
        return PyTorchOOD(name.removeprefix(PREFIX), hyperparameters)
    if name not in DETECTORS:
        raise InputError(f"There is no detector {name!r}; {nearest(str(name), DETECTORS)}")
    known = [field.name for field in fields(DETECTORS[name])]
    for key in hyperparameters:
        if key not in known:
            hint = nearest(str(key), known) if known else "it has none."
            raise InputError(f"The detector {name!r} has no hyper-parameter {key!r}; {hint}")
    return DETECTORS[name](**hyperparameters)


def create_all(detectors: Mapping[str, Mapping[str, Any]]) -> dict[str, Detector]:
    """The detectors of an experiment: row name -> hyper-parameters, in order.

    Three keys are no hyper-parameters: `detector`, the name in `DETECTORS` where it is not the row name; `network`, the
    one of the experiment's networks that is scored (default: the backbone, for MOS `group`, for DFB `dfb`); and `label`,
    the name shown in tables and figures (default: the method's own and the network's where it is not the default). For
    example `{"him_only": {"detector": "himplos", "smoothing": False, "label": "HIM only"}}`.

    Raises
    ------
    InputError : as `create`, or two rows with the same label
    """
    created: dict[str, Detector] = {}
    for row, settings in detectors.items():
        settings = dict(settings)
        name, label = settings.pop("detector", row), settings.pop("label", None)
        network = settings.pop("network", None)
        try:
            detector = create(name, **settings)
        except InputError as error:
            raise InputError(f"detectors.{row}: {error}") from None
        if network is not None and network != detector.network:
            own, closing = detector.label.removesuffix(")"), detector.label.endswith(")")
            detector.network, detector.label = (
                network,
                f"{own}, {network})" if closing else f"{own} ({network})",
            )
        if label is not None:
            detector.label = str(label)
        for other, earlier in created.items():
            if earlier.label == detector.label:
                raise InputError(
                    f"The detectors {other!r} and {row!r} have the same label {detector.label!r}, expected distinct ones; "
                    f"give one of them its own, for example label: {row}."
                )
        created[row] = detector
    return created
