"""How the experts of a pool are chosen: by the votes of a batch, by each sample, or once for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Peers(Protocol):
    """The other processes that train the same pools on other images of a batch."""

    def add_(self, votes: Tensor) -> None:
        """Add their votes, in place."""

    def average(self, mean: Tensor) -> Tensor:
        """The mean over all processes; gradients flow through."""


@dataclass(frozen=True)
class Batch:
    """The samples of a batch vote together, with those of `peers` if there are some: one set of experts acts on all."""

    peers: Peers | None = None


@dataclass(frozen=True)
class PerSample:
    """Each sample votes alone and gets its own experts, as if every batch held one sample."""


@dataclass(frozen=True, eq=False)
class Frozen:
    """The same experts act on every input, with the weights `gate` (r,): no router, no dropout."""

    gate: Tensor


Routing = Batch | PerSample | Frozen


def top_experts(votes: Tensor, k: int) -> Tensor:
    """Indices of the k highest votes, ascending; a tie goes to the lower index. `votes` (r,) -> int64 (k,).

    >>> top_experts(torch.tensor([1, 5, 5, 0, 5]), 2)
    tensor([1, 2])
    """
    return torch.sort(votes, descending=True, stable=True).indices[:k].sort().values
