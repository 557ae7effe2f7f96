"""How every command begins and ends: its terminal, its signals, and exit codes for whatever it meets.

Exit codes: 0 passed, 1 a check failed, 2 bad usage or bad input, 3 this environment cannot do it, 4 inconclusive, 70 an
internal error; 128 + N for a command that signal N ended, as shells count it.
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
    """A signal asked the command to end: whatever ends on Ctrl-C ends on the others too."""

    def __init__(self, number: int) -> None:
        self.number = signal.Signals(number)


class Commands(TyperGroup):
    """The commands; wrong usage is one line and, with --json, one document, as every other error."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run the command that `args` name and exit with its code."""
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
    """The terminal; what r1export or the operating system refuses becomes one line and an exit code."""
    shown = _terminal(as_json)
    try:
        with _ended_by_signals():
            yield shown
    except BrokenPipeError:  # a reader that stopped early: r1export ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise typer.Exit(128 + 13) from None  # SIGPIPE
    except KeyboardInterrupt as ended:
        number = ended.number if isinstance(ended, Ended) else signal.SIGINT
        shown.error(R1ExportError(f"interrupted by {number.name}", "a run goes on with --resume"), 128 + number)
        raise typer.Exit(128 + number) from None
    except Exception as error:
        expected = _expected(error)
        if expected is None:
            raise
        shown.error(expected, expected.exit_code)
        raise typer.Exit(expected.exit_code) from None


def _expected(error: Exception) -> R1ExportError | None:
    """The error to print in one line; None for a defect of r1export."""
    if is_out_of_memory(error):
        return Unsupported("out of memory", "close other programs, or use smaller batches (train.batch_size)")
    if isinstance(error, R1ExportError):
        return error
    return refused(error) if isinstance(error, OSError) else None


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within it SIGINT, SIGTERM and SIGHUP raise `Ended`, so that what is half written is removed; those that are ignored stay so."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        raise Ended(number)

    previous = {}
    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, end)
    except ValueError:  # not in the main thread: whoever runs r1export there takes care of signals
        pass
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_command(commands: typer.Typer) -> NoReturn:
    """The entry point of a process. A defect of r1export ends with code 70 and a traceback, apart from checks that fail (code 1)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None where it was closed
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone
    try:
        commands()
    except Exception:
        traceback.print_exc()
        sys.stderr.write("This is an internal error of r1export: please report it.\n")
        sys.exit(INTERNAL_ERROR)
    sys.exit(0)
