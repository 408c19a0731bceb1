"""A small experiment on the embedded digits, with every kind of row, and the same experiment from files."""

from pathlib import Path

import numpy as np
import torch
import yaml

from ood_helpers.experiment import Experiment

OOD_SETS = ("letters", "chimeras", "photographs", "textures", "noise")
TIMES = ["score_seconds", "fit_seconds"]
SMALL = [
    "backbone.training.epochs=2",
    "backbone.depth=10",
    "backbone.growth_rate=12",
    "backbone.expected_accuracy=null",
    "metrics.bootstrap_resamples=50",
    "features.shard_size=64",
    "mahalanobis_ensemble.noise_grid=[0.0, 0.001]",
    "mahalanobis_flat.noise_grid=[0.0]",
    "networks.group.schedule=[10, 20, 30, 40, 50]",
    "networks.flat.schedule=[10, 20, 30, 40, 50]",
    "networks.dfb.schedule=[2, 4, 6, 8, 10]",
    "networks.dfb.masks.scales=[1.0]",
    "networks.um={method: unleashing_mask, id_loss: {constraint: 0.3}, epochs: 2, batch_size: 64}",
    "networks.umap={method: unleashing_mask, id_loss: {constraint: 0.3}, masks: {keep_rate: 0.9}, epochs: 2, batch_size: 64}",
    "outliers.images.count=40",
    "ablations={}",
    "tuning.images.count=100",
    "tuning.grids={react: {percentile: [70.0, 99.0]}, line: {delta: [0.5, null], weight_percentile: [10, 90]}}",
    *(f"ood.{name}.images.count=80" for name in OOD_SETS),
]


def small(folder: Path, *overrides: str, **options) -> Experiment:
    folders = {"run_dir": str(folder / "runs"), "figures_dir": str(folder / "figures")}
    return Experiment.open("digits", **folders, overrides=[*SMALL, *overrides], device="cpu", **options)


def npz_experiment(folder: Path) -> Path:
    """Write the small experiment's images as npz files, its network as a checkpoint, and spoilt.yaml, which reads them.
    Returns the folder of the data."""
    source = small(folder)
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for name in ("train", "test", "letters", "noise"):
        image_set = source.image_set(name)
        arrays = {"images": np.asarray(image_set.array)}
        if image_set.labels is not None and name in ("train", "test"):
            arrays |= {"labels": image_set.labels, "class_names": np.array([str(i) for i in range(10)])}
        np.savez_compressed(data / f"{name}.npz", **arrays)
    torch.save({"state_dict": source.backbone.model().cpu().state_dict()}, data / "weights.pth")
    npz = {
        name: {"source": "npz", "path": "${data_root}/" + f"{name}.npz"}
        for name in ("train", "test", "letters", "noise")
    }
    short = {"method": "unleashing_mask", "id_loss": {"constraint": 0.3}, "epochs": 1, "batch_size": 64}
    config = {
        "name": "spoilt",
        "id": {"name": "digits", "num_classes": 10, "class_names": [str(i) for i in range(10)], "train": npz["train"], "test": npz["test"]},
        "ood": [{"name": "letters", "group": "near", "images": npz["letters"]}, {"name": "noise", "group": "far", "images": npz["noise"]}],
        "transform": source.config.transform.model_dump(mode="json"),
        "backbone": {
            "architecture": "densenet_bc",
            "depth": 10,
            "growth_rate": 12,
            "checkpoint": "${data_root}/weights.pth",
            "expected_accuracy": source.check_accuracy(),
        },
        "metrics": {"bootstrap_resamples": 20},
        "detectors": {
            name: row for name, row in source.config.detectors.items() if not name.startswith("mahalanobis_") or name.endswith(("um", "umap"))
        },
        "features": {"taps": source.config.features.taps},
        "networks": {
            "group": {"groups": {"strategy": "taxonomy", "file": "digits"}, "schedule": [10, 20, 30, 40, 50]},
            "flat": {"schedule": [10, 20, 30, 40, 50]},
            "dfb": {"method": "dense", "schedule": [2, 4, 6, 8, 10], "masks": {"scales": [1.0]}},
            "um": short,
            "umap": {**short, "masks": {"keep_rate": 0.9}},
        },
    }  # fmt: skip
    (folder / "spoilt.yaml").write_text(yaml.safe_dump(config))
    return data


def one_sentence(error) -> str:
    """The text of an error, which must be one sentence."""
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text
