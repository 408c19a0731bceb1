"""Names for the classes that configs and notebooks choose from, each given by a decorator in the class's own file."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ood_helpers.errors import InputError

PACKAGE = "ood_helpers"
Class = TypeVar("Class")


class Registry(Mapping[str, Any]):
    """Name -> class. The modules that register are imported when the first name is looked up.

    Parameters
    ----------
    module : the module `<folder>.<module>` of every folder of the package registers, where there is one
    folder : all modules of this folder register, too
    check : called with the name and the class; raises InputError for a class that does not fit
    """

    def __init__(
        self, module: str, folder: str | None = None, check: Callable[[str, type], None] | None = None
    ) -> None:
        self._module, self._folder, self._check = module, folder, check
        self._classes: dict[str, Any] = {}
        self._loading = self._loaded = False

    def register(self, name: str) -> Callable[[Class], Class]:
        """A decorator that registers a class under a name. The same class may come again, as from a cell that is run again.

        Raises
        ------
        InputError : another class has the name; the class does not fit
        """

        def decorate(cls: Class) -> Class:
            taken = self._classes.get(name, cls)
            if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
                raise InputError(
                    f"{cls.__module__}.{cls.__qualname__} is to be registered as {name!r}, expected a name that is free; "
                    f"{taken.__module__}.{taken.__qualname__} has this one, choose another."
                )
            if self._check is not None:
                self._check(name, cls)
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
        if self._loading or self._loaded:
            return
        self._loading = True  # what is imported may look a name up
        try:
            self._import_all()
            self._loaded = True
        finally:
            self._loading = False

    def _import_all(self) -> None:
        root = Path(__file__).parent
        for entry in pkgutil.iter_modules([str(root)]):
            if entry.ispkg and (root / entry.name / f"{self._module}.py").exists():
                importlib.import_module(f"{PACKAGE}.{entry.name}.{self._module}")
        if self._folder is not None:
            for entry in pkgutil.iter_modules([str(root / self._folder)]):
                importlib.import_module(f"{PACKAGE}.{self._folder}.{entry.name}")
