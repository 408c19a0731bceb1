"""Running the notebooks headlessly, and what is up to date.

Papermill executes a notebook into runs/<experiment>/notebooks/. A record beside it holds the fingerprint of all that
it depends on (cells, parameters, config, package, image sets): a second run executes only what has changed.
"""

import io
import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ood_helpers.config.base import PROJECT_ROOT
from ood_helpers.data.archives import provide
from ood_helpers.experiment import Experiment
from ood_helpers.files import sha256_of_file, sha256_of_json, write_json, write_text
from ood_helpers.image_sets import checkpoints
from ood_helpers.plan import Task, parameter_names, read_notebook
from ood_helpers.storage import tree_fingerprint


@dataclass
class Outcome:
    """What became of a task: `done`, `up to date`, `failed` (with the cell and the error) or `skipped`;
    for one that this run left out, what `Runner.earlier` says."""

    status: str
    seconds: float = 0.0
    error: str = ""
    outputs: list[str] = field(default_factory=list)


Report = Callable[[Task, str, float], None]  # task, what it is doing, share done


class _LastLine(io.TextIOBase):
    """A stream that hands its latest line on: the progress bars of a running cell."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report

    def write(self, text: str) -> None:
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)  # movements of the cursor
        lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        if lines:
            self.report(lines[-1])


@cache
def package_fingerprint(root: Path = PROJECT_ROOT / "ood_helpers") -> str:
    """SHA-256 over the code of the package, as the store takes it, and the tables in it."""
    code = [tree_fingerprint(path) for path in sorted(root.rglob("*.py"))]
    return sha256_of_json([*code, *(sha256_of_file(path) for path in sorted(root.rglob("*.csv")))])


class Runner:
    """Runs the notebooks of one experiment.

    `parameters` are the experiment-wide parameters of every notebook (experiment, data_root, run_dir, ...).
    """

    def __init__(self, experiment: Experiment, parameters: dict, seeds: list[int], tasks: list[Task]) -> None:
        self.experiment, self.parameters, self.seeds, self.tasks = experiment, parameters, seeds, tasks
        self.directory = experiment.directory / "notebooks"
        images = {name: item.fingerprint for name, item in sorted(experiment.image_sets.opened.items())}
        settings = {key: value for key, value in parameters.items() if key not in ("run_dir", "figures_dir")}
        files = [provide(file) for file in checkpoints(experiment.config)]
        files += [path for recipe in experiment.config.networks.values() for path in recipe.other_files]
        if shipped := experiment.context.store.shipped:
            files += [
                path for name in ("index.json", "seeds.csv") if (path := shipped.folder / name).exists()
            ]
        config = experiment.config.model_dump(mode="json")
        self._common = [package_fingerprint(), images, [*map(sha256_of_file, files)], settings, config]

    def fingerprint(self, task: Task) -> str:
        """SHA-256 over everything the executed notebook depends on."""
        cells = ["".join(cell["source"]) for cell in read_notebook(task.notebook)["cells"]]
        return sha256_of_json([cells, self._task_parameters(task), self._common])

    def _task_parameters(self, task: Task) -> dict:
        """The parameters of the run and the task that the notebook's parameters cell names."""
        parameters = self.parameters | {"seed": task.seed, "seeds": self.seeds}
        named = parameter_names(task.notebook)
        return {name: parameters[name] for name in named if name in parameters}

    def executed(self, task: Task) -> Path:
        """Where the executed notebook goes."""
        return self.directory / f"{task.name}.ipynb"

    def _outputs(self, task: Task, since: float) -> dict[str, str]:
        """SHA-256 of each figure and table, results.csv and means.csv that the task has written since."""
        folder = self.experiment.with_seed(task.seed).figures_directory
        paths = sorted(folder.glob(f"{task.notebook.stem}*"))
        if task.notebook.stem == "30_results":
            paths += [self.experiment.directory / name for name in ("results.csv", "means.csv")]
        written = [path for path in paths if path.exists() and path.stat().st_mtime >= since]
        return {os.path.relpath(path, self.experiment.figures_root): sha256_of_file(path) for path in written}

    def earlier(self, task: Task) -> Outcome:
        """What an earlier run left of a task: `up to date`, `out of date` or `not run`.

        It is up to date while the executed notebook is there under the present fingerprint and what it wrote
        is as it left it: a figure drawn since with other settings, by hand, makes it out of date.
        """
        record = self.executed(task).with_suffix(".json")
        if not (record.exists() and self.executed(task).exists()):
            return Outcome("not run")
        try:
            kept = json.loads(record.read_text())
        except ValueError:
            return Outcome("not run")
        paths = {self.experiment.figures_root / name: found for name, found in kept["outputs"].items()}
        unchanged = all(path.exists() and sha256_of_file(path) == found for path, found in paths.items())
        current = unchanged and kept["fingerprint"] == self.fingerprint(task)
        return Outcome(
            "up to date" if current else "out of date", kept["seconds"], outputs=list(kept["outputs"])
        )

    def run(
        self, jobs: int, force: bool, report: Report, finish: Callable[[Task, Outcome], None]
    ) -> dict[str, Outcome]:
        """Run all tasks, `jobs` at a time where they are independent; a failure stops only what needs it."""
        outcomes: dict[str, Outcome] = {}
        waiting, running = list(self.tasks), {}
        pool = ThreadPoolExecutor(jobs)
        try:
            while waiting or running:
                for task in list(waiting):
                    ended = {name: outcomes[name].status for name in task.needs if name in outcomes}
                    broken = [name for name, status in ended.items() if status in ("failed", "skipped")]
                    if broken:
                        outcomes[task.name] = Outcome("skipped", error=f"it needs {', '.join(broken)}")
                    elif len(running) >= jobs or not outcomes.keys() >= {*task.needs, *task.after}:
                        continue
                    elif not force and (earlier := self.earlier(task)).status == "up to date":
                        outcomes[task.name] = earlier
                    else:
                        running[pool.submit(self._execute, task, report)] = task
                    waiting.remove(task)
                    if task.name in outcomes:
                        finish(task, outcomes[task.name])
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    outcomes[task.name] = future.result()
                    finish(task, outcomes[task.name])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return {task.name: outcomes[task.name] for task in self.tasks}

    def _execute(self, task: Task, report: Report) -> Outcome:
        from ood_helpers.execution import (
            PapermillExecutionError,
            execute,
            html_of,
        )  # late: three seconds of imports

        output, share = self.executed(task), 0.0
        running, failed = output.with_suffix(".running.ipynb"), output.with_suffix(".failed.ipynb")
        output.parent.mkdir(parents=True, exist_ok=True)
        begin, started = time.perf_counter(), time.time()

        def report_cell(index: int, total: int) -> None:
            nonlocal share
            share = index / total
            report(task, f"cell {index + 1}/{total}", share)

        fingerprint = self.fingerprint(task)
        try:
            stderr = _LastLine(lambda line: report(task, line, share))
            execute(task.notebook, running, self._task_parameters(task), report_cell, stderr)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            if isinstance(error, PapermillExecutionError):
                os.replace(running, failed)
                message = f"cell {error.cell_index}: {error.ename}: {error.evalue} (see {failed})"
            return Outcome("failed", time.perf_counter() - begin, message)
        os.replace(running, output)
        failed.unlink(missing_ok=True)
        write_text(output.with_suffix(".html"), html_of(output))
        outputs = self._outputs(task, since=started - 1)  # file systems round times
        outcome = Outcome("done", round(time.perf_counter() - begin, 1), outputs=list(outputs))
        record = {"fingerprint": fingerprint, "seconds": outcome.seconds, "outputs": outputs}
        write_json(output.with_suffix(".json"), record)
        return outcome
