"""The two steps that run in a fresh process: building a version's files, and the health check.

A fresh process, because another library may have changed the processor's floating-point mode, and because a crash is then
a failed check and not the end of the updater. The process inherits the store's lock, so that no other updater starts; a
custom health command does not inherit it, since its background processes would hold the lock.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Callable, NoReturn

from r1export.device.arithmetic import known_answers_hold
from r1export.device.health import check_health, limits_of
from r1export.device.store import BUNDLE, Store, write_new
from r1export.device.version import check_digest, check_tensor, version_in, version_of
from r1export.errors import CheckFailed, Inconclusive, InputError, R1ExportError, Unsupported
from r1export.update.atomic_io import inside, make_folder
from r1export.update.bundle import Bundle, read_bundle
from r1export.update.manifest import File, Manifest
from r1export.update.rebuild import Rebuild
from r1export.update.release_manifest import Release, is_graph

Run = Callable[[Store, int, str, str], None]  # `run` below, or a stand-in
SECONDS = {"build": 3600, "health": 600, "arithmetic": 60}  # timeout
_ERRORS = {kind.exit_code: kind for kind in (CheckFailed, InputError, Unsupported, Inconclusive)}
_STARTED = b"started"  # the first line that the fresh process prints
_START = "import sys; sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]; from r1export.device.worker import main; main(*sys.argv[1:])"


def run(device: Store, descriptor: int, verb: str, name: str) -> None:
    """Do `verb` (build or health) for `base` or the folder `name` of slots/ in a fresh process that keeps `descriptor` open.

    Raises:
        R1ExportError: the error of the step; CheckFailed if the process died or hung.
    """
    if verb == "health" and device.config.health == "none":
        return
    if verb == "build" or device.config.health == "onnxruntime":
        _do_in_fresh_process(verb, name, [str(device.path), name], [descriptor])
    else:
        command = [*health_command(device.config.health), str(device.folder(name))]
        if (process := _finish(verb, name, command, [])).returncode:
            raise _failure(verb, process)


def known_answers_hold_in_fresh_process() -> None:
    """`known_answers_hold` in a fresh process: the libraries of this one may have changed the floating-point mode.

    Raises Unsupported if a result differs, CheckFailed if the process died.
    """
    _do_in_fresh_process("arithmetic", "this machine", [], [])


def _do_in_fresh_process(verb: str, name: str, arguments: list[str], inherited: list[int]) -> None:
    root = Path(__file__.replace("\\", "/")).parents[2]  # the folder or .pyz that contains this package
    command = [sys.executable, "-W", "ignore", "-c", _START, str(root.resolve()), verb, *arguments]
    process = _finish(verb, name, command, inherited)
    if not process.returncode:
        return
    if not process.stdout.startswith(_STARTED):
        raise Unsupported(
            f"{verb} of {name}: the process did not start: {_how_it_ended(process)}",
            "check Python and numpy on this device; nothing was modified",
        )
    raise _failure(verb, process)


def health_command(text: str) -> list[str]:
    """Split a health command. Raises InputError if it is empty or a quote is not closed."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"health command {text!r}: {error}", "quote it as for a shell") from None
    if not words:
        raise InputError("the health command is empty", 'use "onnxruntime", "none" or a command')
    return words


