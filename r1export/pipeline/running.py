"""The whole way in one call: open a run, then train, export and verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from r1export.adapt import together
from r1export.errors import Unsupported
from r1export.pipeline.releasing import export
from r1export.pipeline.stage import Silent, Stage, Watcher, check_inputs, choose_device
from r1export.pipeline.training import train
from r1export.pipeline.verifying import verify
from r1export.recipe import Recipe
from r1export.run_folder import RunFolder, check_run, open_run


def run(
    recipe: Recipe,
    out: Path | str,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    watch: Watcher | None = None,
) -> dict[str, Any]:
    """Train the stream of `recipe`, write a release after each task, verify all of them, and return report.json.

    `device` is "auto", "cpu" or "cuda"; `resume` goes on with the run in `out`, `overwrite` deletes it first. The report's
    `verdict` is "pass", "fail" or "inconclusive". Among several processes of torchrun the first one exports and verifies;
    the others return an empty report.

    Raises:
        InputError: bad input, found before anything is written.
        Unsupported: this environment lacks what the recipe needs.
    """
    return carry_out(open_stage(recipe, Path(out), device=device, resume=resume, overwrite=overwrite, watch=watch))


def carry_out(stage: Stage) -> dict[str, Any]:
    """Train, export and verify what is not yet done, and return report.json; empty in processes that only help to train.

    Raises Unsupported, before anything is trained, where there will be nothing to verify against.
    """
    if stage.recipe.train.method == "full":
        raise Unsupported("full fine-tuning has no unmerged model to verify against", "use it with r1export train")
    train(stage)
    if not together.is_first():
        return {}
    export(stage)
    return verify(stage)


def open_stage(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    watch: Watcher | None = None,
) -> Stage:
    """A run in `out`, new or resumed, with its input loaded and looked at. Raises as `run` does."""
    check_run(out, recipe, resume=resume, overwrite=overwrite)
    stage = Stage(RunFolder(out), recipe, choose_device(device), watch or Silent())
    together.start(stage.device)  # waits for the other processes of torchrun, so none finds the run of the first
    check_inputs(stage)
    if together.is_first():
        open_run(out, recipe, resume=resume, overwrite=overwrite)
    together.wait()
    return stage


def reopen_stage(path: Path, *, device: str = "auto", watch: Watcher | None = None) -> Stage:
    """The run in the folder `path`. Raises InputError if there is none."""
    run = RunFolder(path)
    return Stage(run, run.recipe(), choose_device(device), watch or Silent())
