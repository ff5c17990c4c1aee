"""Tables of the maps for flows, policy and services, beside their C structs; and those of all maps.

As in ``layout``: numbers in the host's byte order, ports (``2s``) in the network's, addresses as address keys.
"""

from __future__ import annotations

from collections.abc import Mapping

from rdmanet.datapath import layout
from rdmanet.datapath.artifact import Artifact
from rdmanet.datapath.layout import ADDRESS_KEY, U32, U64, StructTable
from rdmanet.errors import StateError

FLOW_KEY = StructTable(
    "flow_key",
    ("low", "16s"),
    ("high", "16s"),
    ("low_port", "2s"),
    ("high_port", "2s"),
    ("protocol", "B"),
    ("pad", "3x"),
)
FLOW = StructTable(
    "flow_entry",
    ("created_ns", "Q"),
    ("last_seen_ns", "Q"),
    ("translated", "16s"),
    ("origin", "I"),
    ("target", "I"),
    ("slot", "I"),
    ("epoch", "I"),
    ("translated_port", "2s"),
    ("flags", "B"),
    ("closing", "B"),
    ("pad", "4x"),
)
BEGUN = StructTable("begun_entry", ("flows", "2Q"))  # of layout.DIRECTIONS
#: After so many seconds without a packet a flow is stale: FLOW_*_S of bpf/flow.h.
FLOW_TIMEOUTS_S: Mapping[str, int] = {
    "tcp_established": 7440,
    "tcp_opening": 240,
    "tcp_closing": 60,
    "udp_replied": 300,
    "udp_opening": 120,
    "icmp": 60,
}
#: What the short way from pod to pod (bpf/usual.h) knows of the table for the rest of a clock's tick.
KNOWN_FLOW = StructTable(
    "known_flow",
    ("address", "32s"),
    ("ends", "Q"),
    ("tick", "Q"),
    ("epoch", "Q"),
    ("ports", "I"),
    ("protocol", "B"),
    ("family", "B"),
    ("pad", "2x"),
)
PACKET = StructTable(
    "packet",
    ("source", "16s"),
    ("destination", "16s"),
    ("source_mac", "6s"),
    ("ethertype", "H"),
    ("transport", "H"),
    ("source_port", "2s"),
    ("destination_port", "2s"),
    ("family", "B"),
    ("protocol", "B"),
    ("hop_limit", "B"),
    ("flags", "B"),
    ("tcp_flags", "B"),
    ("icmp_type", "B"),
    ("fragment_offset", "H"),
    ("pad", "2x"),
    ("identification", "I"),
    ("end", "I"),
    ("destination_qpn", "I"),
    ("source_qpn", "I"),
)
NAT_WORK = StructTable(
    "nat_work",
    ("inside", f"{FLOW_KEY.size}s"),
    ("outside", f"{FLOW_KEY.size}s"),
    ("other", f"{FLOW_KEY.size}s"),
    ("entry", f"{FLOW.size}s"),
    ("alias", f"{FLOW.size}s"),
    ("quoted", f"{PACKET.size}s"),
    ("pod", "20s"),
    ("remote", "20s"),
    ("own", "20s"),
    ("pad", "4x"),
)
#: What bpf/collect.c is run on.
CANDIDATE = StructTable(
    "candidate", ("key", f"{FLOW_KEY.size}s"), ("origin", "I"), ("target", "I"), ("gone", "I"), ("pad", "4x")
)
LIMIT = StructTable(
    "limit_entry",
    ("bits_per_s", "Q"),
    ("burst_bytes", "Q"),
    ("byte_time", "Q"),
    ("burst_ns", "Q"),
    ("next_ns", "Q"),
)
FRAGMENT_KEY = StructTable(
    "fragment_key",
    ("source", "16s"),
    ("destination", "16s"),
    ("identification", "I"),
    ("protocol", "B"),
    ("pad", "3x"),
)
FRAGMENT = StructTable(
    "fragment_entry",
    ("source_port", "2s"),
    ("destination_port", "2s"),
    ("destination_qpn", "I"),
    ("source_qpn", "I"),
    ("flags", "B"),
    ("protocol", "B"),
    ("pad", "2x"),
)
WAITING_PART = StructTable(
    "waiting_part",
    ("number", "Q"),
    ("previous", "Q"),
    ("since_ns", "Q"),
    ("bytes", "I"),
    ("pad", "4x"),
    ("frame", "2048s"),
)
ICMP_ANSWER = StructTable(
    "icmp_answer",
    ("source", "16s"),
    ("destination", "16s"),
    ("bytes", "I"),
    ("protocol", "I"),
    ("type", "B"),
    ("code", "B"),
    ("checksum", "H"),
    ("mtu_bytes", "I"),
    ("quoted", "448s"),
)
PREFIX_KEY = StructTable("prefix_key", ("bits", "I"), ("address", "16s"))
POLICY_KEY = StructTable(
    "policy_key",
    ("bits", "I"),
    ("set", "I"),
    ("peer", "I"),
    ("protocol", "B"),
    ("pad", "x"),
    ("port", "2s"),
)
SERVICE_KEY = StructTable("service_key", ("address", "16s"), ("port", "2s"), ("protocol", "B"), ("scope", "B"))
SERVICE = StructTable(
    "service_entry",
    ("id", "I"),
    ("generation", "I"),
    ("backends", "I"),
    ("affinity_s", "I"),
    ("maglev_first", "I"),
    ("flags", "I"),
)
BACKEND_KEY = StructTable("backend_key", ("service", "I"), ("generation", "I"), ("slot", "I"))
BACKEND = StructTable("backend_entry", ("address", "16s"), ("port", "2s"), ("pad", "2x"))
MEMBER_KEY = StructTable("member_key", ("address", "16s"), ("service", "I"), ("port", "2s"), ("pad", "2x"))
AFFINITY_KEY = StructTable("affinity_key", ("client", "16s"), ("service", "I"))
AFFINITY = StructTable("affinity_entry", ("address", "16s"), ("port", "2s"), ("pad", "6x"), ("last_used_ns", "Q"))
SOCKET_KEY = StructTable(
    "socket_key", ("cookie", "Q"), ("backend", "16s"), ("port", "2s"), ("protocol", "B"), ("pad", "5x")
)
SOCKET = StructTable("socket_entry", ("address", "16s"), ("port", "2s"), ("pad", "2x"), ("service", "I"))
EVENT = StructTable(
    "event",
    ("time_ns", "Q"),
    ("source", "16s"),
    ("destination", "16s"),
    ("translated", "16s"),
    ("kind", "I"),
    ("reason", "I"),
    ("attachment", "I"),
    ("peer", "I"),
    ("bytes", "I"),
    ("source_port", "2s"),
    ("destination_port", "2s"),
    ("translated_port", "2s"),
    ("protocol", "B"),
    ("direction", "B"),
    ("hook", "B"),
    ("tcp_flags", "B"),
    ("ethertype", "H"),
)

