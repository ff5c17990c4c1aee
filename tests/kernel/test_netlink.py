"""Namespaces, rtnetlink and RDMA netlink against the running kernel, in scratch namespaces."""

from __future__ import annotations

import errno
import ipaddress
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from rdmanet.errors import ConflictError, KernelError, NetlinkError, NotFoundError, RequestError, UnavailableError
from rdmanet.model import GATEWAY_MAC, pod_mac
from rdmanet.netlink import namespace, nldev
from rdmanet.netlink.nldev import RdmaSocket
from rdmanet.netlink.route import RouteSocket
from testbed.world import World

V4, V6 = ipaddress.ip_address("10.9.0.1"), ipaddress.ip_address("fd09::1")
DEFAULTS = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))


@dataclass
class Pair:
    """Two scratch namespaces: descriptors, and rtnetlink in the first."""

    one: int
    two: int
    route: RouteSocket
    paths: tuple[str, str]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World.start("netlink", outside=False, agent=False) as world:
        yield world


@pytest.fixture
def pair(world: World) -> Iterator[Pair]:
    pods = (world.pod(), world.pod())
    with ExitStack() as stack:
        paths = [str(world.host.path(pod.netns)) for pod in pods]
        one, two = (stack.enter_context(namespace.opened(path)) for path in paths)
        yield Pair(one, two, stack.enter_context(RouteSocket.inside(one)), (paths[0], paths[1]))
    for pod in pods:
        pod.destroy()


# Namespaces


