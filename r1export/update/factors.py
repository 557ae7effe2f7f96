"""The merge: W' = W + sum_e u_e v_e^T, bit for bit the same on the build host and on every device.

Procedure `r1-f64-v1`, per adapted weight and block of rows:

    acc = float64(W)
    for each expert e, in order:   acc = acc + float64(u_e)[:, None] * float64(v_e)[None, :]
    out = float32(acc)             and float16(out) where W is float16: two explicit roundings; a float64 W is not rounded

Only elementwise numpy multiply and add: a product of two float32 is exact in float64, so fused and separate
multiply-add agree on every processor. `@`, einsum, sum, torch and BLAS reassociate and are banned here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from r1export.errors import InputError
from r1export.update.atomic_io import write_file
from r1export.update.container import parse_tensors, plan, read_tensors, stored_bytes
from r1export.update.names import PARAMETER

PROCEDURE = "r1-f64-v1"
BLOCK_ROWS = 128  # rows merged at a time: keeps the float64 block of a 3072-wide weight in the second-level cache
_ROWS = re.compile(rf"({PARAMETER.pattern})\[(0|[1-9][0-9]{{0,8}}):([1-9][0-9]{{0,8}})\]")


@dataclass(frozen=True, order=True)
class Rows:
    """The rows `start:stop` of one parameter: an adapted linear. `Rows.parse(str(rows)) == rows`.

    >>> str(Rows("attn.in_proj_weight", 0, 512))
    'attn.in_proj_weight[0:512]'
    """

    parameter: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.parameter}[{self.start}:{self.stop}]"

    @classmethod
    def parse(cls, text: str) -> Rows:
        """Inverse of `str`. Raises InputError for anything else."""
        match = _ROWS.fullmatch(text)
        if not match or int(match[2]) >= int(match[3]):
            raise InputError(f"{text!r} is not a range of rows", "expected PARAMETER[start:stop] with start < stop")
        return cls(match[1], int(match[2]), int(match[3]))


@dataclass(frozen=True)
class Factors:
    """k rank-1 experts of one adapted linear: `u` (rows, k) and `v` (k, in), both float32 or both float16."""

    u: np.ndarray
    v: np.ndarray

    def __post_init__(self) -> None:
        fits = self.u.ndim == self.v.ndim == 2 and self.u.shape[1] == self.v.shape[0]
        if not fits or self.u.dtype != self.v.dtype or self.u.dtype not in (np.float32, np.float16):
            raise InputError(
                f"factors u {self.u.dtype}{list(self.u.shape)} and v {self.v.dtype}{list(self.v.shape)}",
                "expected (rows, k) and (k, in) in float32 or float16",
            )
        if not (np.isfinite(self.u).all() and np.isfinite(self.v).all()):
            raise InputError("factors with NaN or Inf", "train with a lower learning rate")
        self.u.setflags(write=False)
        self.v.setflags(write=False)

    @classmethod
    def pack(
        cls, lora_A: np.ndarray, lora_B: np.ndarray, scaling: float, dtype: np.typing.DTypeLike = np.float32
    ) -> Factors:
        """Fold `scaling` into u = scaling * lora_B (rows, k), keep v = lora_A (k, in), round both to `dtype`.

        Subnormals become zero, since processors and compilers disagree about them.
        """
        u = lora_B.astype(np.float64) * scaling
        return cls(_round(u, dtype), _round(lora_A, dtype))


def _round(values: np.ndarray, dtype: np.typing.DTypeLike) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):  # overflow is refused by Factors, underflow is flushed below
        rounded = values.astype(np.float32).astype(dtype)
    return np.where(np.abs(rounded) < np.finfo(rounded.dtype).tiny, rounded.dtype.type(0), rounded)


@dataclass(frozen=True)
class ExpertUpdate:
    """Rank-1 experts for a set of adapted linears, in merge order.

    Laws: `stack([x]).apply(W) == x.apply(W)`; `stack` is associative; `read(write(x)) == x`;
    the result does not depend on `block_rows`.

    >>> pair = Factors(u=np.float32([[1], [2]]), v=np.float32([[3, 4]]))
    >>> ExpertUpdate({Rows("w", 0, 2): pair}).apply({"w": np.ones((2, 2), np.float32)})["w"]
    array([[4., 5.],
           [7., 9.]], dtype=float32)
    """

    factors: Mapping[Rows, Factors]

    def __post_init__(self) -> None:
        ordered = dict(sorted(self.factors.items()))
        for rows, pair in ordered.items():
            if pair.u.shape[0] != rows.stop - rows.start:
                raise InputError(f"{rows}: u has {pair.u.shape[0]} rows", "expected as many as in the name")
        named = list(ordered)
        for before, after in zip(named, named[1:]):
            if before.parameter == after.parameter and after.start < before.stop:
                raise InputError(f"{before} and {after} overlap", "expected disjoint rows")
        object.__setattr__(self, "factors", MappingProxyType(ordered))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that `apply` changes."""
        return tuple(dict.fromkeys(rows.parameter for rows in self.factors))

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(pair.u.nbytes + pair.v.nbytes for pair in self.factors.values())

    @classmethod
    def stack(cls, updates: Iterable[ExpertUpdate]) -> ExpertUpdate:
        """One update with the experts of all `updates`, in order, with a single rounding at the end.

        Raises InputError if two updates split a parameter into different rows.
        """
        pairs: dict[Rows, list[Factors]] = {}
        for update in updates:
            for rows, pair in update.factors.items():
                pairs.setdefault(rows, []).append(pair)
        return cls({rows: _join(parts) for rows, parts in pairs.items()})

    def apply(self, base: Mapping[str, np.ndarray], *, block_rows: int = BLOCK_ROWS) -> dict[str, np.ndarray]:
        """The merged parameters: for every name in `parameters`, a new array like `base[name]`.

        A parameter of more than two dimensions is treated as (rows, everything else).

        Raises:
            InputError: `base` lacks a parameter, shapes do not fit, or a result is not finite.
        """
        merged = {name: np.array(_parameter(base, name), order="C") for name in self.parameters}
        for rows, pair in self.factors.items():
            matrix = merged[rows.parameter].reshape(len(merged[rows.parameter]), -1)
            if rows.stop > matrix.shape[0] or pair.v.shape[1] != matrix.shape[1]:
                raise InputError(
                    f"{rows}: factors for (rows, {pair.v.shape[1]}), the weight is {matrix.shape}",
                    "use the base model of the update",
                )
            for start in range(rows.start, rows.stop, block_rows):
                stop = min(start + block_rows, rows.stop)
                _merge_(matrix[start:stop], pair.u[start - rows.start : stop - rows.start], pair.v)
            if not np.isfinite(matrix[rows.start : rows.stop]).all():
                raise InputError(
                    f"{rows}: the merged weight is not finite", "the update is corrupted or for another base"
                )
        return merged

    def to_bytes(self) -> bytes:
        """`NAME.u` and `NAME.v` of every adapted linear as a safetensors file: the content whose digest names an update."""
        tensors: dict[str, np.ndarray] = {}
        for rows, pair in self.factors.items():
            tensors.update({f"{rows}.u": pair.u, f"{rows}.v": pair.v})
        layout = plan((name, array.dtype, array.shape) for name, array in tensors.items())
        return layout.header + b"".join(map(stored_bytes, tensors.values()))

    def write(self, path: Path) -> None:
        """Write `to_bytes` into the file at `path`."""
        write_file(path, self.to_bytes())

    @classmethod
    def read(cls, path: Path) -> ExpertUpdate:
        """Inverse of `write`. Raises InputError naming the file and the tensor."""
        return cls._of(read_tensors(path), path)

    @classmethod
    def parse(cls, data: bytes, path: Path) -> ExpertUpdate:
        """Inverse of `to_bytes`; `path` names the file in errors. Raises like `read`."""
        return cls._of(parse_tensors(data, path), path)

    @classmethod
    def _of(cls, tensors: Mapping[str, np.ndarray], path: Path) -> ExpertUpdate:
        names = {name.rpartition(".")[0] for name in tensors}
        if {f"{name}.{part}" for name in names for part in "uv"} != set(tensors):
            raise InputError(f"{path}: unpaired factor", "expected NAME.u and NAME.v for each adapted linear")
        return cls({Rows.parse(name): Factors(tensors[f"{name}.u"], tensors[f"{name}.v"]) for name in names})


def _parameter(base: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in base:
        raise InputError(f"the base model has no parameter {name}", "use the base model of the update")
    if base[name].dtype not in (np.float64, np.float32, np.float16):
        raise InputError(f"{name} is {base[name].dtype}", "expected a float weight")
    return base[name]


def _join(parts: list[Factors]) -> Factors:
    """Experts of several updates side by side. Mixed precisions widen to float32, which is exact."""
    return Factors(
        np.concatenate([part.u for part in parts], axis=1), np.concatenate([part.v for part in parts], axis=0)
    )


def _merge_(block: np.ndarray, u: np.ndarray, v: np.ndarray) -> None:
    acc = block.astype(np.float64)
    product = np.empty_like(acc)
    for u_e, v_e in zip(u.T.astype(np.float64), v.astype(np.float64)):
        np.multiply(u_e[:, None], v_e[None, :], out=product)
        np.add(acc, product, out=acc)
    with np.errstate(over="ignore", under="ignore"):  # a result that overflows is refused by the caller
        block[...] = acc if block.dtype == np.float64 else acc.astype(np.float32)
