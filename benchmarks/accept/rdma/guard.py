"""Row `guard`: what the guard keeps from queue pairs, counted packet by packet.

Three pods: a victim that has leases, a friend that it has them with, an intruder. Each attempt is a number of packets
towards the victim; each of them must be counted as dropped, by the reason that fits, and a watch on the victim's own
interface must see none. In `observe` what is for queue pairs without a lease passes, and is counted as well.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers import namespaces
from benchmarks.peers.namespaces import SYSFS, End
from rdmanet.model import GATEWAY_MAC, GuardMode
from testbed.host import Host
from testbed.paths import REPOSITORY
from testbed.peer import Peer
from testbed.rows import Figure, need

PROGRAM = ("-m", "benchmarks.peers.intruder")
NAMES = ("victim", "friend", "intruder")
#: How long what has been sent may take to be counted, and a lease to be known as over.
COUNTED_TIMEOUT_S = 60.0
#: The first number that devices give to queue pairs (rxe: RXE_MIN_QP_INDEX), and a larger one than they can reach.
FIRST_QPN = 16
#: What must pass: else the other counts would prove nothing.
LEASED = "leased"
_tokens = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How often each thing is tried."""

    guesses: int = 1000  # QPNs, and source QPNs of datagrams
    repeats: int = 1000  # of one packet
    real: int = 100  # datagrams of a real queue pair


@dataclass
class Scene:
    """The pods, their programs, and what they know of each other."""

    host: Host
    mode: GuardMode
    sizes: Sizes
    ends: dict[str, End]
    peers: dict[str, Peer]
    unleased: dict[str, int] = field(default_factory=dict)
    leased: dict[str, int] = field(default_factory=dict)
    friends: dict[str, int] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def address(self, name: str, version: int) -> str:
        """Of a pod."""
        return self.ends[name].addresses[version]

    def mac(self, name: str) -> str:
        """Of a pod's interface."""
        return str(_row(self.host, self.ends[name].pod.container_id)["mac"])

    def drops(self, name: str) -> dict[str, int]:
        """What a pod sent and what was dropped of it, by reason."""
        rows = self.host.api("GET", "/v1/status")["drops"]
        return {row["reason"]: row["packets"] for row in rows if row["pod"] == f"default/{self.ends[name].pod.name}"}

    def attempt(self, case: str, by: str, reasons: set[str], work: Callable[[], int], *, passes: int = 0) -> None:
        """Carry out `work`, which sends so many packets from a pod. All but `passes` of them must be dropped for one of
        these reasons, and the victim must see no others."""
        before = self.drops(by)
        self.peers["victim"].ask("watch")
        attempts = work()
        token = f"fence-{next(_tokens)}"
        self.peers[by].ask("fence", destination=self.address("victim", 4), token=token)
        packets = self.peers["victim"].ask("seen", token=token)["packets"]
        passed = sum(packets.values())
        dropped = self._dropped_since(by, before, reasons, attempts - passes)
        result = {"attempts": attempts, "passed": passed, "dropped": dropped}
        self.results[case] = result
        said = f"{self.mode}: {case}: {result}"
        need(attempts > 0, f"{said}: nothing was sent")
        need(passed == passes, f"{said}: {passes} should have passed")
        need(sum(dropped.values()) == attempts - passes and set(dropped) <= reasons, f"{said}: wanted {reasons}")

    def _dropped_since(self, name: str, before: dict[str, int], reasons: set[str], wanted: int) -> dict[str, int]:
        """What was dropped since for these reasons, and of other RoCE packets; asked again until so many packets were:
        a device sends them when it has time. What else a pod's stack sends (multicast) is no attempt."""
        deadline = time.monotonic() + COUNTED_TIMEOUT_S
        while True:
            now = self.drops(name)
            found = {reason: count - before.get(reason, 0) for reason, count in now.items()}
            found = {r: count for r, count in found.items() if count and (r in reasons or r.startswith("roce"))}
            if sum(found.values()) >= wanted or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def sent(self, name: str) -> int:
        """Packets that a pod's device has sent."""
        counters = SYSFS / "infiniband" / self.ends[name].device / "ports/1/hw_counters"
        return int((counters / "sent_pkts").read_text())


