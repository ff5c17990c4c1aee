"""The figures of a question: its ratios with their spread and goals, and every sample by contender. PNG and SVG."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.question import LIMIT, OURS, Question, Record
from benchmarks.results import Comparison

#: Okabe and Ito's colours: distinct for all eyes.
WIN, LOSS, EVEN, GOAL, PEER = "#009E73", "#D55E00", "#999999", "#000000", "#56B4E9"
#: More panels than this do not fit a page; the rest of the cases is in the samples.
MOST_PANELS = 24
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
    """A row per comparison: the ratio as a dot with its spread, the goal as a tick; 1 is the peer."""
    rows = [comparison for comparison in comparisons if comparison.ratio]
    figure = Figure(figsize=(8.5, 1.2 + 0.24 * len(rows)))
    axes = figure.add_subplot()
    for position, comparison in enumerate(rows):
        ratio = comparison.ratio or 0.0
        verdict = comparison.verdict
        colour = EVEN if verdict == "even" else WIN if ratio < 1 or verdict.startswith("within") else LOSS
        if comparison.spread is not None:
            axes.plot(comparison.spread, (position, position), color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot(ratio, position, "o", color=colour, markersize=5)
        axes.annotate(f"{ratio:.2f}", (ratio, position), xytext=(6, 3), textcoords="offset points", fontsize=7)
        if comparison.goal is not None:
            axes.plot(comparison.goal, position, "|", color=GOAL, markersize=11, markeredgewidth=1.6)
    axes.axvline(1, color=EVEN, linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.set_yticks(range(len(rows)), [f"{row.case} {row.statistic} / {row.peer}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(
        "rdmanet's cost over the peer's (left of 1: rdmanet wins); | is the goal; bars: 25th to 75th percentile"
    )
    axes.set_title(question.text, fontsize=10, loc="left")
    return figure


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
    for name, box in zip(names, boxes["boxes"], strict=True):
        box.set_facecolor({OURS: WIN, LIMIT: EVEN}.get(name, PEER))
    axes.set_yticks(range(1, len(names) + 1), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(f"{case} [{unit}]", fontsize=8)
