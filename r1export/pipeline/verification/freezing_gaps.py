"""The cost of merging and freezing, for every task.

G1  merge exactness: largest logit difference and top-1 agreement of FROZEN and MERGED
G2  freezing gap: accuracy of per-input routing minus FROZEN with the same number of experts
G3  shrink gap: accuracy of FROZEN with k_train experts minus FROZEN with the k_merge that are merged; None for a sparse
    gate, which itself decides how many are merged

G2 and G3 exist only if the experts were routed to the end of training. With train.consolidate the selected experts continue
training alone, so the routed function was never trained and a gap to it is meaningless.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from r1export.adapt.clip import Clip
from r1export.adapt.evaluate import class_embeddings
from r1export.adapt.metrics import top1
from r1export.adapt.pool import ExpertPool, routed
from r1export.adapt.routing import Batch, PerSample, Routing
from r1export.data.task import Task
from r1export.pipeline.verification.inputs import LabelledImages
from r1export.pipeline.verification.torch_models import TorchModels
from r1export.verify.parity import Embeddings
from r1export.verify.results import Gaps, RunGaps

BATCH = 32


def measure_gaps(
    models: TorchModels, task: Task, test: LabelledImages | None, frozen: Embeddings, merged: Embeddings
) -> Gaps:
    """G1 on the parity samples, of which `frozen` and `merged` are the embeddings, and G2 and G3 on `test` if it is given.

    Afterwards every pool routes as before.
    """
    scale = float(models.merged.model.logit_scale.exp())
    left, right = (scale * e.visual.astype(np.float64) @ e.textual.astype(np.float64).T for e in (frozen, merged))
    exact = Gaps(
        G1=float(np.abs(left - right).max()),
        G1_top1_agreement=float((left.argmax(1) == right.argmax(1)).mean()),
    )
    return exact if test is None else _with_routing_gaps(exact, models, task, test)


def _with_routing_gaps(exact: Gaps, models: TorchModels, task: Task, test: LabelledImages) -> Gaps:
    settings = next(iter(models.pools.values())).settings
    routings: dict[str, Callable[[ExpertPool], Routing]] = {
        f"frozen_{k}": partial(ExpertPool.frozen, k=k) for k in sorted({settings.k_train, settings.rank})
    }
    routings |= {f"frozen_{settings.k_merge}": ExpertPool.frozen}  # those that are merged, however they were chosen
    routings |= {"routed_batch_32": lambda _: Batch(), "routed_batch_1": lambda _: PerSample()}
    accuracies = {}
    for name, choose in routings.items():
        with routed(models.pools.values(), choose):
            accuracies[name] = _accuracy(models.unmerged, task, test)
    as_trained = accuracies[f"frozen_{settings.k_train}"]
    return replace(
        exact,
        G2=accuracies["routed_batch_1"] - as_trained,
        G2_batch_32=accuracies["routed_batch_32"] - as_trained,
        G3=None if settings.gate == "sparse" else as_trained - accuracies[f"frozen_{settings.k_merge}"],
        images=len(test.labels),
        accuracies=accuracies,
    )


@torch.inference_mode()
def _accuracy(clip: Clip, task: Task, test: LabelledImages) -> float:
    images = torch.cat([clip.encode_image(part) for part in test.pixels.split(BATCH)]).float().cpu().numpy()
    return top1(images, class_embeddings(clip, task, BATCH), test.labels)


def summarize(by_task: Mapping[str, Gaps]) -> RunGaps | None:
    """The gaps of a run: the largest G1, the means of G2 and G3, and everything by task."""
    if not by_task:
        return None
    gaps = list(by_task.values())
    return RunGaps(
        G1=max(gap.G1 for gap in gaps),
        G2=_mean([gap.G2 for gap in gaps]),
        G3=_mean([gap.G3 for gap in gaps]),
        tasks=by_task,
    )


def _mean(gaps: list[float | None]) -> float | None:
    """The mean of those that were measured."""
    measured = [gap for gap in gaps if gap is not None]
    return float(np.mean(measured)) if measured else None
