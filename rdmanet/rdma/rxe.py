"""Soft-RoCE: one rxe device per attachment, on the pod's own interface.

Facts this is built on (docs/design/first-way.md, "RDMA"): the netdev must be in the pod's
namespace before rxe is made on it, as moving a netdev removes its rxe; names must be unique on the host; link add and
del race in the kernel's per-namespace socket teardown, so they are serialised. So does del with the end of the netdev
(Linux 7.3.4: rxe_net_del runs from nldev_dellink and from NETDEV_UNREGISTER, under different locks, and both may
release the socket), so a device is not deleted while its namespace may be ending.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from rdmanet.errors import ConflictError, KernelError, NotFoundError, UnavailableError
from rdmanet.model import Attachment, Backend, Device, RdmaMode
from rdmanet.rdma.backend import Condition, Enter, Namespaces, RdmaNetlink, Reading, condition, describe

#: The first Linux release whose rxe has a UDP 4791 socket per network namespace; older ones make a device in a pod
#: that no packet reaches.
SHARED_RELEASE = (7, 1)
#: The first that can also move a device into a namespace, as exclusive mode needs.
EXCLUSIVE_RELEASE = (7, 3)


def wanted_release(mode: RdmaMode) -> tuple[int, int]:
    """The oldest Linux release that can give a pod its own Soft-RoCE device in this mode."""
    return SHARED_RELEASE if mode is RdmaMode.SHARED else EXCLUSIVE_RELEASE


class RxeBackend:
    """``mode`` is the host's RDMA namespace mode, which is read and never set. ``remove_link`` removes a link of the
    host by name, if it is there, and returns when it is gone."""

    name = Backend.RXE

    def __init__(self, namespaces: Namespaces, mode: RdmaMode, remove_link: Callable[[str], None]):
        self.mode = mode
        self._namespaces = namespaces
        self._remove_link = remove_link
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
                self._remove(attachment, descriptor)
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
        return describe(pod, device, self.name, self.mode)

    def find(self, attachment: Attachment, descriptor: int) -> Device | None:
        """See ``DeviceBackend``."""
        with self._seeing(descriptor) as rdma:
            found = rdma.device(attachment.device_name)
            return None if found is None else describe(rdma, found, self.name, self.mode)

    def remove(self, attachment: Attachment, descriptor: int | None) -> None:
        """See ``DeviceBackend``. Without the pod's namespace the veth pair goes too, and with it what is left of the
        device."""
        with self._lock:
            self._remove(attachment, descriptor)

    def _remove(self, attachment: Attachment, descriptor: int | None) -> None:
        name = attachment.device_name
        if descriptor is None:
            # The kernel may be taking the namespace apart at this moment. It and the removal of a link take turns
            # (RTNL): once the link is gone, the kernel is done with the device's sockets.
            self._remove_link(attachment.host_ifname)
        else:
            with self._namespaces.inside(descriptor) as pod:
                device = pod.device(name)
                if device is not None:
                    pod.delete_link(device.index)
                    return
        with self._namespaces.here() as host:
            device = host.device(name)
            if device is not None:
                host.delete_link(device.index)

    def _seeing(self, descriptor: int) -> RdmaNetlink:
        """Where the pod's device is seen: in shared mode everywhere, and a thread need not enter the pod."""
        if self.mode is RdmaMode.SHARED:
            return self._namespaces.here()
        return self._namespaces.inside(descriptor)

    def examine(self, attachment: Attachment, device: Device, descriptor: int) -> Condition:
        """See ``DeviceBackend``."""
        if device.backend is not self.name:
            return Condition(device, f"the configuration no longer gives pods {device.name} (rdma.backend)")
        with self._seeing(descriptor) as rdma:
            return condition(rdma, device)

    def host_device(self) -> Condition | None:
        """See ``DeviceBackend``."""
        return None

    def netdev(self, attachment: Attachment) -> str | None:
        """See ``DeviceBackend``. The host's end has a carrier while both ends are up."""
        return attachment.host_ifname

    def holders(self, device: Device, descriptor: int) -> dict[int, int]:
        """See ``DeviceBackend``."""
        with self._seeing(descriptor) as rdma:
            return {pair.qpn: pair.pid or 0 for pair in rdma.queue_pairs(device.index)}

    def read(self, attachments: Sequence[Attachment], enter: Enter) -> dict[int, Reading]:
        """See ``DeviceBackend``. In exclusive mode each pod is entered for it."""
        indexes = {one.id: one.device.index for one in attachments if one.device is not None}
        if self.mode is RdmaMode.SHARED:
            found = zip(indexes, self._namespaces.readings(list(indexes.values())), strict=True)
            return {number: reading for number, reading in found if reading is not None}
        readings = {}
        for attachment in attachments:
            with enter(attachment) as descriptor:
                if descriptor is None or attachment.id not in indexes:
                    continue
                (reading,) = self._namespaces.readings([indexes[attachment.id]], descriptor)
            if reading is not None:
                readings[attachment.id] = reading
        return readings
