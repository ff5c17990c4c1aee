"""The map of limits (bpf/limit.h): two for each attachment's slot, what its pod sends and what it gets."""

from __future__ import annotations

from collections.abc import Mapping

from rdmanet.datapath import bpf
from rdmanet.datapath.layout import DIRECTIONS, U32
from rdmanet.datapath.tables import LIMIT
from rdmanet.model import UNLIMITED, Bandwidth, Limit

#: LIMIT_SHIFT.
_SHIFT = 20
_NS_PER_S = 10**9
_FULL = 0  # next_ns: the bucket


class BandwidthMap:
    """By slot. Synchronous; one writer at a time."""

    def __init__(self, maps: Mapping[str, int]):
        """``maps``: descriptors by name, which stay the caller's."""
        self._map = maps["limits"]

    def set(self, slot: int, bandwidth: Bandwidth) -> None:
        """Limits both directions from now on. A limit that is there already keeps its bucket as it is."""
        if self.get(slot) == bandwidth:
            return
        for place, limit in _places(slot, bandwidth).items():
            raw = bytes(LIMIT.size)
            if limit is not None:
                bits, burst = limit.bits_per_s, limit.burst_bytes
                byte_time = (8 * _NS_PER_S << _SHIFT) // bits
                raw = LIMIT.pack(bits, burst, max(1, byte_time), max(1, 8 * _NS_PER_S * burst // bits), _FULL)
            bpf.update(self._map, U32.pack(place), raw)

    def get(self, slot: int) -> Bandwidth:
        """What holds."""
        found = []
        for place in _places(slot, UNLIMITED):
            raw = bpf.lookup(self._map, U32.pack(place), LIMIT.size)
            assert raw is not None, "an array has all its elements"
            bits, burst, *_ = map(int, LIMIT.unpack(raw))
            found.append(Limit(bits, burst) if bits else None)
        egress, ingress = found
        return Bandwidth(ingress=ingress, egress=egress)


def _places(slot: int, bandwidth: Bandwidth) -> dict[int, Limit | None]:
    """In the order of DIRECTIONS."""
    return {len(DIRECTIONS) * slot: bandwidth.egress, len(DIRECTIONS) * slot + 1: bandwidth.ingress}