def _finish(verb: str, name: str, command: list[str], inherited: list[int]) -> subprocess.CompletedProcess[bytes]:
    """Run a command; on a timeout kill its process group. Raises CheckFailed on a timeout."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=inherited,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=SECONDS[verb])
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise CheckFailed(
                    f"{verb} of {name} took more than {SECONDS[verb]} seconds",
                    "find out what blocks it; nothing was modified",
                ) from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _failure(verb: str, process: subprocess.CompletedProcess[bytes]) -> R1ExportError:
    try:
        report = json.loads(process.stdout.splitlines()[-1])
        return _ERRORS[process.returncode](report["message"], report["remedy"])
    except (ValueError, LookupError, TypeError):
        if process.returncode == -signal.SIGKILL:  # from outside, usually the OOM killer
            return Unsupported(f"{verb} was killed", "free memory, or find out what killed it; nothing was modified")
        return CheckFailed(
            f"{verb} ended with {_how_it_ended(process)}", "run the command manually to see why; nothing was modified"
        )


def _how_it_ended(process: subprocess.CompletedProcess[bytes]) -> str:
    how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
    tail = process.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return f"{how}{': ' + tail[0][:300] if tail else ''}"


def main(verb: str, store: str = "", name: str = "") -> None:
    """Entry point of the fresh process: the usual exit codes, and one JSON line about an error on stdout."""
    print(_STARTED.decode(), flush=True)
    try:
        if verb == "arithmetic":
            known_answers_hold()
        else:
            STEPS[verb](Store.open(Path(store)), name)
    except R1ExportError as error:
        _report(error)
    except MemoryError:
        _report(Unsupported("out of memory", "free memory or use a smaller base model"))
    except OSError as error:
        message = f"{error.filename or store}: {error.strerror or error}"
        _report(Unsupported(message, "check disk space and permissions, then try again"))


def _report(error: R1ExportError) -> NoReturn:
    print(json.dumps({"message": error.message, "remedy": error.remedy}))
    sys.exit(error.exit_code)


def build(device: Store, name: str) -> None:
    """Build the files of the version in slots/NAME from its bundle: written and synced in slot mode, only checked in overlay mode.

    Raises:
        CheckFailed: the base is corrupted, or a result has another digest than the signed one.
        Unsupported: this machine's arithmetic differs from the build host's.
    """
    known_answers_hold()
    folder = device.path / "slots" / name
    bundle = Bundle.parse(read_bundle(folder / BUNDLE), device.trusted(), device.config.threshold)
    base = device.base()
    base.check()
    version = version_of(device, bundle, folder)
    assert version.rebuild is not None
    _check_changes(version.rebuild, bundle.manifest)
    unchecked = set(bundle.manifest.tensors)
    for file in bundle.manifest.files:
        _check_source(base, file)
        if device.config.mode == "slot":
            path = inside(folder, file.path)
            make_folder(path.parent)
            write_new(path, version.chunks(file))
        elif file.parts is None and file.path not in version.rebuild.merged_files:
            check_digest(file.path, base.manifest.files[file.path].sha256, file.sha256)  # hashed with the base
        else:
            unchecked -= version.check(file)
    if device.config.mode == "overlay":
        for parameter in sorted(unchecked):
            check_tensor(parameter, version.rebuild.tensor(parameter), bundle.manifest.tensors)


def _check_changes(rebuild: Rebuild, manifest: Manifest) -> None:
    if set(rebuild.changed) != set(manifest.tensors) or rebuild.procedure != manifest.algorithm:
        raise CheckFailed("the manifest's tensors or algorithm don't match its updates", "build the update again")


def _check_source(base: Release, file: File) -> None:
    """A file is the base's or made of parts. Graphs and weights must be the base's, since an overlay opens only those."""
    own = base.manifest.files.get(file.path)
    if file.parts is None and (own is None or own.nbytes != file.nbytes):
        raise InputError(
            f"{file.path} should be {file.nbytes} bytes of the base, which has {own.nbytes if own else 'no such file'}",
            "build the update again",
        )
    if is_graph(file.path) and (own is None or own.sha256 != file.sha256):
        raise CheckFailed(
            f"{file.path} is not the base's graph", "a new graph needs a new base: create another store with `init`"
        )
    if file.path in base.manifest.weights and file.parts is not None:
        raise CheckFailed(
            f"{file.path} holds weights, but is made of parts",
            "build the update so that weights are derived from the base and factors",
        )


def health(device: Store, name: str) -> None:
    """Run the golden inputs of `base` or of the version in slots/NAME. Raises like `check_health`."""
    version = version_in(device, name)
    check_health(version, limits_of(version))


STEPS = {"build": build, "health": health}


def has_onnxruntime() -> bool:
    """Whether onnxruntime can be imported; it is not."""
    return importlib.util.find_spec("onnxruntime") is not None
