"""Build the wheel and use it the way a user would: `python scripts/wheel.py [--dependencies installed|download]`.

In a new virtual environment, away from the checkout, `r1export run quickstart` trains a few steps of the packaged recipe,
exports and verifies. Dependencies are those of this environment, or are downloaded (6 GB). Prints the size of the wheel.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUICK = (
    "--set",
    "train.iterations=2",
    "--set",
    "data.test_limit=20",
    "--set",
    "verify.samples=4",
    "--set",
    "verify.images=4",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dependencies", choices=("installed", "download"), default="installed")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the wheel and the source archive there")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(asked.keep or Path(folder, "dist"))
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        use(install(wheel, Path(folder, "venv"), asked.dependencies), Path(folder, "work"))


def build(out: Path) -> Path:
    """The source archive, and the wheel built from it: what is missing in the first is missing in the second."""
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT])
    (wheel,) = out.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path, dependencies: str) -> Path:
    """A new environment with the wheel; returns its r1export."""
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if dependencies == "installed":
        # A folder named in a .pth file is searched, but .pth files in it are not read: r1export itself stays out.
        place = next((folder / "lib").glob("python*/site-packages"))
        (place / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip.append("--no-deps")
    _run([*pip, wheel])
    return folder / "bin" / "r1export"


def use(r1export: Path, folder: Path) -> None:
    """Run the packaged recipe by its name and open what it wrote."""
    folder.mkdir()
    _run([r1export, "--version"], folder)
    _run([r1export, "train", "quickstart", *QUICK], folder)
    _run([r1export, "export", "runs/quickstart"], folder)
    _run([r1export, "verify", "runs/quickstart", "--no-latency"], folder)
    _run([r1export, "device-kit", "-o", "r1device.pyz"], folder)
    _run([r1export.with_name("python"), "r1device.pyz", "--help"], folder)


def _run(command: list[object], folder: Path = ROOT) -> None:
    """SystemExit with what the command said if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True)
    shown = " ".join(Path(str(part)).name for part in command[:3])
    if done.returncode:
        sys.exit(f"{shown}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    print(f"{shown}: ok", flush=True)


if __name__ == "__main__":
    main()
