"""Embedding drift: may a gallery that was indexed with the version before be kept?

Nearest neighbours are looked for with new queries in the old gallery, as a device does that was updated without
indexing again, and compared with what old queries found there.
"""

from __future__ import annotations

import numpy as np

from r1export.verify.results import Drift

NOT_NEEDED, ADVISED, REQUIRED = "not needed", "advised", "required"
KEPT = {NOT_NEEDED: 0.99, ADVISED: 0.9}  # share of the ten nearest that has to be found again


def embedding_drift(old: np.ndarray, new: np.ndarray, *, against: str) -> Drift:
    """Cosine and recall of the same images under two versions, unit-norm (n, D), and whether to index again.

    recall_at_k: of the k nearest that the old embedding of an image has in the old gallery (itself left out), the share
    that its new embedding still finds among its k nearest there.
    """
    cosines = (old.astype(np.float64) * new).sum(1)
    recalls = {k: _recall(old, new, k) if len(old) > k else None for k in (1, 10)}
    kept = next((recall for recall in (recalls[10], recalls[1]) if recall is not None), 0.0)
    return Drift(
        against=against,
        images=len(old),
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        recall_at_1=recalls[1],
        recall_at_10=recalls[10],
        reindex=next((advice for advice, share in KEPT.items() if kept >= share), REQUIRED),
    )


def _recall(old: np.ndarray, new: np.ndarray, k: int) -> float:
    before, after = _nearest(old, old, k), _nearest(new, old, k)
    shares = [len(set(left) & set(right)) / k for left, right in zip(before.tolist(), after.tolist(), strict=True)]
    return float(np.mean(shares))


def _nearest(queries: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    """The k nearest (n, k) of each query without its own place in the gallery; the lower index wins a tie."""
    scores = queries.astype(np.float64) @ gallery.T
    np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]
