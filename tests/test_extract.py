"""The forward pass: once per network and image set, in shards, resumed, repaired, under a key of its inputs."""

from functools import partial

import pytest
import torch
from bank_examples import OPTIONS, TRANSFORM, Staged, bytes_of, random_images, tiny
from safetensors.torch import load_file

from ood_helpers.banks import Head
from ood_helpers.config import FeaturesConfig
from ood_helpers.data import Transform
from ood_helpers.errors import InputError
from ood_helpers.extract import bank_entry, extract, on_device, pass_batch_size
from ood_helpers.statistics import accuracy
from ood_helpers.storage import Shards, Store, shard_path


@pytest.fixture
def network():
    return tiny()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def passed(network, store, images=None, options=OPTIONS, device="cpu"):
    return extract(network, images or random_images(), TRANSFORM, store, options, device)


def folder_of(network, store):
    return bank_entry(network, random_images(), TRANSFORM, store, OPTIONS).directory


def test_a_bank_equals_a_plain_forward_pass(network, store):
    images = random_images()
    bank = passed(network, store, images)
    inputs = TRANSFORM.normalise(bytes_of(images))
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


def test_images_pass_once_however_often_the_bank_is_opened(network, store):
    keys = {passed(network, store).key for _ in range(3)}
    assert network.images_seen == 21 and len(keys) == 1


def test_an_interrupted_pass_resumes_at_the_next_shard_with_the_same_numbers(network, tmp_path):
    def interrupt(_module, _inputs):
        if network.images_seen > 12:
            raise KeyboardInterrupt

    store = Store(tmp_path / "a")
    hook = network.convolution.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        passed(network, store)
    hook.remove()
    folder = folder_of(network, store)
    assert Shards.open(folder) is None
    assert [path.name for path in folder.glob("*.safetensors")] == ["shard-00000.safetensors"]
    network.images_seen = 0
    resumed = passed(network, store).load()
    assert network.images_seen == 13
    whole = passed(network, Store(tmp_path / "b")).load()
    assert torch.equal(resumed.features, whole.features) and torch.equal(resumed.logits, whole.logits)


def test_a_shard_cut_in_half_is_named_and_only_it_is_computed_again(network, store, capsys):
    before, path = passed(network, store).load(), shard_path(folder_of(network, store), 1)
    before = before.map(torch.clone)  # the shards are memory-mapped
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    after = passed(network, store).load()
    assert f"{path} is damaged and computed again." in capsys.readouterr().err
    assert network.images_seen == 21 + 8
    assert torch.equal(before.features, after.features)


def test_shards_of_another_size_are_computed_again(network, store):
    """The settings changed between an interrupted pass and the next one."""
    expected = passed(network, store).load().map(torch.clone)
    (folder_of(network, store) / "record.json").unlink()
    bank = passed(network, store, options=FeaturesConfig(batch_size=4, shard_size=6))
    assert [len(shard) for shard in bank.shards()] == [6, 6, 6, 3]
    torch.testing.assert_close(bank.load().features, expected.features)
    assert torch.equal(bank.load().labels, expected.labels)


def test_nan_outputs_stop_the_pass_and_leave_finished_shards(network, store):
    def spoil(_module, _inputs, output):
        return output * (float("nan") if network.images_seen > 16 else 1)

    network.convolution.register_forward_hook(spoil)
    with pytest.raises(
        InputError, match=r"NaN or infinite outputs for 5 of images 16 to 20 of made \(first: 16\)"
    ):
        passed(network, store)
    folder = folder_of(network, store)
    assert shard_path(folder, 1).exists() and not shard_path(folder, 2).exists()


def test_nan_in_a_shard_that_is_written_beside_the_next_pass(network, store):
    """The error of the first shard arrives although the second is computed meanwhile; nothing wrong is kept."""

    def spoil(_module, _inputs, output):
        return output * (float("nan") if network.images_seen <= 4 else 1)

    network.convolution.register_forward_hook(spoil)
    with pytest.raises(InputError, match="for 4 of images 0 to 7"):
        passed(network, store)
    folder = folder_of(network, store)
    assert not shard_path(folder, 0).exists() and not (folder / "record.json").exists()


def test_taps_hold_the_pooled_outputs_of_modules(network, store):
    options = FeaturesConfig(batch_size=4, shard_size=8, taps=("convolution",))
    bank = passed(network, store, random_images(labels=False), options).load()
    inputs = TRANSFORM.normalise(bytes_of(random_images()))
    torch.testing.assert_close(bank.taps["convolution"], network.convolution(inputs).mean((2, 3)).detach())
    assert bank.labels is None
    with pytest.raises(InputError, match="no module 'conv' to tap"):
        passed(network, store, options=FeaturesConfig(taps=("conv",)))


