"""Untrusted text made safe for a terminal: it can neither move the cursor nor fake another line. And the form of errors."""

from __future__ import annotations

import unicodedata

ERROR = "Error: "  # begins the line of an error, in bold red on a terminal

# Categories: control, format (bidi and invisible characters), surrogates, separators of lines and paragraphs
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = {"\u200c", "\u200d"}  # format characters that Persian and the Indic scripts cannot be written without


def printable(text: str) -> str:
    r"""`text` on one line, each character that acts on a terminal written as an escape.

    >>> printable("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """
    return "".join(_escape(c) if unicodedata.category(c) in _UNSAFE and c not in _JOINERS else c for c in text)


def one_line(text: str) -> str:
    """`printable`, with every run of whitespace as one space."""
    return printable(" ".join(text.split()))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
