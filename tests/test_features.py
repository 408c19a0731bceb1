"""Feature banks: one pass, shards, resuming, damage, streaming statistics."""

from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ood_helpers.backbones import Classifier, weights_fingerprint
from ood_helpers.config import FeaturesConfig
from ood_helpers.data import ImageSet, Transform, image_batches
from ood_helpers.errors import InputError
from ood_helpers.features import (
    EXTRACTION_VERSION,
    FeatureBank,
    Head,
    ImageBank,
    PixelNetwork,
    StoredBank,
    accuracy,
    activation_percentile,
    bank_key,
    class_means,
    extract,
    float32_products,
    on_device,
    pass_batch_size,
    resolve_device,
    shard_path,
)
from ood_helpers.files import sha256_of_json

TRANSFORM = Transform(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
OPTIONS = FeaturesConfig(batch_size=4, shard_size=8)  # 8 images a shard


class Tiny(Classifier):
    """A convolution, pooling and a head; counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)
        self.images_seen = 0

    def feature_map(self, images):
        self.images_seen += len(images)
        return self.convolution(images).relu()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Tiny()


def image_set(count=21, seed=0, labels=True):
    generator = np.random.default_rng(seed)
    array = generator.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return ImageSet(
        "made", "made by the test", array=array, labels=generator.integers(0, 3, count) if labels else None
    )


def test_a_bank_equals_a_plain_forward_pass(network, tmp_path):
    images = image_set()
    bank = extract(network, images, TRANSFORM, tmp_path, OPTIONS)
    inputs = TRANSFORM.normalise(torch.from_numpy(images.array).permute(0, 3, 1, 2))
    with torch.no_grad():
        features = network.features(inputs)
    loaded = bank.load()
    torch.testing.assert_close(loaded.features, features)
    torch.testing.assert_close(loaded.logits, network.head(features).detach())
    torch.testing.assert_close(loaded.logits, Head.of(network).logits(loaded.features))
    assert loaded.labels.tolist() == images.labels.tolist()
    assert [len(shard) for shard in bank.shards()] == [8, 8, 5]
    assert bank.record["images"] == len(bank) == 21
    predicted = network.head(features).argmax(1).numpy()
    assert accuracy(bank, Head.of(network)) == pytest.approx(100 * (predicted == images.labels).mean())


def test_images_pass_once_however_often_the_bank_is_opened(network, tmp_path):
    for _ in range(3):
        extract(network, image_set(), TRANSFORM, tmp_path, OPTIONS)
    assert network.images_seen == 21


def test_an_interrupted_pass_goes_on_at_the_next_shard_with_the_same_numbers(network, tmp_path):
    images, seen = image_set(), []

    class Interrupted(Tiny):
        def feature_map(self, inputs):
            if sum(seen) >= 12:
                raise KeyboardInterrupt
            seen.append(len(inputs))
            return super().feature_map(inputs)

    broken = Interrupted()
    broken.load_state_dict(network.state_dict())
    with pytest.raises(KeyboardInterrupt):
        extract(broken, images, TRANSFORM, tmp_path / "a", OPTIONS)
    assert StoredBank.open(tmp_path / "a") is None
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["shard-00000.safetensors"]
    resumed = extract(network, images, TRANSFORM, tmp_path / "a", OPTIONS).load()
    assert network.images_seen == 13
    whole = extract(network, images, TRANSFORM, tmp_path / "b", OPTIONS).load()
    assert torch.equal(resumed.features, whole.features) and torch.equal(resumed.logits, whole.logits)


def test_a_shard_cut_in_half_is_named_and_only_it_is_computed_anew(network, tmp_path):
    bank = extract(network, image_set(), TRANSFORM, tmp_path, OPTIONS)
    before, path = bank.load(), shard_path(tmp_path, 1)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    for read in (
        lambda: StoredBank.open(tmp_path),
        lambda: extract(network, image_set(), TRANSFORM, tmp_path, OPTIONS),
    ):
        with pytest.raises(
            InputError, match=r"shard-00001.safetensors is damaged .* delete it and run again"
        ):
            read()
    path.unlink()
    after = extract(network, image_set(), TRANSFORM, tmp_path, OPTIONS).load()
    assert network.images_seen == 21 + 8
    assert torch.equal(before.features, after.features)


def test_another_shard_size_in_the_middle_of_a_pass_is_refused(network, tmp_path):
    extract(network, image_set(), TRANSFORM, tmp_path, OPTIONS)
    (tmp_path / "bank.json").unlink()
    with pytest.raises(InputError, match="shard_size changed"):
        extract(network, image_set(), TRANSFORM, tmp_path, FeaturesConfig(batch_size=4, shard_size=6))


def test_nan_outputs_stop_the_pass_and_leave_finished_shards(network, tmp_path):
    extract(network, image_set(), TRANSFORM, tmp_path, OPTIONS)
    (tmp_path / "bank.json").unlink()
    shard_path(tmp_path, 2).unlink()
    with torch.no_grad():
        network.convolution.bias[0] = float("nan")
    with pytest.raises(
        InputError, match=r"NaN or infinite outputs for 5 of images 16 to 20 of made \(first: 16\)"
    ):
        extract(network, image_set(), TRANSFORM, tmp_path, OPTIONS)
    assert shard_path(tmp_path, 1).exists() and not shard_path(tmp_path, 2).exists()


def test_taps_hold_the_pooled_outputs_of_modules(network, tmp_path):
    options = FeaturesConfig(batch_size=4, shard_size=8, taps=("convolution",))
    bank = extract(network, image_set(labels=False), TRANSFORM, tmp_path, options).load()
    inputs = TRANSFORM.normalise(torch.from_numpy(image_set().array).permute(0, 3, 1, 2))
    torch.testing.assert_close(bank.taps["convolution"], network.convolution(inputs).mean((2, 3)).detach())
    assert bank.labels is None
    with pytest.raises(InputError, match="no module 'conv' to tap"):
        extract(network, image_set(), TRANSFORM, tmp_path / "x", FeaturesConfig(taps=("conv",)))


def test_the_key_changes_with_everything_the_numbers_depend_on(network):
    keys = {bank_key(network, image_set(), TRANSFORM)}
    keys.add(bank_key(network, image_set(seed=1), TRANSFORM))
    keys.add(bank_key(network, image_set(count=20), TRANSFORM))
    keys.add(bank_key(network, image_set(labels=False), TRANSFORM))
    keys.add(bank_key(network, image_set(), Transform(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.2))))
    for changed in (
        {"taps": ("convolution",)},
        {"precision": "bfloat16"},
        {"precision": "tf32"},
        {"compile": True},
    ):
        keys.add(bank_key(network, image_set(), TRANSFORM, FeaturesConfig(**changed)))
    for same in ({}, {"batch_size": 5}, {"shard_size": 5}, {"workers": 1}):
        keys.add(bank_key(network, image_set(), TRANSFORM, FeaturesConfig(**same)))
    with torch.no_grad():
        network.head.bias[0] += 1
    keys.add(bank_key(network, image_set(), TRANSFORM))
    assert len(keys) == 10


def test_a_file_under_its_final_name_is_always_complete(network, tmp_path):
    extract(network, image_set(), TRANSFORM, tmp_path, OPTIONS)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["bank.json", *(f"shard-0000{i}.safetensors" for i in range(3))]
    assert set(load_file(shard_path(tmp_path, 0))) == {"features", "logits", "labels"}


class Staged(Classifier):
    """Modules whose output is changed in place, or which run twice; counts the passes that reach the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.activation = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 5, 3, padding=1)
        self.last = nn.Conv2d(5, 6, 3, stride=2)
        self.head = nn.Linear(6, 3)
        self.whole_passes = 0

    def feature_map(self, images):
        x = self.activation(self.second(self.activation(self.first(images))))
        self.whole_passes += 1
        return self.last(x)


