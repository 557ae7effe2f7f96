"""What the export tests share: a model with its graphs and weights in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from r1export.export.graph import export_graphs
from r1export.export.towers import float_tensors
from r1export.export.weight_map import WeightMap
from r1export.update.container import write_layout

TOWERS = ("visual", "textual")


@dataclass(frozen=True)
class Exported:
    """A folder of graphs, their map, and the model whose weights lie beside them."""

    folder: Path
    weights: WeightMap
    model: nn.Module

    def run(self, graph: str, **feeds: np.ndarray) -> np.ndarray:
        return ort.InferenceSession(self.folder / f"{graph}.onnx", providers=["CPUExecutionProvider"]).run(None, feeds)[
            0
        ]

    def error(self, n: int) -> float:
        """max-abs between onnxruntime and torch over both towers for a batch of n."""
        with torch.no_grad():
            pixels, tokens = inputs(self.model, n)
            images = np.abs(
                self.run("visual", pixel_values=pixels)
                - self.model.encode_image(torch.from_numpy(pixels), normalize=True).numpy()
            )
            texts = np.abs(
                self.run("textual", input_ids=tokens)
                - self.model.encode_text(torch.from_numpy(tokens), normalize=True).numpy()
            )
        return float(max(images.max(), texts.max()))


def sizes(model: nn.Module) -> tuple[tuple[int, int], int]:
    size = model.visual.image_size
    return (size if isinstance(size, tuple) else (size, size)), getattr(model, "text", model).context_length


def inputs(model: nn.Module, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and token numbers with the end of text, the highest number, at a random place."""
    rng = np.random.default_rng(seed)
    size, context = sizes(model)
    vocabulary = next(module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding))
    tokens = rng.integers(1, vocabulary - 1, (n, context))
    tokens[np.arange(n), rng.integers(1, context, n)] = vocabulary - 1
    return rng.standard_normal((n, 3, *size)).astype(np.float32), tokens


def values_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in float_tensors(model).items()}


def randomize_(model: nn.Module, seed: int) -> None:
    """Weights as after training: no two tensors equal, none zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def write_weights(weights: WeightMap, values: dict[str, np.ndarray], folder: Path) -> None:
    for file in weights.files:
        stored = weights.stored(file, values)
        write_layout(folder / file, weights.layout(file), lambda spec, stored=stored: stored[spec.name])


def export(model: nn.Module, folder: Path, opset: int = 20) -> Exported:
    folder.mkdir(parents=True, exist_ok=True)
    weights = export_graphs(model, *sizes(model), folder, opset=opset)
    write_weights(weights, values_of(model), folder)
    return Exported(folder, weights, model)
