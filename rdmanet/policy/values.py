"""Policy's nouns as plain values: numbers that the datapath knows, and attachments as policies see them."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from rdmanet.model import IPAddress, PodName
from rdmanet.objects.values import ContainerPort
from rdmanet.policy.matches import Match
from rdmanet.policy.prefixes import Prefix

#: bpf/policy.h.
IDENTITY_HOST = 1
FIRST_IDENTITY = 16
PEER_ANY = 0
PEER_IS_PREFIX = 0x80000000

#: What one entry of the datapath's map allows: set, peer, and a Match's bits, protocol and port.
Entry = tuple[int, int, int, int, int]
Allowed = tuple[int, Match]  # the same without the set


class Direction(enum.Enum):
    """Of a flow that begins, as its pod sees it."""

    INGRESS = "ingress"
    EGRESS = "egress"


class PodPolicy(NamedTuple):
    """What the datapath knows of a pod's policy: numbers; set 0: no policy selects it in that direction."""

    identity: int
    ingress_set: int
    egress_set: int


@dataclass(frozen=True, slots=True)
class Member:
    """An attachment as policies see it."""

    pod: PodName
    addresses: tuple[IPAddress, ...]
    labels: Mapping[str, str]
    namespace_labels: Mapping[str, str]
    ports: frozenset[ContainerPort] = frozenset()


@dataclass(frozen=True, slots=True)
class Numbers:
    """Numbers that are in use already, from before a restart: they go on meaning what they meant."""

    members: Mapping[int, PodPolicy] = field(default_factory=dict)
    classes: Mapping[Prefix, int] = field(default_factory=dict)
    highest_identity: int = FIRST_IDENTITY - 1
    highest_set: int = 0
    highest_class: int = 0
