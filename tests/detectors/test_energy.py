"""The energy against the vectors."""

import pytest
from detector_examples import bank_of_logits, tensor
from numpy.testing import assert_allclose

from ood_helpers.detectors.energy import Energy, energy_score


def test_vectors(train_bank, head, bank):
    expected = [2.032298, 1.695999, 2.299664, 1.953401]
    assert_allclose(Energy().fit(train_bank, head).score_samples(bank), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([2, 0.5, -1], {1: 2.241311, 2: 3.055951, 1000: 1099.113039}),
        ([0.1, 1.2, 0.3], {1: 1.753564, 2: 2.790124, 1000: 1099.145736}),
    ],
)
def test_scores_of_logits_at_several_temperatures(logits, expected, train_bank, head):
    logits = tensor([logits])
    for temperature, energy in expected.items():
        detector = Energy(temperature=temperature).fit(train_bank, head)
        assert float(detector.score_samples(bank_of_logits(logits))) == pytest.approx(energy, abs=1e-6)
        assert float(energy_score(logits, temperature)) == pytest.approx(energy, abs=1e-6)
