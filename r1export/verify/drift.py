"""Embedding drift: can an index that was built with an earlier release be kept?

Nearest neighbours are searched with queries of one version in vectors of the other, in both directions: new queries in the
old gallery, as on a device that was updated without re-indexing, and old queries in the new gallery, as on a device that
is not updated yet. An image is not its own neighbour.
"""

from __future__ import annotations

import numpy as np

from r1export.verify.results import Agreement, Drift

NOT_NEEDED, ADVISED, REQUIRED = "not needed", "advised", "required"
KEPT = {NOT_NEEDED: 0.99, ADVISED: 0.9}  # required recall of the ten nearest


def embedding_drift(old: np.ndarray, new: np.ndarray, *, against: str, same_space: bool = False) -> Drift:
    """Cosine and agreement of the same images under two versions, unit-norm (n, D), and whether to re-index.

    The verdict follows from the worse direction, since there are queries and vectors of both versions while devices are
    being updated. With `same_space` re-indexing is never needed, whatever the rounding differences.
    """
    cosines = (old.astype(np.float64) * new).sum(1)
    new_queries, old_queries = _agreement(new, old), _agreement(old, new)
    kept = min(_decisive(new_queries), _decisive(old_queries))
    verdict = next((advice for advice, share in KEPT.items() if kept >= share), REQUIRED)
    return Drift(
        against=against,
        images=len(old),
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        new_queries=new_queries,
        old_queries=old_queries,
        same_space=same_space,
        reindex=NOT_NEEDED if same_space else verdict,
    )


def _agreement(queries: np.ndarray, gallery: np.ndarray) -> Agreement:
    """Agreement of the neighbours that `queries` find in `gallery` with those that the gallery's own version finds."""
    top1, recall = (_recall(gallery, queries, k) if len(gallery) > k else None for k in (1, 10))
    return Agreement(top1=top1, recall_at_10=recall)


def _decisive(agreement: Agreement) -> float:
    return next((share for share in (agreement.recall_at_10, agreement.top1) if share is not None), 0.0)


def _recall(gallery: np.ndarray, queries: np.ndarray, k: int) -> float:
    own, others = _nearest(gallery, gallery, k), _nearest(queries, gallery, k)
    shares = [len(set(left) & set(right)) / k for left, right in zip(own.tolist(), others.tolist(), strict=True)]
    return float(np.mean(shares))


def _nearest(queries: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    """The k nearest (n, k) of each query, excluding the query itself; the lower index wins a tie."""
    scores = queries.astype(np.float64) @ gallery.T
    np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]
