"""A complete run in one call: train, export and verify."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from r1export.adapt import distributed
from r1export.errors import Unsupported
from r1export.pipeline.context import NoProgress, Progress, RunContext, check_inputs, choose_device
from r1export.pipeline.export import export_releases
from r1export.pipeline.train import train_tasks
from r1export.pipeline.verification.run import verify_run
from r1export.recipe import Recipe
from r1export.run_folder import RunFolder, check_run, open_run
from r1export.verify.results import RunReport


def run(
    recipe: Recipe,
    out: Path | str,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RunReport | None:
    """Train the tasks of `recipe`, write a release after each, verify all of them, and return the report.

    `device` is "auto", "cpu" or "cuda"; `resume` continues the run in `out`, `overwrite` deletes it first. The report's
    `verdict` is "pass", "fail" or "inconclusive". Under torchrun, rank 0 exports and verifies; the other ranks return None.

    Raises:
        InputError: bad input, reported before anything is written.
        Unsupported: the environment doesn't support what the recipe needs.
    """
    with open_run_context(
        recipe, Path(out), device=device, resume=resume, overwrite=overwrite, progress=progress
    ) as context:
        return run_steps(context)


def run_steps(context: RunContext) -> RunReport | None:
    """Do the remaining training, export and verification, and return the report; None in other ranks than 0.

    Raises Unsupported before training if the run could not be verified.
    """
    if context.recipe.train.method == "full":
        raise Unsupported("full fine-tuning has no unmerged model to verify against", "use it with r1export train")
    train_tasks(context)
    if not distributed.is_first():
        return None
    export_releases(context)
    return verify_run(context)


@contextmanager
def open_run_context(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Iterator[RunContext]:
    """Open a new or resumed run in `out`, locked, with its input loaded and checked.

    Raises as `run` does.
    """
    check_run(out, recipe, resume=resume, overwrite=overwrite)
    context = RunContext(RunFolder(out), recipe, choose_device(device), progress or NoProgress())
    distributed.start(context.device)  # waits for the other ranks: none may see the run that rank 0 writes
    check_inputs(context)
    if distributed.is_first():
        open_run(out, recipe, resume=resume, overwrite=overwrite)
    distributed.wait()
    with context.run.lock() if distributed.is_first() else nullcontext():
        yield context


@contextmanager
def reopen_run_context(path: Path, *, device: str = "auto", progress: Progress | None = None) -> Iterator[RunContext]:
    """Open the run in the folder `path`, locked. Raises InputError if there is none, or another command works on it."""
    run = RunFolder(path)
    recipe = run.recipe()
    with run.lock():
        yield RunContext(run, recipe, choose_device(device), progress or NoProgress())
