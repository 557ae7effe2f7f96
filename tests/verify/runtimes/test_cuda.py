"""The CUDA provider on real graphs: parity, bound inputs and outputs, paired latency, fp16. Skips where there is no device."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from verify.small import weights_of

from r1export.verify.latency import Contenders, TimingBudget, added_latency
from r1export.verify.proof import execute_graphs, prove
from r1export.verify.results import Check
from r1export.verify.runtimes.runtime import PROVIDERS, job, open_session, runner

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="onnxruntime without CUDA"),
]
HALF = (
    helper.make_node("Cast", ["normed"], ["half"], to=TensorProto.FLOAT16),
    helper.make_node("Mul", ["half", "half"], ["square"]),
    helper.make_node("Cast", ["square"], ["embeds"], to=TensorProto.FLOAT),
)


@pytest.mark.parametrize("level", PROVIDERS["cuda"].levels)
def test_it_gives_what_the_cpu_gives_at_every_level(write_graph, x, level: str) -> None:
    graph = write_graph("base")
    found = runner(open_session(graph, level=level, provider="cuda"))(x)
    assert np.abs(found - runner(open_session(graph))(x)).max() < 1e-5  # float32 without TF32


def test_fp16_on_the_device_errs_as_fp16_does(write_graph, x) -> None:
    graph = write_graph("half", extra=HALF)
    one, other = (runner(open_session(graph, provider=provider))(x) for provider in ("cpu", "cuda"))
    assert np.abs(one - other).max() < 4 * 2**-11 * max(1, np.abs(one).max())


def test_a_job_leaves_inputs_and_outputs_on_the_device(write_graph, x) -> None:
    session = open_session(write_graph("base"), provider="cuda")
    for _ in range(3):
        job(session, x, "cuda")()
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x["x"], "cuda", 0))
    binding.bind_output("embeds", "cuda")
    session.run_with_iobinding(binding)
    assert binding.get_outputs()[0].device_name() == "cuda"
    assert np.abs(binding.copy_outputs_to_cpu()[0] - runner(session)(x)).max() == 0


def test_base_and_release_run_the_same_kernels_and_are_timed_in_pairs(write_graph, x) -> None:
    base, release = ({"visual.onnx": graph} for graph in (write_graph("base"), write_graph("release", weights_of(7))))
    ran, again = (execute_graphs(graphs, {"visual.onnx": x}, ["cuda"]) for graphs in (base, release))
    assert prove(base, release, ran, lambda: again, Check.not_applicable("tested on the CPU")).verdict == "pass"
    openers = [lambda g=g: job(open_session(g["visual.onnx"], provider="cuda"), x, "cuda") for g in (base, release)]
    contenders = Contenders("CUDAExecutionProvider", openers[0], {"01": openers[1]})
    assert added_latency(contenders, 20, 0.9, TimingBudget(patience=0.0))["01"].ratio > 0
