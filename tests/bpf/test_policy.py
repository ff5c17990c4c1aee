"""Who may begin a flow to whom, by entries as rdmanet.policy compiles them; and what a change does to flows."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace

import pytest

from rdmanet.datapath.policy import PolicyEntry
from rdmanet.model import GuardEntry, GuardState, address_key
from testbed.bpf import packets
from testbed.bpf.bench import REDIRECT, SHOT, Bench, Outcome, between, host_frame, pod_frame, to
from testbed.bpf.lab import FAR, GATEWAYS, OUTSIDE, UPLINK, Pod
from testbed.bpf.packets import ACK, SYN, TCP, UDP, Ip
from tests.bpf.flows import entries
from tests.bpf.test_tracking import KINDS, error, passed, quote, send

VERSIONS = (4, 6)
A, B, OTHER = 101, 102, 103  # identities of train_0, web and train_1
EGRESS, INGRESS = 11, 12  # sets
ANY = 0
NEAR, FARTHER = 0x80000001, 0x80000002  # classes of prefixes, as peers
PEER, PROTOCOL, PORT = 64, 80, 96  # bits of an entry's key that count
FAR_PREFIX = {4: ("203.0.113.0/24", "203.0.113.1/32"), 6: ("2001:db8:200::/48", "2001:db8:200::1/128")}

#: What anybody may do with a peer, a protocol of it, ports.
ALL: dict[int, PolicyEntry] = {number: (number, ANY, PEER, 0, 0) for number in (EGRESS, INGRESS)}


def allow(bench: Bench, *allowed: PolicyEntry) -> None:
    bench.datapath.policy.allow(allowed)


def forbid(bench: Bench, *forbidden: PolicyEntry) -> None:
    bench.datapath.policy.forbid(forbidden)


def prefix(text: str) -> tuple[int, bytes]:
    network = ipaddress.ip_network(text)
    return network.prefixlen + (96 if network.version == 4 else 0), address_key(network.network_address)


def changed(bench: Bench) -> None:
    """As the agent does after every change."""
    bench.datapath.change_node(lambda node: replace(node, epoch=node.epoch + 1))


@pytest.fixture
def selected(bench: Bench) -> Bench:
    """train_0's egress and web's ingress are selected, and nothing is allowed; train_1 is not selected."""
    for pod, identity in ((bench.train_0, A), (bench.web, B), (bench.train_1, OTHER)):
        select(bench, pod, identity)
    select(bench, bench.train_0, A, egress=EGRESS)
    select(bench, bench.web, B, ingress=INGRESS)
    return bench


def select(bench: Bench, pod: Pod, identity: int, *, ingress: int = 0, egress: int = 0) -> None:
    datapath = bench.datapath
    datapath.set_attachment(
        pod.ifindex,
        replace(datapath.attachments()[pod.ifindex], identity=identity, ingress_set=ingress, egress_set=egress),
    )
    for address in pod.addresses.values():
        key = address_key(address)
        entry = datapath.endpoints()[key]
        datapath.set_endpoint(key, replace(entry, identity=identity, ingress_set=ingress, egress_set=egress))


@dataclass(frozen=True)
class Case:
    """TCP from train_0 to web's port 80 (or another protocol or port)."""

    name: str
    reason: str | None
    allowed: tuple[PolicyEntry, ...] = ()
    port: int = 80
    protocol: int = TCP