def _row(host: Host, container_id: str) -> dict[str, Any]:
    (row,) = [r for r in host.api("GET", "/v1/status")["attachments"] if r["container_id"] == container_id]
    return dict(row)


@contextlib.contextmanager
def scene(host: Host, mode: GuardMode, sizes: Sizes) -> Iterator[Scene]:
    """Fresh pods in that mode, with a lease of each transport between friend and victim."""
    with contextlib.ExitStack() as stack:
        names = [f"{name}-{mode}" for name in NAMES]
        attached = stack.enter_context(namespaces.attached(host, names, more={"guard": mode}))
        ends = dict(zip(NAMES, attached, strict=True))
        peers = {}
        for name, end in ends.items():
            argv = [sys.executable, *PROGRAM]
            peers[name] = stack.enter_context(Peer.start(f"{end.pod.name}", end.pod.popen, argv, cwd=str(REPOSITORY)))
            peers[name].tell("hello", device=end.device, addresses=list(end.addresses.values()))
        for peer in peers.values():
            peer.answer()
        yield Scene(host, mode, sizes, ends, peers)


def by_hand(peer: Peer, do: str, request: dict[str, Any]) -> Callable[[], int]:
    """Work that has a program write packets."""
    return lambda: int(peer.ask(do, **request)["packets"])


def attempts(at: Scene, version: int) -> None:
    """Everything, over one IP version."""
    sizes, enforced = at.sizes, at.mode is GuardMode.ENFORCE
    victim, friend, intruder = (at.address(name, version) for name in NAMES)
    by_intruder = {"source": intruder, "destination": victim}
    by_friend = {"source": friend, "destination": victim}
    leased = [at.leased["rc"], at.leased["ud"]]

    def packets(name: str, **request: Any) -> Callable[[], int]:
        return by_hand(at.peers[name], "packets", request)

    def real(do: str, **request: Any) -> Callable[[], int]:
        def send() -> int:
            before = at.sent("intruder")
            at.peers["intruder"].ask(do, **request)
            return at.sent("intruder") - before

        return send

    def case(name: str, by: str, reasons: set[str], work: Callable[[], int], *, passes: int = 0) -> None:
        at.attempt(f"{name}, IPv{version}", by, reasons, work, passes=passes)

    if enforced:
        to_rc = {**by_intruder, "qpn": at.unleased["rc"]}
        case("unleased RC queue pair", "intruder", {"roce_unleased"}, real("connect_unleased", **to_rc))
        to_ud = {"destination": victim, "qpn": at.unleased["ud"], "qkey": at.unleased["qkey"], "count": sizes.real}
        case("unleased UD queue pair", "intruder", {"roce_unleased"}, real("send_unleased", **to_ud))
    to_leased = {"destination": victim, "qpn": at.leased["ud"], "qkey": at.leased["qkey"], "count": sizes.real}
    case(
        "UD queue pair without a lease with this one", "intruder", {"roce_not_peer"}, real("send_unleased", **to_leased)
    )

    macs = {"mac": at.mac("intruder"), "gateway_mac": GATEWAY_MAC}
    for name, qpn, source_qpns in (("RC", at.leased["rc"], None), ("UD", at.leased["ud"], [at.friends["ud"], 1])):
        forged = {**macs, **by_friend, "qpns": [qpn, 1], "source_qpns": source_qpns, "count": sizes.repeats}
        work = by_hand(at.peers["intruder"], "frames", forged)
        case(f"forged source, {name}", "intruder", {"spoofed_address"}, work)

    guesses = [FIRST_QPN, sizes.guesses]
    known = sum(FIRST_QPN <= qpn < sum(guesses) for qpn in leased)
    need(known == len(leased), f"queue pairs {leased} are not among the guessed ones")
    for name, source_qpns in (("RC", None), ("UD", [at.friends["ud"], 1])):
        reasons = {"roce_unleased", "roce_not_peer"} if enforced else {"roce_not_peer"}
        work = packets("intruder", **by_intruder, qpns=guesses, source_qpns=source_qpns)
        passes = 0 if enforced else sizes.guesses - known
        case(f"guessed QPN, {name}", "intruder", reasons, work, passes=passes)

    # A peer's own pod: another of its queue pairs, and one of another kind.
    below, above = [2, at.friends["ud"] - 2], [at.friends["ud"] + 1, sizes.guesses]
    for name, source_qpns in (("below the peer's", below), ("above the peer's", above)):
        work = packets("friend", **by_friend, qpns=[at.leased["ud"], 1], source_qpns=source_qpns)
        case(f"wrong source QPN, {name}", "friend", {"roce_not_peer"}, work)
    for name, qpn, source_qpns in (
        ("RC to UD", at.leased["ud"], None),
        ("UD to RC", at.leased["rc"], [at.friends["rc"], 1]),
    ):
        work = packets("friend", **by_friend, qpns=[qpn, 1], source_qpns=source_qpns, count=sizes.repeats)
        case(f"wrong transport, {name}", "friend", {"roce_not_peer"}, work)

    for name, qpn, source_qpns in (("RC", at.leased["rc"], None), ("UD", at.leased["ud"], [at.friends["ud"], 1])):
        work = packets("friend", **by_friend, qpns=[qpn, 1], source_qpns=source_qpns, count=sizes.repeats)
        case(f"{LEASED}, {name}", "friend", set(), work, passes=sizes.repeats)


