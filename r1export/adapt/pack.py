"""Import and export of pools: packed experts, the experts of earlier tasks, the complete unmerged model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from r1export.adapt.pool import Pools
from r1export.errors import InputError
from r1export.update.factors import ExpertUpdate, Factors


def pack_experts(pools: Pools, dtype: np.typing.DTypeLike = np.float32) -> ExpertUpdate:
    """The selected experts of every pool in float32 or float16, scaling and gate folded in, as they are merged and shipped."""
    factors = {}
    for rows, pool in pools.items():
        chosen, gate = pool.selected(), pool.frozen().gate
        lora_A, lora_B = (
            tensor.detach().float().cpu().numpy()
            for tensor in (pool.lora_A[chosen], pool.lora_B[:, chosen] * gate[chosen])
        )
        factors[rows] = Factors.pack(lora_A, lora_B, pool.settings.scaling, dtype)
    return ExpertUpdate(factors)


@torch.no_grad()
def load_rounded_factors_(pools: Pools, update: ExpertUpdate) -> None:
    """Give the selected experts the values that `pack_experts` rounded them to: the unmerged model is what is merged."""
    for rows, pool in pools.items():
        pair, chosen = update.factors[rows], pool.selected()
        u, v = (torch.from_numpy(values.astype(np.float32)).to(pool.lora_A) for values in (pair.u, pair.v))
        weight = pool.settings.scaling * pool.frozen().gate[chosen]
        pool.lora_A[chosen], pool.lora_B[:, chosen] = v, u / weight.where(weight != 0, 1)


def set_past_experts_(pools: Pools, earlier: ExpertUpdate) -> None:
    """Give every pool the merged columns of B of all earlier tasks, for the orthogonality loss."""
    for rows, pool in pools.items():
        pool.set_past_(torch.from_numpy(earlier.factors[rows].u.astype(np.float32) / np.float32(pool.settings.scaling)))


def set_past_pools_(pools: Pools, earlier: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Give every pool all columns of B of the pools of earlier tasks, for the orthogonality loss; `earlier` has their tensors by file.

    The authors' release does so: its filter for the experts that were merged never applies.

    Raises InputError, which begins with the file, if a tensor is missing or of another shape.
    """
    for rows, pool in pools.items():
        name, columns = f"{rows}.lora_B", []
        for file, tensors in earlier.items():
            columns.append(_checked(tensors.get(name), tuple(pool.lora_B.shape), f"{file}: {name}"))
        pool.set_past_(torch.from_numpy(np.concatenate(columns, axis=1)))


def pool_tensors(pools: Pools) -> dict[str, np.ndarray]:
    """A, B, router, counts and choice of all pools, named `ROWS.lora_A` and so on: the unmerged model."""
    return {
        f"{rows}.{name}": tensor.detach().cpu().numpy()
        for rows, pool in pools.items()
        for name, tensor in pool.state_dict().items()
    }


def load_pool_tensors_(pools: Pools, tensors: Mapping[str, np.ndarray], location: str) -> None:
    """Inverse of `pool_tensors`. Raises InputError, which begins with `location`, if a tensor is missing or of another shape.

    Files of versions before 0.2 have no choice: their experts are those with the most votes.
    """
    for rows, pool in pools.items():
        for name, target in pool.state_dict().items():
            value = tensors.get(f"{rows}.{name}", np.zeros(len(target), bool) if name == "chosen" else None)
            value = _checked(value, tuple(target.shape), f"{location}: {rows}.{name}")
            target.copy_(torch.from_numpy(np.array(value)))


def _checked(value: np.ndarray | None, shape: tuple[int, ...], location: str) -> np.ndarray:
    """Raises InputError if it is missing or of another shape."""
    if value is None or value.shape != shape:
        found = "missing" if value is None else f"of shape {value.shape}"
        raise InputError(
            f"{location} is {found}, expected {shape}",
            "the file is corrupted or from another recipe: train the task again",
        )
    return value
