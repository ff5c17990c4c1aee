"""``python -m benchmarks.accept``: every proof, or those that are named, in the virtual machine where it is needed."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accept.proof import Place, Proof, merged, verdict
from rdmanet.errors import InputError, RdmanetError
from testbed import kernel, vm
from testbed.paths import BUILD
from testbed.progress import heartbeat, say
from testbed.rows import Row, measure, read, show, write
from testbed.session import end_session

#: Title of each proof, and the module whose ROWS it is.
PROOFS = {
    "rdma": "benchmarks.accept.rdma",
    "datapath": "benchmarks.accept.datapath",
    "reliability": "benchmarks.accept.reliability",
    "ml-jobs": "benchmarks.accept.ml_jobs",
}
RESULTS = BUILD / "accept"
#: All rows together take about an hour on two processors without hardware virtualisation.
VM_TIMEOUT_S = 7200.0
NAME_WIDTH = 15


def load(title: str) -> Proof:
    """The rows of a proof."""
    rows: Proof = importlib.import_module(PROOFS[title]).ROWS
    return rows


def chosen(named: str, known: Sequence[str], what: str) -> list[str]:
    """Those that are named, with commas between, in the order in which they are known; all for an empty text.

    InputError for one that is not known.
    """
    wanted = [name for name in named.replace(" ", "").split(",") if name]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise InputError(f"there is no {what} {', '.join(unknown)}; known are {', '.join(known)}")
    return [name for name in known if not wanted or name in wanted]


def part(title: str, place: Place) -> Path:
    """Where the rows that were carried out in one place lie."""
    return RESULTS / f"{title}.{place}.json"


def carry_out(title: str, names: Sequence[str], place: Place) -> None:
    """These rows, on this kernel as it is; what was shown so far is in the part's file at any time."""
    proof, rows = load(title), []
    try:
        for name in names:
            with heartbeat(f"accept {title}: {name}"):
                rows.append(measure(name, proof[name].work))
            show(rows[-1], width=NAME_WIDTH)
            write(rows, part(title, place))
    finally:
        end_session()


def prove(title: str, names: Sequence[str]) -> list[Row]:
    """These rows, each in its places, here or in a virtual machine per place; they are also in the proof's file."""
    proof = load(title)
    for place in Place:
        part(title, place).unlink(missing_ok=True)
        wanted = [name for name in names if place in proof[name].places]
        if not wanted:
            continue
        older = place is Place.DISTRIBUTION
        missing = "" if older or place is Place.HOST else kernel.why_not_here(place.mode)
        if not older and not missing:
            carry_out(title, wanted, place)
            continue
        why = "" if older else f"{missing}; "
        say(f"accept {title}: {why}{len(wanted)} row(s) run in a virtual machine in {place.words}")
        argv = [sys.executable, "-m", "benchmarks.accept", "--only", title, "--rows", ",".join(wanted)]
        try:
            vm.run(
                [*argv, "--inside", str(place)],
                rdma_mode=place.mode,
                timeout_s=VM_TIMEOUT_S,
                kernel=kernel.prepare_distribution() if older else None,
            )
        except vm.GuestFailure as error:
            say(f"accept {title}: {error}")  # the rows that it had not come to say so
    return collected(title, proof, names)


def collected(title: str, proof: Proof, names: Sequence[str]) -> list[Row]:
    """The rows of all places as one list, written to the proof's file."""
    found: dict[str, dict[Place, Row]] = {name: {} for name in names}
    for place in Place:
        for row in read(part(title, place)):
            found[row.step][place] = row
    rows = [merged(name, proof[name], found[name]) for name in names]
    write(rows, RESULTS / f"{title}.json")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 when every row was shown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accept", description=__doc__)
    parser.add_argument("--only", default="", metavar="PROOF[,PROOF]", help=f"of {', '.join(PROOFS)}; default: all")
    parser.add_argument("--rows", default="", metavar="ROW[,ROW]", help="of those proofs; default: all")
    parser.add_argument("--inside", type=Place, choices=list(Place), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    lost = False
    try:
        for title in chosen(options.only, list(PROOFS), "proof"):
            names = chosen(options.rows, list(load(title)), f"row of {title}")
            if options.inside is not None:
                carry_out(title, names, options.inside)
                continue
            rows = prove(title, names)
            for row in rows:
                show(row, width=NAME_WIDTH)
            print(verdict(title, rows), flush=True)
            lost = lost or not all(row.ok for row in rows)
    except RdmanetError as error:
        say(f"accept: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return int(lost)


if __name__ == "__main__":
    sys.exit(main())