def test_the_key_changes_with_everything_the_numbers_depend_on(network, store):
    def key(images=None, transform=TRANSFORM, **options):
        return bank_entry(
            network, images or random_images(), transform, store, FeaturesConfig(**options)
        ).name

    keys = {
        key(),
        key(random_images(seed=1)),
        key(random_images(count=20)),
        key(random_images(labels=False)),
        key(transform=Transform(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.2))),
        key(taps=("convolution",)),
        key(precision="bfloat16"),
        key(precision="tf32"),
        key(compile=True),
    }
    assert len(keys) == 9
    for same in ({}, {"batch_size": 5}, {"shard_size": 5}, {"workers": 1}):
        assert key(**same) == key()
    with torch.no_grad():
        network.head.bias[0] += 1
    assert key() not in keys


def test_the_key_says_the_precision_on_a_gpu(network, store):
    """There PyTorch's default is not ours."""
    on_cpu = bank_entry(network, random_images(), TRANSFORM, store)
    on_gpu = bank_entry(network, random_images(), TRANSFORM, store, device="cuda")
    assert on_cpu.name != on_gpu.name
    assert on_gpu.key["device"] == "cuda"
    assert on_gpu.key["arithmetic"] == {"precision": "float32", "compile": False}


def test_a_file_under_its_final_name_is_always_complete(network, store):
    passed(network, store)
    folder = folder_of(network, store)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["key.json", "record.json", *(f"shard-0000{i}.safetensors" for i in range(3))]
    assert set(load_file(shard_path(folder, 0))) == {"features", "logits", "labels"}


def test_the_batch_size_follows_the_device_unless_it_is_set():
    assert pass_batch_size(FeaturesConfig(), "cpu") == 32
    assert pass_batch_size(FeaturesConfig(), torch.device("cuda:0")) == 256
    assert pass_batch_size(FeaturesConfig(batch_size=5), "cuda") == 5


def test_bfloat16_is_the_network_s_and_not_the_head_s(network, store):
    whole = passed(network, store).load()
    rounded = passed(network, store, options=FeaturesConfig(batch_size=4, shard_size=8, precision="bfloat16"))
    rounded = rounded.load()
    assert rounded.features.dtype == torch.float32
    assert not torch.equal(rounded.features, whole.features)
    torch.testing.assert_close(rounded.features, whole.features, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(rounded.logits, network.head(rounded.features).detach(), rtol=1e-6, atol=1e-6)


def test_only_batches_of_full_size_go_to_the_compiled_network(network, store, monkeypatch):
    sizes = []

    def compiled(function):
        def run(inputs):
            sizes.append(len(inputs))
            return function(inputs)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    bank = passed(network, store, options=FeaturesConfig(batch_size=3, shard_size=8, compile=True)).load()
    assert sizes == [3, 3] * 2 + [3]  # shards of 8, 8 and 5 images
    plain = passed(network, store, options=FeaturesConfig(batch_size=3, shard_size=8)).load()
    assert torch.equal(bank.features, plain.features)
    assert len(sizes) == 5


def test_a_compiled_network_keeps_its_taps(store, monkeypatch):
    """Compiled for real, but without the compiler of C++ that machine code would need."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    settings = {"batch_size": 4, "shard_size": 8, "taps": ("first", "activation")}
    network = Staged()
    plain = passed(network, store, options=FeaturesConfig(**settings)).load()
    found = passed(network, store, options=FeaturesConfig(**settings, compile=True)).load()
    torch.testing.assert_close(found.features, plain.features)
    for name in settings["taps"]:
        torch.testing.assert_close(found.taps[name], plain.taps[name])


def test_batches_go_to_any_device():
    batches = list(on_device([torch.zeros(2, 3), torch.zeros(1, 3)], torch.device("meta")))
    assert [(batch.device.type, len(batch)) for batch in batches] == [("meta", 2), ("meta", 1)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_arrive_on_the_gpu_in_order():
    batches = [torch.full((4, 3, 64, 64), i, dtype=torch.uint8) for i in range(20)]
    for i, batch in enumerate(on_device(batches, torch.device("cuda"))):
        assert batch.is_cuda and batch.eq(i).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("tf32", 1e-2), ("bfloat16", 5e-2)])
def test_a_bank_made_on_the_gpu(network, store, precision, tolerance):
    expected = passed(network, store).load()
    options = OPTIONS.model_copy(update={"precision": precision})
    found = passed(network, store, options=options, device="cuda").load()
    torch.testing.assert_close(found.features, expected.features, rtol=tolerance, atol=tolerance)
    head = Head.of(network)  # always in float32
    torch.testing.assert_close(found.logits, head.logits(found.features), rtol=1e-6, atol=1e-6)
