"""The pods of this host as the broker knows them, and the lease sockets inside their namespaces.

A pod is one network namespace; attachments come and go in worker threads, the broker asks on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Collection, Coroutine, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Protocol

from rdmanet.broker.values import PodView
from rdmanet.errors import NotFoundError, UnavailableError
from rdmanet.lease import SOCKET_NAME
from rdmanet.model import Attachment, Device, NetnsId, PodName, address_key
from rdmanet.netlink import namespace
from rdmanet.netlink.namespace import Listening
from rdmanet.rdma.backend import DeviceBackend

log = logging.getLogger(__name__)

#: A thread that waits for the event loop waits at most this long; the loop never blocks.
LOOP_TIMEOUT_S = 10.0
TAKEN = "a process in the pod holds the lease socket's name @rdmanet; its leases cannot work"


class LeaseServer(Protocol):
    """``rdmanet.broker.server.BrokerServer``, as seen from here."""

    async def add_listener(self, sock: socket.socket, cookie: int) -> None: ...
    async def remove_listener(self, cookie: int) -> None: ...
    async def pod_gone(self, name: PodName, addresses: Collection[bytes], cookie: int | None) -> None: ...


Call = Callable[[LeaseServer], Coroutine[object, object, None]]


def _log_failure(future: Future[None]) -> None:
    error = None if future.cancelled() else future.exception()
    if error is not None:
        log.error("A pod's lease socket is not served; its leases cannot work: %s", error)


@dataclass(eq=False)
class _Pod:
    attachments: list[Attachment] = field(default_factory=list)
    cookie: int | None = None  # None: somebody else holds the socket's name
    degraded: str | None = None


class _Index:
    """Which pod a cookie, a name, an address or a device leads to: asked for every lease, among thousands of pods."""

    def __init__(self) -> None:
        self.netns: dict[NetnsId, _Pod] = {}
        self.cookie: dict[int, _Pod] = {}
        self.name: dict[PodName, list[_Pod]] = {}
        self.address: dict[bytes, _Pod] = {}
        self.device: dict[Device, dict[int, Attachment]] = {}  # several where they share it
        self.with_device: Mapping[int, Attachment] = {}  # another object after each change

    def add(self, attachment: Attachment) -> _Pod:
        """The attachment's pod, which has it from now on, in the place of one with its id."""
        pod = self.netns.setdefault(attachment.netns_id, _Pod())
        self._take_out(pod, attachment.id)
        pod.attachments.append(attachment)
        named = self.name.setdefault(attachment.pod, [])
        if pod not in named:
            named.append(pod)
        for address in attachment.addresses:
            self.address[address_key(address)] = pod
        if attachment.device is not None:
            self.device.setdefault(attachment.device, {})[attachment.id] = attachment
            self.with_device = {**self.with_device, attachment.id: attachment}
        return pod

    def remove(self, attachment: Attachment) -> _Pod | None:
        """The attachment's pod, if that was its last one."""
        pod = self.netns.get(attachment.netns_id)
        if pod is None:
            return None
        self._take_out(pod, attachment.id)
        if pod.attachments:
            return None
        del self.netns[attachment.netns_id]
        if pod.cookie is not None:
            del self.cookie[pod.cookie]
        return pod

    def _take_out(self, pod: _Pod, attachment_id: int) -> None:
        for old in [one for one in pod.attachments if one.id == attachment_id]:
            pod.attachments.remove(old)
            if not any(one.pod == old.pod for one in pod.attachments):
                self.name[old.pod].remove(pod)
                if not self.name[old.pod]:
                    del self.name[old.pod]
            for key in map(address_key, old.addresses):
                if self.address.get(key) is pod:
                    del self.address[key]
            if old.id in self.with_device:
                self.with_device = {key: one for key, one in self.with_device.items() if key != old.id}
            if old.device is not None and old.id in self.device.get(old.device, {}):
                del self.device[old.device][old.id]
                if not self.device[old.device]:
                    del self.device[old.device]


