"""What `import r1export` offers, and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import r1export

ROOT = Path(__file__).parents[1]
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "r1export").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", r1export.__all__)
def test_every_public_noun_is_there_typed_and_documented(name: str) -> None:
    noun = getattr(r1export, name)
    assert name in dir(r1export)
    assert inspect.getdoc(noun)
    if inspect.isfunction(noun):
        assert len(inspect.getdoc(noun).splitlines()) > 2
        signature = inspect.signature(noun)
        assert signature.return_annotation is not signature.empty
        assert all(p.annotation is not p.empty for p in signature.parameters.values())
        assert "Raises" in inspect.getdoc(noun)


def test_importing_the_package_or_the_update_noun_loads_no_torch() -> None:
    code = (
        "import sys, r1export; r1export.ExpertUpdate; r1export.apply_bundle; r1export.open_version; r1export.CheckFailed; "
        "print([m for m in ('torch', 'onnx', 'typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'merge'"):
        _ = r1export.merge


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings_give_what_they_say(module: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    found = doctest.testmod(importlib.import_module(module))
    assert (found.failed, found.attempted > 0) == (0, True)


def test_there_are_examples() -> None:
    assert len(WITH_EXAMPLES) >= 4
