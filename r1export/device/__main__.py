"""The device's command line: `python r1device.pyz apply STORE update.r1u`, with numpy and nothing else installed.

Exit codes: 0 passed, 1 a check failed, 2 bad usage or bad input, 3 this environment cannot do it, 4 inconclusive.
70: a defect of the kit itself; with R1EXPORT_TRACEBACK=1 it says where.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, TextIO, Tuple

from r1export.device import doctor, install, provision
from r1export.device.policy import MAX_SEQ_JUMP
from r1export.device.state import MODES
from r1export.errors import R1ExportError, Unsupported, refused
from r1export.update import bundle
from r1export.update.plain_text import printable

Answer = Mapping[str, Any]  # one JSON document
Verb = Callable[[argparse.Namespace], Tuple[int, Answer]]
DEFECT = 70  # EX_SOFTWARE


def main(arguments: list[str] | None = None, program: str = "r1device") -> int:
    """Run one verb and return the exit code; an error is one line on standard error, or JSON with --json."""
    options = _parser(program).parse_args(arguments)
    verb: Verb = options.verb
    try:
        code, answer = verb(options)
    except R1ExportError as error:
        return _fail(options, error.exit_code, error.message, error.remedy)
    except OSError as error:
        return _fail(options, refused(error).exit_code, refused(error).message, refused(error).remedy)
    except MemoryError:
        return _fail(options, Unsupported.exit_code, "out of memory", "free memory, or use a smaller base")
    except Exception as error:
        if os.environ.get("R1EXPORT_TRACEBACK"):
            traceback.print_exc()
        message = f"internal error: {type(error).__name__}: {error}"
        return _fail(options, DEFECT, message, "please report it, with the output under R1EXPORT_TRACEBACK=1")
    _print([json.dumps(answer)] if options.json else _lines(answer), sys.stdout)
    return code


def _fail(options: argparse.Namespace, code: int, message: str, remedy: str) -> int:
    if options.json:
        document = {"error": {"message": message, "remedy": remedy}, "exit_code": code}
        _print([json.dumps(document)], sys.stdout)
    else:
        _print([f"error: {message} ({remedy})" if remedy else f"error: {message}"], sys.stderr)
    return code


def _print(lines: Iterable[str], stream: TextIO) -> None:
    """The one way from the kit to a terminal. Much of what it says was written by others, so each line is made plain."""
    encoding = stream.encoding or "ascii"
    try:
        for line in lines:
            print(printable(line).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:  # whoever reads has seen enough; what is left must not fail once more when Python ends
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
    parser = argparse.ArgumentParser(
        prog=program, description="Field updates for CLIP models: signed, bit-exact, crash-safe."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function: Any, text: str, subject: str = "store") -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=text, description=text)
        command.add_argument(subject, type=Path, metavar=subject.upper())
        command.add_argument("--json", action="store_true", help="print one JSON document")
        command.set_defaults(verb=function)
        return command

    command = verb("init", _init, "make a store from a base release")
    _add_init_options(command)
    command = verb("apply", _apply, "install an update and make it current; repair the current version")
    command.add_argument("update", type=Path, metavar="UPDATE")
    command.add_argument("--retry", action="store_true", help="forget that this update failed before")
    command.add_argument("--wait", type=float, default=install.WAIT, help="seconds to wait for another updater")
    command = verb("rollback", _rollback, "make an older version current again")
    command.add_argument("--to", type=int, help="its sequence number; 0 is the base")
    command.add_argument("--wait", type=float, default=install.WAIT, help="seconds to wait for another updater")
    verb("status", _status, "show which version is current and which ones are kept")
    verb("doctor", _doctor, "look for damage, and show what repairs it")
    verb("inspect", _inspect, "describe an update, or a store as status does", subject="path")
    return parser


def _add_init_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", type=Path, required=True, help="the folder of the base release, 00-base")
    command.add_argument(
        "--trust", type=Path, action="append", required=True, help="a public key; give it once for each key"
    )
    command.add_argument("--threshold", type=int, default=1, help="how many of these keys have to sign an update")
    command.add_argument("--product", default="default", help="updates for another product are refused")
    command.add_argument("--device-class", default="default", help="updates for another class are refused")
    command.add_argument(
        "--mode",
        choices=MODES,
        default="slot",
        help="slot: files are rebuilt; overlay: kilobytes are kept, tensors rebuilt at load",
    )
    command.add_argument(
        "--health", default="onnxruntime", help="onnxruntime, none, or a command that gets the new version's folder"
    )
    command.add_argument(
        "--layout",
        type=Path,
        action="append",
        default=[],
        help="a folder that `r1export layout` made of the base: it will follow the current version; repeatable",
    )
    command.add_argument("--keep", type=int, default=2, help="how many versions to keep besides the base")
    command.add_argument(
        "--base-sha256", default="", metavar="SHA256", help="the digest that the base's manifest.json has to have"
    )
    command.add_argument(
        "--max-seq-jump",
        type=int,
        default=MAX_SEQ_JUMP,
        help="how far above the newest version an update's number may lie",
    )
    command.add_argument("--min-seq", type=int, default=0, help="the lowest version that may ever run, for a new start")


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
