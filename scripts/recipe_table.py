#!/usr/bin/env python3
"""Write the field list of docs/recipe.md from the recipe model itself: `scripts/recipe_table.py [--check]`."""

import sys
from pathlib import Path

from pydantic import BaseModel

from r1export.recipe import Base, Data, Export, Pool, Recipe, TaskSource, Train, Verify

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
MARK = "<!-- made by scripts/recipe_table.py -->\n"
SECTIONS: dict[str, type[BaseModel]] = {
    "[base]": Base,
    "[[tasks]], [probe]": TaskSource,
    "[data]": Data,
    "[pool]": Pool,
    "[train]": Train,
    "[export]": Export,
    "[verify]": Verify,
}


def table(title: str, section: type[BaseModel]) -> str:
    """One section as a Markdown table of field, default and meaning."""
    rows = []
    for name, field in section.model_fields.items():
        assert field.description, f"{name} has no docstring"
        default = "required" if field.is_required() else f"`{field.default!r}`"
        rows.append(f"| `{name}` | {default} | {' '.join(field.description.split())} |")
    return f"\n## {title}\n\n| field | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def page() -> str:
    """The whole page: what is above the mark is written by hand."""
    top = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    order = f"\n## Top level\n\n| field | default | meaning |\n|---|---|---|\n| `order` | `()` | {Recipe.model_fields['order'].description} |\n"
    return top + MARK + order + "".join(table(title, section) for title, section in SECTIONS.items())


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(page() != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page(), encoding="utf-8")
