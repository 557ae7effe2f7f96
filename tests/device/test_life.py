"""Any sequence of deliveries, kills, rollbacks, rot and wrong clocks: the current version is always whole and never one too old."""

import dataclasses
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from device import fleet
from device.steps import in_this_process
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from r1export.device import install
from r1export.errors import R1ExportError

CREATED = 1_800_000_000


class Killed(BaseException):
    """The process is gone: no handler of the program runs after it."""


@pytest.mark.parametrize("mode", ["slot", "overlay"])
def test_a_devices_life(lab, new_devices, slot_device, mode):
    files = {number: fleet.hashes(lab.release(number)) for number in range(4)}
    bundles = [(release, since, lab.bundle(release, since)) for release in (1, 2, 3) for since in range(release + 1)]
    rotten = lab.folder / "rotten.r1u"
    rotten.write_bytes(bundles[0][2].read_bytes()[:-1] + b"\xff")

    class Life(RuleBasedStateMachine):
        @initialize()
        def begin(self):
            self.folder = Path(tempfile.mkdtemp())
            shutil.copytree(new_devices[mode], self.folder / "store", symlinks=True)
            self.device = dataclasses.replace(slot_device, path=self.folder / "store")
            self.version, self.highest = 0, 0

        @rule(which=st.sampled_from(bundles), now=st.sampled_from([0, CREATED, CREATED + 10**9]))
        def deliver(self, which, now):
            release, since, bundle = which
            held = {path.name for path in (self.device.path / "factors").iterdir()}
            try:
                outcome = self.device.apply(bundle, now=now)
            except R1ExportError:
                assert release <= self.highest or len(held) < since
                return
            assert outcome.changed or self.version == release
            assert release >= self.highest
            self.version = self.highest = release

        @rule()
        def deliver_rot(self):
            with pytest.raises(R1ExportError):
                self.device.apply(rotten)

        @rule(which=st.sampled_from(bundles), step=st.sampled_from(["build", "health", "switch", "write_state"]))
        def be_killed(self, which, step):
            # a kill is an exit without handlers: copy the store as it is at that moment
            frozen = self.folder / "frozen"

            def freeze():
                shutil.copytree(self.device.path, frozen, symlinks=True)
                raise Killed

            def run(store, descriptor, verb, name):
                in_this_process(store, descriptor, verb, name)
                if verb == step:
                    freeze()

            with pytest.MonkeyPatch.context() as patch:
                if step not in ("build", "health"):
                    original, calls = getattr(install.Store, step), []

                    def wrapped(store, *arguments):
                        original(store, *arguments)
                        calls.append(1)
                        if step == "switch" or len(calls) == 2:
                            freeze()

                    patch.setattr(install.Store, step, wrapped)
                with suppress(Killed, R1ExportError):
                    self.device.apply(which[2], run=run)
            if frozen.exists():
                shutil.rmtree(self.device.path)
                frozen.rename(self.device.path)
            current = self.device.store.current
            self.version = 0 if current == "base" else int(current[:8])
            self.highest = max(self.highest, self.version, self.device.store.state().seq)

        @rule(to=st.integers(0, 3))
        def roll_back(self, to):
            try:
                self.device.rollback(to)
            except R1ExportError:
                return
            self.version = to

        @rule()
        def lose_state(self):
            (self.device.path / "state.json").unlink(missing_ok=True)
            self.highest = self.device.store.state().seq

        @invariant()
        def the_current_version_is_whole(self):
            if hasattr(self, "device"):
                assert self.device.files() == files[self.version]
                assert self.device.store.state().seq >= self.version

        def teardown(self):
            if hasattr(self, "folder"):
                shutil.rmtree(self.folder)

    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=10,
            stateful_step_count=10,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
