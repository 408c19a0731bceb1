"""Regenerate every table and figure of an experiment: run the notebooks with papermill, in dependency order.

python run_all.py                                                # the embedded default experiment
python run_all.py --config cifar10_npz --data-root ../shared     # real CIFAR-10
python run_all.py --only 12_line --set line.delta=0.8            # one notebook, one setting changed
python run_all.py --verify                                       # compare with the committed tables
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ood_helpers.config import PROJECT_ROOT, config_names, load_config, resolve_path
from ood_helpers.config.rows import check_rows
from ood_helpers.errors import InputError
from ood_helpers.plan import Task, plan

if TYPE_CHECKING:
    from ood_helpers.experiment import Experiment
    from ood_helpers.runner import Outcome

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
    at_once = min(2, os.cpu_count() or 1)  # drawing leaves a core idle
    parser.add_argument(
        "--jobs", type=int, default=at_once, metavar="N", help=f"notebooks at a time (default: {at_once})"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--force", action="store_true", help="run notebooks that are up to date, too")
    parser.add_argument(
        "--skip-missing", action="store_true", help="continue without OOD sets that are missing"
    )
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out unreadable images, on record"
    )
    parser.add_argument("--run-dir", default="", help="banks, scores, notebooks and report (default: runs)")
    parser.add_argument(
        "--figures-dir", default="", help="figures and tables (default: figures in the above)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the tables with those in figures/; exit 1 if one differs",
    )
    parser.add_argument(
        "--update-figures",
        action="store_true",
        help="put the figures and tables in place of those in figures/",
    )
    parser.add_argument("--retrain", action="store_true", help="train anew what weights/ ships, and compare")
    replace = "with --retrain: replace what weights/ ships, with the results of seeds 0 to 4"
    parser.add_argument("--update-weights", action="store_true", help=replace)
    parser.add_argument("--list", action="store_true", help="list notebooks, experiments, detectors; stop")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and stop")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: expected 1 or more")
    if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.seeds) < 0:
        parser.error(f"--seeds {' '.join(map(str, arguments.seeds))}: expected different numbers, 0 or more")
    if arguments.update_weights and not arguments.retrain:
        parser.error("--update-weights: expected --retrain beside it")
    changed = bool(arguments.set or arguments.retrain or arguments.seeds != [0])
    if changed and (arguments.verify or arguments.update_figures):
        parser.error(
            "--verify and --update-figures: expected the experiment as it is, with seed 0 and without --set"
        )
    if arguments.update_figures and (arguments.only or arguments.skip_missing or arguments.skip_unreadable):
        parser.error(
            "--update-figures: expected a whole run, without --only, --skip-missing and --skip-unreadable"
        )
    if arguments.retrain and (arguments.set or arguments.only or arguments.seeds != [0]):
        parser.error("--retrain: expected neither --set nor --only nor --seeds; it trains all of the config")
    return arguments


def show_list(experiment: Experiment) -> None:
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
    """Live bars of the running notebooks in a terminal, plain lines elsewhere, and the time that is left by earlier runs."""

    def __init__(self, expected: dict[str, float], jobs: int) -> None:
        columns = (
            TextColumn("{task.description:24}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[now]}"),
        )
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.bars: dict[str, int] = {}
        self.told: dict[str, float] = {}
        self.expected, self.jobs = expected, jobs

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
        self.expected.pop(task.name, None)
        colour = {"failed": "red", "skipped": "yellow"}.get(outcome.status, "green")
        seconds = f" ({outcome.seconds:.0f} s)" if outcome.status in ("done", "failed") else ""
        left = f", {len(self.expected)} notebooks left" if self.expected and outcome.status == "done" else ""
        if left and all(self.expected.values()):  # as long as they took before
            left += f", about {_duration(sum(self.expected.values()) / self.jobs)}"
        detail = f": {outcome.error}" if outcome.error else ""
        console.print(Text.assemble((f"{task.name:24}{outcome.status}{seconds}", colour), detail, left))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def main() -> int:
    arguments = parse_arguments()
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
    # A wrong config, row or notebook is refused before PyTorch is imported.
    check_rows(load_config(parameters["experiment"], parameters["data_root"] or None, arguments.set))
    plan(arguments.seeds, arguments.only)
    if arguments.retrain:
        return retrain(arguments, parameters)
    experiment, outcomes = run_notebooks(arguments, parameters)
    if outcomes is None:
        return 0
    if any(outcome.status in ("failed", "skipped") for outcome in outcomes.values()):
        return 1
    if arguments.update_figures:
        from ood_helpers.verification import update_figures

        console.print(f"Updated    {update_figures(experiment)}")
    return show_verified(experiment, tuple(arguments.only or ())) if arguments.verify else 0


def run_notebooks(
    arguments: argparse.Namespace, parameters: dict
) -> tuple[Experiment, dict[str, Outcome] | None]:
    """Run what a command asks for, and write report and manifest; the experiment, and notebook -> what became of it, None
    where nothing was to be run."""
    from ood_helpers.experiment import Experiment

    begun, seeds = time.monotonic(), arguments.seeds
    experiment = Experiment.open(**parameters, seed=seeds[0])
    from ood_helpers.report import write_manifest, write_report
    from ood_helpers.runner import Runner

    if arguments.list:
        show_list(experiment)
        return experiment, None
    console.print(f"[bold]{experiment.name}[/bold]: {experiment.config.description}")
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
    earlier = {task.name: runner.earlier(task) for task in tasks}
    if arguments.dry_run:
        for task in tasks:
            current = not arguments.force and earlier[task.name].status == "up to date"
            console.print(f"{task.name:24}{'up to date' if current else 'would run'}")
        return experiment, None
    display = Display({name: outcome.seconds for name, outcome in earlier.items()}, arguments.jobs)
    with display.progress:
        outcomes = runner.run(arguments.jobs, arguments.force, display.report, display.finish)
    failed = [name for name, outcome in outcomes.items() if outcome.status in ("failed", "skipped")]
    if failed:
        count = f"{len(failed)} of {len(outcomes)}"
        console.print(f"[red]{count} notebooks did not run to their end: {', '.join(failed)}.[/red]")
        return experiment, outcomes
    outcomes = {task.name: outcomes.get(task.name) or runner.earlier(task) for task in everything}
    manifest = write_manifest(experiment, parameters, seeds, outcomes)
    report = write_report(experiment, manifest, everything, outcomes)
    console.print(f"Finished in {_duration(time.monotonic() - begun)}.")
    show_headline(experiment)
    console.print(
        f"Figures    {experiment.figures_root / experiment.name}  (and tables: CSV, Markdown, LaTeX)"
    )
    console.print(f"Notebooks  {runner.directory}")
    console.print(f"Report     {report}")
    return experiment, outcomes


def retrain(arguments: argparse.Namespace, parameters: dict) -> int:
    """Train anew what is shipped, compare, and replace it if asked to."""
    from ood_helpers.report import git_commit, machine
    from ood_helpers.shipping import remove_shipped, results_of_seeds, ship, write_card, write_seeds

    config = load_config(parameters["experiment"], parameters["data_root"] or None)
    if config.weights is None:
        raise InputError(
            f"Found no `weights` in {config.name}, expected the folder of what is shipped; nothing to retrain."
        )
    loaded = [name for name, recipe in config.networks.items() if not recipe.trained_here]
    if config.backbone.training is None or loaded:
        raise InputError(
            f"Found weights that {config.name} takes from checkpoints ({', '.join(loaded) or 'the backbone'}), expected a config "
            "that trains all of its networks; retrain digits, or train these where they come from."
        )
    folder, name = resolve_path(config.weights), Path(config.weights).name
    if name != config.name:
        raise InputError(
            f"Found weights {config.weights} for {config.name}, expected the folder of its own name; give the config its own."
        )
    # In folders of their own: nothing that was trained before, nothing of other experiments.
    root = Path(parameters["run_dir"] or PROJECT_ROOT / "runs") / "retrain"
    shutil.rmtree(root, ignore_errors=True)

    def run(where: str, *overrides: str) -> tuple[Experiment, bool]:
        folders = {"run_dir": str(root / where), "figures_dir": "", "overrides": list(overrides)}
        experiment, outcomes = run_notebooks(arguments, parameters | folders)
        ended = outcomes is not None and all(outcome.status == "done" for outcome in outcomes.values())
        return experiment, ended

    trained, ended = run("trained", "weights=null")
    if not ended:
        return 1
    show_verified(trained, every_row=True)
    if not arguments.update_weights:
        return 0
    seeds, commit = results_of_seeds(map(trained.with_seed, range(5))), git_commit()
    remove_shipped(folder)
    ship(trained, folder, every_training=False)
    write_seeds(seeds, folder)
    for number in itertools.count(1):  # until a run trains nothing any more
        shipped, ended = run(f"shipped_{number}")
        if not ended:
            return 1
        if not ship(shipped, folder, every_training=True):
            break
    write_card(
        shipped,
        folder,
        f"python run_all.py --config {config.name} --retrain --update-weights",
        machine(),
        commit,
    )
    shutil.rmtree(root)
    console.print(f"Replaced   {folder}")
    return 0


def show_headline(experiment: Experiment) -> None:
    """The best rows, or those whose settings were changed, and where the others are."""
    from ood_helpers.results import headline, read_results

    path = experiment.directory / "results.csv"
    parts = [change.partition("=")[0].removeprefix("detectors.").split(".") for change in experiment.changes]
    networks = {part[1] for part in parts if part[0] == "networks" and len(part) > 1}
    changed = {part[0] for part in parts} & experiment.rows().keys()
    changed |= {name for name, row in experiment.rows().items() if row.network.name in networks}
    if changed:
        table = experiment.results(sorted(changed))
        plain = experiment.run_dir / experiment.config.name / "results.csv"
        before = read_results(plain) if plain.exists() else table.iloc[:0]
        console.print(headline(table, f"With {', '.join(experiment.changes)}"))
        if len(before := before[before.method.isin(table.method)]):
            console.print(headline(before, "With the config's settings"))
    elif path.exists():
        console.print(headline(read_results(path), "Best rows"))
    if path.exists():
        console.print(f"Results    {path}")


def show_verified(experiment: Experiment, only: tuple[str, ...] = (), every_row: bool = False) -> int:
    """One line for each committed table; 1 if a cell that must agree does not."""
    from ood_helpers.verification import verify

    compared = verify(experiment, only, every_row)
    for table in compared:
        console.print(Text(str(table), style="red" if table.out else ""))
    out, cells = sum(table.out for table in compared), sum(table.cells for table in compared)
    if not compared:
        console.print(
            f"figures/{experiment.config.name} has no table of {', '.join(only) or 'it'}: nothing to verify."
        )
    elif out:
        console.print(f"[red]{out} of {cells} cells differ from the committed tables.[/red]")
    else:
        console.print(f"[green]Verified: {cells} cells in {len(compared)} tables.[/green]")
    return int(out > 0)


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
