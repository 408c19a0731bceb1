"""Names for the classes that configs and notebooks choose from, each given by a decorator in the class's own file."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

PACKAGE = "ood_helpers"
Class = TypeVar("Class")


class Registry(Mapping[str, Any]):
    """Name -> class. The modules that register are imported when the first name is looked up.

    Parameters
    ----------
    module : the module `<folder>.<module>` of every folder of the package registers, where there is one
    folder : all modules of this folder register, too
    """

    def __init__(self, module: str, folder: str | None = None) -> None:
        self._module, self._folder = module, folder
        self._classes: dict[str, Any] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[Class], Class]:
        """A decorator that registers a class under a name; a later class of the same name replaces it."""

        def decorate(cls: Class) -> Class:
            self._classes[name] = cls
            return cls

        return decorate

    def __getitem__(self, name: str) -> Any:
        self._load()
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._classes)

    def __len__(self) -> int:
        self._load()
        return len(self._classes)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        root = Path(__file__).parent
        for entry in pkgutil.iter_modules([str(root)]):
            if entry.ispkg and (root / entry.name / f"{self._module}.py").exists():
                importlib.import_module(f"{PACKAGE}.{entry.name}.{self._module}")
        if self._folder is not None:
            for entry in pkgutil.iter_modules([str(root / self._folder)]):
                importlib.import_module(f"{PACKAGE}.{self._folder}.{entry.name}")