#: Key and value of every map of entries.
MAPS: Mapping[str, tuple[StructTable, StructTable]] = {
    **layout.MAPS,
    "flows": (FLOW_KEY, FLOW),
    "flows_before": (FLOW_KEY, FLOW),
    "flow_counts": (U32, U64),
    "flows_begun": (U32, BEGUN),
    "known_flows": (U32, KNOWN_FLOW),
    "packets": (U32, PACKET),
    "nat_work": (U32, NAT_WORK),
    "collect_work": (U32, NAT_WORK),
    "limits": (U32, LIMIT),
    "fragments": (FRAGMENT_KEY, FRAGMENT),
    "waiting": (FRAGMENT_KEY, U64),
    "waiting_parts": (U32, WAITING_PART),
    "waited": (U32, U64),
    "icmp_answers": (U32, ICMP_ANSWER),
    "prefixes": (PREFIX_KEY, U32),
    "policy": (POLICY_KEY, U32),
    "node_addresses": (ADDRESS_KEY, U32),
    "services": (SERVICE_KEY, SERVICE),
    "backends": (BACKEND_KEY, BACKEND),
    "members": (MEMBER_KEY, U32),
    "maglev": (U32, U32),
    "affinity": (AFFINITY_KEY, AFFINITY),
    "sockets": (SOCKET_KEY, SOCKET),
    "socket_flows": (SOCKET_KEY, SOCKET),
    "namespaces": (U64, U32),
    "events_lost": (U32, U64),
    "event_layout": (U32, EVENT),
}


def check(artifact: Artifact) -> None:
    """This version's tables against the compiler's layout: never read one struct as another. Raises StateError."""
    for name, (key, value) in MAPS.items():
        definition, compiled = artifact.maps.get(name), artifact.layouts.get(name)
        if (
            definition is None
            or compiled is None
            or (definition.key_size, definition.value_size) != (key.size, value.size)
            or (compiled.key, compiled.value) != (key.places(), value.places())
        ):
            raise StateError(
                f"The compiled datapath's map {name} does not fit this version of rdmanet; "
                "make it anew with `python -m rdmanet.datapath.compiler --output DIRECTORY`.",
                subject=name,
            )
