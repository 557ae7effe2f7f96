"""Limit what a task may cost the model's other answers: scale its update down until an estimate of that cost is small enough.

    p_n  = softmax(s I_n T^T)                       the model before the task, for view n and reference names T
    cost = mean_n (p_n[a_n] - p_n[b_n])             a_n, b_n: the answers (highest logit) before and after the task

If p_n is calibrated, p_n[c] is the chance that answer c is right, so the cost is the zero-shot accuracy lost on such images: an
answer that flips between two equally likely names costs nothing. No other images are needed: views are small crops of the task's
own images, which training saw whole. Since a task changes the answers on its own images most, the estimate is too high for
others (docs/experiments/forgetting.md says by how much).

The update is linear in its scale but answers are not, and the largest scale within the limit is found by bisection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r1export.adapt.clip import Clip
from r1export.adapt.image_cache import Images
from r1export.adapt.pool import Pools, routed
from r1export.adapt.routing import Frozen
from r1export.adapt.text_truncation import short_texts

AREA = (0.1, 0.35)  # of an image, in a view
VIEWS = 256  # at most, of a task
HALVINGS = 5  # the scale is known to 1/32
BATCH = 64  # views or names embedded at a time


@dataclass(frozen=True)
class Guarded:
    """What `guard_` did: the `scale` (0..1) of the update, and its estimated cost in percentage points, `whole` and as `kept`."""

    limit: float
    scale: float
    whole: float
    kept: float


@dataclass(frozen=True)
class Answers:
    """The answers of the model before a task, to be compared with later ones.

    `probabilities` (n, C) of the reference names, whose `tokens` are int64 (C, L), for each of the n `views`.
    """

    views: Images
    tokens: Tensor
    probabilities: Tensor

    @classmethod
    def of(cls, clip: Clip, views: Images, names: Sequence[str]) -> Answers:
        """Those of the model as it stands: its pools must not add anything yet."""
        tokens = clip.tokenize([f"a photo of a {name}." for name in names])
        return cls(views, tokens, _logits(clip, views, tokens).softmax(1))

    def cost(self, clip: Clip) -> float:
        """Estimated loss of zero-shot accuracy of the model as it stands now, in percentage points; never negative."""
        now = _logits(clip, self.views, self.tokens).argmax(1, keepdim=True)
        lost = self.probabilities.amax(1, keepdim=True) - self.probabilities.gather(1, now)
        return 100 * lost.mean().item()


def guard_(clip: Clip, pools: Pools, answers: Answers, limit: float) -> Guarded:
    """Scale down the experts that will be merged until the estimated cost is at most `limit` percentage points."""
    whole = _cost(clip, pools, answers, 1.0)
    if whole <= limit:
        return Guarded(limit, scale=1.0, whole=whole, kept=whole)
    scale, kept, above = 0.0, 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (scale + above) / 2
        if (cost := _cost(clip, pools, answers, middle)) <= limit:
            scale, kept = middle, cost
        else:
            above = middle
    with torch.no_grad():
        for pool in pools.values():
            pool.lora_B.mul_(scale)
    return Guarded(limit, scale, whole, kept)


def _cost(clip: Clip, pools: Pools, answers: Answers, scale: float) -> float:
    with routed(pools.values(), lambda pool: Frozen(pool.frozen().gate * scale)):
        return answers.cost(clip)


@torch.no_grad()
def _logits(clip: Clip, views: Images, tokens: Tensor) -> Tensor:
    """float32 (n, C)."""
    clip.model.eval()
    images = torch.cat([clip.encode_image(batch) for batch in views.batches(BATCH)])
    with short_texts(clip.model):
        texts = torch.cat([clip.encode_text(part) for part in tokens.split(BATCH)])
    scale: Tensor = clip.model.logit_scale.exp()
    return (scale * images @ texts.T).float()
