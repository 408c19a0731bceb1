"""The store: what is computed once, what makes it stale and what does not, damage, and processes side by side."""

import ast
import json
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from small_experiments import small

from ood_helpers import storage, studies
from ood_helpers.config import PROJECT_ROOT
from ood_helpers.storage import Shards, Store, code_behind, missing_shards, shard_path, tree_fingerprint
from ood_helpers.unleashing_mask.network import loss_constraint
from ood_helpers.unleashing_mask.recipe import Estimate

PACKAGE = PROJECT_ROOT / "ood_helpers"


def entry(folder, **key):
    return Store(folder).entry("things", code=["ood_helpers.metrics"], **key)


# ---- one computation per key ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("json", {"seconds": 1.5, "names": ["a", "b"]}),
        ("table", pd.DataFrame({"epoch": [0, 1], "fpr95": [50.25, 25.5]})),
        ("arrays", ({"scores": np.arange(5.0)}, {"seconds": 1.5})),
    ],
)
def test_what_is_there_is_read_and_what_is_damaged_is_computed_again(tmp_path, capsys, method, value):
    keep = getattr(entry(tmp_path, size=3), method)
    keep = partial(keep, fields=["seconds", "names"]) if method == "json" else keep
    same = pd.testing.assert_frame_equal if method == "table" else np.testing.assert_equal
    same(keep("value", lambda: value), value)
    same(keep("value", lambda: pytest.fail("computed again")), value)
    assert capsys.readouterr().err == ""
    path = next(path for path in tmp_path.rglob("value.*"))
    path.write_bytes(b"" if method == "table" else path.read_bytes()[:9])
    same(keep("value", lambda: value), value)
    assert capsys.readouterr().err == f"{path} is damaged and computed again.\n"
    same(keep("value", lambda: pytest.fail("computed again")), value)


@pytest.mark.parametrize("cut", [3, 7, 30])
def test_a_table_that_has_lost_its_end_is_damaged(tmp_path, capsys, cut):
    table = pd.DataFrame({"epoch": [0, 1, 2], "fpr95": [50.25, 25.5, 12.125]})
    entry(tmp_path).table("value", lambda: table)
    path = next(tmp_path.rglob("value.csv"))
    path.write_bytes(path.read_bytes()[:-cut])
    pd.testing.assert_frame_equal(entry(tmp_path).table("value", lambda: table), table)
    assert "value.csv is damaged and computed again" in capsys.readouterr().err


def test_a_key_is_its_inputs_settings_and_code(tmp_path):
    first = entry(tmp_path, size=3, weights="ab")
    assert first.directory == entry(tmp_path, weights="ab", size=3).directory
    assert first.directory != entry(tmp_path, size=4, weights="ab").directory
    with first.locked() as directory:
        kept = json.loads((directory / "key.json").read_text())
    assert kept == {"size": 3, "weights": "ab", "code": code_behind(["ood_helpers.metrics"])}


def test_processes_side_by_side_compute_once(tmp_path):
    computed = []

    def compute():
        computed.append(time.sleep(0.3))
        return {"number": len(computed)}

    def keep():
        return entry(tmp_path).json("value", compute, ["number"])

    threads = [threading.Thread(target=keep) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == 1 and keep() == {"number": 1}


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError):
        entry(tmp_path).table("value", lambda: 1 / 0)
    assert not list(tmp_path.rglob("value.*"))


@pytest.mark.parametrize("text", ["{}", "[1]", "null", '{"seconds": 1}'])
def test_a_file_without_what_it_should_hold_is_damaged(tmp_path, capsys, text):
    kept = {"seconds": 1, "learned": {}}
    with entry(tmp_path).locked() as directory:
        (directory / "fit.json").write_text(text)
    assert entry(tmp_path).json("fit", lambda: kept, ["seconds", "learned"]) == kept
    assert "fit.json is damaged and computed again" in capsys.readouterr().err


