"""Two pods for tests of leases: namespaces joined by a veth pair, an rxe each, a real broker on the real guard map.

No agent and no steering programs: what is tested here is the library, the broker and their protocol. Both pods'
programs run in threads of the test's process that have entered the pod's namespace, each with an event loop of its
own; where a process has to die, it is a child (``PodProcess``).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from rdmanet import verbs
from rdmanet.broker.server import BrokerServer
from rdmanet.broker.values import Effect, PodView
from rdmanet.datapath.artifact import Artifact
from rdmanet.datapath.maps import Datapath
from rdmanet.devices import remove_link
from rdmanet.errors import UnavailableError
from rdmanet.lease import SOCKET_NAME
from rdmanet.model import Attachment, AttachmentState, Device, IPAddress, PodName, address_key
from rdmanet.netlink import namespace
from rdmanet.netlink.nldev import RdmaSocket
from rdmanet.rdma.rxe import RxeBackend, wanted_release
from rdmanet.verbs.options import Options
from rdmanet.verbs.queue_pair import QueuePair
from testbed.paths import BUILD, REPOSITORY

T = TypeVar("T")
U = TypeVar("U")
_numbers = itertools.count(1)

BPFFS = Path("/sys/fs/bpf")


@dataclass
class LabPod:
    """One pod: its namespace and, where it has one, its device."""

    name: PodName
    path: Path
    descriptor: int
    attachment: Attachment
    device: Device | None
    cookie: int
    unhealthy: str | None = None  # as the agent would say it

    @property
    def ipv4(self) -> str:
        return str(self.attachment.ipv4)

    @property
    def ipv6(self) -> str:
        return str(self.attachment.ipv6)

    def view(self, max_leases: int) -> PodView:
        keys = tuple(address_key(address) for address in self.attachment.addresses)
        return PodView(self.name, keys, self.device, max_leases, unhealthy=self.unhealthy)

    async def run(self, program: Callable[[], Coroutine[None, None, T]]) -> T:
        """Run a coroutine on an event loop of its own, in a thread inside the pod's namespace."""
        return await asyncio.to_thread(
            namespace.run_inside, self.descriptor, lambda: asyncio.run(program(), debug=False)
        )


class LabDirectory:
    """Directory and QueuePairs of the broker, from the lab's pods."""

    def __init__(self, pods: list[LabPod], backend: RxeBackend):
        self.pods = pods
        self.max_leases = 64
        self._backend = backend

    def by_cookie(self, cookie: int) -> PodView | None:
        return self._find(lambda pod: pod.cookie == cookie)

    def by_name(self, name: PodName) -> PodView | None:
        return self._find(lambda pod: pod.name == name)

    def by_address(self, address: bytes) -> PodView | None:
        return self._find(lambda pod: address in pod.view(0).addresses)

    def _find(self, wanted: Callable[[LabPod], bool]) -> PodView | None:
        return next((pod.view(self.max_leases) for pod in self.pods if wanted(pod)), None)

    async def holders(self, device: Device) -> dict[int, int]:
        pod = next(pod for pod in self.pods if pod.device == device)
        return await asyncio.to_thread(self._backend.holders, device, pod.descriptor)


class WatchedBroker(BrokerServer):
    """A broker that says when something may have changed."""

    def __init__(self, directory: LabDirectory, guard: Datapath, **options: Any):
        self.changed = asyncio.Event()
        super().__init__(directory, guard, directory, **options)

    def _apply(self, effects: list[Effect]) -> None:
        super()._apply(effects)
        self.changed.set()


class Lab:
    """The pods, the pinned guard map, and a broker that can be stopped and replaced."""

    def __init__(self, pods: list[LabPod], backend: RxeBackend, pins: Path):
        self.pods = pods
        self.directory = LabDirectory(pods, backend)
        self.seconds: list[float] = []
        self._pins = pins
        self._datapath: Datapath | None = None
        self._broker: WatchedBroker | None = None

    @property
    def broker(self) -> WatchedBroker:
        assert self._broker is not None
        return self._broker

    @property
    def guard(self) -> Datapath:
        assert self._datapath is not None
        return self._datapath

    async def start_broker(self, *, grace_s: float = 30.0) -> WatchedBroker:
        """A new broker on the pinned maps, as a new agent would have it."""
        self._datapath = Datapath.open(Artifact.load(BUILD / "artifact"), self._pins)
        self._broker = WatchedBroker(
            self.directory, self._datapath, grace_s=grace_s, observe_granted=self.seconds.append
        )
        await self._broker.start()
        for pod in self.pods:
            sock = namespace.run_inside(
                pod.descriptor, lambda: namespace.abstract_listener(SOCKET_NAME.removeprefix("\0"))
            )
            await self._broker.add_listener(sock, pod.cookie)
        await self._broker.adopt()
        return self._broker

    async def wait_for_states(self, **wanted: int) -> None:
        """Wait until exactly so many leases are in these states, and none in others."""

        await self._wait(lambda: {s: n for s, n in self.broker.states().items() if n} == wanted)

    async def wait_for_listener(self, service: str) -> None:
        """Wait until somebody listens on ``service``."""
        await self._wait(lambda: service in [name for _, name in self.broker.services()])

    async def _wait(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(120):
            while not reached():
                self.broker.changed.clear()
                await self.broker.changed.wait()

    async def stop_broker(self) -> None:
        if self._broker is not None:
            await self._broker.stop()
            self._broker = None
        if self._datapath is not None:
            self._datapath.close()
            self._datapath = None


def backend() -> RxeBackend:
    """Soft-RoCE in the mode of this machine; skips, saying what is missing, where it cannot be in a namespace."""
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    if not (BUILD / "artifact").is_dir():
        pytest.skip("needs the compiled datapath: make setup")
    try:
        with RdmaSocket.here() as rdma:
            mode = rdma.mode()
    except UnavailableError as error:
        pytest.skip(f"needs RDMA: {error.sentence}")
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split("+")[0].split(".")[:2])
    if release < wanted_release(mode):
        pytest.skip(f"needs Linux {wanted_release(mode)} for rxe in a namespace in {mode} mode")
    return RxeBackend(RdmaSocket, mode, remove_link)


