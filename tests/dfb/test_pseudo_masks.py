"""Pseudo masks: the vectors of the specification, plain implementations, packed masks, and masks on disk."""

import math

import numpy as np
import pytest
import torch
from map_examples import SCALES, TRANSFORM, image_set, masks_of, tiny_network
from scipy.ndimage import gaussian_filter

from ood_helpers.dfb import pseudo_masks
from ood_helpers.dfb.activation_maps import ClassMaps, stored_maps
from ood_helpers.dfb.pseudo_masks import PseudoMasks, min_max, smoothed, stored_masks
from ood_helpers.dfb.recipe import MasksRecipe
from ood_helpers.errors import InputError
from ood_helpers.storage import Store

CLOSE = {"rtol": 0, "atol": 6e-7}


def test_smoothing_and_mask_of_the_small_example():
    second = [[2.75, 2.5, 2.25, 2], [1.75] * 4, [1.75] * 4, [2, 2.25, 2.5, 2.75]]
    pair = [torch.tensor([[[2, 0.5], [5, 2.5]]]), torch.tensor([second])]
    maps = ClassMaps(pair, torch.tensor([7]), (8, 8))
    fused = maps.fused()
    scaled = min_max(smoothed(fused.double(), 4))[0]
    expected = [0.444445, 0.410615, 0.348103, 0.266426, 0.178019, 0.096342, 0.033830, 0]
    torch.testing.assert_close(scaled[0], torch.tensor(expected).double(), **CLOSE)
    expected = [1, 0.966170, 0.903659, 0.821981, 0.733575, 0.651898, 0.589386, 0.555556]
    torch.testing.assert_close(scaled[7], torch.tensor(expected).double(), **CLOSE)
    assert float(scaled.sum()) == pytest.approx(31.898971, abs=5e-6)
    masks = PseudoMasks.of(maps, MasksRecipe(sigma=4))
    rows = masks.foreground()[0]
    assert rows.sum(dim=1).tolist() == [0, 0, 2, 3, 5, 6, 8, 8]
    for row in rows:
        assert row.tolist() == sorted(row.tolist(), reverse=True)  # foreground leads
    assert masks.share().tolist() == [0.5]
    assert masks.classes.tolist() == [7]


def square():
    """Ones in rows 4 to 11 and columns 6 to 13 of 32 x 32."""
    maps = torch.zeros(1, 32, 32)
    maps[0, 4:12, 6:14] = 1
    return maps


def test_mask_of_a_square():
    filtered = smoothed(square(), 4)
    assert float(filtered[0, 8, 10]) == pytest.approx(0.463232, abs=6e-7)
    scaled = min_max(filtered)[0]
    for place, expected in {
        (8, 10): 0.998327,
        (4, 6): 0.601873,
        (12, 10): 0.635590,
        (0, 0): 0.092333,
    }.items():
        assert float(scaled[place]) == pytest.approx(expected, abs=6e-7)
    assert divmod(int(scaled.argmax()), 32) == (7, 9)
    masks = PseudoMasks.of(ClassMaps([square()], torch.tensor([7]), (32, 32)), MasksRecipe(sigma=4))
    rows, columns = masks.foreground()[0].nonzero().T
    assert len(rows) == 106
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (1, 13, 4, 15)


def test_kernel_has_33_taps():
    one = torch.zeros(1, 65, 65, dtype=torch.float64)
    one[0, 32, 32] = 1
    line = smoothed(one, 4)[0].sum(dim=0)
    assert line.nonzero()[:, 0].tolist() == list(range(16, 49))
    assert line[31:34].tolist() == pytest.approx([0.096670, 0.099739, 0.096670], abs=6e-7)


@pytest.mark.parametrize("value", [0.0, 1e-7, 0.1, 1 / 3, 123.456])
@pytest.mark.parametrize("sigma", [0, 0.25, 1, 4])
def test_constant_maps_have_no_foreground(value, sigma):
    sides = [2, 3, 5, 7]
    maps = ClassMaps([torch.full((2, side, side), value) for side in sides], torch.tensor([1, 2]), (37, 21))
    masks = PseudoMasks.of(maps, MasksRecipe(sigma=sigma))
    assert not masks.foreground().any()
    assert masks.share().tolist() == [0, 0]


def test_any_other_map_has_foreground_which_is_strictly_above_the_threshold():
    maps = torch.zeros(1, 2, 2)
    maps[0] = torch.tensor([[0, 0.5], [0.75, 1]])
    maps = ClassMaps([maps], torch.tensor([0]), (2, 2))
    shares = [
        float(PseudoMasks.of(maps, MasksRecipe(sigma=0, threshold=threshold)).share())
        for threshold in (0, 0.5, 0.75, 0.999)
    ]
    assert shares == [0.75, 0.5, 0.25, 0.25]
    flat = torch.full((1, 4, 4), 1.0)
    flat[0, 0, 0] = 1.001
    assert PseudoMasks.of(ClassMaps([flat], torch.tensor([0]), (4, 4)), MasksRecipe(sigma=0)).share() > 0


