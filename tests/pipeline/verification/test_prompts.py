"""A class name that a client's tokenizer cleans otherwise than the lab is found, whatever the golden samples are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from r1export.export.tokenizer import write_tokenizer
from r1export.pipeline.verification.contents import _check_prompts
from r1export.verify.results import Verdict

MOJIBAKE = "😀".encode().decode("latin-1")  # an emoji, decoded in the wrong encoding: ftfy repairs it


@pytest.mark.parametrize(("names", "verdict"), [(("cat", "crème"), Verdict.PASS), (("cat", MOJIBAKE), Verdict.FAIL)])
def test_every_class_name_is_tried(names: tuple[str, ...], verdict: Verdict, tiny_clip, tmp_path) -> None:
    write_tokenizer(tiny_clip.tokenizer, tmp_path / "tokenizer")
    task = SimpleNamespace(classes=names, templates=("a {}",))
    check = _check_prompts(SimpleNamespace(path=tmp_path, context=SimpleNamespace(tasks=[task], clip=tiny_clip)))
    assert (check.verdict, check.looked_at) == (verdict, 2)
    assert (repr(f"a {MOJIBAKE}") in check.detail) == (verdict is Verdict.FAIL)
