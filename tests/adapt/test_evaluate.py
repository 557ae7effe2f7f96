"""Among which classes an image is classified."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from r1export.adapt.evaluate import Classes, accuracy, all_classes, class_embeddings, top1_among
from r1export.adapt.image_cache import Pixels


def test_the_classes_of_several_tasks_stand_once_each_with_the_first_tasks_templates(tiny_clip, stripes) -> None:
    other = replace(stripes, name="other", classes=("vertical stripes", "dots"), templates=("{}",))
    union = all_classes(tiny_clip, (stripes, other))
    assert union.rows == {"horizontal stripes": 0, "vertical stripes": 1, "dots": 2}
    assert np.array_equal(union.embeddings[:2], class_embeddings(tiny_clip, stripes))
    assert np.array_equal(union.embeddings[2], class_embeddings(tiny_clip, other)[1])


def test_an_image_that_is_nearer_to_another_tasks_class_counts_as_wrong_among_all(stripes) -> None:
    labels = stripes.test.labels
    own = np.eye(3, dtype=np.float32)[:2]
    images = own[labels]
    images[0] = (0.1, 0.2, 0.9) if labels[0] else (0.2, 0.1, 0.9)  # right among its own two, but nearest to the third
    union = Classes(np.eye(3, dtype=np.float32)[[2, 1, 0]], {"dots": 0, "vertical stripes": 1, "horizontal stripes": 2})
    assert top1_among(images, stripes, own) == 1.0
    assert top1_among(images, stripes, union) == 1 - 1 / len(labels)


def test_accuracy_among_all_is_never_higher_than_among_ones_own(tiny_clip, stripes) -> None:
    other = replace(stripes, name="other", classes=("red", "blue"), templates=("{}",))
    test = Pixels(stripes.test, tiny_clip.preprocess)
    union = all_classes(tiny_clip, (stripes, other))
    assert accuracy(tiny_clip, stripes, test, union) <= accuracy(tiny_clip, stripes, test)


def test_no_text_is_encoded_where_the_candidates_are_given(tiny_clip, stripes) -> None:
    def fail(texts: list[str]) -> None:
        raise AssertionError(f"{texts} were encoded")

    test, union = Pixels(stripes.test, tiny_clip.preprocess), all_classes(tiny_clip, (stripes,))
    assert accuracy(replace(tiny_clip, tokenizer=fail), stripes, test, union) == accuracy(tiny_clip, stripes, test)


def test_an_image_of_a_name_that_a_probe_repeats_is_right_as_either_class(stripes) -> None:
    probe = replace(
        stripes, classes=("missile", "dots", "missile"), test=replace(stripes.test, labels=np.array([0, 1, 2]))
    )
    assert top1_among(np.eye(3, dtype=np.float32)[[0, 1, 0]], probe, np.eye(3, dtype=np.float32)) == 1.0
