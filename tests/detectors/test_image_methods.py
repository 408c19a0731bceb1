"""What holds for the detectors that differentiate the network at the images."""

import pytest
import torch
from numpy.testing import assert_allclose
from pixel_examples import SmallNetwork, image_bank, normalised

from ood_helpers.banks import Head
from ood_helpers.detectors import create

every_method = pytest.mark.parametrize("name", ["odin", "mahalanobis_ensemble"])


@every_method
def test_noise_is_in_pixels_whatever_the_normalisation(name, network):
    """A network that normalises itself gives the same scores behind a transform that does not."""

    class Normalising(SmallNetwork):
        def feature_map(self, images):
            return super().feature_map(normalised(images))

    inside = Normalising()
    inside.load_state_dict(network.state_dict())
    scores = []
    for model, transform in ((network, {}), (inside, {"mean": (0, 0, 0), "std": (1, 1, 1)})):
        train, validation, test = (
            image_bank(model, count, seed, **transform) for seed, count in enumerate((60, 40, 20))
        )
        detector = create(name, noise=0.02).fit(train, Head.of(model), validation)
        scores.append(detector.score_samples(test))
    assert_allclose(scores[0], scores[1], rtol=1e-4, atol=1e-4)


@every_method
def test_the_network_is_frozen_and_left_as_it_was(name, network):
    state = {key: value.clone() for key, value in network.state_dict().items()}
    network.train()
    train, validation = image_bank(network, 60, 0), image_bank(network, 40, 1)
    create(name, noise=0.01).fit(train, Head.of(network), validation).score_samples(validation)
    assert not network.training
    for parameter in network.parameters():
        assert parameter.grad is None and not parameter.requires_grad
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key])
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["odin", "mahalanobis", "mahalanobis_ensemble"])
def test_cuda_agrees_with_the_cpu(name, network):
    settings = {} if name == "mahalanobis" else {"noise": 0.01}
    scores = []
    for device in ("cpu", "cuda"):
        train, validation, bank = (image_bank(network, n, n, device) for n in (60, 40, 20))
        detector = create(name, **settings).fit(train, Head.of(network), validation)
        scores.append(detector.score_samples(bank))
    assert scores[1].is_cuda
    # A gradient next to 0 may take its sign from rounding, and its pixel another step.
    assert_allclose(scores[1].cpu(), scores[0], rtol=1e-2, atol=1e-2)
