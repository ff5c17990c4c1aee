"""Who gets a lease: every reason to refuse one, and the sentence that goes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rdmanet.broker.judging import Judging, Permits, between
from rdmanet.broker.table import Batch, LeaseTable, Service
from rdmanet.broker.values import Key, Limits, PodView, Reason
from rdmanet.lease import Ends, lease_text, no_device, pod_text
from rdmanet.model import PodName, Transport, address_of


def permits_all(connector: PodView, listener: PodView) -> str | None:
    """Where there is no policy: None permits, a sentence refuses. Asked from connector to listener only."""
    return None


def unknown_lease(number: int) -> str:
    return f"lease {lease_text(number)} is not one of this connection's, or has ended"


def foreign_gid(view: PodView, gid: bytes) -> str | None:
    """Why ``view`` must not use this GID, None when it is the pod's own."""
    if gid in view.addresses:
        return None
    own = " and ".join(str(address_of(address)) for address in view.addresses)
    return f"GID {address_of(gid)} is not an address of {pod_text(view.name)}, which has {own or 'none'}"


def connect_refusal(
    view: PodView,
    peer: PodView | None,
    target: PodName,
    service: str,
    keys: Sequence[Key],
    *,
    transport: Transport,
    connection: int,
    leases: LeaseTable,
    listening: Mapping[tuple[PodName, str], Service],
    limits: Limits,
    permits: Permits,
) -> tuple[Reason, str] | None:
    """Why ``connection`` of ``view`` gets no leases to ``service`` of ``target`` for its queue pairs ``keys``, which
    are all of one address; None when it gets one for each."""
    caller, name = pod_text(view.name), pod_text(target)
    if view.device is None:
        return Reason.NO_DEVICE, no_device(view.name)
    if view.unhealthy is not None:
        return Reason.NO_DEVICE, view.unhealthy
    if peer is None:
        return Reason.NO_SUCH_POD, f"there is no pod {name} on this host"
    if peer.device is None:
        return Reason.PEER_NO_DEVICE, no_device(target)
    if peer.unhealthy is not None:
        return Reason.PEER_NO_DEVICE, peer.unhealthy
    address = keys[0][0]
    foreign = foreign_gid(view, address)
    if foreign is not None:
        return Reason.FOREIGN_GID, foreign
    family = address_of(address).version
    if all(address_of(own).version != family for own in peer.addresses):
        sentence = f"{name} has no IPv{family} address, and {caller} connects from one"
        return Reason.ADDRESS_FAMILY, sentence
    denied = between(permits, view, address, peer, None)
    if denied is not None:
        return Reason.POLICY, denied
    if (target, service) not in listening:
        return Reason.NOT_LISTENING, f"no process of {name} listens on {service}"
    if listening[target, service].transport is not transport:
        use = "rdmanet.verbs.connect" if transport is Transport.UD else "rdmanet.verbs.datagram"
        sentence = f"{name}:{service} does not take {transport} queue pairs; use {use}, or listen with the other"
        return Reason.TRANSPORT, sentence
    held = leases.held(keys, transport, connection)
    if held is not None:
        return Reason.CONFLICT, f"queue pair {held[1]} of {caller} has a lease already; create another"
    if leases.pending_of(view.name) >= limits.pending_per_pod:
        return Reason.LIMIT, f"{caller} waits for {limits.pending_per_pod} leases already, the most"
    for pod in (view, peer):
        # A lease of a pod with itself needs two of its ends.
        wanted = 2 * len(keys) if view.name == target else len(keys)
        left = pod.max_leases - leases.ends_of(pod.name)
        if left < wanted:
            sentence = (
                f"{pod_text(pod.name)} has all its {pod.max_leases} leases in use; close some"
                if left <= 0
                else f"{pod_text(pod.name)} has {left} of its {pod.max_leases} leases left, and {wanted} are needed"
            )
            return Reason.LIMIT, sentence
    return None


def acceptance_refusal(
    view: PodView, batch: Batch, ends: Ends, leases: LeaseTable, judging: Judging
) -> tuple[Reason, Reason, str] | None:
    """``accept_refusal``, then policy: with the reasons for the listener and for the connector."""
    problem = accept_refusal(view, batch, ends, leases)
    if problem is not None:
        return Reason.CONFLICT, Reason.REJECTED, problem
    denied = judging.acceptance(batch, view, ends.gid)
    return None if denied is None else (Reason.POLICY, Reason.POLICY, denied)


def accept_refusal(view: PodView, batch: Batch, ends: Ends, leases: LeaseTable) -> str | None:
    """Why the listening pod ``view`` cannot accept ``batch`` with these ends; None when it can."""
    connector = batch.first.connector
    assert connector.key is not None
    if len(ends.qpns) != len(batch.leases):
        return f"{len(batch.leases)} queue pairs were asked for and {len(ends.qpns)} accepted"
    transport = batch.first.transport
    if ends.transport is not transport:
        return f"a {transport} queue pair was asked for and a {ends.transport} one accepted"
    foreign = foreign_gid(view, ends.gid)
    if foreign is not None:
        return foreign
    if address_of(ends.gid).version != address_of(connector.key[0]).version:
        return "the two ends use addresses of different families"
    assert batch.first.listener.connection is not None
    held = leases.held(ends.keys, transport, batch.first.listener.connection)
    if held is not None:
        return f"queue pair {held[1]} of {pod_text(view.name)} has a lease already"
    if transport is Transport.UD and leases.between(connector.key, ends.keys[0]) is not None:
        return (
            f"queue pair {connector.key[1]} of {pod_text(connector.pod)} and {ends.qpns[0]} of {pod_text(view.name)} "
            "are leased to each other already"
        )
    return None
