"""What merging and freezing cost, published for every task.

G1  merge exactness: largest logit difference and top-1 agreement of FROZEN and MERGED
G2  freezing gap: accuracy of per-input routing minus FROZEN with the same number of experts
G3  shrink gap: accuracy of FROZEN with k_train experts minus FROZEN with the k_merge that are merged; None for a sparse
    gate, which itself decides how many are merged
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r1export.adapt.clip import Clip
from r1export.adapt.evaluate import class_embeddings
from r1export.adapt.metrics import top1
from r1export.adapt.pool import Batch, ExpertPool, PerSample, Pools, Routing, routed
from r1export.data.task import Task
from r1export.verify.parity import Outputs

BATCH = 32


def exactness(frozen: Outputs, merged: Outputs, scale: float) -> dict[str, float]:
    """G1 on the parity samples; `scale` = exp(logit_scale)."""
    left, right = (
        scale * outputs.visual[0].astype(np.float64) @ outputs.textual[0].astype(np.float64).T
        for outputs in (frozen, merged)
    )
    return {
        "G1": float(np.abs(left - right).max()),
        "G1_top1_agreement": float((left.argmax(1) == right.argmax(1)).mean()),
    }


def freezing(clip: Clip, pools: Pools, task: Task, pixels: Tensor, labels: np.ndarray) -> dict[str, Any]:
    """G2 and G3 on `pixels`, uint8 (n, 3, h, w). Afterwards every pool routes as before."""
    settings = next(iter(pools.values())).settings
    routings: dict[str, Callable[[ExpertPool], Routing]] = {
        f"frozen_{k}": partial(ExpertPool.frozen, k=k)
        for k in sorted({settings.k_merge, settings.k_train, settings.rank})
    }
    routings |= {"routed_batch_32": lambda _: Batch(), "routed_batch_1": lambda _: PerSample()}
    accuracies = {}
    for name, choose in routings.items():
        with routed(pools.values(), choose):
            accuracies[name] = _accuracy(clip, task, pixels, labels)
    as_trained = accuracies[f"frozen_{settings.k_train}"]
    gaps = {
        "G2": accuracies["routed_batch_1"] - as_trained,
        "G2_batch_32": accuracies["routed_batch_32"] - as_trained,
        "G3": None if settings.gate == "sparse" else as_trained - accuracies[f"frozen_{settings.k_merge}"],
    }
    return gaps | {"images": len(labels), "accuracies": accuracies}


@torch.inference_mode()
def _accuracy(clip: Clip, task: Task, pixels: Tensor, labels: np.ndarray) -> float:
    images = torch.cat([clip.encode_image(part) for part in pixels.split(BATCH)]).float().cpu().numpy()
    return top1(images, class_embeddings(clip, task, BATCH), labels)


def summarised(by_task: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The gaps of a run: the largest G1, the means of G2 and G3, and everything by task."""
    if not by_task:
        return None
    largest = max(gap["G1"] for gap in by_task.values())
    known = {name: [gap[name] for gap in by_task.values() if gap[name] is not None] for name in ("G2", "G3")}
    means = {name: float(np.mean(values)) if values else None for name, values in known.items()}
    return {"G1": largest, **means, "tasks": dict(by_task)}
