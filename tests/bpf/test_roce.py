"""Which RoCE packets pass, for which lease and mode, and that none hides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from rdmanet.model import DatagramEntry, GuardEntry, GuardState, address_key
from testbed.bpf import packets
from testbed.bpf.bench import REDIRECT, SHOT, Bench, Outcome, between, host_frame, pod_frame, rewritten, to
from testbed.bpf.lab import FAR, GATEWAYS, Pod
from testbed.bpf.packets import UDP, Ip

VERSIONS = (4, 6)


def _grant(bench: Bench, owner: Pod, qpn: int, peer: Pod, version: int, state: GuardState = GuardState.GRANTED) -> None:
    entry = GuardEntry(lease=1, peer_address=address_key(peer.addresses[version]), peer_qpn=18, state=state)
    bench.datapath.set_guard(address_key(owner.addresses[version]), qpn, entry)


@dataclass(frozen=True)
class RoceCase:
    """A RoCE packet from one pod to another (or to an address), with or without a guard entry for its QPN 17."""

    name: str
    source: str
    destination: str
    reason: str | None
    guard: tuple[str, GuardState] | None = None  # (peer, state)
    qpn: int = 17


ROCE = [
    RoceCase("unleased, observed", "train_0", "train_1", None),
    RoceCase("connection management, observed", "train_0", "train_1", None, qpn=1),
    RoceCase("multicast QPN, observed", "train_0", "train_1", None, qpn=0xFFFFFF),
    RoceCase("leased", "train_0", "train_1", None, ("train_0", GuardState.GRANTED)),
    RoceCase("leased, enforced", "train_0", "strict", None, ("train_0", GuardState.GRANTED)),
    RoceCase("leased, from an enforcing pod", "strict", "train_1", None, ("strict", GuardState.GRANTED)),
    RoceCase("from a pod without device", "web", "train_1", "roce_no_device"),
    RoceCase("to a pod without device", "train_0", "web", "roce_no_device"),
    RoceCase("leased to another", "train_0", "train_1", "roce_not_peer", ("strict", GuardState.GRANTED)),
    RoceCase("revoked", "train_0", "train_1", "roce_revoked", ("train_0", GuardState.REVOKED)),
    RoceCase("revoked, another", "strict", "train_1", "roce_revoked", ("train_0", GuardState.REVOKED)),
    RoceCase("unleased, enforced", "train_0", "strict", "roce_unleased"),
    RoceCase("connection management, enforced", "train_0", "strict", "roce_unleased", qpn=1),
    RoceCase("multicast QPN, enforced", "train_0", "strict", "roce_unleased", qpn=0xFFFFFF),
    RoceCase("unleased, from an enforcing pod", "strict", "train_1", "roce_unleased"),
    RoceCase("to the host, without device", "web", "host", "roce_no_device"),
    RoceCase("to the host, observed", "train_0", "host", None),
    RoceCase("to the host, from an enforcing pod", "strict", "host", "roce_unleased"),
    RoceCase("to outside", "train_0", "outside", "roce_nat"),
    RoceCase("to outside, without device", "web", "outside", "roce_no_device"),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", ROCE, ids=lambda case: case.name)
def test_roce_from_a_pod(bench: Bench, case: RoceCase, version: int) -> None:
    source: Pod = getattr(bench, case.source)
    named: dict[str, str] = {"host": GATEWAYS[version], "outside": FAR[version]}
    target: Pod | None = None if case.destination in named else getattr(bench, case.destination)
    address = named[case.destination] if target is None else target.addresses[version]
    if case.guard is not None:
        assert target is not None
        _grant(bench, target, 17, getattr(bench, case.guard[0]), version, case.guard[1])
    frame = pod_frame(source, to(source, address, version, UDP, packets.roce(case.qpn)))
    outcome = bench.from_pod(source, frame)
    guards = list(bench.datapath.guards().values())
    if case.reason is not None:
        assert outcome.drops == {(source.id, case.reason): 1}
        assert outcome.verdict == SHOT
        assert [entry.packets for entry in guards] == [0] * len(guards)
        return
    assert (outcome.verdict, outcome.drops) == (REDIRECT, {})
    expected = {(source.id, "from_pod", "roce"): 1}
    if target is not None:
        expected[target.id, "to_pod", "roce"] = 1
        assert outcome.frame == rewritten(frame, target.mac)
    assert outcome.counters == expected
    assert [(entry.packets, entry.bytes) for entry in guards] == [(1, len(frame))] * len(guards)


@dataclass(frozen=True)
class DatagramCase:
    """From train_0's UD queue pair 20 to QPN 17 of train_1, which has leases with some (pod, QPN)."""

    name: str
    reason: str | None
    peers: tuple[tuple[str, int], ...] = ()
    own: GuardState | None = GuardState.DATAGRAM
    payload: bytes = packets.datagram(17, 20)
    source: str = "train_0"
    destination: str = "train_1"


