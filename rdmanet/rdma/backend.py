"""What a device back end is, and what it needs from netlink.

A back end makes a device for an attachment and takes it away again. Today there is Soft-RoCE (``rxe``); a host's
device shared by
pods and virtual functions come as further classes here, chosen in ``rdmanet.agent``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from rdmanet.model import Attachment, Device, RdmaMode


class _Named(Protocol):
    @property
    def index(self) -> int: ...
    @property
    def name(self) -> str: ...


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
    def add_rxe(self, name: str, netdev: str) -> None: ...
    def delete_link(self, index: int) -> bool: ...
    def move(self, index: int, descriptor: int) -> None: ...
    def character_device(self, index: int) -> _CharacterDevice: ...
    def queue_pairs(self, index: int) -> Sequence[_QueuePair]: ...


class Namespaces(Protocol):
    """Opens RDMA netlink for the host's namespace or for a pod's."""

    def here(self) -> RdmaNetlink: ...
    def inside(self, descriptor: int) -> RdmaNetlink: ...


class DeviceBackend(Protocol):
    """Synchronous, called from worker threads; thread-safe."""

    name: str
    mode: RdmaMode

    def create(self, attachment: Attachment, descriptor: int) -> Device:
        """Makes the attachment's device; ``descriptor`` is the pod's network namespace. Leaves nothing behind on
        failure.
        """

    def remove(self, attachment: Attachment, descriptor: int | None) -> None:
        """Takes it away, also half-made; ``descriptor`` is None where the pod's namespace is gone. Idempotent."""

    def present(self, device: Device, descriptor: int) -> bool:
        """Whether the pod still has the device that ``create`` returned."""

    def holders(self, device: Device, descriptor: int) -> dict[int, int]:
        """Of each queue pair, by QPN, the host's pid of the thread that made it; 0 where the kernel does not say."""
