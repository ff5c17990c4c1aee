"""Health of devices: whom an announcement concerns, what is believed of what was found, and who is told."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from rdmanet import health as module
from rdmanet.errors import NetlinkError
from rdmanet.health import Health, concerned
from rdmanet.model import Attachment, Device, RdmaMode
from rdmanet.netlink import events
from rdmanet.netlink.events import LOST, AddressGone, DeviceEvent, Event, LinkEvent, LocalRoute, Source
from rdmanet.rdma.backend import Condition
from tests.unit.test_store import DEVICE, wanted

TIMEOUT_S = 20.0


def attachment(number: int) -> Attachment:
    device = dataclasses.replace(DEVICE, name=f"rxe_rn{number}", index=number, uverbs=f"uverbs{number}", minor=number)
    return dataclasses.replace(wanted(number), id=number, device=device, netns=f"/run/netns/{number}")


ATTACHMENTS = {number: attachment(number) for number in (1, 2, 3)}
BY_NETDEV: Mapping[str | None, list[int]] = {f"rn-{number}": [number] for number in ATTACHMENTS}


@pytest.mark.parametrize(
    ("happened", "expected"),
    [
        ([], set()),
        ([LinkEvent("rn-2")], {2}),
        ([LinkEvent("eth0"), LinkEvent("rn-9")], set()),
        ([DeviceEvent("rxe_rn1", 77)], {1}),
        ([DeviceEvent("other", 3)], {3}),
        ([DeviceEvent("uverbs2")], {2}),
        ([DeviceEvent(None, None)], set()),
        ([AddressGone(ipaddress.ip_address("10.0.0.99"))], set()),
        ([LinkEvent("rn-1"), DeviceEvent("rxe_rn3", 3)], {1, 3}),
        ([LinkEvent("rn-1"), LOST], {1, 2, 3}),
    ],
)
def test_whom_it_concerns(happened: list[Event], expected: set[int]) -> None:
    assert concerned(happened, ATTACHMENTS, BY_NETDEV) == expected


def test_an_address_concerns_who_has_it() -> None:
    for number, one in ATTACHMENTS.items():
        for address in one.addresses:
            for event in (AddressGone(address), LocalRoute(address)):
                assert number in concerned([event], ATTACHMENTS, BY_NETDEV)


class Host:
    """The kernel, the pods and the broker, as ``Health`` sees them."""

    name = "rxe"
    mode = RdmaMode.SHARED

    def __init__(self) -> None:
        self.attachments: dict[int, Attachment] = {1: ATTACHMENTS[1], 2: ATTACHMENTS[2]}
        self.found: dict[int, list[Condition]] = {}  # the last stays
        self.down: dict[str, str] = {}
        self.problems: dict[int, str] = {}
        self.told: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()
        self.kept: list[tuple[int, Device]] = []
        self.examined: list[int] = []
        self.failures = 0

    # The back end

    def examine(self, attachment: Attachment, device: Device, descriptor: int) -> Condition:
        self.examined.append(attachment.id)
        if self.failures:
            self.failures -= 1
            raise NetlinkError("The kernel refused.")
        found = self.found.get(attachment.id, [Condition(device, None, port_active=True)])
        return found.pop(0) if len(found) > 1 else found[0]

    def netdev(self, attachment: Attachment) -> str:
        return attachment.host_ifname

    # Pods

    def with_device(self) -> Mapping[int, Attachment]:
        return self.attachments

    def set_health(self, attachment: Attachment, problem: str | None) -> bool:
        if attachment.id not in self.attachments:
            return False
        self.attachments = {**self.attachments, attachment.id: attachment}
        news = self.problems.get(attachment.id) != problem
        self.problems.pop(attachment.id, None)
        if problem is not None:
            self.problems[attachment.id] = problem
        return news

    def cookie(self, attachment: Attachment) -> int | None:
        return 100 + attachment.id

    # The broker

    def device_gone(self, cookie: int, sentence: str) -> None:
        problem = self.problems[cookie - 100]
        assert sentence == f"{self.attachments[cookie - 100].pod}: {problem}", "its view must say so already"
        self.told.put_nowait((cookie - 100, problem))

    def device_back(self, cookie: int) -> None:
        self.told.put_nowait((cookie - 100, None))

    # Announcements

    def announce(self, name: str) -> None:
        self.kernel.send(name.encode())

    def sources(self) -> list[Source]:
        ours, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

        def links(data: bytes) -> list[Event]:
            return [LOST if data == b"lost" else LinkEvent(data.decode())]

        return [Source(ours, lambda data: iter(links(data)))]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(events, "device_sources", lambda mode: [])
    monkeypatch.setattr(events, "link_source", lambda addresses: host.sources()[0])
    monkeypatch.setattr(Health, "_why_down", lambda self, netdev: host.down.get(netdev))
    monkeypatch.setattr(module, "entered", lambda attachment: _Descriptor())
    return host


class _Descriptor:
    def __enter__(self) -> int:
        return 0

    def __exit__(self, *error: object) -> None:
        pass


async def told(host: Host) -> tuple[int, str | None]:
    async with asyncio.timeout(TIMEOUT_S):
        return await host.told.get()


async def started(host: Host) -> Health:
    health = Health(
        host,  # type: ignore[arg-type]
        host,
        host,
        ThreadPoolExecutor(1),
        lambda number, device: host.kept.append((number, device)),
    )
    await health.start()
    return health


async def test_a_link_that_goes_and_comes_back(host: Host) -> None:
    health = await started(host)
    host.down["rn-2"] = "rn-2 has no carrier"
    host.announce("rn-2")
    assert await told(host) == (2, "its RDMA device rxe_rn2 is down: rn-2 has no carrier")
    host.announce("rn-2")  # no news
    host.announce("rn-1")  # well
    host.down.clear()
    host.announce("rn-2")
    assert await told(host) == (2, None)
    assert host.told.empty()
    await health.stop()
    await health.stop()


async def test_a_device_that_was_made_anew_ends_what_was_on_the_old_one(host: Host) -> None:
    """Also where nobody has looked in between: all that can be seen of it may be as before."""
    health = await started(host)
    health.remade(2)
    assert await told(host) == (2, "its RDMA device rxe_rn2 was made anew")
    assert await told(host) == (2, None)
    host.announce("rn-2")
    host.announce("rn-1")
    host.down["rn-1"] = "rn-1 is down"
    host.announce("rn-1")
    assert await told(host) == (1, "its RDMA device rxe_rn1 is down: rn-1 is down")
    assert host.told.empty(), "once"
    await health.stop()


async def test_whose_device_cannot_be_used_is_reported(host: Host) -> None:
    reported: list[int] = []
    health = Health(
        host,  # type: ignore[arg-type]
        host,
        host,
        ThreadPoolExecutor(1),
        lambda number, device: None,
        reported.append,
    )
    host.found[1] = [Condition(DEVICE, "its RDMA device rxe_rn1 is missing", gone=True)]
    await health.start()
    assert await told(host) == (1, "its RDMA device rxe_rn1 is missing")
    assert reported == [1]
    await health.stop()


async def test_what_is_wrong_already_is_found_at_the_start(host: Host) -> None:
    host.found[1] = [Condition(DEVICE, "its RDMA device rxe_rn1 is missing")]
    health = await started(host)
    assert await told(host) == (1, "its RDMA device rxe_rn1 is missing")
    assert host.problems == {1: "its RDMA device rxe_rn1 is missing"}
    await health.stop()


async def test_a_device_under_another_index_is_kept(host: Host) -> None:
    again = dataclasses.replace(ATTACHMENTS[1].device or DEVICE, index=42)
    host.down["rn-1"] = "rn-1 is down"
    health = await started(host)
    assert (await told(host))[0] == 1
    host.down.clear()
    host.found[1] = [Condition(again, None, port_active=True)]
    host.announce("rn-1")
    assert await told(host) == (1, None)
    assert host.kept == [(1, again)]
    assert host.attachments[1].device == again
    await health.stop()


async def test_a_port_that_follows_its_link_late_is_looked_at_again(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECOND_LOOK_S", 0.001)
    device = ATTACHMENTS[1].device or DEVICE
    late, well = Condition(device, None, port_active=False), Condition(device, None, port_active=True)
    host.down["rn-1"] = "rn-1 is down"
    health = await started(host)
    assert (await told(host))[0] == 1
    host.down.clear()
    host.found[1] = [late, late, well]
    host.announce("rn-1")
    assert await told(host) == (1, None)
    host.found[1] = [late]  # and one that never does
    host.announce("rn-1")
    assert await told(host) == (1, "the port of its RDMA device rxe_rn1 is not active")
    await health.stop()


async def test_a_look_that_fails_changes_nothing_and_ends_nothing(host: Host) -> None:
    host.failures = 1
    health = await started(host)
    host.down["rn-1"] = "rn-1 is down"
    host.announce("rn-1")
    assert (await told(host))[0] == 1
    await health.stop()


async def test_lost_announcements_make_it_look_at_all(host: Host) -> None:
    health = await started(host)
    host.down = {"rn-1": "rn-1 is down", "rn-2": "rn-2 is down"}
    host.announce("lost")
    assert {(await told(host))[0], (await told(host))[0]} == {1, 2}
    await health.stop()


async def test_an_attachment_that_is_gone_is_not_looked_at(host: Host) -> None:
    host.attachments = {2: ATTACHMENTS[2]}
    health = await started(host)
    host.down["rn-2"] = "rn-2 is down"
    host.announce("rn-1")
    host.announce("rn-2")
    assert (await told(host))[0] == 2
    assert 1 not in host.examined
    await health.stop()
