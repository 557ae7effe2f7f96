"""Download the runtime of `r1export serve`'s web page: onnxruntime-web's WASM build, into r1export/web/vendor.

    python scripts/vendor_web.py [--test]

--test fetches playwright-core too, into node_modules, with which the tests drive a browser. Needs npm and, where npm has
no copy yet, a network. Every archive has to have the SHA-512 that stands here, so what is run is what was looked at.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NoReturn

from r1export.update.atomic_io import new_folder

ROOT = Path(__file__).parents[1]
# npm's archive names its licence (MIT) without its text; the Python package of the same project brings text and notices.
LICENCES = tuple(Path(str(files("onnxruntime").joinpath(name))) for name in ("LICENSE", "ThirdPartyNotices.txt"))


@dataclass(frozen=True)
class Package:
    """One npm package at one version. `integrity` is npm's: SHA-512 of the archive in base64. Without `files` all are taken;
    `beside` are files from elsewhere that go with it."""

    name: str
    version: str
    integrity: str
    folder: Path
    files: tuple[str, ...] = ()
    beside: tuple[Path, ...] = ()


RUNTIME = Package(
    "onnxruntime-web",
    "1.30.0",
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    ROOT / "r1export/web/vendor",
    ("dist/ort.wasm.min.mjs", "dist/ort-wasm-simd-threaded.mjs", "dist/ort-wasm-simd-threaded.wasm"),
    LICENCES,
)
DRIVER = Package(  # the newest that runs on Node 18, which is Debian 12's
    "playwright-core",
    "1.61.1",
    "h7Qlt6m4REp25qvIdvbDtVmD4LqVXfpRxhORv9L0jzETM05p4fuPJ3dKyuSXQxDSbXnmS79HAgi9589lGSpLkg==",
    ROOT / "node_modules/playwright-core",
)


def fetch(package: Package) -> None:
    """Put the package's files into its folder, all or none; does nothing if this version is there. SystemExit says why not."""
    mark = package.folder / ".version"
    if mark.is_file() and mark.read_text(encoding="utf-8") == package.integrity:
        return
    data = archive(package)
    with new_folder(package.folder) as folder, tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            path = member.name.removeprefix("package/")
            content = tar.extractfile(member) if member.isfile() else None
            if content and (path in package.files or not package.files):
                target = folder / (Path(path).name if package.files else path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
        for beside in package.beside:
            shutil.copy(beside, folder)
        (folder / ".version").write_text(package.integrity, encoding="utf-8")
    print(f"{package.name} {package.version}: {package.folder.relative_to(ROOT)}")


def archive(package: Package) -> bytes:
    """The package's archive, from npm. SystemExit 3 without npm or network, 1 if it is not the archive that was recorded."""
    npm = shutil.which("npm")
    if npm is None:
        refuse(3, f"{package.name} comes from npm, which is not installed (apt install npm)")
    with tempfile.TemporaryDirectory() as name:
        command = [npm, "pack", "--silent", "--pack-destination", name, f"{package.name}@{package.version}"]
        done = subprocess.run(command, cwd=name, capture_output=True, text=True)
        found = list(Path(name).glob("*.tgz"))
        if done.returncode or len(found) != 1:
            refuse(3, f"npm did not give {package.name}@{package.version}: {done.stderr.strip()[-300:]}")
        data = found[0].read_bytes()
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if digest != package.integrity:
        refuse(1, f"{package.name}@{package.version} has SHA-512 {digest}, expected {package.integrity}")
    return data


def refuse(code: int, message: str) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", action="store_true", help="playwright-core too")
    for package in (RUNTIME, DRIVER) if parser.parse_args().test else (RUNTIME,):
        fetch(package)


if __name__ == "__main__":
    main()
