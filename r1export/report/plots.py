"""The plots of a report, each one SVG element for inclusion in a page (see svg.py for colours and fonts).

Every function takes a part of the report and a key that is unique on the page, and returns "" if there is nothing to draw.
"""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from r1export.report.format import percent, scientific, share, size
from r1export.report.summary import matrix
from r1export.report.svg import ALARM, BAND, DASHES, HEAT, INK, LINE, MUTED, SERIES, page_svg, style
from r1export.verify.results import PARITY_STAGES, Accuracy, Histogram, Latency, Parity, ParityStages, ReleaseFacts

WIDTH = 6.0  # inches of 72 pixels: legible on a phone
PROBE = " (probe)"
MERGED, UNMERGED = "merged", "unmerged"


def accuracy_matrix(accuracy: Accuracy, key: str) -> str:
    """Heat map: rows for zero-shot and after each task, columns for each task and the probe."""
    rows, columns, values = matrix(accuracy)
    names = [_short(name.removesuffix(PROBE), 14) for name in columns]
    places = [n + (0.25 if name.endswith(PROBE) else 0.0) for n, name in enumerate(columns)]
    with style(key):
        figure = Figure(figsize=(1.7 + 0.7 * len(columns), 0.75 + 0.4 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for y, row in enumerate(values):
            for x, value in zip(places, row, strict=True):
                _cell(axes, x, y, value, learned=x == y - 1)
        axes.set(xlim=(-0.5, places[-1] + 0.5), ylim=(len(rows) - 0.5, -0.5))
        axes.set_xticks(places, names, color=INK)
        axes.set_yticks(range(len(rows)), [_short(name, 24) for name in rows], color=INK)
        slanted = max(map(len, names)) > 9
        axes.tick_params(top=True, bottom=False, labeltop=True, labelbottom=False, length=0)
        if slanted:
            for label in axes.get_xticklabels():
                label.set(rotation=32, ha="left", rotation_mode="anchor")
        axes.spines[:].set_visible(False)
        last = ", ".join(f"{name} {percent(value)}" for name, value in zip(columns, values[-1], strict=True))
        return page_svg(figure, key, f"Accuracy matrix in percent. Last row, {rows[-1]}: {last}.")


def _cell(axes: Axes, x: float, y: int, value: float, learned: bool) -> None:
    """One number on a patch whose opacity grows with it; the task just trained is outlined."""
    strength = 0.06 + 0.94 * max(0.0, min(1.0, value)) ** 1.5
    box = (x - 0.47, y - 0.45)
    axes.add_patch(Rectangle(box, 0.94, 0.9, facecolor=HEAT, alpha=strength, linewidth=0))
    if learned:
        axes.add_patch(Rectangle(box, 0.94, 0.9, fill=False, edgecolor=INK, linewidth=1.2))
    axes.text(x, y, percent(value).removesuffix(" %"), ha="center", va="center", color=INK)


def forgetting_curves(accuracy: Accuracy, key: str) -> str:
    """Accuracy of every task over the sequence; a dot marks the step at which it was trained."""
    rows, columns, values = matrix(accuracy)
    tasks = columns[: len(accuracy.tasks)]
    if len(rows) < 2:
        return ""
    with style(key):
        figure = Figure(figsize=(WIDTH, 3.1 + 0.12 * max(0, len(tasks) - 6)), layout="constrained")
        axes = figure.subplots()
        ends = []
        for n, name in enumerate(tasks):
            curve = [(i, 100 * row[n]) for i, row in enumerate(values)]
            _curve(axes, curve, n)
            ends.append((curve[-1][1], n, name))
        stages = len(rows) - 1
        ends.sort()
        for height, (_, n, name) in zip(_stacked([end[0] for end in ends], 6.5, 103), ends, strict=True):
            axes.text(1.02 * stages + 0.04, height, _short(name, 16), va="center", color=SERIES[n % len(SERIES)])
        axes.set(xlim=(-0.05 * stages, stages), ylim=(-2, 104), ylabel="accuracy, %")
        axes.set_xticks(range(stages + 1), [_short(name.removeprefix("after "), 12) for name in rows])
        if len(rows) > 6 or max(map(len, rows)) > 18:
            for label in axes.get_xticklabels():
                label.set(rotation=32, ha="right", rotation_mode="anchor")
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        return page_svg(figure, key, f"Accuracy of {len(tasks)} tasks after each step, from {rows[0]} to {rows[-1]}.")


def _curve(axes: Axes, curve: Sequence[tuple[int, float]], n: int) -> None:
    colour, dash = SERIES[n % len(SERIES)], DASHES[n // len(SERIES) % len(DASHES)]
    axes.plot(*zip(*curve, strict=True), color=colour, linestyle=dash, linewidth=1.8)
    learned = [point for point in curve if point[0] == n + 1]
    if learned:
        axes.plot(*learned[0], "o", color=colour, markersize=6, clip_on=False)


def error_histogram(parity: ParityStages, key: str) -> str:
    """Histograms of log10 of the absolute differences, one strip per stage, with its tolerance."""
    stages = [(name, stage) for name in PARITY_STAGES if (stage := getattr(parity, name)).histogram]
    if not stages:
        return ""
    with style(key):
        figure = Figure(figsize=(WIDTH, 0.7 + 0.85 * len(stages)), layout="constrained")
        strips = figure.subplots(len(stages), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, stage) in zip(strips, stages, strict=True):
            _strip(axes, name, stage, stage.histogram)
        strips[-1].set_xlabel("absolute difference")
        strips[-1].xaxis.set_major_formatter(lambda tick, _: f"1e{tick:g}")
        facts = "; ".join(
            f"{name}: max. {scientific(stage.max_abs)}, tolerance {scientific(stage.tolerance)}"
            for name, stage in stages
        )
        return page_svg(figure, key, f"Histograms of absolute differences. {facts}.")


def _strip(axes: Axes, name: str, stage: Parity, histogram: Histogram) -> None:
    axes.stairs(
        histogram.counts, [math.log10(edge) for edge in histogram.edges], fill=True, color=SERIES[0], alpha=0.85
    )
    axes.set_ylabel(name, rotation=0, ha="right", va="center", color=INK)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    if stage.tolerance:
        axes.axvline(math.log10(stage.tolerance), color=ALARM, linewidth=1.3, linestyle=(0, (4, 2)))
        text = f"tolerance\n{scientific(stage.tolerance)}"
        axes.text(1.01, 0.5, text, transform=axes.transAxes, va="center", color=ALARM, fontsize=9)


def latency_ratios(latency: Latency, key: str) -> str:
    """Latency vs. base: single rounds as dots, 95 % intervals as bars, the margin as a band."""
    rows, pairs, margin = _latency_rows(latency), latency.pair_ratios, latency.margin
    if not rows or not margin:
        return ""
    reach = _reach([*pairs, *(end for name, _, interval in rows if name != UNMERGED for end in interval)], margin)
    with style(key):
        figure = Figure(figsize=(WIDTH, 0.75 + 0.62 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.axvspan(1 - margin, 1 + margin, color=BAND, linewidth=0)
        axes.axvline(1, color=MUTED, linewidth=0.8)
        for y, (name, middle, interval) in enumerate(rows):
            _interval(axes, y, middle, interval, pairs if name == MERGED else [], reach)
        axes.set(xlim=(1 - reach, 1 + reach), ylim=(len(rows) - 0.5, -0.5), xlabel="latency vs. base")
        axes.set_yticks(range(len(rows)), [row[0] for row in rows], color=INK)
        axes.spines["left"].set_visible(False)
        axes.annotate(
            f"margin ±{percent(margin, 0)}", (1 + margin, 0), xycoords=("data", "axes fraction"), xytext=(3, 3),
            textcoords="offset points", color=MUTED, fontsize=9,
        )  # fmt: skip
        facts = "; ".join(f"{name} {middle:.3f}" for name, middle, _ in rows)
        return page_svg(figure, key, f"Latency vs. base. {facts}. Margin {percent(margin, 0)}.")


def _latency_rows(latency: Latency) -> list[tuple[str, float, tuple[float, ...]]]:
    """Name, estimate and interval of each measured ratio; the unmerged model has no interval."""
    if latency.ratio is None or latency.ci95 is None or latency.noise_floor is None:
        return []
    rows: list[tuple[str, float, tuple[float, ...]]] = [
        ("base vs. base (noise)", latency.noise_floor.ratio, latency.noise_floor.ci95),
        (MERGED, latency.ratio, latency.ci95),
    ]
    return [*rows, (UNMERGED, latency.unmerged_ratio, ())] if latency.unmerged_ratio is not None else rows


def _reach(ratios: Sequence[float], margin: float) -> float:
    """Half the width of the axis: fits the margin and 95 % of the ratios, so that outliers don't squeeze the rest."""
    distances = sorted(abs(value - 1) for value in ratios)
    return 1.15 * max([2 * margin, *distances[: math.ceil(0.95 * len(distances))][-1:]])


def _interval(
    axes: Axes, y: int, middle: float, interval: Sequence[float], dots: Sequence[float], reach: float
) -> None:
    if abs(middle - 1) > reach:
        side = math.copysign(1, middle - 1)
        axes.annotate(f"{middle:.2f}", (1 + side * reach, y), xytext=(-side * 34, 0), textcoords="offset points",
                      ha="center", va="center", color=INK, arrowprops={"arrowstyle": "-|>", "color": SERIES[1]})  # fmt: skip
        return
    shown = [dot for dot in dots if abs(dot - 1) <= reach]
    # The golden ratio spreads the dots evenly over the height, deterministically.
    heights = [y + 0.62 * ((n * 0.618034) % 1 - 0.5) for n in range(len(shown))]
    axes.plot(shown, heights, "o", color=SERIES[0], alpha=0.28, markersize=3, markeredgewidth=0)
    if len(interval) == 2:
        axes.plot(interval, [y, y], color=INK, linewidth=2.6, solid_capstyle="butt")
    axes.plot([middle], [y], "D", color=INK, markersize=5.5)


def sizes(release: ReleaseFacts, key: str) -> str:
    """The size of an update compared with the full-precision weights."""
    weights, update = release.weight_bytes, release.update_bytes
    if not weights or update is None:
        return ""
    with style(key):
        figure = Figure(figsize=(WIDTH, 1.25), layout="constrained")
        axes = figure.subplots()
        axes.barh([0, 1], [weights, max(update, weights / 400)], color=[SERIES[0], SERIES[1]], height=0.6)
        axes.set_yticks([0, 1], ["all weights", "this update"], color=INK)
        axes.set(ylim=(1.5, -0.5), xlim=(0, weights * 1.16))
        axes.text(weights * 1.01, 0, size(weights), va="center")
        label = f"{size(update)}, {share(update, weights)} of the weights"
        axes.text(max(update, weights / 400) + weights * 0.01, 1, label, va="center")
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        return page_svg(figure, key, f"All weights take {size(weights)}, this update {label}.")


def _stacked(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Ascending label heights, moved down where they would overlap the label above or the top."""
    placed: list[float] = []
    for height in reversed(heights):
        placed.append(min(height, top))
        top = placed[-1] - gap
    return placed[::-1]


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"
