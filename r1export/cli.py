"""The command line: one function per command, heavy imports inside the function.

Exit codes: 0 passed, 1 a check failed, 2 bad usage or bad input, 3 this environment cannot do it, 4 inconclusive.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r1export.command import Commands, open_terminal, run_command
from r1export.errors import InputError

if TYPE_CHECKING:
    from r1export.console import Terminal
    from r1export.pipeline.context import RunContext
    from r1export.verify.results import Report, RunReport
    from r1export.verify.signature import SignedUpdate

VERDICT_CODES = {"pass": 0, "fail": 1, "inconclusive": 4}
NOTES = 20  # lines about single pictures that `inspect` prints for people

app = typer.Typer(
    name="r1export", cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Fine-tune CLIP on a sequence of tasks with rank-1 experts, merge them, and export ONNX models with no added inference cost, verified.",
)  # fmt: skip


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


RecipeFile = Annotated[Path, typer.Argument(readable=False, metavar="RECIPE", help="Recipe in TOML; see recipes/.")]
Run = Annotated[Path, typer.Argument(readable=False, metavar="RUN", help="Folder of a run.")]
Out = Annotated[Path, typer.Option("--out", "-o", readable=False, metavar="RUN", help="Folder for the run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the existing run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the existing run first.")]
Where = Annotated[Device, typer.Option("--device", help="Where to train and to run torch.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Override a recipe field, for example train.iterations=50; repeatable."
    ),
]
Order = Annotated[
    str | None,
    typer.Option("--order", metavar="NAMES", help="Task names with commas between them, or `reversed`."),
]
Providers = Annotated[
    list[str] | None,
    typer.Option(
        "--provider",
        metavar="NAME",
        help="cpu, cuda or tensorrt of onnxruntime, openvino, or reference (onnx's own, untimed); repeatable. Default: cpu, and cuda where there is one.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout, of an error too; everything else goes to stderr.")
]

# The options of `bundle`, which are many: a fleet's owner decides all of this.
TargetRelease = Annotated[
    int, typer.Option("--release", help="Number of the release that the device will have; 0 is the base.")
]
Keys = Annotated[
    list[Path], typer.Option("--key", readable=False, help="Secret key from keygen; give it once for each signature.")
]
UpdateFile = Annotated[
    Path, typer.Option("--out", "-o", readable=False, metavar="FILE", help="The update, for example update.r1u.")
]
Since = Annotated[int, typer.Option("--since", help="Number of the release that the device has.")]
WhichPrecision = Annotated[
    Precision, typer.Option("--precision", help="Which releases: those of fp32 or of a variant of the recipe.")
]
Drop = Annotated[
    list[str] | None, typer.Option("--drop", metavar="TASK", help="Leave a task out; needs --seq; repeatable.")
]
Seq = Annotated[
    int,
    typer.Option(
        "--seq",
        help="Sequence number; a rollback or a version without a task needs one above all that the fleet has seen.",
    ),
]
Product = Annotated[str, typer.Option("--product", help="Devices of another product refuse the update.")]
DeviceClass = Annotated[str, typer.Option("--device-class", help="Devices of another class refuse the update.")]
MinSeq = Annotated[int, typer.Option("--min-seq", help="Devices may not roll back below this sequence number.")]
Expires = Annotated[
    int, typer.Option("--expires", help="Seconds since 1970 after which devices refuse the update; 0 is never.")
]
AcceptInconclusive = Annotated[
    bool, typer.Option("--accept-inconclusive", help="Sign a release whose verification did not decide everything.")
]


@contextmanager
def _open(
    recipe_file: Path,
    out: Path,
    resume: bool,
    overwrite: bool,
    device: Device,
    overrides: list[str] | None,
    order: str | None,
    terminal: Terminal,
) -> Iterator[RunContext]:
    from r1export.recipe import in_order, load_recipe
    from r1export.run_folder import check_run

    recipe = load_recipe(recipe_file, tuple(overrides or ()))
    recipe = in_order(recipe, order) if order else recipe
    check_run(out, recipe, resume=resume, overwrite=overwrite)  # before torch is loaded: an error is there at once
    from r1export.pipeline.run import open_run_context

    with open_run_context(recipe, out, device=device, resume=resume, overwrite=overwrite, progress=terminal) as context:
        yield context


@contextmanager
def _reopen(path: Path, device: Device, terminal: Terminal) -> Iterator[RunContext]:
    from r1export.run_folder import RunFolder

    RunFolder(path).recipe()  # before torch is loaded
    from r1export.pipeline.run import reopen_run_context

    with reopen_run_context(path, device=device, progress=terminal) as context:
        yield context


def _read_report(folder: Path) -> Report:
    from r1export.report.json_format import read_report

    return read_report(folder / "report.json", f"write it again: r1export verify {folder}")


def _read_run_report(folder: Path) -> RunReport:
    """Raises InputError if it is the report of a release, or of a run that changed since."""
    from r1export.report.freshness import check_fresh
    from r1export.verify.results import RunReport

    report: Report = _read_report(folder)
    if not isinstance(report, RunReport):
        raise InputError(
            f"{folder}: the report of a release, expected one of a run", "give the folder of a verified run"
        )
    check_fresh(report, folder)
    return report


def _signed_update(bundle: Path | None, trust: list[Path], threshold: int) -> SignedUpdate | None:
    from r1export.verify.signature import SignedUpdate

    if (bundle is None) != (not trust):
        raise InputError("--bundle and --trust need each other", "give the update and the public keys that may sign it")
    return SignedUpdate.read(bundle, trust, threshold) if bundle else None


def _show_outputs(terminal: Terminal, release: Path, outputs: Path) -> None:
    """Compare embeddings that were computed elsewhere, and end with the exit code of the verdict."""
    from r1export.verify.outputs import check_outputs

    check = check_outputs(release, outputs)
    terminal.say(f"{check.verdict}: {check.detail}")
    terminal.document(asdict(check))
    _finish(check.verdict)


def _show(terminal: Terminal, report: Report, note: str = "") -> None:
    """Print a report and end with the exit code of its verdict."""
    from r1export.report.json_format import to_json

    terminal.report(report)
    if note:
        terminal.say(note)
    terminal.document(to_json(report))
    _finish(report.verdict)


def _finish(verdict: str) -> None:
    raise typer.Exit(VERDICT_CODES[verdict])


@app.command()
def run(
    recipe: RecipeFile,
    out: Out,
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Where = Device.auto,
    set: Set = None,
    order: Order = None,
    as_json: Json = False,
) -> None:
    """Train a stream of tasks, merge and export after each, and verify every release."""
    with (
        open_terminal(as_json) as terminal,
        _open(recipe, out, resume, overwrite, device, set, order, terminal) as context,
    ):
        from r1export.pipeline.run import run_steps

        report = run_steps(context)
        if report is None:
            return
        terminal.accuracy(report.accuracy)
        _show(terminal, report, f"Report: {out / 'report.html'}   Releases: {out / 'releases'}")


@app.command()
def train(
    recipe: RecipeFile,
    out: Out,
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Where = Device.auto,
    set: Set = None,
    order: Order = None,
    as_json: Json = False,
) -> None:
    """Train a stream of tasks; writes factors, pools and metrics, exports nothing."""
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
        typer.Option("--audit-reexport", help="Export the last merged model afresh and compare it with its release."),
    ] = False,
    device: Where = Device.auto,
    as_json: Json = False,
) -> None:
    """Export the graphs of a trained run once, and write a release for the base and for every task."""
    with open_terminal(as_json) as terminal, _reopen(run, device, terminal) as context:
        from r1export.pipeline.export import export_releases

        releases = export_releases(context, overwrite=overwrite, audit=audit)
        for path in releases:
            terminal.say(str(path))
        terminal.document({"releases": [str(path) for path in releases]})


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(readable=False, metavar="RUN|RELEASE", help="A run, or one release folder.")],
    provider: Providers = None,
    no_latency: Annotated[
        bool, typer.Option("--no-latency", help="Time nothing; the verdict is that of all other checks.")
    ] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle", readable=False, metavar="FILE", help="A signed update that says what the release has to be."
        ),
    ] = None,
    trust: Annotated[
        list[Path] | None,
        typer.Option("--trust", readable=False, metavar="KEY", help="Public key that may sign the update; repeatable."),
    ] = None,
    threshold: Annotated[
        int, typer.Option("--threshold", help="How many of the trusted keys have to sign the update.")
    ] = 1,
    outputs: Annotated[
        Path | None,
        typer.Option(
            "--outputs",
            readable=False,
            metavar="FILE",
            help="Embeddings of a converted release (.npz): check only these.",
        ),
    ] = None,
    device: Where = Device.auto,
    as_json: Json = False,
) -> None:
    """Verify all releases of a run against the unmerged model, or one release by its own golden samples."""
    with open_terminal(as_json) as terminal:
        from r1export.verify.latency import DEFAULT_BUDGET

        if outputs:
            _show_outputs(terminal, path, outputs)
        budget = None if no_latency else DEFAULT_BUDGET
        update = _signed_update(bundle, trust or [], threshold)
        if (path / "manifest.json").exists():
            from r1export.pipeline.verification.release import verify_release

            _show(terminal, verify_release(path, provider or (), budget, update=update))
        elif update:
            raise InputError(f"{path} is no release", "--bundle needs one release: a folder of RUN/releases")
        else:
            with _reopen(path, device, terminal) as context:
                from r1export.pipeline.verification.run import verify_run

                _show(terminal, verify_run(context, provider or (), budget))


@app.command()
def report(
    path: Annotated[
        Path,
        typer.Argument(readable=False, metavar="RUN|RELEASE", help="A verified run, or one verified release folder."),
    ],
    as_json: Json = False,
) -> None:
    """Show the report of a verified run or release and write its pages again; ends with the exit code of its verdict."""
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
        typer.Argument(
            readable=False, metavar="RUN...", help="Folders of verified runs of the same tasks in the same order."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", readable=False, metavar="DIR", help="Write comparison.html and comparison.json there."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare verified runs, for example a method with its baselines, in one table and picture."""
    with open_terminal(as_json) as terminal:
        from r1export.report import compare_runs

        comparison = compare_runs.compare_runs([(run.resolve().name, _read_run_report(run)) for run in runs])
        terminal.comparison(comparison)
        if out is not None:
            compare_runs.write_comparison(comparison, out, overwrite=overwrite)
            terminal.say(f"Comparison: {out / 'comparison.html'}")
        terminal.document(comparison.to_json())
        _finish(comparison.verdict)


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            readable=False,
            metavar="FILE|DIR|SOURCE",
            help="A run, release, recipe, update, .onnx graph or safetensors file, or the pictures of a task as a recipe names them, for example folder:DIR.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", readable=False, metavar="FILE", help="Contact sheet of a task's pictures, in HTML."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Describe a file, a folder, or the pictures of a task."""
    with open_terminal(as_json) as terminal:
        from r1export.inspection import describe, describe_source, is_source

        if is_source(str(path)):
            with terminal.track("Decoding images", 0) as advance:
                found = describe_source(str(path), advance, out)
        elif out is not None:
            raise InputError(f"--out: {path} holds no pictures of a task", "give a source, for example folder:DIR")
        else:
            found = describe(path)
        for name, value in found.facts.items():
            terminal.say(f"{name}: {value}")
        if found.rows:
            terminal.table(found.title, found.columns, found.rows)
        for note in found.notes[:NOTES]:
            terminal.say(f"  {note}")
        if len(found.notes) > NOTES:
            terminal.say(f"  and {len(found.notes) - NOTES} more; all of them with --json")
        terminal.document(found.to_json())


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this environment: versions, providers, devices, and that a tiny graph runs."""
    with open_terminal(as_json) as terminal:
        from r1export.inspection import examine_environment

        findings = examine_environment()
        terminal.table("Environment", ["check", "found", "verdict"], [[f.check, f.found, f.verdict] for f in findings])
        terminal.document({"findings": [asdict(finding) for finding in findings]})
        if any(finding.verdict == "fail" for finding in findings):
            raise typer.Exit(3)


