"""The backbone of an experiment: its saved epochs, the weights that trainings start from, its feature maps."""

import pytest
import torch
from safetensors.torch import load_file

from ood_helpers.backbones import load_checkpoint
from ood_helpers.errors import InputError
from ood_helpers.experiment import Experiment

SMALL = [
    "backbone.training.epochs=4",
    "backbone.depth=10",
    "backbone.growth_rate=4",
    "backbone.expected_accuracy=null",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("backbone")


def small(folder, *overrides):
    folders = {"run_dir": str(folder / "runs"), "figures_dir": str(folder / "figures")}
    return Experiment.open("digits", **folders, overrides=[*SMALL, *overrides], device="cpu")


@pytest.fixture
def run(folder):
    """An experiment that finds what earlier ones left behind."""
    return small(folder)


def same(network, weights) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_saved_epochs_and_the_network_at_each(run):
    epochs = run.backbone.epochs()
    assert list(epochs) == [0, 3, 4]
    for epoch, path in epochs.items():
        network = run.backbone.at_epoch(epoch)
        assert same(network, load_file(path)) and not network.training
    assert same(run.backbone.model(), load_file(epochs[4]))
    with pytest.raises(InputError, match=r"digits has saved the epochs \[0, 3, 4\], not 2; .* save_every"):
        run.backbone.at_epoch(2)


def test_start_weights_are_a_copy_that_can_be_trained(run, folder):
    epochs, backbone = run.backbone.epochs(), run.backbone
    best = load_file(epochs[4].with_name("best.safetensors"))
    path = folder / "other.pth"
    torch.save({name: tensor + 1 for name, tensor in best.items()}, path)
    moved = backbone.start(str(path))
    loaded = backbone.start("last")
    load_checkpoint(loaded, path)
    assert same(moved, loaded.state_dict())
    for which, weights in (("last", load_file(epochs[4])), ("best", best), (3, load_file(epochs[3]))):
        network = backbone.start(which)
        assert same(network, weights)
        assert all(parameter.requires_grad for parameter in network.parameters())
        with torch.no_grad():
            network.head.weight.zero_()
        assert same(backbone.start(which), weights)
    with pytest.raises(InputError, match=r"not saved epoch 2, only \[0, 3, 4\] and the best"):
        backbone.start(2)


def test_a_damaged_epoch_is_trained_again(tmp_path, capsys):
    run = small(tmp_path)
    path = run.backbone.epochs()[3]
    before, kept = run.backbone.at_epoch(3), path.read_bytes()
    path.write_bytes(kept[:-100])
    again = run.backbone.at_epoch(3)
    assert "epoch_3.safetensors is damaged and computed again" in capsys.readouterr().err
    assert same(again, before.state_dict()) and path.read_bytes() == kept


def test_a_backbone_that_is_a_checkpoint_has_no_epochs(run, folder):
    path = folder / "backbone.pth"
    torch.save(run.backbone.model().state_dict(), path)
    loaded = small(folder, "backbone.training=null", f"backbone.checkpoint={path}").backbone
    assert loaded.ready() and loaded.epochs() == {} and loaded.history() is None
    assert same(loaded.model(), run.backbone.model().state_dict())
    with pytest.raises(InputError, match="start: best, but the backbone is a checkpoint and has no epochs"):
        loaded.start("best")


def test_feature_maps_pool_to_the_features_of_the_bank(run):
    maps = run.backbone.feature_maps("noise")
    features = run.bank("noise").load().features
    torch.testing.assert_close(maps.mean(dim=(2, 3)), features, rtol=1e-4, atol=1e-5)
    assert run.backbone.feature_maps("noise") is maps
