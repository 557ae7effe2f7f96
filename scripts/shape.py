"""Print the shape of the source: what docs/architecture.md shows before and after a redesign.

python scripts/shape.py [FOLDER]      FOLDER is the package, r1export by default
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

PACKAGE = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "r1export"
PARTS = ("verify", "pipeline", "report")
READERS = ("verify", "report", "console.py")
UNTYPED = re.compile(r"\b(?:dict|Mapping)\[str, Any\]")


def sources(*parts: str) -> Iterator[Path]:
    for part in parts or (".",):
        path = PACKAGE / part
        yield from [path] if path.is_file() else sorted(path.rglob("*.py"))


def count(pattern: re.Pattern[str], *parts: str) -> int:
    return sum(len(pattern.findall(path.read_text(encoding="utf-8"))) for path in sources(*parts))


def functions() -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Those that a caller may give: self and cls are none."""
    given = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len(given) - (given[:1] in (["self"], ["cls"]))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    last, first = function.end_lineno or function.lineno, function.lineno
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        return last - first - ((docstring.end_lineno or docstring.lineno) - docstring.lineno)
    return last - first + 1


def rows() -> Iterator[tuple[str, object]]:
    yield "`dict[str, Any]` and `Mapping[str, Any]` in the package", count(UNTYPED)
    yield '`.get("` in verify/, report/, console', count(re.compile(r'\.get\("'), *READERS)
    folders = Counter(path.parent for path in sources() if path.name != "__init__.py")
    yield (
        "files in the largest folder",
        f"{max(folders.values())} ({folders.most_common(1)[0][0].relative_to(PACKAGE)}/)",
    )
    found = list(functions())
    yield "functions with six parameters or more", sum(parameters(function) >= 6 for function in found)
    parts = [part for part in PARTS if (PACKAGE / part).is_dir()]
    yield (
        "lines of verify + pipeline + report",
        sum(len(path.read_text("utf-8").splitlines()) for path in sources(*parts)),
    )
    lengths = [length(function) for function in found]
    yield (
        "median, 90th percentile, longest function",
        f"{median(lengths):.0f}, {quantiles(lengths, n=10)[-1]:.0f}, {max(lengths)}",
    )


if __name__ == "__main__":
    for name, value in rows():
        print(f"| {name} | {value} |")
