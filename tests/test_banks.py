"""Heads, banks in memory and on disk, and the views of them."""

import pytest
import torch
from bank_examples import OPTIONS, TRANSFORM, Sharded, bytes_of, random_images, tiny
from numpy.testing import assert_array_equal

from ood_helpers.backbones.pixels import PixelNetwork
from ood_helpers.banks import BackgroundBank, DeviceBank, FeatureBank, Head, HeadBank, ImageBank, with_images
from ood_helpers.config import FeaturesConfig
from ood_helpers.data import image_batches
from ood_helpers.errors import InputError
from ood_helpers.extract import extract
from ood_helpers.storage import Store

COLUMNS = ("features", "logits", "labels")


@pytest.fixture
def network():
    return tiny()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def bank():
    """7 images, 5 features, 4 logits and a tap."""
    torch.manual_seed(1)
    features = torch.rand(7, 5)
    return FeatureBank(features, torch.randn(7, 4), torch.arange(7), {"stem": 2 * features})


def test_banks_and_heads_refuse_shapes_that_do_not_belong_together():
    with pytest.raises(InputError, match="3 rows of features and 2 of labels"):
        FeatureBank(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match="3 rows of features and 4 of stem"):
        FeatureBank(torch.zeros(3, 2), torch.zeros(3, 2), taps={"stem": torch.zeros(4, 2)})
    with pytest.raises(InputError, match=r"expected \[C, D\] and \[C\]"):
        Head(torch.zeros(3, 2), torch.zeros(2))


@pytest.mark.parametrize("shape", [(3, 1), (2,), (3, 2)])
@pytest.mark.parametrize("name", ["background", "labels"])
def test_a_bank_refuses_what_is_not_one_number_per_image(name, shape):
    with pytest.raises(InputError, match=rf"A feature bank has 3 rows of features .*{name}.* expected one"):
        FeatureBank(torch.zeros(3, 2), torch.zeros(3, 4), **{name: torch.zeros(shape)})


def test_a_bank_in_memory_is_its_own_and_only_shard(bank):
    assert next(bank.shards()) is bank and bank.load() is bank and bank.key is None


def test_some_images_of_a_bank(bank):
    rows = torch.tensor([4, 1])
    few = bank.take(rows)
    assert len(few) == 2 and few.background is None
    for name in COLUMNS:
        assert torch.equal(getattr(few, name), getattr(bank, name)[rows])
    assert torch.equal(few.taps["stem"], bank.taps["stem"][rows])


def test_joined_shards_are_the_bank(network, store):
    options = FeaturesConfig(batch_size=4, shard_size=8, taps=("convolution",))
    stored = extract(network, random_images(), TRANSFORM, store, options)
    shards = list(stored.shards())
    joined = FeatureBank.joined(shards)
    assert len(shards) == 3 and len(joined) == 21
    for name in COLUMNS:
        assert torch.equal(getattr(joined, name), torch.cat([getattr(shard, name) for shard in shards]))
        assert torch.equal(getattr(joined, name), getattr(stored, name))
    assert torch.equal(joined.taps["convolution"], torch.cat([shard.taps["convolution"] for shard in shards]))
    assert FeatureBank.joined(shards[:1]) is shards[0]


def test_a_bank_with_another_head(bank):
    head = Head(torch.arange(15.0).reshape(3, 5), torch.tensor([1.0, 2, 3]))
    other = HeadBank(Sharded(bank), head, "own")
    assert (other.key, len(other), other.record["seconds"]) == ("own", 7, 3.0)
    assert len(list(other.shards())) == 3
    torch.testing.assert_close(other.logits, head.logits(bank.features))
    assert torch.equal(other.features, bank.features) and torch.equal(other.labels, bank.labels)


def test_a_bank_on_a_device(bank):
    moved = DeviceBank(Sharded(bank), torch.device("meta"))
    assert moved.key == "sharded"
    for shard in moved.shards():
        tensors = (shard.features, shard.logits, shard.labels, shard.taps["stem"])
        assert {tensor.device.type for tensor in tensors} == {"meta"}


# background


def test_shards_and_the_whole_bank_hold_the_same_background(bank):
    for given in (bank, Sharded(bank, 2)):
        foreground = BackgroundBank(given)
        pieces, whole = list(foreground.shards()), foreground.load()
        assert len(foreground) == len(whole) == sum(map(len, pieces)) == 7
        assert foreground.key == given.key
        assert_array_equal(whole.logits, bank.logits[:, :3])
        assert_array_equal(whole.background, bank.logits[:, 3])
        assert_array_equal(torch.cat([piece.logits for piece in pieces]), whole.logits)
        assert_array_equal(torch.cat([piece.background for piece in pieces]), whole.background)
        for piece in (*pieces, whole):
            assert next(piece.shards()) is piece
            assert_array_equal(piece.taps["stem"], 2 * piece.features)
        assert_array_equal(torch.cat([piece.labels for piece in pieces]), bank.labels)
    assert foreground.record == {"images": 7, "seconds": 3.0}


def test_the_background_of_another_head(bank):
    """A network that shares the backbone's features has no logits on disk: they are those of its own head."""
    head = Head(torch.arange(15.0).reshape(3, 5), torch.tensor([1.0, 2, 3]))
    foreground = BackgroundBank(HeadBank(Sharded(bank, 1), head, "own"))
    expected = head.logits(bank.features)
    (shard,) = foreground.shards()
    for found in (shard, foreground.load()):
        assert_array_equal(found.logits, expected[:, :2])
        assert_array_equal(found.background, expected[:, 2])
    assert len(foreground) == 7 and foreground.record["images"] == 7


# images


def test_an_image_bank_pairs_every_shard_with_its_images(network, store):
    images = random_images()
    stored = extract(network, images, TRANSFORM, store, OPTIONS)
    bank = ImageBank(
        stored,
        PixelNetwork(network, TRANSFORM.mean, TRANSFORM.std),
        lambda start, stop: image_batches(images, TRANSFORM, start, stop, 3),
        "made",
    )
    assert len(bank) == 21
    shards = list(bank.shards())
    assert [len(shard) for shard in shards] == [8, 8, 5]
    for shard, plain in zip(shards, stored.shards(), strict=True):
        assert with_images(shard, "ODIN", "give one") is shard
        batches = list(shard.pixels())
        assert [len(batch) for batch in batches] == ([3, 3, 2] if len(shard) == 8 else [3, 2])
        torch.testing.assert_close(bank.network.logits(torch.cat(batches)), plain.logits)
        assert torch.equal(shard.features, plain.features) and torch.equal(shard.labels, plain.labels)
    assert torch.equal(
        torch.cat([batch for shard in shards for batch in shard.pixels()]), bytes_of(images) / 255
    )


def test_a_method_that_needs_images_says_so(bank):
    with pytest.raises(
        InputError, match=r"ODIN: found a bank without images, expected an ImageBank.*give one"
    ):
        with_images(bank, "ODIN", "give one")
