"""Commands that work on runs: run, train, export, verify, report, compare, inspect, doctor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r1export.cli.app import NOTES, app, finish, reopened
from r1export.cli.options import Device, Json, Order, Out, Overwrite, Providers, RecipeFile, Resume, Run, Set, Where
from r1export.command import open_terminal
from r1export.errors import InputError

if TYPE_CHECKING:
    from r1export.console import Terminal
    from r1export.pipeline.context import RunContext
    from r1export.verify.results import Report, RunReport
    from r1export.verify.signature import SignedUpdate


@contextmanager
def _open(
    recipe_file: Path,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    device: Device,
    overrides: list[str] | None,
    order: str | None,
    terminal: Terminal,
) -> Iterator[RunContext]:
    from r1export.recipe import in_order
    from r1export.recipe_file import load_recipe
    from r1export.run_folder import check_run

    recipe = load_recipe(recipe_file, tuple(overrides or ()))
    recipe = in_order(recipe, order) if order else recipe
    out = out or Path("runs", recipe_file.stem)
    check_run(out, recipe, resume=resume, overwrite=overwrite)  # before torch is loaded, so that an error is immediate
    from r1export.pipeline.run import open_run_context

    with open_run_context(recipe, out, device=device, resume=resume, overwrite=overwrite, progress=terminal) as context:
        yield context


def _read_report(folder: Path) -> Report:
    from r1export.report.json_format import read_report

    return read_report(folder / "report.json", f"recreate it with r1export verify {folder}")


def _read_run_report(folder: Path) -> RunReport:
    """Raises InputError for the report of a release, or of a run that changed since."""
    from r1export.report.freshness import check_fresh
    from r1export.verify.results import RunReport

    report: Report = _read_report(folder)
    if not isinstance(report, RunReport):
        raise InputError(
            f"{folder}: report of a release, expected the report of a run", "use the folder of a verified run"
        )
    check_fresh(report, folder)
    return report


def _signed_update(bundle: Path | None, trust: list[Path], threshold: int) -> SignedUpdate | None:
    from r1export.verify.signature import SignedUpdate

    if (bundle is None) != (not trust):
        raise InputError("--bundle and --trust must be used together", "pass the update and the trusted public keys")
    return SignedUpdate.read(bundle, trust, threshold) if bundle else None


def _show_outputs(terminal: Terminal, release: Path, outputs: Path) -> None:
    """Compare embeddings that another runtime computed, and exit with the code of the verdict."""
    from r1export.verify.outputs import check_outputs

    check = check_outputs(release, outputs)
    terminal.say(f"{check.verdict}: {check.detail}")
    terminal.document(asdict(check))
    finish(check.verdict)


def _show(terminal: Terminal, report: Report, note: str = "") -> None:
    """Print a report and exit with the code of its verdict."""
    from r1export.report.json_format import to_json

    terminal.report(report)
    if note:
        terminal.say(note)
    terminal.document(to_json(report))
    finish(report.verdict)


@app.command()
def run(
    recipe: RecipeFile,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Where = Device.auto,
    set: Set = None,
    order: Order = None,
    as_json: Json = False,
) -> None:
    """Fine-tune on a sequence of tasks, export a release after each, and verify all releases."""
    with (
        open_terminal(as_json) as terminal,
        _open(recipe, out, resume, overwrite, device, set, order, terminal) as context,
    ):
        from r1export.pipeline.run import run_steps

        report = run_steps(context)
        if report is None:
            return
        terminal.accuracy(report.accuracy)
        _show(
            terminal, report, f"Report: {context.run.path / 'report.html'}   Releases: {context.run.path / 'releases'}"
        )


@app.command()
def train(
    recipe: RecipeFile,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Where = Device.auto,
    set: Set = None,
    order: Order = None,
    as_json: Json = False,
) -> None:
    """Fine-tune on a sequence of tasks without exporting; writes factors, pools and metrics."""
    with (
        open_terminal(as_json) as terminal,
        _open(recipe, out, resume, overwrite, device, set, order, terminal) as context,
    ):
        from r1export.pipeline.train import train_tasks
        from r1export.pipeline.verification.run import accuracy_of

        metrics = train_tasks(context)
        terminal.accuracy(accuracy_of(metrics))
        terminal.document(metrics.to_json())


@app.command()
def export(
    run: Run,
    overwrite: Overwrite = False,
    audit: Annotated[
        bool,
        typer.Option("--audit-reexport", help="Re-export the last merged model and compare it with its release."),
    ] = False,
    device: Where = Device.auto,
    as_json: Json = False,
) -> None:
    """Export the graphs of a trained run once, and write a release for the base and for each task."""
    with open_terminal(as_json) as terminal, reopened(run, device, terminal) as context:
        from r1export.pipeline.export import export_releases

        releases = export_releases(context, overwrite=overwrite, audit=audit)
        for path in releases:
            terminal.say(str(path))
        terminal.document({"releases": [str(path) for path in releases]})


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(readable=False, metavar="RUN|RELEASE", help="Run folder or release folder.")],
    provider: Providers = None,
    release: Annotated[
        int | None,
        typer.Option("--release", help="Verify only this release of the run, and the base: 1 is the first task's."),
    ] = None,
    no_latency: Annotated[
        bool, typer.Option("--no-latency", help="Skip the latency measurement; the verdict covers all other checks.")
    ] = False,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", readable=False, metavar="FILE", help="Signed update that the release must match."),
    ] = None,
    trust: Annotated[
        list[Path] | None,
        typer.Option("--trust", readable=False, metavar="KEY", help="Trusted public key. Repeatable."),
    ] = None,
    threshold: Annotated[
        int, typer.Option("--threshold", help="Number of trusted keys that must have signed the update.")
    ] = 1,
    outputs: Annotated[
        Path | None,
        typer.Option(
            "--outputs",
            readable=False,
            metavar="FILE",
            help="Check only these embeddings (.npz) of a converted release.",
        ),
    ] = None,
    device: Where = Device.auto,
    as_json: Json = False,
) -> None:
    """Verify all releases of a run against the unmerged model, or one release against its golden samples."""
    # Read when torch is loaded. Threads that wait without spinning halve the time next to other programs and add 5 % alone.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with open_terminal(as_json) as terminal:
        from r1export.verify.latency import DEFAULT_BUDGET

        if release is not None and (path / "manifest.json").exists():
            raise InputError(f"{path} is a release", "--release needs a run: the folder with recipe.toml")
        if outputs:
            _show_outputs(terminal, path, outputs)
        budget = None if no_latency else DEFAULT_BUDGET
        update = _signed_update(bundle, trust or [], threshold)
        if (path / "manifest.json").exists():
            from r1export.pipeline.verification.release import verify_release

            _show(terminal, verify_release(path, provider or (), budget, update=update))
        elif update:
            raise InputError(f"{path} is not a release", "--bundle needs a release: a folder in RUN/releases")
        else:
            with reopened(path, device, terminal) as context:
                from r1export.pipeline.verification.run import verify_run

                _show(terminal, verify_run(context, provider or (), budget, release))


@app.command()
def report(
    path: Annotated[
        Path,
        typer.Argument(readable=False, metavar="RUN|RELEASE", help="Verified run folder or release folder."),
    ],
    as_json: Json = False,
) -> None:
    """Show the report of a verified run or release and re-render its pages. Exits with the code of its verdict."""
    with open_terminal(as_json) as terminal:
        from r1export.report.freshness import check_fresh
        from r1export.report.write import write_report
        from r1export.verify.results import RunReport

        report: Report = _read_report(path)
        check_fresh(report, path)
        write_report(report, path)
        if isinstance(report, RunReport):
            terminal.accuracy(report.accuracy)
        _show(terminal, report)


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(readable=False, metavar="RUN...", help="Verified runs of the same tasks in the same order."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", readable=False, metavar="DIR", help="Folder for comparison.html and comparison.json."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare verified runs, e.g. a method with its baselines, in one table and one plot."""
    with open_terminal(as_json) as terminal:
        from r1export.report import compare_runs

        comparison = compare_runs.compare_runs([(run.resolve().name, _read_run_report(run)) for run in runs])
        terminal.comparison(comparison)
        if out is not None:
            compare_runs.write_comparison(comparison, out, overwrite=overwrite)
            terminal.say(f"Comparison: {out / 'comparison.html'}")
        terminal.document(comparison.to_json())
        finish(comparison.verdict)


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            readable=False,
            metavar="FILE|DIR|SOURCE",
            help="Run, release, recipe, update, .onnx graph, safetensors file, or a task source such as folder:DIR.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", readable=False, metavar="FILE", help="Write a contact sheet (HTML) of the images of a task."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Describe a file, a folder, or the images of a task."""
    with open_terminal(as_json) as terminal:
        from r1export.inspection import describe, describe_source, is_source

        if is_source(str(path)):
            with terminal.track("Decoding images", 0) as advance:
                found = describe_source(str(path), advance, out)
        elif out is not None:
            raise InputError(f"--out: {path} is not a task source", "use a source such as folder:DIR")
        else:
            found = describe(path)
        for name, value in found.facts.items():
            terminal.say(f"{name}: {value}")
        if found.rows:
            terminal.table(found.title, found.columns, found.rows)
        for note in found.notes[:NOTES]:
            terminal.say(f"  {note}")
        if len(found.notes) > NOTES:
            terminal.say(f"  and {len(found.notes) - NOTES} more (--json lists all)")
        terminal.document(found.to_json())


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check the environment: versions, providers, devices, and that a small graph runs."""
    with open_terminal(as_json) as terminal:
        from r1export.inspection import examine_environment

        findings = examine_environment()
        terminal.table("Environment", ["check", "found", "verdict"], [[f.check, f.found, f.verdict] for f in findings])
        terminal.document({"findings": [asdict(finding) for finding in findings]})
        if any(finding.verdict == "fail" for finding in findings):
            raise typer.Exit(3)