TO_B, FROM_A = (EGRESS, B, PEER, 0, 0), (INGRESS, A, PEER, 0, 0)
CASES = [
    Case("selected and nothing allowed", "policy_egress"),
    Case("only egress", "policy_ingress", (TO_B,)),
    Case("only ingress", "policy_egress", (FROM_A,)),
    Case("both by identity", None, (TO_B, FROM_A)),
    Case("both from and to everybody", None, tuple(ALL.values())),
    Case("another identity", "policy_ingress", (TO_B, (INGRESS, OTHER, PEER, 0, 0))),
    Case("the other set's rule", "policy_egress", (FROM_A, (INGRESS, B, PEER, 0, 0))),
    Case("the protocol", None, (TO_B, (INGRESS, A, PROTOCOL, TCP, 0))),
    Case("another protocol", "policy_ingress", (TO_B, (INGRESS, A, PROTOCOL, UDP, 0))),
    Case("the protocol from everybody", None, (TO_B, (INGRESS, ANY, PROTOCOL, TCP, 0))),
    Case("the port", None, (TO_B, (INGRESS, A, PORT, TCP, 80))),
    Case("the port in egress", None, (FROM_A, (EGRESS, B, PORT, TCP, 80))),
    Case("another port", "policy_ingress", (TO_B, (INGRESS, A, PORT, TCP, 81))),
    Case("another port in egress", "policy_egress", (FROM_A, (EGRESS, B, PORT, TCP, 81))),
    Case("the port of another protocol", "policy_ingress", (TO_B, (INGRESS, A, PORT, UDP, 80))),
    Case("not the source's port", "policy_ingress", (TO_B, (INGRESS, A, PORT, TCP, 40000))),
    Case("a range's first", None, (TO_B, (INGRESS, A, 92, TCP, 80))),
    Case("a range's last", None, (TO_B, (INGRESS, A, 92, TCP, 80)), port=95),
    Case("before a range", "policy_ingress", (TO_B, (INGRESS, A, 92, TCP, 80)), port=79),
    Case("behind a range", "policy_ingress", (TO_B, (INGRESS, A, 92, TCP, 80)), port=96),
    Case("UDP", None, (TO_B, (INGRESS, A, PORT, UDP, 80)), protocol=UDP),
    Case("a protocol without ports", None, (TO_B, (INGRESS, A, PROTOCOL, 47, 0)), protocol=47),
    Case("a port where there is none", "policy_ingress", (TO_B, (INGRESS, A, PORT, 47, 80)), protocol=47),
    Case("SCTP's port", None, (TO_B, (INGRESS, A, PORT, 132, 80)), protocol=132),
]


def payload(protocol: int, port: int) -> bytes:
    if protocol == TCP:
        return packets.tcp(40000, port)
    if protocol == UDP:
        return packets.udp(40000, port)
    return (40000).to_bytes(2, "big") + port.to_bytes(2, "big") + bytes(12)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_from_pod_to_pod(selected: Bench, case: Case, version: int) -> None:
    a, b = selected.train_0, selected.web
    allow(selected, *case.allowed)
    outcome = send(selected, a, b, version, case.protocol, payload(case.protocol, case.port))
    if case.reason is None:
        assert (outcome.verdict, outcome.drops) == (REDIRECT, {})
        assert len(entries(selected)) == 1
        return
    # The receiver's policies are its own.
    whose = b if case.reason == "policy_ingress" else a
    assert (outcome.verdict, outcome.drops) == (SHOT, {(whose.id, case.reason): 1})
    assert outcome.counters == {}
    assert entries(selected) == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("block", ["the address", "around it", "an except around it", "beside it"])
