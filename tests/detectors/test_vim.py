"""ViM: the vectors of its sheet, and the spaces that it cannot be fitted to."""

import numpy as np
import pytest
import torch
from detector_examples import make_bank, random_problem, split, tensor
from numpy.testing import assert_allclose

from ood_helpers.banks import Head
from ood_helpers.detectors.vim import ViM
from ood_helpers.errors import InputError


@pytest.fixture
def example():
    """(training bank, head, bank) of the sheet."""
    features = tensor([[2, 0, 1], [3, 1, 0], [0, 2, 1], [1, 3, 0], [2, 2, 2], [0, 0, 1]])
    head = Head(tensor([[1, -0.5, 0.2], [-0.4, 1, 0.1]]), tensor([0.1, -0.2]))
    queries = tensor([[2.5, 0.5, 0.5], [-1, -1, 4], [0, 0, 0]])
    return make_bank(features, head), head, make_bank(queries, head)


def test_vectors(example):
    train, head, bank = example
    detector = ViM(dimension=1).fit(split(train, 2, 4), head)
    assert_allclose(detector.origin_, [-0.012247, 0.191182, 0.039189], atol=1e-6)
    assert_allclose(head.logits(detector.origin_), [0, 0], atol=1e-12)
    assert_allclose(sorted(detector.eigenvalues_.tolist()), [0.667437, 1.331778, 4.663210], atol=1e-6)
    moment = detector.eigenvectors_ @ detector.eigenvalues_.diag() @ detector.eigenvectors_.T
    expected = [
        [3.032807, 1.425744, 0.957474],
        [1.425744, 2.526731, 0.795922],
        [0.957474, 0.795922, 1.102887],
    ]
    assert_allclose(moment, expected, atol=1e-6)
    assert detector.alpha() == pytest.approx(1.328896, abs=1e-6)
    assert_allclose(detector.residual_norms(bank), [1.401501, 4.250400, 0.154450], atol=1e-6)
    assert_allclose(detector.score_samples(bank), [0.631614, -4.877239, 0.449107], atol=1e-6)


@pytest.mark.parametrize("dimension", [1, 2])
def test_the_virtual_logit_has_the_mean_of_the_largest_logits(dimension, example):
    train, head, _ = example
    detector = ViM(dimension=dimension).fit(train, head)
    virtual = detector.alpha() * detector.residual_norms(train)
    assert virtual.mean() == pytest.approx(float(train.logits.amax(1).mean()), abs=1e-12)


def test_more_classes_than_features():
    """No origin has zero logits then; the least-squares one is taken."""
    train, head, bank = random_problem(12, 5, 20)
    detector = ViM().fit(train, head)
    origin = np.linalg.lstsq(head.weight.numpy(), -head.bias.numpy(), rcond=None)[0]
    assert_allclose(detector.origin_, origin, atol=1e-12)
    shifted = bank.features.numpy() - origin
    centred = train.features.numpy() - origin
    axes = np.linalg.svd(centred)[2][2:]  # beyond the 5 // 2 leading right singular vectors
    assert_allclose(detector.residual_norms(bank), np.linalg.norm(shifted @ axes.T, axis=1), atol=1e-10)


@pytest.mark.parametrize(
    ("size", "dimension"), [(342, 171), (767, 383), (768, 512), (2047, 512), (2048, 1000), (7, 3)]
)
def test_default_dimension(size, dimension):
    detector = ViM()
    detector.head_ = Head(torch.zeros(2, size), torch.zeros(2))
    assert detector.dimension_ == dimension


def test_learned_values_are_those_in_use():
    train, head, _ = random_problem(5, 20, 1, train=60)
    detector = ViM().fit(train, head)
    assert detector.learned == {"dimension": 10, "alpha": detector.alpha()}


def test_a_residual_is_needed(example):
    train, head, bank = example
    detector = ViM(dimension=3).fit(train, head)
    with pytest.raises(InputError, match="dimension is 3, expected less than the 3 features"):
        detector.score_samples(bank)
    centred = Head(head.weight, torch.zeros(2).double())
    at_origin = make_bank(torch.zeros(3, 3, dtype=torch.float64), centred)
    with pytest.raises(InputError, match="span 0 dimensions, expected more than the 1"):
        ViM(dimension=1).fit(at_origin, centred).alpha()


def test_fewer_training_images_than_the_principal_space_has_dimensions_are_refused():
    """What is left over is rounding, by which alpha would be divided."""
    train, head, _ = random_problem(5, 60, 1, train=25)
    assert ViM(dimension=20).fit(train, head).alpha() > 0
    with pytest.raises(InputError, match="span 25 dimensions, expected more than the 30"):
        ViM(dimension=30).fit(train, head).alpha()
