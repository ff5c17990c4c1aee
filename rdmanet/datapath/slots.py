"""Which place in the datapath's array of counters each attachment has.

An array that a program reaches in a few instructions needs small numbers, and attachments' ids only grow. Entries of
attachments and endpoints carry their slot, so that nothing else has to be kept, and a crash loses none.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from rdmanet.errors import ExhaustedError


class Slots:
    """The lowest free slot for who has none. Not for several threads at a time."""

    def __init__(self, bound: int, taken: Mapping[int, int]):
        """``taken``: attachment id → slot, of every entry that there is."""
        self._bound = bound
        self._taken = dict(taken)
        self._free = sorted(set(range(bound)) - set(self._taken.values()))

    def of(self, attachment_id: int) -> tuple[int, bool]:
        """The attachment's slot, and whether it is new to it. Raises ExhaustedError when all are taken."""
        slot = self._taken.get(attachment_id)
        if slot is not None:
            return slot, False
        if not self._free:
            raise ExhaustedError(
                f"The datapath counts the packets of {self._bound} attachments at most: delete pods.",
                operation="slot",
                subject=str(attachment_id),
            )
        slot = self._taken[attachment_id] = heapq.heappop(self._free)
        return slot, True

    def find(self, attachment_id: int) -> int | None:
        """The attachment's slot, if it has one."""
        return self._taken.get(attachment_id)

    def give_back(self, attachment_id: int) -> None:
        """Makes the slot free; idempotent."""
        slot = self._taken.pop(attachment_id, None)
        if slot is not None:
            heapq.heappush(self._free, slot)
