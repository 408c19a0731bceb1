"""The prototype cosine: Triton against the torch reference in float64, and the reference against the formula."""

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

from ood_helpers.kernels import prototype_cosine as kernel
from ood_helpers.kernels.prototype_cosine import prototype_cosine


def problem(samples, classes, feature_dim):
    """Arguments of prototype_cosine. The last class is of no sample where there are others."""
    predicted = (random(samples, seed=5).abs() * 1000).long() % max(1, classes - 1)
    return relu_features(samples, feature_dim), random(classes, feature_dim), predicted


def in_double(arguments):
    features, prototypes, predicted = arguments
    return features.double(), prototypes.double(), predicted


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_formula(shape):
    features, prototypes, predicted = in_double(problem(*shape))
    expected = [
        prototypes[k] @ f / (prototypes[k].norm().clamp(min=1e-8) * f.norm().clamp(min=1e-8))
        for f, k in zip(features, predicted, strict=True)
    ]
    found = prototype_cosine(features, prototypes, predicted)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_chunks_change_nothing(monkeypatch):
    arguments = in_double(problem(70, 7, 342))
    whole = prototype_cosine(*arguments)
    monkeypatch.setattr(kernel, "CHUNK", 3)
    torch.testing.assert_close(prototype_cosine(*arguments), whole, rtol=1e-12, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2, 1100)])
def test_triton_against_the_reference(shape):
    """1100 features are more than a block."""
    arguments = problem(*shape)
    assert_same(kernel.launch(*arguments), kernel.reference(*in_double(arguments)))


@needs_triton
def test_strides():
    features, prototypes, predicted = problem(33, 7, 40)
    found = kernel.launch(strided(features), strided(prototypes), predicted.repeat_interleave(2)[::2])
    assert_same(found, kernel.reference(*in_double((features, prototypes, predicted))))


@needs_triton
def test_small_norms():
    """Zeros have a cosine of 0; below 1e-8 a norm counts as 1e-8, the prototype's as the feature's."""
    features = torch.tensor([[0.0, 0.0], [3e-9, 4e-9], [3.0, 4.0], [3.0, 4.0]], device=DEVICE)
    prototypes = torch.tensor([[0.6, 0.8], [0.0, 0.0], [3e-9, 4e-9]], device=DEVICE)
    predicted = torch.tensor([0, 0, 1, 2], device=DEVICE)
    for found in (
        kernel.launch(features, prototypes, predicted),
        kernel.reference(features.double(), prototypes.double(), predicted).float(),
    ):
        assert_same(found, torch.tensor([0, 0.5, 0, 0.5]))


@needs_triton
def test_no_sample():
    none, predicted = torch.zeros(0, 33, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for function in (kernel.launch, kernel.reference):
        assert function(none, random(7, 33), predicted).shape == (0,)


@needs_triton
def test_nan_comes_through():
    features, prototypes, _ = problem(4, 3, 33)
    features[1, 5] = float("nan")
    prototypes[2, 7] = float("nan")
    predicted = torch.tensor([0, 0, 1, 2], device=DEVICE)
    for function in (kernel.launch, kernel.reference):
        assert function(features, prototypes, predicted).isnan().tolist() == [False, True, False, True]


@pytest.mark.gpu
@needs_gpu
def test_compiled_at_imagenet_size():
    """The public function takes the kernel, which takes no memory beside the output."""
    arguments = problem(5000, 1000, 2048)
    expected = kernel.reference(*in_double(arguments))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = prototype_cosine(*arguments)
    assert torch.cuda.max_memory_allocated() - before < 1e6
    assert_same(found, expected)
