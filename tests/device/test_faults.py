"""Kills, full disks, input-output errors and power cuts at every step: the old version or the new one, never a mixture.

R1EXPORT_SWEEP=full hits every call with every fault (two minutes); otherwise every tenth case is tried.
"""

import dataclasses
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from device import fleet, powercut, strace

from r1export.device.doctor import doctor
from r1export.device.state import read_state
from r1export.device.version import open_version
from r1export.errors import InputError

STEP = 1 if os.environ.get("R1EXPORT_SWEEP") == "full" else 10
FAULTS = ("signal=SIGKILL", "error=ENOSPC", "error=EIO")
pytestmark = pytest.mark.skipif(
    not strace.available(), reason="strace is not installed or may not trace (apt-get install strace)"
)


@pytest.fixture
def updated(lab, device, tmp_path):
    """A device at version 1, and the calls that took its copy to version 2."""
    device.apply(lab.bundle(1, 0))
    new = copy(device, tmp_path / "new")
    return device, new, strace.record(new.path, lab.bundle(2, 1), tmp_path / "log")


def copy(device, path):
    shutil.copytree(device.path, path, symlinks=True)
    return dataclasses.replace(device, path=path)


# --- one call of the operating system fails, or the process is killed in it


def test_every_call_may_fail_or_be_the_last(lab, updated, tmp_path, capsys):
    old, _, calls = updated
    cases = [(call, fault) for call in calls for fault in FAULTS][::STEP]
    versions = {number: fleet.hashes(lab.release(number)) for number in (1, 2)}

    def violations(number):
        call, fault = cases[number]
        device = copy(old, tmp_path / f"case-{number}")
        code = strace.inject(device.path, lab.bundle(2, 1), call, fault)
        found = list(check(device, code, fault))
        shutil.rmtree(device.path)
        return [f"{call.name} {call.number} {fault}: {text}" for text in found]

    def check(device, code, fault):
        found = device.files()
        active = next((number for number, files in versions.items() if files == found), None)
        if active is None:
            yield "mixed"
        if fault == "signal=SIGKILL":
            if code == 0:
                yield "was not killed"
        elif (code == 0) != (active == 2):
            yield f"exit code {code} with version {active}"
        elif code not in (0, 3):
            yield f"exit code {code}"
        device.apply(lab.bundle(2, 1))
        if device.files() != versions[2]:
            yield "the next update does not work"
        if faults := [finding for finding in doctor(device.path) if finding.fault]:
            yield f"left behind: {faults}"

    with ThreadPoolExecutor(2) as pool:
        found = [text for texts in pool.map(violations, range(len(cases))) for text in texts]
    with capsys.disabled():
        print(
            f"[{len(cases)} of {len(calls) * len(FAULTS)} faults in {len(calls)} calls, {len(found)} violations]",
            end=" ",
        )
    assert found == []
    assert len(cases) >= 8


# --- the power goes, and with it what was not synced


class Rules:
    """What must hold in every state that a power cut can leave."""

    def __init__(self, old, new, scratch):
        self.scratch, self.records = scratch, {}
        self.trees = {name: tree(device.path) for name, device in (("old", old), ("new", new))}
        self.factors = {
            1: {path.name for path in (old.path / "factors").iterdir()},
            2: {path.name for path in (new.path / "factors").iterdir()},
        }

    def violation(self, state, tried, done) -> str:
        """The first rule that does not hold, or nothing. `tried`: the try was recorded; `done`: success was reported."""
        slots, target = state["slots"], state["current"]
        names = {name: found["current"].split("/")[-1] for name, found in self.trees.items()}
        active = next((name for name in ("old", "new") if target == f"slots/{names[name]}"), "")
        known = {**self.trees["old"]["slots"], **self.trees["new"]["slots"]}
        if any(content != known.get(name) for name, content in slots.items() if not name.startswith(".")):
            return "what bears the name of a version is not whole"
        if not active or slots.get(names[active]) != self.trees[active]["slots"][names[active]]:
            return "the current version is not whole"
        wanted = self.trees[active]["factors"]
        if any(state["factors"].get(name) != data for name, data in wanted.items()):
            return "factors of the current version are lost"
        record = self.record(state.get("state.json", b""))
        if record is None:
            return "state.json is not readable"
        if tried and not record.tries and record.seq < 2:
            return "a try is forgotten"
        if done and (active != "new" or record.seq < 2):
            return "an update that was reported is lost"
        return ""

    def record(self, data):
        if data not in self.records:
            (self.scratch / "state.json").write_bytes(data)
            try:
                self.records[data] = read_state(self.scratch / "state.json")
            except InputError:
                self.records[data] = None
        return self.records[data]


