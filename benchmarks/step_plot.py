"""The figure of examples/allreduce: the time of a training step by the size of its gradients. PNG and SVG."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.plots import DOTS_PER_INCH, LOSS, WIN

COLOURS = {"rdma": WIN, "tcp": LOSS}
NAMES = {"rdma": "leased queue pairs (RDMA WRITE)", "tcp": "TCP sockets"}


def draw_steps(steps: Sequence[Mapping[str, Any]], stem: Path) -> list[Path]:
    """Draw steps (``transport``, ``family``, ``gradient_bytes``, ``step_ms`` and ``reduce_ms``, a number per step of a
    training); returns the files."""
    families = sorted({row["family"] for row in steps})
    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.6 * len(families), 4.4), layout="constrained")
        panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
        for axes, family in zip(panels, families, strict=True):
            _panel(axes, [row for row in steps if row["family"] == family])
            axes.set_title(f"IPv{family}", fontsize=9)
        panels[0].set_ylabel("milliseconds")
        figure.legend(
            *panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=2, loc="outside lower center"
        )
        figure.suptitle(
            "examples/allreduce: a step of the slowest pod, median; band: 25th to 75th percentile\n"
            "Soft-RoCE is software: the processors that train move the bytes either way. Says nothing about a NIC",
            fontsize=10,
        )
        files = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
        for file in files:
            figure.savefig(file, dpi=DOTS_PER_INCH, bbox_inches="tight")
    return files


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for transport in dict.fromkeys(row["transport"] for row in rows):
        ours = sorted((row for row in rows if row["transport"] == transport), key=lambda row: row["gradient_bytes"])
        sizes = [row["gradient_bytes"] for row in ours]
        quartiles = [statistics.quantiles(row["step_ms"], n=4) for row in ours]
        colour = COLOURS[transport]
        axes.fill_between(
            sizes, [q[0] for q in quartiles], [q[2] for q in quartiles], color=colour, alpha=0.2, linewidth=0
        )
        axes.plot(sizes, [q[1] for q in quartiles], "o-", color=colour, markersize=4, label=f"step, {NAMES[transport]}")
        reduce_ms = [statistics.median(row["reduce_ms"]) for row in ours]
        axes.plot(sizes, reduce_ms, ":", color=colour, label="of it the all-reduce")
    axes.set_xlabel("gradients that are all-reduced in every step")
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({row["gradient_bytes"] for row in rows})
    axes.set_xticks(sizes, [f"{size / 1000:.3g} KB" if size < 1e6 else f"{size / 1e6:.3g} MB" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True, which="major", color="#E5E5E5", linewidth=0.6)
