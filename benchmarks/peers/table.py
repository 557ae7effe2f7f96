"""The tables of the comparison, as Markdown, from the rows of the contenders: strings in, strings out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from peers.row import Failed, Fault, Ratio, Row, Rows

BEGIN, END = "<!-- made by benchmarks/against_peers.py -->\n", "<!-- end of what benchmarks/against_peers.py made -->\n"
OURS = "r1export"
TITLES = {
    "optimum": "Optimum, merged by PEFT",
    "olive": "Olive, merged while converting",
    "peft": "PEFT merge and torch.onnx",
    "multilora": "ONNX Runtime multi-LoRA (graph by Olive)",
    OURS: "**r1export**",
}
COLUMNS = (
    "contender", "export, s: first / later", "release, MB", "parity, max-abs", "image tower, ms", "adapted / base [95 %]",
    "bytes of an update", "wrong merge fails the run", "damaged file fails the run",
)  # fmt: skip
BRIEF = ("tool", "next release", "latency vs. base [95 % CI]", "update of a device", "planted faults caught")
FAULTS = {"merge": "the scaling of the LoRA counts twice", "file": "one weight has the wrong sign"}
CLOSE = 1.05  # times within this factor count as equal, sizes within SAME_SIZE; each is one measurement
SAME_SIZE = 1.01
ROUNDING = 1e-6  # below this, differences of unit-norm float32 embeddings are rounding
WHY = {
    "first_seconds": "it also proves in onnxruntime that every weight is where the graph looks for it, and writes class embeddings, "
    "golden samples and digests. It happens once for an architecture",
    "later_seconds": "a later release of multi-LoRA is a file of factors alone. r1export merges them and writes whole weights, "
    "class embeddings, golden samples and digests, so that a release can be deployed by itself and proven",
    "release_bytes": "classify.onnx, a third graph, shares the weights of the image tower",
    "parity": "the difference is more than rounding",
    "ratio": "the interval does not lie within 2 % of 1",
    "update_bytes": "in addition to the same factors it contains a signature, the digests of all files and tensors of the result, "
    "golden outputs for the device's self-test and the class embeddings of the new version",
}
NAMES = {
    "first_seconds": "first export", "later_seconds": "later release", "release_bytes": "size of a release", "parity": "parity",
    "ratio": "latency", "update_bytes": "bytes of an update", "merge": "wrong merge", "file": "damaged file",
}  # fmt: skip
Figure = Literal["first_seconds", "later_seconds", "release_bytes", "parity", "update_bytes"]
FIGURES: tuple[Figure, ...] = ("first_seconds", "later_seconds", "release_bytes", "parity", "update_bytes")


def table(rows: Rows) -> str:
    """One line for each contender; one that failed says how."""
    return _head(COLUMNS) + "".join(_line(TITLES[name], rows[name]) for name in TITLES if name in rows)


def brief(rows: Rows) -> str:
    """The five columns that decide, one line for each contender."""
    return _head(BRIEF) + "".join(_brief_line(TITLES[name], rows[name]) for name in TITLES if name in rows)


def _head(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"


def _brief_line(title: str, row: Row | Failed) -> str:
    if "failed" in row:
        return f"| {title} | failed: {cell(row['failed'])} | | | |\n"
    caught = sum(bool(row["faults"][fault]["exit_code"]) for fault in FAULTS)
    adapted = {kind: ratio for kind, ratio in row.get("timing", {}).get("ratios", {}).items() if kind == "adapted"}
    cells = (
        title,
        f"{_seconds(row['later_seconds'])} s",
        _ratio(adapted),
        f"{row['update_bytes'] / 1e6:.1f} MB",
        f"{caught} of {len(FAULTS)}",
    )
    return "| " + " | ".join(cells) + " |\n"


def _line(title: str, row: Row | Failed) -> str:
    if "failed" in row:
        return f"| {title} | failed: {cell(row['failed'])} | | | | | | | |\n"
    cells = (
        title,
        f"{_seconds(row['first_seconds'])} / {_seconds(row['later_seconds'])}",
        f"{row['release_bytes'] / 1e6:.1f}",
        f"{row['parity']:.1e}",
        _times(row),
        _ratio(row.get("timing", {}).get("ratios", {})),
        f"{row['update_bytes']:,}",
        *(_fails(row["faults"][fault]) for fault in FAULTS),
    )
    return "| " + " | ".join(cells) + " |\n"


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 0.1 else f"{value:.1f}"


def _times(row: Row) -> str:
    ms = row.get("timing", {}).get("ms", {})
    return f"{ms['base']:.1f}, adapted {ms['adapted']:.1f}" if ms else "not measured"


def _ratio(ratios: Mapping[str, Ratio]) -> str:
    if not ratios:
        return "not measured"
    parts = {"adapted": "", "off": "adapter built in but off: ", "again": "base against itself: "}
    shown = [
        f"{words}{ratios[kind]['ratio']:.3f} [{ratios[kind]['ci95'][0]:.3f}, {ratios[kind]['ci95'][1]:.3f}]"
        for kind, words in parts.items()
        if kind in ratios
    ]
    return "; ".join(shown)


def _fails(fault: Fault) -> str:
    return f"yes (exit code {fault['exit_code']})" if fault["exit_code"] else "no (exit code 0)"


def shortfalls(rows: Rows) -> list[str]:
    """Where r1export is neither best nor equal, against whom, and why: one sentence each."""
    sound = {name: row for name, row in rows.items() if "failed" not in row}
    if OURS not in sound:
        return ["r1export failed."]
    found = []
    for column in FIGURES:
        best = min(sound, key=lambda name: sound[name][column])
        if not _equal(column, sound[OURS][column], sound[best][column]):
            ours, theirs = (_amount(column, sound[name][column]) for name in (OURS, best))
            found.append(f"{NAMES[column].capitalize()}: {ours} against {theirs} of {best}: {WHY[column]}.")
    ratio = sound[OURS].get("timing", {}).get("ratios", {}).get("adapted")
    if ratio and ratio["verdict"] != "pass":
        found.append(f"Latency: {ratio['verdict']}: {WHY['ratio']}, or that of base against itself does not.")
    for fault in FAULTS:
        if not sound[OURS]["faults"][fault]["exit_code"]:
            found.append(f"{NAMES[fault].capitalize()}: it was not noticed.")
    return found


def _equal(column: Figure, ours: float, best: float) -> bool:
    if column == "parity":
        return ours <= max(best, ROUNDING)
    return ours <= best * (CLOSE if column.endswith("seconds") else SAME_SIZE)


def _amount(column: Figure, value: float) -> str:
    if column == "parity":
        return f"{value:.1e}"
    return f"{_seconds(value)} s" if column.endswith("seconds") else f"{value:,} bytes"


def faults_table(rows: Rows) -> str:
    """What each contender's own check said of each planted fault, and how far off the embeddings were."""
    lines = ["| contender | fault | exit code | what it said | embeddings off by |\n|---|---|---|---|---|\n"]
    for name in TITLES:
        row = rows.get(name)
        if row is None or "failed" in row:
            continue
        if check := row.get("check_on_the_sound_model"):
            lines.append(f"| {TITLES[name]} | none | {check['exit_code']} | {cell(check['said']) or 'nothing'} | |\n")
        for fault, words in FAULTS.items():
            one = row["faults"][fault]
            said = cell(one["said"]) or "nothing"
            lines.append(f"| {TITLES[name]} | {words} | {one['exit_code']} | {said} | {one['off_by']:.2g} |\n")
    return "".join(lines)


def versions_line(rows: Rows) -> str:
    """Versions by contender."""
    parts = [
        f"{name}: " + ", ".join(f"{package} {version}" for package, version in row["versions"].items())
        for name, row in rows.items()
        if "failed" not in row
    ]
    return "Versions. " + "; ".join(parts) + ".\n"


def cell(text: str) -> str:
    """Text that may stand in a cell of a Markdown table."""
    return " ".join(text.replace("|", "/").split())


def placed(page: str, made: str) -> str:
    """`page` with `made` between the markers. Raises ValueError if the markers are not there once each, in order."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError("the page has no place for the table: put both markers there, each once")
    return page[: page.index(BEGIN)] + BEGIN + made + page[page.index(END) :]


def hidden(text: str, places: Sequence[tuple[str, str]]) -> str:
    """`text` without the names of this machine's folders; `places` are (folder, what to write for it)."""
    for folder, word in places:
        text = text.replace(folder, word)
    return text
