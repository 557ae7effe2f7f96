"""Foreign text cannot act on a terminal."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1export.update.plain_text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Straße 東京 می\u200cخواهم 👩\u200d🔬", "Straße 東京 می\u200cخواهم 👩\u200d🔬"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("one\r\ntwo\u2028three\x85", "one\\r\\ntwo\\u2028three\\x85"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("user\u202egnp.exe\u2066", "user\\u202egnp.exe\\u2066"),
        ("\ud800\ufeff\U000e0041", "\\ud800\\ufeff\\U000e0041"),
    ],
)
def test_what_acts_on_a_terminal_becomes_visible(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_any_text_is_one_line_that_can_be_encoded(text):
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    shown.encode()
    assert not any(
        unicodedata.category(c) in ("Cc", "Cs")
        or unicodedata.bidirectional(c)[1:] in ("LE", "RE", "LO", "RO", "DF", "LI", "RI", "SI", "DI")
        for c in shown
    )
