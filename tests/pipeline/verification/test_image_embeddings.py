"""Test images go through the image tower of a release once, however many checks ask for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from running import context_of

from r1export.pipeline.verification import inputs
from r1export.pipeline.verification.inputs import ImageEmbeddings, accuracy_images


def test_an_image_that_two_checks_ask_for_is_embedded_once(verified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, release = context_of(verified), verified / "releases" / "00-base"
    task, embedded = context.tasks[0], []
    original = inputs.runner

    def counting(session):
        run = original(session)
        return lambda feeds: embedded.append(len(feeds["pixel_values"])) or run(feeds)

    monkeypatch.setattr(inputs, "runner", counting)
    embeddings, images = ImageEmbeddings(context), accuracy_images(context, task)
    few, all_of_them = embeddings.of(release, task, images[:3]), embeddings.of(release, task, images)
    assert sum(embedded) == len(images)
    assert np.array_equal(few, all_of_them[:3])
    gallery, count = embeddings.gallery(release), sum(embedded)
    assert np.array_equal(embeddings.gallery(release), gallery)
    assert sum(embedded) == count
