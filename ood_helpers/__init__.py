"""Helpers behind the notebooks: image sets, backbones, feature banks, OOD detectors, metrics and figures."""