def test_shards_are_complete_only_when_all_are_there(tmp_path, capsys):
    assert Shards.open(tmp_path) is None and missing_shards(tmp_path, [2, 1]) == [0, 1]
    for index, rows in enumerate((2, 1)):
        shard = {"logits": torch.zeros(rows, 4)}
        save_file(shard, shard_path(tmp_path, index), metadata={"seconds": "0.1"})
    assert missing_shards(tmp_path, [2, 1]) == [] and missing_shards(tmp_path, [2, 1, 5]) == [2]
    shard_path(tmp_path, 0).write_bytes(b"no shard")
    save_file({"logits": torch.zeros(1, 4)}, shard_path(tmp_path, 1))
    assert missing_shards(tmp_path, [2, 1]) == [0, 1]
    notices = capsys.readouterr().err
    assert all(f"{shard_path(tmp_path, i)} is damaged and computed again." in notices for i in (0, 1))


def test_shards_of_another_size_are_not_called_damaged(tmp_path, capsys):
    save_file({"logits": torch.zeros(2, 4)}, shard_path(tmp_path, 0), metadata={"seconds": "0.1"})
    assert missing_shards(tmp_path, [3]) == [0] and capsys.readouterr().err == ""


# ---- what makes an entry stale ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(finished):
    """Stage -> the modules in the keys of its entries, of an experiment that has run through all stages."""
    run = small(finished[0], "networks.um.save_every=1")
    studies.along_training(run, run.network("um"), images=20)
    loss_constraint(run.backbone, Estimate(draws=1), "last")
    run.network("oe").model()
    found = {}
    for path in (finished[0] / "runs").glob("*/*/key.json"):
        key = json.loads(path.read_text())
        kind = path.parts[-3]
        if kind == "models":
            kind = f"training of {key['recipe']['method'] if 'recipe' in key else 'the backbone'}"
        elif kind in ("scores", "grids"):
            kind = f"{kind} of {key['detector'][0]}"
        found[kind] = key["code"]
    return found


# stage -> modules with its formulas
STAGES = {
    "banks": ("extract", "backbones.densenet", "data.transforms"),
    "training of the backbone": ("training.classifier", "training.batches", "training.loop"),
    "training of classifier": ("mos.training", "mos.groups", "training.fine_tuning"),
    "training of dense": ("dfb.training", "dfb.pseudo_masks", "dfb.activation_maps", "training.fine_tuning"),
    "training of unleashing_mask": ("unleashing_mask.loss_constraint", "unleashing_mask.weight_masks"),
    "training of outlier_exposure": ("outlier_exposure.training", "outlier_exposure.objectives"),
    "estimates": ("unleashing_mask.loss_constraint",),
    "maps": ("dfb.activation_maps",),
    "masks": ("dfb.pseudo_masks",),
    "scores of Energy": ("detectors.energy",),
    "scores of ODIN": ("detectors.odin", "backbones.pixels"),
    "scores of ReAct": ("detectors.react", "kernels.shaped_energy"),
    "scores of LINe": ("detectors.line", "kernels.line_head", "statistics"),
    "scores of MOS": ("kernels.group_score",),
    "scores of DFB": ("dfb.detector",),
    "scores of MahalanobisEnsemble": ("detectors.mahalanobis_ensemble", "metrics"),
    "grids of LINe": ("metrics", "detectors.line"),
    "intervals": ("metrics",),
    "along": ("metrics", "detectors.energy", "statistics"),
}


class Formula(ast.NodeTransformer):
    """Another number or another operator in the first product, quotient, sum or difference."""

    changed = False

    def visit_BinOp(self, node):
        other = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}.get(type(node.op))
        if other and not self.changed:
            self.changed, node.op = True, other()
        return self.generic_visit(node)

    def visit_Constant(self, node):
        if type(node.value) in (int, float) and not self.changed:
            self.changed, node.value = True, node.value + 1
        return node


class Typo(ast.NodeTransformer):
    """Other docstrings and error messages, and none of the comments and line breaks."""

    def visit(self, node):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body[0].value.value += " corrected"
        if isinstance(node, ast.Raise) and node.exc is not None:
            node.exc = ast.parse("ValueError('corrected')", mode="eval").body
        return super().visit(node)


