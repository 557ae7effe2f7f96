"""A pool of rank-1 experts for one linear or convolution: which of them act, and what they add.

    Batch, PerSample  s ((X~ A^T) * g) B^T    g = 1_S, S = top-k_train of the votes of all samples, or of each; X~ = dropout(X)
    Frozen            s ((X  A^T) * g) B^T    g constant: the experts that will be merged; no router, no dropout
    of a convolution  s B * (g * conv(X, A))  the same with A (r, in, kh, kw), moved as the weight is, and B as 1 x 1

A convolution's weight (out, in, kh, kw) is the matrix (out, in*kh*kw), so its experts are merged as those of a linear.

Each sample votes with the top-k_train of softmax(R z + bias), z = its routing token: position 0 of the linear's input,
the end of the text, or the mean over positions in a tower that has neither. An image whose windows are computed as
samples of their own votes once.
In the text tower each text of a step votes once, however many images share it, and so do the texts of a distillation loss.
Probabilities only choose; the sum over experts is unweighted. Source: arXiv 2601.22828.

Two variations of g, both of which merge as well: the router learns through g + p - stopgrad(p), p the mean of the batch's
probabilities ("straight-through"); and g = w is trained itself and made sparse by soft thresholds ("sparse"), after
CoDyRA (arXiv 2412.01004).
Shapes: X (n, tokens, in) or (n, in, h, w), A (r, in) or (r, in*kh*kw), B (out, r), R (r, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1export.adapt.pool_settings import PoolSettings, RoutingToken
from r1export.adapt.routing import Batch, Frozen, Peers, PerSample, Routing, top_experts
from r1export.update.factors import Rows


def drop(x: Tensor, p: float) -> tuple[Tensor, float]:
    """`x` with each element zero with probability `p`, and the share of elements that is kept: dropout(x) is their quotient.

    On a CPU 16 random bits decide over an element, a sixth of the time of torch's own, which was a fifth of a training step.
    They come from numpy, with a seed from torch: it generates them twice as fast and compares them six times as fast.
    """
    if p == 0:
        return x, 1.0
    if x.device.type != "cpu":
        return F.dropout(x, p), 1.0
    below = min(round(p * 2**16), 2**16 - 1)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    words = np.random.PCG64(seed).random_raw(-(-x.numel() // 4))
    kept = words.view(np.uint16)[: x.numel()].reshape(x.shape) >= below
    return x * torch.from_numpy(kept), 1 - below / 2**16


class TowerInputs:
    """What runs through a tower: set when it enters, read by the tower's pools."""

    ends: Tensor | None = None
    """Where each text ends, int64 (n,)."""
    images: int | None = None
    """How many images there are; their windows may be computed as samples of their own, one image after the other."""


