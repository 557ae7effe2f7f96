"""Embeddings of a converted release are compared with its golden samples, tower by tower."""

import re

import numpy as np
import pytest
from device import fleet

from r1export.errors import InputError
from r1export.update.container import read_tensors
from r1export.verify.outputs import check_outputs
from r1export.verify.results import Verdict


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    run = fleet.make_run(tmp_path_factory.mktemp("lab") / "run")
    return next((run / "releases").glob("01-*"))


@pytest.fixture
def golden(release):
    return {name: value for name, value in read_tensors(release / "golden.safetensors").items() if "embeds" in name}


def check(release, folder, **arrays):
    np.savez(folder / "outputs.npz", **arrays)
    return check_outputs(release, folder / "outputs.npz")


def test_what_is_within_the_gate_passes(release, golden, tmp_path):
    found = check(release, tmp_path, **{name: value + np.float32(1e-6) for name, value in golden.items()})
    assert (found.verdict, found.looked_at, found.of) == (Verdict.PASS, 10, 10)
    assert "image_embeds differs by at most 1e-06" in found.detail


def test_one_tower_may_be_converted_alone(release, golden, tmp_path):
    found = check(release, tmp_path, image_embeds=golden["image_embeds"])
    assert (found.verdict, found.of) == (Verdict.PASS, 6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: e + np.float32(1e-3), "image_embeds differs by 0.001"),
        (lambda e: e * np.nan, "not finite"),
        (lambda e: e[:1], r"expected \[6, 8\]"),
        (lambda e: e[::-1], "image_embeds differs"),
    ],
)
def test_what_is_beyond_it_fails(release, golden, tmp_path, change, reason):
    found = check(release, tmp_path, **{**golden, "image_embeds": change(golden["image_embeds"])})
    assert found.verdict is Verdict.FAIL
    assert re.search(reason, found.detail)


def test_what_is_no_file_of_embeddings_is_bad_input(release, golden, tmp_path):
    (tmp_path / "text.npz").write_text("embeddings")
    with pytest.raises(InputError, match="neither image_embeds nor text_embeds"):
        check(release, tmp_path, other=golden["image_embeds"])
    with pytest.raises(InputError, match="no such file"):
        check_outputs(release, tmp_path / "none.npz")
    with pytest.raises(InputError, match="plain arrays"):
        check_outputs(release, tmp_path / "text.npz")
    with pytest.raises(InputError, match="plain arrays"):
        check(release, tmp_path, image_embeds=np.array([{}], object))
