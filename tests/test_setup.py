"""The environment files agree, and notebooks are committed without outputs."""

import ast
import json
import re
import runpy
import subprocess
import tomllib
from hashlib import sha256

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ood_helpers.config import PROJECT_ROOT
from ood_helpers.plan import NOTEBOOKS

PROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
PINS = [
    Requirement(line)
    for line in (PROJECT_ROOT / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def test_every_requirement_is_one_exact_version():
    for pin in PINS:
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin


@pytest.mark.parametrize("python", ["3.11.9", "3.12.5", "3.13.1"])
@pytest.mark.parametrize(
    ("system", "machine"), [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]
)
def test_the_pins_fulfil_the_ranges_of_pyproject_on_every_platform(python, system, machine):
    environment = {
        "python_full_version": python,
        "python_version": python.rsplit(".", 1)[0],
        "sys_platform": system,
        "platform_machine": machine,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[system],
        "implementation_name": "cpython",
        "os_name": "posix",
    }
    pinned = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(environment):
            assert canonicalize_name(pin.name) not in pinned, f"{pin.name} is pinned twice"
            pinned[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate(environment):
            assert canonicalize_name(wanted.name) not in pinned, wanted.name
            continue
        assert canonicalize_name(wanted.name) in pinned, wanted.name
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), line


def test_cuda_packages_are_for_linux_only():
    for pin in PINS:
        if pin.name.startswith(("nvidia", "cuda", "triton")):
            assert "linux" in str(pin.marker), pin


def test_no_download_address_is_committed():
    text = (PROJECT_ROOT / "requirements.txt").read_text()
    assert "://" not in text and "--index-url" not in text


def test_environment_yml_installs_the_same_requirements_on_the_same_pythons():
    environment = yaml.safe_load((PROJECT_ROOT / "environment.yml").read_text())
    python, pip, pip_lines = environment["dependencies"]
    assert python.split()[1] == PROJECT["requires-python"]
    assert pip == "pip"
    assert pip_lines["pip"][0] == "-r requirements.txt"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs_and_with_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    source = "\n".join(cell.source for cell in code)
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("save_figure", "export_tables"):
            name = ast.unparse(call.args[1]).lstrip("f'\"")
            assert name.startswith(path.stem), f"the output {name} does not start with its notebook's name"


def committed(path) -> bytes:
    """A file as the checkout's last commit has it: a user's own run may have changed it since."""
    shown = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=PROJECT_ROOT, capture_output=True)
    if not (PROJECT_ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def test_the_readme_shows_the_committed_results():
    assert committed("figures/cifar10_sample/30_results_fpr95.md").strip() in committed("README.md")


@pytest.mark.parametrize("experiment", ["digits", "cifar10_npz", "cifar10_sample"])
def test_committed_figures_are_those_of_the_committed_manifest(experiment):
    outputs = json.loads(committed(f"figures/{experiment}/manifest.json"))["outputs"]
    command = ["git", "ls-tree", "--name-only", "HEAD", f"figures/{experiment}/"]
    names = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True).stdout.split()
    pictures = {name.rsplit("/", 1)[1]: name for name in names if not name.endswith("manifest.json")}
    assert "30_results.png" in pictures
    for name, path in pictures.items():
        assert sha256(committed(path)).hexdigest() == outputs[name], f"{path} is not what the last run made"


def test_committed_figures_are_small():
    files = [
        path for path in (PROJECT_ROOT / "figures").rglob("*") if path.is_file() and path.suffix != ".svg"
    ]
    assert sum(path.stat().st_size for path in files) <= 8e6
    assert {path.name: path.stat().st_size for path in files if path.stat().st_size > 150e3} == {}


def test_the_environment_installs_the_filter_of_notebooks():
    attributes = (PROJECT_ROOT / ".gitattributes").read_text()
    assert "*.ipynb filter=nbstripout" in attributes
    assert "nbstripout --install --attributes .gitattributes" in (PROJECT_ROOT / "Makefile").read_text()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", (PROJECT_ROOT / "README.md").read_text()))
def test_the_readmes_links_lead_somewhere(link):
    assert (PROJECT_ROOT / link).exists()


@pytest.mark.parametrize(
    "script", sorted(path.name for path in (PROJECT_ROOT / "benchmarks").glob("bench_*.py"))
)
def test_benchmarks_find_what_they_measure(script, monkeypatch, capsys):
    folder = PROJECT_ROOT / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(folder / script), run_name="__main__")
    assert f"python benchmarks/{script}" in capsys.readouterr().out
