"""Soft-RoCE: one rxe device per attachment, on the pod's own interface.

Facts this is built on (docs/design/first-way.md, "RDMA"): the netdev must be in the pod's
namespace before rxe is made on it, as moving a netdev removes its rxe; names must be unique on the host; link add and
del race in the kernel's per-namespace socket teardown, so they are serialised.
"""

from __future__ import annotations

import threading

from rdmanet.errors import ConflictError, KernelError, NotFoundError, UnavailableError
from rdmanet.model import Attachment, Device, RdmaMode
from rdmanet.rdma.backend import Namespaces, RdmaNetlink

#: The first Linux release whose rxe has a UDP 4791 socket per network namespace; older ones make a device in a pod
#: that no packet reaches.
SHARED_RELEASE = (7, 1)
#: The first that can also move a device into a namespace, as exclusive mode needs.
EXCLUSIVE_RELEASE = (7, 3)


def wanted_release(mode: RdmaMode) -> tuple[int, int]:
    """The oldest Linux release that can give a pod its own Soft-RoCE device in this mode."""
    return SHARED_RELEASE if mode is RdmaMode.SHARED else EXCLUSIVE_RELEASE


class RxeBackend:
    """``mode`` is the host's RDMA namespace mode, which is read and never set."""

    name = "rxe"

    def __init__(self, namespaces: Namespaces, mode: RdmaMode):
        self.mode = mode
        self._namespaces = namespaces
        self._lock = threading.Lock()

    def create(self, attachment: Attachment, descriptor: int) -> Device:
        """See ``DeviceBackend``. Takes about 65 ms in an emulated machine."""
        name = attachment.device_name
        with self._lock:
            with self._namespaces.inside(descriptor) as pod:
                try:
                    pod.add_rxe(name, attachment.ifname)
                except ConflictError as error:
                    raise ConflictError(
                        f"An RDMA device {name} exists already on this host, or {attachment.ifname} has one; remove"
                        f" it with `rdma link"
                        f" delete {name}`.",
                        operation=error.operation,
                        subject=name,
                        errno=error.errno,
                    ) from error
            try:
                if self.mode is RdmaMode.EXCLUSIVE:
                    self._move(name, descriptor)
                with self._namespaces.inside(descriptor) as pod:
                    return self._describe(pod, name)
            except KernelError:
                self._remove(name, descriptor)
                raise

    def _move(self, name: str, descriptor: int) -> None:
        # In exclusive mode a device is born in the initial namespace, wherever it was asked for.
        with self._namespaces.here() as host:
            device = host.device(name)
            if device is None:
                raise NotFoundError(f"The new RDMA device {name} is not there.", operation="NLDEV_GET", subject=name)
            try:
                host.move(device.index, descriptor)
            except KernelError as error:
                raise UnavailableError(
                    "This kernel cannot move a Soft-RoCE device into a pod (needs Linux 7.3); boot the host with"
                    " RDMA in shared mode"
                    " (`rdma system set netns shared` before any namespace exists).",
                    operation=error.operation,
                    subject=name,
                    errno=error.errno,
                ) from error

    def _describe(self, pod: RdmaNetlink, name: str) -> Device:
        device = pod.device(name)
        if device is None:
            raise NotFoundError(f"The new RDMA device {name} is not there.", operation="NLDEV_GET", subject=name)
        node = pod.character_device(device.index)
        return Device(
            name=name,
            backend=self.name,
            mode=self.mode,
            index=device.index,
            uverbs=node.name,
            major=node.major,
            minor=node.minor,
        )

    def remove(self, attachment: Attachment, descriptor: int | None) -> None:
        """See ``DeviceBackend``. Without the pod's namespace the device is gone with it, unless it never left ours."""
        with self._lock:
            self._remove(attachment.device_name, descriptor)

    def _remove(self, name: str, descriptor: int | None) -> None:
        if descriptor is not None:
            with self._namespaces.inside(descriptor) as pod:
                device = pod.device(name)
                if device is not None:
                    pod.delete_link(device.index)
                    return
        with self._namespaces.here() as host:
            device = host.device(name)
            if device is not None:
                host.delete_link(device.index)

    def present(self, device: Device, descriptor: int) -> bool:
        """See ``DeviceBackend``."""
        with self._namespaces.inside(descriptor) as pod:
            found = pod.device(device.name)
        return found is not None and found.index == device.index

    def holders(self, device: Device, descriptor: int) -> dict[int, int]:
        """See ``DeviceBackend``."""
        with self._namespaces.inside(descriptor) as pod:
            return {pair.qpn: pair.pid or 0 for pair in pod.queue_pairs(device.index)}
