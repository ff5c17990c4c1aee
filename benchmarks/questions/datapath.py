"""What does a packet from pod to pod on one node cost, beside loopback, a veth pair, routing, masquerading, a bridge?

Real pods of a real agent, real pods of the reference plugins, and one load program for all (benchmarks/netload.c).
Measured where a nanosecond is an instruction of the whole machine, with all contenders in it: what our agent does when
idle meets all alike, and falls into single blocks of the load program.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks.peers import paths
from benchmarks.peers.paths import Attacher, Way
from benchmarks.question import OURS, Goal, Place, Question, Run
from rdmanet.datapath import bpf
from rdmanet.datapath.layout import U32
from rdmanet.datapath.tables import POLICY_KEY
from rdmanet.errors import RdmanetError, UnavailableError

FAMILIES = ("ipv4", "ipv6")
FEW = f"{OURS} with 2 pods"
#: The same pods before policies came.
UNJUDGED = f"{OURS} without policy"
RULES_PER_POLICY = 100
APPLY_TIMEOUT_S = 300.0
MAPS = "/sys/fs/bpf/rdmanet"
ADDS_AT_ONCE = 4
#: New interfaces solicit routers and report their groups for some seconds (RFC 4861 6.3.7, RFC 3810 9.11). Time is
#: virtual: idle seconds pass at once.
SETTLE_S = 20.0


@dataclass(frozen=True, slots=True)
class Work:
    """What netload is asked to do: transactions, or KiB of a stream; as (full, quick, smoke)."""

    name: str
    warmup: tuple[int, int, int]
    count: tuple[int, int, int]
    unit: str = "ns"


WORKS = (
    Work("tcp-rr", (200, 100, 5), (1800, 360, 18)),
    Work("tcp-crr", (50, 30, 2), (450, 135, 9)),
    Work("udp-rr", (200, 100, 5), (1800, 360, 18)),
    Work("tcp-stream", (8192, 4096, 64), (9 << 12, 9 << 10, 9 << 6), "ns/KiB"),
)
#: What may not get dearer as pods become more.
GROWING = WORKS[:3]


def measure(run: Run) -> None:
    """All ways side by side; then our host grows."""
    paths.make_netload()
    with contextlib.ExitStack() as stack:
        attacher = stack.enter_context(paths.rdmanet())
        ours = attacher.way()
        ways = {OURS: ours}
        run.tell(f"{OURS} is ready")
        for name, open_way in paths.PEERS.items():
            try:
                ways[name] = stack.enter_context(open_way())
                run.tell(f"{name} is ready")
            except RdmanetError as error:
                for work in WORKS:
                    for family in FAMILIES:
                        run.failed(f"{work.name}/{family}", name, str(error))
        for _ in run.rounds(full=5, quick=2):
            for work in WORKS:
                for family in FAMILIES:
                    for name, way in run.turns(ways):
                        sample(run, f"{work.name}/{family}", name, way, work, family)
        judge(run, stack, ways["loopback"])
        grow(run, attacher, ours)


def judge(run: Run, stack: contextlib.ExitStack, loopback: Way) -> None:
    """Two pods before and after many rules of policies that select them have come, of which the last allows them.

    Beside loopback in the same rounds; on a host of their own, whose other pods are none.
    """
    rules = run.pick(full=10_000, quick=1_000, smoke=200)
    attacher = stack.enter_context(paths.rdmanet(f"{OURS}-judged"))
    way = attacher.way()
    for contender in (UNJUDGED, OURS):
        if contender == OURS:
            begun = time.monotonic()
            apply_rules(attacher, rules)
            run.tell(f"{rules} rules applied in {time.monotonic() - begun:.1f} s")
        for _ in run.rounds(full=5, quick=1):
            for work in GROWING:
                for family in FAMILIES:
                    case = f"{work.name}/{family}/rules-{rules}"
                    sample(run, case, contender, way, work, family)
                    if contender == OURS:
                        sample(run, case, "loopback", loopback, work, family)


def apply_rules(attacher: Attacher, rules: int) -> None:
    """Policies with so many rules in each direction, for all pods. Raises UnavailableError where the maps do not have
    as many entries afterwards."""
    spec = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    documents = []
    for first in range(0, rules, RULES_PER_POLICY):
        ports = [{"port": 9, "protocol": "TCP"}]
        blocks = [
            {"ipBlock": {"cidr": f"172.{16 + number // 65536}.{number // 256 % 256}.{number % 256}/32"}}
            for number in range(first, first + RULES_PER_POLICY)
        ]
        ingress = [{"from": [block], "ports": ports} for block in blocks]
        egress = [{"to": [block], "ports": ports} for block in blocks]
        documents.append(network_policy(f"rules-{first}", {**spec, "ingress": ingress, "egress": egress}))
    pods: list[dict[str, Any]] = [{"podSelector": {}}]
    documents.append(network_policy("allow", {**spec, "ingress": [{"from": pods}], "egress": [{"to": pods}]}))
    attacher.host.api("PUT", "/v1/objects", {"documents": documents}, timeout_s=APPLY_TIMEOUT_S)
    descriptor = bpf.get(attacher.host.path(MAPS) / "policy")
    if descriptor is None:
        raise UnavailableError("the map of policy is not pinned", subject=MAPS)
    try:
        found = sum(1 for _ in bpf.items(descriptor, POLICY_KEY.size, U32.size))
    finally:
        os.close(descriptor)
    if found < rules:
        raise UnavailableError(f"{rules} rules were applied, and the map of policy has {found} entries", subject=MAPS)


def network_policy(name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The document."""
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name}, "spec": spec}


def grow(run: Run, attacher: Attacher, ours: Way) -> None:
    """The same two pods before and after others have come: what is counted is the same machine's work."""
    pods = run.pick(full=1000, quick=50, smoke=4)
    for contender in (FEW, OURS):
        if contender == OURS:
            fill(run, attacher, pods)
            if run.place is Place.ICOUNT:
                time.sleep(SETTLE_S)
        for _ in run.rounds(full=5, quick=1):
            for work in GROWING:
                for family in FAMILIES:
                    sample(run, f"{work.name}/{family}/growth-{pods}", contender, ours, work, family)


def fill(run: Run, attacher: Attacher, pods: int) -> None:
    """Real ADDs until there are so many pods; RdmanetError when one fails."""
    with ThreadPoolExecutor(ADDS_AT_ONCE) as pool:
        for number, _ in enumerate(pool.map(attacher.add, [f"more-{number}" for number in range(pods - 2)]), 3):
            run.tell(f"pod {number} of {pods}")


def sample(run: Run, case: str, contender: str, way: Way, work: Work, family: str) -> None:
    """One run of the load program; what fails is kept as that."""
    try:
        value = way.load(work.name, family, run.pick(*work.warmup), run.pick(*work.count))
    except RdmanetError as error:
        run.failed(case, contender, str(error))
        return
    run.sample(case, contender, value, work.unit)


QUESTION = Question(
    name="datapath",
    text=(__doc__ or "").partition("\n")[0],
    places=(Place.ICOUNT,),
    measure=measure,
    goals=(
        Goal("*/growth-*", "*", 1.01),
        Goal("*/rules-*", UNJUDGED, 1.01),
        Goal("*-rr/*", "loopback", 1.10),
        Goal("*", "ptp*", 1.0),
        Goal("*", "bridge", 1.0),
    ),
    timeout_s=5400.0,
)
