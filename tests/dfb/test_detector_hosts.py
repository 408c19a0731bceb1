"""The hosts of DFB: what they see of the head and of the network, and those that need images."""

import numpy as np
import pytest
import torch
from background_examples import dense_problem
from detector_examples import make_bank, split
from numpy.testing import assert_allclose
from torch import nn

from ood_helpers.backbones import Classifier
from ood_helpers.backbones.pixels import PixelNetwork
from ood_helpers.banks import BackgroundBank, FeatureBank, Head, ImageBank
from ood_helpers.data import Transform
from ood_helpers.detectors import DETECTORS, create
from ood_helpers.detectors.vim import ViM
from ood_helpers.dfb.detector import DFB
from ood_helpers.errors import InputError
from ood_helpers.networks.background import foreground_classifier, foreground_head

TRANSFORM = Transform(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def test_vim_sees_the_rows_of_the_foreground_only():
    """The example of ViM, with a third output that must not change origin, alpha or energy."""
    train = torch.tensor(
        [[2, 0, 1], [3, 1, 0], [0, 2, 1], [1, 3, 0], [2, 2, 2], [0, 0, 1]], dtype=torch.float64
    )
    queries = torch.tensor([[2.5, 0.5, 0.5], [-1, -1, 4], [0, 0, 0]], dtype=torch.float64)
    weight = torch.tensor([[1, -0.5, 0.2], [-0.4, 1, 0.1], [7, -2, 3]], dtype=torch.float64)
    head = Head(weight, torch.tensor([0.1, -0.2, 5], dtype=torch.float64))
    train, bank = make_bank(train, head), make_bank(queries, head)
    dfb = DFB({"detector": "vim", "dimension": 1}).fit(
        BackgroundBank(split(train, 2, 4)), foreground_head(head)
    )
    bank = BackgroundBank(bank)
    assert dfb.learned["host"]["alpha"] == pytest.approx(1.328896, abs=1e-6)
    assert_allclose(dfb.host_.origin_, [-0.012247, 0.191182, 0.039189], atol=1e-6)
    assert_allclose(dfb.foreground_scores(bank), [0.631614, -4.877239, 0.449107], atol=1e-6)
    background = queries @ weight[2] + 5
    assert_allclose(dfb.score_samples(bank), dfb.foreground_scores(bank) + background, atol=1e-12)
    naive = ViM(dimension=1).fit(train, head).score_samples(bank.bank)
    assert (naive - dfb.foreground_scores(bank)).abs().min() > 0.1


ON_BANKS = [
    name
    for name, detector in DETECTORS.items()
    if name != "pytorch_ood"
    and not (detector().needs_images or detector().needs_validation or detector().default_network)
]


@pytest.mark.parametrize("name", [*ON_BANKS, "pytorch_ood.KNN"])
def test_every_detector_can_be_host(name):
    """Its score is the detector's own on K logits that were never more, in shards as in memory."""
    train, head, bank = dense_problem()
    settings = {"k": 3} if name.endswith(("knn", "KNN")) else {}
    small = foreground_head(head)
    host = create(name, **settings).fit(make_bank(train.features, small, train.labels), small)
    expected = host.score_samples(make_bank(bank.features, small)) - bank.logits[:, -1] / 2
    detector = DFB({"detector": name, **settings}, sigma=-1, temperature=2)
    detector.fit(BackgroundBank(split(train, 15, 25)), small)
    scores = detector.score_samples(BackgroundBank(split(bank, 1, 20, 2)))
    assert scores.dtype == torch.float64
    assert_allclose(scores, expected, atol=1e-6 if "pytorch" in name else 1e-9)
    assert (detector.fit_set, detector.needs_images, detector.extra_passes) == ("train", False, 0)
    fitted_on_memory = DFB({"detector": name, **settings}, -1, 2).fit(BackgroundBank(train).load(), small)
    assert_allclose(fitted_on_memory.score_samples(BackgroundBank(bank).load()), scores, atol=1e-6)


class SmallNetwork(Classifier):
    """A convolution and a head of K + 1 = 4 outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def feature_map(self, images):
        return nn.functional.gelu(self.stem(images))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return SmallNetwork()


def image_bank(network, count, seed, network_of_images=None):
    """An ImageBank around the foreground of a bank; the images are all of one batch or several."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 6, 6), generator=generator).to(torch.uint8)
    dense = PixelNetwork(network, TRANSFORM.mean, TRANSFORM.std)
    with torch.no_grad():
        features = dense.pooled(images / 255, ("features",))["features"]
        bank = FeatureBank(features, network.head(features), torch.arange(count) % 3)
    view = PixelNetwork(network_of_images or foreground_classifier(network), TRANSFORM.mean, TRANSFORM.std)
    return ImageBank(
        BackgroundBank(bank), view, lambda start, stop: iter(images[start:stop].split(7)), "made"
    )


@pytest.mark.parametrize("temperature", [3.0, None])
def test_odin_with_noise_as_host_equals_a_plain_loop(temperature, network):
    bank = image_bank(network, 17, seed=1)
    head = foreground_head(Head.of(network))
    host = {"detector": "odin", "temperature": 5, "noise": 0.01}
    detector = DFB(host, -1, temperature)
    assert detector.needs_images and detector.extra_passes == 3
    detector.fit(bank if temperature is None else bank.bank, head)
    mean, std = (torch.tensor(values)[:, None, None] for values in (TRANSFORM.mean, TRANSFORM.std))
    foreground, background = [], []
    for image in torch.cat(list(bank.batches(0, 17))):
        pixels = (image[None] / 255).requires_grad_()
        logits = network((pixels - mean) / std)[:, :3]
        nn.functional.cross_entropy(logits / 5, logits.argmax(1)).backward()
        moved = pixels.detach() - 0.01 * pixels.grad.sign()
        foreground.append(float((network((moved - mean) / std)[:, :3].double() / 5).softmax(1).max()))
        background.append(-float(network((pixels.detach() - mean) / std)[0, 3]))
    used = np.std(background) / np.std(foreground) if temperature is None else temperature
    assert detector.temperature_ == pytest.approx(used, rel=1e-4)
    assert_allclose(detector.foreground_scores(bank), foreground, atol=1e-6)
    assert_allclose(detector.background_scores(bank), background, atol=1e-6)
    scores = np.array(foreground) + np.array(background) / used
    assert_allclose(detector.score_samples(bank), scores, atol=1e-5)


def test_a_host_that_tunes_itself_gets_the_validation_bank(network):
    train, validation, bank = (image_bank(network, count, seed) for count, seed in ((30, 1), (24, 2), (9, 3)))
    head = foreground_head(Head.of(network))
    host = {"detector": "mahalanobis_ensemble", "layers": ["features"], "noise": 0.01, "outlier_step": 0.1}
    detector = DFB(host)
    assert detector.needs_validation
    with pytest.raises(InputError, match="DFB: found no validation bank"):
        detector.fit(train, head)
    detector.fit(train, head, validation)
    alone = create(**{"name" if key == "detector" else key: value for key, value in host.items()})
    expected = alone.fit(train, head, validation).score_samples(bank)
    assert_allclose(detector.foreground_scores(bank), expected, atol=1e-12)
    assert detector.parts["foreground"].tuned_against == alone.tuned_against != ""
    assert detector.learned == {"host": alone.learned} and detector.extra_passes == 3


def test_the_network_of_the_images_must_have_lost_the_background(network):
    head = foreground_head(Head.of(network))
    whole = image_bank(network, 24, 1, network_of_images=network)
    host = {"detector": "odin", "noise": 0.01}
    with pytest.raises(InputError, match="has 4 outputs, expected the 3 of the foreground classes"):
        DFB(host).fit(whole.bank, head).score_samples(whole)
    with pytest.raises(InputError, match="pass its foreground_classifier"):
        DFB({"detector": "mahalanobis_ensemble"}).fit(whole.bank, head, whole)


def test_a_temperature_is_learned_from_training_images(network):
    images, head = image_bank(network, 8, 0), foreground_head(Head.of(network))
    with pytest.raises(
        InputError, match="temperature is None and the host ODIN needs images, expected an ImageBank"
    ):
        DFB("odin", temperature=None).fit(images.bank, head)
