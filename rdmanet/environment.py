"""What RDMA programs that know nothing of rdmanet need in their environment: names, numbers, nothing of the network.

The agent writes it into the CDI file of a pod's slot, ``python -m rdmanet.verbs env`` prints it inside the pod.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rdmanet.errors import UnavailableError
from rdmanet.model import IPAddress, address_key

INFINIBAND = Path("/sys/class/infiniband")
RDMA_CM = Path("/sys/class/misc/rdma_cm/dev")
#: RoCE devices have one.
PORT = 1
#: GIDs come from a queue of the kernel's, some milliseconds after a device or an address.
GID_TIMEOUT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.1


@dataclass(frozen=True, slots=True)
class Environment:
    """What there is to know; `gid_indexes` has each of the pod's addresses, IPv4 first."""

    pod: str
    device: str
    gid_indexes: Mapping[IPAddress, int]
    soft_roce: bool
    traffic_class: int
    service_level: int

    def address(self, family: int | None) -> IPAddress:
        """The first address, or the first of IP version `family`; UnavailableError when there is none."""
        for address in self.gid_indexes:
            if family in (None, address.version):
                return address
        raise UnavailableError(f"{self.pod} has no IPv{family} address", operation="env")

    def variables(self, family: int | None = None) -> dict[str, str]:
        """Name → value, for programs that talk from the address that `family` chooses."""
        chosen = self.address(family)
        index = str(self.gid_indexes[chosen])
        found = {
            "RDMANET_DEVICE": self.device,
            "RDMANET_PORT": str(PORT),
            "RDMANET_ADDRESS": str(chosen),
            "RDMANET_GID_INDEX": index,
        }
        for address, place in reversed(list(self.gid_indexes.items())):  # the first of each family stays
            found[f"RDMANET_GID_INDEX_IPV{address.version}"] = str(place)
        # Without "=" NCCL takes the name as the beginning of one, and rxe_rn1 is that of rxe_rn10.
        found |= {"NCCL_IB_HCA": f"={self.device}:{PORT}", "NCCL_IB_GID_INDEX": index}
        # "rc" stands for RC with UD to connect; in shared RDMA mode UCX would else take another pod's device.
        found |= {"UCX_NET_DEVICES": f"{self.device}:{PORT}", "UCX_TLS": "rc,self", "UCX_IB_GID_INDEX": index}
        if self.soft_roce and chosen.version == 4:
            # Through 1.18 UCX takes the completion's service level, which rxe leaves 0, for the packet's IP version.
            found["UCX_UD_VERBS_ETH_DGID_CHECK"] = "n"
        if self.traffic_class:
            found |= {"NCCL_IB_TC": str(self.traffic_class), "UCX_IB_TRAFFIC_CLASS": str(self.traffic_class)}
        if self.service_level:
            found |= {"NCCL_IB_SL": str(self.service_level), "UCX_IB_SL": str(self.service_level)}
        # Debian's Open MPI leaves UCX out and takes TCP instead, without a word.
        found |= {"OMPI_MCA_pml": "ucx", "OMPI_MCA_osc": "ucx"}
        return found


def gid_index(device: str, address: IPAddress, infiniband: Path = INFINIBAND) -> int:
    """The index of the device's RoCE v2 GID that is this address; UnavailableError when it has none."""
    port = infiniband / device / "ports" / str(PORT)
    wanted = address_key(address)
    try:
        entries = sorted((port / "gids").iterdir(), key=lambda entry: int(entry.name))
    except FileNotFoundError as error:
        raise UnavailableError(
            f"the RDMA device {device} of this pod is not visible here: /sys of this container is not the pod's own, "
            "or the device has been removed",
            operation="env",
            subject=device,
        ) from error
    for entry in entries:
        with contextlib.suppress(OSError):  # an empty place has no type
            kind = (port / "gid_attrs/types" / entry.name).read_text(encoding="ascii").strip()
            if kind == "RoCE v2" and address_key(entry.read_text(encoding="ascii").strip()) == wanted:
                return int(entry.name)
    raise UnavailableError(
        f"{device} has no RoCE v2 GID for {address}; is the address still on the pod's interface?",
        operation="env",
        subject=device,
    )


def connection_manager(file: Path = RDMA_CM) -> list[tuple[str, int, int]]:
    """rdma_cm's node, which all devices share, with its numbers; nothing where the host has none."""
    try:
        major, minor = file.read_text(encoding="ascii").split(":")
    except FileNotFoundError:
        return []
    return [("/dev/infiniband/rdma_cm", int(major), int(minor))]


def gid_indexes(device: str, addresses: Iterable[IPAddress], infiniband: Path = INFINIBAND) -> dict[IPAddress, int]:
    """``gid_index`` of each address of a device that was just made: waits a moment for those that are not there yet."""
    pause_s, deadline_s = _FIRST_PAUSE_S, time.monotonic() + GID_TIMEOUT_S
    wanted = tuple(addresses)
    while True:
        try:
            return {address: gid_index(device, address, infiniband) for address in wanted}
        except UnavailableError:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def is_soft_roce(device: str, infiniband: Path = INFINIBAND) -> bool:
    """Whether the device is rxe's."""
    # Only rxe says which network interface it is on there (drivers/infiniband/sw/rxe/rxe_verbs.c, parent_show).
    return (infiniband / device / "parent").exists()
