"""Batches of rtnetlink messages against the running kernel."""

from __future__ import annotations

import errno
import ipaddress
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from rdmanet.errors import ConflictError, NetlinkError, NotFoundError
from rdmanet.model import GATEWAY_MAC, pod_mac
from rdmanet.netlink import messages, namespace
from rdmanet.netlink.batch import MAX_MESSAGES, BatchSocket, BatchSockets
from rdmanet.netlink.messages import Message
from rdmanet.netlink.route import RouteSocket
from testbed.world import World

V4, V6 = ipaddress.ip_address("10.9.0.1"), ipaddress.ip_address("fd09::1")
EVERYTHING = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))


@dataclass
class Pair:
    """Two scratch namespaces, and a batch socket in each."""

    one: int
    two: int
    host: BatchSocket
    pod: BatchSocket


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World.start("batch", outside=False, agent=False) as world:
        yield world


@pytest.fixture
def pair(world: World) -> Iterator[Pair]:
    pods = (world.pod(), world.pod())
    with ExitStack() as stack:
        one, two = (stack.enter_context(namespace.opened(str(world.host.path(pod.netns)))) for pod in pods)
        host, pod = (stack.enter_context(namespace.run_inside(number, BatchSocket)) for number in (one, two))
        yield Pair(one, two, host, pod)
    for made in pods:
        made.destroy()


def veth(pair: Pair, name: str = "rn-1", peer_name: str = "eth0") -> Message:
    return messages.add_veth(name, GATEWAY_MAC, 9000, peer_name=peer_name, peer_mac=pod_mac(1), peer_namespace=pair.two)


def made(pair: Pair, name: str = "rn-1", peer_name: str = "eth0") -> messages.Link:
    """A new veth pair's end in the first namespace."""
    _, reply = pair.host.send([veth(pair, name, peer_name), messages.get_link(name)])
    return messages.link(reply.payloads[0])


def test_both_ends_are_known_without_asking_twice(pair: Pair) -> None:
    link = made(pair)
    (reply,) = pair.pod.send([messages.get_link("eth0")])
    peer = messages.link(reply.payloads[0])
    assert (link.name, link.mac, link.mtu_bytes, link.up, link.kind) == ("rn-1", GATEWAY_MAC, 9000, False, "veth")
    assert (peer.mac, peer.mtu_bytes, peer.up) == (pod_mac(1), 9000, False)
    assert (link.peer_index, peer.peer_index) == (peer.index, link.index)


def test_everything_of_a_pod_in_one_batch(pair: Pair) -> None:
    link = made(pair)
    assert link.peer_index is not None
    pair.host.send([messages.no_link_local(link.index), messages.set_up(link.index)])
    batch = [messages.set_up(1), messages.set_up(link.peer_index)]
    for address, everything in zip((V4, V6), EVERYTHING, strict=True):
        gateway = address + 1
        batch += [
            messages.add_address(link.peer_index, address, address.max_prefixlen),
            messages.add_permanent_neighbour(link.peer_index, gateway, GATEWAY_MAC),
            messages.add_route(everything, link.peer_index, gateway=gateway, mtu_bytes=1400, metric=7),
        ]
    for _ in range(2):  # again is no error
        pair.pod.send(batch)
    with RouteSocket.inside(pair.two) as inside:
        assert {address for _, address, _ in inside.addresses(link.peer_index)} >= {V4, V6}
        found = [(route.family, route.metric, route.ifindex) for route in inside.default_routes()]
        assert found == [(4, 7, link.peer_index), (6, 7, link.peer_index)]
    with RouteSocket.inside(pair.one) as outside:
        assert not [a for _, a, _ in outside.addresses(link.index) if a.is_link_local]


@pytest.mark.parametrize(("name", "peer_name"), [("rn-1", "eth1"), ("rn-2", "eth0")])
def test_a_refusal_names_its_message_and_what_follows_is_harmless(pair: Pair, name: str, peer_name: str) -> None:
    made(pair)
    with pytest.raises(ConflictError, match=r"The kernel refused RTM_NEWLINK for rn-. and eth") as caught:
        pair.host.send([veth(pair, name, peer_name), messages.get_link("rn-2")])
    assert caught.value.errno == errno.EEXIST
    assert messages.link(pair.host.send([messages.get_link("rn-1")])[0].payloads[0]).name == "rn-1", "still in step"


