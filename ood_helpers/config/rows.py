"""Checking the rows of a config by the source of the detectors: a typo is answered before PyTorch is imported."""

import ast
from functools import cache
from pathlib import Path

from ood_helpers.config.experiment import ExperimentConfig
from ood_helpers.errors import InputError, nearest

PACKAGE = Path(__file__).resolve().parents[1]
OF_ROWS = ("detector", "network", "label")  # keys of a row that are not hyper-parameters


def check_rows(config: ExperimentConfig) -> None:
    """Raise InputError for a row with an unknown detector or hyper-parameter, as `rows.make_row` does; other mistakes are
    left to it."""
    known = hyperparameters()
    for row, settings in config.detectors.items():
        name = settings.get("detector") or row
        if "." in str(name):  # of another library
            continue
        if name not in known:
            raise InputError(f"detectors.{row}: There is no detector {name!r}; {nearest(str(name), known)}")
        for key in settings:
            if key not in (*OF_ROWS, *known[name]):
                hint = nearest(str(key), known[name]) if known[name] else "it has none."
                raise InputError(
                    f"detectors.{row}: The detector {name!r} has no hyper-parameter {key!r}; {hint}"
                )


@cache
def hyperparameters() -> dict[str, list[str]]:
    """Name of a detector -> its hyper-parameters, the annotated fields of its class and of those that it extends, in alphabetical order."""
    classes: dict[str, tuple[list[str], list[str]]] = {}
    registered: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body if "DETECTORS.register(" in text else ():
            if isinstance(node, ast.ClassDef):
                fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
                own = [line.target.id for line in fields if "ClassVar" not in ast.unparse(line.annotation)]
                classes[node.name] = own, [ast.unparse(base) for base in node.bases]
                for call in node.decorator_list:
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "DETECTORS.register":
                        registered[ast.literal_eval(call.args[0])] = node.name

    def of(name: str) -> set[str]:
        own, bases = classes.get(name, ([], []))
        return {*own}.union(*map(of, bases))

    return {name: sorted(of(cls)) for name, cls in registered.items()}
