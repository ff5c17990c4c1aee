"""Which slots go together, and with which GPU: a pure choice by NUMA node and by what PCI has in common.

Kubelet does not say which GPU the container gets. So a slot is preferred whose device has a GPU near it, and slots that
are near each other; Kubernetes' Topology Manager, where it is on, has taken out before what is on other NUMA nodes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys")
#: PCI classes of what computes: VGA controller, 3D controller, processing accelerator (PCI code and id assignment).
GPU_CLASSES = ("0x0300", "0x0302", "0x1200")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device is; nothing is known of a software device's."""

    numa_node: int | None = None
    #: From the root complex down: ("pci0000:3a", "0000:3a:00.0", "0000:3b:00.0").
    pci: tuple[str, ...] = ()


NOWHERE = Place()


def shared(one: Place, other: Place) -> int:
    """How many bridges two devices have in common, their root complex counted; the devices themselves are none."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one.pci[:-1], other.pci[:-1], strict=False))
    return sum(1 for _ in pairs)


def nearness(place: Place, gpus: Iterable[Place]) -> int:
    """What a device has in common with the nearest GPU; 0 where they meet in the processor only, or nothing is
    known."""
    return max((shared(place, gpu) for gpu in gpus), default=0)


def preferred(
    available: Sequence[str],
    must: Sequence[str],
    size: int,
    places: Mapping[str, Place],
    gpus: Collection[Place] = (),
) -> list[str]:
    """``size`` of the available ids, in order of preference, ``must`` first and always.

    As few NUMA nodes as can be, that of ``must`` before others; in a node those that are nearest to a GPU, of those
    on devices that are not chosen yet, of those the ones nearest to what is; else by their order in ``available``.
    Shorter where there are not so many.
    """
    chosen = list(dict.fromkeys(must))
    left = [one for one in dict.fromkeys(available) if one not in chosen]
    at = {one: places.get(one, NOWHERE) for one in (*chosen, *left)}
    near = {one: nearness(at[one], gpus) for one in left}
    while left and len(chosen) < size:
        room = Counter(at[one].numa_node for one in left)
        key = functools.partial(_rank, at, near, room, chosen, size - len(chosen))
        best = min(left, key=key)  # the first of equals
        left.remove(best)
        chosen.append(best)
    return chosen


def _rank(
    at: Mapping[str, Place],
    near: Mapping[str, int],
    room: Mapping[int | None, int],
    chosen: Sequence[str],
    wanted: int,
    one: str,
) -> tuple[object, ...]:
    """The smaller the better; ``room``: how many are left on each node."""
    node = at[one].numa_node
    there = room[node]
    return (
        node not in {at[other].numa_node for other in chosen},  # a node that is used already,
        -min(there, wanted),  # or one that can give all that is wanted, else as many as can be;
        -near[one],
        # of two like nodes the fuller one, so that the other stays whole for larger wishes.
        there,
        -1 if node is None else node,
        bool(at[one].pci) and at[one] in {at[other] for other in chosen},  # another device before the same once more,
        -max((shared(at[one], at[other]) for other in chosen), default=0),
    )


def place_of(entry: Path) -> Place:
    """Where the device behind a sysfs entry is (its ``device`` link, or itself); NOWHERE for a software device."""
    device = entry / "device"
    path = (device if device.exists() else entry).resolve()
    names = [part for part in path.parts if part.startswith("pci") or part.count(":") == 2]
    if not names or not names[0].startswith("pci"):
        return NOWHERE
    node = None
    with contextlib.suppress(OSError, ValueError):
        number = int((path / "numa_node").read_text(encoding="ascii"))
        node = number if number >= 0 else None  # -1: the firmware does not say
    return Place(node, tuple(names))


def rdma_place(device: str, sysfs: Path = SYSFS) -> Place:
    """Where an RDMA device of this host is."""
    return place_of(sysfs / "class/infiniband" / device)


def gpu_places(sysfs: Path = SYSFS) -> list[Place]:
    """Where this host's GPUs are."""
    found = []
    devices = sysfs / "bus/pci/devices"
    for entry in sorted(devices.iterdir()) if devices.is_dir() else ():
        with contextlib.suppress(OSError):
            if (entry / "class").read_text(encoding="ascii").startswith(GPU_CLASSES):
                found.append(place_of(entry))
    return found
