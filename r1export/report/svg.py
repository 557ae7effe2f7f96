"""matplotlib figures as SVG elements that adopt the style of the page.

Figures are drawn in placeholder colours, which become CSS variables here, so that plots follow light, dark and print
styles. Text stays text, in the font of the page.
"""

import io
import re
import warnings
from contextlib import AbstractContextManager
from html import escape
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, LINE, HEAT, BAND, ALARM = (f"#0101{n:02x}" for n in range(1, 7))
SERIES = [f"#0102{n:02x}" for n in range(1, 7)]
DASHES = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]
_VARIABLES = {
    **dict(zip((INK, MUTED, LINE, HEAT, BAND, ALARM), ("ink", "muted", "line", "heat", "band", "fail"), strict=True)),
    **{colour: f"s{n}" for n, colour in enumerate(SERIES, 1)},
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


def style(key: str) -> AbstractContextManager[None]:
    """The style of one plot; ids depend on `key` only, so that equal figures give equal bytes."""
    return matplotlib.rc_context({**_STYLE, "svg.hashsalt": key})


def page_svg(figure: Figure, key: str, label: str) -> str:
    """The figure as one `<svg>` element with the page's colours and font, and a label for screen readers."""
    FigureCanvasSVG(figure)
    file = io.StringIO()
    with warnings.catch_warnings():
        # Names may be written in any script: the page's font draws them, matplotlib's only measures.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    width, height = figure.get_size_inches() * 72
    body = file.getvalue().split("<svg", 1)[1].split("\n", 1)[1]
    body = re.sub(r" <metadata>.*?</metadata>\n", "", body, flags=re.S)
    body = re.sub(r" <defs>\s*<style.*?</style>\s*</defs>\n", "", body, flags=re.S)
    body = re.sub(r"font-family: (?:'[^']*'|[^;'\"<>])*", "font-family: inherit", body)
    body = _own_names(body, key)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" '
        f'viewBox="0 0 {width:g} {height:g}" style="min-width:{width * 0.84:.0f}px;max-width:{width * 1.4:.0f}px">\n{body.strip()}'
    )


def _own_names(body: str, key: str) -> str:
    """Remove unused ids and prefix the others, since several plots share one page."""
    used = set(re.findall(r'url\(#([^)<>]+)\)|href="#([^"<>]+)"', body))
    names = {name for pair in used for name in pair if name}
    prefix = re.sub(r"[^A-Za-z0-9-]", "-", key)
    body = re.sub(r' id="([^"<>]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in names else "", body)
    body = re.sub(r"url\(#([^)<>]+)\)", rf"url(#{prefix}-\1)", body)
    return re.sub(r'(?:xlink:)?href="#([^"<>]+)"', rf'href="#{prefix}-\1"', body)
