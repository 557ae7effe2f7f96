"""The settings of the pools of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Target = Literal["q", "k", "v", "out", "fc", "proj", "conv"]
Tower = Literal["visual", "textual"]
RoutingToken = Literal["first", "end", "mean"]


@dataclass(frozen=True)
class PoolSettings:
    """Sizes of the pools of a model, how they choose, and the linears that get one.

    `rank` experts, `k_train` act on a batch, `k_merge` are merged; scaling = alpha / rank. `router` is "random" (as it was
    drawn) or "straight-through" (it learns). `gate` is "binary" or "sparse" (each expert has a trained weight and no router).
    `select`: those merged have the largest effect on the loss (expert_effect.py), or the most votes.
    `layers` are numbers of blocks from 0, empty for all. `text_token` is the token that votes in the text tower.
    """

    rank: int
    k_train: int
    k_merge: int
    alpha: float
    dropout: float
    router: Literal["random", "straight-through"]
    gate: Literal["binary", "sparse"]
    select: Literal["effect", "votes"]
    text_token: Literal["start", "end"]
    towers: tuple[Tower, ...]
    targets: tuple[Target, ...]
    layers: tuple[int, ...]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank
