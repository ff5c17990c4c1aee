"""What a proof is made of: rows, each with the work that shows it and the places where it is carried out."""

from __future__ import annotations

import enum
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rdmanet.model import RdmaMode
from testbed.rows import Figure, Row, need

Work = Callable[[], Figure]


class Place(enum.StrEnum):
    """The running kernel, whatever RDMA it has; or a mode of the RDMA subsystem and a kernel: one that can give pods
    rxe devices of their own, or the distribution's, which need not."""

    HOST = "host"
    SHARED = "shared"
    EXCLUSIVE = "exclusive"
    DISTRIBUTION = "distribution"

    @property
    def mode(self) -> RdmaMode:
        """Of the RDMA subsystem there."""
        return RdmaMode.EXCLUSIVE if self is Place.EXCLUSIVE else RdmaMode.SHARED

    @property
    def words(self) -> str:
        """For people."""
        if self is Place.HOST:
            return "the running kernel"
        return f"{self.mode} mode" + (" on the distribution's kernel" if self is Place.DISTRIBUTION else "")


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of a proof. `work` makes its own host, agent and pods, and takes them back; it raises what it cannot
    show. With several places it is carried out once in each."""

    work: Work
    places: tuple[Place, ...] = (Place.SHARED,)


Proof = Mapping[str, Claim]


def later(package: str, module: str) -> Work:
    """The work of a row that has a module to itself, which is imported when the row is carried out."""

    def work() -> Figure:
        name = f"{package}.{module}"
        need(importlib.util.find_spec(name) is not None, f"nothing proves it yet: {module}.py is not written")
        figure: Figure = importlib.import_module(name).measure()
        return figure

    return work


def merged(name: str, claim: Claim, found: Mapping[Place, Row]) -> Row:
    """One row from those of each place: it succeeded where all did. One that is missing has not been carried out."""
    parts = {place: found.get(place, Row(name, False, None, "", "not carried out")) for place in claim.places}
    if len(parts) == 1:
        return next(iter(parts.values()))
    first = next(iter(parts.values()))
    detail = "; ".join(f"{place.words}: {row.detail}" for place, row in parts.items())
    more = {str(place): dict(row.more) for place, row in parts.items()}
    return Row(name, all(row.ok for row in parts.values()), first.value, first.unit, detail, more)


def verdict(title: str, rows: Sequence[Row]) -> str:
    """The last line."""
    lost = ", ".join(row.step for row in rows if not row.ok)
    return f"accept: {title}: {sum(row.ok for row in rows)} of {len(rows)} rows" + (f"; not: {lost}" if lost else "")
