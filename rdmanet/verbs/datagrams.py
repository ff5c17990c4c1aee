"""The datagrams of one session: their leases, those that others ask for, and what happens when the agent comes back."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Protocol

from rdmanet import lease as wire
from rdmanet.errors import LeaseRefusedError, RdmanetError
from rdmanet.lease import pod_text
from rdmanet.model import Transport
from rdmanet.verbs.failure import Failure
from rdmanet.verbs.leases import Leases
from rdmanet.verbs.link import Link, LinkLostError

if TYPE_CHECKING:
    from rdmanet.verbs.ud import Datagram, Peer

_log = logging.getLogger(__name__)


class Ask(Protocol):
    """A request that is made again when the agent goes away before it has answered."""

    async def __call__(
        self,
        make: Callable[[int], wire.Request],
        timeout_s: float | None,
        *,
        answered: Callable[[wire.Json], None] | None = None,
        too_late: Callable[[wire.Json], None] | None = None,
    ) -> None: ...


class Datagrams:
    """``rdmanet.verbs.ud.Leasing``. What it works with is the session's; ``left`` counts its users."""

    def __init__(
        self,
        link: Link,
        leases: Leases,
        *,
        ask: Ask,
        spawn: Callable[[Coroutine[None, None, None]], None],
        left: Callable[[], Awaitable[None]],
    ):
        self._link = link
        self._leases = leases
        self._ask = ask
        self._spawn = spawn
        self._left = left
        self._open: set[Datagram] = set()
        self._serving: dict[str, Datagram] = {}

    def serves(self, service: str) -> bool:
        """Whether one of them serves it, or is about to."""
        return service in self._serving

    async def begin(self, datagram: Datagram, timeout_s: float | None) -> None:
        """A new one: let others connect to its service, if it has one. It is closed where that fails."""
        self._open.add(datagram)
        service = datagram.service
        if service is None:
            return
        self._serving[service] = datagram
        try:
            await self._ask(lambda number: wire.Listen(number, service, Transport.UD), timeout_s)
        except BaseException:
            await datagram.close()
            raise
        datagram.established = True

    def fail_all(self, failure: Failure) -> None:
        """The device is gone."""
        for datagram in self._open:
            datagram.fail(failure)

    async def close_all(self) -> None:
        """The session is closed."""
        for datagram in list(self._open):
            await datagram.close()

    # What datagrams need

    async def lease(
        self,
        target: wire.Target,
        ends: wire.Ends,
        answered: Callable[[wire.ConnectReply], None],
        timeout_s: float | None,
    ) -> None:
        """See ``rdmanet.verbs.ud.Leasing``."""

        def too_late(values: wire.Json) -> None:
            self._spawn(self._leases.give_back([wire.ConnectReply.from_json(values).lease]))

        try:
            async with asyncio.timeout(timeout_s):
                await self._ask(
                    lambda number: wire.Connect(number, target, ends),
                    None,
                    answered=lambda values: answered(wire.ConnectReply.from_json(values)),
                    too_late=too_late,
                )
        except TimeoutError as error:
            await self._link.up(0)  # else this is the reason
            raise LeaseRefusedError(
                f"{target} did not answer within {timeout_s:g} s", operation="timed_out", subject=str(target)
            ) from error

    def held(self, peer: Peer) -> None:
        """See ``rdmanet.verbs.ud.Leasing``."""
        self._leases.hold([peer])

    async def ended(self, peers: list[Peer]) -> None:
        """See ``rdmanet.verbs.ud.Leasing``."""
        await self._leases.end(peers)

    async def closed(self, datagram: Datagram) -> None:
        """See ``rdmanet.verbs.ud.Leasing``."""
        self._open.discard(datagram)
        service = datagram.service
        try:
            if service is not None and self._serving.get(service) is datagram:
                del self._serving[service]
                await self._link.tell(lambda number: wire.Unlisten(number, service))
        finally:
            await self._left()

    # What the broker sends

    async def answer(self, incoming: wire.Incoming) -> None:
        """Somebody connects to a service of one of them."""
        datagram = self._serving.get(incoming.service)
        if datagram is None or datagram.closed or datagram.knows(incoming.ends):
            why = "it has this peer already" if datagram is not None else "nobody serves it any more"
            await self._reject(incoming, why)
            return
        peer: Peer | None = None
        try:
            ends = datagram.ends_towards(incoming.ends)
            # A peer before it is accepted: it may send as soon as it is told, and should the agent go away now, the
            # lease can be claimed.
            peer = datagram.join(incoming.ends, incoming.lease, incoming.peer, incoming.service)
            peer.handle()
        except RdmanetError as error:
            _log.error("%s could not be accepted: %s", pod_text(incoming.peer), error)
            self._drop(peer, error)
            await self._reject(incoming, error.sentence)
            return
        try:
            await self._link.request(lambda number: wire.Accept(number, incoming.lease, ends))
        except LinkLostError:
            pass  # the claim of it tells what has become of the lease
        except LeaseRefusedError as error:
            _log.info("%s gave up: %s", pod_text(incoming.peer), error.sentence)
            self._drop(peer, error)

    def _drop(self, peer: Peer | None, error: RdmanetError) -> None:
        """Its lease never was: there is nothing to give back."""
        if peer is not None:
            self._leases.let_go(peer)
            peer.fail(lambda: LeaseRefusedError(error.sentence, operation="lease", subject=str(peer)))

    async def _reject(self, incoming: wire.Incoming, sentence: str) -> None:
        await self._link.tell(lambda number: wire.Reject(number, incoming.lease, sentence))

    async def listen_again(self) -> None:
        """The agent is back."""
        for service, datagram in list(self._serving.items()):
            if not datagram.established:
                continue  # ``begin`` is still asking
            try:
                await self._link.request(functools.partial(wire.Listen, service=service, transport=Transport.UD))
            except LeaseRefusedError as error:
                _log.error("%s is not served any more: %s", service, error.sentence)
                del self._serving[service]
                datagram.complain(error)
