"""open_clip's text cleaning as normalizers of a tokenizer.json, so that clients need neither ftfy nor Python.

open_clip (tokenizer.py: `basic_clean`) runs ftfy 6, unescapes HTML, joins whitespace, and lowers the text or drops its
punctuation. A tokenizer.json has only replacements in a row. What they cannot do is listed in `LIMITS`.
"""

from __future__ import annotations

import html
import string
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from html.entities import html5
from typing import Any, Literal

import ftfy
from ftfy.chardata import CONTROL_CHARS, DOUBLE_QUOTE_RE, HTML_ENTITIES, LIGATURES, SINGLE_QUOTE_RE, WIDTH_MAP

CleanName = Literal["lower", "whitespace", "canonicalize"]
Normalizer = dict[str, Any]  # one entry of a tokenizer.json

LIMITS = (
    "text that was decoded in the wrong encoding, but for common letters and punctuation of Western Europe",
    "numeric HTML references to characters that have no name in HTML",
    "HTML references in a text that has `<` or that were escaped three times",
)

C1 = range(0x80, 0xA0)  # control characters that ftfy and browsers read as Windows-1252
TERMINAL_ESCAPE = r"\x1b\[(?:\p{Nd}|;)*[a-zA-Z]"
# What str.split takes as whitespace; Oniguruma's \s has fewer.
_SPACES = (
    *range(0x09, 0x0E),
    *range(0x1C, 0x21),
    0x85,
    0xA0,
    0x1680,
    *range(0x2000, 0x200B),
    0x2028,
    0x2029,
    0x202F,
    0x205F,
    0x3000,
)
WHITESPACE = "".join(map(chr, _SPACES))
_IGNORED = r"[\p{Mn}\p{Me}\p{Cf}\p{Lm}\p{Sk}'’.:·]"  # Unicode's Case_Ignorable
_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"
# str.lower alone knows that a sigma at the end of a word is another letter.
FINAL_SIGMA = rf"(?<={_CASED}{_IGNORED}*)Σ(?!{_IGNORED}*{_CASED})"

_CONTEXTS = ("{}", "a{}b", "A {} b", "x{}", "{}y", "don{}t", "3{}4", "日本{}語", " {0}{0} ")


def cleaning(clean: CleanName) -> list[Normalizer]:
    """The normalizers that do what open_clip's clean function of this name does."""
    spaces = [replacement(f"[{escaped(WHITESPACE)}]+", " "), {"type": "Strip", "strip_left": True, "strip_right": True}]
    lower = [replacement(FINAL_SIGMA, "ς"), {"type": "Lowercase"}]
    punctuation = [replacement("_", " "), replacement(f"[{escaped(string.punctuation)}]", "")]
    ends = {"whitespace": spaces, "lower": [*spaces, *lower], "canonicalize": [*punctuation, *lower, *spaces]}
    return [*_basic(), *ends[clean]]


@cache
def _basic() -> tuple[Normalizer, ...]:
    """ftfy's fixes in its order, between the entities that it unescapes and those that html.unescape does afterwards."""
    steps = [replacement(r"&(?:(?:amp|AMP|#0*38|#[xX]0*26);)+", "&")]
    steps += [replacement(f"&(?:{'|'.join(names)});", value) for value, names in _entities()]
    steps += [replacement(escaped(broken), repaired) for broken, repaired in _mojibake()]
    steps += [replacement(escaped(chr(code)), windows) for code in C1 if (windows := _windows(code)) != chr(code)]
    steps += [replacement(escaped(chr(code)), text) for code, text in (LIGATURES | WIDTH_MAP).items()]
    steps += [
        replacement(DOUBLE_QUOTE_RE.pattern, '"'),
        replacement(SINGLE_QUOTE_RE.pattern, "'"),
        replacement(TERMINAL_ESCAPE, ""),
        replacement(f"[{escaped(map(chr, CONTROL_CHARS))}]", ""),
        {"type": "NFC"},
        replacement(r"&(?:(?:amp|AMP|#0*38(?!\d)|#[xX]0*26(?![\da-fA-F]));?)+", "&"),
    ]
    steps += [replacement(f"&(?:{'|'.join(names)});?", value) for value, names in _open_entities()]
    return tuple(steps)


def _entities() -> Iterator[tuple[str, list[str]]]:
    """(character, names) of all references that end in a semicolon, without `&` and `;`, but those of `&` itself."""
    names = defaultdict(list)
    for entity, value in HTML_ENTITIES.items():
        names[value].append(entity[1:-1])
    for code in {*range(0x100), *(ord(value) for value in names if len(value) == 1)}:
        names[_character(code)] += [f"#0*{code}", f"#[xX]0*{_hexadecimal(code)}"]
    del names["&"]
    yield from sorted(names.items())


def _open_entities() -> Iterator[tuple[str, list[str]]]:
    """(character, names) of the references that html.unescape knows without a semicolon, the longer before those that they begin with."""
    for name in sorted((name for name in html5 if not name.endswith(";")), key=lambda name: (-len(name), name)):
        if name.lower() != "amp":
            yield html5[name], [name]
    names: dict[str, list[str]] = defaultdict(list)
    for code in range(0x100):
        names[_character(code)] += [rf"#0*{code}(?!\d)", f"#[xX]0*{_hexadecimal(code)}(?![\\da-fA-F])"]
    del names["&"]
    yield from sorted(names.items())


def _mojibake() -> Iterator[tuple[str, str]]:
    """(UTF-8 read as Windows-1252 or Latin-1, the character) for Western European ones that ftfy repairs wherever they stand."""
    for code in (*range(0xA0, 0x180), *range(0x2010, 0x2028), *range(0x2030, 0x203B), *map(ord, "€™−←→✓✔")):
        for encoding in ("sloppy-windows-1252", "latin-1"):
            broken = chr(code).encode().decode(encoding)
            if all(ftfy.fix_text(text.format(broken)) == ftfy.fix_text(text.format(chr(code))) for text in _CONTEXTS):
                yield broken, chr(code)


def _character(code: int) -> str:
    """What a numeric reference stands for: browsers read some as Windows-1252, and none as a control character."""
    return html.unescape(f"&#{code};")


def _hexadecimal(code: int) -> str:
    """Digits of either case."""
    return "".join(digit if digit.isdigit() else f"[{digit}{digit.upper()}]" for digit in f"{code:x}")


def _windows(code: int) -> str:
    """A C1 control as Windows-1252; the five that it leaves undefined stay."""
    return bytes([code]).decode("sloppy-windows-1252")


def escaped(text: Iterable[str]) -> str:
    """A regular expression for exactly this text, or, in brackets, for one of its characters."""
    return "".join(rf"\x{{{ord(character):x}}}" for character in text)


def replacement(pattern: str, content: str) -> Normalizer:
    """Replace what a regular expression of Oniguruma finds."""
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
