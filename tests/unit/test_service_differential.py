"""What services come to, against the plain model of Kubernetes' semantics: random services and slices.

tests/bpf/test_differential.py compares what the maps hold, and asks sockets and the programs themselves.
"""

from __future__ import annotations

import ipaddress
import struct
from random import Random

import pytest

from rdmanet.datapath.services import Scope, service_key
from rdmanet.model import IPAddress, address_key, address_of
from rdmanet.objects.values import Protocol
from rdmanet.services import plan
from testbed.semantics import random_services
from testbed.semantics.service import Asker, Backend, ServiceWorld

LOCAL = [ipaddress.ip_address(t) for n in range(7, 13) for t in (f"10.90.0.{n}", f"fd90::{n:x}")]
ELSEWHERE = [ipaddress.ip_address(t) for n in range(7, 13) for t in (f"10.91.0.{n}", f"fd91::{n:x}")]
NODE = frozenset(map(ipaddress.ip_address, ("10.90.0.1", "fd90::1", "198.51.100.2", "2001:db8:100::2")))
SERVICES = 50
ANY = {4: ipaddress.ip_address("0.0.0.0"), 6: ipaddress.ip_address("::")}


def found(
    keys: dict[bytes, frozenset[Backend]], asker: Asker, address: IPAddress, protocol: Protocol, port: int
) -> frozenset[Backend] | None:
    """As the programs look a service up: socket_service() of bpf/socket.c, and bpf/nodeport.c."""
    scope = Scope.CLUSTER if asker is Asker.INSIDE else Scope.OUTSIDE
    exact = keys.get(service_key(address_key(address), port, protocol.number, scope))
    if exact is not None or address not in NODE:
        return exact
    scope = Scope.NODE if asker is Asker.INSIDE else Scope.OUTSIDE
    return keys.get(service_key(address_key(ANY[address.version]), port, protocol.number, scope))


def compiled(world: ServiceWorld) -> dict[bytes, frozenset[Backend]]:
    """Key of the services map → where a new connection may go."""
    here = {address_key(address) for address in world.local}
    keys: dict[bytes, frozenset[Backend]] = {}
    for service in world.services:
        own = [p for p in world.slices if (p.namespace, p.service) == (service.namespace, service.name)]
        for group in plan.groups(service, own, here):
            backends = frozenset(_backend(end) for end in group.backends)
            assert len(backends) == len(group.backends)
            assert not keys.keys() & set(group.keys)
            keys |= dict.fromkeys(group.keys, backends)
    return keys


def _backend(end: bytes) -> Backend:
    address, port = struct.unpack("!16sH", end)
    return Backend(address_of(address), port)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "random"])
def test_compiled_services_say_what_kubernetes_means(fixed: bool) -> None:
    seed = 5 if fixed else Random().randrange(1 << 32)
    print(f"seed {seed}")
    random = Random(seed)
    world = random_services.world(random, SERVICES, LOCAL, ELSEWHERE, NODE)
    keys = compiled(world)
    refused = answered = unknown = 0
    for question in random_services.questions(world):
        if question[0] is Asker.OUTSIDE and question[1] not in (*NODE, *_external(world)):
            continue  # addresses inside the cluster are not reached from outside
        wanted = world.backends(*question)
        assert found(keys, *question) == wanted, (seed, question, wanted)
        refused += wanted == frozenset()
        answered += bool(wanted)
        unknown += wanted is None
    assert min(refused, answered, unknown) > 50


def _external(world: ServiceWorld) -> set[IPAddress]:
    return {address for service in world.services for address in service.external_ips}