def bytes_of(images):
    return torch.from_numpy(images.array).permute(0, 3, 1, 2)


def test_a_network_of_pixels_gives_the_numbers_of_the_bank(tmp_path):
    network, images, names = Staged(), image_set(), ("first", "activation", "second")
    options = FeaturesConfig(batch_size=4, shard_size=8, taps=names)
    bank = extract(network, images, TRANSFORM, tmp_path, options).load()
    pixel_network, pixels = PixelNetwork(network, TRANSFORM), bytes_of(images) / 255
    torch.testing.assert_close(pixel_network.logits(pixels), bank.logits)
    for _ in range(2):  # the second time the pass ends early
        for asked in (names, ("activation",), ("second", "features"), ("features",), ("head",)):
            pooled = pixel_network.pooled(pixels, asked)
            assert list(pooled) == list(asked)
            for name, value in pooled.items():
                known = {"features": bank.features, "head": bank.logits, **bank.taps}
                torch.testing.assert_close(value, known[name])
    with pytest.raises(InputError, match="no module 'third' to tap"):
        pixel_network.pooled(pixels, ("third",))


def test_a_pass_ends_at_the_last_module_that_is_needed():
    network = Staged()
    pixel_network, pixels = PixelNetwork(network, TRANSFORM), torch.rand(2, 3, 6, 6)
    for asked, whole in (
        (("first",), 0),
        (("first", "last"), 1),
        (("second",), 0),
        (("first", "features"), 1),
    ):
        pixel_network.pooled(pixels, asked)
        before = network.whole_passes
        pixel_network.pooled(pixels, asked)
        assert network.whole_passes - before == whole


