"""The one exception type for what a user can put right."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Wrong input or setting: one sentence saying what was found, what was expected and what to do."""


class MissingDataError(InputError):
    """An image set or checkpoint that is not on disk and could not be fetched."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error sentence: the closest valid name, or all of them when none is close."""
    valid = sorted(valid)
    close = get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid names: {', '.join(valid) or 'none'}."
