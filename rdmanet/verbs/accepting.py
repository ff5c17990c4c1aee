"""The listening side of a lease: what is done when the broker says that somebody connects."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from rdmanet import lease as wire
from rdmanet.errors import LeaseRefusedError, RdmanetError
from rdmanet.lease import pod_text
from rdmanet.model import PodName
from rdmanet.verbs.leases import Leases
from rdmanet.verbs.link import Link, LinkLostError
from rdmanet.verbs.listener import BACKLOG, Listener
from rdmanet.verbs.options import Options

if TYPE_CHECKING:
    from rdmanet.verbs.batch import Batch
    from rdmanet.verbs.queue_pair import QueuePair

_log = logging.getLogger(__name__)


class Acceptor:
    """Answers ``incoming``. What it works on is the session's: ``make`` makes connected ends for one, ``hold`` lets
    the session hold them, ``close`` closes them and gives their leases back."""

    def __init__(
        self,
        link: Link,
        leases: Leases,
        listeners: Mapping[str, Listener],
        *,
        make: Callable[[wire.Incoming, Options], Batch],
        hold: Callable[[Batch, int, PodName, str], None],
        close: Callable[[Iterable[QueuePair]], Awaitable[None]],
    ):
        self._link = link
        self._leases = leases
        self._listeners = listeners
        self._make = make
        self._hold = hold
        self._close = close

    async def answer(self, incoming: wire.Incoming) -> None:
        """Make the listening end and accept; whatever goes wrong is told to the connector."""
        listener = self._listeners.get(incoming.service)
        if listener is None or listener.full:
            why = "nobody listens any more" if listener is None else f"{BACKLOG} connections wait to be accepted"
            await self._reject(incoming, why)
            return
        try:
            batch = self._make(incoming, listener.options)
        except RdmanetError as error:
            _log.error("%s could not be accepted: %s", pod_text(incoming.peer), error)
            await self._reject(incoming, error.sentence)
            return
        # Held before they are accepted: should the agent go away now, these ends can be claimed.
        self._hold(batch, incoming.lease, incoming.peer, incoming.service)
        qps = batch.qps
        try:
            await self._link.request(lambda number: wire.Accept(number, incoming.lease, batch.ends))
        except LinkLostError:
            await self._link.up(None)  # claims first
            if not self._leases.are_held(qps):  # the new agent does not know them; the connector was hardly told
                await self._close(qps)
                return
        except LeaseRefusedError as error:
            _log.info("%s gave up: %s", pod_text(incoming.peer), error.sentence)
            await self._drop(qps)
            return
        except BaseException:
            await self._drop(qps)
            raise
        # Delivered even when they are broken by now: the connector may have sent, failed and closed before this task's
        # turn came. Whoever accepts them receives what has arrived, and then the reason.
        if not listener.deliver(qps):
            await self._close(qps)

    async def _drop(self, qps: list[QueuePair]) -> None:
        """Close queue pairs whose leases never were: there is nothing to give back."""
        for qp in qps:
            self._leases.let_go(qp)
        await self._close(qps)

    async def _reject(self, incoming: wire.Incoming, sentence: str) -> None:
        await self._link.tell(lambda number: wire.Reject(number, incoming.lease, sentence))
