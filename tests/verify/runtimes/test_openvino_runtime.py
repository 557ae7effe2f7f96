"""OpenVINO on real graphs: it gives what onnxruntime gives, from the same files, and talks to nobody."""

import subprocess
import sys

import numpy as np
import pytest
from verify.small import WIDTH, weights_of

from r1export.errors import CheckFailed, Unsupported
from r1export.verify.latency import Contenders, TimingBudget, added_latency
from r1export.verify.runtimes import openvino_runtime
from r1export.verify.runtimes.runtime import PROVIDERS, check_provider, job, open_session, runner

QUIET = """
import os, sys, time
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.fork", "os.mkdir"):
        os.write(2, f"{event} {arguments}".encode())
        os._exit(9)  # from whatever thread
sys.addaudithook(watch)
from pathlib import Path
from r1export.verify.runtimes.openvino_runtime import compile_graph
compile_graph(Path(sys.argv[1]))
time.sleep(0.3)
"""


def test_it_gives_what_onnxruntime_gives_at_every_batch(write_graph) -> None:
    graph = write_graph("base")
    one, other = (runner(open_session(graph, provider=provider)) for provider in ("cpu", "openvino"))
    for n in (1, 2, 5, 16):
        x = {"x": np.random.default_rng(n).normal(size=(n, WIDTH)).astype(np.float32)}
        assert np.abs(one(x) - other(x)).max() < 1e-5  # float32 rounding of values of order one through a norm


def test_it_reads_the_weights_that_lie_beside_the_graph(write_graph, x) -> None:
    base, release = write_graph("base"), write_graph("release", weights_of(7))
    assert base.read_bytes() == release.read_bytes()
    one, other = (runner(open_session(graph, provider="openvino"))(x) for graph in (base, release))
    assert np.abs(one - other).max() > 1e-2
    assert np.abs(other - runner(open_session(release))(x)).max() < 1e-5


def test_it_computes_in_float32_with_as_many_threads_as_asked(write_graph) -> None:
    model = openvino_runtime.compile_graph(write_graph("base"), threads=1)
    assert model.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert model.get_property("INFERENCE_NUM_THREADS") == 1
    assert PROVIDERS["openvino"].levels == ("all",)


def test_importing_and_compiling_opens_no_connection_and_starts_no_process(write_graph) -> None:
    done = subprocess.run([sys.executable, "-c", QUIET, write_graph("base")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_it_refuses_is_a_failed_check_in_one_line(write_graph, tmp_path) -> None:
    with pytest.raises(CheckFailed, match=r"OpenVINO rejects the model: .*Could not open the file"):
        open_session(tmp_path / "none.onnx", provider="openvino")
    run = runner(open_session(write_graph("baked", batch=1), provider="openvino"))
    with pytest.raises(CheckFailed, match=r"fails to run x \[2, 6\]: Can't set the input tensor"):
        run({"x": np.zeros((2, WIDTH), np.float32)})


def test_weights_that_are_missing_or_cut_short_are_a_failed_check(write_graph) -> None:
    graph = write_graph("base")
    weights = graph.parent / "visual.safetensors"
    for data in (weights.read_bytes()[:-8], None):
        weights.unlink() if data is None else weights.write_bytes(data)
        with pytest.raises(CheckFailed, match="OpenVINO rejects the model"):
            open_session(graph, provider="openvino")


def test_without_it_the_remedy_is_named_and_nothing_else_steps_in(write_graph, monkeypatch) -> None:
    monkeypatch.setattr(openvino_runtime, "installed", lambda: False)
    with pytest.raises(Unsupported, match=r"pip install r1export\[openvino\]"):
        check_provider("openvino")
    with pytest.raises(Unsupported):
        open_session(write_graph("base"), provider="openvino")


def test_base_and_release_are_timed_in_pairs(write_graph, x) -> None:
    base, release = (
        lambda graph=graph: job(open_session(graph, provider="openvino"), x, "openvino")
        for graph in (write_graph("base"), write_graph("release", weights_of(7)))
    )
    latency = added_latency(Contenders("OpenVINO", base, {"01": release}), 20, 0.9, TimingBudget(patience=0.0))["01"]
    assert latency.providers["OpenVINO"]["1"]["merged"].median_ms > 0
    assert 0.1 < latency.ratio < 10  # plausible; how fast it is says nothing about the code
