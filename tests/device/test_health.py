"""The health check sees what hashes cannot: a machine that computes something else."""

import dataclasses

import numpy as np
import pytest

from r1export.device import health
from r1export.device.health import check_health, compare
from r1export.device.version import open_version
from r1export.errors import CheckFailed
from r1export.update.factors import ExpertUpdate
from r1export.update.manifest import Health

LIMITS = Health(5e-5, 0.999999, 1.0)


def unit(values):
    values = np.asarray(values, "f4")
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_a_sound_version_is_healthy_in_both_towers(lab, device):
    device.apply(lab.bundle(2, 0))
    found = check_health(open_version(device.path), LIMITS)
    assert [(result.tower, result.samples) for result in found] == [("visual.onnx", 6), ("textual.onnx", 4)]
    assert all(result.top1 == 1.0 for result in found)


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (Health(1e-4, 1.0, 0.0), "lowest cosine"),
        (Health(1e-9, -1.0, 0.0), "max. difference"),
    ],
)
def test_what_is_beyond_a_limit_is_named(lab, device, monkeypatch, limits, name):
    device.apply(lab.bundle(1, 0))
    original = health.compare
    monkeypatch.setattr(
        health,
        "compare",
        lambda tower, embeds, *others: original(tower, embeds + np.float32(1e-5), *others),
    )
    with pytest.raises(CheckFailed, match=name):
        check_health(open_version(device.path), limits)


def test_another_nearest_class_is_noticed():
    classes = np.eye(2)
    expected = unit([[1, 0.1], [0.1, 1]])
    found = compare("visual.onnx", unit([[1, 0.1], [1, 0.1]]), expected, [classes], 0.97)
    assert (found.top1, found.answers) == (0.5, 2)
    same = compare("visual.onnx", expected, expected, [classes, np.ones((3, 7))], 0.97)
    assert (same.top1, same.answers) == (1.0, 2)


def near_the_border(distance, dimensions=64):
    """Two classes, and a row of unit norm as far beyond the border between them as `distance` says."""
    classes, row = np.eye(2, dimensions), np.zeros(dimensions)
    row[:3] = 0.5 + distance / np.sqrt(2), 0.5 - distance / np.sqrt(2), 0
    row[2] = np.sqrt(1 - (row**2).sum())
    return classes, row[None]


@pytest.mark.parametrize(("precision", "min_cosine"), [("fp32", 1 - 1e-6), ("fp16", 1 - 5e-3), ("int8", 0.97)])
def test_a_flip_counts_only_beyond_what_the_precision_explains(precision, min_cosine):
    reach = 4 * np.sqrt(2 * (1 - min_cosine) / 64)
    for distance, top1, answers in ((0.9 * reach, 1.0, 0), (1.1 * reach, 0.0, 1)):
        classes, expected = near_the_border(distance)
        embeds = near_the_border(-distance)[1]
        found = compare("visual.onnx", embeds, expected, [classes], min_cosine)
        assert (found.top1, found.answers) == (top1, answers)


def test_errors_of_no_preferred_direction_flip_no_answer_that_counts():
    rng = np.random.default_rng(0)
    classes, expected = unit(rng.standard_normal((50, 64))), unit(rng.standard_normal((2000, 64)))
    error = unit(rng.standard_normal(expected.shape)) * np.sqrt(2 * (1 - 0.97))
    embeds = unit(expected + error * 0.99)
    found = compare("visual.onnx", embeds, expected, [classes], 0.97)
    assert ((embeds @ classes.T).argmax(1) != (expected @ classes.T).argmax(1)).mean() > 0.1
    assert found.top1 == 1.0


def test_answers_of_all_lists_of_classes_count_together():
    near, far = near_the_border(0.01), near_the_border(0.5)
    expected = np.concatenate([far[1]] * 8 + [near[1]])
    lists = [near[0], near[0][::-1], near[0] * 2]
    embeds = expected.copy()
    embeds[0] = near_the_border(-0.5)[1]
    found = compare("visual.onnx", embeds, expected, lists, 0.97)
    assert (found.answers, found.top1) == (24, 1 - 3 / 24)


def test_two_classes_with_the_same_embedding_are_one_answer():
    classes, expected = near_the_border(0.5)
    found = compare("visual.onnx", expected + 1e-9, expected, [np.concatenate([classes, classes])], 0.97)
    assert found.top1 == 1.0


def test_answers_of_another_shape_or_that_are_not_finite_are_refused():
    expected = unit([[1, 2], [3, 4]])
    for embeds in (expected[:1], expected * np.nan, expected * np.inf):
        with pytest.raises(CheckFailed, match=r"not finite|expected"):
            compare("visual.onnx", embeds, expected, [], 0.97)


def test_a_version_without_golden_inputs_is_not_healthy_even_where_nothing_is_merged(device, monkeypatch):
    monkeypatch.setattr(health, "_tensors", lambda version, path: {})
    with pytest.raises(CheckFailed, match="version base has no golden inputs"):
        check_health(open_version(device.path), LIMITS)


def without(monkeypatch, *names):
    """Take tensors out of the golden inputs."""
    original = health._tensors
    monkeypatch.setattr(
        health,
        "_tensors",
        lambda version, path: {name: value for name, value in original(version, path).items() if name not in names},
    )


@pytest.mark.parametrize("missing", ["pixel_values", "image_embeds", "input_ids", "text_embeds"])
def test_a_tower_that_the_updates_change_needs_golden_inputs(lab, device, monkeypatch, missing):
    device.apply(lab.bundle(1, 0))
    without(monkeypatch, missing)
    with pytest.raises(CheckFailed, match="no golden inputs"):
        check_health(open_version(device.path), LIMITS)


def test_golden_inputs_without_rows_are_none(lab, device, monkeypatch):
    device.apply(lab.bundle(1, 0))
    original = health._tensors
    monkeypatch.setattr(
        health, "_tensors", lambda version, path: {name: value[:0] for name, value in original(version, path).items()}
    )
    with pytest.raises(CheckFailed, match="no golden inputs"):
        check_health(open_version(device.path), LIMITS)


def test_a_tower_that_no_update_changes_may_have_none(lab, device, monkeypatch):
    device.apply(lab.bundle(1, 0))
    version = open_version(device.path)
    visual = {rows: pair for rows, pair in version.rebuild.update.factors.items() if "visual" in rows.parameter}
    version = dataclasses.replace(version, rebuild=dataclasses.replace(version.rebuild, update=ExpertUpdate(visual)))
    without(monkeypatch, "input_ids")
    assert [result.tower for result in check_health(version, LIMITS)] == ["visual.onnx"]


def test_too_little_agreement_is_refused():
    found = health.Agreement("visual.onnx", 4, 0.0, 1.0, 0.5, 12)
    with pytest.raises(CheckFailed, match=r"equal top-1 of 12 0\.5, limit 0\.9"):
        health._judge(found, dataclasses.replace(LIMITS, min_agreement=0.9))
