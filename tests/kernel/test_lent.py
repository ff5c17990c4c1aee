"""Pods' addresses lent to a netdev of the host, against the running kernel: the host's own routes stay as they were."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from rdmanet.errors import NotFoundError
from rdmanet.netlink import events, namespace
from rdmanet.netlink.lent import TABLE, LentAddresses
from testbed.host import diff
from testbed.world import World

T = TypeVar("T")
RANGES = (ipaddress.ip_network("10.213.0.0/20"), ipaddress.ip_network("fd72:646d:616e::/64"))
ADDRESSES = tuple(network[7] for network in RANGES)
OTHERS = tuple(network[8] for network in RANGES)


class Place:
    """A scratch host's namespace with a netdev that may be lent to, and another that leads to the pods."""

    def __init__(self, world: World):
        self.world = world
        world.host.ip(
            "link add nic0 type veth peer name nic1",
            "link add pods0 type veth peer name pods1",
            *(f"link set {name} addrgenmode none" for name in ("nic0", "nic1", "pods0", "pods1")),
            *(f"link set {name} up" for name in ("nic0", "nic1", "pods0", "pods1")),
            "address add 192.0.2.1/24 dev nic0",
            "address add 2001:db8:9::1/64 dev nic0 nodad",
            "address add 10.213.0.1/32 dev pods0",
            "address add fd72:646d:616e::1/128 dev pods0 nodad",
            f"route add {RANGES[0]} dev pods0 src 10.213.0.1",
            f"route add {RANGES[1]} dev pods0 src fd72:646d:616e::1",
        )

    def inside(self, function: Callable[[], T]) -> T:
        """In the host's namespace, where ``LentAddresses`` works."""
        with namespace.opened(f"/proc/{self.world.host.container.pid}/ns/net") as descriptor:
            return namespace.run_inside(descriptor, function)

    def route(self, address: object, *words: str) -> dict[str, Any]:
        done = self.world.host.exec(["ip", "-j", "route", "get", str(address), *words])
        return dict(json.loads(done.stdout)[0])

    def on_nic(self) -> set[str]:
        shown = set(self.world.host.exec(["ip", "address", "show", "dev", "nic0"]).stdout.split())
        return shown & {f"{address}/{address.max_prefixlen}" for address in (*ADDRESSES, *OTHERS)}


@pytest.fixture
def place() -> Iterator[Place]:
    with World.start("lent", outside=False, agent=False) as world:
        yield Place(world)


def test_lent_and_taken_back(place: Place) -> None:
    before = place.world.host.dump()

    def lend() -> None:
        lent = LentAddresses(RANGES)
        lent.lend("nic0", ADDRESSES)
        lent.lend("nic0", OTHERS)
        lent.lend("nic0", ADDRESSES)  # idempotent
        lent.close()

    place.inside(lend)
    assert len(place.on_nic()) == 4
    for address, other, gateway in zip(ADDRESSES, OTHERS, ("10.213.0.1", "fd72:646d:616e::1"), strict=True):
        # The host's way to the pod, and where it sends from.
        usual = place.route(address)
        assert (usual["dev"], usual["prefsrc"]) == ("pods0", gateway)
        # RDMA's, which is bound to the netdev: the device itself.
        bound = place.route(other, "from", str(address), "oif", "nic0")
        assert (bound["type"], bound["dev"]) == ("local", "lo")
    assert place.route("192.0.2.9")["prefsrc"] == "192.0.2.1"
    assert place.route("2001:db8:9::9")["prefsrc"] == "2001:db8:9::1"

    def take_back() -> None:
        lent = LentAddresses(RANGES)
        lent.take_back("nic0", OTHERS)
        lent.take_back("nic0", OTHERS)
        assert len(place.on_nic()) == 2
        lent.undo("nic0")
        lent.undo("nic0")
        lent.close()

    place.inside(take_back)
    assert diff(before, place.world.host.dump()) == []


def test_after_the_netdev_was_down(place: Place) -> None:
    """The kernel then has put the local routes back, and has forgotten IPv6 addresses."""

    def lend() -> None:
        lent = LentAddresses(RANGES)
        lent.lend("nic0", ADDRESSES)
        lent.close()

    place.inside(lend)
    place.world.host.ip("link set nic0 down", "link set nic0 up")
    assert place.route(ADDRESSES[0])["type"] == "local", "this kernel needs no second lending"
    place.inside(lend)
    assert len(place.on_nic()) == 2
    for address in ADDRESSES:
        assert place.route(address)["dev"] == "pods0"
        assert place.route(address, "oif", "nic0")["type"] == "local"


def test_a_netdev_that_is_gone(place: Place) -> None:
    before = place.world.host.dump()

    def lend() -> None:
        lent = LentAddresses(RANGES)
        lent.lend("nic0", ADDRESSES)
        place.world.host.ip("link delete nic0")
        lent.take_back("nic0", ADDRESSES)
        lent.undo("nic0")
        with pytest.raises(NotFoundError, match="no netdev nic0"):
            lent.lend("nic0", ADDRESSES)
        lent.close()

    place.inside(lend)
    changed = diff(before, place.world.host.dump())
    assert not [line for line in changed if str(TABLE) in line or "10.213.0.7" in line]
    assert not [line for line in changed if line.startswith("rules")]


def test_what_is_announced_of_it(place: Place) -> None:
    source = place.inside(lambda: events.link_source(addresses=True))
    try:
        place.world.host.ip("address delete 192.0.2.1/24 dev nic0", "link set nic0 down")
        # The kernel has sent all of it by the time that the command is back.
        found = source.read()
    finally:
        source.close()
    assert events.AddressGone(ipaddress.ip_address("192.0.2.1")) in found
    assert events.LinkEvent("nic0") in found
