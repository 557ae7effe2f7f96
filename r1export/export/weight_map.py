"""Map the initializers of an exported graph to the parameters of the model, by content.

The exporter folds transposes and loses names. So the model is exported with sentinel weights, random tensors no two of
which are equal, and every parameter is looked for among the initializers by its bytes, straight or transposed. A
parameter that is folded into something else is not found, and the map refuses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from r1export.errors import InputError, Unsupported, first_line
from r1export.update.atomic_io import read_regular, write_json
from r1export.update.container import DTYPES, NAMES, Layout, TensorSpec, plan, take_dtype, take_shape
from r1export.update.names import PARAMETER, PATH
from r1export.update.strict_json import Fields, parse_json

FIRST = 16  # values of a tensor that its fingerprint holds
MAX_MAP, MAX_FILES, MAX_ITEMS = 64 << 20, 100, 100_000  # bytes; weights files; parameters of one of them


@dataclass(frozen=True)
class Placement:
    """One parameter in the weights file: stored with `shape`, as its 2-D transpose if `transposed`, in a safetensors `dtype`."""

    parameter: str
    shape: tuple[int, ...]
    transposed: bool = False
    dtype: str = "F32"

    def store(self, value: np.ndarray) -> np.ndarray:
        """The parameter as it is stored. Raises ValueError if it has another dtype: precision is lost on purpose or not at all."""
        if value.dtype != self.numpy_dtype:
            raise ValueError(f"{self.parameter} is {value.dtype}, expected {self.dtype}")
        return np.ascontiguousarray(value.T if self.transposed else value).reshape(self.shape)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(DTYPES[self.dtype])


@dataclass(frozen=True)
class WeightMap:
    """Weights file -> what it holds, in order."""

    files: Mapping[str, tuple[Placement, ...]]

    def layout(self, file: str) -> Layout:
        """Where each parameter lies in `file`."""
        return plan((p.parameter, p.numpy_dtype, p.shape) for p in self.files[file])

    def sorted(self) -> WeightMap:
        """The same with the widest types first, so that every tensor is aligned."""
        return WeightMap(
            {f: tuple(sorted(placed, key=lambda p: -p.numpy_dtype.itemsize)) for f, placed in self.files.items()}
        )

    def stored(self, file: str, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All tensors of `file` in their stored form."""
        return {p.parameter: p.store(weights[p.parameter]) for p in self.files[file]}

    def placements(self) -> dict[str, tuple[str, Placement]]:
        """Parameter -> (file, placement)."""
        return {p.parameter: (file, p) for file, placed in self.files.items() for p in placed}

    def write(self, path: Path) -> None:
        write_json(path, {file: [asdict(p) for p in placed] for file, placed in self.files.items()})

    @classmethod
    def read(cls, path: Path) -> WeightMap:
        """Inverse of `write`. Raises InputError."""
        try:
            fields = parse_json(read_regular(path, MAX_MAP), "weight map", MAX_MAP)
            return cls(
                {
                    file: tuple(map(_placement, fields.records(file, MAX_ITEMS)))
                    for file in fields.names(PATH, MAX_FILES)
                }
            )
        except (OSError, InputError) as error:
            raise InputError(
                f"{path}: not a weight map: {first_line(error)}", "export the run again with --overwrite"
            ) from error


def _placement(fields: Fields) -> Placement:
    placement = Placement(
        fields.text("parameter", PARAMETER),
        take_shape(fields),
        fields.flag("transposed"),
        NAMES[take_dtype(fields)],
    )
    fields.done(extensions=False)
    return placement


def place_parameters(
    graph: ir.Graph, parameters: Mapping[str, np.ndarray], used: Collection[str]
) -> dict[Placement, ir.Value]:
    """Find every parameter among the initializers by content; those on which the graph depends (`used`) must be there.

    Raises:
        Unsupported: a used parameter is missing, one stands twice, or two share an initializer; the message names it.
    """
    initializers: dict[tuple[int, bytes], list[ir.Value]] = {}
    for value in graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
            initializers.setdefault(_fingerprint(value.const_value.numpy()), []).append(value)
    placed: dict[Placement, ir.Value] = {}
    for name, parameter in parameters.items():
        straight, turned = (
            _equal(initializers, parameter),
            _equal(initializers, parameter.T) if parameter.ndim == 2 else [],
        )
        matches = {id(value): value for value in straight + turned}
        if len(matches) != 1 and (matches or name in used):
            raise Unsupported(
                f"parameter {name} occurs {len(matches)} times in the exported graph, expected once",
                "the exporter folded or repeated it: please report the model, or use another opset",
            )
        for value in matches.values():
            placed[Placement(name, tuple(value.const_value.shape.numpy()), transposed=not straight)] = value
    if len({id(value) for value in placed.values()}) != len(placed):
        raise Unsupported("two parameters share one initializer", "please report the model")
    return placed


def externalize_(placed: Mapping[Placement, ir.Value], layout: Layout, location: str) -> None:
    """Point the initializers at their bytes in the weights file and give them their state_dict names."""
    for placement, value in placed.items():
        _point(value, layout.by_name[placement.parameter], location)


def place_(graph: ir.Graph, weights: WeightMap, location: str) -> None:
    """Point all initializers of `graph` that the weights file holds at their bytes in it."""
    held = graph.initializers
    placed = {p: held[p.parameter] for p in weights.files[location] if p.parameter in held}
    externalize_(placed, weights.layout(location), location)


def _point(value: ir.Value, spec: TensorSpec, location: str) -> None:
    value.name = spec.name
    value.const_value = ir.ExternalTensor(
        location,
        spec.offset,
        spec.nbytes,
        ir.DataType.from_numpy(spec.dtype),
        shape=ir.Shape(spec.shape),
        name=spec.name,
    )


def _equal(initializers: Mapping[tuple[int, bytes], list[ir.Value]], array: np.ndarray) -> list[ir.Value]:
    """The initializers that hold `array`, value for value, in whatever shape."""
    return [
        value
        for value in initializers.get(_fingerprint(array), [])
        if value.const_value is not None and np.array_equal(value.const_value.numpy().reshape(array.shape), array)
    ]


def _fingerprint(array: np.ndarray) -> tuple[int, bytes]:
    """Number of values, and the first of them: cheap, and different for almost all tensors that differ."""
    return array.size, array.flat[:FIRST].tobytes()
