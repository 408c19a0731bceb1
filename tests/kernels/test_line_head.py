"""The LINe head: Triton against the torch reference in float64, and the reference against the formula."""

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
from ood_helpers.kernels import line_head as kernel
from ood_helpers.kernels.line_head import line_head

PRUNING = ["none", "features", "weights", "both"]


def problem(samples, classes, feature_dim, pruning="both", percentile=0.5):
    """Arguments of line_head: features, weight, bias, importance, feature_mask, weight_floors."""
    weight, bias = random(classes, feature_dim), random(classes, seed=2) / 10
    importance = random(classes, feature_dim, seed=3).abs()
    mask = random(classes, feature_dim, seed=4) > 0
    # Each floor is one of the products, so that there is a tie at the threshold.
    products = importance[:, None] * weight
    floors = products.flatten(1).sort(dim=1).values[:, int(percentile * (classes * feature_dim - 1))]
    return (
        relu_features(samples, feature_dim),
        weight,
        bias,
        importance if pruning in ("weights", "both") else None,
        mask if pruning in ("features", "both") else None,
        floors if pruning in ("weights", "both") else None,
    )


def in_double(arguments):
    return [value if value is None or value.dtype == torch.bool else value.double() for value in arguments]


def sample_by_sample(features, weight, bias, importance, feature_mask, weight_floors, clip):
    """Logits by the definition."""
    rows = []
    for f in features:
        g = f if clip is None else f.clamp(max=clip)
        k = (weight @ g + bias).argmax()
        if feature_mask is not None:
            g = g * feature_mask[k]
        kept = weight if weight_floors is None else weight * (importance[k] * weight > weight_floors[k])
        rows.append(kept @ g + bias)
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pruning", PRUNING)
@pytest.mark.parametrize("clip", [None, 0.75])
def test_the_reference_is_the_formula(shape, pruning, clip):
    arguments = in_double(problem(*shape, pruning))
    expected = sample_by_sample(*arguments, clip)
    torch.testing.assert_close(line_head(*arguments, clip, output="logits"), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(line_head(*arguments, clip), expected.logsumexp(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pruning", PRUNING)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_chunks_and_pieces_change_nothing(pruning, share, monkeypatch):
    """Whether few or most of the features are kept."""
    features, weight, bias, importance, mask, floors = in_double(problem(70, 7, 342, pruning))
    if mask is not None:
        mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE) < share
    arguments = features, weight, bias, importance, mask, floors
    expected = sample_by_sample(*arguments, 0.75)
    for chunk, piece in ((3, 2048), (2048, 5), (3, 5)):
        monkeypatch.setattr(kernel, "CHUNK", chunk)
        monkeypatch.setattr(kernel, "PIECE", piece)
        found = line_head(*arguments, 0.75, output="logits")
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pruning", PRUNING)
@pytest.mark.parametrize("output", ["energy", "logits"])
def test_triton_against_the_reference(shape, pruning, output):
    arguments = problem(*shape, pruning)
    for clip in (None, 0.75):
        expected = kernel.reference(*in_double(arguments), clip, output)
        assert_same(kernel.launch(*arguments, clip, output, "ieee"), expected)


@needs_triton
@pytest.mark.parametrize("output", ["energy", "logits"])
def test_strides(output):
    features, weight, bias, importance, mask, floors = problem(33, 7, 40)
    arguments = (
        strided(features),
        strided(weight),
        bias,
        strided(importance),
        strided(mask.float()) > 0,
        floors,
    )
    expected = kernel.reference(*in_double((features, weight, bias, importance, mask, floors)), 0.75, output)
    assert_same(kernel.launch(*arguments, 0.75, output, "ieee"), expected)


@needs_triton
def test_empty_classes_and_one_full_class():
    """All samples in class 2 of 40: more than a tile of it, none of the others."""
    features, weight, bias, importance, mask, floors = problem(150, 40, 33)
    bias = bias.clone()
    bias[2] = 100
    arguments = features, weight, bias, importance, mask, floors
    assert (features @ weight.T + bias).argmax(1).eq(2).all()
    assert_same(
        kernel.launch(*arguments, 1.0, "logits", "ieee"),
        kernel.reference(*in_double(arguments), 1.0, "logits"),
    )


@needs_triton
def test_no_sample():
    _, *tables = problem(5, 7, 33)
    none = torch.zeros(0, 33, device=DEVICE)
    assert kernel.launch(none, *tables, 1.0, "energy", "ieee").shape == (0,)
    assert kernel.launch(none, *tables, 1.0, "logits", "ieee").shape == (0, 7)
    assert kernel.reference(none, *tables, 1.0, "logits").shape == (0, 7)


@needs_triton
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("pruning", PRUNING)
def test_nan_comes_through(clip, pruning):
    """Of a feature that some classes keep and others do not."""
    arguments = problem(9, 7, 33, pruning)
    arguments[0][4, 5] = float("nan")
    assert pruning in ("none", "weights") or arguments[4][:, 5].unique().numel() == 2
    for found in (
        kernel.launch(*arguments, clip, "energy", "ieee"),
        kernel.reference(*arguments, clip, "energy"),
    ):
        assert found.isnan().tolist() == [False] * 4 + [True] + [False] * 4


def test_unknown_precision():
    with pytest.raises(InputError, match="precision is 'tf23'; did you mean 'tf32'"):
        line_head(*problem(3, 2, 4), precision="tf23")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_compiled_at_imagenet_size(precision):
    """The public function takes the kernel; memory beside the input stays below 100 MB, the output included."""
    samples, classes, feature_dim = 50_000, 1000, 2048
    weight, importance = random(classes, feature_dim) / 32, random(classes, feature_dim, seed=3).abs()
    floors = importance[:, 7] * weight[3, 7]
    mask = random(classes, feature_dim, seed=4) > -1
    arguments = relu_features(samples, feature_dim), weight, random(classes, seed=2), importance, mask, floors
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = line_head(*arguments, 0.8, precision=precision)
    assert torch.cuda.max_memory_allocated() - before < 100e6
    arguments = (arguments[0][:2000], *arguments[1:])
    expected = kernel.reference(*in_double(arguments), 0.8, "energy")
    assert_same(found[:2000], expected, 5e-4 if precision == "ieee" else 5e-2)
