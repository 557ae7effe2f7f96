"""The supported runtimes, configured for reliable measurements: onnxruntime and its providers, OpenVINO, and
onnx.reference, the specification of the operators in numpy."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from r1export.errors import CheckFailed, InputError, Unsupported
from r1export.verify.parity import ENTRIES, TOWERS, Model
from r1export.verify.runtimes import openvino_runtime

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@dataclass(frozen=True)
class Provider:
    """A way to run a graph. `name` is the runtime's own name for it.

    has_levels   the graph optimization level can be set (onnxruntime)
    timed        its latency is meaningful
    inspectable  it exposes the graph that it executes
    """

    name: str
    has_levels: bool = True
    timed: bool = True
    inspectable: bool = True

    @property
    def label(self) -> str:
        """The name as tables show it."""
        return self.name.removesuffix("ExecutionProvider")

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels of graph optimization at which it can be run."""
        return tuple(LEVELS) if self.has_levels else ("all",)


PROVIDERS = {
    "cpu": Provider("CPUExecutionProvider"),
    "cuda": Provider("CUDAExecutionProvider"),
    "tensorrt": Provider("TensorrtExecutionProvider", inspectable=False),  # an engine that onnxruntime can't export
    "openvino": Provider("OpenVINO", has_levels=False),
    "reference": Provider(
        "onnx.reference", has_levels=False, timed=False, inspectable=False
    ),  # reference code, not optimized
}
OPTIONS = {"cuda": {"use_tf32": "0"}}  # TF32 keeps ten bits of each factor, an error that would hide real differences
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


class Session(Protocol):
    """An opened graph: an InferenceSession of onnxruntime, an `openvino_runtime.Compiled` or a ReferenceEvaluator of onnx."""

    def run(self, outputs: None, feeds: dict[str, Any], /) -> Any:
        """All outputs as numpy arrays, in the order of the graph."""


def session_options(level: str = "all", threads: int = 0) -> ort.SessionOptions:
    """Options without spinning idle threads: a spinning session slows other contenders by a fifth."""
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def check_provider(provider: str) -> None:
    """Raises InputError for an unknown name, Unsupported if it is missing from onnxruntime's build or OpenVINO is not installed."""
    if provider not in PROVIDERS:
        raise InputError(f"unknown provider {provider!r}", f"known: {', '.join(PROVIDERS)}")
    if provider == "openvino" and not openvino_runtime.installed():
        raise Unsupported("OpenVINO is not installed", "pip install r1export[openvino]")
    if PROVIDERS[provider].has_levels and PROVIDERS[provider].name not in ort.get_available_providers():
        raise Unsupported(
            f"onnxruntime {ort.__version__} has no {PROVIDERS[provider].name}",
            f"available: {', '.join(ort.get_available_providers())}",
        )


def open_session(graph: Path, *, level: str = "all", provider: str = "cpu", threads: int = 0) -> Session:
    """A session on exactly this provider; `threads` 0 leaves their number to the runtime.

    Raises:
        Unsupported: the provider is not here, or onnxruntime silently fell back to another one.
        CheckFailed: the runtime rejects the model.
    """
    check_provider(provider)
    if PROVIDERS[provider].has_levels:
        session: Session = start(graph, session_options(level, threads), provider)
        return session
    try:
        if provider == "openvino":
            return openvino_runtime.Compiled(openvino_runtime.compile_graph(graph, threads=threads))
        return cast(Session, ReferenceEvaluator(str(graph)))
    except Exception as error:  # both raise what they like
        raise _refusal(graph, PROVIDERS[provider].name, error) from error


def start(graph: Path, options: ort.SessionOptions, provider: str) -> ort.InferenceSession:
    """A session on exactly this provider. Raises as `open_session` does."""
    check_provider(provider)
    name = PROVIDERS[provider].name
    try:
        session = ort.InferenceSession(str(graph), options, providers=[(name, OPTIONS.get(provider, {}))])
    except Exception as error:  # onnxruntime raises its own classes straight from C++, without a common base
        raise _refusal(graph, "onnxruntime", error) from error
    if session.get_providers()[0] != name:
        raise Unsupported(
            f"onnxruntime fell back from {name} to {session.get_providers()[0]}",
            "fix the driver or remove the provider",
        )
    return session


def _refusal(graph: Path, runtime: str, error: Exception) -> CheckFailed:
    return CheckFailed(f"{graph}: {runtime} rejects the model: {first_error_line(error)}", "export the release again")


def runner(session: Session) -> Run:
    """Feeds -> the first output. Raises CheckFailed if the runtime cannot run them."""

    def run(feeds: dict[str, np.ndarray]) -> np.ndarray:
        try:
            output: np.ndarray = session.run(None, feeds)[0]
            return output
        except Exception as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
            raise CheckFailed(
                f"the runtime fails to run {shapes}: {first_error_line(error)}",
                "export the graphs again with r1export export --overwrite",
            ) from error

    return run


def onnx_model(release: Path, *, level: str = "all", provider: str = "cpu") -> Model:
    """Both towers of a release as functions. Raises as `open_session` does.

    Fully optimized, each call uses all threads, as in a client. At lower levels on the CPU it uses one, and as many calls
    may run at a time as there are cores, which is faster: a small model's batches are too short to be split.
    """
    threads, workers = (1, CORES) if provider == "cpu" and level != "all" else (0, 1)
    visual, textual = (
        runner(open_session(release / f"{tower}.onnx", level=level, provider=provider, threads=threads))
        for tower in TOWERS
    )
    return Model(
        lambda values: visual({ENTRIES["visual"]: values}),
        lambda values: textual({ENTRIES["textual"]: values}),
        workers,
    )


def job(session: Session, feeds: dict[str, np.ndarray], provider: str) -> Callable[[], object]:
    """Runs the session once on the same inputs; on an accelerator with inputs and outputs bound there, so no copy is timed."""
    if not isinstance(session, ort.InferenceSession) or provider == "cpu":
        return lambda: session.run(None, feeds)
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, "cuda", 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda")
    return lambda: session.run_with_iobinding(binding)


def first_error_line(error: Exception) -> str:
    """A runtime's error message in one line: the first line that is not a source location (which ends with a colon)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = next((line for line in lines if not line.endswith(":")), lines[0] if lines else type(error).__name__)
    return message.removeprefix("[ONNXRuntimeError] : ")[:300]
