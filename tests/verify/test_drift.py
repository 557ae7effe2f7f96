"""Embedding drift: what a new model finds in a gallery that the old one indexed."""

import numpy as np
import pytest

from r1export.verify.drift import embedding_drift
from r1export.verify.results import Agreement

RNG = np.random.default_rng(0)


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


OLD = unit(RNG.normal(size=(100, 16)))


def test_a_model_that_did_not_change_needs_no_new_index() -> None:
    found = embedding_drift(OLD, OLD, against="00-base")
    assert found.reindex == "not needed"
    assert found.new_queries == found.old_queries == Agreement(top1=1.0, recall_at_10=1.0)
    assert found.min_cosine == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("noise", "verdict"), [(0.0005, "not needed"), (0.015, "advised"), (1.0, "required")])
def test_the_verdict_follows_from_what_is_still_found(noise: float, verdict: str) -> None:
    found = embedding_drift(OLD, unit(OLD + noise * RNG.normal(size=OLD.shape)), against="00-base")
    assert found.reindex == verdict, found


def test_a_rotation_of_the_whole_space_keeps_a_new_gallery_right_and_makes_the_old_one_useless() -> None:
    rotation = np.linalg.qr(RNG.normal(size=(16, 16)))[0]
    found = embedding_drift(OLD, (OLD @ rotation).astype(np.float32), against="00-base")
    assert found.reindex == "required"
    assert found.new_queries.recall_at_10 < 0.5


def test_an_image_is_not_its_own_neighbour() -> None:
    pairs = unit(np.repeat(RNG.normal(size=(10, 16)), 2, axis=0))
    swapped = pairs.reshape(10, 2, 16)[:, ::-1].reshape(20, 16)
    assert embedding_drift(pairs, swapped, against="x").new_queries.top1 == 1.0


def test_a_gallery_of_two_images_can_still_be_judged() -> None:
    assert embedding_drift(OLD[:2], OLD[:2], against="x").reindex == "not needed"


def test_both_directions_are_measured_and_the_worse_one_decides() -> None:
    """One vector in the middle of all others draws every query to it, but is itself drawn to none."""
    new = OLD.copy()
    new[:50] = unit(new[:50] + 0.9 * new[:1])
    found = embedding_drift(OLD, new, against="00-base")
    shares = found.new_queries.recall_at_10, found.old_queries.recall_at_10
    assert shares[0] != shares[1]
    assert (found.reindex == "required") == (min(shares) < 0.9)


def test_where_the_images_embeddings_are_the_same_nothing_is_indexed_again() -> None:
    found = embedding_drift(OLD, unit(OLD + 0.5 * RNG.normal(size=OLD.shape)), against="x", same_space=True)
    assert found.reindex == "not needed"
