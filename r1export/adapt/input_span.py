"""Protected input directions: new experts ignore the span of earlier tasks' inputs in each layer, which reduces forgetting.

    during a task    A <- A - (A M) M^T    after the reset and after every step of the optimizer
    after a task     G = sum x x^T over all tokens of its training images and class prompts, experts frozen
                     R = (I - M M^T) G (I - M M^T) = V diag(l) V^T,  held_i = (tr G - tr R + l_1 + ... + l_i) / tr G
                     M <- [M, v_1 ... v_k],  k the smallest with held_k >= share

    before a task    of the images alone, by the model as it is: the same for its own inputs, in force during this task only

M (in, m) has orthonormal columns and is empty before the first task. An expert adds s B A x, so what lies in the span of M is
not changed at all, and the merge and the shipped bytes stay as they are. A task's own inputs before it stand for all that the
model has seen of photographs: the leading directions of both are much the same, as ImageNet's probe shows
(docs/experiments/forgetting.md). Sources: gradient projection memory (arXiv
2103.09762), which InfLoRA (2404.00228) and KeepLoRA (2601.19659) carry over to LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from r1export.adapt.clip import Clip
from r1export.adapt.image_cache import Images
from r1export.adapt.pool import Pools, routed
from r1export.adapt.text_truncation import short_texts
from r1export.errors import InputError
from r1export.update.factors import Rows

BATCH = 64  # images or prompts at a time
Span = dict[Rows, np.ndarray]  # by pool: orthonormal columns (in, k), float32
Moments = dict[Rows, Tensor]  # by pool: sum of x x^T, float64 (in, in)


def set_spans_(pools: Pools, spans: Sequence[Span]) -> None:
    """Keep the experts of every pool off what `spans` hold together. A span can leave a pool out."""
    for rows, pool in pools.items():
        columns = [torch.from_numpy(span[rows]) for span in spans if rows in span]
        pool.set_span_(torch.cat(columns, 1) if columns else pool.span[:, :0])


def new_directions(clip: Clip, pools: Pools, images: Images, prompts: Tensor, share: float) -> Span:
    """The directions that a trained task adds to the span of each pool, so that `share` of the energy of its inputs is held.

    `prompts` are tokens (C, L). The experts act as they will be merged. Takes one pass over the images.
    """
    return _new_span(pools, input_moments(clip, pools, images, prompts), share)


def own_directions(clip: Clip, pools: Pools, images: Images, sample: np.ndarray, share: float) -> Span:
    """The directions outside of the span of each pool of the image tower, so that with them `share` of the energy is held of
    what the model makes of the images `sample`, int64 (n,), before it learns them: B is zero after the reset."""
    parts = (images.batch(sample[start : start + BATCH]) for start in range(0, len(sample), BATCH))
    return _new_span(pools, _moments(clip, pools, parts, ()), share)


def input_moments(clip: Clip, pools: Pools, images: Images, prompts: Tensor) -> Moments:
    """The sum of x x^T over all positions of the inputs of every pool, with the experts that will be merged."""
    return _moments(clip, pools, images.batches(BATCH), prompts.split(BATCH))


@torch.no_grad()
def _moments(clip: Clip, pools: Pools, images: Iterable[Tensor], prompts: Iterable[Tensor]) -> Moments:
    clip.model.eval()
    with routed(pools.values(), lambda pool: pool.frozen()), _watched(pools) as moments, short_texts(clip.model):
        for pixels in images:
            clip.encode_image(pixels)
        for tokens in prompts:
            clip.encode_text(tokens)
    return moments


@contextmanager
def _watched(pools: Pools) -> Iterator[Moments]:
    """Within it the moments of what goes into every pool are added up. Pools that read the same input share one tensor."""
    moments: Moments = {}
    # Input and moments of the pool before: an input that is kept alive shares its identity with no other.
    last: list[tuple[Tensor, Tensor]] = []

    def watch(rows: Rows) -> Callable[..., None]:
        def add(pool: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if not (last and last[0][0] is x):
                read = pools[rows].reads(x).float()
                product = (read.T @ read).cpu().double()
                last[:] = [(x, moments[rows].add_(product) if rows in moments else product)]
            moments[rows] = last[0][1]

        return add

    handles = [pool.register_forward_pre_hook(watch(rows)) for rows, pool in pools.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _new_span(pools: Pools, moments: Moments, share: float) -> Span:
    """The directions of every pool that has moments, computed once for pools with the same input and the same span."""
    spans: Span = {}
    for rows, moment in moments.items():
        held = pools[rows].span
        alike = (other for other in spans if moments[other] is moment and torch.equal(pools[other].span, held))
        same = next(alike, None)
        spans[rows] = _directions(moment, held.cpu().double(), share) if same is None else spans[same]
    return spans


def _directions(moment: Tensor, span: Tensor, share: float) -> np.ndarray:
    """The leading directions (in, k) of what lies outside of `span` (in, m), as the formula above counts them."""
    outside = torch.eye(len(span), dtype=torch.float64) - span @ span.T
    rest = outside @ moment @ outside
    values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
    energy, values = moment.trace(), values.flip(0).clamp(min=0)
    before = energy - rest.trace()
    held = torch.cat([before[None], before + values.cumsum(0)])  # with 0, 1, 2, ... directions
    count = int((held < share * energy).sum())
    directions: np.ndarray = vectors.flip(1)[:, :count].float().numpy()
    return np.ascontiguousarray(directions)


def span_tensors(span: Span) -> dict[str, np.ndarray]:
    """The directions of a task as the tensors of a file, named `ROWS.directions`."""
    return {f"{rows}.directions": columns for rows, columns in span.items()}


def parse_span(tensors: Mapping[str, np.ndarray], pools: Pools, location: str) -> Span:
    """Inverse of `span_tensors`. Raises InputError, which begins with `location`, if a pool has none or they are of another width."""
    span = {}
    for rows, pool in pools.items():
        columns = tensors.get(f"{rows}.directions")
        if columns is None or columns.ndim != 2 or len(columns) != len(pool.span):
            found = "missing" if columns is None else f"of shape {columns.shape}"
            raise InputError(
                f"{location}: {rows}.directions is {found}, expected ({len(pool.span)}, k)",
                "the file is corrupted or from another recipe: train the task again",
            )
        span[rows] = columns
    return span
