"""Mahalanobis at the last layer: the vectors, an explicit inverse, and features that do not vary."""

import numpy as np
import pytest
import torch
from detector_examples import cast, make_bank, random_problem, split, tensor
from gaussian_examples import TWO_CLASSES, TWO_CLASSES_UNEVEN, gaussians_of, labelled
from numpy.testing import assert_allclose

from ood_helpers.banks import Head
from ood_helpers.detectors.mahalanobis import Mahalanobis
from ood_helpers.errors import InputError


@pytest.mark.parametrize(
    ("example", "means", "precision", "queries", "expected"),
    [
        (
            *(TWO_CLASSES, [[1, 1], [6, 5]], [[1.5, -1.5], [-1.5, 3]]),
            [[1, 0], [3, 3], [6, 5], [10, -2]],
            [[-1.5, -18.75], [-3, -3.75], [-12.75, 0], [-114.75, -127.5]],
        ),
        (
            *(TWO_CLASSES_UNEVEN, [[1, 0], [3, 4]], [[0.625, -0.625], [-0.625, 3.125]]),
            [[3, 3]],
            [[-11.5625, -1.5625]],
        ),
    ],
)
def test_vectors(example, means, precision, queries, expected):
    train, head = labelled(example)
    gaussians, queries = gaussians_of(example), tensor(queries)
    whitening = gaussians.whitening
    assert_allclose(whitening @ whitening.T, precision, atol=1e-12)
    assert_allclose(gaussians.means, (torch.tensor(means) - gaussians.centre) @ whitening, atol=1e-12)
    assert_allclose(gaussians.log_densities(queries), expected, atol=1e-9)
    scores = Mahalanobis().fit(train, head).score_samples(make_bank(queries, head))
    assert_allclose(scores, np.max(expected, axis=1), atol=1e-9)


def explicit_scores(train, features):
    """max_c -(f - mu_c)^T P (f - mu_c) / 2, one sample and class at a time, P by numpy's pseudo-inverse."""
    train_features, labels = train.features.double().numpy(), train.labels.numpy()
    means = np.stack([train_features[labels == c].mean(0) for c in range(labels.max() + 1)])
    residuals = train_features - means[labels]
    precision = np.linalg.pinv(residuals.T @ residuals / len(labels), hermitian=True)
    return [max(-(f - mu) @ precision @ (f - mu) / 2 for mu in means) for f in features.double().numpy()]


def test_the_score_equals_the_explicit_inverse():
    train, head, bank = random_problem(5, 20, 30, train=100)
    scores = Mahalanobis().fit(split(train, 1, 60, 39), head).score_samples(split(bank, 11, 19))
    assert_allclose(scores, explicit_scores(train, bank.features), rtol=1e-9)


def test_features_that_do_not_vary_within_the_classes_have_no_part():
    """A dead feature, a sum of two others, and one that only tells the classes apart."""
    train, head, bank = random_problem(4, 10, 15, train=80)

    def extend(part, between):
        extra = [torch.full((len(part), 1), 3.0), part.features[:, :1] + part.features[:, 1:2], between]
        return torch.cat([part.features, *extra], dim=1)

    wide_head = Head(torch.zeros(4, 13, dtype=torch.float64), head.bias)
    wide_train = make_bank(extend(train, train.labels[:, None].double()), wide_head, train.labels)
    wide = make_bank(extend(bank, torch.ones(15, 1, dtype=torch.float64)), wide_head)
    detector = Mahalanobis().fit(wide_train, wide_head)
    assert detector.gaussians_.whitening.shape == (13, 10)
    assert_allclose(detector.score_samples(wide), explicit_scores(train, bank.features), rtol=1e-9)


def test_features_that_do_not_vary_within_any_class_are_refused(train_bank, head):
    with pytest.raises(InputError, match="do not vary within the classes"):
        Mahalanobis().fit(train_bank, head)


def test_far_features_cost_no_digits():
    train, head, bank = random_problem(4, 10, 15, train=80)
    expected = Mahalanobis().fit(train, head).score_samples(bank)
    far_train = make_bank(train.features + 1e6, head, train.labels)
    scores = Mahalanobis().fit(far_train, head).score_samples(make_bank(bank.features + 1e6, head))
    assert_allclose(scores, expected, rtol=1e-6)


def test_scores_are_float64():
    train, head, bank = random_problem(5, 20, 30, train=100)
    train, bank = cast(train, torch.float32), cast(bank, torch.float32)
    scores = Mahalanobis().fit(train, head.to(torch.float32)).score_samples(bank)
    assert scores.dtype == torch.float64
    assert_allclose(scores, explicit_scores(train, bank.features), rtol=1e-9)