def test_a_network_of_pixels_has_input_gradients_only():
    network = Staged().train()
    pixel_network, pixels = PixelNetwork(network, TRANSFORM), torch.rand(2, 3, 6, 6, requires_grad=True)
    assert not network.training
    pooled = pixel_network.pooled(pixels, ("first", "second", "features"))
    loss = pixel_network.logits(pixels).square().sum() + sum(
        value.square().sum() for value in pooled.values()
    )
    loss.backward()
    assert pixels.grad.abs().amax((1, 2, 3)).min() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_normalisation_of_pixels():
    pixels = torch.stack([torch.zeros(3, 1, 1), torch.ones(3, 1, 1)])
    mean, std = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
    transform = Transform(mean=tuple(m / 255 for m in mean), std=tuple(s / 255 for s in std))
    normalised = PixelNetwork(Staged(), transform)._inputs(pixels)
    torch.testing.assert_close(normalised, transform.normalise((255 * pixels).to(torch.uint8)))
    expected = [[-1.988889, -1.980676, -1.707646], [2.058730, 2.125604, 2.115442]]
    torch.testing.assert_close(normalised[:, :, 0, 0], torch.tensor(expected), atol=1e-6, rtol=0)


def test_an_image_bank_pairs_every_shard_with_its_images(network, tmp_path):
    images = image_set()
    stored = extract(network, images, TRANSFORM, tmp_path, OPTIONS)
    bank = ImageBank(
        stored,
        PixelNetwork(network, TRANSFORM),
        lambda start, stop: image_batches(images, TRANSFORM, start, stop, 3),
        "made",
    )
    assert len(bank) == 21
    shards = list(bank.shards())
    assert [len(shard) for shard in shards] == [8, 8, 5]
    for shard, plain in zip(shards, stored.shards(), strict=True):
        batches = list(shard.pixels())
        assert [len(batch) for batch in batches] == ([3, 3, 2] if len(shard) == 8 else [3, 2])
        torch.testing.assert_close(bank.network.logits(torch.cat(batches)), plain.logits)
        assert torch.equal(shard.features, plain.features) and torch.equal(shard.labels, plain.labels)
    assert torch.equal(
        torch.cat([batch for shard in shards for batch in shard.pixels()]), bytes_of(images) / 255
    )


