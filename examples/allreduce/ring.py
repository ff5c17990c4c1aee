"""Ring all-reduce: every process ends with the sum of everybody's vectors, and sends each element about twice.

The vector is cut into as many chunks as there are processes, in a ring. In the first round (reduce-scatter) partial
sums walk to the right: after size - 1 steps each process has one chunk complete. In the second (all-gather) the
complete chunks walk on, until everybody has all (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009).
"""

from __future__ import annotations

import asyncio

import numpy as np

from .transport import Area, Memory, Part, Transport, Vector


class Ring:
    """One process's place in the ring: its vector is ``memory.vector``, its neighbours are behind ``transport``."""

    def __init__(self, transport: Transport, memory: Memory, rank: int, size: int):
        self._transport = transport
        self._memory = memory
        self._rank = rank
        self._size = size

    async def all_reduce(self) -> None:
        """Add everybody's vectors, in place: all processes end with the same bits.

        Nobody says when a place may be written again, because no message is needed for it: partial sums have a slot per
        step, and a neighbour that has the complete chunks, or begins the next all-reduce, has them from our reading
        those slots. A complete chunk goes straight into the vector: our own partial sum of it is part of it, so it has
        been sent.
        """
        vector, inbox = self._memory.vector, self._memory.inbox
        for step in range(self._size - 1):
            sent, kept = self._chunk(self._rank - step), self._chunk(self._rank - step - 1)
            arriving = self._slot(step, kept)
            # What we send is what the right neighbour keeps in the same step.
            await asyncio.gather(
                self._transport.put(sent, self._slot(step, sent)),
                self._transport.arrival(arriving),
            )
            vector[kept.start : kept.stop] += inbox[arriving.start : arriving.stop]
        for step in range(self._size - 1):
            sent, kept = self._chunk(self._rank + 1 - step), self._chunk(self._rank - step)
            await asyncio.gather(self._transport.put(sent, sent), self._transport.arrival(kept))

    def _chunk(self, number: int) -> Part:
        """The elements of a chunk; numbers go round."""
        number %= self._size
        length = self._memory.vector.size
        return Part(Area.VECTOR, length * number // self._size, length * (number + 1) // self._size)

    def _slot(self, step: int, chunk: Part) -> Part:
        """Where a partial sum of ``chunk`` waits in the inbox."""
        start = step * longest_chunk(self._memory.vector.size, self._size)
        return Part(Area.INBOX, start, start + chunk.stop - chunk.start)


def longest_chunk(length: int, size: int) -> int:
    """Elements of the longest chunk of a vector of ``length`` elements."""
    return -(-length // size)


def memory_for(vector: Vector, size: int) -> Memory:
    """``vector`` with the inbox that a ring of ``size`` processes needs."""
    slots = max(1, (size - 1) * longest_chunk(vector.size, size))
    return Memory(vector, np.zeros(slots, vector.dtype))
