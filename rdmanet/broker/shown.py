"""Leases as JSON: what ``rdmanet status`` and ``rdmanet rdma`` show of them."""

from __future__ import annotations

from collections.abc import Mapping

from rdmanet.broker.values import DatagramKey, Key, LeaseView
from rdmanet.model import DatagramEntry, GuardEntry, Transport, address_of


def lease_status(
    view: LeaseView, guards: Mapping[Key, GuardEntry], datagrams: Mapping[DatagramKey, DatagramEntry]
) -> dict[str, object]:
    """A lease with what reached its ends, by what the guard has counted."""
    ends = {}
    packets = size = 0
    both = (("connector", view.connector, view.listener), ("listener", view.listener, view.connector))
    for name, end, peer in both:
        entry: GuardEntry | DatagramEntry | None = None
        if view.transport is Transport.RC and end.key is not None:
            entry = guards.get(end.key)
        elif end.key is not None and peer.key is not None:
            entry = datagrams.get((end.key, peer.key))
        packets += entry.packets if entry is not None else 0
        size += entry.bytes if entry is not None else 0
        ends[name] = {
            "pod": end.pod,
            "address": None if end.key is None else str(address_of(end.key[0])),
            "qpn": None if end.key is None else end.key[1],
            "received": {"packets": entry.packets if entry else 0, "bytes": entry.bytes if entry else 0},
        }
    return {
        "lease": view.lease,
        "transport": view.transport,
        "state": view.state,
        "service": view.service,
        **ends,
        "packets": packets,
        "bytes": size,
        "age_s": view.age_s,
    }
