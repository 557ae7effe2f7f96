"""MkDocs hook: makes pages that are written for a code host into pages of a site.

On a code host a page may link to any file of the repository. The site has the pages of docs/ only, so a link that leaves docs/
becomes the file's path in the repository: `[index](../benchmarks/README.md)` reads "index (`benchmarks/README.md`)". A link
to a file that does not exist stays as it is, and the strict build reports it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]+)\]\((\.\.?/[^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """`markdown` of a page with the links that leave docs/ as text."""
    return links_as_text(markdown, posixpath.dirname(f"docs/{page.file.src_uri}"))


def links_as_text(markdown: str, folder: str) -> str:
    """`markdown` of a page in `folder` (from the top of the repository) with the links that leave docs/ as text."""

    def text(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        if target.startswith("docs/") or not (ROOT / target).exists():
            return link[0]
        return f"`{target}`" if target.endswith(link[1].strip("`")) else f"{link[1]} (`{target}`)"

    return LINK.sub(text, markdown)
