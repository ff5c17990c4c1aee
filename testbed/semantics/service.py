"""Which backends may answer for a service (Kubernetes, Concepts, "Service", "EndpointSlices", "Virtual IPs and Service
Proxies"; KEP-1669 for endpoints that terminate)."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from rdmanet.model import IPAddress
from rdmanet.objects.values import Endpoint, EndpointSlice, Protocol, Service, ServicePort


class Asker(enum.Enum):
    """Where the one who asks is."""

    INSIDE = "a pod of this node, or the node itself"
    OUTSIDE = "behind the uplink"


@dataclass(frozen=True)
class Backend:
    """An endpoint's address and the port that the slice says."""

    address: IPAddress
    port: int


@dataclass(frozen=True)
class ServiceWorld:
    """All services of the cluster, and what is on this node."""

    services: tuple[Service, ...]
    slices: tuple[EndpointSlice, ...]
    node_addresses: frozenset[IPAddress]
    local: frozenset[IPAddress]  # addresses of this node's pods

    def backends(self, asker: Asker, address: IPAddress, protocol: Protocol, port: int) -> frozenset[Backend] | None:
        """Those that a new connection to this address and port may go to; empty: it is refused; None: this is no
        service's, and goes where it says."""
        for service in self.services:
            for service_port in service.ports:
                versions = {own.version for own in service.cluster_ips}  # its ipFamilies
                if service_port.protocol is not protocol or address.version not in versions:
                    continue
                if asker is Asker.INSIDE and address in service.cluster_ips and port == service_port.port:
                    return self._choose(service, service_port, address.version, service.internal_local)
                if (address in service.external_ips and port == service_port.port) or (
                    address in self.node_addresses and port == service_port.node_port
                ):
                    # "externalTrafficPolicy": of traffic from outside; from inside all of the cluster may answer.
                    here = asker is Asker.OUTSIDE
                    return self._choose(service, service_port, address.version, here)
        return None

    def _choose(self, service: Service, port: ServicePort, version: int, here: bool) -> frozenset[Backend]:
        """Ready ones; where there is none, those that terminate and still serve."""
        known = list(self._endpoints(service, port, version, here))
        if service.publish_not_ready:
            return frozenset(backend for backend, _ in known)
        ready = frozenset(backend for backend, endpoint in known if endpoint.ready)
        fading = frozenset(backend for backend, endpoint in known if endpoint.serving and endpoint.terminating)
        return ready or fading

    def _endpoints(
        self, service: Service, port: ServicePort, version: int, here: bool
    ) -> Iterable[tuple[Backend, Endpoint]]:
        for piece in self.slices:
            if (piece.namespace, piece.service) != (service.namespace, service.name):
                continue
            for slice_port in piece.ports:
                if (slice_port.name, slice_port.protocol) != (port.name, port.protocol):
                    continue
                for endpoint in piece.endpoints:
                    if endpoint.address.version == version and (not here or endpoint.address in self.local):
                        yield Backend(endpoint.address, slice_port.port), endpoint
