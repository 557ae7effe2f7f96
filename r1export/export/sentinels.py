"""Sentinel weights: random tensors no two of which are equal, by which every parameter is recognised in a graph.

Others of them prove the map that was found: onnxruntime, fed through the map, has to give torch's outputs.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil, log2
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from r1export.errors import Unsupported, first_line
from r1export.export.session import open_session
from r1export.export.towers import SAME, Tower, float_tensors
from r1export.export.weight_map import WeightMap
from r1export.update.container import Layout, stored_bytes

CHUNK = 1 << 16  # values
FINITE = -2  # exponent of sentinels of one input; those of n inputs are smaller by the root of n
SIGN_AND_MANTISSA = np.uint32(0x807FFFFF)  # of a float32; the exponent stays, so no value becomes infinite


def blank_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` on the CPU in float32 for `fill_with_sentinels_`, which overwrites what is not copied here."""
    memo = {id(tensor): _blank(tensor) for tensor in float_tensors(model).values()}
    return copy.deepcopy(model, memo).cpu().float().eval()


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    blank = torch.empty(tensor.shape)
    return nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank


def fill_with_sentinels_(model: nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Overwrite all parameters and buffers, which are contiguous, with random tensors, scaled so that activations stay finite.

    The exponent is that of a tensor, sign and mantissa are random bits, which takes half as long as random numbers.

    Returns them by name, as views of the model's own memory.
    """
    bits = np.random.SFC64(seed)
    variances = {
        id(module.running_var) for module in model.modules() if getattr(module, "running_var", None) is not None
    }
    sentinels = {}
    for name, tensor in float_tensors(model).items():
        values = tensor.detach().numpy()
        fan_in = values[0].size if values.ndim > 1 else 1
        exponent = np.float32(2.0 ** (FINITE - ceil(log2(max(1, fan_in)) / 2))).view(np.uint32)
        for chunk in _chunks(values):
            drawn = bits.random_raw(-(-chunk.size // 2)).view(np.uint32)[: chunk.size]
            chunk.view(np.uint32)[...] = drawn & SIGN_AND_MANTISSA | exponent
            if id(tensor) in variances:
                chunk += 1
        sentinels[name] = values
    return sentinels


@contextmanager
def flipped(sentinels: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Within it every value has, in place, the other sign and another mantissa.

    Whatever a graph remembers of flipped sentinels is far from what it should have: its inputs differ by about twice their size.
    """
    _flip_(sentinels)
    try:
        yield
    finally:
        _flip_(sentinels)


def _flip_(sentinels: Mapping[str, np.ndarray]) -> None:
    for values in sentinels.values():
        for chunk in _chunks(values):
            chunk.view(np.uint32)[...] ^= SIGN_AND_MANTISSA


def _chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Views of contiguous values, each small enough to stay in the processor's cache from one step to the next."""
    flat = values.reshape(-1, copy=False)
    for start in range(0, flat.size, CHUNK):
        yield flat[start : start + CHUNK]


def prove(graphs: Mapping[Tower, ir.Model], weights: WeightMap, sentinels: Mapping[str, np.ndarray]) -> None:
    """Run every graph on sentinel weights as a client would, at a batch that the exporter did not see.

    Raises Unsupported: the outputs are not torch's, or onnxruntime refuses the graph.
    """
    with tempfile.TemporaryDirectory(prefix="r1export-") as folder:
        for tower, graph in graphs.items():
            file, path = tower.files.weights, Path(folder) / tower.files.graph
            _write(path.with_name(file), weights.layout(file), weights.stored(file, sentinels))
            path.write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
            difference = _difference(tower, path)
            if not difference <= SAME:  # NaN is not
                raise Unsupported(
                    f"the exported {tower.files.name} tower differs from torch by {difference:.1e} on random weights, expected {SAME}",
                    "please report the model",
                )
            path.with_name(file).unlink()


def _write(path: Path, layout: Layout, tensors: Mapping[str, np.ndarray]) -> None:
    """A weights file like any other, but not synced to the disk: it is deleted a moment later."""
    with path.open("wb") as file:
        file.write(layout.header)
        for spec in layout.specs:
            file.write(stored_bytes(tensors[spec.name]))


def _difference(tower: Tower, path: Path) -> float:
    """max-abs over a batch of three: the two examples and the first again."""
    try:
        feeds = {tower.files.input: torch.cat([tower.example, tower.example[:1]]).numpy()}
        (embeds,) = open_session(path, once=True).run(None, feeds)
    except Exception as error:  # onnxruntime raises its own classes straight from C++, without a common base
        raise Unsupported(
            f"onnxruntime rejects the exported {tower.files.name} tower: {first_line(error)}",
            "try another opset",
        ) from error
    expected = torch.cat([tower.expected, tower.expected[:1]]).numpy()
    return float(np.abs(embeds - expected).max()) if np.isfinite(embeds).all() else float("nan")
