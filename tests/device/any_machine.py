"""The kit in a process of another Python, which may be an older one or one of another processor: R1PYTHON.

One process takes all command lines, since a start takes seconds on an emulated processor; each build still has a fresh one.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from r1export.device.kit import device_kit

PYTHON = shlex.split(os.environ.get("R1PYTHON", ""))
DRIVER = """
import contextlib, hashlib, io, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from r1export.device.__main__ import main
from r1export.device.version import open_version

def files(store):
    version = open_version(Path(store))
    return {path: hashlib.sha256(version.read(path)).hexdigest() for path in version.paths}

for line in sys.stdin:
    verb, *rest = json.loads(line)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = print(json.dumps(files(*rest))) or 0 if verb == "files" else main([verb, *rest, "--json"])
    print(json.dumps([code, json.loads(out.getvalue())]), flush=True)
"""


class Kit:
    """`r1device.pyz` as R1PYTHON runs it, by default the Python that runs the tests."""

    def __init__(self, folder: Path) -> None:
        command = [*(PYTHON or [sys.executable]), "-c", DRIVER, str(device_kit(folder / "r1device.pyz"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, *arguments: object) -> tuple[int, dict]:
        """Exit code and answer of one command line."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the kit ended with {self._process.wait()}"
        code, answer = json.loads(line)
        return code, answer

    def files(self, store: Path) -> dict[str, str]:
        """SHA-256 of each file of the current version; in overlay mode it has them nowhere, and derives them."""
        code, found = self("files", store)
        assert code == 0
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
