"""Transfer, Avg, Last, forgetting."""

import numpy as np
import pytest

from r1export.adapt.metrics import stream_metrics, top1

ZERO_SHOT_B16 = (24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2)  # CLIP ViT-B/16 on MTIL, order I


def test_a_model_that_never_changes_has_the_published_zero_shot_figures() -> None:
    found = stream_metrics([ZERO_SHOT_B16] * 11)
    assert (round(found.transfer, 1), round(found.avg, 1), round(found.last, 1)) == (69.4, 65.3, 65.3)
    assert found.forgetting == (0.0,) * 11


def test_transfer_looks_only_above_the_diagonal_and_last_only_at_the_last_row() -> None:
    found = stream_metrics([[0.9, 0.2, 0.4], [0.8, 0.7, 0.6], [0.5, 0.6, 1.0]])
    assert found.transfer == pytest.approx((0.2 + (0.4 + 0.6) / 2) / 2)
    assert found.last == pytest.approx(0.7)
    assert found.avg == pytest.approx(5.7 / 9)
    assert found.forgetting == pytest.approx((0.4, 0.1, 0.0))


def test_an_accuracy_of_exactly_zero_counts() -> None:
    found = stream_metrics([[0.0, 0.0], [0.0, 0.0]])
    assert (found.transfer, found.avg, found.last) == (0.0, 0.0, 0.0)


def test_a_single_task_has_nothing_to_transfer_to() -> None:
    assert stream_metrics([[0.5]]).transfer is None


def test_a_matrix_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match="one row and one column per task"):
        stream_metrics([[0.1, 0.2]])


def test_top1_takes_the_nearest_class() -> None:
    images = np.eye(3)[[0, 1, 2, 0]]
    assert top1(images, np.eye(3), np.array([0, 1, 1, 0])) == 0.75
