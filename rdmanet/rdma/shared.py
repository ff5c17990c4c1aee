"""A device of the host that pods share: on any kernel, and with hardware NICs.

In the RDMA subsystem's shared mode a device can be used from every network namespace whose container has its node.
Each pod's GID is of the pod's own address, which is lent to the device's netdev (``rdmanet.netlink.lent``); the pod's
library finds it by the address.

What this does not do: packets between two pods loop inside the device and pass no hook of ours, and a process may use
any GID of the device. So the guard sees nothing, leases are decided and told by the broker alone, and pods that share
a device have to trust each other.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from rdmanet.errors import ExhaustedError, NotFoundError, RdmanetError, UnavailableError
from rdmanet.model import Attachment, Backend, Device, RdmaMode, address_key
from rdmanet.rdma.backend import Condition, Enter, Lending, Namespaces, RdmaNetlink, Reading, condition, describe

#: A GID comes some milliseconds after its address, from a queue of the kernel's (roce_gid_mgmt.c, gid_cache_wq).
GID_TIMEOUT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.1
#: Far more than can be deleted during one examination.
_REMEMBERED = 4096
_INFINIBAND = Path("/sys/class/infiniband")


class SharedBackend:
    """``device`` is the host's device by its name. ``netdev`` is the one that addresses are lent to, as recorded;
    ``record`` records another one before anything is done to it, and takes back what was done to the one before."""

    name = Backend.SHARED
    mode = RdmaMode.SHARED

    def __init__(
        self,
        namespaces: Namespaces,
        lending: Lending,
        device: str,
        *,
        netdev: str | None,
        record: Callable[[str], None],
    ):
        self._namespaces = namespaces
        self._lending = lending
        self._device = device
        self._netdev = netdev
        self._record = record
        self._lock = threading.Lock()
        # Whoever examines an attachment while it is deleted must not lend to it again. Ids are never used twice.
        self._removed: deque[int] = deque(maxlen=_REMEMBERED)

    def create(self, attachment: Attachment, descriptor: int) -> Device:
        """See ``DeviceBackend``. Raises UnavailableError where the host has no such device or it has no netdev,
        ExhaustedError where its GID table is full."""
        with self._namespaces.here() as rdma:
            device = self._find(rdma)
            if not condition(rdma, device).port_active:
                raise UnavailableError(
                    f"The port of the RDMA device {self._device} is down; bring its netdev up.", subject=self._device
                )
            try:
                self._lend(rdma, device, attachment)
                self._wait_for_gids(attachment)
            except RdmanetError:
                self.remove(attachment, descriptor)
                raise
        return device

    def _find(self, rdma: RdmaNetlink) -> Device:
        found = rdma.device(self._device)
        if found is None:
            raise UnavailableError(
                f"This host has no RDMA device {self._device} now (rdma.shared_device); `rdma link` lists what it has.",
                subject=self._device,
            )
        return describe(rdma, found, self.name, self.mode)

    def host_device(self) -> Condition | None:
        """See ``DeviceBackend``."""
        with self._namespaces.here() as rdma:
            return condition(rdma, self._find(rdma))

    def _lend(self, rdma: RdmaNetlink, device: Device, attachment: Attachment) -> None:
        port = rdma.port(device.index)
        if port is None or port.netdev is None:
            raise UnavailableError(
                f"The RDMA device {device.name} has no netdev in the host's network namespace, so it can have no GIDs"
                " of pods' addresses.",
                subject=device.name,
            )
        with self._lock:
            if attachment.id in self._removed:
                return
            if port.netdev != self._netdev:
                self._record(port.netdev)
                self._netdev = port.netdev
            self._lending.lend(port.netdev, attachment.addresses)

    def _wait_for_gids(self, attachment: Attachment) -> None:
        wanted = {address_key(address) for address in attachment.addresses}
        pause_s, deadline_s = _FIRST_PAUSE_S, time.monotonic() + GID_TIMEOUT_S
        while missing_gids(self._device, wanted):
            if time.monotonic() > deadline_s:
                raise ExhaustedError(
                    f"The RDMA device {self._device} has made no GIDs of {attachment.pod}'s addresses within"
                    f" {GID_TIMEOUT_S:g} s: its table is full. Delete pods, or use another device.",
                    subject=self._device,
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def find(self, attachment: Attachment, descriptor: int) -> Device | None:
        """See ``DeviceBackend``."""
        with self._namespaces.here() as rdma:
            found = rdma.device(self._device)
            return None if found is None else describe(rdma, found, self.name, self.mode)

    def remove(self, attachment: Attachment, descriptor: int | None) -> None:
        """See ``DeviceBackend``."""
        with self._lock:
            self._removed.append(attachment.id)
            if self._netdev is not None:
                self._lending.take_back(self._netdev, attachment.addresses)

    def examine(self, attachment: Attachment, device: Device, descriptor: int) -> Condition:
        """See ``DeviceBackend``. Lends the addresses again: a netdev that was down has lost its IPv6 addresses."""
        if device.backend is not self.name or device.name != self._device:
            return Condition(device, f"the configuration no longer gives pods {device.name} (rdma.shared_device)")
        with self._namespaces.here() as rdma:
            found = condition(rdma, device)
            if found.problem is None and found.port_active:
                try:
                    self._lend(rdma, found.device, attachment)
                except (NotFoundError, UnavailableError) as error:
                    return Condition(found.device, error.sentence.removesuffix("."))
        return found

    def netdev(self, attachment: Attachment) -> str | None:
        """See ``DeviceBackend``."""
        return self._netdev

    def holders(self, device: Device, descriptor: int) -> dict[int, int]:
        """See ``DeviceBackend``."""
        with self._namespaces.here() as rdma:
            return {pair.qpn: pair.pid or 0 for pair in rdma.queue_pairs(device.index)}

    def read(self, attachments: Sequence[Attachment], enter: Enter) -> dict[int, Reading]:
        """See ``DeviceBackend``. What all pods do with a device counts together."""
        indexes = {one.id: one.device.index for one in attachments if one.device is not None}
        distinct = sorted(set(indexes.values()))
        readings = dict(zip(distinct, self._namespaces.readings(distinct), strict=True))
        return {number: reading for number, index in indexes.items() if (reading := readings[index]) is not None}


def missing_gids(device: str, wanted: Collection[bytes]) -> set[bytes]:
    """Which of these address keys are no RoCE v2 GIDs of the device's port."""
    port, left = _INFINIBAND / device / "ports" / "1", set(wanted)
    gids = port / "gids"
    # In order: the kernel puts a new one into the first empty place.
    for place in sorted(gids.iterdir(), key=lambda path: int(path.name)) if gids.is_dir() else ():
        try:
            gid = ipaddress.IPv6Address(place.read_text(encoding="ascii").strip()).packed
            if gid in left and (port / "gid_attrs/types" / place.name).read_text().strip() == "RoCE v2":
                left.remove(gid)
        except OSError:
            continue  # an empty place answers EINVAL on some kernels
        if not left:
            break
    return left