def test_blocks_hold_for_pods_addresses(selected: Bench, block: str, version: int) -> None:
    """A class is that of the longest prefix: what an except names is in no rule's entries."""
    a, b = selected.train_0, selected.web
    longest, shorter = a.addresses[version], {4: "10.90.0.0/29", 6: "fd90::/125"}[version]
    maps = selected.datapath.policy
    maps.set_prefixes({prefix(shorter): NEAR & 0xFF, prefix({4: "10.90.0.64/26", 6: "fd90::40/122"}[version]): 9})
    if block in ("the address", "an except around it"):
        maps.set_prefixes({prefix(longest): FARTHER & 0xFF})
    peer = {"the address": FARTHER, "around it": NEAR, "an except around it": NEAR, "beside it": 0x80000009}[block]
    allow(selected, TO_B, (INGRESS, peer, PROTOCOL, TCP, 0))
    outcome = send(selected, a, b, version, *KINDS["tcp"].there[version])
    if block in ("the address", "around it"):
        assert passed(outcome)
    else:
        assert outcome.drops == {(b.id, "policy_ingress"): 1}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_pass_and_questions_do_not(selected: Bench, kind: str, version: int) -> None:
    """web, which may send to nobody, answers; what it begins itself is dropped."""
    a, b = selected.train_1, selected.web
    select(selected, b, B, ingress=INGRESS, egress=EGRESS)
    allow(selected, (INGRESS, OTHER, PEER, 0, 0))
    about = KINDS[kind]
    assert send(selected, b, a, version, *about.back[version]).drops == {(b.id, "policy_egress"): 1}
    assert passed(send(selected, a, b, version, *about.there[version]))
    assert passed(send(selected, b, a, version, *about.back[version]))
    assert send(selected, b, a, version, *KINDS["udp" if kind != "udp" else "tcp"].there[version]).drops == {
        (b.id, "policy_egress"): 1
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_a_syn_against_a_flow_is_a_question(selected: Bench, version: int) -> None:
    a, b = selected.train_1, selected.web
    select(selected, b, B, ingress=INGRESS, egress=EGRESS)
    allow(selected, ALL[INGRESS])
    assert passed(send(selected, a, b, version, TCP, packets.tcp(40000, 80, SYN)))
    assert passed(send(selected, b, a, version, TCP, packets.tcp(80, 40000, SYN | ACK)))
    before = entries(selected)
    assert send(selected, b, a, version, TCP, packets.tcp(80, 40000, SYN)).drops == {(b.id, "policy_egress"): 1}
    assert entries(selected) == before
    assert passed(send(selected, b, a, version, TCP, packets.tcp(80, 40000, ACK)))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taken", [TO_B, FROM_A], ids=["egress", "ingress"])
def test_a_change_bites_with_the_next_packet_of_either_end(
    selected: Bench, taken: PolicyEntry, kind: str, version: int
) -> None:
    a, b, about = selected.train_0, selected.web, KINDS[kind]
    reason, whose = ("policy_egress", a) if taken is TO_B else ("policy_ingress", b)
    allow(selected, TO_B, FROM_A)
    for _ in range(2):
        assert passed(send(selected, a, b, version, *about.there[version]))
        assert passed(send(selected, b, a, version, *about.back[version]))
    before = entries(selected)
    epoch = int(before[0].fields["epoch"])
    forbid(selected, taken)
    # Known flows are judged once for each epoch.
    assert passed(send(selected, a, b, version, *about.there[version]))
    changed(selected)
    for _ in range(2):
        assert send(selected, a, b, version, *about.there[version]).drops == {(whose.id, reason): 1}
        back = send(selected, b, a, version, *about.back[version])
        assert (back.verdict, back.reason) == (SHOT, reason)
    assert [entry.key for entry in entries(selected)] == [entry.key for entry in before]
    allow(selected, taken)
    assert passed(send(selected, b, a, version, *about.back[version]))
    assert passed(send(selected, a, b, version, *about.there[version]))
    (entry,) = entries(selected)
    assert (entry.fields["epoch"], entry.fields["created_ns"]) == (epoch + 1, before[0].fields["created_ns"])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_change_leaves_allowed_flows_alone(selected: Bench, version: int) -> None:
    a, b, about = selected.train_0, selected.web, KINDS["tcp"]
    allow(selected, TO_B, FROM_A)
    assert passed(send(selected, a, b, version, *about.there[version]))
    before = entries(selected)[0]
    allow(selected, *ALL.values())
    changed(selected)
    forbid(selected, TO_B, FROM_A)
    assert passed(send(selected, b, a, version, *about.back[version]))
    (after,) = entries(selected)
    assert int(after.fields["epoch"]) == int(before.fields["epoch"]) + 1
    assert after.fields["created_ns"] == before.fields["created_ns"]


@pytest.mark.parametrize("version", VERSIONS)
def test_errors_about_a_flow_that_policy_took_away_do_not_pass(selected: Bench, version: int) -> None:
    a, b, about = selected.train_0, selected.web, KINDS["udp"]
    allow(selected, TO_B, FROM_A)
    assert passed(send(selected, a, b, version, *about.there[version]))
    quoted = quote(a.addresses[version], b.addresses[version], *about.there[version])
    frame = pod_frame(b, error(version, b.addresses[version], a.addresses[version], quoted))
    assert passed(selected.from_pod(b, frame))
    forbid(selected, FROM_A)
    changed(selected)
    outcome = selected.from_pod(b, frame)
    # It is a's that is refused.
    assert (outcome.verdict, outcome.drops) == (SHOT, {(a.id, "policy_ingress"): 1})


# The host, and outside


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("addresses", [GATEWAYS, UPLINK], ids=["gateway", "uplink"])
def test_the_nodes_own_addresses_are_always_allowed(selected: Bench, addresses: dict[int, str], version: int) -> None:
    web, train = selected.web, selected.train_0
    frame = host_frame(Ip(addresses[version], web.addresses[version], *KINDS["tcp"].there[version]))
    assert passed(selected.from_host(frame))
    assert passed(selected.from_pod(train, pod_frame(train, to(train, addresses[version], version))))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("block", [None, "around", "except", "address"])
def test_others_come_through_the_host_by_their_address(selected: Bench, block: str | None, version: int) -> None:
    """A pod of another host, say: forwarded by this one."""
    web = selected.web
    around, address = FAR_PREFIX[version]
    maps = selected.datapath.policy
    maps.set_prefixes({prefix(around): NEAR & 0xFF})
    if block in ("except", "address"):
        maps.set_prefixes({prefix(address): FARTHER & 0xFF})
    if block:
        allow(selected, (INGRESS, FARTHER if block == "address" else NEAR, PROTOCOL, TCP, 0))
    outcome = selected.from_host(host_frame(Ip(FAR[version], web.addresses[version], *KINDS["tcp"].there[version])))
    if block in ("around", "address"):
        assert passed(outcome)
    else:
        assert (outcome.verdict, outcome.drops) == (SHOT, {(web.id, "policy_ingress"): 1})
    other = host_frame(Ip(OUTSIDE[version], web.addresses[version], *KINDS["tcp"].there[version]))
    assert selected.from_host(other).drops == {(web.id, "policy_ingress"): 1}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_pod_asks_outside_is_judged_by_address(selected: Bench, version: int) -> None:
    train = selected.train_0
    selected.datapath.policy.set_prefixes({prefix(FAR_PREFIX[version][0]): NEAR & 0xFF})

    def ask(address: str) -> Outcome:
        return selected.from_pod(train, pod_frame(train, to(train, address, version)))

    assert ask(FAR[version]).drops == {(train.id, "policy_egress"): 1}
    allow(selected, (EGRESS, NEAR, PORT, TCP, 80))
    changed(selected)
    assert passed(ask(FAR[version]))
    assert ask(OUTSIDE[version]).drops == {(train.id, "policy_egress"): 1}


# RoCE


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("allowed", "leased", "reason"),
    [
        ((), False, "policy_egress"),
        ((), True, None),
        (((EGRESS, OTHER, PORT, UDP, 4791),), False, "policy_ingress"),
        (((EGRESS, OTHER, PORT, UDP, 4791), (INGRESS, A, PORT, UDP, 4791)), False, "policy_egress"),
        (
            (
                (EGRESS, OTHER, PORT, UDP, 4791),
                (INGRESS, A, PORT, UDP, 4791),
                (EGRESS + 10, A, PORT, UDP, 4791),
                (INGRESS + 10, OTHER, PORT, UDP, 4791),
            ),
            False,
            None,
        ),
    ],
    ids=["nothing", "leased", "egress", "one way", "both ways"],
)
def test_unleased_roce_needs_policy_both_ways(
    selected: Bench, allowed: tuple[PolicyEntry, ...], leased: bool, reason: str | None, version: int
) -> None:
    a, b = selected.train_0, selected.train_1
    select(selected, a, A, egress=EGRESS, ingress=INGRESS + 10)
    select(selected, b, OTHER, egress=EGRESS + 10, ingress=INGRESS)
    allow(selected, *allowed)
    if leased:
        entry = GuardEntry(1, address_key(a.addresses[version]), 18, GuardState.GRANTED)
        selected.datapath.set_guard(address_key(b.addresses[version]), 17, entry)
    outcome = selected.from_pod(a, pod_frame(a, between(a, b, version, UDP, packets.roce(17))))
    assert (outcome.verdict, outcome.reason) == (REDIRECT if reason is None else SHOT, reason)
    assert entries(selected) == []
