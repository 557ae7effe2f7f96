"""Truncate texts at the end of the longest one: with causal attention, later positions have no effect.

A context has 77 tokens, a prompt about ten, so the same embeddings take a seventh of the work. Graphs are exported from the
complete tower, and the proof compares with the complete tower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1export.adapt.clip import ClipModel


@contextmanager
def short_texts(model: ClipModel) -> Iterator[None]:
    """Within it, the blocks of the text tower see tokens up to the end of the longest text of a batch, and no more.

    Embeddings are the same but for rounding. A tower that looks ahead, reads its output elsewhere than at the end of
    the text, or is not open_clip's own, is left as it is.
    """
    tower: Any = getattr(model, "text", model)
    with ExitStack() as hooks:
        if _ends_early(tower):
            cut = _Cut(tower)
            for handle in (
                tower.token_embedding.register_forward_pre_hook(cut.measure),
                tower.transformer.register_forward_pre_hook(cut.shorten, with_kwargs=True),
                tower.transformer.register_forward_hook(cut.restore),
            ):
                hooks.callback(handle.remove)
        yield


def pool_type(tower: Any) -> str:
    """Where open_clip's text tower reads its output: "argmax" or "eos" (the end of the text), "last", "first", "none"."""
    return str(getattr(tower, "pool_type", getattr(tower, "text_pool_type", "argmax")))


def text_ends(tower: Any, tokens: Tensor) -> Tensor:
    """The position of the end of each text, int64 (n,), as open_clip finds it: the end token, or the highest one."""
    if pool_type(tower) == "eos":
        tokens = tokens.eq(tower.eos_id if hasattr(tower, "eos_id") else tower.text_eos_id).int()
    return tokens.argmax(-1)


def _ends_early(tower: Any) -> bool:
    """Whether the tower is causal, adds no token of its own behind the text, and is read at the end of the text."""
    mask = getattr(tower, "attn_mask", None)
    return (
        isinstance(mask, Tensor)
        and torch.equal(mask, torch.full_like(mask, float("-inf")).triu_(1))
        and getattr(tower, "cls_emb", None) is None
        and pool_type(tower) in ("argmax", "eos")
        and getattr(tower.transformer, "batch_first", False)
    )


class _Cut:
    """Hooks on one tower: measure the texts, shorten what enters the blocks, fill up what leaves them."""

    def __init__(self, tower: Any) -> None:
        self._tower, self._length, self._missing = tower, 0, 0

    def measure(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._length = int(text_ends(self._tower, inputs[0]).max()) + 1
        self._missing = inputs[0].shape[-1] - self._length

    def shorten(self, _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        mask = named["attn_mask"][: self._length, : self._length]
        return (inputs[0][:, : self._length], *inputs[1:]), {**named, "attn_mask": mask}

    def restore(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.pad(output, (0, 0, 0, self._missing))
