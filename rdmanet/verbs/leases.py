"""The leases that a session holds: claimed after the agent was away, given back in few messages."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Protocol

from rdmanet import lease as wire
from rdmanet.errors import LeaseRefusedError
from rdmanet.verbs.failure import Failure
from rdmanet.verbs.link import Link

_log = logging.getLogger(__name__)

#: Between claims when the agent could not read the kernel's queue pairs.
_CLAIM_AGAIN_S = 0.5


class Holder(Protocol):
    """What has a lease: a queue pair, or a datagram's peer."""

    lease: int

    @property
    def qpn(self) -> int:
        """Of the process's own queue pair."""

    def revoke(self, sentence: str) -> None:
        """The lease is over."""

    def fail(self, failure: Failure) -> None:
        """Raise this error from now on."""


class Leases:
    """Which lease belongs to what of this process."""

    def __init__(self, link: Link):
        self._link = link
        self._held: dict[int, list[Holder]] = {}  # two of them where a process leases to itself
        self._returned: list[int] = []  # leases to release
        self._returning: asyncio.Future[None] | None = None

    @property
    def holders(self) -> list[Holder]:
        """All of them."""
        return [holder for held in self._held.values() for holder in held]

    def hold(self, holders: Iterable[Holder]) -> None:
        """These have their leases now."""
        for holder in holders:
            self._held.setdefault(holder.lease, []).append(holder)

    def are_held(self, holders: Iterable[Holder]) -> bool:
        """Whether the leases of all of these live on, as far as is known."""
        return all(holder in self._held.get(holder.lease, []) for holder in holders)

    def let_go(self, holder: Holder) -> bool:
        """Forget it; False when its lease has ended already."""
        held = self._held.get(holder.lease, [])
        if holder not in held:
            return False
        held.remove(holder)
        if not held:
            del self._held[holder.lease]
        return True

    def revoked(self, leases: Iterable[int], sentence: str) -> None:
        """The broker has ended these leases."""
        for number in leases:
            for holder in self._held.pop(number, []):
                holder.revoke(sentence)

    def fail_all(self, failure: Failure) -> None:
        """The broker has ended all leases, for this reason."""
        held, self._held = self._held, {}
        for holder in [holder for holders in held.values() for holder in holders]:
            holder.fail(failure)

    async def end(self, holders: Iterable[Holder]) -> None:
        """Their queue pairs are gone: forget them, and give back the leases that have not ended."""
        numbers = [holder.lease for holder in holders if self.let_go(holder)]
        if numbers:
            await self.give_back(numbers)

    async def give_back(self, numbers: Sequence[int]) -> None:
        """Release leases; those that are given back in the same turn of the loop go together."""
        self._returned += numbers
        if self._returning is None:
            self._returning = asyncio.ensure_future(self._release())
        await asyncio.shield(self._returning)

    async def _release(self) -> None:
        await asyncio.sleep(0)
        numbers, self._returned, self._returning = self._returned, [], None
        for first in range(0, len(numbers), wire.MAX_BATCH):
            some = tuple(numbers[first : first + wire.MAX_BATCH])
            await self._link.tell(functools.partial(wire.Release, leases=some))

    async def claim_all(self) -> None:
        """The agent is back: keep what it gives back, revoke the others."""
        items = [wire.ClaimItem(holder.lease, holder.qpn) for holder in self.holders]
        for first in range(0, len(items), wire.MAX_BATCH):
            batch = tuple(items[first : first + wire.MAX_BATCH])
            while True:
                try:
                    values = await self._link.request(functools.partial(wire.Claim, leases=batch))
                    break
                except LeaseRefusedError as error:
                    if error.operation != "unavailable":
                        raise
                    _log.warning("leases could not be claimed yet: %s", error)
                    await asyncio.sleep(_CLAIM_AGAIN_S)
            lost = wire.ClaimReply.from_json(values).lost
            self.revoked(lost, "the agent came back and does not know the lease any more")