OURS, OTHERS = ("train_0", 20), ("strict", 20)
DATAGRAMS = [
    DatagramCase("leased", None, (OURS,)),
    DatagramCase("with immediate data", None, (OURS,), payload=packets.datagram(17, 20, opcode=0x65)),
    DatagramCase("one of many peers", None, (OTHERS, OURS, ("train_0", 21))),
    DatagramCase(
        "upper byte of the source's word is reserved", None, (OURS,), payload=packets.datagram(17, 20 | 7 << 24)
    ),
    DatagramCase("leased, enforced", None, (OURS,), destination="strict"),
    DatagramCase("from an enforcing pod", None, (OTHERS,), source="strict"),
    DatagramCase("unleased, observed", None, own=None),
    DatagramCase("unleased, enforced", "roce_unleased", own=None, destination="strict"),
    DatagramCase("no peer at all", "roce_not_peer"),
    DatagramCase("other peers", "roce_not_peer", (OTHERS, ("train_0", 21))),
    DatagramCase("another queue pair of a peer's pod", "roce_not_peer", (("train_0", 21),)),
    DatagramCase("a peer's number in another pod", "roce_not_peer", (OURS,), source="strict"),
    DatagramCase("revoked", "roce_revoked", (OURS,), own=GuardState.REVOKED),
    DatagramCase("of a connected queue pair", "roce_not_peer", (OURS,), payload=packets.roce(17)),
    DatagramCase("to a connected queue pair", "roce_not_peer", own=GuardState.GRANTED),
    DatagramCase("from a pod without device", "roce_no_device", (("web", 20),), source="web"),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", DATAGRAMS, ids=lambda case: case.name)
def test_datagrams(bench: Bench, case: DatagramCase, version: int) -> None:
    source, target = getattr(bench, case.source), getattr(bench, case.destination)
    own = (address_key(target.addresses[version]), 17)
    if case.own is not None:
        bench.datapath.set_guard(*own, GuardEntry(0, address_key(source.addresses[version]), 20, case.own))
    ends = [(address_key(getattr(bench, pod).addresses[version]), qpn) for pod, qpn in case.peers]
    bench.datapath.set_datagrams([((own, end), DatagramEntry(5)) for end in ends])
    frame = pod_frame(source, between(source, target, version, UDP, case.payload))
    outcome = bench.from_pod(source, frame)
    counted = {key: (entry.packets, entry.bytes) for key, entry in bench.datapath.datagrams().items()}
    if case.reason is not None:
        assert (outcome.verdict, outcome.drops) == (SHOT, {(source.id, case.reason): 1})
        assert set(counted.values()) <= {(0, 0)}
        return
    assert (outcome.verdict, outcome.drops) == (REDIRECT, {})
    assert outcome.counters == {(source.id, "from_pod", "roce"): 1, (target.id, "to_pod", "roce"): 1}
    peer = (address_key(source.addresses[version]), 20)
    expected = {(own, end): (1, len(frame)) if end == peer else (0, 0) for end in ends}
    assert counted == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_datagrams_from_the_host(bench: Bench, version: int) -> None:
    own = (address_key(bench.train_0.addresses[version]), 17)
    bench.datapath.set_guard(*own, GuardEntry(0, bytes(16), 0, GuardState.DATAGRAM))
    frame = host_frame(Ip(GATEWAYS[version], bench.train_0.addresses[version], UDP, packets.datagram(17, 20)))
    assert bench.from_host(frame).drops == {(bench.train_0.id, "roce_not_peer"): 1}
    bench.datapath.set_datagrams([((own, (address_key(GATEWAYS[version]), 20)), DatagramEntry(5))])
    assert bench.from_host(frame).verdict == REDIRECT


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [20, 24, 27])
def test_datagram_too_short_to_judge_is_malformed(bench: Bench, version: int, size: int) -> None:
    """UDP and base transport header, and too little of the datagram header."""
    frame = pod_frame(
        bench.train_0, between(bench.train_0, bench.train_1, version, UDP, packets.datagram(17, 20)[:size])
    )
    assert bench.from_pod(bench.train_0, frame).drops == {(bench.train_0.id, "malformed"): 1}


