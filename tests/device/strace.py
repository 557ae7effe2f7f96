"""An update under strace: what it asks of the operating system, and what happens when one of these calls goes wrong."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

DRIVER = f"""
import sys
from pathlib import Path
sys.path.append({str(Path(__file__).parents[1])!r})
from device.steps import in_this_process
from r1export.device import install
from r1export.errors import R1ExportError
try:
    install.apply(Path(sys.argv[1]), Path(sys.argv[2]), now=1_800_000_000, run=in_this_process)
except R1ExportError as error:
    print(error)
    sys.exit(error.exit_code)
"""
MUTATING = ("openat", "write", "fsync", "rename", "mkdir", "symlink", "unlink", "unlinkat", "rmdir", "chmod")
OTHERS = (
    "writev",
    "pwrite64",
    "fdatasync",
    "renameat",
    "renameat2",
    "mkdirat",
    "symlinkat",
    "link",
    "linkat",
    "fchmod",
    "fchmodat",
    "ftruncate",
    "truncate",
)
_LINE = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+|\?)(?:<((?:\\x[0-9a-f]{2})*)>)?.*")


@dataclass(frozen=True)
class Call:
    """One successful mutating call: its name, its number among the calls of that name, decoded arguments, the file behind its descriptor."""

    name: str
    number: int
    strings: tuple[bytes, ...]
    path: str
    flags: str


def available() -> bool:
    """Whether strace is installed and may trace."""
    if not shutil.which("strace"):
        return False
    return subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode == 0


def command(store: Path, bundle: Path) -> list[str]:
    return [sys.executable, "-B", "-W", "ignore", "-c", DRIVER, str(store), str(bundle)]


def environment() -> dict[str, str]:
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def record(store: Path, bundle: Path, log: Path, fault: tuple[str, ...] = (), code: int = 0) -> list[Call]:
    """Apply `bundle`, which ends with `code`, and list every call that changed the store, in order. `fault` is from `fail`."""
    return trace(command(store, bundle), store, log, fault, code)


def trace(line: list[str], store: Path, log: Path, fault: tuple[str, ...] = (), code: int = 0) -> list[Call]:
    """The same of any command."""
    names = ",".join(MUTATING + OTHERS)
    options = ["-f", "-y", "-xx", "-s", "1000000", "-e", f"trace={names}", *fault, "-o", str(log)]
    process = subprocess.run(["strace", *options, *line], capture_output=True, env=environment())
    assert process.returncode == code, process.stderr.decode()
    return list(parse(log.read_text(), str(store)))


def fail(call: Call, fault: str) -> tuple[str, ...]:
    """Options of strace with which the call fails: `fault` is signal=SIGKILL, error=ENOSPC or error=EIO."""
    return ("-e", f"inject={call.name}:{fault}:when={call.number}")


def parse(text: str, store: str):
    counts: dict[str, int] = {}
    for line in text.splitlines():
        match = _LINE.match(line.partition(" ")[2].strip())
        if not match:
            continue
        name, arguments, result, opened = match.groups()
        counts[name] = counts.get(name, 0) + 1
        strings = tuple(_unhex(item) for item in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', arguments))
        descriptor = re.match(r"\d+<((?:\\x[0-9a-f]{2})*)>", arguments)
        path = _unhex(opened).decode() if opened else _unhex(descriptor[1]).decode() if descriptor else ""
        named = name != "write" and any(store in string.decode(errors="replace") for string in strings)
        inside = named or path.startswith(store)
        changes = name != "openat" or "O_CREAT" in arguments
        if inside and changes and result not in ("-1", "?"):
            yield Call(name, counts[name], strings, path, arguments)


def _unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def inject(store: Path, bundle: Path, call: Call, fault: str) -> int:
    """Apply `bundle` while the call fails as in `fail`. Returns the exit code."""
    options = ["-f", "-o", "/dev/null", "-e", f"trace={call.name}", *fail(call, fault)]
    return subprocess.run(
        ["strace", *options, *command(store, bundle)], capture_output=True, env=environment()
    ).returncode
