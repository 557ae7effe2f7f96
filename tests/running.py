"""Small runs by the real command line, in this process: starting torch anew for each of a hundred commands would take minutes."""

from __future__ import annotations

import io
import sys
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from faults.planting import in_its_space

from r1export.cli import app
from r1export.pipeline.context import NoProgress, RunContext
from r1export.run_folder import RunFolder
from r1export.update.atomic_io import sha256_bytes, sha256_file
from r1export.update.container import read_tensors
from r1export.update.release_manifest import FileEntry, ReleaseManifest
from r1export.verify.graph_digest import graph_digest
from r1export.verify.latency import TimingBudget

SETTINGS = (
    "tasks.0.source=builtin:digits", "tasks.0.name=digits", "train.iterations=6", "data.test_limit=60", "data.shots=4",
    "verify.samples=8", "verify.images=12", "verify.pairs=20", "verify.margin=0.9",
)  # fmt: skip
RECIPE = '[base]\nmodel = "builtin:world"\n[[tasks]]\nname = "digits"\nsource = "builtin:digits"\n[train]\nlearning_rate = 5e-3\n[pool]\nalpha = 12.0\n'


QUICK = TimingBudget(blocks=3, patience=0.0)  # for tests in which it matters what is timed, not how well


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """What a person at a terminal sees."""
        return self.stdout + self.stderr


def r1export(*arguments: object) -> Result:
    """A crash of the command fails the test."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("COLUMNS", "200")
        try:
            app([str(argument) for argument in arguments], prog_name="r1export")
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def reseal(release: Path) -> None:
    """Make every digest of the manifest fit what is there now."""
    manifest = ReleaseManifest.read(release)
    stored = {name: tensor for file in manifest.weights for name, tensor in read_tensors(release / file).items()}
    sealed = replace(
        manifest,
        files={
            name: FileEntry(sha256_file(release / name), (release / name).stat().st_size) for name in manifest.files
        },
        graphs={name: graph_digest(release / name) for name in manifest.graphs},
        tensors={
            name: replace(entry, sha256=sha256_bytes(np.ascontiguousarray(stored[name])))
            for name, entry in manifest.tensors.items()
        },
    )
    if sealed.embedding_space:
        sealed = in_its_space(sealed, release)
    sealed.sealed().write(release)


@dataclass(frozen=True)
class Lab:
    """A verified run, and the update that takes a device from its base to its first release."""

    run: Path
    update: Path
    public: Path

    @classmethod
    def of(cls, run: Path) -> Lab:
        """Verify an exported run, make a key and sign the update, all beside it."""
        folder = run.parent
        lab = cls(run, folder / "update.r1u", folder / "fleet.pub")
        for command in (
            ("verify", run, "--no-latency"),
            ("keygen", folder / "fleet"),
            ("bundle", run, "--release", 1, "--key", folder / "fleet.key", "-o", lab.update),
        ):
            done = r1export(*command)
            assert done.returncode == 0, done.output
        return lab

    def release(self, number: int) -> Path:
        return next((self.run / "releases").glob(f"{number:02d}-*"))


def context_of(run: Path) -> RunContext:
    """The run as the pipeline sees it."""
    return RunContext(RunFolder(run), RunFolder(run).recipe(), "cpu", NoProgress())


_EXPORTED: dict[str, bytes] = {}  # base and opset of a recipe -> its graphs, as a tar archive


def trained_run(folder: Path, recipe: str, *settings: str) -> Path:
    """A run in folder/run, trained and exported and not yet verified. The graphs of each base model are exported once."""
    (folder / "recipe.toml").write_text(recipe)
    sets = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    done = r1export("train", folder / "recipe.toml", "--out", folder / "run", *sets)
    assert done.returncode == 0, done.output
    run = RunFolder(folder / "run")
    of_base = run.recipe().model_dump_json(include={"base": True, "export": {"opset"}})
    if of_base in _EXPORTED:
        with tarfile.open(fileobj=io.BytesIO(_EXPORTED[of_base])) as archive:
            archive.extractall(run.path, filter="data")
    done = r1export("export", run.path)
    assert done.returncode == 0, done.output
    if of_base not in _EXPORTED:
        with tarfile.open(fileobj=(stored := io.BytesIO()), mode="w") as archive:
            archive.add(run.graphs(), arcname=run.graphs().name)
        _EXPORTED[of_base] = stored.getvalue()
    return run.path
