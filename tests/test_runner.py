"""The runner: order, failures, what is up to date; on small notebooks that the test writes."""

import json
import shutil

import nbformat
import pytest

from ood_helpers import plan as plan_module
from ood_helpers.config import PROJECT_ROOT
from ood_helpers.errors import InputError
from ood_helpers.experiment import Experiment
from ood_helpers.plan import NOTEBOOKS, notebook_names, plan
from ood_helpers.runner import Runner, package_fingerprint

PARAMETERS = 'experiment = ""\nrun_dir = ""\nfigures_dir = ""\nseed = 0\nseeds = [0]\noverrides = []'


def write(folder, name, *sources, needs=(), after=(), per_seed=False):
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {
        "kernelspec": kernel,
        "ood": {"needs": list(needs), "after": list(after), "per_seed": per_seed},
    }
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), folder / f"{name}.ipynb")


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(plan_module, "NOTEBOOKS", folder)
    return folder


def runner_of(tmp_path, seeds=(0,), only=None, overrides=()):
    parameters = {
        "experiment": "digits",
        "run_dir": str(tmp_path / "runs"),
        "figures_dir": str(tmp_path / "figures"),
    }
    experiment = Experiment.open(**parameters, device="cpu", overrides=overrides)
    return Runner(experiment, parameters | {"overrides": list(overrides)}, list(seeds), plan(seeds, only))


def run(tmp_path, force=False, jobs=2, **options):
    runner, lines, finished = runner_of(tmp_path, **options), [], []
    outcomes = runner.run(
        jobs,
        force,
        lambda task, now, share: lines.append((task.name, now)),
        lambda task, outcome: finished.append(task.name),
    )
    return runner, outcomes, lines, finished


def statuses(tmp_path, **options):
    return [outcome.status for outcome in run(tmp_path, **options)[1].values()]


def earlier(tmp_path, **options):
    """What the last run left, in the eyes of a run with these options."""
    runner = runner_of(tmp_path, **options)
    return [runner.earlier(task).status for task in runner.tasks]


def test_a_failure_names_cell_and_error_and_stops_only_what_needs_it(notebooks, tmp_path):
    write(notebooks, "01_good", f"open({str(tmp_path / 'good')!r}, 'w').close()")
    write(notebooks, "02_bad", "x = 1", "raise ValueError('the reason')", needs=["01_good"])
    write(notebooks, "03_child", "1", needs=["02_bad"])
    write(notebooks, "04_other", "import sys; print('half way', file=sys.stderr)", needs=["01_good"])
    write(notebooks, "05_last", "1", needs=["01_good"], after=["02_bad", "03_child"])
    runner, outcomes, lines, finished = run(tmp_path)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "01_good": "done",
        "02_bad": "failed",
        "03_child": "skipped",
        "04_other": "done",
        "05_last": "done",
    }
    assert "cell 3: ValueError: the reason" in outcomes["02_bad"].error
    assert outcomes["03_child"].error == "it needs 02_bad"
    assert sorted(finished) == sorted(outcomes)
    assert ("04_other", "half way") in lines and ("01_good", "cell 3/3") in lines  # papermill adds a cell
    assert (runner.directory / "02_bad.failed.ipynb").exists() and not (
        runner.directory / "02_bad.ipynb"
    ).exists()
    assert "half way" in (runner.directory / "04_other.html").read_text()


def test_a_second_run_does_only_what_changed(notebooks, tmp_path):
    write(notebooks, "01_first", "1")
    write(notebooks, "02_second", "2", needs=["01_first"])
    assert earlier(tmp_path) == ["not run", "not run"]
    assert statuses(tmp_path) == ["done", "done"]
    assert statuses(tmp_path) == ["up to date", "up to date"]
    write(notebooks, "02_second", "3", needs=["01_first"])
    assert statuses(tmp_path) == ["up to date", "done"]
    assert statuses(tmp_path, force=True, only=["02_second"]) == ["done"]
    changed = ["line.delta=0.5"]  # a run of its own
    assert earlier(tmp_path, overrides=changed) == ["not run", "not run"]
    assert statuses(tmp_path, overrides=changed, only=["01_first"]) == ["done"]
    assert earlier(tmp_path, overrides=changed) == ["up to date", "not run"]
    assert earlier(tmp_path) == ["up to date", "up to date"]
    write(notebooks, "02_second", "4", needs=["01_first"])
    assert earlier(tmp_path) == ["up to date", "out of date"]
    (tmp_path / "runs" / "digits" / "notebooks" / "01_first.ipynb").unlink()
    assert earlier(tmp_path) == ["not run", "out of date"]
    (tmp_path / "runs" / "digits" / "notebooks" / "02_second.json").write_text('{"finger')
    assert earlier(tmp_path) == ["not run", "not run"]


def test_other_shipped_weights_make_everything_out_of_date(notebooks, tmp_path):
    shutil.copytree(PROJECT_ROOT / "weights" / "digits", tmp_path / "weights")
    write(notebooks, "01_first", "1")
    overrides = [f"weights={tmp_path / 'weights'}"]
    assert statuses(tmp_path, overrides=overrides) == ["done"]
    (tmp_path / "weights" / "seeds.csv").write_text("other seeds")
    assert earlier(tmp_path, overrides=overrides) == ["out of date"]


