"""Pods as the broker knows them: one listener per namespace, names and addresses that lead to the right one."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import itertools
import socket
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from rdmanet import pods as module
from rdmanet.errors import ConflictError, UnavailableError
from rdmanet.model import Attachment, NetnsId, PodName, address_key
from rdmanet.netlink import namespace
from rdmanet.netlink.namespace import Listening
from rdmanet.pods import Pods
from tests.unit.test_store import DEVICE, wanted

OTHER = NetnsId(dev=4, ino=99)


class Server:
    """The lease server as ``Pods`` sees it; says what it was told, on the loop."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []
        self.silent = False

    async def _told(self, what: str, about: object) -> None:
        if self.silent:
            await asyncio.get_running_loop().create_future()
        self.events.append((what, about))

    async def add_listener(self, sock: socket.socket, cookie: int) -> None:
        sock.close()
        await self._told("add", cookie)

    async def remove_listener(self, cookie: int) -> None:
        await self._told("remove", cookie)

    async def pod_gone(self, name: PodName, addresses: Collection[bytes], cookie: int | None) -> None:
        assert addresses
        await self._told("gone", f"{name} {cookie}")


class Namespaces:
    """Stands for being inside a namespace, which needs root: what ``listen`` gets from the kernel."""

    def __init__(self) -> None:
        self.taken = False
        self._cookies = itertools.count(100)

    def listen(self, name: str) -> Listening:
        assert name == "rdmanet"
        return Listening(taken=True) if self.taken else Listening(socket.socket(socket.AF_UNIX))

    def cookie(self, sock: socket.socket) -> int:
        return next(self._cookies)


