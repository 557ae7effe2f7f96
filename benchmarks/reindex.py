"""`r1export reindex` against a plain loop around onnxruntime on the same pictures, in turns, each in a fresh process.

    python benchmarks/reindex.py [--pictures 600] [--rounds 5] [--release RELEASE] [--write]

The loop decodes, crops and normalizes a batch as the release says and runs it, in one process. Without --release a base release of
`builtin:photo` is made. Prints pictures per second of both, the median ratio of paired rounds, and the largest memory; --write puts
them into docs/search.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "search.md"
BEGIN, END = "<!-- made by benchmarks/reindex.py -->\n", "<!-- end of benchmarks/reindex.py -->\n"
SIDES = (640, 480)  # pixels of each JPEG
RECIPE = """[base]
model = "builtin:photo"
[[tasks]]
name = "clothing"
source = "builtin:clothing10"
[data]
shots = 4
test_limit = 60
[train]
iterations = 2
[verify]
samples = 8
images = 12
"""
LOOP = """
import json, resource, sys, time
from pathlib import Path
import numpy as np, onnxruntime as ort
from r1export.data.images import decode
from r1export.verify.client_files import PreprocessConfig
release, folder = Path(sys.argv[1]), Path(sys.argv[2])
config = PreprocessConfig.read(release)
session = ort.InferenceSession(release / "visual.onnx", providers=["CPUExecutionProvider"])
paths = sorted(folder.iterdir())
start, rows = time.monotonic(), []
for i in range(0, len(paths), 32):
    crops = np.stack([config.crop(decode(path, str(path)).image) for path in paths[i : i + 32]])
    rows.append(session.run(None, {"pixel_values": config.normalize(crops)})[0])
seconds = time.monotonic() - start
print(json.dumps({"rate": len(paths) / seconds, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}))
"""
OURS = """
import json, resource, sys
from pathlib import Path
from r1export.reindex.run import Job, default_workers, list_pictures, open_release, reindex

if __name__ == "__main__":
    release, space = open_release(Path(sys.argv[1]))
    job = Job(release, space, list_pictures([Path(sys.argv[2])]), workers=default_workers())
    done = reindex(job, Path(sys.argv[3]), overwrite=True)
    both = [resource.getrusage(who).ru_maxrss / 1000 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"rate": done.rate, "mb": sum(both)}))
"""


class Measured(TypedDict):
    """What a process printed: pictures per second, and its largest memory in MB."""

    rate: float
    mb: float


def make_pictures(folder: Path, count: int) -> None:
    """Pieces of two real photographs as JPEGs, each another one."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    folder.mkdir()
    for index in range(count):
        photo = photos[index % 2]
        left, top = (int(rng.integers(0, side // 2)) for side in photo.size)
        piece = photo.crop((left, top, left + photo.width // 2, top + photo.height // 2))
        piece.resize(SIDES, Image.Resampling.BICUBIC).save(folder / f"{index:05d}.jpg", quality=90)


def make_release(folder: Path) -> Path:
    """A base release of the built-in photo model."""
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    for arguments in (("train", folder / "recipe.toml", "--out", folder / "run"), ("export", folder / "run")):
        command = [sys.executable, "-m", "r1export", *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True)
    return folder / "run/releases/00-base"


def measure(code: Path, *arguments: object) -> Measured:
    done = subprocess.run([sys.executable, str(code), *map(str, arguments)], check=True, capture_output=True, text=True)
    found: Measured = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--release", type=Path)
    parser.add_argument("--write", action="store_true", help="write what was found into docs/search.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        release = asked.release or make_release(work)
        make_pictures(work / "photos", asked.pictures)
        for file, code in (("loop.py", LOOP), ("ours.py", OURS)):
            (work / file).write_text(code, encoding="utf-8")
        rounds = []
        for number in range(asked.rounds):
            jobs = {
                "loop": lambda: measure(work / "loop.py", release, work / "photos"),
                "reindex": lambda: measure(work / "ours.py", release, work / "photos", work / "vectors.npy"),
            }
            order = list(jobs) if number % 2 else list(reversed(jobs))
            rounds.append({kind: jobs[kind]() for kind in order})
            print({kind: round(found["rate"], 1) for kind, found in rounds[-1].items()}, flush=True)
    ratios = [found["reindex"]["rate"] / found["loop"]["rate"] for found in rounds]
    rates = {kind: statistics.median(found[kind]["rate"] for found in rounds) for kind in ("loop", "reindex")}
    memory = {kind: max(found[kind]["mb"] for found in rounds) for kind in ("loop", "reindex")}
    text = (
        f"\n| {asked.pictures} JPEGs of {SIDES[0]} x {SIDES[1]}, {len(os.sched_getaffinity(0))} cores, {platform.machine()} "
        "| pictures/s (median) | largest memory |\n|---|---|---|\n"
        f"| plain onnxruntime loop | {rates['loop']:.1f} | {memory['loop']:.0f} MB |\n"
        f"| `r1export reindex` | {rates['reindex']:.1f} | {memory['reindex']:.0f} MB, of all processes |\n\n"
        f"Ratio of paired rounds: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f} in {asked.rounds} rounds.\n"
    )
    print(text)
    if asked.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
