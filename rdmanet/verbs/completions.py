"""Completion queues, each with its channel, shared by queue pairs of a session.

A queue has room for everything that its queue pairs can have outstanding, so none of them can fill it for the others.
Making one costs as much as a few queue pairs; so one is used again when its queue pairs have gone, and serves several
small batches at a time.

pyverbs never releases the GIL, so nothing here waits in a verb: the channel's descriptor is non-blocking and the event
loop watches it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rdmanet.errors import VerbsError
from rdmanet.verbs import compat

if TYPE_CHECKING:
    from rdmanet.verbs.queue_pair import QueuePair

#: Entries of a completion queue, where one connect does not need more.
_ENTRIES = 1023
#: Completions handled in one turn of the loop, so that others get theirs.
_COMPLETIONS_PER_TURN = 256


class CompletionQueue:
    """One completion queue; hands completions to the queue pairs by their numbers."""

    def __init__(self, context: Any, device_name: str, entries: int):
        self._device_name = device_name
        self._loop = asyncio.get_running_loop()
        self._by_qpn: dict[int, QueuePair] = {}
        self.entries = self._room = entries
        self._closed = False
        self._stale = False  # may hold completions of queue pairs that are gone
        self._channel, self._descriptor = compat.completion_channel(context)
        try:
            with compat.call("no completion queue could be made", "ibv_create_cq", device_name):
                self.cq = compat.CQ(context, entries, None, self._channel, 0)
                self.cq.req_notify()
        except BaseException:
            self._channel.close()
            raise
        self._loop.add_reader(self._descriptor, self._on_event)

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

    def add(self, qp: QueuePair) -> None:
        """A queue pair has been made on ``cq``."""
        self._by_qpn[qp.qpn] = qp

    def remove(self, qp: QueuePair) -> None:
        """A queue pair has been destroyed."""
        if self._by_qpn.pop(qp.qpn, None) is not None:
            self._stale = True

    def poll(self) -> None:
        """Handle what has completed; after req_notify, so that nothing is missed in between."""
        if self._handle() == _COMPLETIONS_PER_TURN:
            self._loop.call_soon(self._on_event)

    def close(self) -> None:
        """After its queue pairs. In order: pyverbs closes children with parents, but not every parent knows its own."""
        self._loop.remove_reader(self._descriptor)
        self._closed = True
        self._room = 0
        with compat.call("the completion queue could not be destroyed", "ibv_destroy_cq", self._device_name):
            self.cq.close()
            self._channel.close()

    def _handle(self) -> int:
        with compat.call("completions can no longer be read", "ibv_poll_cq", self._device_name):
            count, completions = self.cq.poll(_COMPLETIONS_PER_TURN)
        for completion in completions:
            qp = self._by_qpn.get(int(completion.qp_num))
            if qp is not None:  # else it has been destroyed with requests under way
                qp.completed(int(completion.wr_id), int(completion.status), int(completion.byte_len))
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

    def reserve(self, entries: int) -> CompletionQueue:
        """One with room for ``entries`` completions, which are kept for the caller; raises VerbsError."""
        for queue in self._queues:
            if queue.reserve(entries):
                return queue
        queue = CompletionQueue(self._context, self._device_name, min(max(entries, _ENTRIES), self._max_cqe))
        self._queues.append(queue)
        queue.reserve(entries)
        return queue

    def left(self, queue: CompletionQueue, entries: int) -> None:
        """Room is free again; of queues that nobody uses the largest is kept."""
        queue.give_back(entries)
        idle = sorted((found for found in self._queues if found.empty), key=lambda found: found.entries)
        for spare in idle[:-1] if queue.empty else ():
            self._queues.remove(spare)
            spare.close()

    def close(self) -> None:
        """After all queue pairs."""
        queues, self._queues = self._queues, []
        for queue in queues:
            queue.close()
