"""Texts that people type, by the thousand and always the same: words of many scripts with what goes wrong in files."""

from __future__ import annotations

import random
import re
import unicodedata
from html.entities import html5

import ftfy

WORDS = (
    "a photo of cat dog's it's we'll don't T-Shirt snake_case A.B.C. 42 3,5 100% x=y (bracket) [square] {curly} #tag @home a/b \\ | ~ ^ ` + - * !? ...",
    "naïve café cafe\u0301 straße ÉCOLE Übung İstanbul ΟΔΟΣ ΣΟΦΟΣ Σ ΑΣ. Москва ПРИВЕТ 你好 世界 日本語 カタカナ 한국어 العربية كتاب עברית हिन्दी ไทย ქართული",
    "😀 🚗 👩‍👩‍👧 🇩🇪 ✓ — – … • € £ ½ ² µ ∞ → “quoted” ‘it’ ‚low‛ „low“ ʼ «guillemets»",
    "ＦＵＬＬ ｗｉｄｔｈ １２３ ！？ ｶﾞｷﾞ ﬁne ﬂow oﬀ eﬃcient baﬄe ﬅ ﬆ ĳ ŉ Ǆ",
)  # fmt: skip
REFERENCES = """
&amp; &lt; &gt; &quot; &apos; &nbsp; &eacute; &Eacute; &EACUTE; &hellip; &rsquo; &ldquo; &euro; &copy; &trade; &NotEqualTilde; &fjlig;
&#39; &#039; &#x27; &#X27; &#160; &#8217; &#8230; &#233; &#xE9; &#150; &#1; &amp;amp; &amp;lt; AT&T R&D &co &amp &copy &eacute &notit; &#39 &#x41
"""
MOJIBAKE = "é ñ ü Ö ç ’ “ – € © ° É"
SPECIAL = """
<start_of_text> <end_of_text> <START_OF_TEXT> <|startoftext|> <|endoftext|> <s> </s> <pad> <eos> <bos> <unk> <mask> [SEP] [CLS] [PAD] [sep]
<b> </b> ▁▁ ▁ <extra_id_0> eng_Latn <0x41>
"""
SPACES = (" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u2028", "\x0b", "\x0c", "\x1f", " \n ")
CONTROLS = (
    *("\x00", "\x01", "\x07", "\x1b[31m", "\x1b[0m", "\x7f", "\x80", "\x85", "\x92", "\x9d"),
    *("\ufeff", "\u206a", "\ufffd", "\u200b", "\u200d", "\u00ad"),
)
PIECES = {
    "words": tuple(" ".join(WORDS).split()),
    "references": tuple(REFERENCES.split()),
    "controls": CONTROLS,
    "mojibake": tuple(word.encode().decode("sloppy-windows-1252") for word in MOJIBAKE.split()),
    "special": tuple(SPECIAL.split()),
}
CONFIG = ftfy.TextFixerConfig(fix_encoding=False)  # which finds no mojibake


def typed_texts(count: int, seed: int = 0, **weights: float) -> list[str]:
    """`count` texts of 0 to 12 pieces, one in fifty longer than any context; `weights` say how often a kind of piece comes."""
    draw = random.Random(seed)
    kinds = {"words": 12.0, "references": 1.0, "controls": 1.0, "mojibake": 0.0, "special": 1.0} | weights
    return [_text(draw, kinds) for _ in range(count)]


def _text(draw: random.Random, kinds: dict[str, float]) -> str:
    length = draw.choice((100, 200)) if draw.random() < 0.02 else draw.randint(0, 12)
    parts = []
    for kind in draw.choices(list(kinds), list(kinds.values()), k=length):
        parts += [
            draw.choice(PIECES[kind]),
            draw.choice(SPACES) if draw.random() < 0.2 else draw.choice((" ", " ", "")),
        ]
    return "".join(parts)


def in_reach(text: str) -> bool:
    """Whether replacements in a row can clean this text as ftfy does (r1export.export.text_cleaning.LIMITS)."""
    rare = re.search(r"&#(\d{4,}|[xX][\da-fA-F]{3,})(?![;\da-fA-F])", text)  # such as &#x41a where &#x41 was meant
    return not (rare or ("<" in text and "&" in text)) and ftfy.fix_text(text) == ftfy.fix_text(text, CONFIG)


def every_reference() -> list[str]:
    """A text with each named HTML entity, and with each number that stands for a character of Latin-1."""
    names = [f"a &{name} b" for name in html5]
    numbers = [f"x&#{code};y &#x{code:X};z" for code in range(256)]
    return names + numbers + [f"x&#{code} y&#x{code:x} z" for code in range(256)]


def every_character() -> list[str]:
    """Texts of 64 characters each, with every one that this Python's Unicode knows, but surrogates."""
    known = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    return ["a " + " ".join(known[i : i + 64]) + "b" for i in range(0, len(known), 64)]