def tree(path):
    return powercut._freeze(powercut._load(path), {}, -1)


def violations(rules, old, new, calls, kinds=strace.MUTATING, *, installs=True):
    """(call, rule) for every state after every call of these kinds, and after the last, in which a rule does not hold."""
    disk = powercut.Disk(new.path)
    disk.root = powercut._load(old.path)
    for position, call in enumerate(calls):
        disk.apply(call)
        tried = any(earlier.name == "mkdir" for earlier in calls[:position])  # building has begun
        last = position == len(calls) - 1
        for state in disk.states() if call.name in kinds or last else ():
            if found := rules.violation(state, tried, last and installs):
                yield f"{call.name} {call.number}", found


def test_no_power_cut_leaves_anything_but_the_old_or_the_new_version(lab, updated, tmp_path):
    old, new, calls = updated
    assert list(violations(Rules(old, new, tmp_path), old, new, calls)) == []


def last_rename_to(calls, name):
    return [call for call in calls if call.name == "rename" and call.strings[-1].endswith(name)][-1]


def test_no_power_cut_harms_an_update_that_fails_after_the_switch(lab, updated, tmp_path):
    old, new, calls = updated
    failed = copy(old, tmp_path / "failed")
    fault = strace.fail(last_rename_to(calls, b"/state.json"), "error=EIO")
    calls = strace.record(failed.path, lab.bundle(2, 1), tmp_path / "failed.log", fault, code=3)
    assert failed.facts() == old.facts()
    assert any(call.name == "symlink" and b"slots/00000002" in call.strings[0] for call in calls)
    found = {rule for _, rule in violations(Rules(old, new, tmp_path), old, failed, calls, installs=False)}
    assert found <= {"a try is forgotten"}  # which a failing disk gives back
    back = calls.index(last_rename_to(calls, b"/current"))
    syncing = next(call for call in calls[back:] if call.name == "fsync")
    killed = copy(old, tmp_path / "killed")
    fault += strace.fail(syncing, "signal=SIGKILL")
    first = strace.record(killed.path, lab.bundle(2, 1), tmp_path / "killed.log", fault, code=-9)
    second = strace.record(killed.path, lab.bundle(2, 1), tmp_path / "killed.log")
    assert killed.store.current[:8] == "00000002"
    assert list(violations(Rules(old, new, tmp_path), old, killed, [*first, *second])) == []


def test_no_power_cut_harms_a_version_that_is_no_longer_kept(lab, updated, tmp_path):
    _, old, _ = updated
    new = copy(old, tmp_path / "newest")
    calls = strace.record(new.path, lab.bundle(3, 2), tmp_path / "newest.log")
    assert len(new.store.slots()) == 2
    assert list(violations(Rules(old, new, tmp_path), old, new, calls)) == []


def test_no_power_cut_harms_a_second_try_after_a_kill(lab, updated, tmp_path):
    old, new, calls = updated
    rules = Rules(old, new, tmp_path)
    renames = [call for call in calls if call.name == "rename"]
    for number, call in enumerate(renames):
        after = next(later for later in calls[calls.index(call) + 1 :])
        device = copy(old, tmp_path / f"killed-{number}")
        log = tmp_path / "killed.log"
        first = strace.record(device.path, lab.bundle(2, 1), log, strace.fail(after, "signal=SIGKILL"), code=-9)
        second = strace.record(device.path, lab.bundle(2, 1), log)
        assert list(violations(rules, old, device, [*first, *second])) == [], call.strings
    assert len(renames) >= 5


def flat(tree, folder=""):
    """Content of every file of a tree that is not hidden, by path."""
    files = {}
    for name, node in tree.items():
        if isinstance(node, dict):
            files |= flat(node, f"{folder}{name}/")
        elif not name.startswith("."):
            files[folder + name] = node
    return files


