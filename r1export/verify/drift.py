"""Embedding drift: may a gallery that was indexed with the version before be kept?

Nearest neighbours are looked for with new queries in the old gallery, as a device does that was updated without
indexing again, and compared with what old queries found there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NOT_NEEDED, ADVISED, REQUIRED = "not needed", "advised", "required"
KEPT = {NOT_NEEDED: 0.99, ADVISED: 0.9}  # share of the ten nearest that has to be found again


def embedding_drift(old: np.ndarray, new: np.ndarray, *, against: str) -> dict[str, Any]:
    """Cosine and recall of the same images under two versions, unit-norm (n, D), and whether to index again.

    recall_at_k: of the k nearest that the old embedding of an image has in the old gallery (itself left out), the share
    that its new embedding still finds among its k nearest there.
    """
    cosines = (old.astype(np.float64) * new).sum(1)
    recalls = {f"recall_at_{k}": _recall(old, new, k) for k in (1, 10) if len(old) > k}
    kept = min(recalls.values(), default=0.0) if len(old) <= 10 else recalls["recall_at_10"]
    verdict = next((word for word, share in KEPT.items() if kept >= share), REQUIRED)
    return {
        "against": against,
        "images": len(old),
        "mean_cosine": float(cosines.mean()),
        "min_cosine": float(cosines.min()),
        **recalls,
        "reindex": verdict,
    }


def _recall(old: np.ndarray, new: np.ndarray, k: int) -> float:
    before, after = _nearest(old, old, k), _nearest(new, old, k)
    return float(
        np.mean([len(set(one) & set(other)) / k for one, other in zip(before.tolist(), after.tolist(), strict=True)])
    )


def _nearest(queries: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    """The k nearest (n, k) of each query without its own place in the gallery; the lower index wins a tie."""
    scores = queries.astype(np.float64) @ gallery.T
    np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]
