"""What a proof is made of: rows, each with the work that shows it and the modes of the RDMA subsystem it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rdmanet.model import RdmaMode
from testbed.rows import Figure, Row

Work = Callable[[], Figure]


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of a proof. `work` makes its own host, agent and pods, and takes them back; it raises what it cannot
    show. With several modes it is carried out once in each."""

    work: Work
    modes: tuple[RdmaMode, ...] = (RdmaMode.SHARED,)


Proof = Mapping[str, Claim]


def merged(name: str, claim: Claim, found: Mapping[RdmaMode, Row]) -> Row:
    """One row from those of each mode: it succeeded where all did. One that is missing has not been carried out."""
    parts = {mode: found.get(mode, Row(name, False, None, "", "not carried out")) for mode in claim.modes}
    if len(parts) == 1:
        return next(iter(parts.values()))
    first = next(iter(parts.values()))
    detail = "; ".join(f"{mode} mode: {row.detail}" for mode, row in parts.items())
    more = {str(mode): dict(row.more) for mode, row in parts.items()}
    return Row(name, all(row.ok for row in parts.values()), first.value, first.unit, detail, more)


def verdict(title: str, rows: Sequence[Row]) -> str:
    """The last line."""
    lost = ", ".join(row.step for row in rows if not row.ok)
    return f"accept: {title}: {sum(row.ok for row in rows)} of {len(rows)} rows" + (f"; not: {lost}" if lost else "")
