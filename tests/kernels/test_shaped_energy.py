"""Shaped energy: Triton against the torch reference in float64, and the reference against the formula."""

from dataclasses import replace

import pytest
import torch
from detector_examples import LargestArray
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
from ood_helpers.kernels import largest_entries
from ood_helpers.kernels import shaped_energy as kernel
from ood_helpers.kernels.shaped_energy import Shaping, shaped_energy, shaped_features

SHAPINGS = {
    "none": (),
    "ReAct": ("clip",),
    "ASH-P": ("largest",),
    "ASH-B": ("largest", "binary", "gain"),
    "SCALE": ("gain",),
    "HIMPLoS": ("clip", "class_mask", "scale", "temperature"),
    "all": ("clip", "class_mask", "largest", "gain", "scale", "temperature"),
}


def problem(samples, classes, feature_dim, shaping="all"):
    """Arguments of shaped_energy, and the named ones. Rounded and clipped features tie at the threshold."""
    features = (relu_features(samples, feature_dim) * 4).round() / 4
    weight, bias = random(classes, feature_dim) / 4, random(classes, seed=2) / 10
    predicted = (random(samples, seed=5).abs() * 1000).long() % max(1, classes - 1)
    settings = {
        "clip": 1.25,
        "class_mask": random(classes, feature_dim, seed=4) > 0,
        "binary": True,
        "gain": 1 + random(samples, seed=6).abs(),
        "scale": random(samples, seed=7),
        "temperature": 2.5,
    }
    named = {name: settings[name] for name in SHAPINGS[shaping] if name != "largest"}
    if "class_mask" in named:
        named["predicted"] = predicted
    if "largest" in SHAPINGS[shaping]:
        first = {name: named[name] for name in ("clip", "class_mask", "predicted") if name in named}
        g = shaped_features(features, Shaping(**first))
        named["largest"] = largest_entries.reference(g, max(1, feature_dim // 2))
    return (features, weight, bias), named


def in_double(arguments, named):
    """Both in float64, but for masks and whole numbers."""
    double = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in named.items()
    }
    return [value.double() for value in arguments], double


def sample_by_sample(
    features,
    weight,
    bias,
    clip=None,
    class_mask=None,
    predicted=None,
    largest=None,
    binary=False,
    gain=None,
    scale=None,
    temperature=1.0,
):
    """Scores by the definition; as many entries as `largest` keeps of the sample, the first of equal ones."""
    scores = []
    for n, f in enumerate(features):
        g = f if clip is None else f.clamp(max=clip)
        if class_mask is not None:
            g = g * class_mask[predicted[n]]
        if largest is not None:
            places = g.sort(descending=True, stable=True).indices[: max(1, len(g) // 2)]
            kept = torch.ones_like(g[places]) if binary else g[places]
            g = torch.zeros_like(g).index_put((places,), kept)
        z = (1 if gain is None else gain[n]) * (weight @ g) + bias
        z = (1 if scale is None else scale[n]) * z
        scores.append(temperature * (z / temperature).exp().sum().log())
    return torch.stack(scores)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_the_reference_is_the_formula(shape, shaping):
    arguments, named = in_double(*problem(*shape, shaping))
    expected = sample_by_sample(*arguments, **named)
    torch.testing.assert_close(shaped_energy(*arguments, Shaping(**named)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_chunks_change_nothing(monkeypatch, shaping):
    arguments, named = in_double(*problem(70, 7, 33, shaping))
    whole = shaped_energy(*arguments, Shaping(**named))
    monkeypatch.setattr(kernel, "CHUNK", 3)
    torch.testing.assert_close(shaped_energy(*arguments, Shaping(**named)), whole, rtol=1e-12, atol=1e-12)


def test_no_samples_times_classes_in_the_reference(monkeypatch):
    """Of 64 samples no more than a chunk of 8 goes to the head at once."""
    arguments, named = in_double(*problem(64, 7, 33))
    monkeypatch.setattr(kernel, "CHUNK", 8)
    with LargestArray() as largest:
        shaped_energy(*arguments, Shaping(**named))
    assert largest.elements == 8 * 33 < 64 * 7


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_triton_against_the_reference(shape, shaping):
    arguments, named = problem(*shape, shaping)
    double, named_double = in_double(arguments, named)
    assert_same(
        kernel.launch(*arguments, Shaping(**named)), kernel.reference(*double, Shaping(**named_double))
    )


@needs_triton
def test_several_blocks_of_everything():
    """Blocks of 128 samples and of 128 classes, each with a rest."""
    arguments, named = problem(130, 140, 35)
    double, named_double = in_double(arguments, named)
    assert_same(
        kernel.launch(*arguments, Shaping(**named)), kernel.reference(*double, Shaping(**named_double))
    )


@needs_triton
def test_strides():
    (features, weight, bias), named = problem(33, 7, 40)
    double, named_double = in_double((features, weight, bias), named)
    named["class_mask"] = strided(named["class_mask"].float()) > 0
    for name in ("predicted", "gain", "scale"):
        named[name] = named[name].repeat_interleave(2)[::2]
    bias = bias.repeat_interleave(2)[::2]
    found = kernel.launch(strided(features), strided(weight), bias, Shaping(**named))
    assert_same(found, kernel.reference(*double, Shaping(**named_double)))


@needs_triton
def test_thresholds_below_zero_drop_zeros():
    """A class mask makes zeros, which are among the largest of negative features, and equal to no other entry."""
    features = -relu_features(20, 33) - 1
    weight, bias = random(7, 33) / 4, random(7, seed=2)
    mask, predicted = random(7, 33, seed=4) > 1, torch.arange(20, device=DEVICE) % 7
    g = shaped_features(features, Shaping(class_mask=mask, predicted=predicted))
    largest = largest_entries.launch(g, 31)
    assert (largest.threshold < 0).any()
    named = {"class_mask": mask, "predicted": predicted, "largest": largest, "binary": True}
    kept = shaped_features(features, Shaping(**named))
    assert kept.sum(dim=1).eq(31).all()
    expected = (kept.double() @ weight.double().T + bias.double()).logsumexp(dim=1)
    assert_same(kernel.launch(features, weight, bias, Shaping(**named)), expected)


@needs_triton
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_no_sample(shaping):
    (features, weight, bias), named = problem(3, 7, 33, shaping)
    for name in ("predicted", "gain", "scale"):
        if name in named:
            named[name] = named[name][:0]
    if "largest" in named:
        named["largest"] = largest_entries.reference(features[:0], 5)
    for function in (kernel.launch, kernel.reference, shaped_energy):
        assert function(features[:0], weight, bias, Shaping(**named)).shape == (0,)


@needs_triton
@pytest.mark.parametrize("shaping", SHAPINGS)
@pytest.mark.parametrize("place", [5, 6])
def test_nan_comes_through(shaping, place):
    """Also where the entry is clipped, of no class, or not among the largest as they were before."""
    (features, weight, bias), named = problem(9, 7, 33, shaping)
    features[4, place] = float("nan")
    for function in (kernel.launch, kernel.reference):
        found = function(features, weight, bias, Shaping(**named))
        assert found.isnan().tolist() == [False] * 4 + [True] + [False] * 4


def test_shaped_features():
    features = torch.tensor([[3.0, 1, 2, 5], [4, 4, 4, 0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [False, True, True, True]])
    predicted = torch.tensor([1, 0])
    assert shaped_features(features, Shaping()).equal(features)
    clipped = shaped_features(features, Shaping(3.0, mask, predicted))
    assert clipped.tolist() == [[0, 1, 2, 3], [3, 3, 3, 0]]
    largest = largest_entries.reference(clipped, 2)
    shaping = Shaping(3.0, mask, predicted, largest)
    assert shaped_features(features, shaping).tolist() == [[0, 0, 2, 3], [3, 3, 0, 0]]
    binary = replace(shaping, binary=True)
    assert shaped_features(features, binary).tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]


def test_unknown_precision():
    arguments, named = problem(3, 2, 4)
    with pytest.raises(InputError, match="precision is 'tf23'; did you mean 'tf32'"):
        shaped_energy(*arguments, Shaping(**named), precision="tf23")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_compiled_at_imagenet_size(shaping, precision):
    """The public function takes the kernel; beside input and output there are the head and 8 numbers a sample."""
    arguments, named = problem(20000, 1000, 2048, shaping)
    double, named_double = in_double(arguments, named)
    expected = kernel.reference(*double, Shaping(**named_double))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = shaped_energy(*arguments, Shaping(**named), precision=precision)
    assert torch.cuda.max_memory_allocated() - before < 20e6  # logits would take 80 MB
    assert_same(found, expected, 5e-4 if precision == "ieee" else 5e-2)
