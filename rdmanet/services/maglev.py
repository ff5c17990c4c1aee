"""Maglev's table: which backend a flow goes to, so that few move when one comes or goes (Eisenbud et al., "Maglev: A
Fast and Reliable Software Network Load Balancer", NSDI 2016, 3.4)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from rdmanet.errors import InputError
from rdmanet.model import is_prime

_HASHES = struct.Struct("<QQ")


def table(names: Sequence[bytes], size: int) -> list[int]:
    """For each of ``size`` places the index of a name in ``names``.

    The same set of names in the same order of its own gives the same table on every host; the names' order decides
    only whose turn is first, so callers sort them. Raises InputError where ``size`` is no prime (else a name's
    permutation would not reach every place) or smaller than the number of names.
    """
    if not is_prime(size):
        raise InputError(f"A Maglev table of {size} places cannot be made: the size must be a prime.")
    if len(names) > size:
        raise InputError(f"A Maglev table of {size} places has no room for {len(names)} backends.")
    places = [-1] * size
    if not names:
        return places
    steps = []
    for name in names:
        first, second = _HASHES.unpack(hashlib.blake2b(name, digest_size=_HASHES.size).digest())
        steps.append([first % size, second % (size - 1) + 1] if size > 2 else [first % size, 1])
    filled = 0
    while True:
        for index, step in enumerate(steps):
            place, skip = step
            while places[place] >= 0:
                place = (place + skip) % size
            places[place] = index
            step[0] = (place + skip) % size
            filled += 1
            if filled == size:
                return places
