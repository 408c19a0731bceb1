"""The registry of names: what happens to a module that cannot be imported."""

import pkgutil
from types import SimpleNamespace

import pytest

from ood_helpers.registry import Registry


def test_a_module_that_cannot_be_imported_is_named_every_time(monkeypatch):
    broken = SimpleNamespace(name="not_there", ispkg=False)
    monkeypatch.setattr(pkgutil, "iter_modules", lambda _: [broken])
    registry = Registry("thing", folder="detectors")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="not_there"):
            list(registry)
