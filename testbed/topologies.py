"""Topologies of machines as their sysfs has them (PCI paths and NUMA nodes), with what should be chosen on them.

Shapes after what their makers publish: GPUs and NICs behind common PCIe switches, a socket's devices on its NUMA node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rdmanet.kubelet.topology import Place


@dataclass(frozen=True)
class Wish:
    """What kubelet asks, and the right answer; ``available`` empty: all."""

    why: str
    size: int
    chosen: list[str]
    available: list[str] = field(default_factory=list)
    must: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Machine:
    """RDMA devices in the order of their numbers, and GPUs."""

    name: str
    nics: tuple[Place, ...]
    gpus: tuple[Place, ...]
    wishes: tuple[Wish, ...]


def _switched(node: int, root: int, gpus: int, nics: int) -> tuple[list[Place], list[Place]]:
    """GPUs and NICs behind one PCIe switch on its own root port."""
    stem = (f"pci0000:{root:02x}", f"0000:{root:02x}:00.0", f"0000:{root + 1:02x}:00.0")
    found = []
    for slot in range(gpus + nics):
        found.append(Place(node, (*stem, f"0000:{root + 2:02x}:{4 * slot:02x}.0", f"0000:{root + 3 + slot:02x}:00.0")))
    return found[:gpus], found[gpus:]


def _plain(node: int | None, root: int, device: int = 0) -> Place:
    """A device in a slot of the processor's own."""
    return Place(node, (f"pci0000:{root:02x}", f"0000:{root:02x}:{device:02x}.0", f"0000:{root + 1 + device:02x}:00.0"))


def _eight_gpus() -> Machine:
    """Two sockets, four switches with two GPUs and a NIC each, and a NIC for storage in a slot of each socket."""
    gpus, nics = [], []
    for node, root in ((0, 0x10), (0, 0x30), (1, 0x90), (1, 0xB0)):
        more_gpus, more_nics = _switched(node, root, gpus=2, nics=1)
        gpus += more_gpus
        nics += more_nics
    nics = [_plain(0, 0x50), *nics, _plain(1, 0xD0)]  # slots 0 and 5 are the storage's
    return Machine(
        "eight GPUs on two sockets",
        tuple(nics),
        tuple(gpus),
        (
            Wish("one: behind a switch with GPUs, not the storage's", 1, ["slot-1"]),
            Wish("two: both of one socket, and both with GPUs", 2, ["slot-1", "slot-2"]),
            Wish(
                "four do not fit into a socket's three: all of one, then the next's best",
                4,
                ["slot-1", "slot-2", "slot-0", "slot-3"],
            ),
            Wish("what must be there decides the socket", 2, ["slot-4", "slot-3"], must=["slot-4"]),
            Wish("what must be there decides, also where it is not the best", 2, ["slot-5", "slot-3"], must=["slot-5"]),
            Wish(
                "two of what is left: the socket that has two", 2, ["slot-3", "slot-4"], ["slot-1", "slot-3", "slot-4"]
            ),
            Wish(
                "one of what is left, equally good: the fuller socket, so that two stay together",
                1,
                ["slot-1"],
                ["slot-1", "slot-3", "slot-4"],
            ),
            Wish("all there are, where more is asked", 9, ["slot-1", "slot-2", "slot-0", "slot-3", "slot-4", "slot-5"]),
        ),
    )


def _one_socket() -> Machine:
    """One socket whose firmware names no NUMA node: a GPU and three NICs, one of them on the GPU's root port."""
    stem = ("pci0000:00", "0000:00:01.1", "0000:01:00.0")
    gpu = Place(None, (*stem, "0000:02:00.0", "0000:03:00.0"))
    near = Place(None, (*stem, "0000:02:01.0", "0000:04:00.0"))
    same_root = Place(None, ("pci0000:00", "0000:00:03.1", "0000:05:00.0"))
    return Machine(
        "one socket without NUMA",
        (_plain(None, 0x40), same_root, near),
        (gpu,),
        (
            Wish("the one behind the GPU's switch", 1, ["slot-2"]),
            Wish("then the one of its root complex", 2, ["slot-2", "slot-1"]),
            Wish("without it the root complex is what is nearest", 1, ["slot-1"], ["slot-0", "slot-1"]),
        ),
    )


def _no_gpu() -> Machine:
    """Two sockets, two ports of a NIC on each, no GPU: a storage or a CPU training node."""
    ports = [
        Place(node, (f"pci0000:{root:02x}", f"0000:{root:02x}:02.0", f"0000:{root + 1:02x}:00.{function}"))
        for node, root in ((0, 0x20), (1, 0xA0))
        for function in (0, 1)
    ]
    return Machine(
        "two sockets without GPUs",
        tuple(ports),
        (),
        (
            Wish("two ports of one NIC", 2, ["slot-0", "slot-1"]),
            Wish(
                "two that are on one socket, not the first two", 2, ["slot-2", "slot-3"], ["slot-1", "slot-2", "slot-3"]
            ),
            Wish("one: the odd one out", 1, ["slot-1"], ["slot-1", "slot-2", "slot-3"]),
        ),
    )


def _shared_by_all() -> Machine:
    """Slots of one device of the host: no difference, so their order decides."""
    place = _plain(0, 0x60)
    return Machine(
        "one device for all",
        (place,) * 4,
        (_plain(1, 0xC0),),
        (
            Wish("in order", 2, ["slot-0", "slot-1"]),
            Wish("in order of what is left", 2, ["slot-2", "slot-3"], ["slot-2", "slot-3"]),
        ),
    )


MACHINES = (_eight_gpus(), _one_socket(), _no_gpu(), _shared_by_all())


def lay_out(machine: Machine, sysfs: Path) -> None:
    """Writes the machine as sysfs shows it: devices by path, and the links of their classes."""
    for folder in ("class/infiniband", "bus/pci/devices"):
        (sysfs / folder).mkdir(parents=True)
    for number, place in enumerate(machine.nics):
        device = _lay_device(sysfs, place, "0x020700")
        entry = device / "infiniband" / f"mlx5_{number}"
        entry.mkdir(parents=True)
        (entry / "device").symlink_to(device)
        (sysfs / "class/infiniband" / entry.name).symlink_to(entry)
    for place in machine.gpus:
        _lay_device(sysfs, place, "0x030200")


def _lay_device(sysfs: Path, place: Place, kind: str) -> Path:
    device = sysfs.joinpath("devices", *place.pci)
    device.mkdir(parents=True, exist_ok=True)
    (device / "class").write_text(f"{kind}\n")
    (device / "numa_node").write_text(f"{-1 if place.numa_node is None else place.numa_node}\n")
    link = sysfs / "bus/pci/devices" / device.name
    if not link.is_symlink():
        link.symlink_to(device)
    return device
