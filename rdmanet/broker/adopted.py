"""What an earlier agent left in the guard's maps, sorted: leases that can go on, ends that are revoked, the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rdmanet.broker.table import Lease, Side
from rdmanet.broker.values import DatagramKey, Directory, Key
from rdmanet.model import DatagramEntry, Device, GuardEntry, GuardState, Transport


@dataclass(slots=True)
class Adopted:
    """What to do with the entries. Nothing has been done yet."""

    leases: list[Lease] = field(default_factory=list)  # without connections
    revoked: list[tuple[Key, Device | None]] = field(default_factory=list)  # what waits for its queue pair to go
    incomplete: list[tuple[Key, GuardEntry]] = field(default_factory=list)  # to write: revoked, as half is missing
    strange: list[Key] = field(default_factory=list)  # to delete: of no pod
    strange_datagrams: list[DatagramKey] = field(default_factory=list)  # to delete: of no lease


def adopted(
    guards: Mapping[Key, GuardEntry],
    datagrams: Mapping[DatagramKey, DatagramEntry],
    directory: Directory,
    now_s: float,
    deadline_s: float,
) -> Adopted:
    """Sorts all entries; the leases that go on wait until ``deadline_s`` to be claimed."""
    found = Adopted()
    numbers: set[int] = set()
    held: set[Key] = set()

    def go_on(number: int, one: Key, other: Key, transport: Transport, connects: tuple[bool, bool]) -> bool:
        """Make a lease of these two ends, if their pods have devices and no other lease has its number."""
        if connects == (False, True):
            one, other = other, one
        first, second = _side(one, directory), _side(other, directory)
        if first is None or second is None or number in numbers or one == other:
            return False
        numbers.add(number)
        held.update((one, other))
        directed = connects[0] is not connects[1]
        found.leases.append(Lease(number, first, second, None, now_s, None, transport, deadline_s, directed))
        return True

    paired: set[DatagramKey] = set()
    for pair, datagram in sorted(datagrams.items()):
        own, peer = pair
        if pair in paired:
            continue  # came with its other direction
        known = all(end in guards and guards[end].state is GuardState.DATAGRAM for end in pair)
        if (known and _mirrored(datagrams, pair)) and go_on(
            datagram.lease, own, peer, Transport.UD, (datagram.connects, datagrams[peer, own].connects)
        ):
            paired.add((peer, own))
        else:
            found.strange_datagrams.append(pair)
    for key, entry in sorted(guards.items(), key=lambda item: (item[1].lease, item[0])):
        if key in held:
            continue  # came with its other end, or has leases of datagrams
        view = directory.by_address(key[0])
        if view is None:
            found.strange.append(key)
            continue
        if _mutual(guards, key):
            peer = (entry.peer_address, entry.peer_qpn)
            if go_on(entry.lease, key, peer, Transport.RC, (entry.connects, guards[peer].connects)):
                continue
        if entry.state is not GuardState.REVOKED:
            revoked = GuardEntry(entry.lease, entry.peer_address, entry.peer_qpn, GuardState.REVOKED)
            found.incomplete.append((key, revoked))
        found.revoked.append((key, view.device))
    return found


def _side(key: Key, directory: Directory) -> Side | None:
    view = directory.by_address(key[0])
    return None if view is None or view.device is None else Side(view.name, view.device, None, None, key)


def _mutual(guards: Mapping[Key, GuardEntry], key: Key) -> bool:
    """Whether this entry and its peer's name each other, and both are granted."""
    entry = guards[key]
    peer = guards.get((entry.peer_address, entry.peer_qpn))
    if peer is None or not entry.state is peer.state is GuardState.GRANTED:
        return False
    return (peer.lease, peer.peer_address, peer.peer_qpn) == (entry.lease, *key)


def _mirrored(datagrams: Mapping[DatagramKey, DatagramEntry], key: DatagramKey) -> bool:
    """Whether the other direction is there as well, of the same lease."""
    own, peer = key
    mirror = datagrams.get((peer, own))
    return mirror is not None and mirror.lease == datagrams[key].lease
