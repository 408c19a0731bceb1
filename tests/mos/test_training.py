"""Fine-tuning with a flat or a group softmax: the sheet's vectors, exact cached features, depth, batches in parts, resuming."""

import copy

import numpy as np
import pytest
import torch
from interruption import assert_interrupted_training_resumes
from pictures import TRANSFORM, Pictures
from torch import nn

from ood_helpers.backbones import DenseNet
from ood_helpers.banks import FeatureBank
from ood_helpers.data import Transform
from ood_helpers.errors import InputError
from ood_helpers.mos.groups import Groups
from ood_helpers.mos.recipe import ClassifierRecipe
from ood_helpers.mos.training import fine_tune, train_head
from ood_helpers.training.batches import FLAT
from ood_helpers.training.fine_tuning import zero_head

GROUPS = Groups(("first", "second"), ((0, 2), (1,)))
SHORT = (2, 4, 6, 8, 10)


def recipe(**settings) -> ClassifierRecipe:
    """Ten steps of 16 samples; on features unless there are `images`."""
    return ClassifierRecipe(**{"schedule": SHORT, "batch_size": 16, "learning_rate": 0.05} | settings)


def make_network(groups: Groups | None = GROUPS) -> DenseNet:
    torch.manual_seed(0)
    network = DenseNet(3, depth=10, growth_rate=4)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
    network.head = zero_head(network.feature_dim, 3 if groups is None else groups.num_logits)
    return network


def run(
    directory,
    network=None,
    train=None,
    validation=None,
    transform=TRANSFORM,
    groups=GROUPS,
    mixup=None,
    **images,
):
    network = make_network(groups) if network is None else network
    train = Pictures(50, 0) if train is None else train
    return fine_tune(
        network,
        train,
        validation,
        transform,
        recipe(images=images, mixup=mixup),
        groups,
        seed=1,
        device="cpu",
        directory=directory,
    )


# ---- the sheet's vectors -----------------------------------------------------------------------------------


def test_loss_and_gradient_of_the_sheet():
    """H2."""
    groups = Groups(("a", "b"), ((0, 1, 2), (3, 4)))
    logits = torch.tensor(
        [[-2, 4, 1, 0, 3, -1, 0], [3, 0.5, 0, -0.5, 2, 0, -1], [2, 0, 0, 0, -1, 0.5, 3]],
        dtype=torch.float64,
        requires_grad=True,
    )
    labels = torch.tensor([0, 2, 4])
    assert groups.targets(labels).tolist() == [[1, 0], [3, 0], [0, 2]]
    losses = groups.losses(logits, labels)
    expected = [0.068202 + 0.065884, 3.650202 + 0.169846, 0.340753 + 0.095674]
    assert losses.tolist() == pytest.approx(expected, abs=2e-6)
    assert float(losses.detach().mean()) == pytest.approx(1.463520, abs=1e-6)
    (gradient,) = torch.autograd.grad(losses[0], logits)
    expected = [0.002315, -0.065928, 0.046505, 0.017108, -0.063760, 0.017148, 0.046613]
    assert gradient[0].tolist() == pytest.approx(expected, abs=1e-6)
    partners = groups.losses(logits, labels[[2, 0, 1]])
    mixed = 0.3 * losses + 0.7 * partners
    assert float(mixed.detach().mean()) == pytest.approx(4.730187, abs=1e-6)


def test_loss_of_a_head_of_zeros():
    """H3."""
    sizes, ends = (398, 521, 9, 7, 52, 8, 3, 2), np.cumsum((398, 521, 9, 7, 52, 8, 3, 2))
    groups = Groups(
        tuple(map(str, range(8))), tuple(tuple(range(end - size, end)) for size, end in zip(sizes, ends))
    )
    features, labels = torch.rand(4, 6), torch.tensor([0, 500, 998, 999])
    losses = groups.losses(zero_head(6, groups.num_logits)(features), labels)
    assert losses.tolist() == pytest.approx([25.281079] * 4, abs=1e-5)
    losses = FLAT.losses(zero_head(6, 1000)(features), labels)
    assert losses.tolist() == pytest.approx([6.907755] * 4, abs=1e-5)


# ---- training ----------------------------------------------------------------------------------------------


def bank_of(network, pictures) -> FeatureBank:
    inputs = TRANSFORM.normalise(torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2))
    with torch.inference_mode():
        features = network.eval().features(inputs)
    return FeatureBank(features.clone(), torch.zeros(len(features), 3), torch.from_numpy(pictures.labels))


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_head_on_features_is_the_head_on_images(tmp_path, groups):
    network, pictures, held_out = make_network(groups), Pictures(50, 0), Pictures(20, 1)
    head = copy.deepcopy(network.head)
    banks = [lambda: bank_of(network, pictures), lambda: bank_of(network, held_out)]
    on_images = run(tmp_path / "images", network, pictures, held_out, groups=groups)
    options = {"seed": 1, "device": "cpu", "directory": tmp_path / "features"}
    on_features = train_head(head, *banks, len(pictures), recipe(), groups, **options)
    torch.testing.assert_close(head.weight, network.head.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.bias, network.head.bias, rtol=1e-4, atol=1e-5)
    for column in ("train_loss", "validation_loss", "validation_accuracy"):
        assert on_features[column].tolist() == pytest.approx(on_images[column].tolist(), rel=1e-3)
    assert on_features["train_loss"].iloc[-1] < on_features["train_loss"].iloc[0]
    assert on_features["step"].tolist() == list(range(1, 11))


