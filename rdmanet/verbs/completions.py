"""Completion queues, each with its channel, shared by queue pairs of a session.

A queue has room for everything that its queue pairs can have outstanding, so none of them can fill it for the others.
Making one costs as much as a few queue pairs; so one is used again when its queue pairs have gone, and serves several
small batches at a time.

pyverbs never releases the GIL, so nothing here waits in a verb: the channel's descriptor is non-blocking and the event
loop watches it. A polling queue has no channel: while an operation waits, the loop looks into it once per turn.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

from rdmanet.errors import VerbsError
from rdmanet.verbs import compat

if TYPE_CHECKING:
    from rdmanet.verbs.endpoint import Endpoint

_log = logging.getLogger(__name__)

#: A polling queue is looked into without a pause for so long after it had something, then with pauses: who waits for
#: a message that comes in a minute does not need the processor until then.
_SPIN_S = 0.002
_PAUSE_S = 0.001
#: Entries of a completion queue, where one connect does not need more.
_ENTRIES = 1023
#: Completions handled in one turn of the loop, so that others get theirs.
_COMPLETIONS_PER_TURN = 256


class CompletionQueue:
    """One completion queue; hands completions to the queue pairs by their numbers."""

    def __init__(self, context: Any, device_name: str, entries: int, *, polling: bool):
        self.polling = polling
        self._device_name = device_name
        self._loop = asyncio.get_running_loop()
        self._by_qpn: dict[int, Endpoint] = {}
        self.entries = self._room = entries
        self._closed = False
        self._stale = False  # may hold completions of queue pairs that are gone
        self._waiting = 0  # operations that wait for completions
        self._spinning = False
        self._spin_until_s = 0.0
        self._channel: Any = None
        self._descriptor = -1
        if not polling:
            found = compat.completion_channel(context)
            if found is not None:
                self._channel, self._descriptor = found
            else:
                _log.warning("pyverbs does not say which descriptor has the completions of %s: polling", device_name)
        try:
            with compat.call("no completion queue could be made", "ibv_create_cq", device_name):
                self.cq = compat.CQ(context, entries, None, self._channel, 0)
                if self._channel is not None:
                    self.cq.req_notify()
        except BaseException:
            if self._channel is not None:
                self._channel.close()
            raise
        if self._channel is not None:
            self._loop.add_reader(self._descriptor, self._on_event)

    # An operation that waits for completions does so inside ``with``: a polling queue is looked into meanwhile.

    def __enter__(self) -> None:
        self._waiting += 1
        if self._channel is None and not self._spinning:
            self._spinning = True
            self._spin_until_s = self._loop.time() + _SPIN_S
            self._loop.call_soon(self._spin)

    def __exit__(self, *exception: object) -> None:
        self._waiting -= 1

    @property
    def empty(self) -> bool:
        return not self._by_qpn

    def reserve(self, entries: int) -> bool:
        """Keep room for queue pairs that are about to be made; False when there is too little."""
        if self._room < entries:
            return False
        if self._stale:
            # A number may come again, and must not get what belongs to its former owner.
            while self._handle() == _COMPLETIONS_PER_TURN:
                pass
            self._stale = False
        self._room -= entries
        return True

    def give_back(self, entries: int) -> None:
        """Room that was reserved and is not used (any more)."""
        self._room += entries

    def add(self, qp: Endpoint) -> None:
        """A queue pair has been made on ``cq``."""
        self._by_qpn[qp.qpn] = qp

    def remove(self, qp: Endpoint) -> None:
        """A queue pair has been destroyed."""
        if self._by_qpn.pop(qp.qpn, None) is not None:
            self._stale = True

    def poll(self) -> None:
        """Handle what has completed; after req_notify, so that nothing is missed in between."""
        if self._handle() == _COMPLETIONS_PER_TURN and self._channel is not None:
            self._loop.call_soon(self._on_event)

    def close(self) -> None:
        """After its queue pairs. In order: pyverbs closes children with parents, but not every parent knows its own."""
        if self._channel is not None:
            self._loop.remove_reader(self._descriptor)
        self._closed = True
        self._room = 0
        with compat.destroyed("the completion queue could not be destroyed", "ibv_destroy_cq", self._device_name):
            self.cq.close()
            if self._channel is not None:
                self._channel.close()

    def forked(self) -> None:
        """In a child of its process."""
        self._closed = True
        for qp in self._by_qpn.values():
            qp.forked()

    def _handle(self) -> int:
        with compat.call("completions can no longer be read", "ibv_poll_cq", self._device_name):
            count, completions = self.cq.poll(_COMPLETIONS_PER_TURN)
        for completion in completions:
            qp = self._by_qpn.get(int(completion.qp_num))
            if qp is not None:  # else it has been destroyed with requests under way
                qp.completed(
                    int(completion.wr_id), int(completion.status), int(completion.byte_len), int(completion.src_qp)
                )
        return int(count)

    def _on_event(self) -> None:
        if self._closed:
            return
        try:
            if compat.next_event(self._channel, self.cq):
                with compat.call("completions can no longer be waited for", "ibv_req_notify_cq"):
                    self.cq.req_notify()
            self.poll()
        except VerbsError as error:
            self._loop.remove_reader(self._descriptor)
            self._fail(error)

    def _spin(self) -> None:
        """Look for completions, and again soon while an operation waits."""
        if self._closed or not self._waiting:
            self._spinning = False
            return
        try:
            found = self._handle()
        except VerbsError as error:
            self._spinning = False
            self._fail(error)
            return
        now_s = self._loop.time()
        if found:
            self._spin_until_s = now_s + _SPIN_S
        if now_s > self._spin_until_s:
            self._loop.call_later(_PAUSE_S, self._spin)
            return
        # The device may be software, and this its only processor (docs/verbs.md). Returns at once when nobody else
        # has anything to do.
        os.sched_yield()
        self._loop.call_soon(self._spin)

    def _fail(self, error: VerbsError) -> None:
        self._room = 0
        for qp in list(self._by_qpn.values()):
            qp.fail_with(error)


class CompletionQueues:
    """Those of one device and event loop."""

    def __init__(self, context: Any, device_name: str, max_cqe: int):
        self._context = context
        self._device_name = device_name
        self._max_cqe = max_cqe
        self._queues: list[CompletionQueue] = []

    def reserve(self, entries: int, *, polling: bool = False) -> CompletionQueue:
        """One with room for ``entries`` completions, which are kept for the caller; raises VerbsError."""
        for queue in self._queues:
            if queue.polling is polling and queue.reserve(entries):
                return queue
        size = min(max(entries, _ENTRIES), self._max_cqe)
        queue = CompletionQueue(self._context, self._device_name, size, polling=polling)
        self._queues.append(queue)
        queue.reserve(entries)
        return queue

    def left(self, queue: CompletionQueue, entries: int) -> None:
        """Room is free again; of queues of a kind that nobody uses the largest is kept."""
        queue.give_back(entries)
        alike = (found for found in self._queues if found.empty and found.polling is queue.polling)
        idle = sorted(alike, key=lambda found: found.entries)
        for spare in idle[:-1] if queue.empty else ():
            self._queues.remove(spare)
            spare.close()

    def forked(self) -> None:
        """In a child of its process."""
        for queue in self._queues:
            queue.forked()

    @property
    def idle(self) -> bool:
        """Whether no queue pair uses any of them."""
        return all(queue.empty for queue in self._queues)

    def close(self) -> None:
        """After all queue pairs."""
        queues, self._queues = self._queues, []
        for queue in queues:
            queue.close()