@contextlib.contextmanager
def lab(*, mtu_bytes: int = 1500) -> Iterator[Lab]:
    """Pods train-0 and train-1 with a device each, and web-0 without; all is gone afterwards."""
    rxe = backend()
    with contextlib.ExitStack() as stack:
        names = ["train-0", "train-1", "web-0"]
        paths = {name: Path(f"/run/netns/lab-{os.getpid()}-{name}") for name in names}
        descriptors = {}
        for name, path in paths.items():
            subprocess.run(["ip", "netns", "add", path.name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "delete", path.name], check=True)
            descriptors[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptors[name])
        link = ["ip", "-n", paths["train-0"].name, "link", "add", "eth0", "mtu", str(mtu_bytes)]
        peer = ["type", "veth", "peer", "name", "eth0", "mtu", str(mtu_bytes), "netns", paths["train-1"].name]
        subprocess.run([*link, *peer], check=True)
        pods = []
        for number, name in enumerate(names, start=1):
            pods.append(_pod(number, name, paths[name], descriptors[name], rxe, mtu_bytes, stack))
        pins = BPFFS / f"lease-lab-{os.getpid()}"
        stack.callback(Datapath.remove, pins)
        yield Lab(pods, rxe, pins)


def _pod(
    number: int, name: str, path: Path, descriptor: int, rxe: RxeBackend, mtu_bytes: int, stack: contextlib.ExitStack
) -> LabPod:
    attachment = Attachment(
        id=9000 + number,
        container_id=name,
        ifname="eth0",
        network="lab",
        netns=str(path),
        netns_id=namespace.identify(descriptor),
        pod=PodName("default", name),
        state=AttachmentState.READY,
        mac=f"02:72:00:00:00:{number:02x}",
        mtu_bytes=mtu_bytes,
        ipv4=ipaddress.IPv4Address(f"10.213.8.{number}"),
        ipv6=ipaddress.IPv6Address(f"fd00:213::{number}"),
        wants_rdma=name.startswith("train"),
    )
    device = None
    if attachment.wants_rdma:
        for command in (
            ["addr", "add", f"{attachment.ipv4}/24", "dev", "eth0"],
            ["addr", "add", f"{attachment.ipv6}/64", "dev", "eth0", "nodad"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
        ):
            subprocess.run(["ip", "-n", path.name, *command], check=True)
        device = rxe.create(attachment, descriptor)
        stack.callback(rxe.remove, attachment, descriptor)
    sock = namespace.run_inside(descriptor, lambda: namespace.abstract_listener("lab-cookie"))
    with sock:
        cookie = namespace.cookie(sock)
    return LabPod(attachment.pod, path, descriptor, attachment, device, cookie)


class PodProcess:
    """A program of a pod in a process of its own, which prints lines and can be killed."""

    def __init__(self, pod: LabPod, program: str, *, wrapper: Sequence[str] = ()):
        self.child = subprocess.Popen(
            ["ip", "netns", "exec", pod.path.name, *wrapper, sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )

    async def line(self) -> str:
        """Its next line."""
        assert self.child.stdout is not None
        return (await asyncio.to_thread(self.child.stdout.readline)).rstrip()

    def kill(self) -> None:
        """SIGKILL; ``ip netns exec`` has become the program by now."""
        self.child.kill()
        self.child.wait()

    def __enter__(self) -> PodProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        for pipe in (self.child.stdin, self.child.stdout):
            if pipe is not None:
                pipe.close()


class Baton:
    """A value that one thread hands to another; waited for on an event loop."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def pass_on(self) -> None:
        self._event.set()

    async def taken(self) -> None:
        assert await asyncio.to_thread(self._event.wait, 60), "the other side did not come so far within 60 s"


async def pair(
    lab: Lab,
    listening: Callable[[QueuePair], Awaitable[T]],
    connecting: Callable[[QueuePair], Awaitable[U]],
    *,
    options: Options | None = None,
    listener_options: Options | None = None,
    address: IPAddress | None = None,
) -> tuple[T, U]:
    """Lease a queue pair from train-0 to train-1 and run a program on each end; their results."""
    baton, service = Baton(), f"service-{next(_numbers)}"

    async def listener() -> T:
        async with await verbs.listen(service, options=listener_options or options, timeout_s=60) as found:
            baton.pass_on()
            async with await found.accept() as qp:
                return await listening(qp)

    async def connector() -> U:
        await baton.taken()
        target = f"{lab.pods[1].name.name}:{service}"
        async with await verbs.connect(target, options=options, address=address, timeout_s=60) as qp:
            return await connecting(qp)

    first, second = await asyncio.gather(lab.pods[1].run(listener), lab.pods[0].run(connector))
    return first, second
