"""What pods' RDMA devices show: GET /v1/rdma, and what the metrics tell of devices.

Synchronous; called from worker threads.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from rdmanet.errors import KernelError, UnavailableError
from rdmanet.limits import Usage
from rdmanet.model import Attachment, Backend, Device
from rdmanet.netlink import namespace
from rdmanet.rdma.backend import DeviceBackend

log = logging.getLogger(__name__)


class Pods(Protocol):
    """``rdmanet.pods.Pods``, as seen from here."""

    def with_device(self) -> Mapping[int, Attachment]: ...
    def unhealthy(self) -> dict[int, str]: ...


class Limits(Protocol):
    """``rdmanet.limits.PodLimits``, as seen from here."""

    def usage(self) -> Mapping[int, Usage]: ...


class Count(Protocol):
    """Packets and bytes of one direction of a pod."""

    @property
    def packets(self) -> int: ...
    @property
    def bytes(self) -> int: ...


class Counters(Protocol):
    """``rdmanet.datapath.maps.Datapath``: by attachment id, direction and path."""

    def counters(self) -> Mapping[tuple[int, str, str], Count]: ...


@dataclass(frozen=True, slots=True)
class DeviceNumbers:
    """A device, the attachments that have it, by id why one cannot use it, and what it shows: whether its port is
    active (None where the device is gone) and its counters by the driver's names."""

    device: Device
    attachments: tuple[Attachment, ...]
    unhealthy: Mapping[int, str]
    port_active: bool | None
    events: Mapping[str, int]

    @property
    def shared(self) -> bool:
        """Whether its counters are of all pods that have it together."""
        return self.device.backend is Backend.SHARED


def entered(attachment: Attachment) -> AbstractContextManager[int | None]:
    """A descriptor of the attachment's namespace, or None where its path leads nowhere or to another one."""
    return namespace.entered(attachment.netns, attachment.netns_id)


class RdmaNumbers:
    """Reads them anew each time it is asked."""

    def __init__(self, devices: DeviceBackend | None, pods: Pods, limits: Limits, counters: Counters):
        self._devices = devices
        self._pods = pods
        self._limits = limits
        self._counters = counters

    def devices(self) -> list[DeviceNumbers]:
        """Every device that a pod has."""
        attachments = list(self._pods.with_device().values())
        if self._devices is None or not attachments:
            return []
        try:
            readings = self._devices.read(attachments, entered)
        except (KernelError, UnavailableError) as error:
            # Without RDMA the other numbers are still wanted; health says what has become of the devices.
            log.warning("RDMA devices cannot be read: %s", error)
            readings = {}
        unhealthy = self._pods.unhealthy()
        grouped: dict[Device, list[Attachment]] = {}
        for attachment in attachments:
            assert attachment.device is not None
            grouped.setdefault(attachment.device, []).append(attachment)
        found = []
        for device, those in grouped.items():
            reading = readings.get(those[0].id)
            problems = {one.id: unhealthy[one.id] for one in those if one.id in unhealthy}
            found.append(
                DeviceNumbers(
                    device=device,
                    attachments=tuple(those),
                    unhealthy=problems,
                    port_active=None if reading is None else reading.port_active,
                    events={} if reading is None else reading.events,
                )
            )
        return found

    def document(self, leases: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """GET /v1/rdma; ``leases`` are the broker's (``BrokerServer.status``)."""
        devices = self.devices()
        counters, usage = self._counters.counters(), self._limits.usage()
        held = Counter(lease[end]["pod"] for lease in leases for end in ("connector", "listener"))
        return {
            "devices": [_device(one) for one in devices],
            "pods": [
                _pod(attachment, one, counters, usage.get(attachment.id), held)
                for one in devices
                for attachment in one.attachments
            ],
            # Between pods that share a device packets pass no hook that could count them.
            "leases": [{**lease, "counted": not any(one.shared for one in devices)} for lease in leases],
        }


def _device(found: DeviceNumbers) -> dict[str, Any]:
    return {
        "device": found.device.name,
        "backend": found.device.backend,
        "mode": found.device.mode,
        "uverbs": found.device.uverbs,
        "pods": [str(attachment.pod) for attachment in found.attachments],
        "port": {None: None, True: "active", False: "down"}[found.port_active],
        "events": dict(found.events),
    }


def _pod(
    attachment: Attachment,
    found: DeviceNumbers,
    counters: Mapping[tuple[int, str, str], Count],
    usage: Usage | None,
    held: Mapping[str, int],
) -> dict[str, Any]:
    name = str(attachment.pod)
    traffic = {}
    for word, direction in (("sent", "from_pod"), ("received", "to_pod")):
        count = counters.get((attachment.id, direction, "roce"))
        traffic[word] = {"packets": count.packets if count else 0, "bytes": count.bytes if count else 0}
    return {
        "pod": name,
        "interface": attachment.ifname,
        "device": found.device.name,
        "unhealthy": found.unhealthy.get(attachment.id),
        "leases": held.get(name, 0),  # ends, as the limit counts them
        "max_leases": attachment.max_leases,
        "resources": None
        if usage is None
        else {key: {"used": used, "limit": usage.limits.get(key)} for key, used in usage.used.items()},
        "counted": not found.shared,
        **traffic,
    }
