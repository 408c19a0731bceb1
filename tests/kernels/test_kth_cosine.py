"""The k-th largest cosine: against all cosines, sorted, in float64."""

import pytest
import torch
from kernel_examples import DEVICE, needs_gpu, random, relu_features
from torch.nn.functional import cosine_similarity

from ood_helpers.kernels import selection as selecting
from ood_helpers.kernels.kth_cosine import kth_cosine

# queries, training features, D: one of each, the DenseNet's odd width, and one feature
SHAPES = [(1, 1, 5), (1, 40, 342), (30, 25, 33), (17, 60, 1), (40, 41, 3)]


@pytest.fixture(params=["partition", "topk"])
def selection(request, monkeypatch):
    """Either way to select, whatever the number of threads."""
    monkeypatch.setattr(selecting, "THREADS_OF_TOPK", 1 if request.param == "topk" else 10**6)


def by_definition(queries, train, ks):
    cosines = cosine_similarity(queries[:, None].double(), train[None].double(), dim=2, eps=1e-12)
    return cosines.sort(dim=1, descending=True).values[:, [k - 1 for k in ks]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("chunk", "block"), [(7, 11), (512, 2048), (1, 1)])
def test_every_k_whatever_the_pieces(shape, chunk, block, selection):
    """All k up to the number of training features, also beyond a block; pieces that leave a rest."""
    samples, number, dim = shape
    queries, train = random(samples, dim).double(), random(number, dim, seed=1)
    ks = list(range(1, number + 1))
    expected = by_definition(queries, train, ks)
    pieces = train.split([number // 3, number - number // 3])
    found = kth_cosine(queries, pieces, ks, chunk=chunk, block=block)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    for k in {1, number // 2 + 1, number}:
        alone = kth_cosine(queries, iter(pieces), [k], chunk=chunk, block=block)
        torch.testing.assert_close(alone, expected[:, [k - 1]], rtol=0, atol=1e-14)


def test_ties(selection):
    """Each training feature five times, also in other lengths: five k in a row have the same cosine."""
    queries, train = relu_features(6, 20).double(), relu_features(8, 20, seed=2).double()
    lengths = torch.tensor([1, 1, 2, 0.5, 100], device=DEVICE)
    many = (lengths[:, None, None] * train).flatten(0, 1)
    ks = list(range(1, 41))
    found = kth_cosine(queries, [many], ks, chunk=4, block=7)
    expected = by_definition(queries, train, range(1, 9)).repeat_interleave(5, dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_features_of_zeros_have_the_cosine_0(selection):
    queries, train = random(4, 6).double(), random(5, 6, seed=1).double()
    queries[1], train[3] = 0, 0
    found = kth_cosine(queries, [train], [1, 3, 5])
    torch.testing.assert_close(found, by_definition(queries, train, [1, 3, 5]), rtol=0, atol=1e-14)
    assert (found[1] == 0).all()
    assert (kth_cosine(queries, [torch.zeros_like(train)], [1, 5]) == 0).all()


def test_lengths_do_not_matter(selection):
    queries, train = random(5, 9).double(), random(20, 9, seed=1).double()
    found = kth_cosine(1e6 * queries, [1e-6 * train], [1, 7])
    torch.testing.assert_close(found, kth_cosine(queries, [train], [1, 7]), rtol=0, atol=1e-14)


def test_the_inputs_stay_as_they_are_and_may_be_strided(selection):
    queries, train = random(9, 12).double().T, random(12, 60, seed=1).double()[:, ::2].T
    train = train[:, :9]
    before = queries.clone(), train.clone()
    found = kth_cosine(queries, [train], [2, 30], chunk=5, block=8)
    torch.testing.assert_close(found, by_definition(*before, [2, 30]), rtol=0, atol=1e-14)
    assert torch.equal(queries, before[0]) and torch.equal(train, before[1])


def test_nan_comes_through(selection):
    queries, train = random(5, 9).double(), random(20, 9, seed=1).double()
    queries[2, 4] = float("nan")
    found = kth_cosine(queries, [train], [1, 3, 20], block=6)
    assert found.isnan().all(1).tolist() == [False, False, True, False, False]
    assert not found[[0, 1, 3, 4]].isnan().any()
    train[7, 0] = float("nan")
    assert kth_cosine(queries, [train], [1, 3, 20], block=6).isnan().all()


def test_no_query_and_too_few_training_features(selection):
    train = random(4, 9).double()
    assert kth_cosine(train[:0], [train], [1, 2]).shape == (0, 2)
    found = kth_cosine(train, [train], [4, 5])
    assert found[:, 0].isfinite().all() and (found[:, 1] == float("-inf")).all()


def test_float32_stays_float32(selection):
    queries, train = random(30, 342), random(50, 342, seed=1)
    found = kth_cosine(queries, [train.double()], [1, 10])
    assert found.dtype == torch.float32
    expected = by_definition(queries, train, [1, 10])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_cuda_as_on_the_cpu(dtype):
    """Training features come from the CPU; memory stays below that of all cosines, 1.2 GB in float32."""
    queries, train = relu_features(15_000, 342), relu_features(20_000, 342, seed=2).cpu()
    expected = kth_cosine(queries[::500].cpu().double(), [train], [1, 50])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = kth_cosine(queries.to(dtype), train.split(5000), [1, 50])
    assert torch.cuda.max_memory_allocated() - before < 400e6
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(found[::500].cpu().double(), expected, rtol=0, atol=tolerance)
