"""rdmanet.reconcile: what is named broken, what is done about it, and when it is left alone."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable
from typing import Any

import pytest

from rdmanet import steps
from rdmanet.datapath.layout import NodeEntry, UplinkEntry
from rdmanet.model import (
    GATEWAY_MAC,
    Attachment,
    AttachmentState,
    Backend,
    Bandwidth,
    Device,
    Limit,
    NetnsId,
    PodName,
    RdmaMode,
)
from rdmanet.node import NodeNetwork
from rdmanet.policy.values import PodPolicy
from rdmanet.rdma.backend import Condition
from rdmanet.reconcile import (
    MOST_BREAKS,
    NODE,
    WINDOW_S,
    Broken,
    Kind,
    NodeFacts,
    Outcome,
    PodSeen,
    PodWanted,
    Record,
    broken_node,
    broken_pod,
    plan,
)

NETWORK = NodeNetwork(
    ipv4_range=ipaddress.IPv4Network("10.213.0.0/20"),
    ipv6_range=ipaddress.IPv6Network("fd72:646d:616e::/64"),
    mtu_bytes=9000,
    outside_mtu_bytes=1500,
    host_ifindex=3,
    peer_ifindex=4,
)
ATTACHMENT = Attachment(
    id=7,
    container_id="c7",
    ifname="eth0",
    network="net",
    netns="/run/netns/seven",
    netns_id=NetnsId(4, 7),
    pod=PodName("jobs", "train-0"),
    state=AttachmentState.READY,
    mac="02:72:00:00:00:07",
    mtu_bytes=9000,
    ipv4=ipaddress.IPv4Address("10.213.0.7"),
    ipv6=ipaddress.IPv6Address("fd72:646d:616e::7"),
    wants_rdma=True,
    device=Device("rxe_rn7", Backend.RXE, RdmaMode.SHARED, 5, "uverbs0", 231, 192),
)
OWN, ENDPOINT = steps.entries(ATTACHMENT, 12, PodPolicy(1, 0, 0))
WAYS = steps.ways(NETWORK, ATTACHMENT)
WANTED = PodWanted(ATTACHMENT, WAYS, 42, OWN, ENDPOINT)
assert ATTACHMENT.device is not None
WHOLE = PodSeen(
    namespace=True,
    pod_end=True,
    pod_end_up=True,
    addresses=frozenset(ATTACHMENT.addresses),
    neighbours=frozenset((way.gateway, GATEWAY_MAC) for way in WAYS),
    routes=frozenset((to, way.gateway) for way in WAYS for to in way.routes),
    host_end=True,
    host_end_up=True,
    program_ids=(42,),
    condition=Condition(ATTACHMENT.device, None, port_active=True),
    own=OWN,
    endpoints=dict.fromkeys(ATTACHMENT.addresses, ENDPOINT),
)


def broken(**changes: Any) -> list[Broken]:
    return list(broken_pod(WANTED, dataclasses.replace(WHOLE, **changes), GATEWAY_MAC))


def sick(**words: Any) -> Condition:
    assert ATTACHMENT.device is not None
    return Condition(ATTACHMENT.device, "its RDMA device rxe_rn7 is missing", **words)


def without(version: int) -> dict[str, Any]:
    """What the kernel leaves after the last address of a family has gone."""
    return {
        "addresses": frozenset(one for one in WHOLE.addresses if one.version != version),
        "neighbours": frozenset(one for one in WHOLE.neighbours if one[0].version != version),
        "routes": frozenset(one for one in WHOLE.routes if one[0].version != version),
    }


def test_nothing_is_wrong_with_what_is_whole() -> None:
    assert broken() == []
    foreign = (ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_address("192.0.2.1"))
    assert broken(routes=WHOLE.routes | {foreign}) == [], "a later plugin may add what it likes"


def test_a_default_route_may_lead_through_another_gateway_of_the_link() -> None:
    """sbr's lead through the one that the result names, in a table of its own."""
    other = {4: ipaddress.ip_address("10.213.0.9"), 6: ipaddress.ip_address("fd72:646d:616e::1")}
    moved = frozenset((to, gateway if to.prefixlen else other[to.version]) for to, gateway in WHOLE.routes)
    assert moved != WHOLE.routes
    assert broken(routes=moved) == []


