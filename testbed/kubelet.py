"""A stand-in for kubelet: the device manager's half of the device plugin protocol, and PodResources, over real sockets.

It does in kubelet's order what kubelet does (pkg/kubelet/cm/devicemanager): at a start it removes every socket in its
directory and makes its own; it connects to a plugin before it answers its registration, reads its list for as long as
it lasts, and gives a container devices that are healthy and nobody's. What it gave outlives its restarts, as by
kubelet's checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rdmanet.errors import RdmanetError
from rdmanet.kubelet import rpc
from rdmanet.kubelet.messages import DEVICE_PLUGIN_VERSION, HEALTHY, device_plugin, message
from rdmanet.model import PodName

T = TypeVar("T")

WAIT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
#: Of a channel whose reader is slow: HTTP/2's first window (RFC 9113 6.9.2) for good, which gRPC would enlarge.
SLOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65535))


class AdmissionError(RdmanetError):
    """Kubelet refuses a pod (UnexpectedAdmissionError)."""


@dataclass(eq=False)
class Endpoint:
    """A plugin that has registered; ``ended`` when its list has come to an end."""

    resource: str
    name: str
    preferred: bool
    channel: Any
    devices: dict[str, Any] = field(default_factory=dict)
    lists: int = 0
    ended: bool = False
    reading: asyncio.Task[None] | None = None


@dataclass
class Kubelet:
    """Below ``root``: ``device-plugins/kubelet.sock`` and ``pod-resources/kubelet.sock``."""

    root: Path
    endpoints: dict[str, Endpoint] = field(default_factory=dict)  # by resource
    registrations: list[str] = field(default_factory=list)  # endpoints' names, oldest first
    #: Pod → container → ids, of one resource each; the checkpoint.
    given: dict[PodName, dict[str, tuple[str, list[str]]]] = field(default_factory=dict)
    #: Says no to registrations with this, if anything.
    refusal: str = ""
    refused: int = 0
    #: Whether answers of PodResources wait until it is set.
    answering: asyncio.Event = field(default_factory=asyncio.Event)
    asked: int = 0
    #: Refuses so many questions by its limiter.
    limited: int = 0

    def __post_init__(self) -> None:
        self.answering.set()
        self._changed = asyncio.Condition()
        self._admitting = asyncio.Lock()
        self._servers: list[Any] = []

    @property
    def plugins(self) -> Path:
        """The directory of plugins' sockets."""
        return self.root / "device-plugins"

    @property
    def pod_resources(self) -> Path:
        """The socket that tells which devices pods have."""
        return self.root / "pod-resources/kubelet.sock"

    # Life

    async def start(self) -> None:
        """As kubelet starts: old sockets go, its own come."""
        self.plugins.mkdir(parents=True, exist_ok=True)
        self.pod_resources.parent.mkdir(parents=True, exist_ok=True)
        for path in self.plugins.iterdir():
            if path.is_socket():
                path.unlink()
        services = (
            (self.plugins / "kubelet.sock", "v1beta1.Registration", {"Register": self._register}),
            (self.pod_resources, "v1.PodResourcesLister", {"List": self._list}),
        )
        for path, service, methods in services:
            server = rpc.server()
            server.add_generic_rpc_handlers((rpc.handlers(service, methods),))
            server.add_insecure_port(f"unix:{path}")
            await server.start()
            self._servers.append(server)

    async def stop(self) -> None:
        """Ends its servers and connections, and with them its sockets; what it gave is kept."""
        for endpoint in self.endpoints.values():
            await self._disconnect(endpoint)
        self.endpoints.clear()
        for server in self._servers:
            await server.stop(grace=None)
        self._servers.clear()
        for path in (self.plugins / "kubelet.sock", self.pod_resources):
            path.unlink(missing_ok=True)

    async def restart(self) -> None:
        """A kubelet after another."""
        await self.stop()
        await self.start()

    # Plugins

    async def _register(self, request: Any, context: Any) -> Any:
        if self.refusal:
            async with self._changed:
                self.refused += 1
                self._changed.notify_all()
            await context.abort(rpc.Code.UNKNOWN, self.refusal)
        if request.version != DEVICE_PLUGIN_VERSION:
            await context.abort(rpc.Code.UNKNOWN, f"requested API version {request.version!r} is not supported")
        socket = self.plugins / request.endpoint
        channel = rpc.channel(socket)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await channel.channel_ready()
        except TimeoutError:
            await channel.close()
            await context.abort(rpc.Code.UNKNOWN, f"failed to dial device plugin: {socket}")
        before = self.endpoints.get(request.resource_name)
        preferred = request.options.get_preferred_allocation_available
        endpoint = Endpoint(request.resource_name, request.endpoint, preferred, channel)
        endpoint.reading = asyncio.create_task(self._read(endpoint))
        async with self._changed:
            self.endpoints[request.resource_name] = endpoint
            self.registrations.append(request.endpoint)
            self._changed.notify_all()
        if before is not None:
            await self._disconnect(before)
        return device_plugin("Empty")

    async def _read(self, endpoint: Endpoint) -> None:
        try:
            stream = rpc.call(endpoint.channel, "v1beta1.DevicePlugin", "ListAndWatch")(device_plugin("Empty"))
            async for answer in stream:
                async with self._changed:
                    endpoint.devices = {device.ID: device for device in answer.devices}
                    endpoint.lists += 1
                    self._changed.notify_all()
        except rpc.Refusal:
            pass  # the plugin has gone
        async with self._changed:
            endpoint.ended = True
            self._changed.notify_all()

    async def _disconnect(self, endpoint: Endpoint) -> None:
        if endpoint.reading is not None:
            endpoint.reading.cancel()
            await asyncio.gather(endpoint.reading, return_exceptions=True)
        await endpoint.channel.close()

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for something that registrations and lists bring about; AdmissionError after a minute."""
        try:
            async with asyncio.timeout(WAIT_S), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            raise AdmissionError(f"kubelet waited {WAIT_S:g} s for {what}: {self.registrations}") from None

    def healthy(self, resource: str) -> list[str]:
        """Ids of devices that may be given; none where the plugin has gone."""
        endpoint = self.endpoints.get(resource)
        if endpoint is None or endpoint.ended:
            return []
        return [identity for identity, device in endpoint.devices.items() if device.health == HEALTHY]

    # Pods

    async def admit(self, pod: PodName, resource: str, count: int = 1, container: str = "main") -> Any:
        """Gives a container devices, to one after another as kubelet does; the plugin's answer.

        AdmissionError where kubelet refuses the pod.
        """
        async with self._admitting:
            return await self._admit(pod, resource, count, container)

    async def _admit(self, pod: PodName, resource: str, count: int, container: str) -> Any:
        endpoint = self.endpoints.get(resource)
        held = {
            one
            for containers in self.given.values()
            for name, ids in containers.values()
            if name == resource
            for one in ids
        }
        available = sorted(set(self.healthy(resource)) - held)
        if endpoint is None or len(available) < count:
            raise AdmissionError(f"requested {count} of {resource}, available {len(available)}")
        try:
            chosen = await self._choose(endpoint, available, count) if endpoint.preferred else available[:count]
            wish = device_plugin("AllocateRequest")
            wish.container_requests.add(devices_ids=chosen)
            answer = await rpc.call(endpoint.channel, "v1beta1.DevicePlugin", "Allocate")(wish)
        except rpc.Refusal as error:
            raise AdmissionError(f"Allocate failed due to {error.details()}", operation=error.code().name) from error
        self.given.setdefault(pod, {})[container] = (resource, list(chosen))
        return answer.container_responses[0]

    async def _choose(self, endpoint: Endpoint, available: Sequence[str], count: int) -> list[str]:
        wish = device_plugin("PreferredAllocationRequest")
        wish.container_requests.add(available_deviceIDs=available, allocation_size=count)
        answer = await rpc.call(endpoint.channel, "v1beta1.DevicePlugin", "GetPreferredAllocation")(wish)
        return list(answer.container_responses[0].deviceIDs)

    def slot_of(self, pod: PodName) -> str:
        """The one device of a pod's one container."""
        ((_, (identity,)),) = self.given[pod].values()
        return identity

    def forget(self, pod: PodName) -> None:
        """The pod has ended: what it had is free, whatever its sandbox does still."""
        self.given.pop(pod, None)

    def run_without(self, pod: PodName) -> None:
        """A pod of kubelet's that has no devices."""
        self.given.setdefault(pod, {})["main"] = ("", [])

    async def _list(self, request: Any, context: Any) -> Any:
        self.asked += 1
        await self.answering.wait()
        if self.limited:
            self.limited -= 1
            await context.abort(rpc.Code.RESOURCE_EXHAUSTED, "rejected by rate limit")
        answer = message("v1", "ListPodResourcesResponse")()
        for pod, containers in self.given.items():
            found = answer.pod_resources.add(name=pod.name, namespace=pod.namespace)
            for container, (resource, ids) in containers.items():
                devices = found.containers.add(name=container).devices
                if ids:
                    devices.add(resource_name=resource, device_ids=ids)
        return answer


@contextlib.asynccontextmanager
async def started(root: Path) -> AsyncIterator[Kubelet]:
    """A kubelet below a directory."""
    kubelet = Kubelet(root)
    await kubelet.start()
    try:
        yield kubelet
    finally:
        await kubelet.stop()


class Loop:
    """A kubelet on a thread of its own, for callers without an event loop; ``do`` carries something out there."""

    def __init__(self, root: Path):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kubelet", daemon=True)
        self._thread.start()
        self.root = root

        async def make() -> Kubelet:
            made = Kubelet(root)
            await made.start()
            return made

        self.kubelet = self.do(make())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result, or what it raises."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(2 * WAIT_S)

    def call(self, work: Callable[[], T]) -> T:
        """A plain function, on the kubelet's thread."""

        async def carried() -> T:
            return work()

        return self.do(carried())

    def close(self) -> None:
        """Ends kubelet and thread; removes its directories."""
        self.do(self.kubelet.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self.root, ignore_errors=True)


@contextlib.contextmanager
def running(root: Path) -> Iterator[Loop]:
    """``Loop``, closed in the end."""
    loop = Loop(root)
    try:
        yield loop
    finally:
        loop.close()
