"""What a device back end is, and what it needs from netlink.

A back end gives an attachment a device and takes it away again: Soft-RoCE of its own (``rxe``), a device of the host
that pods share (``shared``). Virtual functions come as a third class here, chosen in ``rdmanet.devices``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol

from rdmanet.errors import KernelError, NotFoundError, UnavailableError
from rdmanet.model import Attachment, Backend, Device, IPAddress, RdmaMode


class _Named(Protocol):
    @property
    def index(self) -> int: ...
    @property
    def name(self) -> str: ...


class _Port(Protocol):
    @property
    def device(self) -> str: ...
    @property
    def active(self) -> bool: ...
    @property
    def netdev(self) -> str | None: ...


class _CharacterDevice(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def major(self) -> int: ...
    @property
    def minor(self) -> int: ...


class _QueuePair(Protocol):
    @property
    def qpn(self) -> int: ...
    @property
    def pid(self) -> int | None: ...


class RdmaNetlink(Protocol):
    """RDMA netlink as seen from one namespace (``rdmanet.netlink.nldev.RdmaSocket``)."""

    def __enter__(self) -> RdmaNetlink: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def mode(self) -> RdmaMode: ...
    def device(self, name: str) -> _Named | None: ...
    def port(self, index: int) -> _Port | None: ...
    def add_rxe(self, name: str, netdev: str) -> None: ...
    def delete_link(self, index: int) -> bool: ...
    def move(self, index: int, descriptor: int) -> None: ...
    def character_device(self, index: int) -> _CharacterDevice: ...
    def queue_pairs(self, index: int) -> Sequence[_QueuePair]: ...


class Reading(Protocol):
    """Whether a device's port is active, and what it has counted, by its driver's names."""

    @property
    def port_active(self) -> bool: ...
    @property
    def events(self) -> dict[str, int]: ...


class Namespaces(Protocol):
    """Opens RDMA netlink for the host's namespace or for a pod's."""

    def here(self) -> RdmaNetlink: ...
    def inside(self, descriptor: int) -> RdmaNetlink: ...
    def readings(self, indexes: Sequence[int], descriptor: int | None = None) -> Sequence[Reading | None]: ...


#: A descriptor of the attachment's namespace for a while, or None where that is gone.
Enter = Callable[[Attachment], AbstractContextManager[int | None]]


class Lending(Protocol):
    """Pods' addresses on a netdev of the host (``rdmanet.netlink.lent.LentAddresses``)."""

    def lend(self, netdev: str, addresses: Iterable[IPAddress]) -> None: ...
    def take_back(self, netdev: str, addresses: Iterable[IPAddress]) -> None: ...


@dataclass(frozen=True, slots=True)
class Condition:
    """How an attachment's device was found: the device as it is now, and whether its port is active. ``problem`` is a
    sentence without its end: why it cannot be used, None where it can. ``gone``: nothing of it is left, ``leaving``:
    nobody can open it any more."""

    device: Device
    problem: str | None
    port_active: bool = False
    gone: bool = False
    leaving: bool = False


class DeviceBackend(Protocol):
    """Synchronous, called from worker threads; thread-safe. ``descriptor`` is the pod's network namespace."""

    name: Backend
    mode: RdmaMode

    def create(self, attachment: Attachment, descriptor: int) -> Device:
        """Gives the attachment a device. Leaves nothing behind on failure."""

    def find(self, attachment: Attachment, descriptor: int) -> Device | None:
        """The device that ``create`` gave it, by what the kernel shows; for a database that was lost."""

    def remove(self, attachment: Attachment, descriptor: int | None) -> None:
        """Takes it away, also half-made; ``descriptor`` is None where the pod's namespace is gone. Idempotent."""

    def examine(self, attachment: Attachment, device: Device, descriptor: int) -> Condition:
        """What has become of the device that ``create`` returned; puts right what is the back end's own to keep."""

    def host_device(self) -> Condition | None:
        """The device that is there before any attachment, as it is now; None where each gets its own.

        Raises UnavailableError where it should be there and is not.
        """

    def netdev(self, attachment: Attachment) -> str | None:
        """The host's netdev without whose carrier the device's port is down; None where it is not known."""

    def holders(self, device: Device, descriptor: int) -> dict[int, int]:
        """Of each queue pair, by QPN, the host's pid of the thread that made it; 0 where the kernel does not say."""

    def read(self, attachments: Sequence[Attachment], enter: Enter) -> dict[int, Reading]:
        """What the attachments' devices show by now, by attachment id; those that are gone are left out."""


def describe(rdma: RdmaNetlink, found: _Named, backend: Backend, mode: RdmaMode) -> Device:
    """The device that netlink has found, with its node."""
    node = rdma.character_device(found.index)
    return Device(
        name=found.name,
        backend=backend,
        mode=mode,
        index=found.index,
        uverbs=node.name,
        major=node.major,
        minor=node.minor,
    )


def condition(rdma: RdmaNetlink, device: Device) -> Condition:
    """What has become of a device: asked by its index, and where that is another's or nobody's by its name."""
    missing = Condition(device, f"its RDMA device {device.name} is missing")
    port = rdma.port(device.index)
    if port is not None and port.device == device.name:
        try:
            rdma.character_device(device.index)
        except (KernelError, NotFoundError, UnavailableError):
            # Its removal waits for those who have it open (rxe of Linux 6.1); nobody can open it any more.
            return replace(missing, leaving=True)
        return Condition(device, None, port.active)
    found = rdma.device(device.name)
    port = None if found is None else rdma.port(found.index)
    if found is None or port is None:
        return replace(missing, gone=found is None, leaving=found is not None)
    again = describe(rdma, found, device.backend, device.mode)
    if (again.uverbs, again.major, again.minor) != (device.uverbs, device.major, device.minor):
        return Condition(
            device,
            f"its RDMA device {device.name} has come back as {again.uverbs} ({again.major}:{again.minor}), and the pod"
            f" has {device.uverbs} ({device.major}:{device.minor})",
        )
    return Condition(again, None, port.active)
