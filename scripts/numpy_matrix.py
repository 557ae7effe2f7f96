"""The device kit with old and new numpy: the same bytes from each, in an environment that holds numpy alone.

    python scripts/numpy_matrix.py [--numpy 1.23.5 1.26.4 2.0.2 latest]

For every version a virtual environment is made, and the known-answer vectors of tests/bundles are run against the kit in it,
once with all processor features and once with those beyond the baseline turned off. Exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from runtime_matrix import environment

from r1export.device.kit import device_kit

ROOT = Path(__file__).parents[1]
OPTIONAL = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX2 FMA3 X86_V3 X86_V4"
DISPATCHED = "from numpy._core._multiarray_umath import __cpu_dispatch__ as d; print(*d)"
OLD_NAMES = DISPATCHED.replace("numpy._core", "numpy.core")


def dispatched(python: Path) -> str:
    """The processor features that this numpy chooses among, as far as they may be turned off."""
    for code in (DISPATCHED, OLD_NAMES):
        done = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True)
        if not done.returncode:
            known = done.stdout.split()
            return " ".join(name for name in OPTIONAL.split() if name in known)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numpy", nargs="+", default=["1.23.5", "1.26.4", "2.0.2", "latest"])
    asked, failed = parser.parse_args(), False
    print("| numpy | processor features | vectors |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        kit = device_kit(Path(name) / "r1device.pyz")
        for version in asked.numpy:
            wanted = "numpy" if version == "latest" else f"numpy=={version}"
            python = environment(Path(name) / version, [wanted])
            found = subprocess.run(
                [python, "-c", "import numpy; print(numpy.__version__)"], capture_output=True, text=True
            )
            for features, off in (("all", ""), ("baseline", dispatched(python))):
                test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/bundles"]
                device = f"env {shlex.quote(f'NPY_DISABLE_CPU_FEATURES={off}')} {python} {kit}"
                done = subprocess.run(
                    test, cwd=ROOT, env=os.environ | {"R1DEVICE": device}, capture_output=True, text=True
                )
                failed |= done.returncode != 0
                if done.returncode:
                    print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
                print(
                    f"| {found.stdout.strip()} | {features} | {'fail' if done.returncode else 'pass'} |",
                    flush=True,
                )
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
