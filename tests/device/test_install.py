"""Updates on a device: the bytes of the lab in every order of events, and the old version whenever something is wrong."""

import dataclasses
import hashlib
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from device import fleet
from device.conftest import Device
from device.steps import in_this_process

from r1export.device import install, provision, worker
from r1export.device.policy import MAX_TRIES
from r1export.device.state import State
from r1export.errors import CheckFailed, Inconclusive, InputError, R1ExportError, Unsupported
from r1export.update.bundle import assemble, split
from r1export.update.envelope import SecretKey, sign
from r1export.update.manifest import Experts, Health, Part

CREATED = 1_800_000_000  # when the lab makes its updates
STRANGER = SecretKey(b"\x09" * 32)


def resigned(lab, path, tmp_path, *, payload=None, **changes):
    """An update with other members in its manifest, signed with the right key."""
    bundle = lab.read(path)
    text = dataclasses.replace(bundle.manifest, **changes).to_bytes()
    out = tmp_path / "resigned.r1u"
    out.write_bytes(assemble(sign(text, [lab.key]), text, bundle.payload if payload is None else payload))
    return out


def refused(device, error, bundle, match=".", **options):
    before = device.facts()
    with pytest.raises(error, match=match):
        device.apply(bundle, **options)
    assert device.facts() == before


# --- the same bytes as the lab, whatever happened before


def test_applied_in_order_each_version_is_the_labs(lab, device):
    for number in (1, 2, 3):
        device.apply(lab.bundle(number, number - 1))
        assert device.files() == fleet.hashes(lab.release(number))


def test_skipping_versions_gives_the_labs_bytes(lab, device):
    device.apply(lab.bundle(3, 0))
    assert device.files() == fleet.hashes(lab.release(3))


def test_a_rolled_back_device_has_the_old_bytes_and_takes_the_next_update(lab, device):
    device.apply(lab.bundle(1, 0))
    device.apply(lab.bundle(2, 1))
    device.rollback()
    assert device.files() == fleet.hashes(lab.release(1))
    device.apply(lab.bundle(3, 2))
    assert device.files() == fleet.hashes(lab.release(3))


def test_the_newest_version_can_come_back_after_a_rollback(lab, device):
    device.apply(lab.bundle(1, 0))
    device.apply(lab.bundle(2, 1))
    device.rollback(0)
    assert device.apply(lab.bundle(2, 1)).changed
    assert device.files() == fleet.hashes(lab.release(2))


def test_a_remote_rollback_is_an_update_with_fewer_experts(lab, device):
    device.apply(lab.bundle(3, 0))
    device.apply(lab.bundle(1, 3, seq=7))
    assert device.files() == fleet.hashes(lab.release(1))
    assert not any(update.experts for update in lab.read(lab.bundle(1, 3, seq=7)).manifest.updates)


def test_a_dropped_task_leaves_the_bytes_of_never_having_learned_it(lab, device):
    device.apply(lab.bundle(3, 0))
    device.apply(lab.bundle(3, 3, seq=8, drop=("shapes",)))
    manifest = device.store.bundle(device.store.current).manifest
    assert [update.task for update in manifest.updates] == ["digits", "colours"]
    other = provision.init(
        device.path.with_name("other"), lab.release(0), [lab.public], product="camera", device_class="v1", health="none"
    )
    fresh = dataclasses.replace(device, path=other.path)
    fresh.apply(lab.bundle(3, 0, seq=8, drop=("shapes",)))
    assert fresh.files() == device.files()
    assert not any(path.startswith("classes/shapes") for path in device.files())


