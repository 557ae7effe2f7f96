"""The losses: contrastive with several positives, and activation-guided orthogonality (AGO).

Source where none is named: arXiv 2601.22828.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from r1export.adapt.pool import ExpertPool


def in_batch_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Symmetric CLIP loss inside a batch in which several images share a class.

    The plain form encodes a text per image and takes (CE(L, T) + CE(L^T, T^T)) / 2 with L (n, n) and
    T_ij = 1[y_i = y_j] / row sum. A text that occurs m times is the same column m times, so with one column per class

        1/2 [ mean_i logsumexp_u(l_iu + log m_u)  +  sum_u m_u/n logsumexp_i(l_iu) ]  -  mean_i l_i,y_i

    gives the same value. `logits` (n, classes present), `labels` int64 (n,) with every class present at least once.
    """
    counts = torch.bincount(labels, minlength=logits.shape[1]).to(logits.dtype)
    image_to_text = (logits + counts.log()).logsumexp(1).mean()
    text_to_image = (logits.logsumexp(0) * counts).sum() / len(labels)
    return (image_to_text + text_to_image) / 2 - logits.gather(1, labels[:, None]).mean()


def orthogonality_loss(pools: Iterable[ExpertPool]) -> Tensor:
    """mean over the linears of sum |B_J^T P|: it keeps the leading experts J off the columns P that earlier tasks merged."""
    return torch.stack([pool.overlap() for pool in pools]).mean()
