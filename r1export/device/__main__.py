"""The device's command line: `python r1device.pyz apply STORE update.r1u`, with numpy and nothing else installed.

Exit codes: 0 passed, 1 a check failed, 2 bad usage or bad input, 3 not supported by this environment, 4 inconclusive,
70 internal error (set R1EXPORT_TRACEBACK=1 for a traceback).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, NoReturn, TextIO, Tuple

from r1export.device import doctor, install, provision
from r1export.device.policy import MAX_SEQ_JUMP
from r1export.device.state import MODES
from r1export.errors import InputError, R1ExportError, Unsupported, is_out_of_memory, refused
from r1export.update import bundle
from r1export.update.plain_text import ERROR, one_line, printable

Answer = Mapping[str, Any]  # one JSON document
Verb = Callable[[argparse.Namespace], Tuple[int, Answer]]
DEFECT = 70  # EX_SOFTWARE of sysexits.h


class Parser(argparse.ArgumentParser):
    """Reports wrong usage like every other error."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        raise InputError(message, f"see {self.prog} --help")


def main(arguments: list[str] | None = None, program: str = "r1device") -> int:
    """Run one verb and return the exit code; an error is one line on standard error, or JSON with --json."""
    given = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in given
    try:
        options = _parser(program).parse_args(given)
        verb: Verb = options.verb
        code, answer = verb(options)
    except Exception as error:
        return _fail(error, as_json)
    _print([json.dumps(answer)] if as_json else _lines(answer), sys.stdout)
    return code


def _fail(error: Exception, as_json: bool) -> int:
    """Print an error as `r1export` does: one line to stderr, and one JSON document with --json. Returns the exit code."""
    known = _known(error)
    if known is None and os.environ.get("R1EXPORT_TRACEBACK"):
        traceback.print_exc()
    shown = known or _internal(error)
    code = known.exit_code if known else DEFECT
    _print([one_line(str(shown))], sys.stderr, _emphasized(ERROR, sys.stderr))
    if as_json:
        document = {"error": {"message": shown.message, "remedy": shown.remedy}, "exit_code": code}
        _print([json.dumps(document)], sys.stdout)
    return code


def _known(error: Exception) -> R1ExportError | None:
    """The error to print; None for an internal one."""
    if is_out_of_memory(error):
        return Unsupported("out of memory", "free memory or use a smaller base model")
    if isinstance(error, R1ExportError):
        return error
    return refused(error) if isinstance(error, OSError) else None


def _internal(error: Exception) -> R1ExportError:
    message = f"internal error: {type(error).__name__}: {error}"
    return R1ExportError(message, "please report it with the output of R1EXPORT_TRACEBACK=1")


def _emphasized(text: str, stream: TextIO) -> str:
    """Bold red by the rules of rich, which prints for `r1export`: on a terminal that is not dumb, bold only with NO_COLOR."""
    if not stream.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        return text
    return f"\x1b[{'1' if os.environ.get('NO_COLOR') else '1;31'}m{text}\x1b[0m"


def _print(lines: Iterable[str], stream: TextIO, prefix: str = "") -> None:
    """Print lines to a terminal. Names can come from untrusted files, so control characters are escaped."""
    encoding = stream.encoding or "ascii"
    try:
        for line in lines:
            plain = printable(line).encode(encoding, "backslashreplace").decode(encoding)
            print(prefix + plain, file=stream, flush=True)
    except BrokenPipeError:  # the reader closed the pipe; Python must not fail again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _init(options: argparse.Namespace) -> tuple[int, Answer]:
    store = provision.init(
        options.store,
        options.base,
        options.trust,
        product=options.product,
        device_class=options.device_class,
        mode=options.mode,
        health=options.health,
        threshold=options.threshold,
        keep=options.keep,
        max_seq_jump=options.max_seq_jump,
        min_seq=options.min_seq,
        base_sha256=options.base_sha256,
        layout=options.layout,
    )
    return 0, asdict(doctor.status(store.path))


def _apply(options: argparse.Namespace) -> tuple[int, Answer]:
    return 0, asdict(install.apply(options.store, options.update, retry=options.retry, wait=options.wait))


