"""The same CLIP and the same LoRA through Optimum, Olive, PEFT with torch.onnx, ONNX Runtime multi-LoRA and r1export.

    python benchmarks/against_peers.py --envs FOLDER --json peers.json --write      # ViT-B/32, about 20 minutes
    python benchmarks/against_peers.py --envs FOLDER --quick                        # a tiny CLIP: does it still work?

Weights are random: no model hub is asked. Peers live in environments of their own, made in FOLDER and used again; each
runs in a process of its own, and one that fails becomes a row that says how. Image towers are timed together at the end,
interleaved in one process, so the machine should be quiet. `--write` puts the tables into README.md and docs/peers.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TypedDict

from peers import table
from peers.contender import ROOT, environment
from peers.environments import USED_BY, python_for
from peers.row import Failed, Row, Rows, Timings
from peers.workload import Facts

Places = list[tuple[str, str]]  # (a folder of this machine, what is written for it)


class HowTimed(TypedDict, total=False):
    """With what image towers were timed, or how that failed."""

    failed: str
    blocks: str
    rounds: int
    threads: str
    clock: str
    load: float


class Machine(TypedDict):
    cores: int | None
    machine: str
    python: str


class Comparison(TypedDict):
    """All rows, with their timing, and what they were made with: the document of --json."""

    rows: Rows
    model: str
    facts: Facts
    timing: HowTimed
    machine: Machine
    seconds: float


PAGES = {"README.md": False, "docs/peers.md": True}  # page -> with the details


def main() -> None:
    asked = _arguments()
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        work = Path(asked.work or folder).resolve()
        work.mkdir(parents=True, exist_ok=True)
        found = compare(asked, work)
    print(made_from(found, details=True))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for page, details in PAGES.items() if asked.write else ():
        path = ROOT / page
        path.write_text(table.placed(path.read_text(encoding="utf-8"), made_from(found, details)), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "r1export-peers"
    parser.add_argument(
        "--envs", type=Path, default=default, help="environments of the peers, made if they are not there"
    )
    parser.add_argument("--work", type=Path, help="keep models and graphs here; by default they are deleted")
    parser.add_argument("--quick", action="store_true", help="a tiny CLIP")
    parser.add_argument("--only", nargs="+", choices=USED_BY, default=list(USED_BY), help="some of the contenders")
    parser.add_argument("--timeout", type=int, default=900, help="seconds that a contender may take")
    parser.add_argument("--blocks", type=int, default=16, help="number of blocks, each with new sessions")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per block; each runs every graph twice")
    parser.add_argument("--threads", type=int, default=0, help="threads of a session, 0 for all cores")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: time of the timing process alone"
    )
    parser.add_argument("--json", type=Path, help="write everything as JSON")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md and docs/peers.md")
    return parser.parse_args()


def compare(asked: argparse.Namespace, work: Path) -> Comparison:
    """Make the models, let every contender build, then time what they built."""
    started, size, envs = time.perf_counter(), "quick" if asked.quick else "ViT-B-32", asked.envs.resolve()
    hide = [(str(work), "WORK"), (str(envs), "ENVS"), (str(ROOT), "."), (sys.prefix, "ENV"), (str(Path.home()), "~")]
    maker = python_for("optimum", envs)  # the oldest transformers: what it writes, all can read
    if problem := _process([str(maker), "-m", "peers.workload", size, str(work)], asked.timeout):
        sys.exit(f"the models could not be made: {table.hidden(problem, hide)}")
    rows: Rows = {}
    for name in asked.only:
        say(f"{name} ...")
        rows[name] = _row(name, work, envs, asked.timeout, hide)
        say(f"{name}: {rows[name].get('failed', 'done')}, {time.perf_counter() - started:.0f} s so far")
    say("timing ...")
    timing = _timed(asked, work, rows, hide)
    return {
        "rows": rows, "model": size, "facts": json.loads((work / "facts.json").read_text(encoding="utf-8")), "timing": timing,
        "machine": {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()},
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def _timed(asked: argparse.Namespace, work: Path, rows: Rows, hide: Places) -> HowTimed:
    """Time what the contenders built, and give each row its times."""
    settings = {key: str(getattr(asked, key)) for key in ("blocks", "rounds", "threads", "clock")}
    options = [part for key, value in settings.items() for part in (f"--{key}", value)]
    built = [name for name, row in rows.items() if "failed" not in row]
    if not built:
        return {"failed": "no contender was built"}
    command = [sys.executable, "-m", "peers.timing", str(work), "--only", *built, *options]
    if problem := _process(command, asked.timeout):
        return {"failed": table.hidden(problem, hide)}
    found: Timings = json.loads((work / "timing.json").read_text(encoding="utf-8"))
    for name, timing in found["contenders"].items():
        row = rows[name]
        assert "failed" not in row  # else it has no graphs
        row["timing"] = timing
    return {
        "blocks": settings["blocks"], "rounds": found["rounds"], "threads": settings["threads"], "clock": settings["clock"],
        "load": found["load"],
    }  # fmt: skip


def _row(name: str, work: Path, envs: Path, timeout: int, hide: Places) -> Row | Failed:
    """The row of one contender, or how it failed."""
    path = work / "rows" / f"{name}.json"
    path.unlink(missing_ok=True)
    try:
        problem = _process([str(python_for(name, envs)), "-m", f"peers.with_{name}", str(work)], timeout)
    except subprocess.CalledProcessError as error:
        problem = f"its environment could not be made: pip ended with exit code {error.returncode}"
    if problem:
        return {"failed": table.hidden(problem, hide)}
    row: Row = json.loads(table.hidden(path.read_text(encoding="utf-8"), hide))
    return row


def _process(command: list[str], timeout: int) -> str:
    """Run it; empty if all went well, else the last line that it wrote."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return f"took longer than {timeout} s"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return "" if not done.returncode else (lines or [f"exit code {done.returncode}"])[-1][:300]


def made_from(found: Comparison, details: bool) -> str:
    """What goes between the markers."""
    rows, machine, timing = found["rows"], found["machine"], found["timing"]
    if not details:
        return table.brief(rows)
    text = "\n" + table.table(rows) + "\n"
    text += "".join(f"- {sentence}\n" for sentence in table.shortfalls(rows))
    how = f"{machine['cores']} {machine['machine']} cores, {timing.get('rounds', 'no')} rounds of each pair, clock: {timing.get('clock')}"
    text += f"\n{found['model']}; {found['facts']['adapter_values']:,} values in the adapter, which moves embeddings by up to "
    text += f"{found['facts']['moved_by_adapter']:.2g}; {how}; all of it in {found['seconds'] / 60:.0f} minutes.\n\n"
    return text + table.versions_line(rows) + "\n### Planted faults\n\n" + table.faults_table(rows) + "\n"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
