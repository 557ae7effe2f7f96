"""Clocks for timing a run of a graph: wall clock, processor time of one thread, and its cycles and instructions.

Other programs increase wall-clock time arbitrarily. The processor time of a thread grows only while it runs: other
programs increase it only through cache evictions. It covers all work of a session that computes in the calling thread,
as onnxruntime does on the CPU with one intra-op thread.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

WALL, PROCESSOR, CYCLES, INSTRUCTIONS = "wall clock", "processor time", "cycles", "instructions"
DECIDING = (PROCESSOR, CYCLES)  # instruction counts miss slow instructions: cache misses, subnormal numbers
EVENTS = {CYCLES: 0, INSTRUCTIONS: 1}  # PERF_COUNT_HW_CPU_CYCLES and PERF_COUNT_HW_INSTRUCTIONS of linux/perf_event.h
PERF_EVENT_OPEN = {
    "x86_64": 298,
    "aarch64": 241,
    "riscv64": 241,
    "ppc64le": 319,
    "s390x": 331,
}  # number of the system call
ATTRIBUTES = 64  # bytes of perf_event_attr in its first version, which every kernel accepts
USER_CODE_ALONE = 1 << 5 | 1 << 6  # exclude_kernel, exclude_hv: allowed without privileges for own processes


@dataclass(frozen=True)
class Clocks:
    """A set of clocks that are read together.

    `threads` is how many a session computes with while they are read, 0 for all cores. `uncounted` says why there are no
    cycles and instructions.
    """

    names: tuple[str, ...]
    threads: int = 0
    uncounted: str = ""

    @property
    def deciding(self) -> tuple[str, ...]:
        """The clocks that can decide a verdict: all except instructions, and the wall clock only if there is no other."""
        return tuple(name for name in self.names if name in DECIDING) or self.names


@dataclass(frozen=True)
class Meter:
    """Reads `clocks`; a budget is kept by `elapsed` seconds."""

    clocks: Clocks
    read: Callable[[], tuple[float, ...]]
    elapsed: Callable[[], float]


def wall_clock() -> Meter:
    """The wall clock alone, in seconds."""
    return Meter(Clocks((WALL,)), lambda: (time.perf_counter(),), lambda: time.perf_counter())


@contextmanager
def thread_clocks() -> Iterator[Meter]:
    """Seconds of processor time of the calling thread; cycles and instructions of its own code where they can be counted."""
    files: dict[str, int] = {}
    reason = ""
    try:
        for name, event in EVENTS.items():
            files[name] = _open_counter(event)
    except OSError as error:
        reason = error.strerror or str(error)
    counters = tuple(files.values()) if len(files) == len(EVENTS) else ()
    try:
        if not all(map(_counts, counters)):
            counters, reason = (), "the hardware counters of this machine don't count"
        clocks = Clocks((PROCESSOR, *(EVENTS if counters else ())), 1, reason)
        yield Meter(clocks, lambda: (time.thread_time(), *map(_count, counters)), time.process_time)
    finally:
        for file in files.values():
            os.close(file)


def _open_counter(event: int) -> int:
    """A file that counts a hardware event of the calling thread in user code. Raises OSError with what the kernel says."""
    number = PERF_EVENT_OPEN.get(platform.machine())
    if platform.system() != "Linux" or number is None:
        raise OSError(0, f"there is no perf_event_open on {platform.system()} {platform.machine()}")
    attributes = ctypes.create_string_buffer(ATTRIBUTES)
    struct.pack_into("=IIQ", attributes, 0, 0, ATTRIBUTES, event)  # type PERF_TYPE_HARDWARE, size, config
    struct.pack_into("=Q", attributes, 40, USER_CODE_ALONE)
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    this_thread, any_cpu, no_group, no_flags = (ctypes.c_long(value) for value in (0, -1, -1, 0))
    file = library.syscall(ctypes.c_long(number), attributes, this_thread, any_cpu, no_group, no_flags)
    if file < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"perf_event_open: {os.strerror(code)}")
    return int(file)


def _count(file: int) -> float:
    (count,) = struct.unpack("=Q", os.read(file, 8))
    return float(count)


def _counts(file: int) -> bool:
    """Whether a counter moves: some virtual machines have counters that do not."""
    before = _count(file)
    return _count(file) > before
