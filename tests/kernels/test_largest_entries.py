"""The largest entries: Triton against the torch reference in float64, and the reference against sorting."""

import pytest
import torch
from kernel_examples import (
    DEVICE,
    SHAPES,
    assert_same,
    needs_gpu,
    needs_triton,
    random,
    relu_features,
    strided,
)

from ood_helpers.errors import InputError
from ood_helpers.kernels import largest_entries as kernel
from ood_helpers.kernels.largest_entries import largest_entries

# What makes features hard: all kinds of ties, signs and sizes.
KINDS = {
    "relu": lambda f: f.clamp(min=0),
    "signs": lambda f: f,
    "negative": lambda f: -f.abs() - 1,
    "ties": lambda f: f.round(),
    "equal": lambda f: torch.full_like(f, -2.5),
    "zeros of both signs": lambda f: torch.where(f > 1, f, torch.where(f > 0, 0.0, -0.0)),
    "both ends of float32": lambda f: f.sign() * 10.0 ** (9 * f),
}


def counts(feature_dim):
    return sorted({1, max(1, feature_dim // 10), max(1, 2 * feature_dim // 3), feature_dim})


def kept_by_sorting(features, count):
    """bool [N, D]; a stable sort leaves equal entries in their order."""
    places = features.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(features, dtype=torch.bool).scatter(1, places, True)


def assert_is_sorting(found, features, count):
    """Threshold and place exactly, sums up to rounding."""
    kept = kept_by_sorting(features, count)
    assert found.mask(features).equal(kept)
    smallest = torch.where(kept, features, torch.inf).amin(dim=1)
    assert found.threshold.equal(smallest.to(found.threshold.dtype))
    assert found.last.dtype == torch.int64
    equal = features == smallest[:, None]
    last = ((kept & equal) * torch.arange(1, features.shape[1] + 1, device=DEVICE)).amax(dim=1) - 1
    last[(equal & ~kept).sum(dim=1) == 0] = features.shape[1] - 1
    assert found.last.equal(last)
    exact = features.double()
    tolerance = 1e-5 if found.total.dtype == torch.float32 else 1e-12
    for sums, parts in ((found.total, exact), (found.kept_total, exact * kept)):
        assert sums.dtype == found.threshold.dtype
        error = (sums.double() - parts.sum(dim=1)).abs()
        assert (error <= tolerance * exact.abs().sum(dim=1)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_sorting(shape, kind):
    features = KINDS[kind](random(shape[0], shape[2])).double()
    for count in counts(shape[2]):
        assert_is_sorting(largest_entries(features, count), features, count)


def test_chunks_change_nothing(monkeypatch):
    features = relu_features(70, 33).double()
    monkeypatch.setattr(kernel, "CHUNK", 3)
    assert_is_sorting(largest_entries(features, 20), features, 20)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 342), (3, 33), (2, 1), (2, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_triton_is_sorting_and_the_reference(shape, kind):
    features = KINDS[kind](random(*shape))
    for count in counts(shape[1]):
        found, expected = kernel.launch(features, count), kernel.reference(features.double(), count)
        assert_is_sorting(found, features, count)
        assert found.threshold.double().equal(expected.threshold)
        assert found.last.equal(expected.last)


@needs_triton
def test_equal_entries_at_the_border_are_kept_from_the_first():
    features = torch.tensor([[1, 3, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0], [2, -1, -1, 5, 4, -1]], device=DEVICE)
    for entries in (kernel.launch(features.float(), 3), kernel.reference(features.double(), 3)):
        assert entries.threshold.tolist() == [1, 0, 2]
        assert entries.last.tolist() == [2, 2, 5]  # of the third row no equal entry is dropped
        assert entries.total.tolist() == [7, 0, 8]
        assert entries.kept_total.tolist() == [5, 0, 11]
    entries = kernel.launch(features.float(), 5)
    assert entries.threshold.tolist() == [1, 0, -1]
    assert entries.last.tolist() == [5, 4, 2]


@needs_triton
def test_numbers_next_to_each_other():
    """No pivot between two of them; the search has to go to the end."""
    up = (torch.arange(200, dtype=torch.int32, device=DEVICE) // 2 + 0x3F800000).view(torch.float32)
    features = torch.stack([up, -up])
    for count in (1, 77, 199):
        assert_is_sorting(kernel.launch(features, count), features, count)


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
def test_infinities():
    features = random(2, 33)
    features[0, 3], features[1, 4:8] = float("inf"), -float("inf")
    for count in (1, 20, 31, 33):
        assert kernel.launch(features, count).mask(features).equal(kept_by_sorting(features, count))


@needs_triton
def test_strides():
    features = relu_features(5, 33)
    assert_is_sorting(kernel.launch(strided(features), 20), features, 20)


@needs_triton
def test_no_sample():
    none = torch.zeros(0, 33, device=DEVICE)
    for found in (kernel.launch(none, 5), kernel.reference(none, 5)):
        assert [found.threshold.shape, found.last.shape, found.total.shape, found.kept_total.shape] == [
            (0,)
        ] * 4


@needs_triton
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter
@pytest.mark.parametrize("count", [1, 20, 33])
def test_nan_comes_through(count):
    features = relu_features(4, 33)
    features[1, 5] = float("nan")
    features[2] = float("nan")
    for found in (kernel.launch(features, count), kernel.reference(features, count)):
        for sums in (found.total, found.kept_total):
            assert sums.isnan().tolist() == [False, True, True, False]
        assert found.mask(features)[features.isnan()].all()


@pytest.mark.parametrize("count", [0, 8, -1])
def test_count_out_of_range(count):
    with pytest.raises(InputError, match=f"The {count} largest of 7 entries were asked for, expected 1 to 7"):
        largest_entries(relu_features(3, 7), count)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("samples", "feature_dim", "count"), [(5000, 2048, 205), (300, 16384, 9000), (9, 20000, 7)]
)
def test_compiled_at_imagenet_size(samples, feature_dim, count):
    """The public function takes the kernel, for rows that it holds, which takes no memory beside the output."""
    features = relu_features(samples, feature_dim)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = largest_entries(features, count)
    if feature_dim <= kernel.LONGEST_ROW:
        assert torch.cuda.max_memory_allocated() - before < 1e6
    assert_is_sorting(found, features, count)
    assert_same(found.kept_total, kernel.reference(features.double(), count).kept_total)