def test_a_power_cut_during_a_repair_leaves_each_file_as_it_was_or_as_it_should_be(lab, device, tmp_path):
    device.apply(lab.bundle(1, 0))
    slot = device.store.current
    right = flat(tree(device.path)["slots"][slot])
    for name in list(right)[::2]:
        (device.path / "slots" / slot / name).write_bytes(b"rot")
    old = copy(device, tmp_path / "old")
    damaged = flat(tree(old.path)["slots"][slot])
    calls = strace.record(device.path, lab.bundle(1, 0), tmp_path / "log")
    disk, states = powercut.Disk(device.path), []
    disk.root = powercut._load(old.path)
    for call in calls:
        disk.apply(call)
        states = list(disk.states())
        for state in states:
            files = flat(state["slots"][slot])
            assert set(files) == set(right), call
            assert all(files[name] in (right[name], damaged[name]) for name in files), call
            assert state["current"] == f"slots/{slot}"
    assert all(flat(state["slots"][slot]) == right for state in states)
    assert damaged != right


INIT = """
import sys
from pathlib import Path
from r1export.device import provision
provision.init(Path(sys.argv[1]), Path(sys.argv[2]), [Path(sys.argv[3])], health="none")
"""


def test_a_new_store_is_there_whole_or_not_at_all_after_a_power_cut(lab, tmp_path):
    shop, base = tmp_path / "shop", tmp_path / "base"
    shop.mkdir()
    shutil.copytree(lab.release(0), base)
    document = json.loads((base / "manifest.json").read_text())
    (base / "tokenizer" / "vocabulary").mkdir(parents=True)
    shutil.copy(base / "preprocess.json", base / "tokenizer" / "vocabulary" / "deep.json")
    document["files"]["tokenizer/vocabulary/deep.json"] = document["files"]["preprocess.json"]
    (base / "manifest.json").write_text(json.dumps(document))
    line = [strace.sys.executable, "-B", "-c", INIT, str(shop / "store"), str(base), str(lab.public)]
    calls = strace.trace(line, shop, tmp_path / "log")
    disk, seen = powercut.Disk(shop), 0
    disk.root = powercut.Folder()
    whole = tree(shop)["store"]
    for call in calls:
        disk.apply(call)
        for state in disk.states():
            assert state.get("store", whole) == whole, call
            seen += "store" in state
    assert seen >= 2


def test_each_fsync_is_needed(lab, updated, tmp_path):
    old, new, calls = updated
    rules = Rules(old, new, tmp_path)
    syncs = [position for position, call in enumerate(calls) if call.name == "fsync"]
    for position in syncs:
        without = [*calls[:position], nothing(calls[position]), *calls[position + 1 :]]
        found = next(violations(rules, old, new, without, kinds=["rename"]), None)
        assert found, f"without fsync {calls[position].number} of {calls[position].path} nothing is lost"
    assert len(syncs) >= 8


def nothing(call):
    return dataclasses.replace(call, name="chmod")


def test_a_device_goes_on_after_a_power_cut(lab, updated, tmp_path):
    old, new, calls = updated
    disk = powercut.Disk(new.path)
    disk.root = powercut._load(old.path)
    states = []
    for call in calls:
        disk.apply(call)
        states += list(disk.states())
    for number, state in enumerate(states[:: max(1, len(states) // 25)]):
        powercut.write_tree(state, tmp_path / f"cut-{number}")
        device = dataclasses.replace(old, path=tmp_path / f"cut-{number}")
        assert open_version(device.path).name in ("01-digits", "02-shapes")
        device.apply(lab.bundle(2, 1))
        assert device.files() == fleet.hashes(lab.release(2))
        assert [finding for finding in doctor(device.path) if finding.fault] == []


def test_three_crashes_in_a_row_give_an_update_up(lab, device):
    device.apply(lab.bundle(1, 0))
    call = strace.Call("symlink", 1, (), "", "")
    codes = [strace.inject(device.path, lab.bundle(2, 1), call, "signal=SIGKILL") for _ in range(3)]
    assert all(codes)
    assert json.loads((device.path / "state.json").read_text())["state"]["pending"]
    process = strace.subprocess.run(strace.command(device.path, lab.bundle(2, 1)), capture_output=True, text=True)
    assert process.returncode == 1
    assert "given up" in process.stdout
    assert device.files() == fleet.hashes(lab.release(1))
