"""Old, new and other runtimes: each loads every layout of a release and has to give the stored golden outputs.

    python scripts/runtime_matrix.py [oldest newest ...] [--envs FOLDER] [--json FILE] [--write]

A small run is trained and exported in fp32, fp16 and int8. For every runtime a virtual environment is made that holds it and
numpy alone; with --envs they are kept there and used again. In it the device kit makes two stores, applies a signed update
(with its own health check where the runtime is onnxruntime), and `runtime_probe.py` runs the golden samples. Exit code 1 if
one fails that should not. --write puts the table into docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Required, TypedDict

from r1export.device.kit import device_kit

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by scripts/runtime_matrix.py -->\n", "<!-- end of runtime_matrix.py -->\n"
RECIPE = """[base]
model = "builtin:world"
[data]
shots = 4
test_limit = 60
[[tasks]]
name = "digits"
source = "builtin:digits"
[train]
iterations = 40
learning_rate = 5e-3
[pool]
alpha = 12.0
[export]
variants = ["fp16", "int8"]
"""
LAYOUTS = ("plain", "current", "fp16", "int8", "overlay")


@dataclass(frozen=True)
class Runtime:
    """One environment. `refused` says that it is too old, which the table is to show."""

    kind: str
    packages: tuple[str, ...]
    refused: bool = False


class Cell(TypedDict, total=False):
    """What one runtime did with one layout: a verdict, how it failed, and what `runtime_probe.py` printed."""

    verdict: Required[str]
    detail: str
    version: str
    graphs: list[str]
    max_abs: float
    min_cosine: float


RUNTIMES = {
    "too-old": Runtime("onnxruntime", ("onnxruntime==1.19.2",), refused=True),
    "oldest": Runtime("onnxruntime", ("onnxruntime==1.20.0",)),
    "1.23": Runtime("onnxruntime", ("onnxruntime==1.23.0",)),
    "newest": Runtime("onnxruntime", ("onnxruntime",)),
    "openvino-oldest": Runtime("openvino", ("openvino==2025.0.0",)),
    "openvino": Runtime("openvino", ("openvino",)),
    "reference": Runtime("reference", ("onnx",)),
}


def environment(folder: Path, packages: Sequence[str]) -> Path:
    """The Python of an environment with these packages; one that is there already is taken as it is."""
    python = folder / "bin" / "python"
    if not (folder / ".complete").exists():
        venv.create(folder, symlinks=True, with_pip=False, clear=True)
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--only-binary=:all:"]
        subprocess.run([*install, *packages], check=True)
        (folder / ".complete").touch()
    return python


def make_releases(folder: Path) -> dict[str, Path]:
    """The releases of a small run, and what a device needs: kit, keys and an update."""
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    run = folder / "run"
    for command in (
        ("train", folder / "recipe.toml", "--out", run),
        ("export", run),
        ("verify", run, "--no-latency"),
        ("keygen", folder / "fleet"),
        ("bundle", run, "--release", "1", "--key", folder / "fleet.key", "-o", folder / "update.r1u"),
    ):
        done = subprocess.run([sys.executable, "-m", "r1export", *map(str, command)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"r1export {command[0]}: {done.stderr}")
    device_kit(folder / "r1device.pyz")
    variants = {name: run / "variants" / name / "releases" / "01-digits" for name in ("fp16", "int8")}
    return {"base": run / "releases" / "00-base", "plain": run / "releases" / "01-digits", **variants}


def make_store(python: Path, kind: str, mode: str, lab: Path, releases: dict[str, Path], store: Path) -> None:
    """A device that took the update. Raises CalledProcessError with what the kit said."""
    health = "onnxruntime" if kind == "onnxruntime" else "none"
    trust, options = lab / "fleet.pub", ("--mode", mode, "--health", health)
    for verb in (
        ("init", store, "--base", releases["base"], "--trust", trust, *options),
        ("apply", store, lab / "update.r1u"),
    ):
        command = [python, "-W", "ignore", lab / "r1device.pyz", *verb]
        subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)


def probe(python: Path, runtime: str, folder: Path, lab: Path, limits: Path) -> Cell:
    """One cell: what was found, and whether it is within the limits that the release states."""
    done = subprocess.run(
        [python, "-W", "ignore", str(Path(__file__).with_name("runtime_probe.py")), runtime, str(folder)],
        env=os.environ | {"PYTHONPATH": str(lab / "r1device.pyz")}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        return {"verdict": "fail", "detail": said(done.stderr)}
    found: Cell = json.loads(done.stdout.splitlines()[-1])
    golden = json.loads((limits / "manifest.json").read_text(encoding="utf-8"))["golden"]
    holds = found["max_abs"] <= golden["max_abs"] and found["min_cosine"] >= golden["min_cosine"]
    found["verdict"] = "pass" if holds else "fail"
    return found


def said(text: str) -> str:
    """The last line of an error."""
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no message"])[-1][:300]


def examine(name: str, envs: Path, lab: Path, releases: dict[str, Path], work: Path) -> dict[str, Cell]:
    """All layouts in one runtime."""
    runtime = RUNTIMES[name]
    python = environment(envs / name, runtime.packages)
    found = {
        layout: probe(python, runtime.kind, releases[layout], lab, releases[layout])
        for layout in ("plain", "fp16", "int8")
    }
    for layout, mode in (("current", "slot"), ("overlay", "overlay")):
        if mode == "overlay" and runtime.kind != "onnxruntime":
            found[layout] = {"verdict": "not offered"}
            continue
        store = work / f"{name}-{mode}"
        try:
            make_store(python, runtime.kind, mode, lab, releases, store)
        except subprocess.CalledProcessError as error:
            found[layout] = {"verdict": "fail", "detail": said(error.stdout + error.stderr)}
            continue
        kind, folder = ("overlay", store) if mode == "overlay" else (runtime.kind, store / "current")
        found[layout] = probe(python, kind, folder, lab, releases["plain"])
    return {layout: found[layout] for layout in LAYOUTS}


def row(name: str, cells: dict[str, Cell]) -> str:
    """One line of the table."""
    version = next((cell["version"] for cell in cells.values() if "version" in cell), RUNTIMES[name].packages[0])
    kind = {"reference": "onnx.reference"}.get(RUNTIMES[name].kind, RUNTIMES[name].kind)
    texts = [f"{c['verdict']}, {c['max_abs']:.1e}" if "max_abs" in c else c["verdict"] for c in cells.values()]
    return f"| {kind} {version.partition('==')[2] or version} | {' | '.join(texts)} |"


def write_page(table: str) -> None:
    """Put the table between its marks in docs/models.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *RUNTIMES], metavar="NAME", help=", ".join(RUNTIMES))
    parser.add_argument("--envs", type=Path, help="keep the environments here")
    parser.add_argument("--json", type=Path, help="write what was found")
    parser.add_argument("--write", action="store_true", help="write the table into docs/models.md")
    asked = parser.parse_args()
    lines = ["| runtime | " + " | ".join(LAYOUTS) + " |", "|---" * (1 + len(LAYOUTS)) + "|"]
    print(*lines, sep="\n", flush=True)
    found = {}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        releases, envs = make_releases(work), (asked.envs or work / "envs").resolve()
        for name in asked.names or RUNTIMES:
            found[name] = examine(name, envs, work, releases, work)
            lines.append(row(name, found[name]))
            print(lines[-1], flush=True)
            for layout, cell in found[name].items():
                if cell.get("detail"):
                    print(f"  {layout}: {cell['detail']}", file=sys.stderr)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if asked.write:
        write_page("\n".join(lines) + "\n")
    bad = [name for name, cells in found.items() if any(cell["verdict"] == "fail" for cell in cells.values())]
    sys.exit(int(any(not RUNTIMES[name].refused for name in bad)))


if __name__ == "__main__":
    main()