def test_step_is_that_of_plain_gradient_descent(tmp_path):
    """Two steps by hand, without momentum: the second batch is the rest of the images."""
    network, pictures = make_network(), Pictures(10, 0)
    bank, head = bank_of(network, pictures), zero_head(network.feature_dim, GROUPS.num_logits)
    short = recipe(batch_size=6, momentum=0.0, schedule=(1, 2, 3, 4, 5))
    train_head(head, lambda: bank, None, 10, short, GROUPS, seed=7, device="cpu", directory=tmp_path)
    plain = zero_head(network.feature_dim, GROUPS.num_logits)
    for step in range(5):
        order = np.random.default_rng((7, step // 2)).permutation(10)
        rows = order[:6] if step % 2 == 0 else order[6:]
        logits, targets = plain(bank.features[rows]), GROUPS.targets(bank.labels[rows])
        loss = sum(
            nn.functional.cross_entropy(logits[:, start:end], targets[:, k])
            for k, (start, end) in enumerate(GROUPS.slices)
        )
        plain.zero_grad()
        loss.backward()
        rate = 0.0 if step == 0 else 0.05 * 0.1 ** max(0, step - 2)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= rate * parameter.grad
    torch.testing.assert_close(head.weight, plain.weight, rtol=1e-5, atol=1e-6)


def test_a_finished_head_asks_for_no_bank(tmp_path):
    network, options = make_network(), {"seed": 1, "device": "cpu", "directory": tmp_path}
    bank = bank_of(network, Pictures(20, 0))
    train_head(network.head, lambda: bank, lambda: bank, 20, recipe(), GROUPS, **options)
    again = zero_head(network.feature_dim, GROUPS.num_logits)
    fail = lambda: pytest.fail("a bank was read")  # noqa: E731
    train_head(again, fail, fail, 20, recipe(), GROUPS, **options)
    assert torch.equal(again.weight, network.head.weight) and again.weight.abs().max() > 0


@pytest.mark.parametrize(("depth", "opened"), [(0, ()), (1, ("block3", "bn1", "trans2")), (-1, None)])
def test_depth_decides_what_moves(tmp_path, depth, opened):
    network = make_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    run(tmp_path, network, depth=depth)
    for name, tensor in network.state_dict().items():
        statistics = "running" in name or "num_batches" in name
        moves = not statistics and (opened is None or name.startswith(("head", *opened)))
        assert torch.equal(tensor, before[name]) != moves, name


def test_batches_in_parts_end_in_the_same_weights(tmp_path):
    pictures, networks = Pictures(50, 0), [make_network(), make_network()]
    for name, network, size in zip("ab", networks, [None, 5]):
        run(tmp_path / name, network, pictures, depth=1, micro_batch_size=size)
    assert not torch.equal(networks[0].head.weight, torch.zeros_like(networks[0].head.weight))
    for ours, theirs in zip(*(network.parameters() for network in networks)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_interrupted_training_ends_in_the_same_bytes(tmp_path):
    options = {"mixup": 0.5, "depth": 1, "flip": True, "crop_padding": 1}
    assert_interrupted_training_resumes(
        lambda folder, validation: run(folder, validation=validation, **options), tmp_path, pictures=9
    )


def test_training_images_are_cropped_from_larger_ones(tmp_path):
    shapes = set()
    network = make_network()
    network.register_forward_hook(lambda module, inputs, output: shapes.add(tuple(inputs[0].shape[2:])))
    transform = Transform(**dict(TRANSFORM) | {"resize": (8, 8)})
    run(tmp_path, network, Pictures(20, 0, decoded=True), transform=transform, resize=[10, 12])
    assert shapes == {(8, 8)}
    with pytest.raises(InputError, match=r"resized to \[7, 12\], expected at least .* \[8, 8\]"):
        run(tmp_path / "small", transform=transform, resize=[7, 12])
    with pytest.raises(InputError, match="a transform that does not fix the size"):
        run(tmp_path / "free", resize=[10, 12])


def test_depth_beyond_the_backbone_is_refused(tmp_path):
    with pytest.raises(InputError, match="depth 4, expected 0 to 3, the number of blocks"):
        run(tmp_path, depth=4)


def test_labels_beyond_the_groups_are_refused(tmp_path):
    pictures = Pictures(20, 0)
    pictures.labels = pictures.labels + 1
    with pytest.raises(InputError, match="labels 1 to 3, expected 0 to 2"):
        run(tmp_path, train=pictures)
