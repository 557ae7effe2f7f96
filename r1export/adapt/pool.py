"""A pool of rank-1 experts beside one linear: which of them act, and what they add.

    TRAIN   s ((X~ A^T) * g) B^T      g = 1_S, S = top-k_train of the votes of the whole batch, X~ = dropout(X)
    FROZEN  s ((X  A^T) * g) B^T      g constant: the experts that will be merged; no router, no dropout

Each sample votes with the top-k_train of softmax(R z + bias), z = its routing token: position 0 of the linear's input,
the end of the text, or the mean over positions in a tower that has neither.
In the text tower each text of a step votes once, however many images share it, and so do the texts of a distillation loss.
Probabilities only choose; the sum over experts is unweighted. Source: arXiv 2601.22828.

Two variations of g, both of which merge as well: the router learns through g + p - stopgrad(p), p the mean of the batch's
probabilities ("straight-through"); and g = w is trained itself and made sparse by soft thresholds ("sparse"), after
CoDyRA (arXiv 2412.01004).
Shapes: X (n, tokens, in), A (r, in), B (out, r), R (r, in).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PoolSettings:
    """Sizes of a pool: `rank` experts, `k_train` act on a batch, `k_merge` are merged; scaling = alpha / rank.

    `router` is "random" (as it was drawn) or "straight-through" (it learns). `gate` is "binary", "frequency" (frozen experts
    weigh as much as their share of the votes) or "sparse" (each expert has a trained weight and no router).
    `route_on` is the token that votes: "first", "end" of the text, or "mean" of all.
    """

    rank: int = 12
    k_train: int = 8
    k_merge: int = 4
    alpha: float = 1.0
    dropout: float = 0.2
    router: str = "random"
    gate: str = "binary"
    route_on: str = "first"

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


def top_experts(votes: Tensor, k: int) -> Tensor:
    """Indices of the k highest votes, ascending; a tie goes to the lower index. `votes` (r,) -> int64 (k,).

    >>> top_experts(torch.tensor([1, 5, 5, 0, 5]), 2)
    tensor([1, 2])
    """
    return torch.sort(votes, descending=True, stable=True).indices[:k].sort().values


def drop(x: Tensor, p: float) -> tuple[Tensor, float]:
    """`x` with each element zero with probability `p`, and the share of elements that is kept: dropout(x) is their quotient.

    On a CPU 16 random bits decide over an element, a sixth of the time of torch's own, which was a fifth of a training step.
    """
    if p == 0:
        return x, 1.0
    if x.device.type != "cpu":
        return F.dropout(x, p), 1.0
    below = min(round(p * 2**16), 2**16 - 1)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= below - 2**15
    return x * kept, 1 - below / 2**16


class Others(Protocol):
    """The other processes that train the same pools on other images of a batch."""

    def add_(self, votes: Tensor) -> None:
        """Add their votes, in place."""

    def average(self, mean: Tensor) -> Tensor:
        """The mean over all processes; gradients flow through."""


class EndOfText:
    """Where the texts that run through a tower end: set when they enter it, read by its pools."""

    positions: Tensor | None = None


class ExpertPool(nn.Module):
    """The experts of one adapted linear. `forward(x)` is what they add to its output.

    `gate` is None while a router chooses, or the weights (r,) of the experts when the choice is frozen.
    `past` (out, m) holds the merged columns of B of all earlier tasks, `span` (in, m) the leading directions of their
    inputs. `gram` (in, in), where it is not None, grows by X^T X with every call.
    """

    counts: Tensor
    past: Tensor
    span: Tensor

    def __init__(self, in_features: int, out_features: int, settings: PoolSettings, **place: Any) -> None:
        """`place` is device and dtype, as for nn.Linear."""
        super().__init__()
        self.settings = settings
        self.lora_A = nn.Parameter(torch.zeros(settings.rank, in_features, **place))
        self.lora_B = nn.Parameter(torch.zeros(out_features, settings.rank, **place))
        self.router = nn.Linear(in_features, settings.rank, **place)
        if settings.gate == "sparse":
            self.importance = nn.Parameter(torch.ones(settings.rank, **place))
        self.register_buffer("counts", torch.zeros(settings.rank, dtype=torch.int64, device=place.get("device")))
        self.register_buffer("past", torch.zeros(out_features, 0, **place), persistent=False)
        self.register_buffer("span", torch.zeros(in_features, 0, **place), persistent=False)
        self.gate: Tensor | None = None
        self.gram: Tensor | None = None
        self.ends = EndOfText()
        self.others: Others | None = None

    def learned(self) -> list[nn.Parameter]:
        """The parameters that the loss reaches: a random router is none of them."""
        if self.settings.gate == "sparse":
            return [self.lora_A, self.lora_B, self.importance]
        router = list(self.router.parameters()) if self.settings.router == "straight-through" else []
        return [self.lora_A, self.lora_B, *router]

    def reset_(self, generator: torch.Generator) -> None:
        """Fresh experts for a task: A and router from `generator`, B and counts zero. Bounds are nn.Linear's defaults."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])  # kaiming_uniform(a=sqrt 5) is uniform within 1 / sqrt(fan_in)
        with torch.no_grad():
            for tensor in (self.lora_A, self.router.weight, self.router.bias):
                tensor.copy_(torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(-bound, bound, generator=generator))
            self.lora_B.zero_()
            self.counts.zero_()
            if self.settings.gate == "sparse":
                self.importance.fill_(1)
        self.gate = None

    def forward(self, x: Tensor) -> Tensor:
        if self.gram is not None:
            self.gram += x.flatten(0, -2).T @ x.flatten(0, -2)
        gate, kept = self.gate, 1.0
        if gate is None:
            x, kept = drop(x, self.settings.dropout if self.training else 0.0)
            gate = self.importance if self.settings.gate == "sparse" else self.route(self.token(x) / kept)
        return F.linear(F.linear(x, self.lora_A) * (gate * (self.settings.scaling / kept)), self.lora_B)

    def token(self, x: Tensor) -> Tensor:
        """The routing token (n, in) of each sample."""
        if self.settings.route_on == "mean":
            return x.mean(1)
        return x[:, 0] if self.settings.route_on == "first" else x[torch.arange(len(x)), self.ends.positions]

    def route(self, token: Tensor) -> Tensor:
        """The batch's gate (r,) from the votes of its samples; in training mode the votes are counted."""
        learns = self.settings.router == "straight-through"
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            probabilities = self.router(token).softmax(-1)
        ranked = torch.sort(probabilities, dim=-1, descending=True, stable=True).indices[:, : self.settings.k_train]
        votes = torch.bincount(ranked.reshape(-1), minlength=self.settings.rank)
        if self.others is not None:
            self.others.add_(votes)
        if self.training:
            self.counts += votes
        gate = self._mask(top_experts(votes, self.settings.k_train))
        if not learns:
            return gate
        mean = probabilities.mean(0) if self.others is None else self.others.average(probabilities.mean(0))
        return gate + (mean - mean.detach())

    def selected(self, k: int | None = None) -> Tensor:
        """The k (default k_merge) experts with the most votes of this task, ascending; those not zero of a sparse gate."""
        if self.settings.gate == "sparse":
            kept = self.importance.detach().nonzero()[:, 0]
            return kept if len(kept) else top_experts(self.importance.detach().abs(), 1)
        return top_experts(self.counts, self.settings.k_merge if k is None else k)

    def freeze_(self, k: int | None = None) -> None:
        """From now on exactly the selected experts act, whatever the input: the function that will be merged."""
        self.gate = self.frozen_gate(k)

    def frozen_gate(self, k: int | None = None) -> Tensor:
        """The weights (r,) of the experts once they are frozen: zero for those that are not selected."""
        mask = self._mask(self.selected(k))
        if self.settings.gate == "sparse":
            return mask * self.importance.detach()
        if self.settings.gate == "frequency":
            return mask * self.counts * self.settings.k_train / self.counts.sum().clamp(min=1)
        return mask

    @torch.no_grad()
    def shrink_(self, threshold: float) -> None:
        """Soft threshold on the weights of a sparse gate: w = sign(w) max(|w| - threshold, 0)."""
        self.importance.copy_(F.softshrink(self.importance, threshold))

    def overlap(self) -> Tensor:
        """sum |B_J^T P| over the leading experts J and the merged columns P of earlier tasks (a scalar)."""
        return (self.lora_B[:, self.selected()].T @ self.past).abs().sum()

    def input_overlap(self) -> Tensor:
        """sum |A_J V| over the leading experts J and the directions V of earlier tasks' inputs (a scalar)."""
        return (self.lora_A[self.selected()] @ self.span).abs().sum()

    def _mask(self, experts: Tensor) -> Tensor:
        return torch.zeros(self.settings.rank, device=self.lora_A.device, dtype=self.lora_A.dtype).index_fill_(
            0, experts, 1
        )
