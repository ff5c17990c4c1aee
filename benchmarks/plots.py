"""The figures of a question: its ratios with their spread and goals, and every sample by contender. PNG and SVG."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from benchmarks.question import LIMIT, OURS, Question, Record
from benchmarks.results import Comparison

#: Okabe and Ito's colours: distinct for all eyes.
WIN, LOSS, EVEN, GOAL, PEER = "#009E73", "#D55E00", "#999999", "#000000", "#56B4E9"
BAND = "#F3F3F3"
#: More panels than this do not fit a page; the rest of the cases is in the samples.
MOST_PANELS = 30
#: A panel's axis is logarithmic where one contender costs so many times as much as another.
LINEAR_UP_TO = 10
#: Fewer samples are drawn as the dots that they are, as well.
LEAST_FOR_BOX = 5
DOTS_PER_INCH = 120


def draw(question: Question, record: Record, comparisons: list[Comparison], output: Path) -> list[Path]:
    """Draws both figures; returns the files. Nothing is drawn of what was not measured."""
    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False}):
        files = []
        if any(comparison.ratio for comparison in comparisons):
            files += _save(_ratios(question, comparisons), output / f"{question.name}-ratios")
        if record.samples:
            files += _save(_samples(question, record), output / f"{question.name}-samples")
    return files


def _save(figure: Figure, stem: Path) -> list[Path]:
    files = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=DOTS_PER_INCH, bbox_inches="tight")
    return files


def _ratios(question: Question, comparisons: list[Comparison]) -> Figure:
    """A row per case and peer, a column per statistic: the ratio as a dot with its spread, the goal as a tick."""
    shown = [comparison for comparison in comparisons if comparison.ratio]
    rows = list(dict.fromkeys((comparison.case, comparison.peer) for comparison in shown))
    columns = list(dict.fromkeys(comparison.statistic for comparison in shown))
    figure = Figure(figsize=(3.6 + 4.9 * len(columns), 1.2 + 0.24 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    for axes, statistic in zip(panels, columns, strict=True):
        for comparison in shown:
            if comparison.statistic is statistic:
                _dot(axes, rows.index((comparison.case, comparison.peer)), comparison)
        _bands(axes, [case for case, _ in rows])
        axes.axvline(1, color=EVEN, linewidth=0.8, zorder=0)
        axes.margins(x=0.1)
        _log_axis(axes, 14)
        axes.set_title(str(statistic), fontsize=9)
    panels[0].set_yticks(range(len(rows)), [f"{case} / {peer}" for case, peer in rows], fontsize=8)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel(
        "rdmanet's cost over the peer's (left of 1: rdmanet wins); | is the goal; bars: 25th to 75th percentile",
        fontsize=9,
    )
    figure.suptitle(question.text, fontsize=10)
    return figure


def _dot(axes: Axes, position: int, comparison: Comparison) -> None:
    ratio = comparison.ratio or 0.0
    verdict = comparison.verdict
    colour = EVEN if verdict == "even" else WIN if ratio < 1 or verdict.startswith("within") else LOSS
    if comparison.spread is not None:
        axes.plot(comparison.spread, (position, position), color=colour, linewidth=2.5, solid_capstyle="butt")
    axes.plot(ratio, position, "o", color=colour, markersize=5)
    axes.annotate(
        f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}",
        (ratio, position),
        xytext=(6, 3),
        textcoords="offset points",
        fontsize=7,
    )
    if comparison.goal is not None:
        axes.plot(comparison.goal, position, "|", color=GOAL, markersize=11, markeredgewidth=1.6)


def _bands(axes: Axes, cases: list[str]) -> None:
    """Every second case has a grey ground: its rows belong together."""
    for number, case in enumerate(dict.fromkeys(cases)):
        if number % 2:
            first = cases.index(case)
            axes.axhspan(first - 0.5, first + cases.count(case) - 0.5, color=BAND, linewidth=0, zorder=0)


def _log_axis(axes: Axes, most_names: int) -> None:
    """Logarithmic; names 1, 2 and 5 where that many names have room, and every tick of a short axis."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if 3 * decades <= most_names else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(LogLocator(subs=tuple(range(1, 10))))
    axes.xaxis.set_minor_formatter("{x:g}" if decades < 0.8 else NullFormatter())
    axes.tick_params(axis="x", which="both", labelsize=7)


def _samples(question: Question, record: Record) -> Figure:
    """A panel per case: every contender's samples as a box with its points."""
    cases: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    units = {}
    for sample in record.samples:
        cases[sample.case][sample.contender].append(sample.value)
        units[sample.case] = sample.unit
    shown = list(cases)[:MOST_PANELS]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    tallest = max(len(cases[case]) for case in shown)
    figure = Figure(figsize=(3.6 * columns, lines * (0.9 + 0.26 * tallest)), layout="constrained")
    for number, case in enumerate(shown, 1):
        _panel(figure.add_subplot(lines, columns, number), case, units[case], cases[case])
    figure.suptitle(question.text, fontsize=10)
    return figure


def _panel(axes: Axes, case: str, unit: str, contenders: dict[str, list[float]]) -> None:
    names = list(contenders)
    boxes = axes.boxplot(
        [contenders[name] for name in names],
        orientation="horizontal",
        patch_artist=True,
        showfliers=True,
        flierprops={"marker": ".", "markersize": 3, "markeredgecolor": EVEN},
        medianprops={"color": GOAL},
        widths=0.6,
    )
    for position, (name, box) in enumerate(zip(names, boxes["boxes"], strict=True), 1):
        colour = {OURS: WIN, LIMIT: EVEN}.get(name, PEER)
        box.set_facecolor(colour)
        if len(contenders[name]) < LEAST_FOR_BOX:
            axes.plot(contenders[name], [position] * len(contenders[name]), "o", color=colour, markersize=5)
    axes.set_yticks(range(1, len(names) + 1), names, fontsize=7)
    axes.invert_yaxis()
    medians = [statistics.median(values) for values in contenders.values()]
    if max(medians) > LINEAR_UP_TO * min(medians) and min(min(values) for values in contenders.values()) > 0:
        _log_axis(axes, 8)
    else:
        axes.set_xlim(0, 1.06 * max(max(values) for values in contenders.values()) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(axis="x", labelsize=7)
    axes.set_title(f"{case} [{unit}]", fontsize=8)
