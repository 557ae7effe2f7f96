"""Every format that was ever released is still read: known updates give known bytes, known faults known exit codes.

R1DEVICE names another implementation to test (a command line with the verbs inspect, apply and rollback), R1PYTHON another
Python for the kit.
"""

import hashlib
import json
import os
import shlex
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from device.any_machine import PYTHON, Kit

from r1export.device import provision
from r1export.device.__main__ import main
from r1export.update.factors import ExpertUpdate, Factors, Rows

VERSIONS = sorted(path.parent for path in Path(__file__).parent.glob("*/expected.json"))
PROGRAM = shlex.split(os.environ.get("R1DEVICE", ""))


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def vectors(request) -> Path:
    return request.param


@pytest.fixture
def store(vectors, tmp_path) -> Path:
    expected = json.loads((vectors / "expected.json").read_text())
    names = {name: expected[name] for name in ("product", "device_class")}
    return provision.init(tmp_path / "store", vectors / "base", [vectors / "key.pub"], health="none", **names).path


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """The kit with R1PYTHON, or None without one."""
    process = Kit(tmp_path_factory.mktemp("kit")) if PYTHON else None
    yield process
    if process:
        process.close()


@pytest.fixture
def r1device(capsys, kit):
    def r1device(*arguments) -> tuple[int, dict]:
        if kit:
            return kit(*arguments)
        line = [*map(str, arguments), "--json"]
        if PROGRAM:
            process = subprocess.run([*PROGRAM, *line], capture_output=True, text=True)
            return process.returncode, json.loads(process.stdout)
        code = main(line)
        return code, json.loads(capsys.readouterr().out)

    return r1device


def files(store: Path) -> dict[str, str]:
    current = (store / "current").resolve()
    paths = (path for path in current.rglob("*") if path.is_file() and path.name != "update.r1u")
    return {str(path.relative_to(current)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_there_are_vectors():
    assert [path.name for path in VERSIONS] == ["v1", "v1-int8"]


def test_known_updates_give_known_files(vectors, store, r1device):
    for step in json.loads((vectors / "expected.json").read_text())["accepted"]:
        code, found = r1device("inspect", vectors / step["update"])
        assert (code, found["slot"]) == (0, step["slot"])
        code, found = r1device("apply", store, vectors / step["update"])
        assert (code, found["slot"], found["changed"]) == (0, step["slot"], True)
        assert files(store) == step["files"]
    code, found = r1device("rollback", store)
    assert (code, found["slot"][:8]) == (0, "00000003")


def test_known_faults_are_refused_and_change_nothing(vectors, store, r1device):
    expected = json.loads((vectors / "expected.json").read_text())
    first, second = expected["accepted"][:2]
    assert r1device("apply", store, vectors / first["update"])[0] == 0
    for case in expected["refused_at_1"]:
        code, found = r1device("apply", store, vectors / case["update"])
        assert (case["why"], code, found["exit_code"]) == (case["why"], case["exit_code"], case["exit_code"])
        assert files(store) == first["files"]
        assert [path.name for path in (store / "slots").iterdir()] == [first["slot"]]
    assert r1device("apply", store, vectors / second["update"])[0] == 0
    assert r1device("apply", store, vectors / first["update"])[0] == 1
    assert files(store) == second["files"]


def test_the_merge_gives_the_known_bits(vectors):
    for case in json.loads((vectors / "arithmetic.json").read_text()):
        dtype = {"F32": ">f4", "F16": ">f2"}[case["type"]]
        weight = np.frombuffer(bytes.fromhex(case["weight"]), dtype).reshape(1, 1)
        u, v = (
            np.array([struct.unpack(">f", bytes.fromhex(pair[side]))[0] for pair in case["products"]], "f4")
            for side in (0, 1)
        )
        update = ExpertUpdate({Rows("w", 0, 1): Factors(u.reshape(1, -1), v.reshape(-1, 1))})
        assert update.apply({"w": weight.astype(dtype[1:])})["w"].astype(dtype).tobytes().hex() == case["result"]