@app.command()
def keygen(
    prefix: Annotated[
        Path,
        typer.Argument(
            readable=False, metavar="PREFIX", help="Writes PREFIX.key, readable by its owner only, and PREFIX.pub."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Make an Ed25519 key pair that signs field updates."""
    with open_terminal(as_json) as terminal:
        from r1export.update.envelope import keygen as make_keys

        public = make_keys(prefix)
        terminal.say(f"{prefix}.key stays here; {prefix}.pub goes to the devices. Key id {public.keyid}")
        terminal.document({"key": f"{prefix}.key", "public": f"{prefix}.pub", "keyid": public.keyid})


@app.command()
def bundle(
    run: Run,
    release: TargetRelease,
    key: Keys,
    out: UpdateFile,
    since: Since = 0,
    precision: WhichPrecision = Precision.fp32,
    drop: Drop = None,
    seq: Seq = 0,
    product: Product = "default",
    device_class: DeviceClass = "default",
    min_seq: MinSeq = 0,
    expires: Expires = 0,
    accept_inconclusive: AcceptInconclusive = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write what a device lacks to run a verified release, signed: the factors of the tasks since its own release."""
    with open_terminal(as_json) as terminal:
        from r1export.update.envelope import SecretKey
        from r1export.update.lab.publish import Step, Terms

        keys = tuple(SecretKey.read(path) for path in key)
        step = Step(release, since, tuple(drop or ()), seq, precision)
        terms = Terms(int(time.time()), product, device_class, min_seq, expires)
        with _reopen(run, Device.auto, terminal) as context:
            from r1export.pipeline.bundle import Order, write_bundle

            published = write_bundle(context, Order(step, terms, keys, accept_inconclusive), out, overwrite=overwrite)
        size = out.stat().st_size
        for reason in published.accepted:
            terminal.say(f"Accepted: {reason}")
        terminal.say(f"{out}: {size / 1000:.1f} kB, from release {since} to {release}")
        facts = {"bundle": str(out), "bytes": size, "release": release, "since": since}
        terminal.document(facts | {"accepted": list(published.accepted)})


@app.command()
def layout(
    path: Annotated[
        Path,
        typer.Argument(
            readable=False, metavar="RELEASE|LAYOUT", help="A release folder; with --check alone, a layout."
        ),
    ],
    out: Annotated[Path | None, typer.Argument(readable=False, metavar="OUT", help="Folder for the layout.")] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="NAME",
            help="transformersjs, fastembed, immich, openclip, ortpackage, triton, ovms or oci.",
        ),
    ] = "",
    name: Annotated[
        str, typer.Option("--name", help="What the client calls the model, where it has a name for it.")
    ] = "",
    variants: Annotated[
        bool,
        typer.Option("--variants/--no-variants", help="With the run's fp16 and int8 releases, for transformersjs."),
    ] = True,
    check: Annotated[
        bool, typer.Option("--check", help="Open the layout with its client and compare with the golden samples.")
    ] = False,
    python: Annotated[
        Path | None,
        typer.Option("--python", readable=False, help="The interpreter that has the client; by default this one."),
    ] = None,
    node_modules: Annotated[
        Path | None,
        typer.Option("--node-modules", readable=False, help="A folder below which npm installed the client."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a release the folder that a client opens, or check such a folder with the client."""
    with open_terminal(as_json) as terminal:
        from r1export.layout.check import check_layout
        from r1export.layout.table import layout_named
        from r1export.layout.write import read_source, write_layout

        document: dict[str, object] = {}
        if out is not None:
            kind = layout_named(to)
            source = read_source(path, variants=variants and kind.takes_variants)
            written = write_layout(source, to, out, name=name)
            terminal.say(
                f"{out}: {len(written.layout.paths)} files for {kind.opened_by}, {written.added / 1000:.1f} kB added"
            )
            for note in written.notes:
                terminal.say(f"  {note}")
            document |= {"layout": str(out), "shared": written.shared, "added_bytes": written.added}
        elif to or not check:
            raise InputError(
                "layout needs a folder to write to", "r1export layout RELEASE OUT --to NAME, or LAYOUT --check"
            )
        result = check_layout(out or path, python=python, node_modules=node_modules) if check else None
        if result:
            terminal.say(f"{result.check.verdict}: {result.check.detail}")
            document |= {"client": result.client, "max_abs": dict(result.differences), "verdict": result.check.verdict}
            document |= {"same_top1": result.same_top1, "classified": result.classified}
        terminal.document(document)
        if result:
            _finish(result.check.verdict)


@app.command()
def reindex(
    pictures: Annotated[
        list[Path],
        typer.Argument(
            readable=False,
            metavar="IMAGES|FILES...",
            help="Folders of pictures, picture files, or .txt with a path a line.",
        ),
    ],
    release: Annotated[Path, typer.Option("--release", readable=False, metavar="RELEASE", help="Embeds the pictures.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", readable=False, metavar="FILE", help="Vectors: a .parquet or .npy.")
    ],
    old: Annotated[
        Path | None,
        typer.Option(
            "--from",
            readable=False,
            metavar="OLD",
            help="Vectors of an earlier release; kept where the verdict allows it.",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=-1, max=256, help="Processes that decode; -1 is one per two cores.")
    ] = -1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Embed pictures with a release, and again with the next one as far as its re-index verdict says; resumes by itself."""
    with open_terminal(as_json) as terminal:
        from r1export.reindex.run import Job, default_workers, list_pictures, open_release
        from r1export.reindex.run import reindex as embed_pictures

        opened, space = open_release(release)
        job = Job(opened, space, list_pictures(pictures), workers=default_workers() if workers < 0 else workers)
        with terminal.track("Embedding pictures", len(job.paths)) as advance:
            done = embed_pictures(job, out, old=old, overwrite=overwrite, advance=advance)
        verdict = f"; re-index {done.verdict}" if done.verdict else ""
        terminal.say(
            f"{out}: {done.rows} vectors, {done.embedded} embedded at {done.rate:.1f}/s, {done.kept} kept{verdict}"
        )
        for path, reason in list(done.skipped.items())[:NOTES]:
            terminal.say(f"  no vector for {path}: {reason}")
        terminal.document({"out": str(out), "rate": done.rate, **{k: v for k, v in asdict(done).items() if k != "out"}})


@app.command()
def attest(
    release: Annotated[Path, typer.Argument(readable=False, metavar="RELEASE", help="A release folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", readable=False, metavar="DIR", help="Folder for the files.")],
    key: Annotated[
        Path | None,
        typer.Option("--key", readable=False, help="P-256 secret key in PEM that signs; without one, no model.sig."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a CycloneDX bill of materials of a release, and a signature that the model-signing library verifies."""
    with open_terminal(as_json) as terminal:
        from r1export.attest.bill_of_materials import BOM, bill_of_materials
        from r1export.attest.model_signature import SIGNATURE, read_key, write_signature
        from r1export.update.atomic_io import make_folder, write_file
        from r1export.update.release_manifest import Release

        secret = read_key(key) if key else None
        found = Release.read(release)
        found.check()
        make_folder(out)
        write_file(out / BOM, bill_of_materials(found))
        files = write_signature(release, secret, out / SIGNATURE) if secret else 0
        terminal.say(f"{out / BOM}{f', {out / SIGNATURE}: {files} files signed' if secret else ''}")
        terminal.document(
            {"bom": str(out / BOM), "signature": str(out / SIGNATURE) if secret else None, "files": files}
        )


@app.command("device-kit")
def device_kit(
    out: Annotated[
        Path, typer.Option("--out", "-o", readable=False, metavar="FILE", help="The kit, for example r1device.pyz.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write the one file that a device needs to install updates, with numpy and nothing else."""
    with open_terminal(as_json) as terminal:
        from r1export.device.kit import device_kit as write_kit

        path = write_kit(out, overwrite=overwrite)
        terminal.say(f"{path}: {path.stat().st_size / 1000:.1f} kB; on the device: python {path.name} --help")
        terminal.document({"kit": str(path), "bytes": path.stat().st_size})


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def device(context: typer.Context) -> None:
    """What the kit does on a device: init, apply, status, rollback, doctor, inspect."""
    from r1export.device.__main__ import main as run_verb

    raise typer.Exit(run_verb(context.args or ["--help"], program="r1export device"))


@app.command()
def serve(
    path: Annotated[
        Path,
        typer.Argument(
            readable=False, metavar="RELEASE|STORE", help="A release folder, or a device's store: its current version."
        ),
    ],
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")
    ] = 8000,
    as_json: Json = False,
) -> None:
    """Serve a page on this machine that tests a release in the browser and classifies pictures with it."""
    with open_terminal(as_json) as terminal:
        from r1export.web.server import Server
        from r1export.web.source import open_source

        with Server(open_source(path), port) as server, suppress(KeyboardInterrupt):
            terminal.say(f"Serving {path} at {server.url} until Ctrl-C")
            terminal.line({"url": server.url})
            server.serve_forever()


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from r1export import __version__

        print(__version__)
        raise typer.Exit()


def main() -> None:
    """Entry point of the command `r1export`."""
    run_command(app)
