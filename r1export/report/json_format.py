"""Reports as JSON: writing and reading the report types, and the JSON Schema generated from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from r1export.errors import InputError
from r1export.update.plain_text import printable
from r1export.verify.results import ReleaseReport, Report, RunReport, Verdict

FORMAT = ReleaseReport.schema
_TYPES: dict[str, TypeAdapter[Any]] = {
    "release": TypeAdapter(ReleaseReport),
    "releases": TypeAdapter(RunReport),
}  # by the key that distinguishes them
_COMPUTED = ("schema", "verdict", "reasons")  # written for readers, recomputed when read


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain JSON values, with its verdict and reasons; control characters are escaped."""
    kind = "releases" if isinstance(report, RunReport) else "release"
    document: dict[str, Any] = _clean(_TYPES[kind].dump_python(report, mode="json"))
    if isinstance(report, RunReport):
        document["releases"] = [to_json(part) for part in report.releases]
    return {"schema": FORMAT, "verdict": report.verdict.value, "reasons": _clean(list(report.reasons)), **document}


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {_clean(key): _clean(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_clean(part) for part in value]
    return printable(value) if isinstance(value, str) else value


def read_report(path: Path, remedy: str) -> Report:
    """Read a report.json. Raises InputError with `remedy` if it is missing or has another format."""
    try:
        document = json.loads(path.read_bytes())
        return _parse(document)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", remedy) from None
    except (OSError, ValueError, RecursionError) as error:  # a ValidationError is a ValueError
        raise InputError(f"{path}: not a report of the format {FORMAT}: {_first(error)}", remedy) from error


def _parse(document: Any) -> Report:
    if not isinstance(document, dict) or document.get("schema") != FORMAT:
        schema = document.get("schema") if isinstance(document, dict) else document
        raise ValueError(f"its schema is {schema!r:.80}")
    kind = "releases" if "releases" in document else "release"
    report: Report = _TYPES[kind].validate_json(json.dumps(document), strict=True)
    _compare(document, report)
    for part, parsed in zip(document.get("releases", []), getattr(report, "releases", ()), strict=True):
        _compare(part, parsed)
    return report


def _compare(document: dict[str, Any], report: Report) -> None:
    """Raises ValueError if the stored verdict doesn't follow from the checks."""
    if document.get("verdict") != report.verdict:
        raise ValueError(
            f"{report.name}: the verdict {document.get('verdict')!r:.40} does not follow from its checks: {report.verdict}"
        )


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"[:300]
    return str(error)[:300] or type(error).__name__


def json_schema() -> dict[str, Any]:
    """The JSON Schema of report.json, generated from the types plus the computed members."""
    kinds, schema = TypeAdapter.json_schemas(
        [(kind, "serialization", adapter) for kind, adapter in _TYPES.items()],
        title="r1export report",
        description="The results of verifying one release, or a run with all of its releases. Accuracies are fractions, times "
        "milliseconds, sizes bytes. Every check counts the items it looked at, and how many there are.",
    )
    computed = {
        "schema": {"const": FORMAT},
        "verdict": {"enum": [str(v) for v in Verdict]},
        "reasons": {
            "type": "array",
            "items": {"type": "string"},
            "description": "The reasons for a verdict other than pass.",
        },
    }
    for name in (ReleaseReport.__name__, RunReport.__name__):
        definition = schema["$defs"][name]
        definition["properties"] = computed | definition["properties"]
        definition["required"] = [*_COMPUTED, *definition["required"]]
    references = [kinds[kind, "serialization"] for kind in _TYPES]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": FORMAT, **schema, "anyOf": references}
