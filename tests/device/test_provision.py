"""Making a store: what could not work is refused, and nothing is left behind."""

import os
import shutil

import pytest

from r1export.device import provision
from r1export.errors import CheckFailed, InputError, Unsupported


def test_init_refuses_what_could_not_work(lab, tmp_path, monkeypatch):
    def init(store="new", base=0, trust=(lab.public,), **options):
        return provision.init(tmp_path / store, lab.release(base), list(trust), **options)

    for options in (
        {"base": 1},
        {"mode": "both"},
        {"threshold": 2},
        {"threshold": 0},
        {"keep": 0},
        {"trust": ()},
        {"trust": (lab.run,)},
        {"health": "check 'it"},
        {"health": " "},
    ):
        with pytest.raises((InputError, IsADirectoryError)):
            init(**options)
    monkeypatch.setattr(provision, "has_onnxruntime", lambda: False)
    with pytest.raises(Unsupported, match="--health none"):
        init()
    init(health="none")
    with pytest.raises(InputError, match="exists"):
        init(health="none")
    assert os.listdir(tmp_path) == ["new"]


def test_init_refuses_a_damaged_base(lab, tmp_path):
    shutil.copytree(lab.release(0), tmp_path / "base")
    (tmp_path / "base" / "visual.onnx").write_bytes(b"")
    with pytest.raises(CheckFailed, match=r"visual\.onnx is damaged"):
        provision.init(tmp_path / "store", tmp_path / "base", [lab.public], health="none")
    assert not (tmp_path / "store").exists()