def revoked(at: Scene, version: int) -> None:
    """The friend gives its leases back; the victim's queue pairs are still there."""
    at.peers["friend"].ask("release")
    deadline = time.monotonic() + COUNTED_TIMEOUT_S
    while at.host.api("GET", "/v1/status")["leases"]:
        need(time.monotonic() < deadline, "the leases do not end")
        time.sleep(0.1)
    addresses = {"source": at.address("friend", version), "destination": at.address("victim", version)}
    for name, qpn, source_qpns in (("RC", at.leased["rc"], None), ("UD", at.leased["ud"], [at.friends["ud"], 1])):
        request = {**addresses, "qpns": [qpn, 1], "source_qpns": source_qpns, "count": at.sizes.repeats}
        case = f"revoked lease, {name}, IPv{version}"
        at.attempt(case, "friend", {"roce_revoked"}, by_hand(at.peers["friend"], "packets", request))


def all_attempts(
    host: Host, sizes: Sizes, modes: Sequence[GuardMode] = tuple(GuardMode)
) -> dict[str, dict[str, dict[str, Any]]]:
    """By mode and case: attempts, passed, dropped by reason. StepError when one of them is not as it should be."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for mode in modes:
        with scene(host, mode, sizes) as at:
            for version in (4, 6):
                if not at.unleased:
                    at.unleased = at.peers["victim"].ask("serve")["unleased"]
                target = at.ends["victim"].pod.name
                at.friends = at.peers["friend"].ask("lease", target=target, source=at.address("friend", version))
                at.leased = at.peers["victim"].ask("leased")
                attempts(at, version)
                revoked(at, version)
            results[str(mode)] = at.results
    return results


def measure() -> Figure:
    """At full size."""
    with namespaces.agent_host("guard") as host:
        results = all_attempts(host, Sizes())
    tried, passed, reasons = 0, dict.fromkeys(results, 0), Counter[str]()
    for mode, cases in results.items():
        for name, result in cases.items():
            if not name.startswith(LEASED):
                tried += result["attempts"]
                passed[mode] += result["passed"]
                reasons.update(result["dropped"])
    listed = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    detail = (
        f"{tried} packets tried; enforce: {passed[GuardMode.ENFORCE]} passed; observe: {passed[GuardMode.OBSERVE]} "
        f"passed, to queue pairs without a lease; dropped: {listed}"
    )
    return Figure(tried, "attempts", detail, results)
