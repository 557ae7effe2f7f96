"""Write a report as JSON, Markdown, HTML and JUnit XML."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from r1export.report import details, summary, table
from r1export.report.checks import Line, lines
from r1export.report.format import NOT_MEASURED, or_not_applicable
from r1export.report.json_format import to_json
from r1export.update.atomic_io import PARTIAL
from r1export.update.plain_text import printable
from r1export.update.release_layout import REPORTS
from r1export.verify.results import Accuracy, Example, ReleaseReport, Report, RunReport, Verdict

WORDS = {
    Verdict.PASS: "Passed",
    Verdict.FAIL: "Failed",
    Verdict.INCONCLUSIVE: "Inconclusive",
    Verdict.NOT_APPLICABLE: "Not applicable",
}
MARKS = {
    Verdict.PASS: "\N{CHECK MARK}",
    Verdict.FAIL: "\N{MULTIPLICATION X}",
    Verdict.INCONCLUSIVE: "?",
    Verdict.NOT_APPLICABLE: "\N{EN DASH}",
}


def write_report(report: Report, folder: Path) -> None:
    """Write the four files of `REPORTS`; they are renamed into place once all are complete."""
    document = json.dumps(to_json(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    texts = dict(
        zip(REPORTS, (render_html(report), render_markdown(report), render_junit(report), document), strict=True)
    )
    temporary = {name: folder / f".{name}.{os.getpid()}{PARTIAL}" for name in texts}
    try:
        for name, text in texts.items():
            temporary[name].write_text(text, encoding="utf-8", newline="\n")
        for name, path in temporary.items():
            path.replace(folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def remove_reports(folder: Path) -> None:
    """Delete the files of an earlier verification: a report must not outlive the files it describes."""
    for name in REPORTS:
        (folder / name).unlink(missing_ok=True)


def render_html(report: Report) -> str:
    """One self-contained page: no network, no scripts, no fonts."""
    return environment("html").get_template("report.html.j2").render(_page(report, pictures=True))


def render_markdown(report: Report) -> str:
    """The same report without plots."""
    return environment("md").get_template("report.md.j2").render(_page(report, pictures=False))


def render_junit(report: Report) -> str:
    """JUnit XML: one suite per release, one case per check and one for the verdict.

    Inconclusive and not applicable are `skipped` cases, which no JUnit reader counts as passed.
    """
    releases = report.releases if isinstance(report, RunReport) else ()
    suites = [_suite(part) for part in (*releases, report)]
    return environment("xml").get_template("report.xml.j2").render(suites=suites, created=report.created)


@dataclass(frozen=True)
class Suite:
    """The JUnit cases of one release, or of the run."""

    name: str
    cases: tuple[Line, ...]

    def count(self, *verdicts: Verdict) -> int:
        return sum(case.verdict in verdicts for case in self.cases)

    @property
    def failures(self) -> int:
        return self.count(Verdict.FAIL)

    @property
    def skipped(self) -> int:
        return self.count(Verdict.INCONCLUSIVE, Verdict.NOT_APPLICABLE)


def _suite(report: Report) -> Suite:
    verdict = Line(
        "report.verdict", "Verdict", "The release can be deployed.", report.verdict, " ".join(report.reasons)
    )
    return Suite(report.name, (*lines(report), verdict))


def environment(language: str) -> Environment:
    """Templates for `html`, `md` or `xml`, with the words and marks of verdicts."""
    templates = Environment(
        loader=PackageLoader("r1export.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_markdown if language == "md" else _printable,
    )
    templates.globals.update(WORDS=WORDS, MARKS=MARKS, Verdict=Verdict)
    templates.filters["code"] = lambda text: Markup(
        re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(printable(text))))
    )
    return templates


def _printable(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _markdown(value: Any) -> Markup:
    """Text escaped for Markdown, on one line; `code` between backticks stays code."""
    if isinstance(value, Markup):
        return value
    parts = re.split(r"(`[^`]+`)", printable(re.sub(r"\s+", " ", str(value))))
    # Underscores within words are common in names and need no escape.
    plain = [re.sub(r"([\\*\[\]`]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", part) for part in parts[::2]]
    parts[::2] = [part.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for part in plain]
    return Markup("".join(parts).replace("|", "\\|"))


def _page(report: Report, pictures: bool) -> dict[str, object]:
    """The variables of the templates."""
    parts = report.releases if isinstance(report, RunReport) else (report,)
    run = report if isinstance(report, RunReport) else None
    checks = [*(lines(run) if run else []), *(line for part in parts for line in lines(part))]
    return {
        "report": report,
        "heading": f"Run of {len(parts)} releases" if run else f"Release {report.name}",
        "origin": _origin(report),
        "lead": _lead(checks),
        "facts": summary.facts(report),
        "groups": summary.groups(checks),
        "run_checks": table.check_table(lines(run), "Check") if run else None,
        "releases": summary.releases(run) if run else None,
        "variants": summary.variants(parts),
        "guards": summary.guards(run) if run else None,
        "inputs": summary.inputs(run) if run else None,
        "examples": _by_task(run.examples) if run else {},
        "sections": [_section(part, f"r{n}", pictures) for n, part in enumerate(parts)],
        "accuracy": summary.accuracies(report.accuracy),
        "summary": summary.accuracy_summary(report),
        "accuracy_pictures": _accuracy_pictures(report.accuracy) if pictures and report.accuracy else {},
        "environment": list(summary.settings(to_json(report)["environment"])),
        "recipe": list(summary.settings(run.recipe)) if run else [],
    }


def _by_task(examples: Sequence[Example]) -> dict[str, list[Example]]:
    tasks = dict.fromkeys(example.task for example in examples)
    return {task: [example for example in examples if example.task == task] for task in tasks}


def _origin(report: Report) -> str:
    """Task, base model, date and version, if known."""
    known = {"Written": report.created, "r1export": report.environment.r1export}
    if isinstance(report, ReleaseReport):
        known = {"Task": report.release.task or "", "Base model": report.release.base or "", **known}
    return " \N{MIDDLE DOT} ".join(f"{title} {value}" for title, value in known.items() if value)


def _lead(checks: list[Line]) -> str:
    """The count of the checks by verdict, in one sentence."""
    counts = {verdict: sum(check.verdict is verdict for check in checks) for verdict in WORDS}
    counted = (f"{count} {WORDS[verdict].lower()}" for verdict, count in counts.items() if count)
    return f"{len(checks)} checks: {', '.join(counted)}."


def _section(report: ReleaseReport, key: str, pictures: bool) -> dict[str, object]:
    """The section of one release; `key` makes the ids of its plots unique."""
    return {
        "name": report.name,
        "verdict": report.verdict,
        "reasons": report.reasons,
        "contents": details.contents(report),
        "sensitivity": details.sensitivity(report.sensitivity),
        "ladder": details.ladder(report),
        "drift": details.drift(report.compatible_with),
        "parity": details.parity(report),
        "flips": details.flips(report),
        "clocks": details.clocks(report.latency),
        "timings": details.timings(report.latency),
        "uncounted": report.latency.uncounted,
        "untimed": f"{or_not_applicable(report.latency, NOT_MEASURED).capitalize()}.",
        "advice": report.latency.detail,
        "digests": details.digests(report),
        "pictures": _release_pictures(report, key) if pictures else {},
    }


def _release_pictures(report: ReleaseReport, key: str) -> dict[str, Markup]:
    from r1export.report import plots  # imported here: matplotlib loads slowly, and Markdown doesn't need it

    drawn = {
        "errors": plots.error_histogram(report.parity, f"{key}-errors"),
        "latency": plots.latency_ratios(report.latency, f"{key}-latency"),
        "sizes": plots.sizes(report.release, f"{key}-sizes"),
    }
    return {name: Markup(svg) for name, svg in drawn.items()}


def _accuracy_pictures(accuracy: Accuracy) -> dict[str, Markup]:
    from r1export.report import plots

    return {
        "matrix": Markup(plots.accuracy_matrix(accuracy, "matrix")),
        "curves": Markup(plots.forgetting_curves(accuracy, "curves")),
    }