# ---- against plain implementations --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (32, 32), (40, 24)])
@pytest.mark.parametrize(
    "sigma", [0.0, 0.05, 0.25, 1, 4]
)  # 0.05 has a radius of 0, 4 one of 16, beyond the image
def test_gaussian(size, sigma):
    maps = torch.rand(3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, radius = smoothed(maps, sigma), int(4 * sigma + 0.5)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) if sigma else 1.0 for i in range(-radius, radius + 1)]
    for image, result in zip(maps.numpy(), found.numpy()):
        theirs = gaussian_filter(image, sigma, mode="reflect") if sigma else image
        np.testing.assert_allclose(result, theirs, atol=1e-12)
        padded = np.pad(image, radius, mode="symmetric")
        window = np.outer(weights, weights) / sum(weights) ** 2
        for row, column in ((0, 0), (size[0] - 1, size[1] // 2)):
            part = padded[row : row + 2 * radius + 1, column : column + 2 * radius + 1]
            assert result[row, column] == pytest.approx((part * window).sum(), abs=1e-12)


def test_min_max():
    maps = torch.tensor([[[1, 3], [2, 5]], [[-2, -1], [0, 0]]], dtype=torch.float64)
    assert min_max(maps).tolist() == [[[0, 0.5], [0.25, 1]], [[0, 0.5], [1, 1]]]


# ---- packed masks, in memory and on disk ------------------------------------------------------------------


def test_packed_masks_are_read_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    maps = ClassMaps(
        [torch.rand(11, 3, 5, generator=generator)], torch.arange(11) % 4, (7, 9)
    )  # 63 pixels: 8 bytes
    monkeypatch.setattr(pseudo_masks, "PIXELS_AT_ONCE", 4 * 63)
    masks = PseudoMasks.of(maps)
    expected = min_max(smoothed(maps.fused(), 7 / 32)) > 0.5
    assert masks.packed.shape == (11, 8) and masks.size == (7, 9) and len(masks) == 11
    assert torch.equal(masks.foreground(), expected)
    assert torch.equal(masks.foreground(torch.tensor([10, 2])), expected[[10, 2]])
    assert torch.equal(masks.foreground(slice(3, 5)), expected[3:5])
    assert torch.equal(masks.classes, maps.classes)
    assert torch.equal(masks.pixels(), expected.sum(dim=(1, 2)))
    torch.testing.assert_close(masks.share(), expected.double().mean(dim=(1, 2)))


def test_wrong_shapes():
    masks = masks_of(torch.ones(3, 4, 4, dtype=torch.bool), [0, 1, 2])
    with pytest.raises(InputError, match="for 3 classes and 4 x 9 pixels"):
        PseudoMasks(masks.packed, masks.classes, (4, 9))
    with pytest.raises(
        InputError, match=r"torch.int64, expected .* torch.uint8 for 3 classes and 4 x 4 pixels"
    ):
        PseudoMasks(masks.packed.long(), masks.classes, (4, 4))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def maps(store):
    return stored_maps(tiny_network(), image_set(), TRANSFORM, store, SCALES)


def assert_same(found, expected):
    assert torch.equal(found.packed, expected.packed) and torch.equal(found.classes, expected.classes)
    assert found.size == expected.size


@pytest.mark.parametrize("label", ["ground_truth", "predicted"])
def test_stored_masks_are_those_of_the_maps(maps, store, label, monkeypatch):
    recipe = MasksRecipe(label=label, threshold=0.4)
    masks = stored_masks(maps, recipe, store)
    assert_same(masks, PseudoMasks.of(maps.load(label), recipe))
    monkeypatch.setattr(type(maps), "load", lambda *_: pytest.fail("maps were read again"))
    assert_same(stored_masks(maps, recipe, store), masks)


def test_masks_of_other_recipes_and_maps_are_other_files(maps, store, tmp_path):
    recipes = [
        MasksRecipe(),
        MasksRecipe(label="predicted"),
        MasksRecipe(sigma=1.0),
        MasksRecipe(threshold=0.4),
    ]
    for recipe in recipes:
        stored_masks(maps, recipe, store)
    assert len(list(tmp_path.rglob("masks.safetensors"))) == 4
    others = stored_maps(tiny_network(), image_set(seed=1), TRANSFORM, store, SCALES)
    stored_masks(others, MasksRecipe(), store)
    assert len(list(tmp_path.rglob("masks.safetensors"))) == 5


def test_damaged_masks_are_made_again(maps, store, tmp_path, capsys):
    masks = stored_masks(maps, MasksRecipe(), store)
    (path,) = tmp_path.rglob("masks.safetensors")
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1], b""):
        path.write_bytes(damaged)
        assert_same(stored_masks(maps, MasksRecipe(), store), masks)
        assert f"{path} is damaged and computed again." in capsys.readouterr().err
        assert path.read_bytes() == content


def test_masks_of_classes_that_the_maps_do_not_have(store):
    maps = stored_maps(tiny_network(), image_set(labels=False), TRANSFORM, store, (1.0,))
    with pytest.raises(InputError, match="has those of the predicted ones"):
        stored_masks(maps, MasksRecipe(scales=(1.0,)), store)


def test_share_per_class():
    foreground = torch.zeros(5, 2, 4, dtype=torch.bool)
    for image, pixels in enumerate((0, 2, 4, 8, 1)):
        foreground[image].view(-1)[:pixels] = True
    table = masks_of(foreground, [0, 0, 0, 3, 0]).share_per_class(5)
    assert table.columns.tolist() == ["class", "images", "mean", "q25", "q75", "empty"]
    assert table["class"].tolist() == [0, 1, 2, 3, 4]
    assert table["images"].tolist() == [4, 0, 0, 1, 0] and table["empty"].tolist() == [1, 0, 0, 0, 0]
    shares = [0, 12.5, 25, 50]
    expected = [np.mean(shares), np.percentile(shares, 25), np.percentile(shares, 75)]
    assert table.loc[0, ["mean", "q25", "q75"]].tolist() == pytest.approx(expected)
    assert table.loc[3, ["mean", "q25", "q75"]].tolist() == [100, 100, 100]
    assert table.loc[[1, 2, 4], ["mean", "q25", "q75"]].isna().all(axis=None)
