"""Whether pods' RDMA devices can be used: watched by what the kernel announces, told to whoever holds leases.

Announcements only say where to look. What is believed is what is found then: the device, by RDMA netlink, and its
netdev's carrier. An attachment whose device cannot be used is unhealthy with a sentence, until it is found well again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from typing import Protocol

from rdmanet import background
from rdmanet.errors import RdmanetError, UnavailableError
from rdmanet.model import Attachment, Backend, Device
from rdmanet.netlink import events, messages
from rdmanet.netlink.batch import BatchSockets
from rdmanet.numbers import entered
from rdmanet.rdma.backend import Condition, DeviceBackend

log = logging.getLogger(__name__)

#: A link is announced before its RDMA device follows (net/core/dev.c, __dev_notify_flags): where they disagree the
#: device is looked at again, so often and so long after.
_SECOND_LOOKS = 10
_SECOND_LOOK_S = 0.1


class Pods(Protocol):
    """``rdmanet.pods.Pods``, as seen from here."""

    def with_device(self) -> Mapping[int, Attachment]: ...
    def set_health(self, attachment: Attachment, problem: str | None) -> bool: ...
    def cookie(self, attachment: Attachment) -> int | None: ...


class LeaseHolders(Protocol):
    """``rdmanet.broker.server.BrokerServer``: tells the processes of the pod in a network namespace."""

    def device_gone(self, cookie: int, sentence: str) -> None: ...
    def device_back(self, cookie: int) -> None: ...


class Health:
    """Runs on the event loop; what blocks runs in ``executor``, also ``keep``, which is told of a device that has come
    back under another index. ``report`` hears of attachments whose device cannot be used: it may be made again.
    ``heard`` is called whenever the kernel announces anything."""

    def __init__(
        self,
        devices: DeviceBackend,
        pods: Pods,
        holders: LeaseHolders,
        executor: Executor,
        keep: Callable[[int, Device], None],
        report: Callable[[int], None] = lambda attachment_id: None,
        heard: Callable[[], None] = lambda: None,
    ):
        self._devices = devices
        self._pods = pods
        self._holders = holders
        self._executor = executor
        self._keep = keep
        self._report = report
        self._announced = heard
        self._links = BatchSockets()
        self._sources: list[events.Source] = []
        self._due: set[int] = set()  # attachment ids
        self._looks: dict[int, int] = {}  # second looks so far
        self._remade: set[int] = set()
        # There may be thousands of attachments, and a dozen links are announced for each that comes or goes.
        self._known: Mapping[int, Attachment] = {}
        self._by_netdev: dict[str | None, list[int]] = {}
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to watch, and to look at every device that there is now."""
        loop = asyncio.get_running_loop()
        self._sources = await loop.run_in_executor(self._executor, self._open)
        for source in self._sources:
            loop.add_reader(source.fileno(), self._heard, source)
        self._look_at(self._pods.with_device())
        self._worker = background.begin(self._work(), "look at RDMA devices")

    def _open(self) -> list[events.Source]:
        shared = self._devices.name is Backend.SHARED
        return [*events.device_sources(self._devices.mode), events.link_source(addresses=shared)]

    async def stop(self) -> None:
        """Ends what ``start`` began. Idempotent."""
        for source in self._sources:
            asyncio.get_running_loop().remove_reader(source.fileno())
            source.close()
        self._sources = []
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
            self._worker = None
        self._links.close()

    def remade(self, attachment_id: int) -> None:
        """The attachment's device is another one by its name: whatever was on the old one is over, also where nobody
        has looked in between."""
        self._remade.add(attachment_id)
        self._look_at([attachment_id])

    # What the kernel announces

    def _heard(self, source: events.Source) -> None:
        try:
            happened = source.read()
        except RdmanetError as error:
            log.error("RDMA devices are no longer watched: %s", error)
            asyncio.get_running_loop().remove_reader(source.fileno())
            return
        if happened:
            self._announced()
            attachments = self._pods.with_device()
            if attachments is not self._known:
                self._known, self._by_netdev = attachments, {}
                for number, attachment in attachments.items():
                    self._by_netdev.setdefault(self._devices.netdev(attachment), []).append(number)
            self._look_at(concerned(happened, attachments, self._by_netdev))

    def _look_at(self, attachment_ids: Iterable[int]) -> None:
        self._due.update(attachment_ids)
        if self._due:
            self._wake.set()

    # Looking

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            due, self._due = self._due, set()
            attachments = self._pods.with_device()
            for number in sorted(due & attachments.keys()):
                attachment = attachments[number]
                try:
                    found = await loop.run_in_executor(self._executor, self._examine, attachment)
                    if found.device != attachment.device:
                        await loop.run_in_executor(self._executor, self._keep, attachment.id, found.device)
                except RdmanetError as error:
                    # What was known of it stays, until the next announcement.
                    log.error("the RDMA device of %s cannot be looked at: %s", attachment.pod, error)
                    continue
                self._believe(attachment, found)

    def _examine(self, attachment: Attachment) -> Condition:
        """In a worker thread."""
        assert attachment.device is not None
        with entered(attachment) as descriptor:
            if descriptor is None:
                return Condition(attachment.device, f"its network namespace {attachment.netns} is gone")
            try:
                found = self._devices.examine(attachment, attachment.device, descriptor)
            except UnavailableError as error:  # the kernel has no RDMA any more
                return Condition(attachment.device, error.sentence.removesuffix("."))
        if found.problem is not None:
            return found
        netdev = self._devices.netdev(attachment)
        if netdev is not None and (down := self._why_down(netdev)) is not None:
            return replace(found, problem=f"its RDMA device {found.device.name} is down: {down}", port_active=True)
        return found

    def _why_down(self, netdev: str) -> str | None:
        (reply,) = self._links.exchange([messages.get_link(netdev)])
        if reply.errno:
            return f"the host has no {netdev}"
        link = messages.link(reply.payloads[0])
        if not link.up:
            return f"{netdev} is down"
        return None if link.carrier else f"{netdev} has no carrier"

    def _believe(self, attachment: Attachment, found: Condition) -> None:
        problem = found.problem
        if problem is None and not found.port_active:
            looks = self._looks.get(attachment.id, 0)
            if looks < _SECOND_LOOKS:
                self._looks[attachment.id] = looks + 1
                asyncio.get_running_loop().call_later(_SECOND_LOOK_S, self._look_at, [attachment.id])
                return
            problem = f"the port of its RDMA device {found.device.name} is not active"
        self._looks.pop(attachment.id, None)
        if problem is not None:
            self._report(attachment.id)
        if found.device != attachment.device:
            log.info("%s: the RDMA device %s is device %d now", attachment.pod, found.device.name, found.device.index)
            attachment = replace(attachment, device=found.device)
        if attachment.id in self._remade:
            self._remade.discard(attachment.id)
            self._tell(attachment, problem or f"its RDMA device {found.device.name} was made anew")
        self._tell(attachment, problem)

    def _tell(self, attachment: Attachment, problem: str | None) -> None:
        """Those who hold leases, where it is news."""
        if not self._pods.set_health(attachment, problem):
            return
        cookie = self._pods.cookie(attachment)
        if problem is None:
            assert attachment.device is not None
            log.info("%s: its RDMA device %s is well again", attachment.pod, attachment.device.name)
            if cookie is not None:
                self._holders.device_back(cookie)
        else:
            log.warning("%s: %s", attachment.pod, problem)
            if cookie is not None:
                self._holders.device_gone(cookie, f"{attachment.pod}: {problem}")


def concerned(
    happened: Iterable[events.Event],
    attachments: Mapping[int, Attachment],
    by_netdev: Mapping[str | None, Iterable[int]],
) -> set[int]:
    """Which attachments, by id, what has happened may concern; ``by_netdev`` has them by the host's netdev."""
    found: set[int] = set()
    names: set[str | None] = set()
    indexes: set[int | None] = set()
    addresses = set()
    for event in happened:
        match event:
            case events.LinkEvent(name):
                found.update(by_netdev.get(name, ()))
            case events.DeviceEvent(name, index):
                names.add(name)
                indexes.add(index)
            case events.AddressGone(address) | events.LocalRoute(address):
                addresses.add(address)
            case events.Lost():
                return set(attachments)
    if names - {None} or indexes - {None} or addresses:
        for number, attachment in attachments.items():
            device = attachment.device
            if device is not None and (
                device.index in indexes
                or device.name in names
                or device.uverbs in names
                or not addresses.isdisjoint(attachment.addresses)
            ):
                found.add(number)
    return found
