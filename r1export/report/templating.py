"""The templates of reports, and how values are written into them."""

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from r1export.report.checks import FAIL, INCONCLUSIVE, PASS
from r1export.report.format import NOT_MEASURED

WORDS = {PASS: "Passed", FAIL: "Failed", INCONCLUSIVE: "Inconclusive", NOT_MEASURED: "Not measured"}
MARKS = {PASS: "\N{CHECK MARK}", FAIL: "\N{MULTIPLICATION X}", INCONCLUSIVE: "?", NOT_MEASURED: "\N{EN DASH}"}


def environment(language: str) -> Environment:
    """Templates for `html`, `md` or `xml`, with the words and marks of verdicts."""
    found = Environment(
        loader=PackageLoader("r1export.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_markdown if language == "md" else None,
    )
    found.globals.update(WORDS=WORDS, MARKS=MARKS)
    found.filters["code"] = lambda text: Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
    return found


def _markdown(value: Any) -> Markup:
    """Text that Markdown shows as it is, on one line; `commands` between backticks stay commands."""
    if isinstance(value, Markup):
        return value
    parts = re.split(r"(`[^`]+`)", re.sub(r"\s+", " ", str(value)))
    # Underscores inside words are harmless and common in names.
    plain = [re.sub(r"([\\*\[\]`]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", part) for part in parts[::2]]
    parts[::2] = [part.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for part in plain]
    return Markup("".join(parts).replace("|", "\\|"))
