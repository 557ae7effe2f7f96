"""onnxruntime, set up so that measurements can be trusted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from r1export.errors import CheckFailed, Unsupported

LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
EXACT = {"cuda": {"use_tf32": "0"}}  # TF32 keeps ten bits of each factor: its error hides what parity looks for
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


def session_options(level: str = "all", threads: int = 0) -> ort.SessionOptions:
    """Options whose idle threads do not spin: a spinning session slows whatever is timed beside it by a fifth."""
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def check_provider(provider: str) -> None:
    """Raises Unsupported if onnxruntime does not know the provider or was built without it."""
    if provider not in PROVIDERS:
        raise Unsupported(f"no provider {provider!r}", f"known: {', '.join(PROVIDERS)}")
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise Unsupported(
            f"onnxruntime {ort.__version__} has no {PROVIDERS[provider]} here",
            f"available: {', '.join(ort.get_available_providers())}",
        )


def provider_options(provider: str, weights_digest: str, cache: Path | None) -> dict[str, Any]:
    """Options of one provider. An engine cache of TensorRT or OpenVINO ignores weights: it gets a folder for each digest."""
    options: dict[str, Any] = dict(EXACT.get(provider, {}))
    if cache is not None and provider == "tensorrt":
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache / weights_digest)}
    if cache is not None and provider == "openvino":
        options |= {"cache_dir": str(cache / weights_digest)}
    return options


def open_session(
    graph: Path,
    *,
    level: str = "all",
    provider: str = "cpu",
    threads: int = 0,
    weights_digest: str = "",
    cache: Path | None = None,
) -> ort.InferenceSession:
    """A session on exactly this provider.

    Raises:
        Unsupported: this onnxruntime has not the provider, or silently fell back to another one.
        CheckFailed: onnxruntime refuses the model.
    """
    return start(graph, session_options(level, threads), provider, provider_options(provider, weights_digest, cache))


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


def runner(session: ort.InferenceSession) -> Run:
    """Feeds -> the first output. Raises CheckFailed if onnxruntime cannot run them."""

    def run(feeds: dict[str, np.ndarray]) -> np.ndarray:
        try:
            return session.run(None, feeds)[0]
        except Exception as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
            raise CheckFailed(
                f"onnxruntime cannot run {shapes}: {spoken(error)}",
                "export the graphs again with r1export export --overwrite",
            ) from error

    return run


def job(session: ort.InferenceSession, feeds: dict[str, np.ndarray], provider: str) -> Callable[[], object]:
    """Runs the session once on the same inputs; on an accelerator with inputs and outputs bound there, so no copy is timed."""
    if provider in ("cpu", "openvino"):
        return lambda: session.run(None, feeds)
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, "cuda", 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda")
    return lambda: session.run_with_iobinding(binding)


def spoken(error: Exception) -> str:
    """The first line of what onnxruntime says, without its codes."""
    text = str(error).strip().splitlines()
    return text[0].removeprefix("[ONNXRuntimeError] : ")[:300] if text else type(error).__name__


def weights_digest(digests: dict[str, str]) -> str:
    """One short name for the weights of a release, from the digests of its files: the key of engine caches."""
    return hashlib.sha256("".join(f"{name}\0{digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()[:32]
