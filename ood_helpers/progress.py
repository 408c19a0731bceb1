"""Progress bars: plain text on stderr, which a terminal, JupyterLab and run_all.py all show live."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


def track(
    iterable: Iterable | None = None, description: str = "", total: int | None = None, unit: str = "it"
) -> tqdm:
    """A tqdm bar over `iterable`, or one to be moved with `.update(n)` when there is none."""
    return tqdm(
        iterable,
        desc=description,
        total=total,
        unit=unit,
        file=sys.stderr,
        mininterval=0.5,
        dynamic_ncols=False,
        ncols=88,
        leave=None,  # a bar inside another one goes when it is done
    )
