"""The device's command line: exit codes, one JSON document, one line for an error. Another implementation could pass this.

R1DEVICE names the program to test, by default this package's; it needs the verbs inspect, apply and rollback, and a
store that `init` of this package made.
"""

import json
import os
import shlex
import subprocess
import sys

import pytest
from device import fleet

from r1export.device.__main__ import main
from r1export.update.envelope import SecretKey

PROGRAM = shlex.split(os.environ.get("R1DEVICE", "")) or [sys.executable, "-m", "r1export.device"]


def r1device(*arguments) -> tuple[int, dict]:
    process = subprocess.run([*PROGRAM, *map(str, arguments), "--json"], capture_output=True, text=True)
    return process.returncode, json.loads(process.stdout)


def test_inspect_apply_and_rollback_conform(lab, slot_device):
    bundle = lab.read(lab.bundle(1, 0))
    code, found = r1device("inspect", lab.bundle(1, 0))
    assert (code, found["slot"], found["seq"], found["name"]) == (0, bundle.slot, 1, "01-digits")
    code, found = r1device("apply", slot_device.path, lab.bundle(1, 0))
    assert (code, found) == (0, {"slot": bundle.slot, "previous": "base", "changed": True})
    assert fleet.hashes(slot_device.path / "current") == fleet.hashes(lab.release(1))
    code, found = r1device("apply", slot_device.path, lab.bundle(1, 0, keys=[SecretKey(b"\x07" * 32)]))
    assert (code, found["exit_code"]) == (1, 1)
    assert set(found["error"]) == {"message", "remedy"}
    code, found = r1device("rollback", slot_device.path)
    assert (code, found["slot"]) == (0, "base")


@pytest.fixture
def run(capsys):
    def run(*arguments):
        code = main([*map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_exit_codes_tell_the_kinds_of_failure_apart(lab, device, tmp_path, run):
    (tmp_path / "empty").write_bytes(b"")
    assert run("apply", device.path, tmp_path / "empty")[0] == 2
    assert run("apply", tmp_path / "nowhere", lab.bundle(1, 0))[0] == 2
    assert run("apply", device.path, lab.bundle(1, 0, product="toaster"))[0] == 1
    assert run("apply", device.path, lab.bundle(1, 0, expires=4_000_000_000, created=3_900_000_000))[0] == 4
    with device.store.lock(0):
        assert run("apply", device.path, lab.bundle(1, 0), "--wait", "0")[0] == 3
    assert run("status", device.path)[1].startswith("store: ")
    assert run("aply")[0] == 2


def test_inspect_of_a_store_is_its_status(device, run):
    assert run("inspect", device.path, "--json") == run("status", device.path, "--json")


def test_an_error_is_one_line_with_a_remedy(lab, device, run):
    code, out, err = run("rollback", device.path, "--to", "9")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("Error: version 9 is not on this device (choose with --to among [0])")


def test_what_the_operating_system_refuses_is_one_line_too(lab, tmp_path, run):
    code, found = r1device("inspect", tmp_path)
    assert (code, set(found["error"])) == (2, {"message", "remedy"})
    code, found = r1device("inspect", tmp_path / ("x" * 300))
    assert (code, "too long" in found["error"]["message"]) == (2, True)


def test_doctor_ends_with_one_if_something_is_wrong(lab, device, run):
    assert run("doctor", device.path)[0] == 0
    (device.path / "state.json").write_text("rot")
    code, out, _ = run("doctor", device.path)
    assert code == 1
    assert "FAIL state.json" in out
    code, out, _ = run("doctor", device.path, "--json")
    assert json.loads(out)["faults"] == 1


def test_init_then_status(lab, tmp_path, run):
    options = [
        "--base",
        lab.release(0),
        "--trust",
        lab.public,
        "--product",
        "camera",
        "--health",
        "none",
        "--mode",
        "overlay",
        "--json",
    ]
    code, out, _ = run("init", tmp_path / "store", *options)
    assert (code, json.loads(out)["current"], json.loads(out)["mode"]) == (0, "base", "overlay")
    assert run("init", tmp_path / "store", *options)[0] == 2


def test_no_secret_is_ever_shown(lab, device, run):
    run("apply", device.path, lab.bundle(1, 0))
    shown = "".join(text for verb in ("status", "doctor") for text in run(verb, device.path)[1:])
    assert lab.key.seed.hex() not in shown
    assert not any(lab.key.seed in path.read_bytes() for path in device.path.rglob("*") if path.is_file())
