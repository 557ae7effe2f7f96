"""One virtual environment per set of peers, on top of the project's own packages, so that torch and onnxruntime are installed once.

What a peer pins differently (transformers 4 for Optimum) lies in its environment and hides the project's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PINS = {
    "optimum": ("optimum-onnx==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "peft==0.18.1"),
    "olive": ("olive-ai==0.13.0", "transformers==5.24.0", "peft==0.21.2", "requests==2.34.2"),
    "peft": ("transformers==5.24.0", "peft==0.21.2"),
}
USED_BY = {"optimum": "optimum", "olive": "olive", "multilora": "olive", "peft": "peft", "r1export": ""}
MARK = "pins.txt"


def python_for(contender: str, folder: Path) -> Path:
    """The python that runs `contender`; its environment in `folder` is made if it is not there as pinned.

    Raises subprocess.CalledProcessError if something cannot be installed.
    """
    name = USED_BY[contender]
    if not name:
        return Path(sys.executable)
    place, wanted = folder / name, "\n".join((*PINS[name], sys.executable)) + "\n"
    python = place / "bin" / "python"
    mark = place / MARK
    if not (mark.exists() and mark.read_text(encoding="utf-8") == wanted):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        _see_this_environment(python)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PINS[name]]
        subprocess.run(install, check=True)
        mark.write_text(wanted, encoding="utf-8")
    return python


def _see_this_environment(python: Path) -> None:
    """Append the packages of the running environment to those of `python`."""
    code = "import site; print(site.getsitepackages()[0])"
    own = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (Path(own) / "project.pth").write_text("".join(f"{path}\n" for path in seen), encoding="utf-8")
