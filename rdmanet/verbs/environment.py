"""The environment variables that unmodified RDMA programs need in this pod: `python -m rdmanet.verbs env`.

::

    eval "$(python3 -m rdmanet.verbs env)"       # IPv4 where the pod has it; --family 6 for the other
    ib_send_lat -d $RDMANET_DEVICE -x $RDMANET_GID_INDEX train-1

GID indexes differ from pod to pod, so programs that guess one fail or, worse, fall back to TCP without a word. The
agent says which device and addresses are the pod's (the lease socket's `hello`), sysfs at which index each address is.
Neither pyverbs nor a device node is needed to be told.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rdmanet import lease as wire
from rdmanet import memlock
from rdmanet.errors import LeaseRefusedError, RdmanetError, UnavailableError
from rdmanet.model import IPAddress, address_key
from rdmanet.verbs.link import Link

INFINIBAND = Path("/sys/class/infiniband")
#: RoCE devices have one.
PORT = 1


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


def environment(hello: wire.HelloReply, infiniband: Path = INFINIBAND) -> Environment:
    """From what the agent says. LeaseRefusedError for a pod without a device, UnavailableError as `gid_index`."""
    if hello.device is None:
        raise LeaseRefusedError(wire.no_device(hello.pod), operation="no_device")
    return Environment(
        pod=wire.pod_text(hello.pod),
        device=hello.device,
        gid_indexes={address: gid_index(hello.device, address, infiniband) for address in hello.addresses},
        # Only rxe says which network interface it is on there (drivers/infiniband/sw/rxe/rxe_verbs.c, parent_show).
        soft_roce=(infiniband / hello.device / "parent").exists(),
        traffic_class=hello.traffic_class,
        service_level=hello.service_level,
    )


async def ask(timeout_s: float) -> wire.HelloReply:
    """Who this pod is, by its agent; UnavailableError when none answers within `timeout_s`."""
    replies: list[wire.HelloReply] = []

    async def greeted(hello: wire.HelloReply) -> None:
        replies.append(hello)

    link = Link(greeted, lambda message: None)
    link.start()
    try:
        await link.up(timeout_s)
    finally:
        await link.close()
    return replies[0]


def memlock_advice(limit: memlock.Limit, lifted: bool) -> str | None:
    """What to do about too low a limit; None where it is not."""
    if lifted or limit.enough:
        return None
    if limit.hard_bytes is None or limit.hard_bytes >= memlock.WANTED_BYTES:
        return f"memlock is {limit}: `ulimit -l {'unlimited' if limit.hard_bytes is None else limit.hard_bytes >> 10}`"
    return (
        f"memlock is {limit} and cannot be raised in here: RDMA programs will fail to register memory, and some then "
        "take TCP without a word. Give the container more (podman and docker: --ulimit memlock=-1; Kubernetes: "
        "LimitMEMLOCK=infinity in the runtime's unit; `rdmanet doctor` on the host says where)"
    )


def shell(variables: Mapping[str, str], limit: memlock.Limit) -> str:
    """Lines for a POSIX shell's eval."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    if not limit.enough and limit.soft_bytes != limit.hard_bytes:
        lines.append(f"ulimit -l {'unlimited' if limit.hard_bytes is None else limit.hard_bytes >> 10}")
    return "\n".join(lines) + "\n"


def document(found: Environment, variables: Mapping[str, str], limit: memlock.Limit, advice: str | None) -> str:
    """The same for programs."""
    value = {
        "pod": found.pod,
        "device": found.device,
        "port": PORT,
        "gid_indexes": {str(address): index for address, index in found.gid_indexes.items()},
        "variables": dict(variables),
        "families": {str(address.version): found.variables(address.version) for address in found.gid_indexes},
        "memlock": {"soft_bytes": limit.soft_bytes, "hard_bytes": limit.hard_bytes, "advice": advice},
    }
    return json.dumps(value, indent=2) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1, and a sentence on standard error, where this pod has no device or no agent answers."""
    parser = argparse.ArgumentParser(prog="python -m rdmanet.verbs", description="RDMA in this pod.")
    commands = parser.add_subparsers(dest="command", required=True)
    env = commands.add_parser(
        "env", help="shell variables for programs that know nothing of rdmanet", description=__doc__
    )
    env.formatter_class = argparse.RawDescriptionHelpFormatter
    env.add_argument("--family", type=int, choices=(4, 6), help="IP version to talk from; default: IPv4 where there is")
    env.add_argument(
        "--json", action="store_true", help="as JSON, with every address and family, and the memlock limit"
    )
    env.add_argument("--timeout-s", type=float, default=10.0, metavar="S", help="for the agent to answer; default: 10")
    options = parser.parse_args(arguments)
    try:
        found = environment(asyncio.run(ask(options.timeout_s)))
        variables = found.variables(options.family)
    except RdmanetError as error:
        print(f"rdmanet.verbs env: {error}", file=sys.stderr)
        return 1
    limit = memlock.here()
    advice = memlock_advice(limit, memlock.lifted())
    print(document(found, variables, limit, advice) if options.json else shell(variables, limit), end="")
    if advice is not None:
        print(f"rdmanet.verbs env: {advice}", file=sys.stderr)
    return 0