@pytest.mark.parametrize(
    ("changes", "sentences", "steps_again"),
    [
        ({"namespace": False}, ["its network namespace /run/netns/seven is gone"], set()),
        (
            {"pod_end": False, "host_end": False},
            ["the interface eth0 is missing from the pod"],
            {"link", "filter", "addresses", "endpoint"},
        ),
        ({"host_end": False}, ["the host's end rn-7 is missing"], {"link", "filter", "addresses", "endpoint"}),
        ({"pod_end_up": False, **without(4)}, ["the interface eth0 is down"], {"filter", "addresses"}),
        (
            {"bandwidth": Bandwidth(egress=Limit(1000, 2**17))},
            ["its bandwidth's limits in the datapath are missing or wrong"],
            {"endpoint"},
        ),
        ({"host_end_up": False}, ["the host's end rn-7 is down"], {"filter", "addresses"}),
        (without(4), ["the address 10.213.0.7 is missing from eth0"], {"addresses"}),
        (without(6), ["the address fd72:646d:616e::7 is missing from eth0"], {"addresses"}),
        (
            {"neighbours": frozenset()},
            ["the neighbour 10.213.0.1 is missing from eth0", "the neighbour fe80::1 is missing from eth0"],
            {"addresses"},
        ),
        (
            {"routes": frozenset(one for one in WHOLE.routes if one[0].prefixlen)},
            ["the default route for IPv4 is missing", "the default route for IPv6 is missing"],
            {"addresses"},
        ),
        (
            {"routes": frozenset(one for one in WHOLE.routes if not one[0].prefixlen)},
            [
                "the route to 10.213.0.0/20 for IPv4 is missing",
                "the route to fd72:646d:616e::/64 for IPv6 is missing",
            ],
            {"addresses"},
        ),
        ({"program_ids": ()}, ["the filter on rn-7 is missing"], {"filter"}),
        ({"program_ids": (43,)}, ["the filter on rn-7 is missing"], {"filter"}),
        ({"condition": sick(gone=True)}, ["its RDMA device rxe_rn7 is missing"], {"device", "slot"}),
        ({"own": None}, ["its entry in the datapath is missing or wrong"], {"endpoint"}),
        (
            {"endpoints": dict.fromkeys(ATTACHMENT.addresses)},
            [
                "the endpoint 10.213.0.7 is missing from the datapath",
                "the endpoint fd72:646d:616e::7 is missing from the datapath",
            ],
            {"endpoint"},
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_causes_are_named_and_the_steps_that_help(
    changes: dict[str, Any], sentences: list[str], steps_again: set[str]
) -> None:
    found = broken(**changes)
    assert [one.sentence for one in found] == sentences
    assert all(one.repairable for one in found)
    assert plan(found) == steps_again
    assert plan(found) <= {step.name for step in steps.STEPS}


def test_several_things_at_once() -> None:
    found = broken(**without(6), program_ids=(), own=None)
    assert [one.kind for one in found] == [Kind.ADDRESS, Kind.FILTER, Kind.ENTRY]
    assert plan(found) == {"addresses", "filter", "endpoint"}


def test_where_the_folder_of_namespaces_is_gone_nobody_can_say() -> None:
    (found,) = broken(namespace=False, folder=False)
    assert (found.kind, found.repairable) == (Kind.NAMESPACE, False)


def test_a_device_that_is_leaving_is_waited_for_and_one_of_the_hosts_is_the_hosts() -> None:
    (leaving,) = broken(condition=sick(leaving=True))
    assert (leaving.repairable, leaving.waits) == (False, True)
    assert ATTACHMENT.device is not None
    shared = dataclasses.replace(ATTACHMENT.device, backend=Backend.SHARED)
    (theirs,) = broken(condition=Condition(shared, "its RDMA device mlx5_0 is missing", gone=True))
    assert (theirs.repairable, theirs.waits) == (False, False)


# The node

UPLINK = UplinkEntry(ipv4=bytes(16), ipv6=bytes(16))
NODE_WANTED = NodeFacts(
    links_up={"rdmanet0": True, "rdmanet1": True},
    addresses=frozenset({ipaddress.ip_address("10.213.0.1"), ipaddress.ip_address("fd72:646d:616e::1")}),
    routes=frozenset(NETWORK.ranges),
    forwarding={"ipv4": True, "ipv6": True},
    filters={"rdmanet1": 50, "uplink0": 51},
    uplinks={2: UPLINK},
    node=NodeEntry(gateway_mac=bytes(6), host_ifindex=3),
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"links_up": {}, "addresses": frozenset(), "filters": {}}, [(Kind.LINK, "the link rdmanet0 is missing")]),
        (
            {"links_up": {"rdmanet0": True, "rdmanet1": False}},
            [(Kind.INTERFACE, "the link rdmanet1 is down")],
        ),
        (
            {"addresses": frozenset()},
            [
                (Kind.ADDRESS, "the address 10.213.0.1 is missing from rdmanet0"),
                (Kind.ADDRESS, "the address fd72:646d:616e::1 is missing from rdmanet0"),
            ],
        ),
        (
            {"routes": frozenset({NETWORK.ipv4_range})},
            [(Kind.ROUTE, "the route to fd72:646d:616e::/64 through rdmanet0 is missing")],
        ),
        ({"forwarding": {"ipv4": True, "ipv6": False}}, [(Kind.FORWARDING, "rdmanet0 does not forward ipv6")]),
        ({"filters": {"rdmanet1": 50, "uplink0": None}}, [(Kind.FILTER, "the filter on uplink0 is missing")]),
        ({"uplinks": {}}, [(Kind.UPLINK, "the host's uplinks or their addresses have changed")]),
        ({"node": None}, [(Kind.ENTRY, "the node's entry in the datapath is missing or wrong")]),
        ({"missing_pins": frozenset({"flows"})}, [(Kind.PIN, "the pin flows is missing")]),
        (
            {"missing_pins": frozenset("abcde")},
            [(Kind.PIN, "the pins a, b, c and 2 more are missing")],
        ),
        ({"empty_slots": frozenset({"pod"})}, [(Kind.PROGRAM, "the pod program does not run")]),
    ],
)
def test_what_of_the_node_is_broken(changes: dict[str, Any], expected: list[tuple[Kind, str]]) -> None:
    found = broken_node(NODE_WANTED, dataclasses.replace(NODE_WANTED, **changes))
    assert [(one.kind, one.sentence) for one in found] == expected


