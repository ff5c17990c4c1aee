"""What a Service and its EndpointSlices mean for the maps; pure.

The fields are those of core/v1 Service and discovery.k8s.io/v1 EndpointSlice; who is used follows Kubernetes' "Virtual
IPs and Service Proxies" and KEP-1669 (endpoints that terminate).
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from rdmanet.datapath.services import Scope, end_of, service_key
from rdmanet.model import address_key
from rdmanet.objects.values import EndpointSlice, Service, ServicePort

#: The address of NodePorts, by family.
ZERO = {4: address_key("0.0.0.0"), 6: address_key("::")}
_UDP = 17
#: What an endpoint is good for: keeping its flows; new ones where there is nothing better; new ones.
_KEEPS, _FADES, _READY = 1, 2, 3


class Reach(enum.IntEnum):
    """Whose backends may be used."""

    ALL = 0
    HERE = 1  # on this host: internalTrafficPolicy Local
    OUTSIDE = 2  # on this host, for who asks at the uplink: those have a Maglev table


class GroupName(NamedTuple):
    """What makes a group of addresses the same one after a change of its service."""

    port_name: str
    protocol: int
    port: int
    version: int
    reach: Reach


class Group(NamedTuple):
    """Addresses and ports with the same backends: one id in the maps."""

    name: GroupName
    keys: tuple[bytes, ...]  # struct service_key
    backends: tuple[bytes, ...]  # ends that get new flows, sorted
    draining: tuple[bytes, ...]  # ends that keep their flows and get no new ones
    affinity_s: int
    has_members: bool  # whether programs ask which backends live: for affinity, and for datagrams

    @property
    def outside(self) -> bool:
        """Whether it has a Maglev table."""
        return self.name.reach is Reach.OUTSIDE


def groups(service: Service, slices: Iterable[EndpointSlice], here: Collection[bytes]) -> list[Group]:
    """All groups of a service; ``here`` has the address keys of this host's pods. Headless ones have none."""
    if not service.cluster_ips:
        return []
    pieces = [piece for piece in slices if piece.endpoints]
    versions = {address.version for address in service.cluster_ips}
    return [
        group
        for port in service.ports
        for version in versions
        for group in _of_port(service, port, version, pieces, here)
    ]


def depends_on_host(service: Service) -> bool:
    """Whether it matters which of its backends are on this host."""
    return service.internal_local or bool(service.external_ips) or any(port.node_port for port in service.ports)


def _of_port(
    service: Service, port: ServicePort, version: int, slices: list[EndpointSlice], here: Collection[bytes]
) -> Iterator[Group]:
    protocol = port.protocol.number
    cluster = [
        service_key(address_key(address), port.port, protocol, Scope.CLUSTER)
        for address in service.cluster_ips
        if address.version == version
    ]
    external = [address_key(address) for address in service.external_ips if address.version == version]
    # From inside the cluster all of it may answer at external addresses: externalTrafficPolicy is for outside alone.
    inside = [service_key(key, port.port, protocol, Scope.CLUSTER) for key in external]
    outside = [service_key(key, port.port, protocol, Scope.OUTSIDE) for key in external]
    if port.node_port:
        inside.append(service_key(ZERO[version], port.node_port, protocol, Scope.NODE))
        outside.append(service_key(ZERO[version], port.node_port, protocol, Scope.OUTSIDE))
    states = _states(service, port, version, slices)
    near = (
        {end: state for end, state in states.items() if end[:16] in here} if outside or service.internal_local else {}
    )

    def group(reach: Reach, keys: list[bytes], states: dict[bytes, int]) -> Group:
        name = GroupName(port.name, protocol, port.port, version, reach)
        used = _READY if _READY in states.values() else _FADES
        backends = sorted(end for end, state in states.items() if state == used)
        draining = sorted(end for end, state in states.items() if state < used)
        has_members = service.affinity_s > 0 or protocol == _UDP
        return Group(name, tuple(keys), tuple(backends), tuple(draining), service.affinity_s, has_members)

    if service.internal_local:
        yield group(Reach.HERE, cluster, near)
        if inside:
            yield group(Reach.ALL, inside, states)
    else:
        yield group(Reach.ALL, cluster + inside, states)
    if outside:
        yield group(Reach.OUTSIDE, outside, near)


def _states(service: Service, port: ServicePort, version: int, slices: list[EndpointSlice]) -> dict[bytes, int]:
    """End → what it is good for. An endpoint may be in two slices while it moves: the better one counts."""
    states: dict[bytes, int] = {}
    for piece in slices:
        for slice_port in piece.ports:
            if slice_port.name != port.name or slice_port.protocol is not port.protocol:
                continue
            number = slice_port.port
            for endpoint in piece.endpoints:
                if endpoint.address.version != version:
                    continue
                if endpoint.ready or service.publish_not_ready:
                    state = _READY
                elif endpoint.serving:
                    state = _FADES if endpoint.terminating else _KEEPS
                else:
                    continue
                end = end_of(address_key(endpoint.address), number)
                if states.get(end, 0) < state:
                    states[end] = state
    return states
