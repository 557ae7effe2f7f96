"""Fuzz the readers of releases, recipes and reports: each has to return a verdict or a one-line error.

    python scripts/fuzz_release.py --seconds 60 [--seed 0]

Starts from a small release that it makes, changes bytes and JSON values of one file at a time, resealed or not, and calls what
`verify RELEASE`, `inspect` and recipes read with. Any exception but an R1ExportError ends with exit code 1; the graphs
themselves are not run, which `verify` does in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1export.cli import app
from r1export.errors import R1ExportError
from r1export.inspection import describe
from r1export.pipeline.verification.identity import WEIGHT_FILES, check_manifest_and_files
from r1export.recipe_file import load_recipe
from r1export.report.json_format import read_report
from r1export.update.atomic_io import sha256_file
from r1export.update.release_layout import GRAPHS
from r1export.update.release_manifest import FileEntry, ReleaseManifest
from r1export.verify.client_files import ListedClasses, PreprocessConfig, check_tokenizer
from r1export.verify.contents import attempt, check_programs, check_tensor_map
from r1export.verify.golden import read_golden

ROOT = Path(__file__).parents[1]
ODD: tuple[object, ...] = (
    None,
    True,
    0,
    -1,
    2**63,
    10**30,
    0.5,
    1e308,
    "",
    "a",
    "../x",
    "a\nb",
    "\ud800",
    "é" * 300,
    [],
    {},
    [[]] * 9,
    ["x"] * 3000,
)
SLOW = 20.0  # seconds that one answer may take


def make_release(folder: Path) -> Path:
    """A release of a small run, trained for two steps."""
    settings = ("train.iterations=2", "data.test_limit=20", "data.shots=2", "train.distill_weight=0")
    sets = [part for setting in settings for part in ("--set", setting)]
    recipe = folder / "recipe.toml"
    recipe.write_text('[base]\nmodel = "builtin:world"\n[[tasks]]\nname = "digits"\nsource = "builtin:digits"\n')
    for command in (["train", str(recipe), "--out", str(folder / "run"), *sets], ["export", str(folder / "run")]):
        try:
            app(command)
        except SystemExit as stop:
            if stop.code:
                raise
    return folder / "run" / "releases" / "01-digits"


def readers(release: Path, damaged: str) -> list[Callable[[], object]]:
    """Everything that reads the file `damaged` of a release without running its graphs."""
    manifest = ReleaseManifest.read(release)
    tasks = [task.name for task in manifest.tasks]
    slow = damaged.startswith(("tokenizer", "golden"))  # half a second, for a vocabulary of 50,000
    return [
        lambda: check_manifest_and_files(release, manifest, tasks, {}),
        lambda: attempt(lambda: check_tensor_map(release, manifest, WEIGHT_FILES), of=1),
        lambda: attempt(lambda: check_programs(release, manifest, GRAPHS), of=1),
        lambda: PreprocessConfig.read(release),
        lambda: [ListedClasses.read(path) for path in sorted((release / "classes").glob("*.json"))],
        lambda: describe(release),
        *(lambda path=path: describe(path) for path in sorted(release.glob("*.safetensors"))),
    ] + ([lambda: attempt(lambda: check_tokenizer(release, read_golden(release)), of=1)] if slow else [])


def mutated(rng: random.Random, data: bytes, name: str) -> bytes:
    """The bytes of a file with one thing changed."""
    if name.endswith(".json") and rng.random() < 0.7:
        document = json.loads(data)
        change_value(rng, document)
        return json.dumps(document).encode("utf-8", "surrogatepass")
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = min(int(rng.expovariate(1 / 400)), len(changed) - 1)  # headers are where readers go wrong
        changed[at] = rng.randrange(256)
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.15 else changed)


def change_value(rng: random.Random, value: Any) -> None:
    """Change one member somewhere in a JSON document."""
    while isinstance(value, dict | list) and value:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not isinstance(value[key], dict | list) or not value[key] or rng.random() < 0.3:
            if isinstance(value, dict) and rng.random() < 0.3:
                del value[key]
            else:
                value[key] = rng.choice(ODD)
            return
        value = value[key]


def reseal(release: Path, name: str) -> None:
    """Make the digest of one file fit, as a faulty pipeline would."""
    manifest = ReleaseManifest.read(release)
    entry = FileEntry(sha256_file(release / name), (release / name).stat().st_size)
    replace(manifest, files={**manifest.files, name: entry}).sealed().write(release)


def try_once(rng: random.Random, release: Path, recipe: bytes, folder: Path) -> None:
    """Damage one file and read everything. Raises what no reader may raise."""
    name = rng.choice([p.relative_to(release).as_posix() for p in release.rglob("*") if p.is_file()])
    path, manifest = release / name, (release / "manifest.json").read_bytes()
    whole = path.read_bytes()
    path.write_bytes(mutated(rng, whole, name))
    try:
        if name != "manifest.json" and rng.random() < 0.5 and name in ReleaseManifest.read(release).files:
            reseal(release, name)
        for read in readers(release, name):
            answered(read)
    except R1ExportError:
        pass
    finally:
        path.write_bytes(whole)
        (release / "manifest.json").write_bytes(manifest)
    toml = folder / "fuzzed.toml"
    toml.write_bytes(mutated(rng, recipe, "recipe.toml"))
    answered(lambda: load_recipe(toml))
    answered(lambda: describe(toml))
    report = folder / "report.json"
    report.write_bytes(
        mutated(rng, b'{"schema": "r1export.report/2", "verdict": "pass", "reasons": [], "release": {}}', "report.json")
    )
    answered(lambda: read_report(report, "verify it again"))


def answered(read: Callable[[], object]) -> None:
    with suppress(R1ExportError):
        read()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, executions = random.Random(options.seed), 0
    recipe = (ROOT / "recipes" / "quickstart.toml").read_bytes()
    with tempfile.TemporaryDirectory() as name:
        release = make_release(Path(name))
        end = time.monotonic() + options.seconds
        while time.monotonic() < end:
            state, start = rng.getstate(), time.monotonic()
            try:
                try_once(rng, release, recipe, Path(name))
            except Exception as error:
                kept = shutil.copytree(name, tempfile.mkdtemp(), dirs_exist_ok=True)
                print(f"{type(error).__name__}: {error}; state {hash(state)}, files in {kept}")
                raise
            if time.monotonic() - start > SLOW:
                print(f"one answer took more than {SLOW} s")
                return 1
            executions += 1
    print(f"{executions} damaged releases, recipes and reports, 0 failures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
