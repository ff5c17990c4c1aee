"""What policy says of leases: each is judged from its connector to its listener, when it is asked for, when it is
accepted, and again whenever policy has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rdmanet.broker.table import Batch, Lease, LeaseTable, Side
from rdmanet.broker.values import Directory, PodView
from rdmanet.model import address_of

#: From connector to listener: why there must be no lease, as a sentence, or None. Of the addresses that the views have,
#: any of the same family will do.
Permits = Callable[[PodView, PodView], str | None]


def between(permits: Permits, view: PodView, own: bytes, peer: PodView, other: bytes | None) -> str | None:
    """Judges a lease from ``own``, an address key of ``view``, to ``other`` of ``peer``, or to any of the same family
    where it is not known yet. Only addresses that packets will have are looked at."""
    family = address_of(own).version
    others = tuple(key for key in peer.addresses if address_of(key).version == family) if other is None else (other,)
    return permits(replace(view, addresses=(own,)), replace(peer, addresses=others))


class Judging:
    """Asks about leases that there are."""

    def __init__(self, directory: Directory, permits: Permits, leases: LeaseTable):
        self._directory = directory
        self._permits = permits
        self._leases = leases

    def acceptance(self, batch: Batch, view: PodView, gid: bytes) -> str | None:
        """Why the listening pod ``view`` may not accept with this address."""
        connector = batch.first.connector
        assert connector.key is not None
        connecting = self._view(connector)
        return None if connecting is None else between(self._permits, connecting, connector.key[0], view, gid)

    def refused(self) -> dict[str, list[Lease]]:
        """The leases that policy does not allow any more, by the sentence that says so."""
        found: dict[str, list[Lease]] = {}
        known: dict[tuple[object, ...], str | None] = {}
        for lease in self._leases:
            asked = (*((side.pod, side.key and side.key[0]) for side in lease.sides), lease.directed)
            if asked not in known:
                known[asked] = self._refusal(lease)
            sentence = known[asked]
            if sentence is not None:
                found.setdefault(sentence, []).append(lease)
        return found

    def _refusal(self, lease: Lease) -> str | None:
        sentence = self._from(*lease.sides)
        # An agent of before this has not written who connected.
        return sentence if sentence is None or lease.directed else self._from(*lease.sides[::-1])

    def _from(self, one: Side, other: Side) -> str | None:
        view, peer = self._view(one), self._view(other)
        if view is None or peer is None or one.key is None:
            return None  # gone, and its leases with it in a moment
        return between(self._permits, view, one.key[0], peer, None if other.key is None else other.key[0])

    def _view(self, side: Side) -> PodView | None:
        return self._directory.by_name(side.pod) if side.key is None else self._directory.by_address(side.key[0])
