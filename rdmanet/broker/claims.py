"""After a restart: processes claim the leases that an earlier agent left, and the kernel says whether they may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rdmanet import lease as wire
from rdmanet.broker.table import Connection, Lease, LeaseTable, Side
from rdmanet.broker.values import Counts, Effect, FindHolders, Reason, error, reply
from rdmanet.model import Device, Transport


@dataclass(slots=True, eq=False)
class _Claiming:
    """A claim that waits for the kernel to say whose the queue pairs are."""

    connection: int
    request_id: int
    waiting: dict[int, tuple[Lease, Side]]  # query → what it decides
    claimed: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)


class Claims:
    """Those that have not been answered yet."""

    def __init__(
        self, connections: Mapping[int, Connection], leases: LeaseTable, queries: Iterator[int], counts: Counts
    ):
        self._connections = connections
        self._leases = leases
        self._queries = queries
        self._counts = counts
        self._waiting: dict[int, _Claiming] = {}  # query → the claim that waits for it

    def ask(self, connection: int, state: Connection, request: wire.Claim) -> list[Effect]:
        """A process names its leases and queue pairs."""
        claim = _Claiming(connection, request.id, {})
        asked: dict[Device, list[tuple[int, int]]] = {}
        for item in request.leases:
            lease = self._leases.get(item.lease)
            side = next(
                (
                    s
                    for s in (lease.sides if lease is not None else ())
                    if s.connection is None and s.pod == state.pod and s.key is not None and s.key[1] == item.qpn
                ),
                None,
            )
            if lease is None or side is None:
                claim.lost.append(item.lease)
                continue
            query = next(self._queries)
            claim.waiting[query] = (lease, side)
            self._waiting[query] = claim
            asked.setdefault(side.device, []).append((query, item.qpn))
        effects: list[Effect] = [FindHolders(device, tuple(queries)) for device, queries in asked.items()]
        return effects + _answer(claim)

    def holder_found(self, query: int, pid: int | None) -> list[Effect] | None:
        """As ``core.holders_found``; None when no claim has asked this."""
        claim = self._waiting.pop(query, None)
        if claim is None:
            return None
        lease, side = claim.waiting.pop(query)
        state = self._connections.get(claim.connection)
        if state is None:
            return []
        # Where the kernel cannot say whose the queue pair is, pod, QPN and the lease's secret id have to do.
        rightful = pid in (state.pid, 0) and not self._is_anothers(side, claim.connection)
        if rightful and lease.id in self._leases and side.connection is None:
            side.connection, side.pid = claim.connection, state.pid
            state.leases.add(lease.id)
            claim.claimed.append(lease.id)
            self._counts.claimed += 1
            if all(s.connection is not None for s in lease.sides):
                self._leases.no_deadline(lease)
        else:
            claim.lost.append(lease.id)
        return _answer(claim)

    def _is_anothers(self, side: Side, connection: int) -> bool:
        """Whether another connection holds the queue pair, for its leases with other peers."""
        return side.key is not None and self._leases.held([side.key], Transport.UD, connection) is not None

    def holder_unknown(self, query: int) -> list[Effect] | None:
        """The kernel did not answer: the claim can be made again. None when no claim has asked this."""
        claim = self._waiting.pop(query, None)
        if claim is None:
            return None
        for other in claim.waiting:
            self._waiting.pop(other, None)
        sentence = "the kernel's list of queue pairs could not be read; claim again"
        return [error(claim.connection, claim.request_id, Reason.UNAVAILABLE, sentence)]


def _answer(claim: _Claiming) -> list[Effect]:
    if claim.waiting:
        return []
    answer = wire.ClaimReply(tuple(claim.claimed), tuple(claim.lost))
    return [reply(claim.connection, claim.request_id, answer.to_json())]
