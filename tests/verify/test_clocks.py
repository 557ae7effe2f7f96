"""Clocks that count what a thread computes, and a process that times graphs by them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import asdict

import numpy as np
import pytest

from r1export.errors import CheckFailed
from r1export.verify import clocks
from r1export.verify import steady_timing as steady_timing_module
from r1export.verify.clocks import CYCLES, INSTRUCTIONS, PROCESSOR, Clocks, thread_clocks, wall_clock
from r1export.verify.latency import Precision, TimingBudget
from r1export.verify.steady_timing import steady_timing

SHORT = TimingBudget(blocks=3, patience=0.0)


def test_processor_time_stands_still_while_a_thread_sleeps_and_while_others_compute() -> None:
    with thread_clocks() as meter:
        before = meter.read()[0]
        other = threading.Thread(target=lambda: sum(range(10**6)))
        other.start()
        other.join()
        time.sleep(0.05)
        assert meter.read()[0] - before < 0.02


def test_a_kernel_that_counts_nothing_leaves_processor_time_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: int) -> int:
        raise OSError(2, "perf_event_open: No such file or directory")

    monkeypatch.setattr(clocks, "_open_counter", refused)
    with thread_clocks() as meter:
        assert meter.clocks == Clocks((PROCESSOR,), 1, "perf_event_open: No such file or directory")


def test_counters_that_stand_still_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "_open_counter", lambda _: os.open(os.devnull, os.O_RDONLY))
    monkeypatch.setattr(clocks, "_count", lambda _: 0.0)
    with thread_clocks() as meter:
        assert meter.clocks == Clocks((PROCESSOR,), 1, "the hardware counters of this machine don't count")


def test_cycles_and_instructions_are_read_next_to_processor_time_where_they_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = iter(range(100))
    monkeypatch.setattr(clocks, "_open_counter", lambda _: os.open(os.devnull, os.O_RDONLY))
    monkeypatch.setattr(clocks, "_count", lambda _: float(next(counts)))
    with thread_clocks() as meter:
        assert meter.clocks == Clocks((PROCESSOR, CYCLES, INSTRUCTIONS), 1)
        assert len(meter.read()) == 3


def test_the_wall_clock_decides_where_there_is_no_other() -> None:
    assert wall_clock().clocks.deciding == wall_clock().clocks.names


def test_graphs_are_timed_in_a_process_of_their_own_by_processor_time_of_one_thread(write_graph, x) -> None:
    graph, blocks = write_graph("base"), []
    readings = steady_timing({"base": graph, "merged": graph}, x)(Precision(12, 1.0), SHORT, lambda: blocks.append(1))
    assert readings.clocks.names[0] == PROCESSOR
    assert readings.clocks.threads == 1
    assert set(readings.counts) == {"base", "again", "merged"}
    assert len(blocks) == SHORT.blocks == len(readings.counts["base"])
    assert all((values > 0).all() for values in readings.by(PROCESSOR).values())


@pytest.mark.parametrize("bindable", [True, False])
def test_long_runs_are_timed_at_the_same_time_where_threads_can_be_bound(
    bindable: bool, write_graph, x, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways, timed = [], steady_timing_module.measure

    def recorded(*arguments):
        ways.append(arguments[-1])
        return timed(*arguments)

    monkeypatch.setattr(steady_timing_module, "measure", recorded)
    monkeypatch.setattr(steady_timing_module, "can_bind", lambda: bindable)
    graphs = dict.fromkeys(("base", "again", "merged"), str(write_graph("base")))
    request = {"graphs": graphs, "controls": [], "wanted": asdict(Precision(12, 1.0)), "budget": asdict(SHORT)}
    (tmp_path / steady_timing_module.REQUEST).write_text(json.dumps(request))
    np.savez(tmp_path / steady_timing_module.FEEDS, **x)
    assert steady_timing_module.main(tmp_path) == 0
    assert [way is not None for way in ways] == [bindable]


def test_a_graph_that_cannot_be_timed_is_one_line(tmp_path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    measure = steady_timing({"base": tmp_path / "broken.onnx", "merged": tmp_path / "broken.onnx"}, {"x": np.zeros(1)})
    with pytest.raises(CheckFailed, match=r"timing the graphs failed: .*rejects the model"):
        measure(Precision(12, 1.0), SHORT, lambda: None)


def test_a_timing_that_is_interrupted_takes_its_process_along(write_graph, x, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(KeyboardInterrupt):
        """As command.py raises it on SIGTERM."""

    def interrupt() -> None:
        raise Interrupted

    graph = write_graph("base")
    children, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kwargs: children.append(popen(*args, **kwargs)) or children[-1]
    )
    endless = TimingBudget(blocks=100_000, patience=0.0)
    with pytest.raises(Interrupted):
        steady_timing({"base": graph, "merged": graph}, x)(Precision(100_000, 1.0), endless, interrupt)
    assert [child.returncode for child in children] == [-signal.SIGKILL]
