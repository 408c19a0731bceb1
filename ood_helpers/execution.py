"""Executing one notebook with papermill, and showing it as a page."""

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import papermill
from nbconvert import HTMLExporter
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError as PapermillExecutionError

from ood_helpers.config.base import PROJECT_ROOT


class _ReportingEngine(NBClientEngine):
    """Papermill's own engine, telling a callback which cell has begun."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, report_cell=None, **kwargs):
        begin, total = nb_man.cell_start, len(nb_man.nb.cells)

        def cell_start(cell, cell_index=None, **more):
            report_cell(cell_index or 0, total)
            return begin(cell, cell_index, **more)

        nb_man.cell_start = cell_start
        return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)


papermill_engines.register("reporting", _ReportingEngine)


def execute(
    notebook: Path,
    output: Path,
    parameters: dict[str, Any],
    report_cell: Callable[[int, int], None],
    stderr: IO,
) -> None:
    """Run a notebook with parameters in a new kernel, in the project's folder.

    Raises
    ------
    PapermillExecutionError : a cell has failed; the output has what ran before it
    """
    papermill.execute_notebook(
        notebook,
        output,
        parameters=parameters,
        engine_name="reporting",
        kernel_name="python3",
        cwd=PROJECT_ROOT,
        progress_bar=False,
        report_cell=report_cell,
        stderr_file=stderr,
        coalesce_streams=True,
        extra_arguments=["--log-level=CRITICAL"],  # its notices look like failures
    )


def html_of(notebook: Path) -> str:
    """A notebook as a page."""
    return HTMLExporter().from_filename(str(notebook))[0]
