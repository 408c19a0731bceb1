"""Pooled outputs of the modules inside a network, collected while it runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ood_helpers.errors import InputError


@contextmanager
def tapped(
    network: nn.Module, names: tuple[str, ...], kept: Callable[[str], None] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Collect the spatial mean of the named modules' outputs during forward passes; `kept` is told of each."""
    modules, values = dict(network.named_modules()), {}
    for name in names:
        if name not in modules:
            raise InputError(
                f"The network has no module {name!r} to tap; expected one of: {', '.join(filter(None, modules))}."
            )

    def keep(name):
        def hook(_module, _inputs, output):
            values[name] = output.mean((2, 3)) if output.ndim == 4 else output
            if kept is not None:
                kept(name)

        return hook

    hooks = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield values
    finally:
        for hook in hooks:
            hook.remove()
