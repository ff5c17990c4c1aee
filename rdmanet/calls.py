"""Which calls may be under way at once: one for each container id, and GC when there is no other.

Belongs to the event loop. Whoever else changes attachments (``rdmanet.watch``) takes the same turns as CNI's calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator


class KeyedLocks:
    """A lock per key, kept only while somebody holds or awaits it."""

    def __init__(self) -> None:
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Holds the key's lock."""
        lock = self._locks.get(key)
        if lock is None:
            lock = asyncio.Lock()
            self._locks[key] = lock
        async with lock:
            yield None

    def held(self, key: str) -> bool:
        """Whether somebody holds it."""
        lock = self._locks.get(key)
        return lock is not None and lock.locked()


class Calls:
    """GC must not meet an ADD in the middle, and ADDs need not wait for each other: readers and a writer."""

    def __init__(self) -> None:
        self._locks = KeyedLocks()
        self._collecting = asyncio.Condition()
        self._calls = 0
        self._collector = False

    def busy(self, container_id: str) -> bool:
        """Whether a call of this container, or GC, is under way."""
        return self._collector or self._locks.held(container_id)

    @contextlib.asynccontextmanager
    async def of(self, container_id: str) -> AsyncIterator[None]:
        """A call that changes or looks at what this container has."""
        async with self._together(), self._locks.hold(container_id):
            yield None

    @contextlib.asynccontextmanager
    async def _together(self) -> AsyncIterator[None]:
        async with self._collecting:
            await self._collecting.wait_for(lambda: not self._collector)
            self._calls += 1
        try:
            yield None
        finally:
            async with self._collecting:
                self._calls -= 1
                self._collecting.notify_all()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """A call that changes what any container has."""
        async with self._collecting:
            await self._collecting.wait_for(lambda: not self._collector)
            self._collector = True
        try:
            async with self._collecting:
                await self._collecting.wait_for(lambda: self._calls == 0)
            yield None
        finally:
            async with self._collecting:
                self._collector = False
                self._collecting.notify_all()
