"""Plant faults in a small run, update all digests, and verify: which faults are detected?

    python scripts/planted_faults.py                     # all of them, some minutes on two cores
    python scripts/planted_faults.py --only "golden" --json faults.json
    python scripts/planted_faults.py --write             # and put the table into docs/report.md

Each fault is tried on the last release alone, on the same next to its base, and on the whole run, without timing. Exit code 1
if one passes where it has to be found, or if verify crashes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from faults import gates, missing, unread
from faults.planting import ALONE, BESIDE, ELSEWHERE, MODES, RUN, Site

from r1export.errors import R1ExportError
from r1export.pipeline.context import NoProgress, RunContext
from r1export.pipeline.export import export_releases
from r1export.pipeline.train import train_tasks
from r1export.pipeline.verification.release import verify_release
from r1export.pipeline.verification.run import verify_run
from r1export.recipe_file import load_recipe
from r1export.run_folder import RunFolder, open_run
from r1export.verify.results import Report

ROOT = Path(__file__).parents[1]
PAGE, START, END = "docs/report.md", "<!-- made by scripts/planted_faults.py -->", "<!-- end of what it made -->"
FAULTS = (*missing.FAULTS, *gates.FAULTS, *unread.FAULTS)
PASS, CRASH, REFUSED = "pass", "crash", "refused"


@dataclass(frozen=True)
class Outcome:
    """What verify said of one fault in one mode: its verdict, or that it refused the input or crashed, and why."""

    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Tried:
    """One fault and what was said of it, by mode."""

    kind: str
    name: str
    outcomes: dict[str, Outcome]
    unknowable: dict[str, str]

    def wrong(self, mode: str) -> bool:
        """It passed where it has to be found, or broke verify."""
        verdict = self.outcomes[mode].verdict
        return verdict == CRASH or (verdict == PASS and mode not in self.unknowable)


def main() -> int:
    asked = _arguments()
    chosen = [fault for fault in FAULTS if not asked.only or asked.only in f"{fault.kind} {fault.name}"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        whole = asked.run or make_run(Path(folder) / "made")
        with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:
            tried = list(_shown(pool.map(partial(try_fault, whole, Path(folder)), [f.name for f in chosen])))
    seconds = time.monotonic() - started
    wrong = sum(one.wrong(mode) for one in tried for mode in MODES)
    print(f"{len(tried)} faults, {wrong} wrong, {seconds:.0f} s")
    if asked.json:
        tried = _with_earlier(asked.json, tried)
        asked.json.write_text(json.dumps([asdict(one) for one in tried], indent=2) + "\n", encoding="utf-8")
    if asked.write:
        _put(ROOT / PAGE, page(tried))
    return 1 if wrong else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose kind and name contain this text")
    parser.add_argument("--jobs", type=int, default=2, help="processes; default 2")
    parser.add_argument("--run", type=Path, help="a run to copy instead of making one: of digits and arrows, verified")
    parser.add_argument("--json", type=Path, help="write what was found here; what it holds of other faults is kept")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE}")
    return parser.parse_args()


RECIPE = """
[base]
model = "builtin:world"
[[tasks]]
name = "digits"
source = "builtin:digits"
[[tasks]]
name = "arrows"
source = "builtin:arrows"
[data]
shots = 4
test_limit = 60
[train]
iterations = 6
learning_rate = 5e-3
[pool]
alpha = 12.0
[verify]
samples = 8
images = 12
"""


def make_run(folder: Path) -> Path:
    """A run of two tasks in `folder`, trained for a few steps, exported, and found to pass."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE)
    recipe = load_recipe(folder / "recipe.toml")
    context = RunContext(open_run(folder / "run", recipe, resume=False, overwrite=False), recipe, "cpu", NoProgress())
    train_tasks(context)
    export_releases(context)
    report = verify_run(context, budget=None)
    if report.verdict != PASS:
        raise SystemExit(f"the run without faults does not pass: {report.reasons}")
    return folder / "run"


