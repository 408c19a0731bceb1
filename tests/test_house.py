"""The shape of the package: imports point one way, nobody imports private names of others, files and classes stay small."""

import ast
import graphlib
import importlib
import inspect

from ood_helpers.config import PROJECT_ROOT

PACKAGE = PROJECT_ROOT / "ood_helpers"
# From the ground up: a module imports from its own floor and those below.
FLOORS = (
    ("errors", "files", "progress", "registry"),
    ("storage",),
    ("config",),
    ("plan", "execution"),
    ("data", "backbones"),
    ("kernels", "metrics", "banks", "statistics", "extract"),
    ("detectors", "training", "results"),
    ("image_sets",),
    ("networks",),
    ("mos", "dfb", "unleashing_mask"),
    ("outlier_exposure",),  # its loss on ID images may be that of Unleashing Mask
    ("plots",),
    ("rows",),
    ("experiment",),
    ("shipping",),
    ("studies", "verification"),
    ("runner",),
    ("report",),
)


def name_of(path):
    parts = path.relative_to(PROJECT_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module):
    """(module, name) of every import from the package, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ood_helpers":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, "") if whole in MODULES else (node.module, alias.name)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in MODULES)


def test_imports_point_downwards():
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    parts = {module: module.split(".")[1] for module in MODULES if "." in module}
    assert set(parts.values()) == set(floor_of)
    upwards = [
        f"{module} imports {other}"
        for module, part in parts.items()
        for other, _ in imports(module)
        if floor_of[parts[other]] > floor_of[part]
    ]
    assert upwards == []


def test_no_module_imports_itself_through_others():
    graph = {module: {other for other, _ in imports(module)} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


def test_private_names_stay_in_their_module():
    found = [
        f"{name} of {other} in {module}"
        for module in MODULES
        for other, name in imports(module)
        if name.startswith("_")
    ]
    assert found == []


def test_files_stay_readable():
    lines = {module: path.read_text().count("\n") for module, path in MODULES.items() if path.stem != "plots"}
    assert {module: count for module, count in lines.items() if count > 500} == {}
    assert lines["ood_helpers.experiment"] < 300


def test_classes_have_few_public_names():
    large = {}
    for module in MODULES:
        for name, found in inspect.getmembers(importlib.import_module(module), inspect.isclass):
            if found.__module__ == module:
                public = [own for own in vars(found) if not own.startswith("_")]
                if len(public) > 25:
                    large[f"{module}.{name}"] = len(public)
    assert large == {}