# How often


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


LINK = Broken(Kind.LINK, "the interface eth0 is missing from the pod")
ROUTE = Broken(Kind.ROUTE, "the default route for IPv4 is missing")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def record(clock: Clock) -> Record:
    return Record(clock)


def shown(record: Record, part: str) -> list[Any]:
    found = record.document()[part]
    assert isinstance(found, list)
    return found


def break_it(record: Record, times: int, place: int = 7, what: Broken = LINK) -> list[bool]:
    """Breaks and repairs it so often; for each whether it was to be repaired."""
    asked = []
    for _ in range(times):
        wanted = record.broke(place, "jobs/train-0 eth0", [what])
        asked.append(bool(wanted))
        if wanted:
            record.ended(place, "jobs/train-0 eth0", wanted, Outcome.REPAIRED, 0.25)
            record.found(place, "jobs/train-0 eth0", [])
    return asked


def test_the_fifth_break_is_left_alone(record: Record) -> None:
    assert break_it(record, MOST_BREAKS + 2) == [True] * (MOST_BREAKS - 1) + [False] * 3
    (given_up,) = shown(record, "given_up")
    assert given_up["what"] == "jobs/train-0 eth0"
    assert given_up["sentence"] == (
        "the interface eth0 is missing from the pod; it has broken 5 times within 10 minutes"
    )
    assert record.repairs() == {("link", "repaired"): 4, ("link", "given_up"): 1}
    assert shown(record, "broken") == [], "what is given up is shown once"