def test_the_batch_size_follows_the_device_unless_it_is_set():
    assert pass_batch_size(FeaturesConfig(), "cpu") == 32
    assert pass_batch_size(FeaturesConfig(), torch.device("cuda:0")) == 256
    assert pass_batch_size(FeaturesConfig(batch_size=5), "cuda") == 5


def sharded(features, labels=None, pieces=3):
    class Sharded:
        def __len__(self):
            return len(features)

        def shards(self):
            for index in torch.arange(len(features)).chunk(pieces):
                yield FeatureBank(features[index], features[index], None if labels is None else labels[index])

    return Sharded()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("percentile", [0, 10, 37.5, 90, 99.9, 100])
def test_the_activation_percentile_is_numpys(dtype, percentile):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(101, 7, dtype=dtype, generator=generator) * 10 ** torch.randn(
        101, 1, generator=generator
    ).to(dtype)
    features[::5] = 0.0
    features[1, 0] = -0.0
    expected = np.percentile(features.double().numpy(), percentile)
    assert activation_percentile(sharded(features), percentile) == pytest.approx(
        expected, rel=1e-12, abs=1e-300
    )


def test_class_means_stream_over_shards():
    features, labels = torch.randn(50, 4), torch.arange(50) % 3
    means, counts = class_means(sharded(features, labels), 4)
    assert means.dtype == torch.float64 and counts.tolist() == [17, 17, 16, 0]
    for label in range(3):
        torch.testing.assert_close(means[label], features[labels == label].double().mean(0))
    assert means[3].isnan().all()


def test_class_means_need_labels_in_range():
    with pytest.raises(InputError, match="no labels"):
        class_means(sharded(torch.randn(5, 2)), 2)
    with pytest.raises(InputError, match=r"expected 0 to 2"):
        class_means(sharded(torch.randn(5, 2), torch.arange(5), 1), 3)


def test_banks_and_heads_refuse_shapes_that_do_not_belong_together():
    with pytest.raises(InputError, match="3 rows of features and 2 of labels"):
        FeatureBank(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"expected \[C, D\] and \[C\]"):
        Head(torch.zeros(3, 2), torch.zeros(2))


def test_an_unusable_device_is_one_sentence():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="Device 'cuad' cannot be used"):
        resolve_device("cuad")