def try_fault(whole: Path, folder: Path, name: str) -> Tried:
    """Plant one fault in a copy of the run `whole` and verify it in every mode; each process has a copy of its own."""
    fault = next(fault for fault in FAULTS if fault.name == name)
    work = folder / str(os.getpid())
    shutil.rmtree(work, ignore_errors=True)
    site = Site(Path(shutil.copytree(whole, work / "run")))
    lone = work / "alone" / site.release.name
    release = site.release
    fault.put(site)
    release = release if release.exists() else site.releases[-1]
    shutil.copytree(release, lone, symlinks=True)
    steps: dict[str, Callable[[], Report]] = {
        ALONE: lambda: verify_release(lone, budget=None),
        BESIDE: lambda: verify_release(release, budget=None),
        RUN: lambda: verify_run(_context(site.run), budget=None),
    }
    outcomes = {mode: _outcome(step) for mode, step in steps.items() if fault.unknowable.get(mode) != ELSEWHERE}
    outcomes |= {mode: Outcome("-") for mode in MODES if mode not in outcomes}
    return Tried(fault.kind, fault.name, outcomes, dict(fault.unknowable))


def _outcome(verify: Callable[[], Report]) -> Outcome:
    try:
        report = verify()
    except R1ExportError as error:
        return Outcome(REFUSED, str(error))
    except Exception:  # what would end the command line with exit code 70
        return Outcome(CRASH, traceback.format_exc())
    return Outcome(str(report.verdict), "; ".join(report.reasons[:3]))


_contexts: list[RunContext] = []


def _context(run: Path) -> RunContext:
    """The run as verify sees it; model and images are read once in a process as long as the recipe is the same."""
    recipe = RunFolder(run).recipe()
    known = next((context for context in _contexts if context.recipe == recipe), None)
    if known is None:
        known = RunContext(RunFolder(run), recipe, "cpu", NoProgress())
        _contexts.append(known)
    return known


def _shown(tried: Iterable[Tried]) -> Iterator[Tried]:
    for one in tried:
        wrong = [mode for mode in MODES if one.wrong(mode)]
        cells = "  ".join(f"{one.outcomes[mode].verdict:12}" for mode in MODES)
        print(f"{one.kind}  {one.name:62} {cells} {'WRONG: ' + ', '.join(wrong) if wrong else ''}", flush=True)
        yield one


def _with_earlier(path: Path, tried: Sequence[Tried]) -> list[Tried]:
    """What was tried now, and what the file holds of other faults, in the order in which they are listed."""
    earlier = json.loads(path.read_text("utf-8")) if path.exists() else []
    known = {
        one["name"]: Tried(
            one["kind"], one["name"], {m: Outcome(**o) for m, o in one["outcomes"].items()}, one["unknowable"]
        )
        for one in earlier
    }
    known |= {one.name: one for one in tried}
    return [known[fault.name] for fault in FAULTS if fault.name in known]


def page(tried: Sequence[Tried]) -> str:
    """The section of docs/report.md."""
    rows = "\n".join(f"| {one.kind} | {one.name.replace('|', '')} | " + " | ".join(_cell(one, m) for m in MODES) + " |" for one in tried)  # fmt: skip
    reasons: dict[str, list[str]] = {}
    for one in tried:
        for mode, reason in one.unknowable.items():
            if one.outcomes[mode].verdict == PASS:
                reasons.setdefault(reason, []).append(one.name)
    unknown = "\n".join(f"- {reason}: {', '.join(dict.fromkeys(names))}" for reason, names in reasons.items())
    wrong = sum(one.wrong(mode) for one in tried for mode in MODES)
    return PAGE_TEXT.format(count=len(tried), wrong=wrong, modes=" | ".join(MODES), rows=rows, unknown=unknown)


PAGE_TEXT = """
This section is generated: `python scripts/planted_faults.py --write`. The script plants {count} faults in a small run of two tasks, one
at a time, updates every digest, and verifies the last release alone, the same next to its base, and the whole run.
Faults that pass although they could be detected: {wrong}.

- K1: a set is missing, empty or sampled.
- K2: a limit is read from the release under test, or from a base release that was not checked.
- K3: bytes that affect a client's answer, or that people read.

What `verify RELEASE` cannot detect, and why; `verify RUN` detects all of it:

{unknown}

| kind | fault | {modes} |
|---|---|---|---|---|
{rows}

`fail` and `inconclusive` are verdicts (exit codes 1 and 4), `refused` is an input error (exit code 2), `-` means that the fault is not in
that folder.
"""


def _cell(one: Tried, mode: str) -> str:
    verdict = one.outcomes[mode].verdict
    return "cannot be known" if verdict == PASS and mode in one.unknowable else verdict


def _put(path: Path, text: str) -> None:
    """Replace what stands between the marks, which are added at the end of a page without them."""
    old = path.read_text(encoding="utf-8")
    if START not in old:
        old = f"{old}\n## What verify finds\n\n{START}\n{END}\n"
    head, rest = old.split(START)
    path.write_text(f"{head}{START}\n{text.strip()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
