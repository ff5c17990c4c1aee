"""Random services and their slices: ports that meet by name, endpoints in every condition, both families."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from random import Random

from rdmanet.model import IPAddress
from rdmanet.objects.values import Endpoint, EndpointPort, EndpointSlice, Protocol, Service, ServicePort
from testbed.semantics.service import Asker, ServiceWorld

PORT_NAMES = ("", "http", "dns")
PROTOCOLS = (Protocol.TCP, Protocol.UDP, Protocol.SCTP)
#: (ready, serving, terminating) as the EndpointSlice controller sets them; the last is not serving any more.
CONDITIONS = (
    (True, True, False),
    (True, True, False),
    (False, False, False),
    (False, True, True),
    (False, False, True),
)


def world(
    random: Random,
    count: int,
    local: Sequence[IPAddress],
    elsewhere: Sequence[IPAddress],
    node_addresses: frozenset[IPAddress],
) -> ServiceWorld:
    """``count`` services whose addresses, ports and node ports do not meet; backends here and elsewhere."""
    services, slices = [], []
    node_ports = iter(random.sample(range(30000, 32768), min(2767, 2 * count)))
    for number in range(count):
        made = service(random, number, node_ports)
        services.append(made)
        for piece in range(random.choice((0, 1, 1, 2, 3))):
            slices.append(endpoint_slice(random, made, piece, local, elsewhere))
    # Of a service that is not there, and in another namespace than one that is.
    stray = service(random, count, node_ports)
    slices.append(endpoint_slice(random, stray, 0, local, elsewhere))
    return ServiceWorld(tuple(services), tuple(slices), node_addresses, frozenset(local))


def service(random: Random, number: int, node_ports: Iterator[int]) -> Service:
    """Headless, single-stack or dual-stack, with or without addresses that outside knows."""
    versions = random.choice(((), (4,), (6,), (4, 6), (6, 4)))
    cluster_ips = tuple(_numbered({4: "10.96.0.0", 6: "fd96::"}[version], number) for version in versions)
    external = random.random() < 0.4 and bool(versions)
    external_ips = tuple(_numbered({4: "192.0.2.0", 6: "2001:db8:e::"}[version], number + 1) for version in versions)
    names = random.sample(PORT_NAMES, random.choice((1, 1, 2, 3)))
    ports = []
    for place, name in enumerate(names if len(names) == 1 else [n or "extra" for n in names]):
        node_port = next(node_ports, None) if versions and random.random() < 0.4 else None
        ports.append(ServicePort(name, random.choice(PROTOCOLS), 80 + place, node_port))
    return Service(
        random.choice(("default", "shop")),
        f"service-{number}",
        cluster_ips,
        tuple(ports),
        external_ips if external else (),
        affinity_s=random.choice((0, 0, 10800)),
        external_local=random.random() < 0.3,
        internal_local=random.random() < 0.3,
        publish_not_ready=random.random() < 0.15,
    )


def endpoint_slice(
    random: Random, service: Service, number: int, local: Sequence[IPAddress], elsewhere: Sequence[IPAddress]
) -> EndpointSlice:
    """One family; ports mostly those of the service, under the same names."""
    version = random.choice((4, 6))
    here = [a for a in local if a.version == version]
    there = [a for a in elsewhere if a.version == version]
    chosen = random.sample(here, random.randint(0, min(3, len(here))))
    chosen += random.sample(there, random.randint(0, min(3, len(there))))
    ports = tuple(
        EndpointPort(
            port.name,
            port.protocol if random.random() < 0.9 else random.choice(PROTOCOLS),
            8000 + random.randrange(4),
        )
        for port in service.ports
        if random.random() < 0.9
    )
    endpoints = tuple(endpoint(random, address) for address in chosen)
    namespace = service.namespace if random.random() < 0.95 else "elsewhere"
    return EndpointSlice(namespace, f"{service.name}-{number}", service.name, ports, endpoints)


def endpoint(random: Random, address: IPAddress) -> Endpoint:
    """In one of the conditions that there are."""
    ready, serving, terminating = random.choice(CONDITIONS)
    return Endpoint(address, ready, serving, terminating)


def _numbered(base: str, number: int) -> IPAddress:
    return ipaddress.ip_address(base) + number


def questions(world: ServiceWorld) -> Iterator[tuple[Asker, IPAddress, Protocol, int]]:
    """Every address with every port and protocol that its service has, and some that it has not."""
    for service in world.services:
        addresses = (*service.cluster_ips, *service.external_ips, *sorted(world.node_addresses, key=str))
        ports = {port.port for port in service.ports} | {port.node_port for port in service.ports if port.node_port}
        for asker in Asker:
            for address in addresses:
                for protocol in Protocol:
                    for port in sorted(ports):
                        yield asker, address, protocol, port
