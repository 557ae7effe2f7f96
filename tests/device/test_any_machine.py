"""A device of any kind, with the kit and numpy alone, derives every file of every release bit for bit.

scripts/machine_matrix.py runs this with other Pythons and other processors; the lab is always this machine.
"""

import ast
from collections.abc import Iterator

import pytest
from device import fleet
from device.any_machine import PYTHON, Kit
from device.conftest import Lab

from r1export.device.kit import MODULES, OLDEST_PYTHON, PACKAGE
from r1export.update.envelope import SecretKey

KINDS = {
    "fp32": ("fp32", "float32"),
    "fp16": ("fp16", "float16"),
    "int8": ("int8", "float32"),
    "fp16 factors": ("fp32", "float16"),
}
ALL = [(kind, mode) for kind in KINDS for mode in ("slot", "overlay")]


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Iterator[Kit]:
    process = Kit(tmp_path_factory.mktemp("kit"))
    yield process
    process.close()


@pytest.mark.parametrize(("kind", "mode"), ALL if PYTHON else [("fp16 factors", "slot"), ("int8", "overlay")])
def test_every_release_is_derived_bit_for_bit(kit, tmp_path, kind, mode):
    key, store = SecretKey(bytes(range(32))), tmp_path / "store"
    lab = Lab(tmp_path, fleet.make_run(tmp_path / "run", *KINDS[kind]), key)
    lab.public.write_text(key.public.to_pem())
    options = ["--product", "camera", "--device-class", "v1", "--mode", mode, "--keep", 3, "--health", "none"]
    assert kit("init", store, "--base", lab.release(0), "--trust", lab.public, *options)[0] == 0
    skipping, back_to_2 = lab.bundle(3, 1), lab.bundle(2, 3, seq=4)
    for number, update in ((1, lab.bundle(1, 0)), (3, skipping), (2, back_to_2)):
        code, answer = kit("apply", store, update)
        assert code == 0, answer
        assert kit.files(store) == fleet.hashes(lab.release(number))
    assert kit("rollback", store, "--to", 1)[0] == 0
    assert kit.files(store) == fleet.hashes(lab.release(1))
    assert kit("doctor", store)[1]["faults"] == 0


@pytest.mark.parametrize("name", [f"{folder}/{name}.py" for folder, names in MODULES.items() for name in names])
def test_the_oldest_python_can_read_the_kit(name):
    text = (PACKAGE / name.lstrip("/")).read_text(encoding="utf-8")
    ast.parse(text, name, feature_version=OLDEST_PYTHON)
