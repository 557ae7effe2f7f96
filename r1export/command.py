"""What every command shares: its terminal, signal handling, and exit codes.

Exit codes: 0 passed, 1 a check failed, 2 bad usage or bad input, 3 not supported by this environment, 4 inconclusive,
70 internal error; 128 + N if signal N ended the command, as in a shell.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperGroup

from r1export.errors import InputError, R1ExportError, Unsupported, is_out_of_memory, refused

if TYPE_CHECKING:
    from types import FrameType

    from r1export.console import Terminal

INTERNAL_ERROR = 70
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Ended(KeyboardInterrupt):
    """A signal asked the command to end. All of `SIGNALS` are handled like Ctrl-C."""

    def __init__(self, number: int) -> None:
        self.number = signal.Signals(number)


class Commands(TyperGroup):
    """The commands. A usage error is one line and, with --json, one document, like every other error."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run the command named in `args` and exit with its code."""
        arguments = list(sys.argv[1:] if args is None else args)
        try:
            sys.exit(super().main(arguments, *rest, **(extra | {"standalone_mode": False})) or 0)
        except Exception as error:
            text = getattr(error, "format_message", None)  # of usage errors, whose base class typer does not export
            if text is None:
                raise
            context = getattr(error, "ctx", None)
            remedy = f"see {context.command_path if context else 'r1export'} --help"
            usage = InputError(" ".join(text().split()).rstrip("."), remedy)
            _terminal("--json" in arguments).error(usage, usage.exit_code)
            sys.exit(usage.exit_code)


def _terminal(as_json: bool) -> Terminal:
    from r1export.console import Terminal

    return Terminal(as_json=as_json, quiet=os.environ.get("RANK", "0") != "0")  # torchrun's other processes


@contextmanager
def open_terminal(as_json: bool) -> Iterator[Terminal]:
    """The terminal. Errors of r1export or the operating system become one line and an exit code."""
    shown = _terminal(as_json)
    try:
        with _ended_by_signals():
            yield shown
    except BrokenPipeError:  # a reader that stopped early: r1export ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise typer.Exit(128 + 13) from None  # SIGPIPE
    except KeyboardInterrupt as ended:
        number = ended.number if isinstance(ended, Ended) else signal.SIGINT
        shown.error(R1ExportError(f"interrupted by {number.name}", "continue a run with --resume"), 128 + number)
        raise typer.Exit(128 + number) from None
    except Exception as error:
        expected = _expected(error)
        if expected is None:
            raise
        shown.error(expected, expected.exit_code)
        raise typer.Exit(expected.exit_code) from None


def _expected(error: Exception) -> R1ExportError | None:
    """The error to print in one line; None for an internal error."""
    if is_out_of_memory(error):
        return Unsupported("out of memory", "close other programs or lower train.batch_size")
    if isinstance(error, R1ExportError):
        return error
    return refused(error) if isinstance(error, OSError) else None


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raise `Ended` on SIGINT, SIGTERM and SIGHUP, so that partial files are removed. Ignored signals stay ignored."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        raise Ended(number)

    previous = {}
    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, end)
    except ValueError:  # only the main thread can install handlers
        pass
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_command(commands: typer.Typer) -> NoReturn:
    """The entry point of a process. An internal error exits with 70 and a traceback, which tells it from a failed check (1)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None where it was closed
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone
    try:
        commands()
    except Exception as error:
        traceback.print_exc()
        defect = R1ExportError(
            f"internal error: {type(error).__name__}: {error}", "please report it with the traceback"
        )
        _terminal("--json" in sys.argv).error(defect, INTERNAL_ERROR)
        sys.exit(INTERNAL_ERROR)
    sys.exit(0)
