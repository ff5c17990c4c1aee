"""The capability ``bandwidth`` (CONVENTIONS.md, "Dynamic Plugin specific fields"), and the same keys in the network
configuration, as the reference plugin has them: rates in bits per second, bursts in bits."""

from __future__ import annotations

from collections.abc import Mapping

from rdmanet.cni.values import Json, config_error, number_of, object_of
from rdmanet.model import Bandwidth, Limit

KEYS = ("ingressRate", "ingressBurst", "egressRate", "egressBurst")

#: As Kubernetes bounds its annotations: 1k to 1P. 0 is no limit.
_RATES = range(1000, 10**15 + 1)
_BURSTS = range(1, 2**63)
#: A frame of TCP has up to 64 KiB and headers before it is cut into segments (GSO), and passes whole or not at all.
LEAST_BURST_BYTES = 128 * 1024
#: Where no burst is given: so long at the rate, and no less than this. TCP begins again 200 ms after it has lost the
#: end of what it had sent (TCP_RTO_MIN of Linux): what comes into the bucket meanwhile must fit, else that is lost.
_DEFAULT_BURST_MS = 250
_DEFAULT_BURST_BYTES = 256 * 1024
#: What runtimes write that have no burst in mind: the largest number of 32 bits, as bits (containerd) or bytes (CRI-O).
_NO_BURST_BITS = 2**32 - 1


def bandwidth_of(where: str, value: object) -> Bandwidth:
    """From an object with these keys, in any letter case, as runtimes write them; ``where`` is put before their names
    in errors. Raises CniError (7)."""
    given = {key.lower(): item for key, item in object_of(where, value).items()}
    before = f"{where}: " if where else ""
    return Bandwidth(*(_limit(before, given, direction) for direction in ("ingress", "egress")))


def lesser(one: Bandwidth, other: Bandwidth) -> Bandwidth:
    """For each direction the limit with the lower rate, where there are two."""
    return Bandwidth(_lesser(one.ingress, other.ingress), _lesser(one.egress, other.egress))


def _lesser(one: Limit | None, other: Limit | None) -> Limit | None:
    return min(filter(None, (one, other)), key=lambda limit: limit.bits_per_s, default=None)


def _limit(before: str, given: Mapping[str, Json], direction: str) -> Limit | None:
    rate_name, burst_name = f"{before}{direction}Rate", f"{before}{direction}Burst"
    rate, burst = given.get(f"{direction}rate"), given.get(f"{direction}burst")
    if burst == 0:
        burst = None
    if rate is None or rate == 0:
        if burst is not None:
            raise config_error(f'"{burst_name}" has no "{direction}Rate" beside it')
        return None
    bits_per_s = number_of(rate_name, rate, _RATES) or 0
    bits = number_of(burst_name, burst, _BURSTS)
    if bits is not None and bits < 8 * LEAST_BURST_BYTES:
        raise config_error(
            f'"{burst_name}" is {bits} bits; write {8 * LEAST_BURST_BYTES} (128 KiB) or more, as a frame of 64 KiB and'
            " its headers must fit, or leave it away"
        )
    if bits is None or bits >= _NO_BURST_BITS:
        return Limit(bits_per_s, max(_DEFAULT_BURST_BYTES, bits_per_s * _DEFAULT_BURST_MS // 8000))
    return Limit(bits_per_s, bits // 8)
