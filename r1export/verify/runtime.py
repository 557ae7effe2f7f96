"""The runtimes that read a release, set up so that measurements can be trusted: onnxruntime and its providers, OpenVINO,
and onnx.reference, which is the specification of the operators as numpy code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from r1export.errors import CheckFailed, InputError, Unsupported
from r1export.verify import openvino_runtime

LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINO",
    "reference": "onnx.reference",
}
UNTIMED = ("reference",)  # numpy code that was written to be read
APART = ("openvino", "reference")  # none of onnxruntime's; nobody can turn their optimiser down, or they have none
EXACT = {"cuda": {"use_tf32": "0"}}  # TF32 keeps ten bits of each factor: its error hides what parity looks for
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


class Session(Protocol):
    """An opened graph: an InferenceSession of onnxruntime, an `openvino_runtime.Compiled` or a ReferenceEvaluator of onnx."""

    def run(self, outputs: None, feeds: dict[str, Any], /) -> Any:
        """All outputs as numpy arrays, in the order of the graph."""


def session_options(level: str = "all", threads: int = 0) -> ort.SessionOptions:
    """Options whose idle threads do not spin: a spinning session slows whatever is timed beside it by a fifth."""
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def check_provider(provider: str) -> None:
    """Raises InputError for an unknown name, Unsupported for what onnxruntime was built without and an OpenVINO that is not installed."""
    if provider not in PROVIDERS:
        raise InputError(f"no provider {provider!r}", f"known: {', '.join(PROVIDERS)}")
    if provider == "openvino" and not openvino_runtime.installed():
        raise Unsupported("OpenVINO is not installed", "pip install r1export[openvino]")
    if provider not in APART and PROVIDERS[provider] not in ort.get_available_providers():
        raise Unsupported(
            f"onnxruntime {ort.__version__} has no {PROVIDERS[provider]} here",
            f"available: {', '.join(ort.get_available_providers())}",
        )


def levels(provider: str) -> tuple[str, ...]:
    """The levels of graph optimisation at which a provider can be run."""
    return ("all",) if provider in APART else tuple(LEVELS)


def provider_options(provider: str, weights_digest: str, cache: Path | None) -> dict[str, Any]:
    """Options of one provider. An engine cache of TensorRT or OpenVINO ignores weights: it gets a folder for each digest."""
    options: dict[str, Any] = dict(EXACT.get(provider, {}))
    if cache is not None and provider == "tensorrt":
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache / weights_digest)}
    if cache is not None and provider == "openvino":
        options |= {"CACHE_DIR": str(cache / weights_digest)}
    return options


def open_session(
    graph: Path,
    *,
    level: str = "all",
    provider: str = "cpu",
    threads: int = 0,
    weights_digest: str = "",
    cache: Path | None = None,
) -> Session:
    """A session on exactly this provider; `threads` 0 leaves their number to the runtime.

    Raises:
        Unsupported: the provider is not here, or onnxruntime silently fell back to another one.
        CheckFailed: the runtime refuses the model.
        ValueError: a `cache` without `weights_digest`, which would serve the engine of other weights.
    """
    if cache is not None and not weights_digest:
        raise ValueError(f"found the cache {cache} without a weights_digest, expected both: it is the key of the cache")
    details = provider_options(provider, weights_digest, cache)
    if provider not in APART:
        return start(graph, session_options(level, threads), provider, details)
    check_provider(provider)
    try:
        if provider == "openvino":
            return openvino_runtime.Compiled(openvino_runtime.compile_graph(graph, threads=threads, options=details))
        return ReferenceEvaluator(str(graph))
    except Exception as error:  # both raise what they like
        raise CheckFailed(
            f"{graph}: {PROVIDERS[provider]} refuses the model: {spoken(error)}", "write the release again"
        ) from error


def start(
    graph: Path, options: ort.SessionOptions, provider: str, details: dict[str, Any] | None = None
) -> ort.InferenceSession:
    """A session on exactly this provider, by default with its plain options. Raises as `open_session` does."""
    check_provider(provider)
    chosen = (PROVIDERS[provider], provider_options(provider, "", None) if details is None else details)
    try:
        session = ort.InferenceSession(str(graph), options, providers=[chosen])
    except Exception as error:  # onnxruntime raises its own classes straight from C++, without a common base
        raise CheckFailed(
            f"{graph}: onnxruntime refuses the model: {spoken(error)}", "write the release again"
        ) from error
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise Unsupported(
            f"onnxruntime fell back from {PROVIDERS[provider]} to {session.get_providers()[0]}",
            "mend the driver or leave the provider out",
        )
    return session


def runner(session: Session) -> Run:
    """Feeds -> the first output. Raises CheckFailed if the runtime cannot run them."""

    def run(feeds: dict[str, np.ndarray]) -> np.ndarray:
        try:
            return session.run(None, feeds)[0]
        except Exception as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
            raise CheckFailed(
                f"the runtime cannot run {shapes}: {spoken(error)}",
                "export the graphs again with r1export export --overwrite",
            ) from error

    return run


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


def spoken(error: Exception) -> str:
    """What a runtime says in one line: the first that names no place in its source, as lines with a colon at the end do."""
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in text if not line.endswith(":")), text[0] if text else type(error).__name__)
    return said.removeprefix("[ONNXRuntimeError] : ")[:300]


def weights_digest(digests: dict[str, str]) -> str:
    """One short name for the weights of a release, from the digests of its files: the key of engine caches."""
    return hashlib.sha256("".join(f"{name}\0{digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()[:32]
