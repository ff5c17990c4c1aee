"""What a rank finds in its environment, and which names it can look up: pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rdmanet.model import IPAddress

MASTER_PORT = 29500
#: Set by other launchers; from outside they would say that this is another job's process.
FOREIGN = ("PMI_FD", "PMI_PORT", "PMI_ID", "PMIX_RANK", "PMIX_NAMESPACE", "PMIX_SERVER_URI", "JOB_COMPLETION_INDEX")


@dataclass(frozen=True, slots=True)
class Member:
    """A pod of the job: its name and its addresses, IPv4 first."""

    name: str
    addresses: tuple[IPAddress, ...]


def ranks(members: Sequence[Member], rank: int, master_port: int) -> dict[str, str]:
    """Variables of torchrun, Open MPI and PMI, one process for each pod, and the peers in the order of their ranks."""
    size = str(len(members))
    found = {
        # torchrun (pytorch.org/docs/stable/elastic/run.html, "Environment Variables")
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "GROUP_RANK": str(rank),
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_WORLD_SIZE": size,
        "MASTER_ADDR": members[0].name,
        "MASTER_PORT": str(master_port),
        # Open MPI's mpirun
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": size,
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        # MPICH, Intel MPI, MVAPICH
        "PMI_RANK": str(rank),
        "PMI_SIZE": size,
        "RDMANET_PEERS": ",".join(member.name for member in members),
    }
    for version in (4, 6):
        of_family = [[str(one) for one in member.addresses if one.version == version] for member in members]
        if all(of_family):
            found[f"RDMANET_PEER_ADDRESSES_IPV{version}"] = ",".join(addresses[0] for addresses in of_family)
    return found


def environment(
    inherited: Mapping[str, str],
    members: Sequence[Member],
    rank: int,
    master_port: int,
    rdma: Mapping[str, str],
) -> dict[str, str]:
    """Everything of a rank: the launcher's own environment, without other launchers' words, then what this job says.
    Of the RDMA variables, those that the user has set are the user's."""
    found = {name: value for name, value in inherited.items() if name not in FOREIGN}
    kept = {name: value for name, value in rdma.items() if name.startswith("RDMANET_") or name not in inherited}
    return {**found, **kept, **ranks(members, rank, master_port)}


def hosts_file(members: Sequence[Member], own: str) -> str:
    """An /etc/hosts: loopback, and every pod of the job by both families."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    lines += [f"{address} {member.name}" for member in members for address in member.addresses]
    if own not in (member.name for member in members):
        lines.append(f"127.0.0.1 {own}")
    return "\n".join(lines) + "\n"
