"""Coverage-guided fuzzing of the parsers of updates, in bounded memory.

    python scripts/fuzz_bundle.py --seconds 60 [--seed 0]

Starts from the vectors in tests/bundles, mutates bytes and JSON values, and keeps inputs that reach new branches of the
parsers. Any exception but an R1ExportError, a parse of more than 5 seconds or memory beyond the limit ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from r1export.errors import R1ExportError
from r1export.update import bundle, container, envelope, manifest, strict_json
from r1export.update.bundle import Bundle, split
from r1export.update.manifest import Manifest

MEMORY = 2 << 30  # bytes of address space
VECTORS = Path(__file__).parents[1] / "tests" / "bundles"
WATCHED = {module.__file__ for module in (bundle, container, envelope, manifest, strict_json)}
ODD: tuple[object, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**32,
    2**53,
    2**63,
    10**30,
    0.0,
    1.5,
    -0.0,
    1e308,
    "",
    "a",
    "..",
    "a/../../x",
    "\0",
    "\ud800",
    "é" * 300,
    [],
    {},
    [[]],
    [0] * 5000,
)
TRACED = 10  # one call of so many is traced: tracing costs ten times the call
SLOW = 5.0  # seconds; a parse of the largest manifest takes less than one


def read(data: bytes) -> None:
    """Everything that is done with bytes of unknown origin, as if their signature were right."""
    head, text, payload = split(data)
    envelope.describe(head)
    found = Manifest.parse(text)
    bundle._check_payload(found, payload)
    Bundle(head, text, payload, found, ()).carried  # noqa: B018


def parse_text(data: bytes) -> None:
    """The manifest alone."""
    found = Manifest.parse(data)
    assert Manifest.parse(found.to_bytes()) == found


class Coverage:
    """Which lines of the watched modules a call reaches, in which order of pairs."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int, int]] = set()
        self.new = False
        self._last = 0

    def run(self, function: Callable[[bytes], None], data: bytes, traced: bool) -> bool:
        """Call `function`; whether it reached a pair of lines that no traced call before did."""
        self.new = False
        sys.settrace(self._enter if traced else None)
        try:
            function(data)
        except R1ExportError:
            pass
        finally:
            sys.settrace(None)
        return self.new

    def _enter(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename in WATCHED else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        step = (frame.f_code.co_filename, self._last, frame.f_lineno)
        self._last = frame.f_lineno
        if step not in self.seen:
            self.seen.add(step)
            self.new = True
        return self._line


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four changes: flips, copies, cuts, repeats and telling integers."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0 if changed:
                changed[min(at, len(changed) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at : at + rng.choice((1, 4, 64, 1000))]
            case 2:
                changed[at:at] = changed[at : at + rng.choice((1, 8, 500))]
            case 3:
                changed[at : at + 4] = rng.choice((0, 1, 2**16, 2**20, 2**31, 2**32 - 1)).to_bytes(4, "little")
            case _:
                changed[at:at] = rng.choice(
                    (b"{", b"[", b'"', b"\\", b"1e999", b"NaN", b"\xff", b',"seq":1', b"9" * 400)
                )
    return bytes(changed)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Another value, name or length somewhere in the document."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, data)
    node: Any = document
    parent: Any = None
    key: Any = None
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.8):
        parent, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = node[key]
    if parent is None:
        return mutate_bytes(rng, data)
    match rng.randrange(4):
        case 0:
            del parent[key]
        case 1 if isinstance(node, int) and not isinstance(node, bool):
            parent[key] = node + rng.choice((-8, -1, 1, 8, 2**32))
        case 2 if isinstance(parent, list):
            parent.insert(key, node)
        case _:
            parent[key] = rng.choice(ODD)
    return json.dumps(document, separators=(",", ":")).encode()


def step(rng: random.Random, data: bytes) -> tuple[Callable[[bytes], None], bytes]:
    """A function to call and what to call it with."""
    if data.startswith(bundle.MAGIC) and rng.random() < 0.5:
        try:
            head, text, payload = split(data)
        except R1ExportError:
            return read, mutate_bytes(rng, data)
        return read, bundle.assemble(head, mutate_json(rng, text), payload)
    if data.startswith(bundle.MAGIC):
        return read, mutate_bytes(rng, data)
    return parse_text, (mutate_json if rng.random() < 0.8 else mutate_bytes)(rng, data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    rng, coverage = random.Random(options.seed), Coverage()
    corpus = [path.read_bytes() for path in sorted(VECTORS.rglob("*.r1u"))]
    corpus += [split(path.read_bytes())[1] for path in sorted(VECTORS.glob("*/[0-9]*.r1u"))]
    executions, end = 0, time.monotonic() + options.seconds
    while time.monotonic() < end:
        function, data = step(rng, rng.choice(corpus))
        start = time.monotonic()
        try:
            new = coverage.run(function, data, traced=executions % TRACED == 0)
        except BaseException as error:
            Path("fuzz_failure.bin").write_bytes(data)
            print(f"{function.__name__}: {type(error).__name__}: {error}; the input is in fuzz_failure.bin")
            return 1
        if time.monotonic() - start > SLOW:
            print(f"{function.__name__}: more than {SLOW} s")
            return 1
        executions += 1
        if new:
            corpus.append(data)
    print(
        f"{executions} executions, {len(corpus)} inputs kept, {len(coverage.seen)} pairs of lines reached, 0 failures"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
