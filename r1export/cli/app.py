"""The Typer application that commands register with, and the exit code of a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r1export.cli.options import Device
from r1export.command import Commands

if TYPE_CHECKING:
    from r1export.console import Terminal
    from r1export.pipeline.context import RunContext

NOTES = 20  # notes that a command prints
VERDICT_CODES = {"pass": 0, "fail": 1, "inconclusive": 4}

app = typer.Typer(
    name="r1export", cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Fine-tune CLIP on a sequence of tasks with rank-1 experts, merge them, and export ONNX models with no added inference cost, verified.",
)  # fmt: skip


@contextmanager
def reopened(path: Path, device: Device, terminal: Terminal) -> Iterator[RunContext]:
    """A trained run. Raises InputError before torch is loaded if there is none."""
    from r1export.run_folder import RunFolder

    RunFolder(path).recipe()  # before torch is loaded
    from r1export.pipeline.run import reopen_run_context

    with reopen_run_context(path, device=device, progress=terminal) as context:
        yield context


def finish(verdict: str) -> None:
    """Exit with the code of a verdict."""
    raise typer.Exit(VERDICT_CODES[verdict])


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from r1export import __version__

        print(__version__)
        raise typer.Exit()