def test_a_missing_figure_is_drawn_again(notebooks, tmp_path):
    folder = tmp_path / "figures" / "digits"
    write(
        notebooks,
        "01_draws",
        f"from pathlib import Path; p = Path({str(folder)!r}); p.mkdir(parents=True, exist_ok=True)",
        "(p / '01_draws_a.png').touch()",
    )
    outcome = run(tmp_path)[1]["01_draws"]
    assert outcome.outputs == ["digits/01_draws_a.png"]
    assert statuses(tmp_path) == ["up to date"]
    (folder / "01_draws_a.png").write_bytes(b"drawn by hand with other settings")
    assert earlier(tmp_path) == ["out of date"]
    (folder / "01_draws_a.png").unlink()
    assert statuses(tmp_path) == ["done"] and (folder / "01_draws_a.png").exists()


@pytest.mark.parametrize("kind", ["checkpoint", "groups"])
def test_a_replaced_file_makes_everything_out_of_date(tmp_path, kind):
    path = tmp_path / {"checkpoint": "weights.pth", "groups": "groups.yaml"}[kind]
    overrides = {
        "checkpoint": ["backbone.training=null", f"backbone.checkpoint={path}"],
        "groups": [f"networks.group.groups.file={path}"],
    }[kind]
    fingerprints = set()
    for content in (b"one", b"two", b"two"):
        path.write_bytes(content)
        runner = runner_of(tmp_path, only=["12_line"], overrides=overrides)
        fingerprints.add(runner.fingerprint(runner.tasks[0]))
    assert len(fingerprints) == 2


def test_the_package_has_changed_when_its_code_or_its_tables_have(tmp_path):
    found = []
    for place, (code, table) in enumerate(
        [
            ("def f():\n    return 1", "a,b"),
            ('def f():\n    """Documented."""\n    return 1  # a comment', "a,b"),
            ("def f():\n    return 2", "a,b"),
            ("def f():\n    return 2", "a,c"),
        ]
    ):
        folder = tmp_path / str(place)
        (folder / "part").mkdir(parents=True)
        (folder / "part" / "module.py").write_text(code)
        (folder / "published.csv").write_text(table)
        found.append(package_fingerprint(folder))
    assert found[0] == found[1] and len(set(found)) == 3


def test_parameters_reach_the_notebook_once_a_seed(notebooks, tmp_path):
    log = tmp_path / "log"
    source = f"open({str(log)!r}, 'a').write(f'{{experiment}} {{seed}} {{seeds}} {{overrides}};')"
    write(notebooks, "01_seeded", source, per_seed=True)
    write(notebooks, "02_whole", source, needs=["01_seeded"])
    outcomes = run(tmp_path, seeds=(3, 5), jobs=1, overrides=["line.delta=0.5"])[1]
    assert list(outcomes) == ["01_seeded.seed3", "01_seeded.seed5", "02_whole"]
    assert log.read_text().split(";")[:3] == [
        "digits 3 [3, 5] ['line.delta=0.5']",
        "digits 5 [3, 5] ['line.delta=0.5']",
        "digits 3 [3, 5] ['line.delta=0.5']",
    ]


def test_the_plan_follows_the_notebooks_needs():
    tasks = {task.name: task for task in plan([0])}
    assert list(tasks) == notebook_names() == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    assert tasks["12_line"].needs == ("03_precompute",)
    assert tasks["30_results"].needs == ("03_precompute",)
    assert set(tasks["30_results"].after) == {
        "10_baselines",
        "11_himplos",
        "12_line",
        "13_mos",
        "14_dfb",
        "15_unleashing_mask",
        "16_outlier_exposure",
    }
    order = list(tasks)
    for name, task in tasks.items():
        assert all(order.index(need) < order.index(name) for need in task.needs + task.after)
    seeded = {task.name: task for task in plan([0, 1])}
    assert seeded["12_line.seed1"].needs == ("03_precompute.seed1",)
    assert len(seeded["30_results"].needs) == 2 and len(seeded["30_results"].after) == 14


def test_a_notebook_about_a_way_of_training_is_for_experiments_that_have_it():
    assert "14_dfb" in {task.name for task in plan([0], methods={"dense", "classifier"})}
    without = {task.name: task for task in plan([0], methods={"classifier"})}
    about = {"14_dfb", "15_unleashing_mask", "16_outlier_exposure"}
    assert set(notebook_names()) - set(without) == about and not about & set(without["30_results"].after)
    assert [task.name for task in plan([0], ["14_dfb"], methods=set())] == ["14_dfb"]  # asked for by name


def test_only_takes_known_notebooks():
    assert [task.name for task in plan([0], ["12_line"])] == ["12_line"]
    with pytest.raises(InputError, match="did you mean '12_line'"):
        plan([0], ["12_lien"])


def test_every_need_is_a_notebook():
    for path in NOTEBOOKS.glob("*.ipynb"):
        about = json.loads(path.read_text())["metadata"]["ood"]
        assert {*about["needs"], *about.get("after", ())} <= set(notebook_names())
