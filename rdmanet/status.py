"""What ``GET /v1/status`` and ``GET /v1/rdma`` answer: everything that the parts know, as one document."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict
from typing import NamedTuple

from rdmanet import __version__
from rdmanet.broker.server import BrokerServer
from rdmanet.datapath.maps import Datapath
from rdmanet.limits import PodLimits
from rdmanet.model import Attachment, RdmaMode
from rdmanet.numbers import RdmaNumbers
from rdmanet.objects.keeping import Objects
from rdmanet.pods import Pods
from rdmanet.policy.engine import Policy
from rdmanet.reconcile import Record
from rdmanet.removal import Removals
from rdmanet.services.engine import Services
from rdmanet.store import Store


class About(NamedTuple):
    """What a start has found out of the host, and does not change."""

    rdma_mode: RdmaMode | None
    rdma_backend: str | None
    rdma_missing: str | None  # why there is no RDMA
    services_missing: str | None  # why services work for no socket
    mtu_bytes: int


class Status(NamedTuple):
    """The parts that are asked. Its methods block."""

    about: About
    ready_at: float  # of time.monotonic()
    store: Store
    datapath: Datapath
    pods: Pods
    limits: PodLimits
    removals: Removals
    numbers: RdmaNumbers
    objects: Objects
    policy: Policy
    services: Services
    broker: BrokerServer
    repairs: Record

    def document(self, leases: list[dict[str, object]]) -> dict[str, object]:
        """``rdmanet status``."""
        attachments = self.store.attachments()
        names = {attachment.id: str(attachment.pod) for attachment in attachments}
        return {
            "agent": self._agent(),
            "attachments": self._attachments(attachments),
            "releasing": self.removals.status(),
            "repairs": self.repairs.document(),
            "leases": leases,
            "objects": self.objects.counts(),
            "policy": {name: {"used": used, "most": most} for name, (used, most) in self.policy.sizes().items()},
            "services": self.services.status(),
            "drops": [
                {"pod": names.get(number), "reason": reason, "packets": packets}
                for (number, reason), packets in self.datapath.drops().items()
                if packets
            ],
        }

    def rdma(self, leases: list[dict[str, object]]) -> dict[str, object]:
        """``rdmanet rdma``."""
        return {"agent": self._agent(), **self.numbers.document(leases)}

    def _agent(self) -> dict[str, object]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "ready_s": time.monotonic() - self.ready_at,
            "kernel": platform.release(),
            **self.about._asdict(),
            "programs": self.datapath.running(),
        }

    def _attachments(self, attachments: list[Attachment]) -> list[dict[str, object]]:
        degraded, unhealthy = self.pods.degraded(), self.pods.unhealthy()
        limited = self.limits.status()
        policies = self.policy.status()
        counters: dict[int, dict[str, dict[str, int]]] = {}
        for (number, direction, path), count in self.datapath.counters().items():
            counted = {"packets": count.packets, "bytes": count.bytes}
            counters.setdefault(number, {})[f"{direction}_{path}"] = counted
        return [
            {
                "id": attachment.id,
                "container_id": attachment.container_id,
                "ifname": attachment.ifname,
                "pod": str(attachment.pod),
                "network": attachment.network,
                "netns": attachment.netns,
                "state": attachment.state,
                "mac": attachment.mac,
                "mtu_bytes": attachment.mtu_bytes,
                "ipv4": str(attachment.ipv4) if attachment.ipv4 else None,
                "ipv6": str(attachment.ipv6) if attachment.ipv6 else None,
                "host_ifname": attachment.host_ifname,
                "guard": attachment.guard,
                "max_leases": attachment.max_leases,
                "traffic_class": attachment.traffic_class,
                "service_level": attachment.service_level,
                "bandwidth": {
                    "ingress": attachment.bandwidth.ingress and attachment.bandwidth.ingress._asdict(),
                    "egress": attachment.bandwidth.egress and attachment.bandwidth.egress._asdict(),
                },
                "cgroup": limited.get(attachment.id, (None, ""))[0],
                "not_limited": limited.get(attachment.id, (None, ""))[1] or None,
                "device": asdict(attachment.device) if attachment.device else None,
                "slot": attachment.slot,
                "degraded": degraded.get(attachment.netns_id),
                "unhealthy": unhealthy.get(attachment.id),
                "policy": policies.get(attachment.id),
                "counters": counters.get(attachment.id, {}),
            }
            for attachment in attachments
        ]
