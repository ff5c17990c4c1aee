"""What one pod may take of the broker's time: its messages in turns with other pods', its connections at a pace.

A pod is an adversary: it may send as fast as it can from as many connections as it is allowed. Every pod that has
something to say gets one message in, then the next pod; and nobody gets a turn while effects wait to be done.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

#: Effects that may wait to be done before the next messages get their turn.
MAX_EFFECTS = 16
#: New connections of a pod: so many at once, then so many a second.
_CONNECTION_BURST, _CONNECTIONS_PER_S = 64, 20.0


class Turns:
    """One message of each pod in each round of the event loop. ``busy`` says when to wait with the next round;
    ``go_on`` must be called when that may have changed."""

    def __init__(self, busy: Callable[[], bool]):
        self._busy = busy
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}
        self._scheduled = False

    async def take(self, pod: int) -> None:
        """Returns when it is the pod's turn, once for each call, in the order of its calls."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.setdefault(pod, deque()).append(future)
        self._schedule(loop)
        await future

    def go_on(self) -> None:
        """Effects have been done."""
        if self._waiting and not self._scheduled:
            self._schedule(asyncio.get_running_loop())

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._scheduled and not self._busy():
            self._scheduled = True
            loop.call_soon(self._round)

    def _round(self) -> None:
        self._scheduled = False
        for pod, futures in list(self._waiting.items()):
            while futures:
                future = futures.popleft()
                if not future.done():  # else its connection was closed while it waited
                    future.set_result(None)
                    break
            if not futures:
                del self._waiting[pod]
        if self._waiting:
            self._schedule(asyncio.get_running_loop())


class Pace:
    """So many at once, then no more than so many a second (a token bucket)."""

    def __init__(self, burst: int, per_s: float, clock: Callable[[], float]):
        self._burst, self._per_s, self._clock = burst, per_s, clock
        self._tokens = float(burst)
        self._at_s = clock()

    def wait_s(self) -> float:
        """Takes one, and says how long to wait before it may be used."""
        now_s = self._clock()
        self._tokens = min(float(self._burst), self._tokens + (now_s - self._at_s) * self._per_s) - 1.0
        self._at_s = now_s
        return max(0.0, -self._tokens / self._per_s)


def pace_of_connections(clock: Callable[[], float]) -> Pace:
    """For the new connections of one pod."""
    return Pace(_CONNECTION_BURST, _CONNECTIONS_PER_S, clock)
