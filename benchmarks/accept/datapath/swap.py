"""Row `swap`: a running datapath is replaced a hundred times under traffic, and nothing is lost.

Two artifacts take turns, compiled from different source: the table of flows has another kind of memory, other maps
other sizes, so that each swap makes them anew and carries their contents over. Streams are compared by SHA-256;
questions over sockets that stay and over fresh ones, TCP and UDP, both IP families, to a pod and masqueraded to
outside, must all be answered.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rdmanet.datapath.artifact import Artifact
from testbed.host import ARTIFACT
from testbed.rows import Figure, need
from testbed.services import Scene
from testbed.swapping import (
    SIZES,
    Traffic,
    be_refused,
    changed,
    offer,
    put_back,
    refused,
    swap,
    uninstall_under_traffic,
)

SWAPS = 100
#: Every so many swaps by `rdmanet datapath swap`.
BY_COMMAND = 10


def measure() -> Figure:
    """Swaps, the previous one put back, a refused one, and the end of all."""
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        both = (Artifact.load(ARTIFACT), changed(scratch))
        moved = sorted(name for name, definition in both[0].maps.items() if both[1].maps[name] != definition)
        need(bool(moved), "both artifacts have the same maps")
        offer(both[0], scratch)
        config: dict[str, dict[str, Any]] = {"datapath": {"artifact_dir": directory}, **SIZES}
        with Scene.start("accept-swap", ("one", "two"), config) as scene:
            with Traffic.start(scene, "one", "two") as traffic:
                names = [""]
                for number in range(1, SWAPS + 1):
                    offer(both[number % 2], scratch)
                    names.append(swap(scene, by_command=number % BY_COMMAND == 0))
                    traffic.reach(1)
                need(len(set(names[1:])) == 2, f"{set(names[1:])} took turns")
                put_back(scene, names[-2])
                traffic.reach(1)
                put_back(scene, names[-1])
                traffic.reach(1)
                offer(refused(both[1]), scratch)
                log = be_refused(scene)
                traffic.reach(1)
                carried = traffic.end()
            answers = uninstall_under_traffic(scene)
    detail = (
        f"{SWAPS} swaps between two artifacts, each with {', '.join(moved)} made anew: {carried['bytes']} bytes in TCP"
        " streams (pod to pod and masqueraded, IPv4 and IPv6) equal by SHA-256;"
        f" {carried['answers']} questions, TCP and UDP, over old sockets and fresh ones, all answered;"
        " --previous put the earlier one back; one that the verifier refused left the other running"
        f" ({Path(log).name}); uninstall under traffic left nothing, and the host's own {answers} questions were"
        " answered, at most one datagram of each family at the second time"
    )
    return Figure(0, "bytes", detail, {"swaps": SWAPS, **carried})
