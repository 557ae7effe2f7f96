"""Delta encoding of small files (reports, manifests, class embeddings) against an older version."""

from __future__ import annotations

import difflib

import numpy as np

SHORT = 64  # bytes: a run of equal bytes shorter than this costs more as a part of its own than sent again


def differences(old: bytes, new: bytes) -> list[tuple[str, int, int]]:
    """How to write `new` from pieces: ("base", start, stop) of `old`, ("payload", start, stop) of `new`."""
    if len(old) == len(new):
        runs = _equal_runs(old, new)
    elif b"\0" in new or not old:
        runs = []
    else:
        runs = _equal_lines(old, new)
    pieces, position = [], 0
    for start, at, length in [*((a, b, n) for a, b, n in runs if n >= SHORT), (0, len(new), 0)]:
        if at > position:
            pieces.append(("payload", position, at))
        if length:
            pieces.append(("base", start, start + length))
        position = at + length
    return pieces


def _equal_runs(old: bytes, new: bytes) -> list[tuple[int, int, int]]:
    """(start in old, start in new, length) of the bytes that are equal where they stand."""
    same = np.frombuffer(old, np.uint8) == np.frombuffer(new, np.uint8)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]])))
    return [(int(a), int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= SHORT]


def _equal_lines(old: bytes, new: bytes) -> list[tuple[int, int, int]]:
    """(start in old, start in new, length) of the lines that both have, in order."""
    olds, news = old.splitlines(keepends=True), new.splitlines(keepends=True)
    starts = [np.cumsum([0, *map(len, lines)]).tolist() for lines in (olds, news)]
    blocks = difflib.SequenceMatcher(None, olds, news).get_matching_blocks()
    return [(starts[0][a], starts[1][b], starts[1][b + n] - starts[1][b]) for a, b, n in blocks]
