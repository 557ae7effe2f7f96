"""One file for the device: small, the same bytes every time, and content with numpy."""

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from device import fleet

from r1export.device.kit import MODULES, PACKAGE, device_kit
from r1export.errors import InputError


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    return device_kit(tmp_path_factory.mktemp("kit") / "r1device.pyz")


@pytest.fixture(scope="session")
def numpy_only(tmp_path_factory):
    """The Python of a virtual environment that holds numpy and nothing else."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in Path(np.__file__).parents[1].glob("numpy*"):
        (packages / path.name).symlink_to(path)
    return folder / "bin" / "python"


def r1device(kit, *arguments, python=sys.executable):
    process = subprocess.run([python, kit, *map(str, arguments), "--json"], capture_output=True, text=True)
    return process.returncode, json.loads(process.stdout), process.stderr


def test_the_kit_is_small_and_the_same_every_time(kit, tmp_path):
    assert kit.stat().st_size < 240_000
    assert device_kit(tmp_path / "again.pyz").read_bytes() == kit.read_bytes()
    with pytest.raises(InputError, match="exists"):
        device_kit(tmp_path / "again.pyz")


def test_the_kit_holds_all_that_runs_on_a_device_and_nothing_of_the_lab(kit):
    names = {name for name in zipfile.ZipFile(kit).namelist() if name.startswith("r1export/")}
    assert names == {
        f"r1export/{folder}/{name}.py".replace("//", "/") for folder, modules in MODULES.items() for name in modules
    }
    device = {path.stem for path in (PACKAGE / "device").glob("*.py")} - {"kit"}
    assert device == set(MODULES["device"])
    assert not {"publish", "without_task"} & set(MODULES["update"])


def test_the_kit_updates_a_device_with_a_fresh_process_of_its_own(kit, lab, tmp_path):
    store = tmp_path / "store"
    options = ["--base", lab.release(0), "--trust", lab.public, "--product", "camera", "--device-class", "v1"]
    assert r1device(kit, "init", store, *options)[0] == 0
    assert r1device(kit, "apply", store, lab.bundle(2, 0))[:2] == (
        0,
        {"slot": lab.read(lab.bundle(2, 0)).slot, "previous": "base", "changed": True},
    )
    assert fleet.hashes(store / "current") == fleet.hashes(lab.release(2))
    assert r1device(kit, "doctor", store)[1]["faults"] == 0


def test_the_kit_runs_where_only_numpy_is_installed(kit, lab, slot_device, numpy_only):
    listed = subprocess.run([numpy_only, "-c", "import numpy, onnxruntime"], capture_output=True, text=True)
    assert "No module named 'onnxruntime'" in listed.stderr
    assert r1device(kit, "apply", slot_device.path, lab.bundle(1, 0), python=numpy_only)[0] == 0
    assert fleet.hashes(slot_device.path / "current") == fleet.hashes(lab.release(1))
    assert r1device(kit, "doctor", slot_device.path, python=numpy_only)[0] == 0


def test_the_kit_says_that_onnxruntime_is_missing(kit, lab, tmp_path, numpy_only):
    code, answer, _ = r1device(
        kit, "init", tmp_path / "store", "--base", lab.release(0), "--trust", lab.public, python=numpy_only
    )
    assert code == 3
    assert answer["error"]["message"] == "onnxruntime is not installed"
    assert not (tmp_path / "store").exists()


def test_the_package_on_a_device_loads_none_of_the_labs_libraries():
    code = "import sys, r1export.device.__main__; print(*{name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    process = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}; {code}"],
        capture_output=True,
        text=True,
    )
    assert set(process.stdout.split()) <= {"numpy", "r1export", "__main__", "__mp_main__"}, process.stderr