def _rollback(options: argparse.Namespace) -> tuple[int, Answer]:
    return 0, asdict(install.rollback(options.store, options.to, wait=options.wait))


def _status(options: argparse.Namespace) -> tuple[int, Answer]:
    return 0, asdict(doctor.status(options.store))


def _doctor(options: argparse.Namespace) -> tuple[int, Answer]:
    findings = doctor.doctor(options.store)
    faults = sum(bool(finding.fault) for finding in findings)
    return int(faults > 0), {"faults": faults, "findings": [asdict(finding) for finding in findings]}


def _inspect(options: argparse.Namespace) -> tuple[int, Answer]:
    path = options.path
    return 0, asdict(doctor.status(path)) if path.is_dir() else bundle.inspect(path)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = Parser(prog=program, description="Signed, bit-exact, crash-safe updates for CLIP models.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(
        name: str, function: Any, text: str, subject: str = "store", about: str = "store folder"
    ) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=text, description=text)
        command.add_argument(subject, type=Path, metavar=subject.upper(), help=about)
        command.add_argument("--json", action="store_true", help="print one JSON document to stdout")
        command.set_defaults(verb=function)
        return command

    command = verb("init", _init, "create a store from a base release")
    _add_init_options(command)
    command = verb("apply", _apply, "install an update and make it current, or repair the current version")
    command.add_argument("update", type=Path, metavar="UPDATE", help="update file (.r1u)")
    command.add_argument("--retry", action="store_true", help="retry an update that failed before")
    command.add_argument("--wait", type=float, default=install.WAIT, help="seconds to wait for a running update")
    command = verb("rollback", _rollback, "switch back to an older version")
    command.add_argument("--to", type=int, help="sequence number of the version; 0 is the base")
    command.add_argument("--wait", type=float, default=install.WAIT, help="seconds to wait for a running update")
    verb("status", _status, "show the current version and the installed ones")
    verb("doctor", _doctor, "check the store for corruption and show how to repair it")
    verb("inspect", _inspect, "describe an update or a store", "path", "update file (.r1u) or store folder")
    return parser


def _add_init_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", type=Path, required=True, help="base release folder (00-base)")
    command.add_argument("--trust", type=Path, action="append", required=True, help="trusted public key; repeatable")
    command.add_argument(
        "--threshold", type=int, default=1, help="number of trusted keys that must have signed an update"
    )
    command.add_argument("--product", default="default", help="accept only updates for this product")
    command.add_argument("--device-class", default="default", help="accept only updates for this device class")
    command.add_argument(
        "--mode",
        choices=MODES,
        default="slot",
        help="slot: store the files of each version; overlay: store only the factors and merge at load",
    )
    command.add_argument(
        "--health",
        default="onnxruntime",
        help="onnxruntime, none, or a command that is called with the folder of the new version",
    )
    command.add_argument(
        "--layout",
        type=Path,
        action="append",
        default=[],
        help="layout of the base release (from `r1export layout`), kept in sync with the current version; repeatable",
    )
    command.add_argument("--keep", type=int, default=2, help="number of versions to keep in addition to the base")
    command.add_argument(
        "--base-sha256", default="", metavar="SHA256", help="expected SHA-256 of the base's manifest.json"
    )
    command.add_argument(
        "--max-seq-jump",
        type=int,
        default=MAX_SEQ_JUMP,
        help="largest accepted increase of the sequence number",
    )
    command.add_argument(
        "--min-seq", type=int, default=0, help="lowest version that may run, for a store that replaces another"
    )


def _lines(answer: Answer) -> list[str]:
    lines = []
    for key, value in answer.items():
        if key == "findings":
            lines += [f"{_mark(item)} {item['name']}{_because(item)}" for item in value]
        else:
            lines.append(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    return lines


def _mark(item: dict[str, str]) -> str:
    return "FAIL" if item["fault"] else "-   " if item["note"] else "ok  "


def _because(item: dict[str, str]) -> str:
    if item["fault"]:
        return f": {item['fault']} ({item['remedy']})"
    return f": {item['note']}" if item["note"] else ""


if __name__ == "__main__":
    sys.exit(main())
