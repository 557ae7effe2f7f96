"""Test every layout in its client, before and after an update: the tables of docs/layouts.md.

    python scripts/layouts_table.py [NAME ...] [--write]

Small runs are trained, exported and verified, an update is signed, and every layout of the base release is made, opened by its client,
put on a device, updated by the device kit and opened again. The clients are those of scripts/layout_clients.py. Exit code 1 if one
fails. --write puts the tables into docs/layouts.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from layout_clients import NODE, PYTHON
from safetensors.torch import save_file

from r1export.device.kit import device_kit
from r1export.layout.check import ClientResult, check_layout
from r1export.layout.table import LAYOUTS
from r1export.layout.write import read_source, shared_files, write_layout
from r1export.update.layout_file import LayoutFile
from r1export.verify.results import Verdict

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "layouts.md"
BEGIN, END = "<!-- made by scripts/layouts_table.py -->\n", "<!-- end of layouts_table.py -->\n"
OWN_PYTHON = ("openclip", "ovms")  # whose clients r1export's own environment has
SETTINGS = """[data]
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
[verify]
samples = 8
images = 12
"""
WIDE = {  # random weights, with embeddings as long as those of the photo server's models
    "embed_dim": 512,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@dataclass(frozen=True)
class Lab:
    """A verified run with one task, and the update that brings its base to its release."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "run/releases/00-base"

    @property
    def update(self) -> Path:
        return self.folder / "update.r1u"


def command(*arguments: object, program: tuple[object, ...] = (sys.executable, "-m", "r1export")) -> None:
    """Run a command. SystemExit with its last words."""
    done = subprocess.run([*map(str, (*program, *arguments))], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}: {(done.stderr or done.stdout).strip()[-500:]}")


def make_lab(folder: Path, model: str) -> Lab:
    """Train, export, verify and bundle a run of the base `model`."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(f'[base]\nmodel = "{model}"\n{SETTINGS}', encoding="utf-8")
    run, lab = folder / "run", Lab(folder)
    for arguments in (
        ("train", folder / "recipe.toml", "--out", run),
        ("export", run),
        ("verify", run, "--no-latency"),
        ("keygen", folder / "fleet"),
        ("bundle", run, "--release", "1", "--key", folder / "fleet.key", "-o", lab.update),
    ):
        command(*arguments)
    device_kit(folder / "r1device.pyz")
    return lab


def wide_base(folder: Path) -> Path:
    """A base model for the photo server."""
    folder.mkdir()
    document = {"model_cfg": WIDE, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(document), encoding="utf-8")
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**WIDE).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def make_labs(names: Sequence[str], work: Path) -> dict[str, Lab]:
    """The lab of each layout; the photo server's has a base of its own."""
    labs: dict[str, Lab] = {}
    if set(names) - {"immich"}:
        labs = dict.fromkeys(names, make_lab(work / "plain", "builtin:world"))
    if "immich" in names:
        labs["immich"] = make_lab(work / "wide", f"local-dir:{wide_base(work / 'base')}")
    return labs


def check(folder: Path, name: str) -> ClientResult:
    return check_layout(folder, python=None if name in OWN_PYTHON else PYTHON / "bin/python", node_modules=NODE)


def row(folder: Path, result: ClientResult) -> str:
    """One line of a table; a file with a further name takes no space."""
    layout = LayoutFile.read(folder)
    linked = {path for path in shared_files(folder, layout) if path.stat().st_nlink > 1}
    files = [path for path in folder.resolve().rglob("*") if path.is_file()]
    own = {path.resolve() for path in linked}
    added = sum(path.stat().st_size for path in files if path.resolve() not in own and path.stat().st_nlink == 1)
    worst = {name: value for name, value in result.differences.items() if name != "resized_picture"}
    resized = result.differences.get("resized_picture")
    ran = ", ".join(name.replace("_", " ") for name in result.differences)
    classified = f", top-1 {result.same_top1} of {result.classified}" if result.classified else ""
    note = f" ({resized:.1e} where it resizes)" if resized is not None else ""
    return (
        f"| {result.layout} | {result.client} | {ran}{classified} | {max(worst.values()):.1e}{note} "
        f"| {len(linked)} of {len(layout.paths) + 1} | {added / 1000:.1f} kB | {result.check.verdict} |"
    )


def examine(lab: Lab, name: str, work: Path) -> tuple[str, str, bool]:
    """Both rows of one layout, and whether both passed."""
    folder = write_layout(read_source(lab.base, variants=False), name, work / name).path
    before = check(folder, name)
    first = row(folder, before)
    store, kit = work / f"{name}-store", (sys.executable, "-W", "ignore", lab.folder / "r1device.pyz")
    trust = ("--base", lab.base, "--trust", lab.folder / "fleet.pub")
    command("init", store, *trust, "--layout", folder, program=kit)
    command("apply", store, lab.update, program=kit)
    after = check(folder, name)
    passed = before.check.verdict is Verdict.PASS and after.check.verdict is Verdict.PASS
    return first, row(folder, after), passed


def write_page(tables: str) -> None:
    """Put the tables between their marks."""
    start, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(start + BEGIN + tables + END + rest.partition(END)[2], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *LAYOUTS], metavar="NAME", help=", ".join(LAYOUTS))
    parser.add_argument("--write", action="store_true", help="write the tables into docs/layouts.md")
    asked = parser.parse_args()
    columns = ("layout", "client", "what ran", "max-abs against golden", "files shared", "bytes added", "verdict")
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    first, second, good = [], [], True
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        names = asked.names or list(LAYOUTS)
        labs = make_labs(names, work)
        for name in names:
            before, after, passed = examine(labs[name], name, work)
            first.append(before)
            second.append(after)
            good &= passed
            print(before, after, sep="\n", flush=True)
    tables = "\n".join([head, *first, "", "After one `.r1u`, applied by the device kit:", "", head, *second]) + "\n"
    if asked.write:
        write_page(tables)
    sys.exit(int(not good))


if __name__ == "__main__":
    main()
