"""Regenerate every table and figure of an experiment: run the notebooks with papermill, in dependency order.

python run_all.py                                                # the embedded default experiment
python run_all.py --config cifar10_npz --data-root ../shared     # real CIFAR-10
python run_all.py --only 12_line --set line.delta=0.8            # one notebook, one setting changed
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ood_helpers.config import PROJECT_ROOT, config_names, load_config, resolve_path
from ood_helpers.errors import InputError

if TYPE_CHECKING:
    from ood_helpers.experiment import Experiment
    from ood_helpers.runner import Outcome, Task

console = Console(highlight=False, soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default="digits", help="experiment in configs/ or path of a YAML file")
    parser.add_argument("--data-root", default="", help="folder that ${data_root} stands for (default: data)")
    parser.add_argument("--only", nargs="+", metavar="NOTEBOOK", help="these notebooks only, e.g. 12_line")
    settings = {"action": "extend", "default": [], "metavar": "KEY=VALUE"}
    parser.add_argument("--set", nargs="+", **settings, help="change settings, e.g. himplos.percentile=50")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="one run per seed")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks at a time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--force", action="store_true", help="run notebooks that are up to date, too")
    parser.add_argument(
        "--skip-missing", action="store_true", help="continue without OOD sets that are missing"
    )
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out unreadable images, on record"
    )
    parser.add_argument("--run-dir", default="", help="banks, scores, notebooks and report (default: runs)")
    places = "figures and tables (default: figures, with --set runs/changed_settings)"
    parser.add_argument("--figures-dir", default="", help=places)
    parser.add_argument("--list", action="store_true", help="list notebooks, experiments, detectors; stop")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and stop")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: expected 1 or more")
    if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.seeds) < 0:
        parser.error(f"--seeds {' '.join(map(str, arguments.seeds))}: expected different numbers, 0 or more")
    return arguments


def show_list(experiment: Experiment) -> None:
    from ood_helpers.runner import plan

    console.print("[bold]Notebooks[/bold]")
    for task in plan([0]):
        needs = [*task.needs, *task.after]
        console.print(f"  {task.name:24}{'after ' + ', '.join(needs) if needs else ''}")
    console.print("[bold]Experiments[/bold]")
    for name in config_names():
        console.print(f"  {name:24}{load_config(name).description}")
    console.print(f"[bold]Detectors of {experiment.config.name}[/bold]")
    for name, row in experiment.rows().items():
        settings = ", ".join(f"{key}={value}" for key, value in row.detector.hyperparameters().items())
        console.print(f"  {name:24}{row.label}{': ' + settings if settings else ''}")


class Display:
    """Live bars of the running notebooks in a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description:24}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[now]}"),
        )
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.bars: dict[str, int] = {}
        self.told: dict[str, float] = {}

    def report(self, task: Task, now: str, share: float) -> None:
        if task.name not in self.bars:
            self.bars[task.name] = self.progress.add_task(task.name, total=1.0, now="")
        self.progress.update(self.bars[task.name], completed=share, now=now[: max(20, console.width - 60)])
        if not console.is_terminal and time.monotonic() - self.told.get(task.name, 0) > 15:
            self.told[task.name] = time.monotonic()
            console.print(f"{task.name}: {now}")

    def finish(self, task: Task, outcome: Outcome) -> None:
        if task.name in self.bars:
            self.progress.remove_task(self.bars.pop(task.name))
        colour = {"failed": "red", "skipped": "yellow"}.get(outcome.status, "green")
        seconds = f" ({outcome.seconds:.0f} s)" if outcome.status in ("done", "failed") else ""
        detail = f": {outcome.error}" if outcome.error else ""
        console.print(Text.assemble((f"{task.name:24}{outcome.status}{seconds}", colour), detail))


def main() -> int:
    arguments = parse_arguments()
    seeds = arguments.seeds
    if arguments.set and not arguments.figures_dir:  # figures/ shows the configs as they are
        arguments.figures_dir = Path(arguments.run_dir or PROJECT_ROOT / "runs") / "changed_settings"
    is_path = arguments.config.endswith((".yaml", ".yml"))
    parameters = {
        "experiment": str(resolve_path(arguments.config)) if is_path else arguments.config,
        "data_root": str(resolve_path(arguments.data_root)) if arguments.data_root else "",
        "run_dir": str(Path(arguments.run_dir).resolve()) if arguments.run_dir else "",
        "figures_dir": str(Path(arguments.figures_dir).resolve()) if arguments.figures_dir else "",
        "device": arguments.device,
        "overrides": arguments.set,
        "skip_missing": arguments.skip_missing,
        "skip_unreadable": arguments.skip_unreadable,
    }
    # A wrong config is refused before PyTorch is imported, a wrong row before the libraries of notebooks are.
    load_config(parameters["experiment"], parameters["data_root"] or None, arguments.set)
    from ood_helpers.experiment import Experiment

    experiment = Experiment.open(**parameters, seed=seeds[0])
    from ood_helpers.report import write_manifest, write_report
    from ood_helpers.runner import Runner, plan

    if arguments.list:
        show_list(experiment)
        return 0
    plan(seeds, arguments.only)  # an unknown notebook is refused before anything is fetched
    console.print(f"[bold]{experiment.config.name}[/bold]: {experiment.config.description}")
    experiment.check()
    methods = experiment.training_methods()
    tasks = plan(seeds, arguments.only, methods)
    for name in experiment.image_sets.missing:
        console.print(f"[yellow]Without {name}: missing and skipped.[/yellow]")
    known = plan(seeds)
    shown = {task.name for task in [*plan(seeds, methods=methods), *tasks]}
    everything = [task for task in known if task.name in shown]
    if left_out := [task.name for task in known if task.name not in shown]:
        console.print(f"Without {', '.join(left_out)}: no network of this config is trained that way.")
    runner = Runner(experiment, parameters, seeds, tasks)
    if arguments.dry_run:
        for task in tasks:
            current = not arguments.force and runner.earlier(task).status == "up to date"
            console.print(f"{task.name:24}{'up to date' if current else 'would run'}")
        return 0
    display = Display()
    with display.progress:
        outcomes = runner.run(arguments.jobs, arguments.force, display.report, display.finish)
    failed = [name for name, outcome in outcomes.items() if outcome.status in ("failed", "skipped")]
    if failed:
        count = f"{len(failed)} of {len(outcomes)}"
        console.print(f"[red]{count} notebooks did not run to their end: {', '.join(failed)}.[/red]")
        return 1
    outcomes = {task.name: outcomes.get(task.name) or runner.earlier(task) for task in everything}
    manifest = write_manifest(experiment, parameters, seeds, outcomes)
    report = write_report(experiment, manifest, everything, outcomes)
    if (experiment.directory / "results.csv").exists():
        console.print(f"Results    {experiment.directory / 'results.csv'}")
    figures = experiment.figures_root / experiment.config.name
    console.print(f"Figures    {figures}  (and tables: CSV, Markdown, LaTeX)")
    console.print(f"Notebooks  {runner.directory}")
    console.print(f"Report     {report}")
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except InputError as error:
        console.print(Text(str(error), style="red"))
        status = 1
    except KeyboardInterrupt:
        console.print("Stopped; what is finished is kept, run the same command to resume.")
        sys.stdout.flush()
        os._exit(130)  # the threads that wait for kernels would hold the interpreter
    sys.exit(status)