@pytest.mark.parametrize("precision", ["half_lab", "int8_lab"])
def test_float16_and_int8_weights_are_the_labs_too(request, tmp_path, device, precision):
    lab = request.getfixturevalue(precision)
    mode = device.store.config.mode
    provision.init(tmp_path / "other", lab.release(0), [lab.public], product="camera", device_class="v1", mode=mode)
    other = dataclasses.replace(device, path=tmp_path / "other")
    for number in (1, 3):
        other.apply(lab.bundle(number, number // 2))
        assert other.files() == fleet.hashes(lab.release(number))
    other.apply(lab.bundle(3, 3, seq=9, drop=("shapes",)))
    other.rollback(3)
    assert other.files() == fleet.hashes(lab.release(3))


def test_the_algorithm_has_to_be_that_of_the_base(lab, int8_lab, device, tmp_path):
    assert int8_lab.read(int8_lab.bundle(1, 0)).manifest.algorithm == "r1-f64-v1+q8"
    refused(device, CheckFailed, resigned(lab, lab.bundle(1, 0), tmp_path, algorithm="r1-f64-v1+q8"), "algorithm")


def test_a_fresh_process_builds_and_checks_the_same_bytes(lab, tmp_path):
    store = provision.init(tmp_path / "store", lab.release(0), [lab.public], product="camera", device_class="v1").path
    install.apply(store, lab.bundle(2, 0), now=1_800_000_000)
    assert fleet.hashes(store / "current") == fleet.hashes(lab.release(2))


@pytest.mark.parametrize("switches", ["", "AVX512F AVX512CD AVX512_SKX", "AVX2 FMA3"])
def test_processor_features_and_threads_change_no_bit(lab, slot_device, monkeypatch, switches):
    available = np._core._multiarray_umath.__cpu_features__
    names = [
        name
        for name in switches.split()
        if available.get(name) and name not in np._core._multiarray_umath.__cpu_baseline__
    ]
    monkeypatch.setenv("NPY_DISABLE_CPU_FEATURES", " ".join(names))
    monkeypatch.setenv("OMP_NUM_THREADS", "1" if names else "2")
    slot_device.apply(lab.bundle(3, 0), run=worker.run)
    assert slot_device.files() == fleet.hashes(lab.release(3))


def test_applying_what_is_current_changes_nothing(lab, device):
    device.apply(lab.bundle(1, 0))
    before = device.everything()
    assert not device.apply(lab.bundle(1, 0)).changed
    assert device.everything() == before


def test_an_overlay_device_writes_kilobytes(lab, new_devices, tmp_path, device):
    before = sum(path.stat().st_size for path in device.path.rglob("*") if path.is_file())
    device.apply(lab.bundle(1, 0))
    written = sum(path.stat().st_size for path in device.path.rglob("*") if path.is_file()) - before
    overhead = 3 * lab.bundle(1, 0).stat().st_size
    assert (written < overhead) == (device.store.config.mode == "overlay")


# --- refused, and nothing changed


def test_an_older_update_is_refused_also_without_state_json(lab, device):
    device.apply(lab.bundle(2, 0))
    refused(device, CheckFailed, lab.bundle(1, 0), "not newer")
    (device.path / "state.json").unlink()
    refused(device, CheckFailed, lab.bundle(1, 0), "not newer")
    (device.path / "state.json").write_text("{}")
    refused(device, CheckFailed, lab.bundle(1, 0), "not newer")


def test_another_update_with_the_same_sequence_is_refused(lab, device):
    device.apply(lab.bundle(2, 0))
    refused(device, CheckFailed, lab.bundle(2, 1), "not newer")


def test_an_older_update_is_refused_after_a_rollback(lab, device):
    device.apply(lab.bundle(1, 0))
    device.apply(lab.bundle(3, 1))
    device.rollback()
    refused(device, CheckFailed, lab.bundle(2, 1), "not newer")


@pytest.mark.parametrize(
    ("terms", "now", "error", "match"),
    [
        ({"product": "toaster"}, 1_800_000_000, CheckFailed, "product"),
        ({"device_class": "v2"}, 1_800_000_000, CheckFailed, "device class"),
        ({"expires": 1_800_000_500}, 1_800_000_500, CheckFailed, "expired"),
        ({"expires": 1_900_000_000}, 0, Inconclusive, "clock"),
    ],
)
def test_updates_for_others_or_another_time_are_refused(lab, device, terms, now, error, match):
    refused(device, error, lab.bundle(1, 0, **terms), match, now=now)


def test_an_update_that_expired_before_it_was_made_is_refused_whatever_the_clock_says(lab, device, tmp_path):
    refused(device, CheckFailed, resigned(lab, lab.bundle(1, 0), tmp_path, expires=1_700_000_000), "expired", now=0)


def test_a_device_that_took_an_update_from_the_future_is_led_back_as_the_docs_say(lab, device):
    future, soon = 4_000_000_000, CREATED + 1000
    device.apply(lab.bundle(1, 0, created=future))
    refused(device, CheckFailed, lab.bundle(2, 1, expires=soon), "expired")
    device.apply(lab.bundle(2, 1))
    device.apply(lab.bundle(3, 2))
    refused(device, CheckFailed, lab.bundle(2, 3, seq=4, expires=soon), "expired")
    (device.path / "state.json").unlink()
    assert device.apply(lab.bundle(2, 3, seq=4, expires=soon)).changed


def test_a_wrong_clock_does_not_matter_to_an_update_that_never_expires(lab, device):
    assert device.apply(lab.bundle(1, 0), now=0).changed


def test_an_update_for_another_base_is_refused(lab, half_lab, device):
    refused(device, CheckFailed, half_lab.bundle(1, 0), "base model")


def test_an_update_that_leaves_out_what_the_device_lacks_is_refused(lab, device):
    refused(device, CheckFailed, lab.bundle(3, 2), "neither in the update nor on this device")


def test_a_strangers_update_is_refused(lab, device):
    refused(device, CheckFailed, lab.bundle(1, 0, keys=[STRANGER]), "signed by 0")


def test_two_keys_are_needed_where_two_are_required(lab, tmp_path, device):
    (tmp_path / "second.pub").write_text(STRANGER.public.to_pem())
    shutil.rmtree(device.path)
    provision.init(
        device.path,
        lab.release(0),
        [lab.public, tmp_path / "second.pub"],
        product="camera",
        device_class="v1",
        health="none",
        threshold=2,
    )
    refused(device, CheckFailed, lab.bundle(1, 0), "signed by 1")
    assert device.apply(lab.bundle(1, 0, keys=[lab.key, STRANGER])).changed


def test_one_updates_manifest_with_anothers_payload_is_refused(lab, device, tmp_path):
    first, second = (split(lab.bundle(number, number - 1).read_bytes()) for number in (1, 2))
    for envelope, manifest, payload in (
        (first[0], first[1], second[2]),
        (first[0], second[1], second[2]),
        (second[0], first[1], first[2]),
    ):
        (tmp_path / "spliced.r1u").write_bytes(assemble(envelope, manifest, payload))
        refused(device, CheckFailed, tmp_path / "spliced.r1u")


def test_no_space_is_said_before_anything_is_written(lab, device, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    before = device.everything()
    refused(device, Unsupported, lab.bundle(1, 0), "1000 bytes free")
    assert device.everything() == before


def test_signed_factors_with_nan_are_refused(lab, device, tmp_path):
    path = lab.bundle(1, 0)
    payload = bytearray(lab.read(path).payload)
    payload[:4] = np.float32(np.nan).tobytes()
    changed = resigned(lab, path, tmp_path, payload=bytes(payload), payload_sha256=hashlib.sha256(payload).hexdigest())
    refused(device, InputError, changed, "NaN")


def test_signed_factors_in_another_order_are_caught_by_the_results_digest(lab, device, tmp_path):
    device.apply(lab.bundle(2, 0))
    path = lab.bundle(3, 2)
    first, second, third = lab.read(path).manifest.updates
    refused(device, CheckFailed, resigned(lab, path, tmp_path, updates=(second, first, third)), "SHA-256")
    assert device.apply(resigned(lab, path, tmp_path, updates=(first, second, third))).changed


def test_experts_for_rows_that_the_base_lacks_are_refused(lab, device, tmp_path):
    path = lab.bundle(1, 0)
    manifest = lab.read(path).manifest
    update = manifest.updates[0]
    last = update.experts[-1]
    moved = dataclasses.replace(last, rows=dataclasses.replace(last.rows, parameter="visual.zzz"))
    changed = dataclasses.replace(update, experts=(*update.experts[:-1], moved))
    tensors = {**manifest.tensors, "visual.zzz": "0" * 64}
    assert isinstance(moved, Experts)
    refused(device, R1ExportError, resigned(lab, path, tmp_path, updates=(changed,), tensors=tensors))


# --- signed, but not what the base and the payload give: refused in both modes alike


def with_file(lab, path, tmp_path, name, **changes):
    """The update with other members for the file `name`, signed."""
    files = tuple(
        dataclasses.replace(file, **changes) if file.path == name else file for file in lab.read(path).manifest.files
    )
    return resigned(lab, path, tmp_path, files=files)


@pytest.mark.parametrize("name", ["classes/digits.json", "preprocess.json", "visual.safetensors", "manifest.json"])
def test_a_file_that_comes_out_other_than_signed_is_refused(lab, device, tmp_path, name):
    refused(device, CheckFailed, with_file(lab, lab.bundle(1, 0), tmp_path, name, sha256="0" * 64), "SHA-256")


def test_an_overlay_takes_no_tensor_that_comes_out_other_than_signed(lab, new_devices, tmp_path):
    store = Path(shutil.copytree(new_devices["overlay"], tmp_path / "store", symlinks=True))
    path = lab.bundle(1, 0)
    for name in lab.read(path).manifest.tensors:
        tensors = {**lab.read(path).manifest.tensors, name: "0" * 64}
        refused(Device(store), CheckFailed, resigned(lab, path, tmp_path, tensors=tensors), f"{name} has SHA-256")


def test_a_part_beyond_the_end_of_the_bases_file_is_refused(lab, device, tmp_path):
    parts = {"parts": (Part("base", 1 << 20, 12),), "nbytes": 12}
    refused(device, InputError, with_file(lab, lab.bundle(1, 0), tmp_path, "preprocess.json", **parts), "too short")


def test_a_file_of_another_length_than_the_bases_is_refused(lab, device, tmp_path):
    refused(
        device,
        InputError,
        with_file(lab, lab.bundle(1, 0), tmp_path, "preprocess.json", nbytes=1),
        "should be 1 bytes",
    )


@pytest.mark.parametrize("graph", ["visual.onnx", "classify.onnx"])
def test_a_new_graph_is_refused_since_an_overlay_would_open_the_old_one(lab, device, tmp_path, graph):
    half = (lab.release(0) / graph).stat().st_size // 2
    digest = hashlib.sha256((lab.release(0) / graph).read_bytes()[:half]).hexdigest()
    changes = {"parts": (Part("base", 0, half),), "nbytes": half, "sha256": digest}
    refused(device, CheckFailed, with_file(lab, lab.bundle(1, 0), tmp_path, graph, **changes), "needs a new base")


def test_weights_made_of_parts_are_refused_since_an_overlay_would_open_the_bases(lab, device, tmp_path):
    path = lab.bundle(1, 0)
    manifest = lab.read(path).manifest
    weights = next(file for file in manifest.files if file.path == "visual.safetensors")
    parts = (Part("base", 0, weights.nbytes),)
    refused(device, CheckFailed, with_file(lab, path, tmp_path, weights.path, parts=parts), "made of parts")


# --- right signature, wrong behaviour


def test_an_unhealthy_update_is_reverted_and_given_up_after_three_tries(lab, tmp_path, device):
    shutil.rmtree(device.path)
    provision.init(device.path, lab.release(0), [lab.public], product="camera", device_class="v1", health="onnxruntime")
    device.apply(lab.bundle(1, 0))
    harmful = resigned(lab, lab.bundle(2, 1), tmp_path, health=Health(0.0, 1.0, 1.0))
    for tries in (1, 2, 3):
        refused(device, CheckFailed, harmful, "health check")
        assert list(device.store.state().tries.values()) == [tries]
    refused(device, CheckFailed, harmful, "given up")
    assert device.files() == fleet.hashes(lab.release(1))
    refused(device, CheckFailed, harmful, "health check", retry=True)
    device.apply(lab.bundle(2, 1))
    assert device.files() == fleet.hashes(lab.release(2))


def with_health(lab, device, command):
    """The device made anew with another health check."""
    shutil.rmtree(device.path)
    provision.init(device.path, lab.release(0), [lab.public], product="camera", device_class="v1", health=command)


@pytest.mark.parametrize(
    ("command", "healthy"),
    [("test -d", True), ("false", False), ("no-such-program", False), ("sh -c 'kill -9 $$'", False)],
)
def test_a_health_command_gets_the_new_version_and_decides(lab, device, command, healthy):
    with_health(lab, device, command)
    if healthy:
        assert device.apply(lab.bundle(1, 0), run=worker.run).changed
    else:
        refused(device, R1ExportError, lab.bundle(1, 0), run=worker.run)


def test_a_hanging_health_check_is_ended(lab, device, monkeypatch):
    with_health(lab, device, "sh -c 'sleep 60'")
    monkeypatch.setitem(worker.SECONDS, "health", 0.2)
    refused(device, CheckFailed, lab.bundle(1, 0), "more than 0.2 seconds", run=worker.run)


@pytest.mark.parametrize(
    ("start", "error", "message", "tries"),
    [
        ("import sys; sys.exit(2)", Unsupported, "did not start: exit code 2", []),
        ("import os; print('started', flush=True); os.kill(os.getpid(), 9)", Unsupported, "build was killed", []),
        ("import os; print('started', flush=True); os.abort()", CheckFailed, "build ended with signal 6", [1]),
    ],
)
def test_a_process_that_cannot_start_or_is_killed_is_no_try_and_one_that_crashes_is(
    lab, slot_device, monkeypatch, start, error, message, tries
):
    monkeypatch.setattr(worker, "_START", start)
    refused(slot_device, error, lab.bundle(1, 0), message, run=worker.run)
    assert list(slot_device.store.state().tries.values()) == tries


@pytest.fixture
def hanging(lab, device, tmp_path):
    """A device whose health check starts a process that hangs and waits for it; returns the file for that one's id."""
    file = tmp_path / "pid"
    with_health(lab, device, f"sh -c 'sleep 15 & echo $! > {file}.new; mv {file}.new {file}; wait'")
    return file


def test_a_hanging_health_check_is_ended_with_all_that_it_started(lab, device, hanging, monkeypatch):
    monkeypatch.setitem(worker.SECONDS, "health", 1)
    refused(device, CheckFailed, lab.bundle(1, 0), "more than 1 seconds", run=worker.run)
    assert ended(int(hanging.read_text()))


def test_an_interrupted_updater_ends_the_health_check_too(lab, device, hanging, monkeypatch):
    def communicate(process, **options):
        if process.args[0] != "sh":
            return original(process, **options)
        while not hanging.exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    original = subprocess.Popen.communicate
    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    with pytest.raises(KeyboardInterrupt):
        device.apply(lab.bundle(1, 0), run=worker.run)
    assert ended(int(hanging.read_text()))


def ended(pid):
    """Whether the process is gone, or dead and only not yet waited for."""
    for _ in range(300):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_a_health_command_does_not_get_the_lock_which_it_could_keep(lab, device):
    with_health(lab, device, "sh -c '! ls -l /proc/$$/fd | grep -q lock'")
    assert device.apply(lab.bundle(1, 0), run=worker.run).changed


# --- rollback


def test_a_rollback_below_what_an_update_allows_is_refused(lab, device):
    device.apply(lab.bundle(1, 0))
    device.apply(lab.bundle(2, 1, min_seq=2))
    before = device.everything()
    for to in (1, 0, None):
        with pytest.raises(CheckFailed, match="lowest allowed"):
            device.rollback(to)
    assert device.everything() == before


def test_a_rollback_to_what_is_not_there_names_what_is(lab, device):
    device.apply(lab.bundle(1, 0))
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        device.rollback(5)
    device.rollback(0)
    with pytest.raises(InputError, match="no version is older"):
        device.rollback()


def test_a_rollback_to_a_damaged_version_is_refused(lab, slot_device):
    device = slot_device
    device.apply(lab.bundle(1, 0))
    device.apply(lab.bundle(2, 1))
    victim = device.path / "slots" / device.store.slots()[0] / "visual.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x55")
    before = device.everything()
    with pytest.raises(CheckFailed, match="damaged"):
        device.rollback()
    assert device.everything() == before


def test_a_folder_that_holds_another_version_than_it_is_named_for_is_refused(lab, device):
    device.apply(lab.bundle(1, 0))
    device.apply(lab.bundle(2, 1))
    slots = device.path / "slots"
    names = sorted(path.name for path in slots.iterdir())
    old, new = (slots / name for name in names)
    shutil.rmtree(old)
    shutil.copytree(new, old)
    before = device.facts()
    with pytest.raises(CheckFailed, match="contains version"):
        device.rollback()
    assert device.facts() == before


def test_a_rollback_to_a_version_of_a_revoked_key_is_refused(lab, device):
    device.apply(lab.bundle(1, 0))
    device.apply(lab.bundle(2, 1))
    (path,) = (device.path / "trust").iterdir()
    path.with_name(f"{STRANGER.public.keyid}.pub").write_text(STRANGER.public.to_pem())
    path.unlink()
    before = device.everything()
    with pytest.raises(CheckFailed, match="signed by 0"):
        device.rollback()
    refused(device, CheckFailed, lab.bundle(3, 2), "signed by 0")
    assert device.everything() == before
    device.rollback(0)
    assert device.apply(lab.bundle(3, 0, keys=[STRANGER])).changed


def test_a_lost_current_link_is_healed_by_a_rollback_and_by_the_next_update(lab, device):
    device.apply(lab.bundle(1, 0))
    (device.path / "current").unlink()
    device.rollback(1)
    assert device.files() == fleet.hashes(lab.release(1))
    (device.path / "current").unlink()
    assert device.apply(lab.bundle(1, 0)).previous == ""
    assert device.files() == fleet.hashes(lab.release(1))
    (device.path / "current").unlink()
    device.apply(lab.bundle(2, 1))
    assert device.files() == fleet.hashes(lab.release(2))


def test_an_update_that_fails_where_no_version_is_current_leaves_it_so(lab, device, monkeypatch):
    device.apply(lab.bundle(1, 0))
    (device.path / "current").unlink()
    write_state, calls = install.Store.write_state, []

    def fail_second(store, state):
        calls.append(state)
        if len(calls) == 2:
            raise OSError("state.json")
        write_state(store, state)

    monkeypatch.setattr(install.Store, "write_state", fail_second)
    refused(device, Unsupported, lab.bundle(2, 1), "state.json")
    assert device.store.active == ""


# --- what is kept


def test_two_versions_are_kept_and_all_factors(lab, device):
    for number in (1, 2, 3):
        device.apply(lab.bundle(number, number - 1))
    assert [slot[:8] for slot in device.store.slots()] == ["00000002", "00000003"]
    assert len(list((device.path / "factors").iterdir())) == 3


def test_more_versions_are_kept_where_asked(lab, device):
    shutil.rmtree(device.path)
    provision.init(
        device.path, lab.release(0), [lab.public], product="camera", device_class="v1", health="none", keep=3
    )
    for number in (1, 2, 3):
        device.apply(lab.bundle(number, number - 1))
    assert len(device.store.slots()) == 3


def test_a_damaged_version_that_is_not_current_is_built_anew(lab, slot_device):
    device = slot_device
    device.apply(lab.bundle(1, 0))
    device.apply(lab.bundle(2, 1))
    device.rollback()
    victim = device.path / "slots" / device.store.slots()[1] / "visual.safetensors"
    victim.write_bytes(b"rotten")
    device.apply(lab.bundle(2, 1))
    assert fleet.hashes(device.path / "current") == fleet.hashes(lab.release(2))


def test_a_damaged_base_is_named_and_nothing_is_installed(lab, device):
    victim = device.path / "base" / "visual.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.chmod(0o644)
    victim.write_bytes(data)
    refused(device, CheckFailed, lab.bundle(1, 0), "base/visual.safetensors is damaged")


@pytest.mark.parametrize("part", ["base/visual.safetensors", "base/manifest.json", "factors/*.safetensors"])
def test_rot_on_the_device_does_not_speak_against_the_update(lab, device, part):
    device.apply(lab.bundle(1, 0))
    (victim,) = device.path.glob(part)
    data = victim.read_bytes()
    victim.chmod(0o644)
    victim.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    for _ in range(MAX_TRIES + 1):
        refused(device, R1ExportError, lab.bundle(2, 1), "damaged|not strict JSON")
    victim.write_bytes(data)
    assert device.store.state().tries == {}
    assert device.apply(lab.bundle(2, 1)).changed


def test_the_file_may_change_while_it_is_applied(lab, device, tmp_path):
    moving = tmp_path / "moving.r1u"
    shutil.copy(lab.bundle(1, 0), moving)

    def run(store, descriptor, verb, name):
        moving.write_bytes(lab.bundle(2, 0).read_bytes())
        in_this_process(store, descriptor, verb, name)

    device.apply(moving, run=run)
    assert device.files() == fleet.hashes(lab.release(1))


# --- numbers past 2 and 4 GiB


def test_a_tensor_beyond_four_gibibytes_is_merged_where_it_lies(tmp_path):
    from r1export.update.factors import ExpertUpdate, Factors, Rows
    from r1export.update.rebuild import Rebuild
    from r1export.update.release_manifest import BaseModel, FileEntry, GoldenGate, Release, ReleaseManifest, TensorEntry

    offset, weight = (4 << 30) + 8, np.arange(12, dtype="<f4").reshape(3, 4)
    with open(tmp_path / "w.safetensors", "wb") as file:  # sparse: no block is written before the tensor
        file.seek(offset)
        file.write(weight.tobytes())
    entry = TensorEntry("w.safetensors", offset, weight.dtype, weight.shape, ((0, 3),), False, "")
    files, gate = {"w.safetensors": FileEntry("", offset + weight.nbytes)}, GoldenGate(0, 1)
    manifest = ReleaseManifest("", 0, "", "", BaseModel("", ""), (), (), {}, gate, files, {"w": entry}, {})
    release = Release(tmp_path, manifest, "")
    update = ExpertUpdate({Rows("w", 0, 3): Factors(np.ones((3, 1), "f4"), np.ones((1, 4), "f4"))})
    assert np.array_equal(Rebuild(release, update).tensor("w"), weight + 1)


def test_state_never_falls():
    state = State(seq=5, digest="five", min_seq=3, clock=100)
    from types import SimpleNamespace

    older = SimpleNamespace(seq=4, min_seq=1, created=50)
    newer = SimpleNamespace(seq=6, min_seq=4, created=150)
    assert state.raised(older, "four") == state
    assert state.raised(newer, "six") == State(seq=6, digest="six", min_seq=4, clock=150)
