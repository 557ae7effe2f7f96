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
        (Health(1e-4, 1.0, 0.0), "smallest cosine"),
        (Health(1e-9, -1.0, 0.0), "largest difference"),
    ],
)
def test_what_is_beyond_a_limit_is_named(lab, device, monkeypatch, limits, name):
    device.apply(lab.bundle(1, 0))
    original = health.compare
    monkeypatch.setattr(
        health,
        "compare",
        lambda tower, embeds, expected, classes: original(tower, embeds + np.float32(1e-5), expected, classes),
    )
    with pytest.raises(CheckFailed, match=name):
        check_health(open_version(device.path), limits)


def test_another_nearest_class_is_noticed():
    classes = np.eye(2)
    expected = unit([[1, 0.1], [0.1, 1]])
    found = compare("visual.onnx", unit([[1, 0.1], [1, 0.1]]), expected, [classes])
    assert found.top1 == 0.5
    assert compare("visual.onnx", expected, expected, [classes, np.ones((3, 7))]).top1 == 1.0


def test_answers_of_another_shape_or_that_are_not_finite_are_refused():
    expected = unit([[1, 2], [3, 4]])
    for embeds in (expected[:1], expected * np.nan, expected * np.inf):
        with pytest.raises(CheckFailed, match=r"not finite|expected"):
            compare("visual.onnx", embeds, expected, [])


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
    found = health.Agreement("visual.onnx", 4, 0.0, 1.0, 0.5)
    with pytest.raises(CheckFailed, match=r"equal top-1 0\.5, limit 0\.9"):
        health._judge(found, dataclasses.replace(LIMITS, min_agreement=0.9))