def test_kinds_and_places_are_counted_apart(record: Record) -> None:
    break_it(record, MOST_BREAKS)
    assert break_it(record, 1, what=ROUTE) == [True]
    assert break_it(record, 1, place=8) == [True]
    assert record.broke(7, "jobs/train-0 eth0", [LINK, ROUTE]) == [ROUTE]
    assert record.given_up() == {(7, Kind.LINK)}


def test_within_the_window_alone(record: Record, clock: Clock) -> None:
    assert break_it(record, MOST_BREAKS - 1) == [True] * 4
    clock.now += WINDOW_S + 1
    assert break_it(record, MOST_BREAKS - 1) == [True] * 4
    assert record.times(7, Kind.LINK) == 4
    assert record.given_up() == set()
    clock.now += WINDOW_S / 2
    assert break_it(record, 1) == [False]


def test_given_up_stays_until_somebody_asks(record: Record, clock: Clock) -> None:
    break_it(record, MOST_BREAKS)
    clock.now += 10 * WINDOW_S
    assert break_it(record, 1) == [False]
    assert record.forget(7)
    assert not record.forget(7)
    assert shown(record, "given_up") == []
    assert break_it(record, MOST_BREAKS) == [True] * 4 + [False]


def test_uplinks_are_followed_however_often_they_change(record: Record) -> None:
    changed = Broken(Kind.UPLINK, "the host's uplinks or their addresses have changed")
    assert break_it(record, 3 * MOST_BREAKS, NODE, changed) == [True] * 15
    assert record.given_up() == set()


def test_what_cannot_be_repaired_is_shown_and_not_counted(record: Record) -> None:
    waits = Broken(Kind.DEVICE, "its RDMA device rxe_rn7 is missing", repairable=False, waits=True)
    for _ in range(2 * MOST_BREAKS):
        assert record.broke(7, "jobs/train-0 eth0", [waits]) == []
    assert record.given_up() == set()
    assert [row["sentence"] for row in shown(record, "broken")] == ["its RDMA device rxe_rn7 is missing"]
    assert record.left([7]) == shown(record, "broken")
    assert record.left([8]) == []
    record.found(7, "jobs/train-0 eth0", [])
    assert shown(record, "broken") == []


def test_what_was_done_is_told_newest_first_and_not_kept_for_ever(record: Record, clock: Clock) -> None:
    for place in range(200):
        break_it(record, 1, place)
        clock.now += 1
    done = shown(record, "done")
    assert len(done) == 64
    assert [done[0]["ago_s"], done[1]["ago_s"]] == [1, 2]
    assert done[0] == {
        "number": 200,
        "what": "jobs/train-0 eth0",
        "kind": "link",
        "sentence": "the interface eth0 is missing from the pod",
        "outcome": "repaired",
        "ago_s": 1,
        "took_s": 0.25,
    }
    for place in range(200):
        record.forget(place)
    assert record._breaks == {}
    assert record._open == {}


def test_labels_of_metrics_are_few(record: Record) -> None:
    every: list[Callable[[], object]] = []
    for place, kind in enumerate(Kind):
        every.append(lambda place=place, kind=kind: break_it(record, 9, place, Broken(kind, "it is gone")))  # type: ignore[misc]
    for one in every:
        one()
    assert len(record.repairs()) <= len(Kind) * len(Outcome)
