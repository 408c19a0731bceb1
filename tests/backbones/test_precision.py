"""The device, and the precision of products."""

import pytest
import torch

from ood_helpers.backbones.precision import float32_products, resolve_device
from ood_helpers.errors import InputError


def test_an_unusable_device_is_one_sentence():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="Device 'cuad' cannot be used"):
        resolve_device("cuad")


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
