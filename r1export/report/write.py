"""The report of a release or of a run: one dict, written as JSON, Markdown, HTML and JUnit XML.

The dict is described in report.schema.json. What is missing from it is shown as not measured, never as passed.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from r1export.errors import InputError
from r1export.report import parity_tables, run_tables, tables
from r1export.report.checks import FAIL, INCONCLUSIVE, PASS, Check, checks, overall, verdict_of
from r1export.report.format import NOT_MEASURED
from r1export.report.templating import WORDS, environment
from r1export.update.release_layout import REPORTS

SCHEMA = "r1export.report/1"
# Characters that XML forbids, that are no characters, or that turn the direction of the text after them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


ACCURACY = {  # what tables and pictures of a whole run are made of
    "required": ["tasks", "zero_shot", "zero_shot_avg", "matrix"],
    "properties": {
        "tasks": {"type": "array"},
        "zero_shot": {"type": "array", "items": {"type": "number"}},
        "zero_shot_avg": {"type": "number"},
        "matrix": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    },
}


def checked(report: Mapping[str, Any], place: Path, remedy: str) -> Mapping[str, Any]:
    """The report that was read from `place`. Raises InputError with `remedy` if it is none by report.schema.json."""
    problem = _misfit(report, _schema())
    if not problem and report.get("releases") and report.get("accuracy"):
        problem = _misfit({"accuracy": report["accuracy"]}, {"properties": {"accuracy": ACCURACY}})
    if problem:
        raise InputError(f"{place}: not a report: {problem}", remedy)
    return report


def _misfit(value: Any, schema: Mapping[str, Any]) -> str:
    """What fits a JSON Schema least, with its place; empty if all fits."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema).iter_errors(value))
    return f"{error.json_path.removeprefix('$.')}: {error.message:.200}" if error else ""


@cache
def _schema() -> dict[str, Any]:
    return json.loads(files("r1export.report").joinpath("report.schema.json").read_text("utf-8"))


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write the four files of `REPORTS`; each one is renamed into place when all are complete."""
    report = settled(report)
    plain = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    forms = render_html(report), render_markdown(report), render_junit(report), plain
    texts = dict(zip(REPORTS, forms, strict=True))
    beside = {name: folder / f".{name}.{os.getpid()}" for name in texts}
    try:
        for name, text in texts.items():
            beside[name].write_text(text, encoding="utf-8", newline="\n")
        for name, path in beside.items():
            path.replace(folder / name)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)


def settled(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report as plain JSON values, with a verdict that is no better than its parts and a reason if it is not pass.

    NaN and infinity become null. ValueError for a verdict that is none. Law: settled(settled(r)) == settled(r).
    """
    plain = {"schema": SCHEMA, **_plain(report)}
    if "releases" in plain:
        plain["releases"] = [settled(part) for part in plain["releases"] or []]
    stated = verdict_of(plain)
    plain["verdict"] = overall([stated, overall(verdict for verdict, _ in _lines(plain))])
    reasons = list(plain.get("reasons") or [])
    if plain["verdict"] != PASS and (plain["verdict"] != stated or not reasons):
        reasons += _own_reasons(plain)
    plain["reasons"] = reasons
    return plain


