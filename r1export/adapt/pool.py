"""A pool of rank-1 experts beside one linear: which of them act, and what they add.

    TRAIN   s ((X~ A^T) * g) B^T      g = 1_S, S = top-k_train of the votes of the whole batch, X~ = dropout(X)
    FROZEN  s ((X  A^T) * g) B^T      g constant: the experts that will be merged; no router, no dropout

Each sample votes with the top-k_train of softmax(R z + bias), z = its routing token: position 0 of
the linear's input, or the mean over positions in a tower that has no class token.
Probabilities only choose; the sum over experts is unweighted. Source: arXiv 2601.22828.
Shapes: X (n, tokens, in), A (r, in), B (out, r), R (r, in).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PoolSettings:
    """Sizes of a pool: `rank` experts, `k_train` act on a batch, `k_merge` are merged; scaling = alpha / rank.

    `route_on` is the token that votes: "first", or "mean" of all.
    """

    rank: int = 12
    k_train: int = 8
    k_merge: int = 4
    alpha: float = 1.0
    dropout: float = 0.2
    route_on: str = "first"

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


def top_experts(votes: Tensor, k: int) -> Tensor:
    """Indices of the k highest votes, ascending; a tie goes to the lower index. `votes` (r,) -> int64 (k,)."""
    return torch.sort(votes, descending=True, stable=True).indices[:k].sort().values


class ExpertPool(nn.Module):
    """The experts of one adapted linear. `forward(x)` is what they add to its output.

    `gate` is None while a router chooses, or a float mask (r,) when the choice is frozen.
    `past` (out, m) holds the merged columns of B of all earlier tasks.
    """

    def __init__(self, in_features: int, out_features: int, settings: PoolSettings, **place: Any) -> None:
        """`place` is device and dtype, as for nn.Linear."""
        super().__init__()
        self.settings = settings
        self.lora_A = nn.Parameter(torch.zeros(settings.rank, in_features, **place))
        self.lora_B = nn.Parameter(torch.zeros(out_features, settings.rank, **place))
        self.router = nn.Linear(in_features, settings.rank, **place)
        self.register_buffer("counts", torch.zeros(settings.rank, dtype=torch.int64, device=place.get("device")))
        self.register_buffer("past", torch.zeros(out_features, 0, **place), persistent=False)
        self.gate: Tensor | None = None

    def reset_(self, generator: torch.Generator) -> None:
        """Fresh experts for a task: A and router from `generator`, B and counts zero. Bounds are nn.Linear's defaults."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])  # kaiming_uniform(a=sqrt 5) is uniform within 1 / sqrt(fan_in)
        with torch.no_grad():
            for tensor in (self.lora_A, self.router.weight, self.router.bias):
                tensor.copy_(torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(-bound, bound, generator=generator))
            self.lora_B.zero_()
            self.counts.zero_()
        self.gate = None

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate
        if gate is None:
            x = F.dropout(x, self.settings.dropout, self.training)
            gate = self.route(x)
        return F.linear(F.linear(x, self.lora_A) * (gate * self.settings.scaling), self.lora_B)

    @torch.no_grad()
    def route(self, x: Tensor) -> Tensor:
        """The batch's gate (r,) from the votes of its samples; in training mode the votes are counted."""
        token = x[:, 0] if self.settings.route_on == "first" else x.mean(1)
        probabilities = self.router(token).softmax(-1)
        ranked = torch.sort(probabilities, dim=-1, descending=True, stable=True).indices[:, : self.settings.k_train]
        votes = torch.bincount(ranked.reshape(-1), minlength=self.settings.rank)
        if self.training:
            self.counts += votes
        return self._mask(top_experts(votes, self.settings.k_train))

    def selected(self, k: int | None = None) -> Tensor:
        """The k (default k_merge) experts with the most votes of this task, ascending."""
        return top_experts(self.counts, self.settings.k_merge if k is None else k)

    def freeze_(self, k: int | None = None) -> None:
        """From now on exactly the selected experts act, whatever the input: the function that will be merged."""
        self.gate = self._mask(self.selected(k))

    def overlap(self) -> Tensor:
        """sum |B_J^T P| over the leading experts J and the merged columns P of earlier tasks (a scalar)."""
        return (self.lora_B[:, self.selected()].T @ self.past).abs().sum()

    def _mask(self, experts: Tensor) -> Tensor:
        return torch.zeros(self.settings.rank, device=self.lora_A.device, dtype=self.lora_A.dtype).index_fill_(
            0, experts, 1
        )
