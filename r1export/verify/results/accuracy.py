"""What a release answers: accuracies, the cost of merging and freezing, and the drift of its embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The share of the k nearest neighbours that stays the same if queries come from another version than the vectors.

    None: too few images.
    """

    top1: float | None
    recall_at_10: float | None


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Embeddings of the same images with an earlier release (`against`) and this one: can stored vectors be kept?

    `new_queries`: queries of this release in vectors of the earlier one; `old_queries`: the reverse. `same_space`: both
    releases have the same graph, weights and preprocessing for images, and so the same image embeddings.
    """

    against: str
    images: int
    mean_cosine: float
    min_cosine: float
    new_queries: Agreement
    old_queries: Agreement
    same_space: bool
    reindex: str


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """The cost of merging and freezing on one task: G1 in logits, G2 and G3 as accuracy differences on `images` test images.

    G2 and G3 are None if the experts were fixed before the end of training; G3 also for a sparse gate, which determines the
    number of merged experts itself.
    """

    G1: float
    G1_top1_agreement: float
    G2: float | None = None
    G2_batch_32: float | None = None
    G3: float | None = None
    images: int = 0
    accuracies: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How `train.guard` changed a task: the update's `scale`, and the estimated loss of zero-shot accuracy in percentage points,
    of the whole update and of what was kept, with the `limit` that was set.
    """

    limit: float
    scale: float
    whole: float
    kept: float


@dataclass(frozen=True, kw_only=True)
class RunGaps:
    """The largest G1, the means of G2 and G3, and the gaps of each task."""

    G1: float
    G2: float | None
    G3: float | None
    tasks: Mapping[str, Gaps]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Accuracy on a task that is never trained: of the base model, then after each task."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracies as fractions. `matrix[i][j]`: on task j after task i. The summary belongs to a whole run."""

    tasks: tuple[str, ...]
    zero_shot: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    zero_shot_avg: float | None = None
    transfer: float | None = None
    avg: float | None = None
    last: float | None = None
    forgetting: tuple[float, ...] = ()
    probe: Probe | None = None
