"""One export of the tiny model, shared by the tests that only read it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from r1export.export.graph import export_graphs
from r1export.export.towers import float_tensors
from r1export.export.weight_map import WeightMap
from r1export.update.container import write_layout


@dataclass(frozen=True)
class Exported:
    """A folder of graphs, their map, and the model whose weights lie beside them."""

    folder: Path
    weights: WeightMap
    model: torch.nn.Module

    def run(self, tower: str, values: np.ndarray) -> np.ndarray:
        session = ort.InferenceSession(self.folder / f"{tower}.onnx", providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: values})[0]

    def torch(self, tower: str, values: np.ndarray) -> np.ndarray:
        encode = self.model.encode_image if tower == "visual" else self.model.encode_text
        with torch.no_grad():
            return encode(torch.from_numpy(values), normalize=True).numpy()


def values_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in float_tensors(model).items()}


def write_weights(weights: WeightMap, values: dict[str, np.ndarray], folder: Path) -> None:
    for file in weights.files:
        stored = weights.stored(file, values)
        write_layout(folder / file, weights.layout(file), lambda spec, stored=stored: stored[spec.name])


def export(model: torch.nn.Module, folder: Path, size: int, context_length: int, opset: int = 20) -> Exported:
    weights = export_graphs(model, (size, size), context_length, folder, opset=opset)
    write_weights(weights, values_of(model), folder)
    return Exported(folder, weights, copy.deepcopy(model))


@pytest.fixture(scope="session")
def exported(tiny_files, tmp_path_factory) -> Exported:
    from r1export.adapt.clip import load_clip

    clip = load_clip(weights=tiny_files[0], config=tiny_files[1])
    return export(clip.model, tmp_path_factory.mktemp("exported"), 16, 12)


def inputs(tower: str, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if tower == "visual":
        return rng.standard_normal((n, 3, 16, 16)).astype(np.float32)
    tokens = rng.integers(1, 49000, (n, 12))
    tokens[np.arange(n), rng.integers(1, 12, n)] = 49407
    return tokens