class ExpertPool(nn.Module):
    """The experts of one adapted linear. `forward(x)` is what they add to its output, chosen by `routing`.

    `route_on` is the token that votes; "end" and "mean" read `inputs`. `past` (out, m) holds the merged columns of B of
    all earlier tasks, `span` (in, m) what their inputs span, which the experts do not read (see input_span.py).
    """

    counts: Tensor
    chosen: Tensor
    past: Tensor
    span: Tensor

    def __init__(
        self,
        base: Tensor,
        settings: PoolSettings,
        *,
        route_on: RoutingToken = "first",
        inputs: TowerInputs | None = None,
    ) -> None:
        """A pool for the rows `base` (out, in, ...) of a weight, on its device and in its dtype; only the shape is used."""
        super().__init__()
        rows, columns = base.flatten(1).shape
        self.settings, self.route_on, self._inputs = settings, route_on, inputs or TowerInputs()
        self.lora_A = nn.Parameter(base.new_zeros(settings.rank, columns))
        self.lora_B = nn.Parameter(base.new_zeros(rows, settings.rank))
        self.router = nn.Linear(base.shape[1], settings.rank, device=base.device, dtype=base.dtype)
        if settings.gate == "sparse":
            self.importance = nn.Parameter(base.new_ones(settings.rank))
        self.register_buffer("counts", base.new_zeros(settings.rank, dtype=torch.int64))
        self.register_buffer("chosen", base.new_zeros(settings.rank, dtype=torch.bool))
        self.register_buffer("past", base.new_zeros(rows, 0), persistent=False)
        self.register_buffer("span", base.new_zeros(columns, 0), persistent=False)
        self._routing: Routing = Batch()

    @property
    def routing(self) -> Routing:
        """How experts are chosen: `Batch` until `route_` or `freeze_` says otherwise."""
        return self._routing

    def route_(self, routing: Routing) -> None:
        """Choose experts by `routing` from now on."""
        self._routing = routing

    def learned(self) -> list[nn.Parameter]:
        """The parameters that the loss reaches: a random router is none of them."""
        if self.settings.gate == "sparse":
            return [self.lora_A, self.lora_B, self.importance]
        router = list(self.router.parameters()) if self.settings.router == "straight-through" else []
        return [self.lora_A, self.lora_B, *router]

    def reset_(self, generator: torch.Generator) -> None:
        """Fresh experts for a task: A and router from `generator`, B and counts zero. Bounds are nn.Linear's defaults."""
        with torch.no_grad():
            for tensor in (self.lora_A, self.router.weight, self.router.bias):
                fan_in = (self.lora_A if tensor is self.lora_A else self.router.weight).shape[1]
                bound = 1 / math.sqrt(fan_in)  # kaiming_uniform(a=sqrt 5) is uniform within 1 / sqrt(fan_in)
                tensor.copy_(torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(-bound, bound, generator=generator))
            self.lora_B.zero_()
            self.counts.zero_()
            self.chosen.zero_()
            if self.settings.gate == "sparse":
                self.importance.fill_(1)
        self.leave_span_()
        self._routing = Batch()

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, in) -> (n, tokens, out); there may be more axes of positions than one."""
        x, kept = self.dropped(x)
        return self.add(x, self.weights(x, kept))

    def dropped(self, x: Tensor) -> tuple[Tensor, float]:
        """`drop` of the input, if the experts that act are still chosen in training."""
        chosen = self.training and not isinstance(self._routing, Frozen)
        return drop(x, self.settings.dropout if chosen else 0.0)

    def weights(self, x: Tensor, kept: float) -> Tensor:
        """The weights of the experts, (r,) or (samples, 1, r), scaling included, for an input of which `dropped` kept a share."""
        if isinstance(self._routing, Frozen):
            return self._routing.gate * self.settings.scaling
        return self.gate(self.token(x) / kept, self._routing) * (self.settings.scaling / kept)

    def columns(self, x: Tensor, kept: float) -> Tensor:
        """The columns of B times the weights, as rows (r, out): the experts are the same for every sample."""
        return self.lora_B.T * self.weights(x, kept)[:, None]

    def add(self, x: Tensor, weights: Tensor) -> Tensor:
        """What the experts add with these weights."""
        low = F.linear(x, self.lora_A)
        if weights.ndim > 1:
            return F.linear((self._by_sample(low) * weights).view(low.shape), self.lora_B)
        return F.linear(low * weights, self.lora_B)

    def token(self, x: Tensor) -> Tensor:
        """The routing token (samples, in) of each sample."""
        if self.route_on == "mean":
            return self._by_sample(x).mean(1)
        if self.route_on == "first":
            return x[:, 0]
        assert self._inputs.ends is not None, "no text has entered the tower"
        return x[torch.arange(len(x)), self._inputs.ends]

    def _by_sample(self, x: Tensor) -> Tensor:
        """(samples, positions, channels): all positions of an image together, also if each window is a row of the batch."""
        samples = len(x) if self._inputs.images is None else self._inputs.images
        return x.reshape(samples, -1, x.shape[-1])

    def gate(self, token: Tensor, routing: Batch | PerSample) -> Tensor:
        """The weights of the experts for samples with these routing tokens (n, in): (r,) for all, or (n, 1, r) one by one.

        In training mode votes are counted. A sparse gate has no router: its weights are the same for every input.
        """
        if self.settings.gate == "sparse":
            return self.importance
        if isinstance(routing, PerSample):
            return torch.stack([self._vote(row, None) for row in token.split(1)])[:, None]
        return self._vote(token, routing.peers)

    def _vote(self, token: Tensor, peers: Peers | None) -> Tensor:
        """The gate (r,) that the samples choose together."""
        learns = self.settings.router == "straight-through"
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            probabilities = self.router(token).softmax(-1)
        ranked = torch.sort(probabilities, dim=-1, descending=True, stable=True).indices[:, : self.settings.k_train]
        votes = torch.bincount(ranked.reshape(-1), minlength=self.settings.rank)
        if peers is not None:
            peers.add_(votes)
        if self.training:
            self.counts += votes
        gate = self._mask(top_experts(votes, self.settings.k_train))
        if not learns:
            return gate
        mean = probabilities.mean(0) if peers is None else peers.average(probabilities.mean(0))
        return gate + (mean - mean.detach())

    def selected(self, k: int | None = None) -> Tensor:
        """The experts that are merged, ascending: those of `choose_`, or the k (default k_merge) with the most votes of this
        task; of a sparse gate those that are not zero.
        """
        if self.settings.gate == "sparse":
            kept = self.importance.detach().nonzero()[:, 0]
            return kept if len(kept) else top_experts(self.importance.detach().abs(), 1)
        if k is None and self.chosen.any():
            return self.chosen.nonzero()[:, 0]
        return top_experts(self.counts, self.settings.k_merge if k is None else k)

    def choose_(self, experts: Sequence[int]) -> None:
        """From now on these experts are the selected ones, whatever the votes."""
        self.chosen.zero_()
        self.chosen[list(experts)] = True

    def frozen(self, k: int | None = None) -> Frozen:
        """Exactly the selected experts, whatever the input: the function that will be merged."""
        mask = self._mask(self.selected(k))
        return Frozen(mask * self.importance.detach() if self.settings.gate == "sparse" else mask)

    def freeze_(self) -> None:
        """From now on the experts act that will be merged."""
        self._routing = self.frozen()

    @torch.no_grad()
    def shrink_(self, threshold: float) -> None:
        """Soft threshold on the weights of a sparse gate: w = sign(w) max(|w| - threshold, 0)."""
        self.importance.copy_(F.softshrink(self.importance, threshold))

    def set_past_(self, columns: Tensor) -> None:
        """The merged columns of B (out, m) of all earlier tasks, for `overlap`."""
        self.past = columns.to(self.lora_B)

    def set_span_(self, columns: Tensor) -> None:
        """Orthonormal columns (in, m) that the experts do not read from now on, once `leave_span_` is called."""
        self.span = columns.to(self.lora_A)

    @torch.no_grad()
    def leave_span_(self) -> None:
        """A <- A - (A M) M^T: what lies in the span M no longer reaches an expert."""
        if self.span.shape[1]:
            self.lora_A.sub_((self.lora_A @ self.span) @ self.span.T)

    def reads(self, x: Tensor) -> Tensor:
        """What the rows of A are multiplied with, one row for each position: (n, ..., in) -> (N, in)."""
        return x.reshape(-1, x.shape[-1])

    def writes(self, y: Tensor) -> Tensor:
        """What the rows of B give, one row for each position as in `reads`: (n, ..., out) -> (N, out)."""
        return y.reshape(-1, y.shape[-1])

    @torch.no_grad()
    def read_along_(self, directions: Tensor) -> None:
        """The first experts read these unit rows (k, in), with the mean square norm that `reset_` gives."""
        self.lora_A[: len(directions)] = directions / math.sqrt(3)

    def overlap(self) -> Tensor:
        """sum |B_J^T P| over the leading experts J and the merged columns P of earlier tasks (a scalar)."""
        return (self.lora_B[:, self.selected()].T @ self.past).abs().sum()

    def _mask(self, experts: Tensor) -> Tensor:
        return torch.zeros(self.settings.rank, device=self.lora_A.device, dtype=self.lora_A.dtype).index_fill_(
            0, experts, 1
        )


def add_experts_(y: Tensor, x: Tensor, pools: Sequence[ExpertPool | int]) -> Tensor:
    """What a linear gives, `y` (positions, out), plus what its pools add for its input `x` (n, tokens, in); `y` is overwritten.

    The pools adapt the rows of the weight one after the other; a number stands for as many rows without a pool. All of them
    read the same dropout of `x`, and there is one product with all A and one with all B. No pool routes per sample.
    """
    present = [pool for pool in pools if isinstance(pool, ExpertPool)]
    x, kept = present[0].dropped(x)
    low = F.linear(x.flatten(0, -2), torch.cat([pool.lora_A for pool in present]))
    columns = [y.new_zeros(0, pool) if isinstance(pool, int) else pool.columns(x, kept) for pool in pools]
    return y.addmm_(low.to(y.dtype), torch.block_diag(*columns).to(y.dtype))


Pools = dict[Rows, ExpertPool]  # by the rows of the parameter that they adapt, sorted


@contextmanager
def routed(pools: Iterable[ExpertPool], choose: Callable[[ExpertPool], Routing]) -> Iterator[None]:
    """Within it every pool routes as `choose` says of it; afterwards, whatever happened, as before."""
    before = [(pool, pool.routing) for pool in pools]
    try:
        for pool, _ in before:
            pool.route_(choose(pool))
        yield
    finally:
        for pool, routing in before:
            pool.route_(routing)