def test_what_a_path_leads_to(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(pair.paths[0])
    with namespace.opened(str(tmp_path / "link")) as descriptor:
        assert namespace.identify(descriptor) == namespace.identify(pair.one)
    assert namespace.identify(pair.one) != namespace.identify(pair.two)
    assert namespace.own() not in (namespace.identify(pair.one), namespace.identify(pair.two))
    with namespace.opened("/proc/self/ns/net") as descriptor:
        assert namespace.identify(descriptor) == namespace.own()


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("missing", NotFoundError, "There is no network namespace at .*/missing: it is gone or was never made"),
        ("file/below", NotFoundError, "There is no network namespace at"),
        ("file", RequestError, "/file is not a network namespace"),
        (".", RequestError, "is not a network namespace"),
        ("/proc/self/ns/mnt", RequestError, "/proc/self/ns/mnt is not a network namespace"),
        ("/proc/999999999/ns/net", NotFoundError, "There is no network namespace at"),
        ("loop", KernelError, "cannot be opened"),
    ],
)
def test_paths_that_are_no_namespace(tmp_path: Path, path: str, kind: type[Exception], words: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(kind, match=words), namespace.opened(str(tmp_path / path)):
        pytest.fail("opened")


def test_run_inside_returns_raises_and_leaves_no_thread_behind(pair: Pair) -> None:
    before = threading.active_count()
    inside = namespace.run_inside(pair.one, lambda: Path("/proc/thread-self/ns/net").stat().st_ino)
    assert inside == namespace.identify(pair.one).ino
    with pytest.raises(ZeroDivisionError):
        namespace.run_inside(pair.one, lambda: 1 // 0)
    assert threading.active_count() == before
    assert Path("/proc/thread-self/ns/net").stat().st_ino == namespace.own().ino


def test_a_visit_goes_where_paths_still_lead_to_what_they_did(pair: Pair, tmp_path: Path) -> None:
    one, two = (namespace.identify(descriptor) for descriptor in (pair.one, pair.two))
    places = [
        (pair.paths[0], one),
        (pair.paths[1], one),  # another namespace is there now
        (str(tmp_path / "gone"), two),
        (str(tmp_path), two),
        (pair.paths[1], two),
    ]
    inode = Path("/proc/thread-self/ns/net")
    assert namespace.visit(places, lambda _: inode.stat().st_ino) == [one.ino, None, None, None, two.ino]
    assert inode.stat().st_ino == namespace.own().ino
    with pytest.raises(ZeroDivisionError):
        namespace.visit(places, lambda _: 1 // 0)
    assert namespace.visit([], lambda _: 1) == []


def test_run_inside_of_what_is_no_namespace() -> None:
    with Path("/dev/null").open("rb") as file, pytest.raises(KernelError, match="cannot be entered") as caught:
        namespace.run_inside(file.fileno(), lambda: pytest.fail("entered"))
    assert caught.value.errno == errno.EINVAL


def test_abstract_names_belong_to_their_namespace(pair: Pair) -> None:
    one = namespace.run_inside(pair.one, lambda: namespace.abstract_listener("name"))
    with one, namespace.run_inside(pair.two, lambda: namespace.abstract_listener("name")) as two:
        with pytest.raises(OSError, match="in use") as caught:
            namespace.run_inside(pair.one, lambda: namespace.abstract_listener("name"))
        assert caught.value.errno == errno.EADDRINUSE
        assert namespace.cookie(one) != namespace.cookie(two)
        again = namespace.run_inside(pair.one, lambda: socket.socket(socket.AF_UNIX))
        with again:
            assert namespace.cookie(again) == namespace.cookie(one)
        outside = socket.socket(socket.AF_UNIX)
        with outside, pytest.raises(ConnectionRefusedError):
            outside.connect("\0name")


# Links


def test_a_pair_across_namespaces(pair: Pair) -> None:
    route = pair.route
    route.add_veth("host0", GATEWAY_MAC, 9000, peer_name="eth0", peer_mac=pod_mac(1), peer_namespace=pair.two)
    link = route.link("host0")
    assert link is not None
    assert (link.name, link.mac, link.mtu_bytes, link.up, link.kind) == ("host0", GATEWAY_MAC, 9000, False, "veth")
    with RouteSocket.inside(pair.two) as other:
        peer = other.link("eth0")
        assert peer is not None
        assert (peer.mac, peer.mtu_bytes) == (pod_mac(1), 9000)
        assert other.link("host0") is None
        other.set_up(peer.index)
        route.set_up(link.index, link_local=False)
        up = route.link("host0")
        assert up is not None
        assert up.up
        assert not [address for _, address, _ in route.addresses(link.index) if address.is_link_local]
        assert route.delete_link("host0")
        assert not route.delete_link("host0")
        assert other.link("eth0") is None
    assert [found.name for found in route.links()] == ["lo"]


@pytest.mark.parametrize(("ours", "theirs"), [("host0", "eth1"), ("host1", "eth0")])
def test_names_that_exist(pair: Pair, ours: str, theirs: str) -> None:
    route = pair.route
    route.add_veth("host0", GATEWAY_MAC, 1500, peer_name="eth0", peer_mac=pod_mac(1), peer_namespace=pair.two)
    with pytest.raises(ConflictError) as caught:
        route.add_veth(ours, GATEWAY_MAC, 1500, peer_name=theirs, peer_mac=pod_mac(2), peer_namespace=pair.two)
    assert (caught.value.errno, caught.value.operation) == (errno.EEXIST, "RTM_NEWLINK")
    assert {found.name for found in route.links()} == {"lo", "host0"}, "half a pair is left"


def test_links_that_are_not_there(pair: Pair) -> None:
    assert pair.route.link("nothing") is None
    assert pair.route.link_at(999) is None
    loopback = pair.route.link_at(1)
    assert loopback is not None
    assert loopback.name == "lo"
    with pytest.raises(NotFoundError) as caught:
        pair.route.set_up(999)
    assert caught.value.errno == errno.ENODEV


def test_a_name_the_kernel_refuses_is_an_error_with_errno(pair: Pair) -> None:
    with pytest.raises(NetlinkError) as caught:
        pair.route.add_veth("a/b", GATEWAY_MAC, 1500, peer_name="eth0", peer_mac=pod_mac(1))
    assert caught.value.errno == errno.EINVAL


# Addresses and routes


def make_up(pair: Pair) -> int:
    """A link that is up, with its peer."""
    pair.route.add_veth("a", GATEWAY_MAC, 1500, peer_name="b", peer_mac=pod_mac(1))
    indexes = [link.index for link in pair.route.links() if link.name in ("a", "b")]
    for index in indexes:
        pair.route.set_up(index, link_local=False)
    return indexes[0]


def test_addresses_are_usable_at_once_and_adding_is_idempotent(pair: Pair) -> None:
    index = make_up(pair)
    for _ in range(2):
        for address in (V4, V6):
            pair.route.add_address(index, address, address.max_prefixlen)
    assert sorted((str(a), length) for _, a, length in pair.route.addresses(index)) == [
        ("10.9.0.1", 32),
        ("fd09::1", 128),
    ]
    assert {index for index, _, _ in pair.route.addresses()} == {index}

    def bind() -> None:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind((str(V6), 0))  # a tentative address refuses with EADDRNOTAVAIL

    namespace.run_inside(pair.one, bind)


def test_routes_and_defaults(pair: Pair) -> None:
    index = make_up(pair)
    route = pair.route
    for address, subnet in ((V4, "10.9.0.0/24"), (V6, "fd09::/64")):
        route.add_address(index, address, address.max_prefixlen)
        network = ipaddress.ip_network(subnet)
        for _ in range(2):
            route.add_route(network, index, source=address)
        assert (network, index) in route.routes()
    assert route.default_routes() == []
    for everything, gateway in zip(DEFAULTS, (V4 + 1, V6 + 1), strict=True):
        route.add_route(everything, index, gateway=gateway, metric=500, mtu_bytes=1400)
        route.add_route(everything, index, gateway=gateway, metric=100)
        route.add_permanent_neighbour(index, gateway, GATEWAY_MAC)
        route.add_permanent_neighbour(index, gateway, GATEWAY_MAC)
    assert [(r.family, r.metric, r.ifindex) for r in route.default_routes()] == [
        (4, 100, index),
        (6, 100, index),
        (4, 500, index),
        (6, 500, index),
    ]
    assert not [destination for destination, _ in route.routes() if destination in DEFAULTS]


# tc


def test_clsact_and_filters(pair: Pair, world: World) -> None:
    with World.start("tc", outside=False) as other, other.datapath() as datapath:
        index = make_up(pair)
        route = pair.route
        assert route.ingress_filter_names(index) == []
        assert not route.delete_clsact(index)
        assert route.add_clsact(index)
        assert not route.add_clsact(index)
        assert "clsact" in route.qdisc_kinds(index)
        assert not route.has_filters(index)
        assert not route.delete_ingress_filter(index)
        for name in ("rdmanet/pod", "rdmanet/host"):  # the second takes the first's place
            route.set_ingress_filter(index, datapath.dispatcher("pod"), name)
        assert route.ingress_filter_names(index) == ["rdmanet/host"]
        assert route.has_filters(index)
        assert route.delete_ingress_filter(index)
        assert not route.delete_ingress_filter(index)
        assert route.delete_clsact(index)
        assert not route.delete_clsact(index)
        assert "clsact" not in route.qdisc_kinds(index)


# RDMA


def test_rdma_netlink_or_a_sentence(pair: Pair) -> None:
    with nldev.available() as rdma:
        if rdma is not None:
            assert rdma.mode() in ("shared", "exclusive")
            assert rdma.device("no-such-device") is None
            return
    for opening in (RdmaSocket.here, lambda: RdmaSocket.inside(pair.one)):
        with pytest.raises(UnavailableError, match="This kernel has no RDMA subsystem") as caught:
            opening()
        assert caught.value.errno == errno.EPROTONOSUPPORT
