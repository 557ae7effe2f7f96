"""What merging and freezing cost, published for every task.

G1  merge exactness: largest logit difference and top-1 agreement of FROZEN and MERGED
G2  freezing gap: accuracy of per-input routing minus FROZEN with the same number of experts
G3  shrink gap: accuracy of FROZEN with k_train experts minus FROZEN with the k_merge that are merged; None for a sparse
    gate, which itself decides how many are merged
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r1export.adapt.clip import Clip
from r1export.adapt.evaluate import class_embeddings
from r1export.adapt.metrics import top1
from r1export.adapt.pool import ExpertPool
from r1export.adapt.trainer import Pools
from r1export.data.task import Task
from r1export.verify.parity import Embeddings
from r1export.verify.results import Gaps, RunGaps

BATCH = 32


def exactness(frozen: Embeddings, merged: Embeddings, scale: float) -> dict[str, float]:
    """G1 on the parity samples; `scale` = exp(logit_scale)."""
    left, right = (scale * e.visual.astype(np.float64) @ e.textual.astype(np.float64).T for e in (frozen, merged))
    return {"G1": float(np.abs(left - right).max()), "G1_top1_agreement": float((left.argmax(1) == right.argmax(1)).mean())}


def freezing(clip: Clip, pools: Pools, task: Task, pixels: Tensor, labels: np.ndarray) -> dict[str, Any]:
    """G2 and G3 on `pixels`, uint8 (n, 3, h, w). Every pool is frozen with its k_merge again afterwards."""
    settings = next(iter(pools.values())).settings
    found: dict[str, float] = {}
    try:
        for k in sorted({settings.k_merge, settings.k_train, settings.rank}):
            for pool in pools.values():
                pool.freeze_(k)
            found[f"frozen_{k}"] = _accuracy(clip, task, pixels, labels)
        for pool in pools.values():
            pool.gate = None
        found["routed_batch_32"] = _accuracy(clip, task, pixels, labels)
        with _routed_each(pools.values()):
            found["routed_batch_1"] = _accuracy(clip, task, pixels, labels)
    finally:
        for pool in pools.values():
            pool.freeze_()
    same = found[f"frozen_{settings.k_train}"]
    gaps = {
        "G2": found["routed_batch_1"] - same,
        "G2_batch_32": found["routed_batch_32"] - same,
        "G3": None if settings.gate == "sparse" else same - found[f"frozen_{settings.k_merge}"],
    }
    return gaps | {"images": len(labels), "accuracies": found}


@contextmanager
def _routed_each(pools: Collection[ExpertPool]) -> Iterator[None]:
    """Each sample gets the gate that it would get in a batch of its own, all in one batch."""
    for pool in pools:
        pool.route = partial(_route_each, pool)  # type: ignore[method-assign]  # for the time of the block
    try:
        yield
    finally:
        for pool in pools:
            del pool.route


def _route_each(pool: ExpertPool, token: Tensor) -> Tensor:
    return torch.stack([ExpertPool.route(pool, one[None]) for one in token])[:, None]


@torch.inference_mode()
def _accuracy(clip: Clip, task: Task, pixels: Tensor, labels: np.ndarray) -> float:
    images = torch.cat([clip.encode_image(part) for part in pixels.split(BATCH)]).float().cpu().numpy()
    return top1(images, class_embeddings(clip, task, BATCH), labels)


def summarize(by_task: Mapping[str, Gaps]) -> RunGaps | None:
    """The gaps of a run: the largest G1, the means of G2 and G3, and everything by task."""
    if not by_task:
        return None
    gaps = list(by_task.values())
    shrink = [gap.G3 for gap in gaps if gap.G3 is not None]
    return RunGaps(
        G1=max(gap.G1 for gap in gaps),
        G2=float(np.mean([gap.G2 for gap in gaps])),
        G3=float(np.mean(shrink)) if shrink else None,
        tasks=by_task,
    )
