"""The device's command line: `python r1device.pyz apply STORE update.r1u`, with numpy and nothing else installed.

Exit codes: 0 passed, 1 a check failed, 2 bad usage or bad input, 3 this environment cannot do it, 4 inconclusive.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r1export.device import doctor, install, provision
from r1export.device.state import MODES
from r1export.errors import R1ExportError, refused
from r1export.update import bundle

Verb = Callable[[argparse.Namespace], tuple[int, dict[str, Any]]]


def main(arguments: list[str] | None = None, program: str = "r1device") -> int:
    """Run one verb and return the exit code; an error is one line on standard error, or JSON with --json."""
    options = _parser(program).parse_args(arguments)
    verb: Verb = options.verb
    try:
        code, answer = verb(options)
    except (R1ExportError, OSError) as caught:
        error = refused(caught) if isinstance(caught, OSError) else caught
        if options.json:
            print(
                json.dumps({"error": {"message": error.message, "remedy": error.remedy}, "exit_code": error.exit_code})
            )
        else:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    with suppress(BrokenPipeError):  # whoever reads may have seen enough
        print(json.dumps(answer) if options.json else _text(answer), flush=True)
    return code


def _init(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
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
    )
    return 0, doctor.status(store.path)


def _apply(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    return 0, asdict(install.apply(options.store, options.update, retry=options.retry, wait=options.wait))


def _rollback(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    return 0, asdict(install.rollback(options.store, options.to, wait=options.wait))


def _status(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    return 0, doctor.status(options.store)


def _doctor(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    findings = doctor.doctor(options.store)
    faults = sum(bool(finding.fault) for finding in findings)
    return int(faults > 0), {"faults": faults, "findings": [asdict(finding) for finding in findings]}


def _inspect(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    return 0, bundle.inspect(options.update)


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
    command.add_argument("--keep", type=int, default=2, help="how many versions to keep besides the base")
    command = verb("apply", _apply, "install an update and make it current")
    command.add_argument("update", type=Path, metavar="UPDATE")
    command.add_argument("--retry", action="store_true", help="forget that this update failed before")
    command.add_argument("--wait", type=float, default=install.WAIT, help="seconds to wait for another updater")
    command = verb("rollback", _rollback, "make an older version current again")
    command.add_argument("--to", type=int, help="its sequence number; 0 is the base")
    command.add_argument("--wait", type=float, default=install.WAIT, help="seconds to wait for another updater")
    verb("status", _status, "say which version is current")
    verb("doctor", _doctor, "look for damage and say what repairs it")
    verb("inspect", _inspect, "say what an update holds", subject="update")
    return parser


def _text(answer: dict[str, Any]) -> str:
    lines = []
    for key, value in answer.items():
        if key == "findings":
            lines += [f"{'FAIL' if item['fault'] else 'ok  '} {item['name']}{_because(item)}" for item in value]
        else:
            lines.append(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    return "\n".join(lines)


def _because(item: dict[str, str]) -> str:
    return f": {item['fault']} ({item['remedy']})" if item["fault"] else ""


if __name__ == "__main__":
    sys.exit(main())