def _lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The verdict of every part, each with a line that explains it."""
    if "releases" in report:
        parts = [(_name(part), verdict_of(part), " ".join(part["reasons"][:1])) for part in report["releases"]]
    else:
        parts = [(check.title, check.verdict, check.evidence) for check in checks(report)]
    return [(verdict, f"{name}: {WORDS[verdict].lower()}. {evidence}".strip()) for name, verdict, evidence in parts]


def _own_reasons(report: Mapping[str, Any]) -> list[str]:
    found = [line for wanted in (FAIL, INCONCLUSIVE) for verdict, line in _lines(report) if verdict == wanted]
    return found or ["Nothing was measured. Run `r1export verify`."]


def render_html(report: Mapping[str, Any]) -> str:
    """One page that needs nothing else: no network, no script, no font."""
    return environment("html").get_template("report.html.j2").render(_page(settled(report), pictures=True))


def render_markdown(report: Mapping[str, Any]) -> str:
    """The same report without pictures."""
    return environment("md").get_template("report.md.j2").render(_page(settled(report), pictures=False))


def render_junit(report: Mapping[str, Any]) -> str:
    """JUnit XML: one suite per release, one case per check and one for the verdict.

    Inconclusive and not measured are skipped cases, which no reader of JUnit files counts as passed.
    """
    report = settled(report)
    suites = [_suite(part) for part in report.get("releases", [])] + [_suite(report)]
    return environment("xml").get_template("report.xml.j2").render(suites=suites, created=report.get("created") or "")


def _suite(report: Mapping[str, Any]) -> dict[str, Any]:
    shows = "The release may be fielded."
    verdict = Check("report", "verdict", "Verdict", shows, report["verdict"], " ".join(report["reasons"]))
    cases = [*([] if "releases" in report else checks(report)), verdict]
    count = {word: sum(case.verdict == word for case in cases) for word in WORDS}
    return {
        "name": _name(report),
        "cases": cases,
        "failures": count[FAIL],
        "skipped": count[INCONCLUSIVE] + count[NOT_MEASURED],
    }


def _name(report: Mapping[str, Any]) -> str:
    return "run" if "releases" in report else (report.get("release") or {}).get("name") or "unnamed"


def _page(report: Mapping[str, Any], pictures: bool) -> dict[str, Any]:
    """All that the templates show."""
    is_run = "releases" in report
    parts = report["releases"] if is_run else [report]
    found = [check for part in parts for check in checks(part)]
    accuracy = report.get("accuracy")
    return {
        "report": report,
        "heading": _heading(report),
        "origin": _origin(report),
        "lead": _lead(found),
        "facts": tables.facts(run_tables.worst(report) if is_run else report),
        "groups": tables.groups(found),
        "releases": run_tables.releases(report) if is_run else None,
        "variants": run_tables.variants(parts),
        "sections": [_section(part, f"r{n}", pictures) for n, part in enumerate(parts)],
        "accuracy": tables.accuracies(accuracy),
        "summary": tables.accuracy_summary(accuracy),
        "accuracy_pictures": _accuracy_pictures(accuracy) if pictures else {},
        "environment": tables.settings(report.get("environment") or {}),
        "recipe": tables.settings(report.get("recipe") or {}),
    }


def _heading(report: Mapping[str, Any]) -> str:
    if "releases" in report:
        return f"Run of {len(report['releases'])} releases"
    return f"Release {_name(report)}"


def _origin(report: Mapping[str, Any]) -> str:
    """What the release is of, where that is known."""
    release = report.get("release") or {}
    known = {
        "Task": release.get("task"),
        "Base model": release.get("base"),
        "Written": report.get("created"),
        "r1export": report.get("r1export"),
    }
    return " \N{MIDDLE DOT} ".join(f"{title} {value}" for title, value in known.items() if value)


def _lead(found: list[Check]) -> str:
    """The count of the checks by verdict, in one sentence."""
    counts = {word: sum(check.verdict == word for check in found) for word in WORDS}
    if found and counts[PASS] == len(found):
        return f"All {len(found)} checks passed."
    listed = ", ".join(f"{count} {WORDS[word].lower()}" for word, count in counts.items() if count)
    return f"{len(found)} checks: {listed}." if found else "No check was made."


def _section(report: Mapping[str, Any], key: str, pictures: bool) -> dict[str, Any]:
    """What one release shows; `key` keeps the pictures of several releases apart."""
    return {
        "name": _name(report),
        "verdict": report["verdict"],
        "reasons": report["reasons"],
        "contents": tables.contents(report),
        "ladder": tables.ladder(report),
        "drift": tables.drift(report),
        "parity": parity_tables.parity(report),
        "flips": parity_tables.flips(report),
        "timings": tables.timings(report),
        "advice": (report.get("latency") or {}).get("advice"),
        "digests": tables.digests(report),
        "pictures": _release_pictures(report, key) if pictures else {},
    }


def _release_pictures(report: Mapping[str, Any], key: str) -> dict[str, Markup]:
    from r1export.report import plots

    drawn = {
        "errors": plots.error_histogram(report.get("parity"), f"{key}-errors"),
        "latency": plots.latency_ratios(report.get("latency"), f"{key}-latency"),
        "sizes": plots.sizes(report.get("release"), f"{key}-sizes"),
    }
    return {name: Markup(svg) for name, svg in drawn.items()}


def _accuracy_pictures(accuracy: Mapping[str, Any] | None) -> dict[str, Markup]:
    from r1export.report import plots

    return {
        "matrix": Markup(plots.accuracy_matrix(accuracy, "matrix")),
        "curves": Markup(plots.forgetting_curves(accuracy, "curves")),
    }


def _plain(value: Any) -> Any:
    """JSON values only: arrays as lists, what is not finite as None, text without unprintable characters."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
