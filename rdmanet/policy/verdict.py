"""What entries say about a flow, asked as the datapath's programs ask (``policy_judge`` in bpf/policy.h)."""

from __future__ import annotations

from collections.abc import Container, Mapping

from rdmanet.model import IPAddress
from rdmanet.policy import matches
from rdmanet.policy.prefixes import Prefix, longest
from rdmanet.policy.values import PEER_ANY, PEER_IS_PREFIX, Direction, Entry, PodPolicy

IDENTITY_NONE = 0
ROCE_PROTOCOL, ROCE_PORT = 17, 4791


def allows(
    set_number: int,
    identity: int,
    address: IPAddress,
    protocol: int,
    port: int | None,
    entries: Container[Entry],
    classes: Mapping[Prefix, int],
) -> bool:
    """Whether a set allows a flow with this peer: its identity (IDENTITY_NONE: no pod's) and address."""
    if not set_number:
        return True
    peers = [PEER_ANY]
    if identity != IDENTITY_NONE:
        peers.append(identity)
    number = longest(address, classes)
    if number is not None:
        peers.append(PEER_IS_PREFIX | number)
    asked = matches.covering(protocol, port)
    return any((set_number, peer, *match) in entries for peer in peers for match in asked)


def refused(
    source: tuple[PodPolicy | None, IPAddress],
    destination: tuple[PodPolicy | None, IPAddress],
    protocol: int,
    port: int | None,
    entries: Container[Entry],
    classes: Mapping[Prefix, int],
) -> Direction | None:
    """Which direction refuses a flow between two different ends (None: no pod); egress comes first."""
    (own, own_address), (peer, peer_address) = source, destination
    own_identity, peer_identity = (end.identity if end else IDENTITY_NONE for end in (own, peer))
    if own and not allows(own.egress_set, peer_identity, peer_address, protocol, port, entries, classes):
        return Direction.EGRESS
    if peer and not allows(peer.ingress_set, own_identity, own_address, protocol, port, entries, classes):
        return Direction.INGRESS
    return None
