"""An experiment as data: models of configs/*.yaml, and their loader."""

from ood_helpers.config.base import CONFIG_DIRECTORY, PROJECT_ROOT, Model, resolve_path
from ood_helpers.config.experiment import ExperimentConfig, FeaturesConfig
from ood_helpers.config.loader import config_names, load_config

__all__ = [
    "CONFIG_DIRECTORY",
    "PROJECT_ROOT",
    "ExperimentConfig",
    "FeaturesConfig",
    "Model",
    "config_names",
    "load_config",
    "resolve_path",
]
