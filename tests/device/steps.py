"""The steps of an update without a fresh process for each: the rules are the same, and tests are many."""

from r1export.device.store import Store
from r1export.device.worker import STEPS


def in_this_process(device: Store, _: int, verb: str, name: str) -> None:
    """What `worker.run` does, here."""
    if verb == "build" or device.config.health != "none":
        STEPS[verb](device, name)
