"""Which notebooks there are, in which order they run, and with which parameters.

A notebook's metadata say what it needs: {"ood": {"needs": ["03_precompute"], "per_seed": true}}; `after` names notebooks that it
only waits for, `method` the training method without which it has nothing to show.
"""

import ast
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from ood_helpers.config.base import PROJECT_ROOT
from ood_helpers.errors import InputError, nearest

NOTEBOOKS = PROJECT_ROOT / "notebooks"


@dataclass(frozen=True)
class Task:
    """One notebook with one seed (or with all seeds, where the notebook is not `per_seed`)."""

    name: str
    notebook: Path
    seed: int
    needs: tuple[str, ...]
    after: tuple[str, ...]
    per_seed: bool


def notebook_names() -> list[str]:
    """The numbered notebooks, in order."""
    return sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def plan(
    seeds: Iterable[int], only: Iterable[str] | None = None, methods: Collection[str] | None = None
) -> list[Task]:
    """The tasks of a run in dependency order.

    Parameters
    ----------
    only : these notebooks and no others
    methods : training methods of the experiment's networks; a notebook about another one is left out, unless
        `only` names it. None = any

    Raises
    ------
    InputError : `only` names a notebook that does not exist
    """
    names, seeds = notebook_names(), list(seeds)
    for name in only or ():
        if name not in names:
            raise InputError(f"No notebook {name!r} in notebooks/; {nearest(name, names)}")
    names = [name for name in names if not only or name in only]
    tasks: list[Task] = []
    for name in names:
        path = NOTEBOOKS / f"{name}.ipynb"
        about = read_notebook(path)["metadata"].get("ood", {})
        if not only and methods is not None and about.get("method", "") not in {"", *methods}:
            continue
        per_seed = about.get("per_seed", False)
        for seed in seeds if per_seed else seeds[:1]:
            earlier = [task for task in tasks if task.seed == seed or not (per_seed and task.per_seed)]
            needs, after = (
                tuple(task.name for task in earlier if task.notebook.stem in about.get(kind, ()))
                for kind in ("needs", "after")
            )
            suffix = f".seed{seed}" if per_seed and len(seeds) > 1 else ""
            tasks.append(Task(name + suffix, path, seed, needs, after, per_seed))
    return tasks


def read_notebook(path: Path) -> dict:
    """A notebook as JSON; importing nbformat takes longer than all that is done with it here."""
    return json.loads(path.read_text(encoding="utf-8"))


def parameter_names(path: Path) -> list[str]:
    """The names that the cells tagged `parameters` of a notebook assign."""
    cells = [
        cell for cell in read_notebook(path)["cells"] if "parameters" in cell["metadata"].get("tags", ())
    ]
    lines = [line for cell in cells for line in ast.parse("".join(cell["source"])).body]
    return [target.id for line in lines if isinstance(line, ast.Assign) for target in line.targets]