@pytest.mark.parametrize("version", VERSIONS)
def test_roce_from_the_host(bench: Bench, version: int) -> None:
    def send(pod: Pod) -> Outcome:
        return bench.from_host(host_frame(Ip(GATEWAYS[version], pod.addresses[version], UDP, packets.roce(17))))

    assert send(bench.web).drops == {(bench.web.id, "roce_no_device"): 1}
    assert send(bench.strict).drops == {(bench.strict.id, "roce_unleased"): 1}
    passed = send(bench.train_0)
    assert (passed.verdict, passed.counters) == (REDIRECT, {(bench.train_0.id, "to_pod", "roce"): 1})
    _grant(bench, bench.train_0, 17, bench.train_1, version)
    assert send(bench.train_0).drops == {(bench.train_0.id, "roce_not_peer"): 1}


def _ipv4_options(pod: Pod, to: str) -> Ip:
    return Ip(pod.addresses[4], to, UDP, packets.roce(17), options=b"\x01" * 40)


def _hop_by_hop(pod: Pod, to: str) -> Ip:
    options = packets.extension(packets.DESTINATION, packets.HOP_BY_HOP) + packets.extension(UDP)
    return Ip(pod.addresses[6], to, UDP, packets.roce(17), options=options, first=packets.HOP_BY_HOP)


def _first_ipv4(pod: Pod, to: str) -> Ip:
    return Ip(pod.addresses[4], to, UDP, packets.roce(17), more=True)


def _first_ipv6(pod: Pod, to: str) -> Ip:
    header = packets.extension(UDP, packets.FRAGMENT, more=True)
    return Ip(pod.addresses[6], to, UDP, packets.roce(17), options=header, first=packets.FRAGMENT)


@pytest.mark.parametrize(
    ("version", "hidden"), [(4, _ipv4_options), (6, _hop_by_hop), (4, _first_ipv4), (6, _first_ipv6)]
)
def test_roce_is_found_behind(bench: Bench, version: int, hidden: Callable[[Pod, str], Ip]) -> None:
    outcome = bench.from_pod(bench.web, pod_frame(bench.web, hidden(bench.web, bench.train_0.addresses[version])))
    assert outcome.drops == {(bench.web.id, "roce_no_device"): 1}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", range(8, 20))
def test_roce_too_short_to_judge_is_malformed(bench: Bench, version: int, size: int) -> None:
    """The rest of the packet could follow in a second fragment that nobody could judge."""
    payload = packets.roce(17)[:size]
    frame = pod_frame(bench.train_0, between(bench.train_0, bench.train_1, version, UDP, payload))
    assert bench.from_pod(bench.train_0, frame).drops == {(bench.train_0.id, "malformed"): 1}