def test_bfloat16_is_the_network_s_and_not_the_head_s(network, tmp_path):
    whole = extract(network, image_set(), TRANSFORM, tmp_path / "a", OPTIONS).load()
    options = OPTIONS.model_copy(update={"precision": "bfloat16"})
    rounded = extract(network, image_set(), TRANSFORM, tmp_path / "b", options).load()
    assert rounded.features.dtype == torch.float32
    assert not torch.equal(rounded.features, whole.features)
    torch.testing.assert_close(rounded.features, whole.features, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(rounded.logits, network.head(rounded.features).detach(), rtol=1e-6, atol=1e-6)


def test_only_batches_of_full_size_go_to_the_compiled_network(network, tmp_path, monkeypatch):
    sizes = []

    def compiled(function):
        def run(inputs):
            sizes.append(len(inputs))
            return function(inputs)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    options = FeaturesConfig(batch_size=3, shard_size=8, compile=True)
    bank = extract(network, image_set(), TRANSFORM, tmp_path / "a", options).load()
    assert sizes == [3, 3] * 2 + [3]  # shards of 8, 8 and 5 images
    options = options.model_copy(update={"compile": False})
    assert torch.equal(
        bank.features, extract(network, image_set(), TRANSFORM, tmp_path / "b", options).load().features
    )
    assert len(sizes) == 5


def test_the_precision_of_products_is_put_back():
    def allowed():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = allowed()
    with pytest.raises(KeyError), float32_products():
        assert allowed() == (False, False)
        with float32_products("tf32"):
            assert allowed() == (True, True)
        assert allowed() == (False, False)
        raise KeyError
    assert allowed() == before


def test_nan_in_a_shard_that_is_written_beside_the_next_pass(network, tmp_path):
    """The error of the first shard arrives although the second is computed meanwhile; nothing wrong is kept."""

    class Broken(Tiny):
        def feature_map(self, inputs):
            return super().feature_map(inputs) * (float("nan") if self.images_seen <= 4 else 1)

    broken = Broken()
    with pytest.raises(InputError, match="for 4 of images 0 to 7"):
        extract(broken, image_set(), TRANSFORM, tmp_path, OPTIONS)
    assert not shard_path(tmp_path, 0).exists() and not (tmp_path / "bank.json").exists()


def test_a_compiled_network_keeps_its_taps(tmp_path, monkeypatch):
    """Compiled for real, but without the compiler of C++ that machine code would need."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    options = FeaturesConfig(batch_size=4, shard_size=8, taps=("first", "activation"))
    expected = extract(Staged(), image_set(), TRANSFORM, tmp_path / "a", options).load()
    network = Staged()
    plain = extract(network, image_set(), TRANSFORM, tmp_path / "b", options).load()
    options = options.model_copy(update={"compile": True})
    found = extract(network, image_set(), TRANSFORM, tmp_path / "c", options).load()
    assert not torch.equal(expected.features, plain.features)  # another network
    torch.testing.assert_close(found.features, plain.features)
    for name in options.taps:
        torch.testing.assert_close(found.taps[name], plain.taps[name])


def test_the_key_says_the_precision_on_a_gpu(network):
    """There the default has changed what it means before, and PyTorch's default is not ours."""
    on_cpu = bank_key(network, image_set(), TRANSFORM)
    assert on_cpu != bank_key(network, image_set(), TRANSFORM, device="cuda")
    arithmetic = {"precision": "float32", "compile": False}
    content = weights_fingerprint(network), TRANSFORM.fingerprint, image_set().fingerprint
    expected = sha256_of_json([*content, [], "cuda", EXTRACTION_VERSION, arithmetic])
    assert bank_key(network, image_set(), TRANSFORM, device="cuda") == expected


def test_batches_go_to_any_device():
    batches = list(on_device([torch.zeros(2, 3), torch.zeros(1, 3)], torch.device("meta")))
    assert [(batch.device.type, len(batch)) for batch in batches] == [("meta", 2), ("meta", 1)]


def test_joined_shards_are_the_bank(network, tmp_path):
    options = FeaturesConfig(batch_size=4, shard_size=8, taps=("convolution",))
    bank = extract(network, image_set(), TRANSFORM, tmp_path, options)
    shards = list(bank.shards())
    joined = FeatureBank.joined(shards)
    assert len(shards) == 3 and len(joined) == 21
    for name in ("features", "logits", "labels"):
        assert torch.equal(getattr(joined, name), torch.cat([getattr(shard, name) for shard in shards]))
    assert torch.equal(joined.taps["convolution"], torch.cat([shard.taps["convolution"] for shard in shards]))
    assert FeatureBank.joined(shards[:1]) is shards[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_arrive_on_the_gpu_in_order():
    batches = [torch.full((4, 3, 64, 64), i, dtype=torch.uint8) for i in range(20)]
    for i, batch in enumerate(on_device(batches, torch.device("cuda"))):
        assert batch.is_cuda and batch.eq(i).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("tf32", 1e-2), ("bfloat16", 5e-2)])
def test_a_bank_made_on_the_gpu(network, tmp_path, precision, tolerance):
    expected = extract(network, image_set(), TRANSFORM, tmp_path / "a", OPTIONS).load()
    options = OPTIONS.model_copy(update={"precision": precision})
    found = extract(network, image_set(), TRANSFORM, tmp_path / "b", options, "cuda").load()
    torch.testing.assert_close(found.features, expected.features, rtol=tolerance, atol=tolerance)
    head = Head.of(network)  # always in float32
    torch.testing.assert_close(found.logits, head.logits(found.features), rtol=1e-6, atol=1e-6)