class Pods:
    """``rdmanet.steps.Listeners``, ``rdmanet.broker.core.Directory`` and ``QueuePairs`` in one."""

    def __init__(self, devices: DeviceBackend | None, executor: Executor):
        self._devices = devices
        self._executor = executor
        self._lock = threading.RLock()
        self._pods = _Index()
        self._unhealthy: dict[int, str] = {}  # by attachment id
        self._server: LeaseServer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: Callable[[], None] = lambda: None

    def tell(self, changed: Callable[[], None]) -> None:
        """Who is told when attachments come or go, or a device's health is another; from any thread."""
        self._changed = changed

    def serve_with(self, server: LeaseServer, loop: asyncio.AbstractEventLoop) -> None:
        """Says who takes the listening sockets; called once, before any attachment."""
        self._server = server
        self._loop = loop

    def _begin_on_loop(self, call: Call) -> Future[None]:
        assert self._server is not None
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(call(self._server), self._loop)

    def _on_loop(self, call: Call) -> None:
        try:
            self._begin_on_loop(call).result(LOOP_TIMEOUT_S)
        except TimeoutError as error:
            raise UnavailableError(
                f"The agent's lease server did not answer within {LOOP_TIMEOUT_S:g} s; ask again, and look into the"
                " agent's log.",
                operation="lease listener",
            ) from error

    # Listeners, from worker threads

    def listen(self, netns: NetnsId) -> Listening:
        """See ``rdmanet.steps.Listeners``."""
        with self._lock:
            pod = self._pods.netns.get(netns)
            if pod is not None and pod.cookie is not None:
                return Listening()
        return namespace.listen(SOCKET_NAME.removeprefix("\0"))

    def open(self, *opened: tuple[Attachment, Listening]) -> None:
        """See ``rdmanet.steps.Listeners``."""
        new: list[tuple[socket.socket, int]] = []
        for attachment, listening in opened:
            with self._lock:
                pod = self._pods.add(attachment)
                if pod.cookie is not None:
                    listening.close()
                    continue
                # The pod's own process took the name: the pod harms itself and nobody else.
                pod.degraded = TAKEN if listening.taken else None
                if listening.sock is not None:
                    pod.cookie = namespace.cookie(listening.sock)
                    self._pods.cookie[pod.cookie] = pod
                    new.append((listening.sock, pod.cookie))
            if pod.degraded:
                log.warning("%s: %s", attachment.pod, pod.degraded)

        async def serve(server: LeaseServer) -> None:
            for sock, cookie in new:
                await server.add_listener(sock, cookie)

        if new:
            # Not waited for: the loop takes this before the answer of the ADD, and before a close.
            self._begin_on_loop(serve).add_done_callback(_log_failure)
        self._changed()

    def close(self, attachment: Attachment) -> None:
        """See ``rdmanet.steps.Listeners``."""
        with self._lock:
            ended = self._pods.remove(attachment)
            self._unhealthy.pop(attachment.id, None)
        cookie = ended.cookie if ended is not None else None
        # Also for an attachment that is not known (any more): its addresses are about to be free for others.
        keys = tuple(address_key(address) for address in attachment.addresses)

        async def end(server: LeaseServer) -> None:
            if cookie is not None:
                await server.remove_listener(cookie)
            await server.pod_gone(attachment.pod, keys, cookie)

        self._changed()
        self._on_loop(end)

    def degraded(self) -> dict[NetnsId, str]:
        """Pods whose lease socket could not be made, with the sentence why."""
        with self._lock:
            return {key: pod.degraded for key, pod in self._pods.netns.items() if pod.degraded}

    # Devices and their health

    def with_device(self) -> Mapping[int, Attachment]:
        """The attachments that have a device, by id; the same object for as long as nothing changes."""
        with self._lock:
            return self._pods.with_device

    def set_health(self, attachment: Attachment, problem: str | None) -> bool:
        """What was found of an attachment's device, and with it the device as it is now; whether that is news. False
        also where the attachment is gone."""
        with self._lock:
            before = self._pods.with_device.get(attachment.id)
            if before is None:
                return False
            if before.device != attachment.device:
                self._pods.add(attachment)
            news = self._unhealthy.get(attachment.id) != problem
            if problem is None:
                self._unhealthy.pop(attachment.id, None)
            else:
                self._unhealthy[attachment.id] = problem
        if news:
            self._changed()
        return news

    def unhealthy(self) -> dict[int, str]:
        """Why devices cannot be used, by attachment id."""
        with self._lock:
            return dict(self._unhealthy)

    def cookie(self, attachment: Attachment) -> int | None:
        """The cookie of the network namespace whose leases are of this attachment's device, if there is one."""
        with self._lock:
            pod = self._pods.netns.get(attachment.netns_id)
            if pod is None:
                return None
            first = next((a for a in pod.attachments if a.device is not None), None)
            return pod.cookie if first is not None and first.id == attachment.id else None

    # Directory, from the event loop

    def by_cookie(self, cookie: int) -> PodView | None:
        """The pod whose namespace has this cookie."""
        with self._lock:
            pod = self._pods.cookie.get(cookie)
            return None if pod is None else self._view(pod)

    def netns_of(self, cookie: int) -> NetnsId | None:
        """The network namespace of the pod with this cookie."""
        with self._lock:
            pod = self._pods.cookie.get(cookie)
            return None if pod is None else pod.attachments[-1].netns_id

    def by_name(self, name: PodName) -> PodView | None:
        """The pod of that name; the newest where a runtime re-created one before the old was gone."""
        with self._lock:
            found = self._pods.name.get(name)
            return None if not found else self._view(max(found, key=lambda pod: pod.attachments[-1].id))

    def by_address(self, address: bytes) -> PodView | None:
        """The pod that has this address key."""
        with self._lock:
            pod = self._pods.address.get(address)
            return None if pod is None else self._view(pod)

    def _view(self, pod: _Pod) -> PodView:
        with_device = [a for a in pod.attachments if a.device is not None] or pod.attachments
        first = with_device[0]  # whose device it is
        return PodView(
            name=pod.attachments[-1].pod,
            addresses=tuple(address_key(address) for a in with_device for address in a.addresses),
            device=first.device,
            unhealthy=f"{first.pod}: {problem}" if (problem := self._unhealthy.get(first.id)) else None,
            max_leases=first.max_leases,
            traffic_class=first.traffic_class,
            service_level=first.service_level,
        )

    # QueuePairs, from the event loop

    async def holders(self, device: Device) -> Mapping[int, int]:
        """The host's pids of the threads that made the queue pairs on a pod's device, by QPN."""
        with self._lock:
            attachments = list(self._pods.device.get(device, {}).values())
        if self._devices is None:
            return {}
        devices = self._devices

        def ask() -> Mapping[int, int]:
            for attachment in attachments:
                try:
                    with namespace.opened(attachment.netns) as descriptor:
                        return devices.holders(device, descriptor)
                except NotFoundError:
                    continue  # its namespace is gone, or the device
            return {}

        return await asyncio.get_running_loop().run_in_executor(self._executor, ask)
