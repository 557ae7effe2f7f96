"""Diagnose a wrong weight: known merge errors, recognized by the difference that they cause."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from r1export.update.factors import ExpertUpdate, Factors, Rows

RESIDUAL = 1e-2  # unexplained part of the difference that float32 rounding allows


def diagnose(
    parameter: str, found: np.ndarray, expected: np.ndarray, updates: Sequence[tuple[str, ExpertUpdate]]
) -> str:
    """How `found` differs from `expected` (same shape) in one line, with the cause if known.

    Known causes: an update or an expert merged more than once or not at all, and q, k, v in the wrong order.
    """
    with np.errstate(invalid="ignore"):
        difference = (found.astype(np.float64) - expected.astype(np.float64)).reshape(
            len(expected) if expected.ndim else 1, -1
        )
    if not np.isfinite(difference).all():
        return "it has NaN or Inf"
    changed = np.argwhere(difference)
    size = f"{len(changed)} of {difference.size} values differ, by {np.abs(difference).max():.2g} at most"
    if len(changed) == 1:
        size = f"one value differs by {np.abs(difference).max():.2g}, at {changed[0].tolist()}"
    cause = _swapped(parameter, found, expected) or next(_remerged(parameter, difference, updates), "")
    return f"{size}; {cause}" if cause else size


def _swapped(parameter: str, found: np.ndarray, expected: np.ndarray) -> str:
    if not parameter.endswith(("in_proj_weight", "in_proj_bias")) or len(expected) % 3:
        return ""
    have, want = np.split(found, 3), np.split(expected, 3)
    order = [
        next((name for name, block in zip("qkv", want, strict=True) if np.array_equal(part, block)), "?")
        for part in have
    ]
    return (
        f"its rows are in the order {', '.join(order)} instead of q, k, v"
        if sorted(order) == ["k", "q", "v"] and order != ["q", "k", "v"]
        else ""
    )


def _remerged(parameter: str, difference: np.ndarray, updates: Sequence[tuple[str, ExpertUpdate]]) -> Iterator[str]:
    """Causes that explain the whole difference: c times an update, or c times one of its experts."""
    for task, update in updates:
        pairs = {rows: pair for rows, pair in update.factors.items() if rows.parameter == parameter}
        if times := _multiple(difference, _added(pairs, difference)):
            yield f"the update of task {task} {_told(times)}"
        for rows, pair in pairs.items():
            outside = _without(difference, rows)
            for expert in range(pair.u.shape[1]) if not outside.any() else ():
                one = Factors(pair.u[:, [expert]], pair.v[[expert]])
                if times := _multiple(difference, _added({rows: one}, difference)):
                    yield f"expert {expert} of task {task} in rows {rows.start}:{rows.stop} {_told(times)}"


def _added(pairs: Mapping[Rows, Factors], difference: np.ndarray) -> np.ndarray:
    """What the merge of these experts alone adds to a weight."""
    if not pairs:
        return np.zeros_like(difference)
    parameter = next(iter(pairs)).parameter
    return ExpertUpdate(pairs).apply({parameter: np.zeros(difference.shape, np.float32)})[parameter].astype(np.float64)


def _without(difference: np.ndarray, rows: Rows) -> np.ndarray:
    return np.concatenate([difference[: rows.start], difference[rows.stop :]])


def _multiple(difference: np.ndarray, cause: np.ndarray) -> int:
    """The whole number c != 0 with difference = c cause, or 0."""
    norm = (cause * cause).sum()
    if not norm:
        return 0
    times = round(float((difference * cause).sum() / norm))
    return times if times and np.linalg.norm(difference - times * cause) <= RESIDUAL * np.linalg.norm(difference) else 0


def _told(times: int) -> str:
    return (
        "is missing"
        if times == -1
        else f"is merged {1 + times} times"
        if times > 0
        else f"is subtracted {-1 - times} times"
    )
