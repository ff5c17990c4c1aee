"""Row `maglev`: how many flows move when one of 100 backends goes, beyond those that it had itself.

The table that the agent writes into the kernel's map; each place stands for the flows whose hash leads to it. All 100
removals, with the default size and with the paper's (Eisenbud et al., NSDI 2016, 5.3), beside what choosing by the
remainder of a division would move.
"""

from __future__ import annotations

import statistics

from rdmanet.config import Config
from rdmanet.model import address_key
from rdmanet.services.maglev import table
from testbed.rows import Figure, need

BACKENDS = 100
PAPER_SIZE = 65537
#: Of the default's 1021 places; the paper has less than 2 % with 65537.
MOST_MOVED = 0.05


def _names() -> list[bytes]:
    return sorted(address_key(f"10.1.0.{number}") + b"\x1f\x90" for number in range(1, BACKENDS + 1))


def _moved(names: list[bytes], size: int) -> tuple[float, float]:
    """Shares of all places that change although their backend stays: the mean and the most of all removals."""
    before = [names[index] for index in table(names, size)]
    shares = []
    for gone in names:
        left = [name for name in names if name != gone]
        after = [left[index] for index in table(left, size)]
        moved = sum(one != other and one != gone for one, other in zip(before, after, strict=True))
        need(gone not in after, "a removed backend is still in the table")
        shares.append(moved / size)
    return statistics.mean(shares), max(shares)


def _spread(names: list[bytes], size: int) -> float:
    """The busiest backend's places over the average."""
    chosen = table(names, size)
    return max(chosen.count(index) for index in range(len(names))) * len(names) / size


def measure() -> Figure:
    """Both sizes."""
    names, default = _names(), Config().services.maglev_size
    mean, most = _moved(names, default)
    paper_mean, _ = _moved(names, PAPER_SIZE)
    by_remainder = sum(place % BACKENDS != place % (BACKENDS - 1) for place in range(PAPER_SIZE)) / PAPER_SIZE
    detail = (
        f"of the flows to the 99 that stay {mean:.2%} move on average, {most:.2%} at most, with {default} places;"
        f" {paper_mean:.2%} with {PAPER_SIZE}; by remainder {by_remainder:.0%} would; the busiest backend has"
        f" {_spread(names, default):.2f} and {_spread(names, PAPER_SIZE):.3f} of the average"
    )
    need(most <= MOST_MOVED, detail)
    return Figure(mean * 100, "% moved", detail, {"most": most, "paper_size": paper_mean, "by_remainder": by_remainder})
