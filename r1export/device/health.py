"""The health check: golden inputs through onnxruntime, compared with the signed golden outputs.

Digests prove that the bytes are right; this proves that the machine computes the right outputs from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from r1export.device.client_files import REMEDY, check_client_files
from r1export.device.version import Version
from r1export.errors import CheckFailed, R1ExportError, first_line
from r1export.update.container import parse_tensors
from r1export.update.manifest import Health
from r1export.update.release_layout import GOLDEN, TOWERS

CEILING = Health(0.1, 0.97, 0.9)  # the gate of int8, the coarsest precision: no version may be more tolerant
DEVIATIONS = 4.0  # a random error exceeds this along a given direction once in 30,000 answers


@dataclass(frozen=True)
class Agreement:
    """The difference of a tower's embeddings (n, D) from the expected ones; `top1` is the share of equal `answers`."""

    tower: str
    samples: int
    max_abs: float
    min_cosine: float
    top1: float
    answers: int


def limits_of(version: Version) -> Health:
    """The signed limits of a version, or the limits in the manifest of the base; never looser than CEILING."""
    if version.bundle:
        limits = version.bundle.manifest.health
    else:
        golden = version.base.manifest.golden
        limits = Health(golden.max_abs, golden.min_cosine, CEILING.min_agreement)
    return Health(
        min(limits.max_abs, CEILING.max_abs), max(limits.min_cosine, CEILING.min_cosine), limits.min_agreement
    )


def check_health(version: Version, limits: Health) -> list[Agreement]:
    """Run the golden inputs through every tower of the version, and check its client files.

    Raises:
        CheckFailed: a graph does not run, an output exceeds `limits`, the version has no golden inputs, or none for a
            tower that its updates change; or a client file gives other inputs than expected.
        Unsupported: onnxruntime is not installed.
    """
    golden, classes = _tensors(version, GOLDEN), _class_embeds(version)
    results = []
    for tower in TOWERS:
        graph, given, answer = tower.graph, tower.input, tower.output
        if graph not in version.paths:
            continue
        if golden.get(given, np.zeros(0)).size and answer in golden:
            embeds = _answer(version, graph, answer, golden[given])
            results.append(compare(graph, embeds, golden[answer], classes, limits.min_cosine))
        elif version.merged_weights(graph):
            raise CheckFailed(
                f"version {version.name} changes {graph}, but has no golden inputs for it", "export the release again"
            )
    if not results:
        raise CheckFailed(f"version {version.name} has no golden inputs", "export the release again")
    for result in results:
        _judge(result, limits)
    check_client_files(version, partial(_answer, version))
    return results


def _answer(version: Version, graph: str, answer: str, given: np.ndarray) -> np.ndarray:
    """The output of `graph`. A graph is untrusted: any exception of onnxruntime is a failed check."""
    try:
        session = version.session(graph)
        (embeds,) = session.run([answer], {session.get_inputs()[0].name: given})
        return np.asarray(embeds, np.float64)
    except (R1ExportError, OSError):
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise CheckFailed(f"{graph} does not run: {first_line(error)}", REMEDY) from error


def compare(
    tower: str, embeds: np.ndarray, expected: np.ndarray, classes: Sequence[np.ndarray], min_cosine: float
) -> Agreement:
    """Differences of embeddings (n, D), and the share of equal nearest classes over all lists of class embeddings (C, D).

    An answer counts only if errors that `min_cosine` allows can't flip it. Such an error e of a unit-norm embedding has
    |e|^2 = 2 (1 - cosine), and along the line between two class embeddings, one of D directions, a standard deviation of
    |e| / sqrt(D). So an answer may flip if the embedding is less than DEVIATIONS times that, or less than |e|, away from
    the border between the two classes.

    Raises CheckFailed if the embeddings are not finite or have the wrong shape.
    """
    embeds, expected = embeds.astype(np.float64), expected.astype(np.float64)
    if embeds.shape != expected.shape or embeds.ndim != 2 or not np.isfinite(embeds).all():
        raise CheckFailed(
            f"{tower}: embeddings of shape {embeds.shape} or not finite, expected shape {expected.shape}", REMEDY
        )
    norms = np.linalg.norm(embeds, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = (embeds * expected).sum(1) / np.maximum(norms, 1e-30)
    lists = [class_embeds for class_embeds in classes if class_embeds.shape[1] == embeds.shape[1]]
    reach = np.sqrt(2 * (1 - min_cosine)) * min(1.0, DEVIATIONS / np.sqrt(embeds.shape[1]))
    counts = [_count_answers(embeds, expected, class_embeds, reach) for class_embeds in lists]
    answers, flips = (sum(column) for column in zip(*counts)) if counts else (0, 0)
    return Agreement(
        tower,
        len(embeds),
        max_abs=float(np.abs(embeds - expected).max()),
        min_cosine=float(cosine.min()),
        top1=1 - flips / max(answers, 1),
        answers=answers,
    )


def _count_answers(embeds: np.ndarray, expected: np.ndarray, classes: np.ndarray, reach: float) -> tuple[int, int]:
    """The number of answers that no error within `reach` of `expected` can flip, and how many of them flipped."""
    scores, rows = expected @ classes.T, np.arange(len(expected))
    best, now = scores.argmax(1), (embeds @ classes.T).argmax(1)
    squares = (classes**2).sum(1)
    apart = np.sqrt(np.maximum(squares[best][:, None] + squares - 2 * classes[best] @ classes.T, 1e-30))
    distances = (
        scores[rows, best][:, None] - scores
    ) / apart  # from `expected` to the border between its class and each
    flipped = distances[rows, now] > reach
    distances[rows, best] = np.inf
    return int(((distances.min(1) > reach) | flipped).sum()), int(flipped.sum())


def _judge(result: Agreement, limits: Health) -> None:
    for name, value, limit, within in (
        ("max. difference", result.max_abs, limits.max_abs, result.max_abs <= limits.max_abs),
        ("lowest cosine", result.min_cosine, limits.min_cosine, result.min_cosine >= limits.min_cosine),
        (f"equal top-1 of {result.answers}", result.top1, limits.min_agreement, result.top1 >= limits.min_agreement),
    ):
        if not within:
            raise CheckFailed(f"health check of {result.tower}: {name} {value:.9g}, limit {limit:.9g}", REMEDY)


def _class_embeds(version: Version) -> list[np.ndarray]:
    """All lists of class embeddings (C, D) of the version in float64."""
    lists = []
    for path in version.paths:
        if path.startswith("classes/") and path.endswith(".safetensors"):
            lists += [tensor.astype(np.float64) for tensor in _tensors(version, path).values()]
    return [embeds for embeds in lists if embeds.ndim == 2 and embeds.size]


def _tensors(version: Version, path: str) -> dict[str, np.ndarray]:
    return parse_tensors(version.read(path), Path(path))
