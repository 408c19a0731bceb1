"""Triton against the torch references in float64 on inputs that differ from run to run, of all 24 bits of float32."""

import pytest
import torch
from kernel_examples import DEVICE, assert_same, fresh_seed, needs_gpu, needs_triton, strided  # noqa: F401
from torch.nn.functional import one_hot

from ood_helpers.kernels import group_score, largest_entries, line_head, prototype_cosine, shaped_energy


class Fresh:
    """Random inputs of a random size: classes and features are no multiples of a block."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.samples, self.classes, self.feature_dim = (
            self.integer(1, 40),
            self.integer(2, 20),
            self.integer(2, 80),
        )
        self.features = self.normal(self.samples, self.feature_dim).clamp(min=0)
        self.weight, self.bias = self.normal(self.classes, self.feature_dim), self.normal(self.classes)
        self.mask = self.normal(self.classes, self.feature_dim) > 0
        self.predicted = torch.randint(self.classes, (self.samples,), generator=self.generator).to(DEVICE)

    def integer(self, low, high):
        return int(torch.randint(low, high, (), generator=self.generator))

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(DEVICE)


def clear_floors(importance, weight):
    """A floor for each class in the widest of the gaps about the median of its products: rounding decides nothing."""
    products = (importance.double()[:, None] * weight.double()).flatten(1).sort(dim=1).values
    middle = products[:, products.shape[1] // 4 : 3 * products.shape[1] // 4 + 1]
    widest = middle.diff(dim=1).argmax(dim=1, keepdim=True)
    return ((middle.gather(1, widest) + middle.gather(1, widest + 1)) / 2)[:, 0]


@needs_triton
@pytest.mark.parametrize("output", ["energy", "logits"])
def test_line_head(fresh_seed, output):  # noqa: F811
    fresh = Fresh(fresh_seed)
    # Which class is predicted must not hang on rounding, so each sample gets a clear one.
    favourite = one_hot(fresh.predicted, fresh.classes).float()
    features = torch.cat([fresh.features, favourite], dim=1)
    weight = torch.cat([fresh.weight, 300 * torch.eye(fresh.classes, device=DEVICE)], dim=1)
    importance = fresh.normal(*weight.shape).abs()
    floors = clear_floors(importance, weight)
    mask = fresh.normal(*weight.shape) > 0
    arguments = features.double(), weight.double(), fresh.bias.double(), importance.double(), mask, floors
    expected = line_head.reference(*arguments, 0.8, output)
    arguments = strided(features), weight, fresh.bias, importance, mask, floors.float()
    assert_same(line_head.launch(*arguments, 0.8, output, "ieee"), expected)


@needs_triton
def test_shaped_energy(fresh_seed):  # noqa: F811
    fresh = Fresh(fresh_seed)
    settings = {"clip": 0.7, "class_mask": fresh.mask, "predicted": fresh.predicted, "temperature": 1.5}
    factors = {"gain": fresh.normal(fresh.samples), "scale": fresh.normal(fresh.samples)}
    in_double = {name: factor.double() for name, factor in factors.items()}
    head = fresh.weight, fresh.bias
    shaping = shaped_energy.Shaping(**settings, **in_double)
    expected = shaped_energy.reference(fresh.features.double(), *(t.double() for t in head), shaping)
    shaping = shaped_energy.Shaping(**settings, **factors)
    assert_same(shaped_energy.launch(strided(fresh.features), *head, shaping), expected, 5e-5)


@needs_triton
def test_largest_entries(fresh_seed):  # noqa: F811
    fresh = Fresh(fresh_seed)
    count = fresh.integer(1, fresh.feature_dim + 1)
    found = largest_entries.launch(strided(fresh.features), count)
    expected = largest_entries.reference(fresh.features.double(), count)
    assert found.mask(fresh.features).equal(expected.mask(fresh.features.double()))
    for name in ("threshold", "total", "kept_total"):
        assert_same(getattr(found, name), getattr(expected, name))


@needs_triton
def test_prototype_cosine(fresh_seed):  # noqa: F811
    fresh = Fresh(fresh_seed)
    arguments = fresh.features, fresh.weight, fresh.predicted
    expected = prototype_cosine.reference(fresh.features.double(), fresh.weight.double(), fresh.predicted)
    assert_same(prototype_cosine.launch(*arguments), expected)


@needs_triton
def test_group_score(fresh_seed):  # noqa: F811
    fresh = Fresh(fresh_seed)
    sizes = [fresh.integer(1, 200) for _ in range(fresh.integer(1, 6))]
    ends = torch.tensor([size + 1 for size in sizes]).cumsum(0).tolist()
    slices = list(zip([0, *ends[:-1]], ends))
    logits = 10 * fresh.normal(fresh.samples, ends[-1])
    assert_same(group_score.launch(strided(logits), slices), group_score.reference(logits.double(), slices))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kernel", ["line head", "shaped energy"])
def test_precisions_are_what_they_are_called(kernel, fresh_seed):  # noqa: F811
    """Full float32 is near float64; tf32, of 10 bits, is not, but near enough to be no mistake."""
    fresh = Fresh(fresh_seed)
    features, weight, bias = fresh.normal(256, 512).clamp(min=0), fresh.normal(64, 512), fresh.normal(64)

    def of(function, precision):
        if kernel == "line head":
            return function.launch(features, weight, bias, None, None, None, None, "energy", precision)
        return function.launch(features, weight, bias, shaped_energy.Shaping(), precision)

    function = line_head if kernel == "line head" else shaped_energy
    expected = (features.double() @ weight.double().T + bias.double()).logsumexp(dim=1)
    errors = {precision: (of(function, precision) - expected).abs().max() for precision in ("ieee", "tf32")}
    assert errors["ieee"] < 5e-5
    assert 2e-4 < errors["tf32"] < 0.2
