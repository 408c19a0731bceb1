"""Post-hoc OOD detectors: one file per method. To add one, decorate a dataclass that derives from `Detector`:

    @DETECTORS.register("mine")
    @dataclass
    class Mine(Detector): ...

The papers that train a network have their detectors in their own folders.
"""

from ood_helpers.detectors.base import DETECTORS, Detector, create, variants

__all__ = ["DETECTORS", "Detector", "create", "variants"]
