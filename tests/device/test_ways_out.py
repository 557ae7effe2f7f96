"""Out of each state that a device can get into leads a documented way, through the real command line."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from device import fleet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1export.device import slot_files
from r1export.device.doctor import doctor, status
from r1export.device.state import read_config
from r1export.errors import CheckFailed
from r1export.update.bundle import assemble, split
from r1export.update.envelope import SecretKey, sign

CREATED = 1_800_000_000
NEW_KEY = SecretKey(b"\x05" * 32)


def r1device(*arguments):
    command = [sys.executable, "-m", "r1export.device", *map(str, arguments), "--json"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return process.returncode, json.loads(process.stdout)


def faults(device):
    return {finding.name for finding in doctor(device.path) if finding.fault}


def flip(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def trust(device, key):
    """What a fleet does to replace its key: the new one is put into trust/, the old one is removed."""
    for path in (device.path / "trust").iterdir():
        path.unlink()
    (device.path / "trust" / f"{key.public.keyid}.pub").write_text(key.public.to_pem())


def signed_again(bundle: Path, out: Path, *keys) -> Path:
    _, manifest, payload = split(bundle.read_bytes())
    out.write_bytes(assemble(sign(manifest, keys), manifest, payload))
    return out


# --- a damaged version that is current, and no other may run


@pytest.fixture
def pinned(lab, device):
    """A device on which nothing but version 2 may run, and the update that made it."""
    device.apply(lab.bundle(1, 0))
    update = lab.bundle(2, 1, min_seq=2, expires=CREATED + 100)
    device.apply(update)
    return device, update


def test_a_flipped_byte_in_the_only_version_that_may_run_is_repaired_by_its_update(lab, pinned):
    device, update = pinned
    folder = device.path / "slots" / device.store.current
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        flip(path)
        assert r1device("rollback", device.path)[0] == 1
        code, answer = r1device("apply", device.path, update)
        assert (code, answer["changed"], answer["slot"]) == (0, True, folder.name), path
        assert faults(device) == set()
        assert device.files() == fleet.hashes(lab.release(2))
    assert r1device("apply", device.path, update)[1]["changed"] is False


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_happened_to_the_files_of_the_current_version_its_update_repairs_it(
    lab, new_devices, tmp_path_factory, slot_device, data
):
    store = tmp_path_factory.mktemp("damaged") / "store"
    device = type(slot_device)(
        Path(shutil.copytree(new_devices[data.draw(st.sampled_from(["slot", "overlay"]))], store, symlinks=True))
    )
    device.apply(lab.bundle(2, 0, min_seq=2))
    folder = store / "slots" / device.store.current
    victims = [folder, *sorted(folder.rglob("*"))]
    for _ in range(data.draw(st.integers(1, 3))):
        victim = data.draw(st.sampled_from(victims))
        kind = data.draw(st.sampled_from(["missing", "folder", "file", "link", "half"]))
        if victim.is_file() and kind == "half":
            victim.write_bytes(victim.read_bytes()[:9])
        elif (
            victim.parent.resolve() == victim.parent
            and victim.parent.is_dir()
            and (victim != folder or kind in ("missing", "file"))
        ):
            shutil.rmtree(victim) if victim.is_dir() and not victim.is_symlink() else victim.unlink(missing_ok=True)
            if kind == "folder":
                victim.mkdir()
            elif kind == "file":
                victim.write_bytes(b"rot")
            elif kind == "link":
                victim.symlink_to(store)
    device.apply(lab.bundle(2, 0, min_seq=2))
    assert faults(device) == set()
    assert device.files() == fleet.hashes(lab.release(2))
    shutil.rmtree(store.parent)


def test_a_folder_that_became_a_link_is_repaired_though_the_right_files_lie_behind_it(lab, slot_device, tmp_path):
    slot_device.apply(lab.bundle(1, 0))
    classes = slot_device.path / "slots" / slot_device.store.current / "classes"
    shutil.move(classes, tmp_path / "elsewhere")
    classes.symlink_to(tmp_path / "elsewhere")
    assert faults(slot_device)
    assert slot_device.apply(lab.bundle(1, 0)).changed
    assert faults(slot_device) == set()
    assert not classes.is_symlink()


def test_a_repair_that_is_cut_short_can_be_repeated(lab, pinned, monkeypatch):
    device, update = pinned
    if device.store.config.mode == "overlay":
        pytest.skip("has but one file")
    folder = device.path / "slots" / device.store.current
    victims = [folder / name for name in ("visual.safetensors", "textual.safetensors", "preprocess.json")]
    for victim in victims:
        flip(victim)
    original, written = slot_files.write_file, []

    def write_one(path, *arguments):
        if written:
            raise OSError(5, "Input/output error", str(path))
        written.append(path)
        original(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(slot_files, "write_file", write_one)
        with pytest.raises(Exception, match="Input/output error"):
            device.apply(update)
    assert device.store.leftovers() == []
    assert len(faults(device)) == 1
    device.apply(update)
    assert faults(device) == set()


def test_damaged_factors_are_repaired_by_the_update_that_carries_them(lab, pinned):
    device, update = pinned
    carried = lab.read(update).carried
    for sha256 in carried:
        flip(device.store.factors_path(sha256))
    assert faults(device)
    assert device.apply(update).changed
    assert faults(device) == set()


def test_a_version_that_a_later_update_forbade_is_not_repaired(lab, device, monkeypatch):
    device.apply(lab.bundle(1, 0))
    store = device.store
    monkeypatch.setattr(type(store), "active", property(lambda _: lab.read(lab.bundle(1, 0)).slot))
    store.write_state(store.state().raised(lab.read(lab.bundle(2, 1, min_seq=2)).manifest, "f" * 64))
    shutil.rmtree(device.path / "slots" / store.current)
    with pytest.raises(CheckFailed, match="lowest allowed"):
        device.apply(lab.bundle(1, 0))


# --- keys that are replaced


def test_the_same_version_signed_by_a_new_key_is_the_same_version(lab, device, tmp_path):
    old, new = lab.bundle(1, 0), signed_again(lab.bundle(1, 0), tmp_path / "new.r1u", NEW_KEY)
    device.apply(old)
    assert r1device("apply", device.path, new)[0] == 1
    trust(device, NEW_KEY)
    assert f"slots/{device.store.current}" in faults(device)
    before = device.files()
    code, answer = r1device("apply", device.path, new)
    assert (code, answer["changed"]) == (0, True)
    assert (device.path / "slots" / device.store.current / "update.r1u").read_bytes() == new.read_bytes()
    assert (faults(device), device.files()) == (set(), before)
    assert r1device("apply", device.path, new)[1]["changed"] is False
    assert r1device("apply", device.path, old)[0] == 1


def test_a_kept_version_takes_the_new_signature_when_it_comes_back(lab, device, tmp_path):
    device.apply(lab.bundle(1, 0))
    device.rollback(0)
    trust(device, NEW_KEY)
    new = signed_again(lab.bundle(1, 0), tmp_path / "new.r1u", NEW_KEY)
    device.apply(new)
    assert faults(device) == set()
    assert device.files() == fleet.hashes(lab.release(1))


# --- numbers that leave no higher one


LAST = 2**53 - 1


def test_an_update_with_the_last_number_of_all_is_refused(lab, device):
    before = device.facts()
    code, answer = r1device("apply", device.path, lab.bundle(1, 0, seq=LAST, min_seq=LAST))
    assert (code, "more than 1000000 above 0" in answer["error"]["message"]) == (1, True)
    assert device.facts() == before


def test_a_device_whose_numbers_are_used_up_gets_a_new_store_that_keeps_its_floor(lab, tmp_path):
    """As docs/fleet.md says: a store with a larger bound took it, its key was revoked since."""
    store, options = tmp_path / "store", ["--base", lab.release(0), "--product", "camera", "--device-class", "v1"]
    assert r1device("init", store, *options, "--trust", lab.public, "--max-seq-jump", LAST)[0] == 0
    assert r1device("apply", store, lab.bundle(1, 0, seq=LAST, min_seq=LAST))[0] == 0
    (tmp_path / "new.pub").write_text(NEW_KEY.public.to_pem())
    assert r1device("init", tmp_path / "new", *options, "--trust", tmp_path / "new.pub", "--min-seq", 2)[0] == 0
    shutil.rmtree(store)
    (tmp_path / "new").rename(store)
    assert r1device("apply", store, lab.bundle(1, 0, keys=[NEW_KEY]))[0] == 1
    assert r1device("apply", store, lab.bundle(2, 0, keys=[NEW_KEY]))[0] == 0
    assert r1device("rollback", store)[0] == 1
    assert status(store).min_seq == 2


def test_a_store_that_an_older_kit_made_has_the_default_bound(slot_device):
    path = slot_device.path / "store.json"
    document = json.loads(path.read_text())
    expected = read_config(path)
    for name in ("sha256", "max_seq_jump", "min_seq"):
        del document[name]
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    for sealed in ({}, {"sha256": digest}):  # the first kit wrote none
        path.write_text(json.dumps(document | sealed))
        assert read_config(path) == expected


def test_a_record_that_cannot_be_read_lowers_nothing_that_the_versions_prove(lab, device, monkeypatch):
    device.apply(lab.bundle(2, 0, min_seq=2))

    def unreadable(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("r1export.device.store.read_state", unreadable)
    assert (device.store.state().seq, device.store.state().min_seq) == (2, 2)


# --- time


def test_status_says_when_the_current_version_was_made_and_has_expired(lab, device):
    found = status(device.path, now=CREATED)
    assert (found.created, found.expires, found.expired) == (None, None, False)
    device.apply(lab.bundle(1, 0, expires=CREATED + 100))
    found = status(device.path, now=CREATED + 99)
    assert (found.created, found.expires, found.expired) == (CREATED, CREATED + 100, False)
    assert status(device.path, now=CREATED + 100).expired
    device.apply(lab.bundle(2, 1))
    assert status(device.path, now=CREATED + 100).expires is None


def test_a_version_that_expired_still_runs_and_status_ends_with_zero(lab, device):
    device.apply(lab.bundle(1, 0, created=1000, expires=2000), now=1500)
    code, answer = r1device("status", device.path)
    assert (code, answer["expired"], answer["expires"]) == (0, True, 2000)
    assert device.files() == fleet.hashes(lab.release(1))
