"""Several processes at one store: updaters side by side, and an application that reads while versions change."""

import os
import subprocess
import sys
import threading
from pathlib import Path

from device import fleet

from r1export.device.version import open_version

MANY = 50 if os.environ.get("R1EXPORT_SWEEP") == "full" else 12
UPDATER = f"""
import sys
from pathlib import Path
sys.path.append({str(Path(__file__).parents[1])!r})
from device.steps import in_this_process
from r1export.device import install
store, bundle = map(Path, sys.argv[1:])
print(install.apply(store, bundle, now=1_800_000_000, run=in_this_process).changed)
"""


def updater(device, bundle):
    return subprocess.Popen(
        [sys.executable, "-c", UPDATER, device.path, bundle], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_of_many_updaters_at_once_one_installs_and_the_others_see_it(lab, slot_device):
    processes = [updater(slot_device, lab.bundle(1, 0)) for _ in range(MANY)]
    answers = [process.communicate()[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * MANY
    assert sorted(answers) == ["False"] * (MANY - 1) + ["True"]
    assert fleet.hashes(slot_device.path / "current") == fleet.hashes(lab.release(1))


def test_many_different_updaters_leave_one_whole_version(lab, slot_device):
    bundles = [lab.bundle(number, 0) for number in (1, 2, 3)] * 3
    processes = [updater(slot_device, bundle) for bundle in bundles]
    for process in processes:
        process.communicate()
    assert slot_device.files() == fleet.hashes(lab.release(3))
    assert slot_device.store.state().seq == 3


def test_an_application_always_sees_one_whole_version(lab, device):
    known = [fleet.hashes(lab.release(number)) for number in range(4)]
    for number in (1, 2):
        device.apply(lab.bundle(number, number - 1))
    seen, wrong, stop = set(), [], threading.Event()

    def read():
        while not stop.is_set():
            version = open_version(device.path)
            found = device_files(version)
            seen.add(version.name)
            if found not in known:
                wrong.append(version.name)

    reader = threading.Thread(target=read)
    reader.start()
    for switch in range(20):
        device.rollback(1 + switch % 2)
    stop.set()
    reader.join()
    assert wrong == []
    assert seen <= {"01-digits", "02-shapes"}


def device_files(version):
    import hashlib

    return {path: hashlib.sha256(version.read(path)).hexdigest() for path in version.paths}
