"""KNN: against all distances, sorted; near duplicates; and grids over k, which compare a bank on disk once."""

import numpy as np
import pytest
import torch
from detector_examples import LargestArray, Shards, make_bank, random_problem, split, tensor
from numpy.testing import assert_allclose

from ood_helpers.banks import FeatureBank, Head
from ood_helpers.detectors import knn as knn_module
from ood_helpers.detectors import variants
from ood_helpers.detectors.knn import KNN
from ood_helpers.errors import InputError


def distances(train, bank):
    """All distances of the normalised features, sorted [N, N_train]."""
    a, b = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank.features.numpy(), train.features.numpy())
    )
    return np.sort(np.stack([np.linalg.norm(b - row, axis=1) for row in a]), axis=1)


@pytest.mark.parametrize("k", [1, 2, 5, 12, 40])
def test_the_score_is_the_kth_distance_whatever_the_pieces(k, monkeypatch):
    """Blocks smaller and larger than k, shards smaller than a block, and pieces that leave a rest."""
    monkeypatch.setattr(knn_module, "CHUNK", 7)
    monkeypatch.setattr(knn_module, "BLOCK", 11)
    train, head, bank = random_problem(4, 9, 25, train=40)
    expected = -distances(train, bank)[:, k - 1]
    detector = KNN(k=k).fit(split(train, 30, 1, 9), head)
    assert_allclose(detector.score_samples(split(bank, 20, 5)), expected, atol=1e-9)


def test_a_chunk_is_compared_with_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr(knn_module, "CHUNK", 10)
    monkeypatch.setattr(knn_module, "BLOCK", 20)
    train, head, bank = random_problem(3, 5, 200, train=400)
    with LargestArray() as largest:
        KNN(k=3).fit(train, head).score_samples(bank)
    assert largest.elements <= 400 * 5  # the features themselves, far below 200 * 400 distances


def test_k_training_images_are_needed(head, train_bank, bank):
    with pytest.raises(InputError, match="k is 4, expected at most the number of training images, 3"):
        KNN(k=4).fit(train_bank, head).score_samples(bank)
    detector = KNN(k=3).fit(train_bank, head)
    assert_allclose(detector.score_samples(bank), -distances(train_bank, bank)[:, 2], atol=1e-9)
    detector.k = 4
    with pytest.raises(InputError, match="k is 4"):
        detector.score_samples(bank)


def test_a_training_image_and_its_opposite(head):
    train = make_bank(tensor([[1, 2, 3, 4], [1, 0, 0, 0]]), head)
    bank = make_bank(tensor([[2, 4, 6, 8], [-1, 0, 0, 0]]), head)
    scores = KNN(k=1).fit(train, head).score_samples(bank)
    assert scores[0] == pytest.approx(0, abs=1e-7)
    scores = KNN(k=2).fit(train, head).score_samples(bank)
    assert scores[1] == pytest.approx(-2, abs=1e-12)


def test_near_duplicates_are_kept_apart():
    """In float32 the cosine of the two is 1 up to 1e-6 of distance, and noise below 1e-3."""
    head = Head(torch.eye(3), torch.zeros(3))
    train = make_bank(torch.eye(3), head, torch.arange(3))
    gaps = torch.tensor([1e-3, 1e-4, 1e-5, 1e-6])
    near = torch.stack([torch.ones(4), gaps, torch.zeros(4)], dim=1)
    scores = KNN(k=1).fit(train, head).score_samples(make_bank(near, head))
    assert_allclose(scores, -gaps.double(), rtol=1e-3)


def test_features_of_zeros_have_a_finite_score(head, train_bank):
    zeros = make_bank(torch.zeros(2, 4, dtype=torch.float64), head)
    assert KNN(k=1).fit(train_bank, head).score_samples(zeros).isfinite().all()
    assert KNN(k=1).fit(zeros, head).score_samples(train_bank).isfinite().all()


def test_nothing_is_left_to_the_data():
    train, head, _ = random_problem(5, 20, 1, train=60)
    assert KNN().fit(train, head).learned == {}


# ---- grids over k ---------------------------------------------------------------------------------------

HEAD = Head(torch.zeros(2, 8), torch.zeros(2))


def bank_of(count, seed):
    return make_bank(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), HEAD)


class CountedBank:
    """A bank that counts how often it is read."""

    key = None

    def __init__(self, bank):
        self.bank, self.reads = bank, 0

    def __len__(self):
        return len(self.bank)

    def shards(self):
        self.reads += 1
        yield from self.bank.shards()


@pytest.fixture
def train():
    return CountedBank(bank_of(40, seed=1))


@pytest.fixture
def in_memory():
    return bank_of(30, seed=0)


@pytest.fixture
def on_disk(in_memory):
    """Two shards, under a key as a stored bank has one."""
    return Shards(split(in_memory, 20, 10).pieces, key="stored")


def test_a_grid_over_k_compares_a_bank_on_disk_once(train, in_memory, on_disk):
    detector = KNN(k=3).fit(train, HEAD)
    found, reads = [variant for _, variant in variants(detector, {"k": [9, 1, 41, 20]})], train.reads
    for variant in found:
        if variant.k == 41:
            message = "k is 41, expected at most the number of training images, 40"
            with pytest.raises(InputError, match=message):
                variant.score_samples(on_disk)
            continue
        fresh = KNN(k=variant.k).fit(train.bank, HEAD).score_samples(in_memory)
        assert_allclose(variant.score_samples(on_disk), fresh, rtol=0, atol=1e-12)
        variant.score_samples(on_disk).zero_()  # what is given away cannot spoil what is kept
        assert_allclose(variant.score_samples(on_disk), fresh, rtol=0, atol=1e-12)
    assert train.reads == reads + 2  # once for each shard
    detector.score_samples(on_disk)  # itself no member of the grid, so that the cost of its own score shows
    assert train.reads == reads + 4


def test_nothing_of_a_grid_is_stale(train, in_memory, on_disk):
    detector = KNN(k=3).fit(train, HEAD)
    (_, first), (_, second) = variants(detector, {"k": [2, 5]})
    before = first.score_samples(on_disk)
    first.k = 7  # a value outside the grid
    fresh = KNN(k=7).fit(train, HEAD).score_samples(on_disk)
    assert_allclose(first.score_samples(on_disk), fresh, rtol=0, atol=1e-12)
    first.k = 2
    assert torch.equal(first.score_samples(on_disk), before)
    other = bank_of(4, seed=2)
    expected = KNN(k=2).fit(other, HEAD).score_samples(on_disk)
    assert_allclose(first.fit(other, HEAD).score_samples(on_disk), expected, rtol=0, atol=1e-12)
    reads = train.reads
    second.score_samples(on_disk)
    assert train.reads == reads  # another fit of one variant is none of the others
    changed = FeatureBank(in_memory.features.clone(), in_memory.logits)
    before = second.score_samples(changed)
    changed.features[:, 0] += 1
    assert (second.score_samples(changed) - before).abs().max() > 0.01


def test_variants_made_before_fit_keep_nothing_of_each_other(train, on_disk):
    (_, first), (_, second) = variants(KNN(), {"k": [2, 3]})
    with pytest.raises(InputError, match="KNN is not fitted"):
        first.score_samples(on_disk)
    first.fit(bank_of(5, seed=3), HEAD).score_samples(on_disk)
    found = second.fit(train, HEAD).score_samples(on_disk)
    expected = KNN(k=3).fit(train, HEAD).score_samples(on_disk)
    assert_allclose(found, expected, rtol=0, atol=1e-12)
