"""Texts use the terms of the field: words that readers stumbled over do not come back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RETIRED = {  # pattern -> what to write instead
    r"field(ed|ing)|field updates?": "deployed, update",
    r"mend(s|ed|ing)?": "fix",
    r"anew": "again, new",
    r"beside": "next to, in addition to",
    r"spoil(s|ed|t|ing)?": "affect, break",
    r"precious": "important",
    r"the house|house (rules|laws)": "architecture, conventions",
    r"rooms|the room": "packages",
    r"(held|hold|holds) against": "compare",
    r"(is|are|was|were|be) told|told apart|not told": "unknown, detected, distinguished",
    r"in vain": "without success, negative results",
    r"(knows|knew) before|what (the|a) model knows|knowledge": "previous predictions, distillation",
    r"streams?": "sequence of tasks",
    r"teach(es|ing)?|taught": "train, fine-tune",
    r"(is|are|be) blind": "has no power",
    r"digest of itself": "self-digest",
    r"go(es)? on with": "resume, continue",
    r"see to the": "check the",
    r"(start|started|starts) afresh|afresh": "again, from scratch",
    r"costs? nothing extra": "has no added cost",
    r"a defect of": "internal error",
}
ALLOWED = {  # what a retired word is part of where it means something else
    "stream": ("CUDA stream", "residual stream", "flat stream", "STREAM"),
}
CODE = [
    path
    for folder in ("r1export", "scripts", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "clients" not in path.parts
]
PAGES = [
    path
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "benchmarks/*.md",
        "examples/*.md",
        "examples/*.ipynb",
        "recipes/**/*.toml",
        "r1export/**/*.j2",
        "r1export/web/page/*",
    )
    for path in sorted(ROOT.glob(pattern))
    if path.suffix not in {".svg", ".css"}
]


def prose_in_code(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every string with more than one word: help, messages, docstrings, text of f-strings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def prose_on_page(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) outside of blocks of code, and of headings, in which newcomers may be taught."""
    without_blocks = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), source, flags=re.S)
    for number, line in enumerate(without_blocks.splitlines(), 1):
        if not line.startswith("#") or not re.search(r"teach", line, re.I):
            yield number, line


def retired_words(text: str) -> list[str]:
    """The retired words in a text, without `code`, and what to write instead."""
    plain = re.sub(r"`[^`]*`", "", text)
    for allowed in (phrase for phrases in ALLOWED.values() for phrase in phrases):
        plain = plain.replace(allowed, "")
    found = []
    for pattern, better in RETIRED.items():
        spaced = pattern.replace(" ", r"\s+")
        if match := re.search(rf"\b({spaced})\b", plain, re.I):
            found.append(f"{match[0]!r} (write: {better})")
    return found


@pytest.mark.parametrize("path", [*CODE, *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_retired_word_is_in_a_text(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    texts = prose_in_code(source) if path.suffix == ".py" else prose_on_page(source)
    assert [f"line {line}: {word}" for line, text in texts for word in retired_words(text)] == []


def test_there_are_texts_to_look_at() -> None:
    assert len(CODE) > 150
    assert len(PAGES) > 40


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mend the file", 1),
        ("Train a stream of tasks anew", 2),
        ("the upstream project has a field in its record", 0),
        ("a CUDA stream", 0),
        ("`stream` and `beside` are code", 0),
        ("Besides, it was amended", 0),
    ],
)
def test_a_retired_word_is_found_and_a_similar_one_is_not(text: str, found: int) -> None:
    assert len(retired_words(text)) == found
