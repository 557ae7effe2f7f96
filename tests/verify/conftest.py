"""The graphs of small.py as files, with their weights outside as in a release."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from verify.small import WIDTH, small_graph, weights_of

from r1export.update.container import plan, write_layout
from r1export.update.factors import ExpertUpdate, Factors, Rows


@pytest.fixture
def write_graph(tmp_path: Path) -> Callable[..., Path]:
    """Writes a graph, with weights of its own beside it, into a folder of its own."""

    def write(folder: str, weights: dict[str, np.ndarray] | None = None, **options) -> Path:
        place, weights = tmp_path / folder, weights or weights_of()
        place.mkdir()
        layout = plan((name, value.dtype, value.shape) for name, value in weights.items())
        write_layout(place / "visual.safetensors", layout, lambda spec: weights[spec.name])
        (place / "visual.onnx").write_bytes(small_graph(**options).SerializeToString())
        return place / "visual.onnx"

    return write


@pytest.fixture
def x() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=(2, WIDTH)).astype(np.float32)}


@pytest.fixture
def update() -> ExpertUpdate:
    rng = np.random.default_rng(2)
    factors = Factors(
        (0.1 * rng.normal(size=(WIDTH, 3))).astype(np.float32), rng.normal(size=(3, WIDTH)).astype(np.float32)
    )
    return ExpertUpdate({Rows("fc.weight", 0, WIDTH): factors})
