"""The group score: Triton against the torch reference in float64, and the reference against the formula."""

import pytest
import torch
from kernel_examples import DEVICE, assert_same, needs_gpu, needs_triton, random, strided

from ood_helpers.kernels import group_score as kernel
from ood_helpers.kernels.group_score import group_score

# samples, classes of each group: one sample, one group, groups of one class, one larger than a block and one just as large
PROBLEMS = [(1, (3, 2)), (70, (5,)), (9, (1, 1, 1)), (5, (1, 300, 9)), (9, (128, 129)), (33, (2, 40))]


def slices_of(sizes):
    ends = torch.tensor([size + 1 for size in sizes]).cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def problem(samples, sizes):
    return 4 * random(samples, sum(sizes) + len(sizes)), slices_of(sizes)


def by_definition(logits, slices):
    """-min_k p_k("others"), the score of the paper, as log-odds."""
    others = [logits[:, first:stop].softmax(1)[:, 0] for first, stop in slices]
    return -torch.stack(others, dim=1).amin(1).logit()


@pytest.mark.parametrize(("samples", "sizes"), PROBLEMS)
def test_the_reference_is_the_formula(samples, sizes, monkeypatch):
    logits, slices = problem(samples, sizes)
    monkeypatch.setattr(kernel, "CHUNK", 4 * logits.shape[1])  # does not divide
    found = group_score(logits.double(), slices)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, by_definition(logits.double(), slices), rtol=1e-9, atol=1e-9)


@needs_triton
@pytest.mark.parametrize(("samples", "sizes"), PROBLEMS)
def test_triton_against_the_reference(samples, sizes):
    logits, slices = problem(samples, sizes)
    expected = kernel.reference(logits.double(), slices)
    assert_same(kernel.launch(logits, slices), expected)
    assert_same(kernel.launch(strided(logits), slices), expected)


@needs_triton
@pytest.mark.parametrize("sizes", [(2, 3), (4, 150)])
def test_large_logits_neither_overflow_nor_lose_the_difference(sizes):
    logits, slices = problem(6, sizes)
    logits[0], logits[1] = 1000, -1000
    logits[2] += 60000
    logits[3, ::2] = 1000
    logits[4, 1::2] = -1000
    logits[5, [first for first, _ in slices]] = 1000
    expected = kernel.reference(logits.double(), slices)
    assert expected.isfinite().all() and expected.amax() < 2100 and expected[5] < -900
    assert_same(kernel.launch(logits, slices), expected)
    assert_same(kernel.reference(logits, slices), expected)


@needs_triton
@pytest.mark.parametrize("function", [kernel.launch, kernel.reference])
def test_infinite_logits(function):
    """One class of +inf, classes of -inf only, and an "others" of -inf; 300 classes are three blocks."""
    logits, slices = random(4, 303), slices_of((300, 1))
    expected = kernel.reference(logits, slices)
    logits[0, 150] = float("inf")
    logits[1, 1:301] = float("-inf")
    logits[1, 302] = float("-inf")
    logits[2, 1:200] = float("-inf")
    found = function(logits, slices).tolist()
    assert found[:2] == [float("inf"), float("-inf")]
    assert found[2] == pytest.approx(float(by_definition(logits[2:3].double(), slices)), abs=1e-5)
    assert found[3] == pytest.approx(float(expected[3]), abs=1e-5)


@needs_triton
@pytest.mark.parametrize("function", [kernel.launch, kernel.reference])
def test_nan_comes_through(function):
    """NaN as "others", as a class of the first, the last and a later block, and in a group that is not the best."""
    sizes = (4, 200, 1)
    slices = slices_of(sizes)
    columns = [0, 2, 5, 6, 205, 206, 207]
    logits = random(2 * len(columns), 208)
    logits[:, 1] = 50  # the first group is the best
    for row, column in enumerate(columns):
        logits[2 * row, column] = float("nan")
    assert function(logits, slices).isnan().tolist() == [True, False] * len(columns)
    logits[:] = float("nan")
    assert function(logits, slices).isnan().all()


@needs_triton
@pytest.mark.parametrize("function", [kernel.launch, kernel.reference])
def test_no_sample(function):
    assert function(torch.zeros(0, 7, device=DEVICE), slices_of((3, 2))).shape == (0,)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("sizes", [(125,) * 8, (398, 521, 9, 7, 52, 8, 3, 2), (10,) * 100])
def test_compiled_at_imagenet_size(sizes):
    """The public function takes the kernel, which needs no memory for differences."""
    logits, slices = problem(50_000, sizes)
    expected = kernel.reference(logits.double(), slices)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = group_score(logits, slices)
    assert torch.cuda.max_memory_allocated() - before < 1e6
    assert_same(found, expected)
    assert_same(group_score(strided(logits[:1000]), slices), expected[:1000])
