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
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rdmanet import lease as wire
from rdmanet import memlock
from rdmanet.environment import INFINIBAND, PORT, Environment, gid_index, is_soft_roce
from rdmanet.errors import LeaseRefusedError, RdmanetError
from rdmanet.verbs.link import Link


def environment(hello: wire.HelloReply, infiniband: Path = INFINIBAND) -> Environment:
    """From what the agent says. LeaseRefusedError for a pod without a device, UnavailableError as `gid_index`."""
    if hello.device is None:
        raise LeaseRefusedError(wire.no_device(hello.pod), operation="no_device")
    return Environment(
        pod=wire.pod_text(hello.pod),
        device=hello.device,
        gid_indexes={address: gid_index(hello.device, address, infiniband) for address in hello.addresses},
        soft_roce=is_soft_roce(hello.device, infiniband),
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
