"""rdmanet.netlink.changes against the running kernel: what is heard of the host and of pods, and what is not."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from rdmanet.model import GATEWAY_MAC, pod_mac
from rdmanet.netlink import changes, messages, namespace
from rdmanet.netlink.batch import BatchSocket
from rdmanet.netlink.changes import Change, Changes, Lost
from testbed.world import World

WITHIN_S = 30.0


@dataclass
class Place:
    """A host and a pod, a veth pair between them, and who listens in the host."""

    world: World
    host: int
    pod: int
    pod_path: str
    host_path: str

    def exec(self, where: str, *words: str) -> None:
        self.world.host.exec(["nsenter", f"--net={where}", *words])

    def on_host(self, *words: str) -> None:
        self.exec(self.host_path, *words)

    def in_pod(self, *words: str) -> None:
        self.exec(self.pod_path, *words)


@pytest.fixture
def place() -> Iterator[Place]:
    with World.start("changes", outside=False, agent=False) as world, ExitStack() as stack:
        host, pod = world.pod(), world.pod()
        descriptors = [stack.enter_context(namespace.opened(str(world.host.path(one.netns)))) for one in (host, pod)]
        yield Place(world, descriptors[0], descriptors[1], pod.netns, host.netns)


def add_veth(place: Place) -> messages.Link:
    """``rn-1`` and the pod's ``eth0``, both up with addresses."""

    def make() -> messages.Link:
        with BatchSocket() as sock:
            add = messages.add_veth(
                "rn-1", GATEWAY_MAC, 1500, peer_name="eth0", peer_mac=pod_mac(1), peer_namespace=place.pod
            )
            _, reply = sock.send([add, messages.get_link("rn-1")])
            return messages.link(reply.payloads[0])

    link = namespace.run_inside(place.host, make)
    place.on_host("ip", "link", "set", "rn-1", "up")
    place.in_pod("sh", "-c", "ip link set lo up; ip link set eth0 up; ip address add 192.0.2.1/24 dev eth0")
    place.in_pod("ip", "route", "add", "default", "via", "192.0.2.2", "dev", "eth0")
    place.in_pod("ip", "neigh", "add", "192.0.2.2", "lladdr", GATEWAY_MAC, "dev", "eth0", "nud", "permanent")
    return link


def heard(source: Changes) -> list[Change | Lost]:
    """What comes until nothing does for half a second; the first is waited for."""
    found: list[Change | Lost] = []
    deadline_s = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline_s:
        if select.select([source.fileno()], [], [], 0.5 if found else WITHIN_S)[0]:
            found += source.read(64)
        else:
            break
    return found


def nothing_waits(source: Changes) -> bool:
    return source.read(1000) == []


def test_an_add_wakes_for_little_but_the_new_link(place: Place) -> None:
    host = namespace.run_inside(place.host, changes.host_changes)
    pods = namespace.run_inside(place.host, changes.pod_changes)
    link = add_veth(place)
    found = heard(host)
    assert Change(link.index, name="rn-1", new=True, peer_namespace=link.peer_namespace) in found
    # What the kernel tells of its sysctls, and of the address that it gives to this host's end (rdmanet allows none).
    others = [one for one in found if not (isinstance(one, Change) and one.new)]
    assert set(others) == {Change(link.index)}
    assert len(others) < 10
    assert link.peer_namespace is not None
    assert nothing_waits(pods)
    for source in (host, pods):
        source.close()


@pytest.mark.parametrize(
    "words",
    [
        ("ip", "link", "set", "eth0", "down"),
        ("ip", "link", "delete", "eth0"),
        ("ip", "address", "delete", "192.0.2.1/24", "dev", "eth0"),
        ("ip", "route", "delete", "default"),
        ("ip", "neigh", "delete", "192.0.2.2", "dev", "eth0"),
    ],
    ids=lambda words: " ".join(words[1:3]),
)
def test_what_goes_inside_a_pod_is_heard_with_its_namespace(place: Place, words: tuple[str, ...]) -> None:
    link = add_veth(place)
    source = namespace.run_inside(place.host, changes.pod_changes)
    place.in_pod(*words)
    found = heard(source)
    assert {one.namespace for one in found if isinstance(one, Change)} == {link.peer_namespace}
    assert link.peer_index in {one.index for one in found if isinstance(one, Change)}
    source.close()


def test_what_an_idle_pod_forgets_wakes_nobody(place: Place) -> None:
    add_veth(place)
    source = namespace.run_inside(place.host, changes.pod_changes)
    place.in_pod("ip", "neigh", "add", "ff02::77", "lladdr", "33:33:00:00:00:77", "dev", "eth0", "nud", "noarp")
    place.in_pod("ip", "neigh", "delete", "ff02::77", "dev", "eth0")
    assert nothing_waits(source)
    place.in_pod("ip", "neigh", "delete", "192.0.2.2", "dev", "eth0")
    assert len(heard(source)) == 1
    source.close()


@pytest.mark.parametrize(
    "words",
    [
        ("ip", "link", "set", "rn-1", "down"),
        ("ip", "link", "delete", "rn-1"),
        ("tc", "qdisc", "delete", "dev", "rn-1", "clsact"),
        ("ip", "address", "delete", "198.51.100.1/24", "dev", "rn-1"),
        ("ip", "route", "delete", "203.0.113.0/24"),
        ("ip", "-6", "route", "delete", "2001:db8:5::/64"),
        ("sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/rn-1/forwarding"),
        ("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/rn-1/forwarding"),
    ],
    ids=lambda words: " ".join(words[1:])[:40],
)
def test_what_goes_on_the_host_is_heard(place: Place, words: tuple[str, ...]) -> None:
    link = add_veth(place)
    place.on_host("tc", "qdisc", "add", "dev", "rn-1", "clsact")
    place.on_host("ip", "address", "add", "198.51.100.1/24", "dev", "rn-1")
    place.on_host("ip", "route", "add", "203.0.113.0/24", "dev", "rn-1")
    place.on_host("ip", "-6", "route", "add", "2001:db8:5::/64", "dev", "rn-1")
    source = namespace.run_inside(place.host, changes.host_changes)
    place.on_host(*words)
    assert link.index in {one.index for one in heard(source) if isinstance(one, Change)}
    source.close()


def test_what_was_lost_is_said(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "RECEIVE_BUFFER_BYTES", 4096)
    link = add_veth(place)
    source = namespace.run_inside(place.host, changes.pod_changes)
    loop = (
        "for i in $(seq 100); do ip address add 198.51.100.9/32 dev eth0; ip address del 198.51.100.9/32 dev eth0; done"
    )
    place.in_pod("sh", "-c", loop)
    found = heard(source)
    assert Lost() in found
    assert {one.namespace for one in found if isinstance(one, Change)} <= {link.peer_namespace}
    source.close()
