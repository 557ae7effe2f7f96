"""Commands that work on releases: updates, devices, client layouts, stored vectors, attestations, the web page."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r1export.cli.app import NOTES, app, finish, reopened
from r1export.cli.options import (
    AcceptInconclusive,
    Device,
    DeviceClass,
    Drop,
    Expires,
    Json,
    Keys,
    MinSeq,
    Precision,
    Product,
    Run,
    Seq,
    Since,
    TargetRelease,
    UpdateFile,
    WhichPrecision,
)
from r1export.command import open_terminal
from r1export.errors import InputError

if TYPE_CHECKING:
    pass


@app.command()
def keygen(
    prefix: Annotated[
        Path,
        typer.Argument(readable=False, metavar="PREFIX", help="Writes PREFIX.key (mode 0600) and PREFIX.pub."),
    ],
    as_json: Json = False,
) -> None:
    """Create an Ed25519 key pair for signing updates."""
    with open_terminal(as_json) as terminal:
        from r1export.update.envelope import keygen as make_keys

        public = make_keys(prefix)
        terminal.say(f"Keep {prefix}.key secret; install {prefix}.pub on the devices. Key id: {public.keyid}")
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Write a signed update that takes a device from one verified release to another."""
    with open_terminal(as_json) as terminal:
        from r1export.update.envelope import SecretKey
        from r1export.update.lab.publish import Step, Terms

        keys = tuple(SecretKey.read(path) for path in key)
        step = Step(release, since, tuple(drop or ()), seq, precision)
        terms = Terms(int(time.time()), product, device_class, min_seq, expires)
        with reopened(run, Device.auto, terminal) as context:
            from r1export.pipeline.bundle import Order, write_bundle

            published = write_bundle(context, Order(step, terms, keys, accept_inconclusive), out, overwrite=overwrite)
        size = out.stat().st_size
        for reason in published.accepted:
            terminal.say(f"Accepted although inconclusive: {reason}")
        terminal.say(f"{out}: {size / 1000:.1f} kB, from release {since} to {release}")
        facts = {"bundle": str(out), "bytes": size, "release": release, "since": since}
        terminal.document(facts | {"accepted": list(published.accepted)})


@app.command()
def layout(
    path: Annotated[
        Path,
        typer.Argument(readable=False, metavar="RELEASE|LAYOUT", help="Release folder; with --check alone, a layout."),
    ],
    out: Annotated[Path | None, typer.Argument(readable=False, metavar="OUT", help="Layout folder to create.")] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="NAME",
            help="transformersjs, fastembed, immich, openclip, ortpackage, triton, ovms or oci.",
        ),
    ] = "",
    name: Annotated[str, typer.Option("--name", help="Model name in the client, if the client uses one.")] = "",
    variants: Annotated[
        bool,
        typer.Option(
            "--variants/--no-variants", help="Include the run's fp16 and int8 releases (transformersjs only)."
        ),
    ] = True,
    check: Annotated[
        bool, typer.Option("--check", help="Load the layout with its client and compare with the golden samples.")
    ] = False,
    python: Annotated[
        Path | None,
        typer.Option("--python", readable=False, help="Python interpreter that has the client. Default: this one."),
    ] = None,
    node_modules: Annotated[
        Path | None,
        typer.Option("--node-modules", readable=False, help="Folder where npm installed the client."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a release to the folder layout of a client, or check such a layout with the client."""
    with open_terminal(as_json) as terminal:
        from r1export.layout.check import check_layout
        from r1export.layout.table import layout_named
        from r1export.layout.write import layout_release

        document: dict[str, object] = {}
        if out is not None:
            written = layout_release(path, to, out, name=name, variants=variants)
            client = layout_named(to).opened_by
            terminal.say(f"{out}: {len(written.layout.paths)} files for {client}, {written.added / 1000:.1f} kB added")
            for note in written.notes:
                terminal.say(f"  {note}")
            document |= {"layout": str(out), "shared": written.shared, "added_bytes": written.added}
        elif to or not check:
            raise InputError(
                "layout needs an output folder",
                "use r1export layout RELEASE OUT --to NAME, or r1export layout LAYOUT --check",
            )
        result = check_layout(out or path, python=python, node_modules=node_modules) if check else None
        if result:
            terminal.say(f"{result.check.verdict}: {result.check.detail}")
            document |= {"client": result.client, "max_abs": dict(result.differences), "verdict": result.check.verdict}
            document |= {"same_top1": result.same_top1, "classified": result.classified}
        terminal.document(document)
        if result:
            finish(result.check.verdict)


@app.command()
def reindex(
    pictures: Annotated[
        list[Path],
        typer.Argument(
            readable=False,
            metavar="IMAGES|FILES...",
            help="Image folders, image files, or .txt files with one path per line.",
        ),
    ],
    release: Annotated[
        Path, typer.Option("--release", readable=False, metavar="RELEASE", help="Release that computes the embeddings.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", readable=False, metavar="FILE", help="Output file, .parquet or .npy.")
    ],
    old: Annotated[
        Path | None,
        typer.Option(
            "--from",
            readable=False,
            metavar="OLD",
            help="Vectors of an earlier release; kept if the re-index verdict allows it.",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=-1, max=256, help="Decoder processes; -1 is one per two cores.")
    ] = -1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Compute embeddings of images with a release, or update those of an earlier release. Resumes automatically."""
    with open_terminal(as_json) as terminal:
        from r1export.reindex.run import Job, default_workers, list_pictures, open_release
        from r1export.reindex.run import reindex as embed_pictures

        opened, space = open_release(release)
        job = Job(opened, space, list_pictures(pictures), workers=default_workers() if workers < 0 else workers)
        with terminal.track("Embedding images", len(job.paths)) as advance:
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
    release: Annotated[Path, typer.Argument(readable=False, metavar="RELEASE", help="Release folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", readable=False, metavar="DIR", help="Output folder.")],
    key: Annotated[
        Path | None,
        typer.Option("--key", readable=False, help="P-256 secret key (PEM). Without it no model.sig is written."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a CycloneDX bill of materials of a release, and a signature for the model-signing library."""
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
        Path, typer.Option("--out", "-o", readable=False, metavar="FILE", help="Output file, e.g. r1device.pyz.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Write the single file that a device needs to install updates. It requires only Python and numpy."""
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
    """Run the device kit: init, apply, status, rollback, doctor, inspect."""
    from r1export.device.__main__ import main as run_verb

    raise typer.Exit(run_verb(context.args or ["--help"], program="r1export device"))


@app.command()
def serve(
    path: Annotated[
        Path,
        typer.Argument(
            readable=False,
            metavar="RELEASE|STORE",
            help="Release folder, or a device store (serves its current version).",
        ),
    ],
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0 picks a free one.")
    ] = 8000,
    as_json: Json = False,
) -> None:
    """Serve a local web page that tests a release in the browser and classifies images with it."""
    with open_terminal(as_json) as terminal:
        from r1export.web.server import Server
        from r1export.web.source import open_source

        with Server(open_source(path), port) as server, suppress(KeyboardInterrupt):
            terminal.say(f"Serving {path} at {server.url} (press Ctrl-C to stop)")
            terminal.line({"url": server.url})
            server.serve_forever()
