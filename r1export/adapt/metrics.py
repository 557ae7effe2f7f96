"""Accuracy on a sequence of tasks, and the figures that summarize it.

`accuracy[i][j]` is the top-1 accuracy (a share, 0 to 1) on test set j after task i. Definitions: Zheng et al., ZSCL, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StreamMetrics:
    """`transfer` is None for a single task."""

    transfer: float | None
    avg: float
    last: float
    forgetting: tuple[float, ...]


def stream_metrics(accuracy: Sequence[Sequence[float]]) -> StreamMetrics:
    """Sum up a square matrix of accuracies.

    Transfer = mean over j >= 2 of mean over i < j of a[i][j]: what earlier tasks do to tasks not yet trained.
    Avg = mean of all a[i][j]. Last = mean_j a[T][j].
    Forgetting of task j = best a[i][j] from when it was trained on, minus a[T][j].

    >>> stream_metrics([[1.0, 0.5], [0.75, 1.0]])
    StreamMetrics(transfer=0.5, avg=0.8125, last=0.875, forgetting=(0.25, 0.0))
    """
    a = np.asarray(accuracy, np.float64)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not len(a):
        raise ValueError(f"accuracy of shape {a.shape}, expected one row and one column per task")
    tasks = len(a)
    transfer = float(np.mean([a[:j, j].mean() for j in range(1, tasks)])) if tasks > 1 else None
    forgetting = tuple(float(a[j:, j].max() - a[-1, j]) for j in range(tasks))
    return StreamMetrics(transfer, float(a.mean()), float(a[-1].mean()), forgetting)


def top1(image_embeds: np.ndarray, class_embeds: np.ndarray, labels: np.ndarray) -> float:
    """Share of images (n, D) whose nearest class (C, D) by cosine is their label (n,)."""
    return float((np.argmax(image_embeds @ class_embeds.T, axis=1) == labels).mean())