@pytest.fixture
def namespaces(monkeypatch: pytest.MonkeyPatch) -> Namespaces:
    found = Namespaces()
    monkeypatch.setattr(namespace, "listen", found.listen)
    monkeypatch.setattr(namespace, "cookie", found.cookie)
    return found


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def pods(server: Server, namespaces: Namespaces) -> Iterator[Pods]:
    """Pods with an event loop in a thread of its own: the test is the worker thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    with ThreadPoolExecutor(1) as executor:
        pods = Pods(None, executor)
        pods.serve_with(server, loop)
        yield pods
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def attachment(number: int, **changes: object) -> Attachment:
    return wanted(number, id=number, **changes)


def opened(pods: Pods, one: Attachment) -> None:
    """What an ADD does: first inside the namespace, then outside."""
    pods.open((one, pods.listen(one.netns_id)))
    turn(pods)


def turn(pods: Pods) -> None:
    """Returns when the loop has done what it was given."""
    assert pods._loop is not None
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), pods._loop).result(10)


def test_one_listener_per_pod_from_first_to_last_attachment(pods: Pods, server: Server) -> None:
    first = attachment(1)
    second = attachment(2, ifname="net1", netns_id=first.netns_id, pod=first.pod)
    opened(pods, first)
    opened(pods, second)
    opened(pods, first)  # again, as after a restart
    assert server.events == [("add", 100)]
    pods.close(first)
    assert server.events == [("add", 100), ("gone", "default/pod-1 None")]
    pods.close(first)
    pods.close(second)
    assert server.events[2:] == [
        ("gone", "default/pod-1 None"),
        ("remove", 100),
        ("gone", "default/pod-1 100"),
    ]
    pods.close(second)
    assert server.events[5:] == [("gone", "default/pod-1 None")]


def test_a_taken_name_degrades_that_pod_alone(pods: Pods, server: Server, namespaces: Namespaces) -> None:
    bad, good = attachment(1), attachment(2)
    namespaces.taken = True
    opened(pods, bad)
    namespaces.taken = False
    opened(pods, good)
    assert server.events == [("add", 100)]
    assert pods.degraded() == {
        bad.netns_id: "a process in the pod holds the lease socket's name @rdmanet; its leases cannot work"
    }
    opened(pods, bad)
    assert pods.degraded() == {}, "the name is free again"
    assert server.events == [("add", 100), ("add", 101)]
    pods.close(bad)
    pods.close(good)


def test_a_degraded_pod_ends_without_a_listener(pods: Pods, server: Server, namespaces: Namespaces) -> None:
    namespaces.taken = True
    opened(pods, attachment(1))
    pods.close(attachment(1))
    assert server.events == [("gone", "default/pod-1 None")]
    assert pods.degraded() == {}


def test_of_two_new_sockets_one_is_closed(pods: Pods, server: Server) -> None:
    """Two attachments of one pod may be made at once."""
    first = attachment(1)
    second = attachment(2, ifname="net1", netns_id=first.netns_id, pod=first.pod)
    made = [pods.listen(one.netns_id) for one in (first, second)]
    for one, listening in zip((first, second), made, strict=True):
        pods.open((one, listening))
    turn(pods)
    assert server.events == [("add", 100)]
    assert made[1].sock is not None
    assert made[1].sock.fileno() == -1


def test_a_silent_server_is_an_error(pods: Pods, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOP_TIMEOUT_S", 0.01)
    opened(pods, attachment(1))
    server.silent = True
    with pytest.raises(UnavailableError, match=r"did not answer within 0\.01 s"):
        pods.close(attachment(1))


def test_a_socket_that_is_not_served_is_logged(
    pods: Pods, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(sock: socket.socket, cookie: int) -> None:
        sock.close()
        raise ConflictError("there is a listener already")

    monkeypatch.setattr(server, "add_listener", refuse)
    opened(pods, attachment(1))
    assert "A pod's lease socket is not served; its leases cannot work: there is a listener already" in caplog.text


def test_lookups(pods: Pods) -> None:
    one = attachment(1, wants_rdma=True, device=DEVICE, max_leases=7, traffic_class=104, service_level=3)
    two = attachment(2)
    opened(pods, one)
    opened(pods, two)
    view = pods.by_name(PodName("default", "pod-1"))
    assert view is not None
    assert (view.name, view.device, view.max_leases) == (one.pod, DEVICE, 7)
    assert (view.traffic_class, view.service_level) == (104, 3)
    assert pods.netns_of(100) == one.netns_id
    assert pods.netns_of(102) is None
    assert view.addresses == (address_key("10.213.0.2"), address_key("fd00::2"))
    assert pods.by_cookie(100) == view
    assert pods.by_address(address_key("fd00::2")) == view
    assert pods.by_cookie(101) == pods.by_name(two.pod)
    assert pods.by_cookie(102) is None
    assert pods.by_name(PodName("other", "pod-1")) is None
    assert pods.by_address(address_key("10.213.0.9")) is None
    pods.close(one)
    assert pods.by_cookie(100) is None
    assert pods.by_name(one.pod) is None
    assert pods.by_address(address_key("fd00::2")) is None


def test_of_two_pods_with_one_name_the_newer_answers(pods: Pods) -> None:
    old, new = attachment(1), attachment(2, pod=attachment(1).pod)
    opened(pods, new)
    opened(pods, old)  # a restart may adopt in any order
    view = pods.by_name(old.pod)
    assert view is not None
    assert view.addresses == tuple(address_key(address) for address in new.addresses)
    pods.close(new)
    view = pods.by_name(old.pod)
    assert view is not None
    assert view.addresses == tuple(address_key(address) for address in old.addresses)


def test_a_pods_addresses_for_leases_are_those_with_the_device(pods: Pods) -> None:
    plain = attachment(1)
    fast = attachment(
        2,
        ifname="net1",
        netns_id=plain.netns_id,
        pod=plain.pod,
        ipv4=ipaddress.IPv4Address("10.9.9.9"),
        ipv6=None,
        device=DEVICE,
    )
    opened(pods, plain)
    before = pods.by_name(plain.pod)
    assert before is not None
    assert before.device is None
    assert len(before.addresses) == 2
    opened(pods, fast)
    view = pods.by_name(plain.pod)
    assert view is not None
    assert view.device == DEVICE
    assert view.addresses == (address_key("10.9.9.9"),)


async def test_holder_of_an_unknown_device(pods: Pods) -> None:
    assert await pods.holders(DEVICE) == {}


def test_an_address_that_has_gone_to_another_pod_is_that_pods(pods: Pods) -> None:
    old = attachment(1)
    new = attachment(2, ipv4=old.ipv4)
    opened(pods, old)
    opened(pods, new)
    view = pods.by_address(address_key("10.213.0.2"))
    assert view is not None
    assert view.name == new.pod
    pods.close(old)
    assert pods.by_address(address_key("10.213.0.2")) == view
    assert pods.by_address(address_key("fd00::2")) is None
    pods.close(new)
    assert pods.by_address(address_key("10.213.0.2")) is None


def test_health_is_of_the_device_that_leases_are_of(pods: Pods) -> None:
    one, two = (dataclasses.replace(wanted(n), id=n, device=DEVICE, netns_id=NetnsId(4, n)) for n in (1, 2))
    for attachment in (one, two):
        pods.open((attachment, pods.listen(attachment.netns_id)))
    known = pods.with_device()
    assert known == {1: one, 2: two}
    assert pods.with_device() is known, "another object, and nothing has changed"
    assert pods.set_health(two, "it is missing")
    assert not pods.set_health(two, "it is missing"), "no news"
    views = [pods.by_name(attachment.pod) for attachment in (one, two)]
    assert [view and view.unhealthy for view in views] == [None, f"{two.pod}: it is missing"]
    again = dataclasses.replace(two, device=dataclasses.replace(DEVICE, index=99))
    assert pods.set_health(again, None)
    assert pods.with_device() == {1: one, 2: again}
    assert pods.unhealthy() == {}
    assert pods.cookie(again) not in (None, pods.cookie(one))
    pods.set_health(again, "it is missing")
    pods.close(again)
    assert (pods.unhealthy(), pods.with_device()) == ({}, {1: one})
    assert not pods.set_health(again, "it is missing"), "it is gone"
    assert pods.cookie(again) is None