def test_the_kernel_goes_on_after_a_refusal(pair: Pair) -> None:
    gone, up = pair.pod.exchange([messages.set_up(999), messages.set_up(1)])
    assert (gone.errno, up.errno) == (errno.ENODEV, 0)
    assert messages.link(pair.pod.send([messages.get_link("lo")])[0].payloads[0]).up
    with pytest.raises(NotFoundError, match="The kernel refused RTM_SETLINK for link 999"):
        pair.pod.send([messages.set_up(1), messages.set_up(999)])


def test_the_kernels_own_words_are_in_the_sentence(pair: Pair) -> None:
    with pytest.raises(NotFoundError, match=r"The kernel refused RTM_NEWROUTE for 0\.0\.0\.0/0: \w+"):
        pair.pod.send([messages.add_route(EVERYTHING[0], 999, gateway=ipaddress.ip_address("10.9.0.1"), metric=1)])


def test_more_than_fit_into_one_send(pair: Pair) -> None:
    names = [f"rn-{number}" for number in range(MAX_MESSAGES + 3)]
    replies = pair.host.exchange([messages.get_link(name) for name in (*names, "lo")])
    assert [reply.errno for reply in replies[:-1]] == [errno.ENODEV] * len(names)
    assert messages.link(replies[-1].payloads[0]).name == "lo"


def test_links_are_removed_together(pair: Pair) -> None:
    names = [f"rn-{number}" for number in range(5)]
    for number, name in enumerate(names):
        made(pair, name, f"eth{number}")
    group = 0x40000123
    batch = [messages.set_group(name, group) for name in (*names[:3], "rn-99")] + [messages.delete_group(group)]
    assert [reply.errno for reply in pair.host.exchange(batch)] == [0, 0, 0, errno.ENODEV, 0]
    pair.host.send(batch)  # nothing is left of them: no error
    with RouteSocket.inside(pair.one) as outside, RouteSocket.inside(pair.two) as inside:
        assert [link.name for link in outside.links()] == ["lo", "rn-3", "rn-4"]
        assert [link.name for link in inside.links()] == ["lo", "eth3", "eth4"]
    for _ in range(2):
        pair.host.send([messages.delete_link("rn-3")])
    with pytest.raises(NotFoundError):
        pair.host.send([messages.get_link("rn-3")])


def test_filters(pair: Pair) -> None:
    with World.start("batchtc", outside=False) as other, other.datapath() as datapath:
        link = made(pair)
        assert not pair.host.exchange([messages.get_ingress_filter(link.index)])[0].payloads
        for name in ("rdmanet/host", "rdmanet/pod"):  # the second takes the first's place
            program = datapath.dispatcher(name.partition("/")[2])
            pair.host.send([messages.add_clsact(link.index), messages.set_ingress_filter(link.index, program, name)])
        (reply,) = pair.host.send([messages.get_ingress_filter(link.index)])
        found = messages.bpf_filter(reply.payloads[0])
        assert found.name == "rdmanet/pod"
        assert found.program_id == datapath.dispatcher_id("pod") != datapath.dispatcher_id("host")
        with RouteSocket.inside(pair.one) as outside:
            assert outside.ingress_filter_names(link.index) == ["rdmanet/pod"]


def test_sockets_are_kept_and_given_up_after_a_failure(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    sockets = BatchSockets()

    def inside(function: Callable[[], object]) -> object:
        return namespace.run_inside(pair.one, function)

    inside(lambda: sockets.send([messages.set_up(1)]))
    (kept,) = sockets._free
    sockets.send([messages.set_up(1)])
    assert sockets._free == [kept]
    kept._sock.close()  # as if something had gone wrong with it
    with pytest.raises(NetlinkError) as caught:
        sockets.send([messages.set_up(1)])
    assert caught.value.errno == errno.EBADF
    assert sockets._free == []
    inside(lambda: sockets.send([messages.set_up(1)]))
    sockets.close()
    assert sockets._free == []


def test_a_process_without_descriptors_gets_a_sentence() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(NetlinkError, match="The kernel refused socket for NETLINK_ROUTE") as caught:
            BatchSockets().send([messages.set_up(1)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
