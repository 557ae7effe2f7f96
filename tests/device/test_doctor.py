"""Bit rot anywhere in a store is found, named, and comes with what repairs it."""

import json
import os
import subprocess
import sys

import pytest
from device import fleet

from r1export.device import doctor as module
from r1export.device.doctor import doctor, status
from r1export.errors import InputError


def faults(device):
    return {finding.name: finding for finding in doctor(device.path) if finding.fault}


@pytest.fixture
def used(lab, device):
    device.apply(lab.bundle(1, 0))
    device.apply(lab.bundle(2, 1))
    return device


def flip(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_sound_store_has_no_faults(used):
    before = used.everything()
    assert faults(used) == {}
    assert used.everything() == before


def test_rot_in_every_file_of_the_store_is_found(used):
    files = [
        path for path in used.path.rglob("*") if path.is_file() and path.name != "lock" and "current" not in path.parts
    ]
    for path in files:
        original = path.read_bytes()
        flip(path, len(original) // 2)
        found = faults(used)
        assert found, path
        assert all(finding.remedy for finding in found.values())
        path.write_bytes(original)
    assert len(files) > 10


def test_a_missing_file_a_lost_link_and_leftovers_are_found(used):
    (used.path / "base" / "visual.onnx").unlink()
    (used.path / "slots" / ".x.partial").mkdir()
    (used.path / "current").unlink()
    (used.path / "current").symlink_to("slots/00000009-0000000000000000")
    (used.path / "state.json").unlink()
    assert set(faults(used)) >= {"base", "leftovers", "current", "state.json"}
    assert "rollback --to" in faults(used)["current"].remedy


def test_a_current_link_that_leads_out_of_the_store_is_found(used, tmp_path):
    name = used.store.current
    for target in (
        f"/elsewhere/{name}",
        f"../slots/{name}",
        name,
        f"slots/{name}/",
        "slots/base",
        str(used.path / "base"),
    ):
        (used.path / "current").unlink()
        os.symlink(target, used.path / "current")
        assert set(faults(used)) == {"current"}, target
    used.rollback(2)
    assert faults(used) == {}


def test_no_flipped_bit_changes_what_the_device_is(slot_device):
    path, expected = slot_device.path / "store.json", slot_device.store.config
    data = path.read_bytes()
    accepted = 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert slot_device.store.config == expected
            accepted += 1
        except InputError:
            continue
    assert accepted < len(data)  # blanks between members may become other blanks


def test_a_damaged_store_json_is_all_that_is_reported(used):
    path = used.path / "store.json"
    path.write_bytes(path.read_bytes().replace(b'"threshold": 1', b'"threshold": 3'))
    (finding,) = doctor(used.path)
    assert (finding.name, "damaged" in finding.fault) == ("store.json", True)
    assert "`init`" in finding.remedy
    with pytest.raises(InputError, match=r"store\.json is damaged"):
        used.rollback(1)


def test_a_digest_whose_name_rotted_is_not_taken_for_none(used):
    path = used.path / "store.json"
    path.write_bytes(path.read_bytes().replace(b'"sha256"', b'"rha256"'))
    assert set(faults(used)) == {"store.json"}


def test_a_store_json_without_a_digest_is_still_read(used):
    path = used.path / "store.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    path.write_text(json.dumps(document))
    assert faults(used) == {}


def test_too_few_keys_are_found(used):
    next((used.path / "trust").iterdir()).unlink()
    assert "0 keys" in faults(used)["trusted keys"].fault


def test_what_the_remedy_says_repairs(used, lab):
    slot = used.store.slots()[1]
    flip(used.path / "slots" / slot / "update.r1u")
    assert f"slots/{slot}" in faults(used)
    used.rollback(1)
    used.apply(lab.bundle(2, 1))
    assert faults(used) == {}
    assert used.files() == fleet.hashes(lab.release(2))


def test_an_arithmetic_that_is_not_the_labs_is_found(used, monkeypatch):
    from r1export.device import arithmetic

    case = ("f4", 1.0, [(2.0**-12, 2.0**-12)], 1 + 2.0**-23)
    monkeypatch.setattr(arithmetic, "KNOWN_ANSWERS", [case])
    assert set(faults(used)) == {"arithmetic"}
    assert module.known_answers_hold is arithmetic.known_answers_hold


def test_status_says_what_is_current(used):
    found = status(used.path)
    assert (found.name, found.seq, found.tasks, found.highest_seq) == (
        "02-shapes",
        2,
        ("digits", "shapes"),
        2,
    )
    used.rollback(0)
    found = status(used.path)
    assert (found.current, found.seq, found.highest_seq) == ("base", 0, 2)


FLUSHED = """
import sys, torch
assert torch.set_flush_denormal(True)
from pathlib import Path
from r1export.device import arithmetic, install
from r1export.errors import Unsupported
try:
    arithmetic.known_answers_hold()
except Unsupported as error:
    print(error.message.split(":")[0])
print(install.apply(Path(sys.argv[1]), Path(sys.argv[2]), now=1_800_000_000).changed)
"""


def test_a_library_that_turned_subnormals_to_zero_is_noticed_and_the_update_is_built_apart_from_it(lab, slot_device):
    pytest.importorskip("torch")
    line = [sys.executable, "-c", FLUSHED, str(slot_device.path), str(lab.bundle(1, 0))]
    process = subprocess.run(line, capture_output=True, text=True)
    assert process.stdout.splitlines() == ["arithmetic self-test 4", "True"], process.stderr
    assert fleet.hashes(slot_device.path / "current") == fleet.hashes(lab.release(1))
