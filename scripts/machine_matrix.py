"""The device kit on other machines: updates made here, derived bit for bit on other processors and with older Pythons.

    python scripts/machine_matrix.py [aarch64 armhf s390x python3.8 ...] [--roots FOLDER]

A processor is emulated by qemu-user; its Python and numpy are Debian's packages, unpacked into a folder of their own by the
apt of this machine, whose own packages stay as they are. aarch64 is run with the newest numpy of PyPI too. Older Pythons are
those that are installed here, with the newest numpy for each. Run are tests/device/test_any_machine.py (every precision, slot
and overlay, skipping, rolling back) and the known-answer vectors of tests/bundles. What this machine cannot get is skipped
with the reason. Exit code 1 if a test fails. With --roots the folders are kept there and used again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("tests/device/test_any_machine.py", "tests/bundles")
PACKAGES = ("python3-minimal", "python3-numpy", "libstdc++6")  # the last for wheels of PyPI
SECONDS = 1800  # what takes longer hangs
LAUNCHER = """#!/bin/sh
export PYTHONHOME={root}/usr PYTHONPATH={packages}
exec {emulator} -L {root} -0 "$0" {python} "$@"
"""


class Unavailable(Exception):
    """What a machine is made of cannot be had here."""


@dataclass(frozen=True)
class Emulated:
    """A processor: Debian's name for it, qemu's, and the folder of its libraries. `platform` is that of wheels, if PyPI's numpy is used."""

    architecture: str
    qemu: str
    libraries: str
    platform: str = ""


EMULATED = {
    "aarch64": Emulated("arm64", "aarch64", "aarch64-linux-gnu"),
    "aarch64-newest": Emulated("arm64", "aarch64", "aarch64-linux-gnu", "manylinux_2_28_aarch64"),
    "armhf": Emulated("armhf", "arm", "arm-linux-gnueabihf"),
    "s390x": Emulated("s390x", "s390x", "s390x-linux-gnu"),
}
PYTHONS = ("3.8", "3.9", "3.10")


def emulated(machine: Emulated, folder: Path) -> list[str]:
    """The command of a Python for this processor. Raises Unavailable."""
    emulator = shutil.which(f"qemu-{machine.qemu}-static") or shutil.which(f"qemu-{machine.qemu}")
    if not emulator:
        raise Unavailable(f"no qemu-{machine.qemu}: install Debian's qemu-user-static")
    root, launcher = folder / "root", folder / "python"
    if not launcher.exists():
        _unpack(machine, folder, root)
        (python,) = root.glob("usr/bin/python3.[0-9]*")
        packages = _newest_numpy(folder, python.name, machine.platform) if machine.platform else ""
        text = LAUNCHER.format(emulator=emulator, root=root, python=python, packages=packages)
        launcher.write_text(text, encoding="utf-8")
        launcher.chmod(0o755)
    return [str(launcher)]


def _unpack(machine: Emulated, folder: Path, root: Path) -> None:
    """Debian's packages with what they need, and the links that their installation would make."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise Unavailable("this is no Debian: it has no apt-get")
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "state/status").touch()  # as if nothing were installed, so that apt fetches all that is needed
    options = {
        "APT::Architecture": machine.architecture,
        "APT::Architectures": machine.architecture,
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "state/status",
        "Dir::Cache": folder / "cache",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    subprocess.run(
        [*apt, "update"], capture_output=True
    )  # one list of several may fail: whether it matters shows below
    install = [*apt, "install", "--download-only", "--no-install-recommends", "-y", *PACKAGES]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise Unavailable(f"apt-get for {machine.architecture}: {lines[-1] if lines else 'failed'}")
    for package in sorted((folder / "cache/archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, root], check=True)
    for name in ("blas", "lapack"):
        link = root / "usr/lib" / machine.libraries / f"lib{name}.so.3"
        link.symlink_to(f"{name}/{link.name}")


def _newest_numpy(folder: Path, python: str, platform: str = "") -> Path:
    """A folder with the newest numpy of PyPI for a Python such as python3.9."""
    wanted = ["--python-version", python.removeprefix("python"), *(("--platform", platform) if platform else ())]
    install = [sys.executable, "-m", "pip", "install", "-q", "--only-binary=:all:", *wanted]
    done = subprocess.run([*install, "--target", folder / "numpy", "numpy"], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"pip has no numpy for {python} {platform}: {done.stderr.strip().splitlines()[-1]}")
    return folder / "numpy"


def installed(version: str, folder: Path) -> list[str]:
    """The command of a Python of this `version` that is installed here. Raises Unavailable if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*pyenv.glob(f"{version}.*/bin/python"), *filter(None, [shutil.which(f"python{version}")])]
    for python in map(str, candidates):
        if not subprocess.run([python, "-c", "import ssl"], capture_output=True).returncode:
            numpy = folder / "numpy"
            return [
                "env",
                f"PYTHONPATH={numpy if numpy.exists() else _newest_numpy(folder, f'python{version}')}",
                python,
            ]
    raise Unavailable(f"no python{version} is installed here")


MACHINES: dict[str, Callable[[Path], list[str]]] = {
    **{name: partial(emulated, machine) for name, machine in EMULATED.items()},
    **{f"python{version}": partial(installed, version) for version in PYTHONS},
}


def version_of(python: Sequence[str]) -> str:
    """Processor, byte order, Python and numpy, as the table shows them. Raises Unavailable if the Python does not run."""
    code = "import numpy, platform, sys; print(platform.machine(), sys.byteorder, platform.python_version(), numpy.__version__, sep=' | ')"
    done = subprocess.run([*python, "-W", "ignore", "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"its Python does not run: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.strip()


def passes(python: Sequence[str]) -> bool:
    """Whether all tests pass with this Python as the device's."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    environment = {**os.environ, "R1PYTHON": shlex.join(python)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-2000:], file=sys.stderr)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machines", nargs="*", default=[*MACHINES], metavar="MACHINE", help=f"of {', '.join(MACHINES)}")
    parser.add_argument("--roots", type=Path, help="keep what is unpacked here")
    asked, failed = parser.parse_args(), False
    if unknown := set(asked.machines) - set(MACHINES):
        parser.error(f"{', '.join(sorted(unknown))}: choose among {', '.join(MACHINES)}")
    print("| machine | processor | byte order | Python | numpy | result |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for name in asked.machines:
            started = time.monotonic()
            try:
                python = MACHINES[name](((asked.roots or Path(temporary)) / name).absolute())
                versions = version_of(python)
            except Unavailable as error:
                print(f"| {name} | | | | | skipped: {error} |", flush=True)
                continue
            passed = passes(python)
            failed |= not passed
            result = "every bit the same" if passed else "FAIL"
            print(f"| {name} | {versions} | {result}, {time.monotonic() - started:.0f} s |", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
