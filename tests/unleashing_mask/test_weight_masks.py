"""Masks over weights: the sheet's vectors, their gradients, when they are made anew, and what is left when they go."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ood_helpers.backbones import DenseNet, weights_fingerprint
from ood_helpers.errors import InputError
from ood_helpers.unleashing_mask.weight_masks import (
    BATCH_NORM_BEFORE,
    apply_masks,
    attach_masks,
    detach_masks,
    freeze_weights,
    keep_largest,
    masks_of,
    number_dropped,
    random_masks,
)

SCORES = torch.tensor(
    [[0.30, -0.90, 0.05, 0.40], [-0.10, 0.75, -0.20, 0.60], [0.15, -0.55, 0.85, -0.02]], dtype=torch.float64
)  # V2
WEIGHT = torch.tensor(
    [[0.5, -1, 2, 0.1], [1.5, 0.3, -0.7, 0.2], [-0.4, 0.8, 0.6, -1.2]], dtype=torch.float64
)  # V3
LOGITS, LABEL = torch.tensor([[-1.35, 1.40, 0.50]], dtype=torch.float64), torch.tensor([1])
IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_network() -> DenseNet:
    torch.manual_seed(0)
    return DenseNet(3, depth=10, growth_rate=4).eval()


def snapshot(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_same_state(found: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = found.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def masked_linear() -> nn.Sequential:
    """The layer of V3 with the scores of V2."""
    layer = nn.Linear(4, 3).double()
    with torch.no_grad():
        layer.weight.copy_(WEIGHT)
        layer.bias.copy_(torch.tensor([0.1, 0, -0.1]))
    network = nn.Sequential(layer)
    attach_masks(network, 0.75, generator())
    with torch.no_grad():
        masks_of(network)["0"].scores.copy_(SCORES)
    return network


def backward(network: nn.Module) -> torch.Tensor:
    logits = network(torch.tensor([[1, 2, -1, 0.5]], dtype=torch.float64))
    F.cross_entropy(logits, LABEL).backward()
    return logits.detach()


# ---- number and place of the dropped weights ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_rate", "counts"),
    [
        (0.8, {10: 1, 20: 3, 100: 19, 648: 129, 1152: 230, 3420: 683, 5184: 1036, 12: 2}),
        (0.965, {100: 3, 648: 22, 3420: 119, 5184: 181, 12: 0}),
        (0.9, {10: 0, 20: 1}),
        (0.7, {10: 3}),
        (0.75, {12: 3}),
        (0.5, {12: 6}),
        (0.1, {12: 10}),
        (1.0, {12: 0}),
    ],
)
def test_truncated_numbers(keep_rate, counts):  # V2
    assert {count: number_dropped(count, keep_rate, "truncated") for count in counts} == counts


@pytest.mark.parametrize(
    ("keep_rate", "counts"),
    [
        (0.8, {10: 2, 20: 4, 100: 20, 648: 130, 1152: 230, 3420: 684, 5184: 1037, 12: 2}),
        (0.965, {100: 4, 300: 10, 648: 23, 3420: 120, 5184: 181}),  # 3.5 and 10.5: to the even number
        (0.9, {10: 1, 20: 2}),
        (0.75, {2: 0, 6: 2}),  # 0.5 and 1.5
        (1.0, {12: 0}),
    ],
)
def test_nearest_numbers(keep_rate, counts):
    assert {count: number_dropped(count, keep_rate) for count in counts} == counts


@pytest.mark.parametrize("keep_rate", [0, 1.5, -0.1, math.nan])
def test_keep_rate_out_of_range(keep_rate):
    network = make_network()
    before = snapshot(network)
    message = rf"Found keep_rate {keep_rate}, expected a share above 0 and at most 1"
    with pytest.raises(InputError, match=message):
        attach_masks(network, keep_rate, generator())
    with pytest.raises(InputError, match=message), random_masks(network, keep_rate, generator()):
        pytest.fail("masked all the same")
    assert_same_state(network, before)


@pytest.mark.parametrize(
    ("dropped", "mask"),
    [
        (0, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),
        (2, [[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 0]]),
        (3, [[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 0]]),
        (6, [[0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 1, 0]]),
        (10, [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]),
        (12, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
    ],
)
def test_masks_of_scores(dropped, mask):  # V2
    found = keep_largest(SCORES, dropped)
    assert found.tolist() == mask and found.dtype == SCORES.dtype


def test_of_equal_scores_the_first_are_dropped_in_any_memory_format():
    scores = torch.tensor([0.5, -0.5, 0.5, 0.5, 1, -1, 1, 1]).reshape(2, 1, 2, 2).repeat(1, 3, 1, 1)
    mask = keep_largest(scores, 7)
    assert mask.flatten().tolist() == [0] * 7 + [1] * 17
    assert torch.equal(keep_largest(scores.contiguous(memory_format=torch.channels_last), 7), mask)


def test_random_scores_are_uniform_within_the_bound():  # V2
    network = nn.Sequential(nn.Conv2d(3, 200, 3), nn.Linear(342, 200))
    attach_masks(network, 0.8, generator())
    for mask, bound in zip(masks_of(network).values(), (0.192450, 0.054074)):
        scores = mask.scores.detach() / bound
        assert scores.abs().max() <= 1 + 1e-5 and scores.max() > 0.99 and scores.min() < -0.99
        assert abs(float(scores.mean())) < 0.03 and float(scores.square().mean()) == pytest.approx(
            1 / 3, abs=0.02
        )


def test_scores_are_seeded_or_the_weights():
    drawn = []
    for seed in (4, 4, 5):
        attach_masks(network := make_network(), 0.8, generator(seed))
        drawn.append(torch.cat([mask.scores.detach().flatten() for mask in masks_of(network).values()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    weights = snapshot(network := make_network())
    attach_masks(network, 0.8, generator(), initial_scores="magnitude")
    for name, mask in masks_of(network).items():
        magnitudes = weights[f"{name}.weight"].abs()
        assert torch.equal(mask.scores, weights[f"{name}.weight"])
        kept = mask.mask() == 1
        assert magnitudes[~kept].max() <= magnitudes[kept].min()


# ---- gradients ---------------------------------------------------------------------------------------------


SCORE_GRADIENT = [
    [0.021737, 0.086947, -0.086947, 0.002174],
    [0.479937, -0.191975, 0.223971, -0.031996],
    [-0.110594, -0.442375, -0.165891, 0.165891],
]


def test_straight_through_gradients():  # V3
    network = masked_linear()
    logits = backward(network)
    torch.testing.assert_close(logits, LOGITS)
    assert float(F.cross_entropy(logits, LABEL)) == pytest.approx(0.385601, abs=1e-6)
    expected = torch.tensor(SCORE_GRADIENT, dtype=torch.float64)
    torch.testing.assert_close(masks_of(network)["0"].scores.grad, expected, atol=1e-6, rtol=0)
    of_weight = [
        [0.043474, 0.086947, 0, 0.021737],
        [0, -0.639916, 0.319958, -0.159979],
        [0.276484, 0.552969, -0.276484, 0],
    ]
    found = network[0].parametrizations.weight.original.grad
    torch.testing.assert_close(found, torch.tensor(of_weight, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_score_of_zero_has_no_gradient():
    network = masked_linear()
    with torch.no_grad():
        masks_of(network)["0"].scores[1, 0] = 0
    backward(network)
    gradient = masks_of(network)["0"].scores.grad
    assert gradient[1, 0] == 0 and (gradient != 0).sum() == 11


@pytest.mark.parametrize(
    ("learning_rate", "scores", "mask"),
    [
        (
            0.1,
            [
                [0.297823, -0.908686, 0.058694, 0.399779],
                [-0.147993, 0.769190, -0.222395, 0.603194],
                [0.161058, -0.505757, 0.866581, -0.036589],
            ],
            [[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 0]],
        ),
        (
            1,
            [
                None,
                [-0.579927, 0.941900, -0.423951, 0.631936],
                [0.260579, -0.107570, 1.015806, -0.185889],
            ],
            [[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 1, 0]],
        ),
    ],
)
def test_first_step_of_the_scores(learning_rate, scores, mask):  # V3
    network = masked_linear()
    freeze_weights(network)
    learned = masks_of(network)["0"]
    backward(network)
    torch.optim.SGD([learned.scores], lr=learning_rate, momentum=0.9, weight_decay=1e-4).step()
    for found, expected in zip(learned.scores, scores):
        if expected is not None:
            assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert learned.mask().tolist() == mask
    torch.testing.assert_close(network[0].weight, WEIGHT * torch.tensor(mask))


def test_only_scores_of_frozen_weights_have_gradients():
    network = make_network()
    attach_masks(network, 0.8, generator())
    freeze_weights(network)
    learned = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert learned == {f"{name}.parametrizations.weight.0.scores" for name in masks_of(network)}


# ---- masks of a network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "truncated"])
def test_every_convolution_and_linear_layer_is_masked_and_nothing_else(rounding):
    network = make_network()
    before = snapshot(network)
    attach_masks(network, 0.8, generator(), rounding=rounding)
    masked = masks_of(network)
    expected = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert list(masked) == expected and expected[0] == "conv1" and expected[-1] == "head"
    for name, mask in masked.items():
        weight = network.get_submodule(name).weight
        dropped = number_dropped(weight.numel(), 0.8, rounding)
        assert (weight == 0).sum() == (mask.mask() == 0).sum() == dropped > 0
        assert torch.equal(weight[weight != 0], before[f"{name}.weight"][weight != 0])
    assert torch.equal(network.head.bias, before["head.bias"])
    assert torch.equal(network.bn1.weight, before["bn1.weight"])
    with pytest.raises(InputError, match="has masks already"):
        attach_masks(network, 0.8, generator())


def test_masks_are_made_anew_only_when_scores_changed():
    network = make_network()
    attach_masks(network, 0.8, generator())
    learned = masks_of(network)

    def masks() -> dict[str, torch.Tensor]:
        network(IMAGES)
        return {name: mask.mask() for name, mask in learned.items()}

    with torch.inference_mode():
        first = masks()
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(IMAGES).square().sum().backward()  # with masks made in inference mode
    assert all(mask is first[name] for name, mask in masks().items())
    optimizer.step()
    before, moved = network.eval()(IMAGES).detach(), masks()
    for name, mask in moved.items():
        assert mask is not first[name]
        assert torch.equal(mask, keep_largest(learned[name].scores, learned[name].dropped))
    saved = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        learned["head"].scores.neg_().add_(0.01)
    assert [name for name, mask in masks().items() if mask is not moved[name]] == ["head"]
    network.load_state_dict(saved)
    assert torch.equal(network(IMAGES), before)


def trained(keep_rate: float = 0.7, frozen: bool = True) -> DenseNet:
    network = make_network()
    attach_masks(network, keep_rate, generator(1))
    if frozen:
        freeze_weights(network)
    network.to(memory_format=torch.channels_last).train()
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.5, momentum=0.9, weight_decay=1e-4)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(network(IMAGES), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
        optimizer.step()
    return network.eval()


def test_detached_the_network_is_the_old_one_bit_for_bit():
    original, network = make_network(), trained()
    assert not torch.equal(network.bn1.running_mean, original.bn1.running_mean)
    assert not torch.allclose(network(IMAGES), original(IMAGES), atol=1e-3)
    detach_masks(network)
    assert masks_of(network) == {} and type(network.conv1) is nn.Conv2d
    assert_same_state(network, snapshot(original))
    assert weights_fingerprint(network) == weights_fingerprint(original)
    original.to(memory_format=torch.channels_last)
    assert torch.equal(network(IMAGES), original(IMAGES))


def test_applied_the_network_has_the_outputs_it_had_with_masks():
    network = trained()
    outputs, masks = network(IMAGES), {name: mask.mask() for name, mask in masks_of(network).items()}
    statistics = network.bn1.running_mean.clone()
    apply_masks(network)
    assert masks_of(network) == {} and network.state_dict().keys() == make_network().state_dict().keys()
    assert torch.equal(network(IMAGES), outputs)
    assert torch.equal(network.bn1.running_mean, statistics)
    for name, mask in masks.items():
        assert torch.equal(network.get_submodule(name).weight == 0, mask == 0)


def test_state_of_a_masked_network_can_be_loaded_into_another():
    network, other = trained(), make_network()
    attach_masks(other, 0.7, generator(9))
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(other(IMAGES), network(IMAGES), rtol=1e-5, atol=1e-6)
    assert any(BATCH_NORM_BEFORE in name for name in network.state_dict())
    detach_masks(other)
    assert_same_state(other, snapshot(make_network()))


def test_weights_that_are_not_frozen_are_trained():
    network = trained(frozen=False)
    detach_masks(network)
    before = make_network()
    assert not torch.equal(network.conv1.weight, before.conv1.weight)
    assert not torch.equal(network.head.bias, before.head.bias)


# ---- random masks for a while ------------------------------------------------------------------------------


def test_random_masks_are_seeded_and_leave_nothing_behind():
    network = make_network()
    before, zeros = snapshot(network), []
    for seed in (0, 0, 1):
        with random_masks(network, 0.965, generator(seed), "truncated"):
            weights = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
            for weight in weights:
                assert (weight == 0).sum() == number_dropped(weight.numel(), 0.965, "truncated")
            zeros.append(torch.cat([(weight == 0).flatten() for weight in weights]))
            assert torch.equal(network.head.bias, before["head.bias"])
            outputs = network(IMAGES)
        assert_same_state(network, before)
        assert not torch.equal(network(IMAGES), outputs)
    assert torch.equal(zeros[0], zeros[1]) and not torch.equal(zeros[0], zeros[2])


def test_random_masks_go_after_an_exception():
    network = make_network()
    before = snapshot(network)
    with pytest.raises(KeyboardInterrupt), random_masks(network, 0.5, generator()):
        assert not torch.equal(network.conv1.weight, before["conv1.weight"])
        raise KeyboardInterrupt
    assert_same_state(network, before)


def test_every_weight_is_dropped_by_chance():
    """Each of 12 weights in a quarter of 800 masks, within five standard deviations."""
    layer, draws = nn.Linear(4, 3), generator(2)
    counts = torch.zeros(3, 4)
    for _ in range(800):
        with random_masks(layer, 0.75, draws):
            counts += layer.weight == 0
    assert (counts - 200).abs().max() < 5 * math.sqrt(800 * 0.25 * 0.75)