def edited(folder: Path, module: str, change: ast.NodeTransformer) -> Path:
    """A copy of the package with a change in one module."""
    root = folder / "ood_helpers"
    if not root.exists():
        shutil.copytree(PACKAGE, root)
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    tree = change.visit(ast.parse(path.read_text()))
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    return root


@pytest.mark.parametrize(("stage", "module"), [(stage, one) for stage, of in STAGES.items() for one in of])
def test_a_formula_makes_its_stage_stale_and_a_typo_does_not(keys, tmp_path, stage, module):
    named = [
        name for name in keys[stage] if (PACKAGE.parent / name.replace(".", "/")).with_suffix(".py").exists()
    ]
    assert f"ood_helpers.{module}" in named
    before = code_behind(named)
    assert code_behind(named, edited(tmp_path, module, Typo())) == before
    after = code_behind(named, edited(tmp_path / "formula", module, Formula()))
    assert {name for name in before if after[name] != before[name]} == {f"ood_helpers.{module}"}


def test_a_file_changed_while_the_process_runs_is_never_taken_for_what_runs(monkeypatch):
    before = code_behind(["ood_helpers.metrics", loss_constraint])
    monkeypatch.setattr(storage, "BEGUN", 0)
    after = code_behind(["ood_helpers.metrics", loss_constraint])
    assert all(after[name] != digits for name, digits in before.items())


def test_texts_that_tables_show_rerun_notebooks(tmp_path):
    files = []
    for title in ("MSP", "Max softmax"):
        files.append(tmp_path / f"{len(files)}.py")
        files[-1].write_text(f"class MSP:\n    title: ClassVar[str] = '{title}'\n")
    assert tree_fingerprint(files[0]) != tree_fingerprint(files[1])


def test_every_stage_is_tried(keys):
    kinds = {stage.partition(" of ")[0] for stage in keys}
    assert kinds == {stage.partition(" of ")[0] for stage in STAGES}


def test_the_scores_of_a_detector_do_not_rest_on_another_one(keys):
    assert "ood_helpers.detectors.line" not in keys["scores of ReAct"]
    assert "ood_helpers.detectors.msp" not in keys["scores of LINe"]


def test_a_function_alone_can_be_in_a_key():
    assert list(code_behind([studies.sweep])) == ["ood_helpers.studies.sweep"]


SCRIPT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from pathlib import Path
from small_experiments import small
run = small(Path(sys.argv[1]), 'detectors={"msp": {}, "energy": {}}', "networks={}", "tuning=null", "outliers=null", "weights=null")
print(run.results()[["method", "ood_set", "threshold95", "auroc"]].to_json())
"""


def test_a_run_after_an_edit_computes_what_the_edit_concerns(tmp_path):
    """A typo in MSP and in the forward pass, a formula in Energy."""
    root = shutil.copytree(PACKAGE, tmp_path / "ood_helpers")
    shutil.copytree(PROJECT_ROOT / "configs", tmp_path / "configs")

    def results() -> tuple[pd.DataFrame, dict[str, int]]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(PROJECT_ROOT / "tests")]
        finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
        files = (
            path for path in (tmp_path / "runs").rglob("*.*") if path.suffix in (".safetensors", ".json")
        )
        table = pd.DataFrame(json.loads(finished.stdout.splitlines()[-1]))
        return table, {str(path): path.stat().st_mtime_ns for path in files}

    table, files = results()
    for module in ("detectors.msp", "extract"):
        edited(tmp_path, module, Typo())
    energy = root / "detectors" / "energy.py"
    formula = "return energy_score("
    assert formula in energy.read_text()
    energy.write_text(energy.read_text().replace(formula, "return 0.5 * energy_score("))
    changed, more = results()
    assert files.items() <= more.items()  # nothing lost, nothing written again
    new = {Path(path).parts[-3] for path in more.keys() - files.keys()}
    assert new == {"scores", "intervals"}  # no bank, no training
    factor = table.method.map({"MSP": 1.0, "Energy": 0.5})
    assert changed.threshold95.tolist() == pytest.approx((factor * table.threshold95).tolist())
    assert changed.auroc.tolist() == table.auroc.tolist()
