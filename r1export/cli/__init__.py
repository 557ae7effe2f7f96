"""The command line: one function per command, heavy imports inside the function.

Exit codes: 0 passed, 1 a check failed, 2 bad usage or bad input, 3 not supported by this environment, 4 inconclusive.
"""

from __future__ import annotations

from r1export.cli import runs, shipping  # noqa: F401  registers their commands, in the order of the help
from r1export.cli.app import app
from r1export.command import run_command

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the `r1export` command."""
    run_command(app)
