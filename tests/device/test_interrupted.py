"""An update that was interrupted or failed: nothing of it counts unless it became current, and nothing of it stays."""

import errno
import os
import shutil

import pytest
from device import fleet
from device.steps import in_this_process

from r1export.device import install
from r1export.device.doctor import doctor, status
from r1export.errors import CheckFailed, InputError, Unsupported


class Killed(BaseException):
    """The process is gone: what its handlers would still have done is undone by `killed`."""


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """Apply a bundle in a process that dies right after `step`: a step of the worker, or a method of the store."""

    def killed(device, bundle, step):
        frozen = tmp_path / "frozen"

        def die():
            shutil.copytree(device.path, frozen, symlinks=True)
            raise Killed

        def run(store, descriptor, verb, name):
            in_this_process(store, descriptor, verb, name)
            if verb == step:
                die()

        with monkeypatch.context() as patch:
            if step == "switch":
                original = install.Store.switch
                patch.setattr(install.Store, step, lambda store, slot: (original(store, slot), die()))
            with pytest.raises(Killed):
                device.apply(bundle, run=run)
        shutil.rmtree(device.path)
        frozen.rename(device.path)

    return killed


@pytest.fixture
def used(lab, device):
    """A device that went from version 1 to version 2."""
    device.apply(lab.bundle(1, 0))
    device.apply(lab.bundle(2, 1))
    return device


def unhealthy(store, descriptor, verb, name):
    if verb == "health":
        raise CheckFailed("health check: too far off")
    in_this_process(store, descriptor, verb, name)


# --- killed before it became current


def test_an_update_that_was_killed_before_it_became_current_forbids_nothing(lab, used, killed):
    killed(used, lab.bundle(3, 2, min_seq=3), "health")
    assert (status(used.path).highest_seq, status(used.path).min_seq) == (2, 0)
    with pytest.raises(CheckFailed, match="too far off"):
        used.apply(lab.bundle(3, 2, min_seq=3), run=unhealthy)
    assert [slot[:8] for slot in used.store.slots()] == ["00000001", "00000002"]
    assert (used.store.state().seq, used.store.state().min_seq) == (2, 0)
    used.rollback(1)
    assert used.files() == fleet.hashes(lab.release(1))


def test_another_update_after_a_kill_finds_a_clean_store(lab, used, killed):
    killed(used, lab.bundle(3, 2, min_seq=3), "health")
    used.apply(lab.bundle(1, 2, seq=4))
    assert [slot[:8] for slot in used.store.slots()] == ["00000002", "00000004"]
    assert used.store.state().min_seq == 0


def test_a_version_that_never_became_current_cannot_be_chosen(lab, used, killed):
    killed(used, lab.bundle(3, 2), "health")
    assert [name[:8] for name in status(used.path).versions] == ["base", "00000001", "00000002"]
    with pytest.raises(InputError, match=r"version 3 is not on this device"):
        used.rollback(3)
    assert [slot[:8] for slot in used.store.slots()] == ["00000001", "00000002"]


def test_doctor_names_what_a_killed_update_left(lab, used, killed):
    killed(used, lab.bundle(3, 2), "health")
    (finding,) = [finding for finding in doctor(used.path) if finding.fault]
    assert finding.name == "leftovers"
    assert "slots/00000003-" in finding.fault


def test_an_installed_version_outlives_a_kill_while_it_is_applied_again(lab, used, killed):
    used.rollback()
    killed(used, lab.bundle(2, 1), "health")
    assert used.store.state().seq == 2
    used.rollback(2)
    assert used.files() == fleet.hashes(lab.release(2))


def test_a_version_that_became_current_counts_though_it_was_not_recorded(lab, used, killed):
    killed(used, lab.bundle(3, 2, min_seq=3), "switch")
    assert (status(used.path).highest_seq, status(used.path).min_seq) == (3, 3)
    with pytest.raises(CheckFailed, match="lowest allowed"):
        used.rollback(2)
    assert used.files() == fleet.hashes(lab.release(3))


def test_versions_count_as_before_where_state_json_is_lost(lab, used):
    used.rollback()
    (used.path / "state.json").unlink()
    assert used.store.state().seq == 2


# --- killed after it became current


def test_applying_it_again_closes_the_account_of_an_update_that_runs(lab, used, killed):
    killed(used, lab.bundle(3, 2), "switch")
    assert status(used.path).interrupted
    assert not used.apply(lab.bundle(3, 2)).changed
    assert (status(used.path).interrupted, status(used.path).failed) == ("", {})
    assert status(used.path).highest_seq == 3


def test_a_rollback_to_what_is_current_closes_the_account_too(lab, used, killed):
    killed(used, lab.bundle(3, 2), "switch")
    assert not used.rollback(3).changed
    assert (status(used.path).interrupted, status(used.path).failed) == ("", {})


# --- failed, and going back failed too


@pytest.fixture
def full(monkeypatch):
    """A disk that has no room for a record of success, nor for a link."""

    def write_state(store, state):
        if not state.pending:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "state.json")
        original(store, state)

    switched = []

    def switch(store, slot):
        if switched:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "current")
        switched.append(slot)
        switch_once(store, slot)

    original, switch_once = install.Store.write_state, install.Store.switch
    with monkeypatch.context() as patch:
        patch.setattr(install.Store, "write_state", write_state)
        patch.setattr(install.Store, "switch", switch)
        yield patch


def test_an_update_that_can_be_neither_recorded_nor_taken_back_says_which_version_is_current(lab, used, full):
    with pytest.raises(Unsupported, match=r"version 00000003-\w+ is current.*No space left") as caught:
        used.apply(lab.bundle(3, 2))
    assert "run the same command again" in caught.value.remedy
    assert used.files() == fleet.hashes(lab.release(3))
    full.undo()
    assert not used.apply(lab.bundle(3, 2)).changed
    assert (status(used.path).interrupted, status(used.path).failed) == ("", {})
    assert [finding for finding in doctor(used.path) if finding.fault] == []


def test_a_rollback_that_can_be_neither_recorded_nor_taken_back_says_which_version_is_current(lab, used, full):
    with pytest.raises(Unsupported, match=r"version 00000001-\w+ is current"):
        used.rollback(1)
    full.undo()
    assert not used.rollback(1).changed
    assert used.files() == fleet.hashes(lab.release(1))


def test_what_cannot_be_removed_is_removed_by_the_next_update(lab, used, monkeypatch):
    def retire(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(install, "retire", retire)
        with pytest.raises(CheckFailed, match="too far off"):
            used.apply(lab.bundle(3, 2, min_seq=3), run=unhealthy)
    assert (status(used.path).highest_seq, status(used.path).min_seq) == (2, 0)
    used.rollback(1)
    assert [slot[:8] for slot in used.store.slots()] == ["00000001", "00000002"]
