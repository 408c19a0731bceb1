"""torchvision's networks as classifiers, and its weights: taken from torch's hub folder, or downloaded."""

import pytest
import torch
import torchvision
from pydantic import TypeAdapter

from ood_helpers.backbones import Classifier, build
from ood_helpers.config.backbones import BackboneConfig
from ood_helpers.errors import InputError, MissingDataError


def network_of(num_classes: int, **config) -> Classifier:
    torch.manual_seed(0)
    return build(TypeAdapter(BackboneConfig).validate_python(config), num_classes).eval()


@pytest.mark.parametrize("architecture", ["resnet50", "mobilenet_v2"])
def test_wrapped_network_computes_what_torchvision_does(architecture):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, architecture)(num_classes=5).eval()
    ours = network_of(5, architecture=architecture, checkpoint="unused")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_torchvision_weights_come_from_the_hub_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    (tmp_path / "checkpoints").mkdir()
    theirs = torchvision.models.mobilenet_v2()
    torch.save(theirs.state_dict(), tmp_path / "checkpoints" / name)
    network = network_of(1000, architecture="mobilenet_v2", weights="IMAGENET1K_V1")
    assert torch.equal(network.head.weight, theirs.classifier[1].weight)
    assert torch.equal(network.layers[0][0].weight, theirs.features[0][0].weight)


def test_torchvision_weights_that_cannot_be_had(tmp_path, monkeypatch):
    def no_network(url, path, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(
        MissingDataError, match=r"no route to host.*put this file at .*resnet50-[0-9a-f]+\.pth"
    ):
        network_of(1000, architecture="resnet50", weights="IMAGENET1K_V1")
    with pytest.raises(InputError, match=r"did you mean 'IMAGENET1K_V[12]'"):
        network_of(1000, architecture="resnet50", weights="IMAGENET1K_V3")
    with pytest.raises(InputError, match="have 1000 classes, the experiment has num_classes=10"):
        network_of(10, architecture="resnet50", weights="IMAGENET1K_V1")
