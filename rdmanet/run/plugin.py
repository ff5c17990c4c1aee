"""Executes the CNI executable as a container runtime does (specification 1.1.0, section 2)."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rdmanet.errors import KernelError, RdmanetError, UnavailableError
from rdmanet.model import IPAddress
from rdmanet.run.job import IFNAME, Plan, PodPlan

NAME = "rdmanet"
#: Where distributions and Kubernetes have plugins.
DIRECTORIES = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")
#: What the specification's code says of a call that another time might succeed.
_TRY_AGAIN_LATER = 11


class PluginError(RdmanetError):
    """The plugin refused; its sentence."""


def find(given: Path | None, environment: Mapping[str, str]) -> Path:
    """The executable: what was given, else the first in CNI_PATH and the usual directories. UnavailableError."""
    if given is not None:
        if not os.access(given, os.X_OK):
            raise UnavailableError(f"There is no CNI executable at {given}.", operation="run", subject=str(given))
        return given.absolute()
    directories = [*filter(None, environment.get("CNI_PATH", "").split(":")), *DIRECTORIES]
    for directory in directories:
        if os.access(found := Path(directory, NAME), os.X_OK):
            return found.absolute()
    raise UnavailableError(
        f"rdmanet's CNI executable is in none of {', '.join(directories)}: install it (`install -D build/cni/rdmanet"
        " /opt/cni/bin/rdmanet`), or say where it is with --plugin."
    )


async def call(command: str, plan: Plan, pod: PodPlan, lock: int) -> dict[str, Any]:
    """ADD or DEL of a pod; the result. Raises PluginError with what it said, UnavailableError where there is no plugin.

    ``lock`` is a descriptor that the plugin holds for as long as it runs: nobody takes its pod back before it ends.
    """
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": pod.container_id,
        "CNI_NETNS": pod.netns,
        "CNI_IFNAME": IFNAME,
        "CNI_PATH": str(Path(plan.plugin).parent),
        "CNI_ARGS": pod.cni_args,
    }
    try:
        # A session of its own: Ctrl-C is for the launcher, which waits for what the plugin has begun.
        process = await asyncio.create_subprocess_exec(
            plan.plugin,
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=(lock,),
            start_new_session=True,
        )
    except OSError as error:
        raise UnavailableError(
            "The CNI executable cannot be started.", operation=command, subject=plan.plugin, errno=error.errno
        ) from error
    output, _ = await process.communicate(json.dumps(plan.network_for(pod)).encode())
    return answer(command, pod, process.returncode or 0, output)


def answer(command: str, pod: PodPlan, status: int, output: bytes) -> dict[str, Any]:
    """What a plugin printed, or its error as PluginError."""
    try:
        document = json.loads(output) if output.strip() else {}
    except ValueError as error:
        raise PluginError(f"The CNI plugin printed no JSON in {command} of {pod.name}.") from error
    if status == 0:
        found: dict[str, Any] = document
        return found
    sentence = str(document.get("msg", f"status {status}")).rstrip(".")
    details = f" ({document['details']})" if document.get("details") else ""
    again = " Trying again later may help." if document.get("code") == _TRY_AGAIN_LATER else ""
    raise PluginError(f"Pod {pod.name}: {sentence}{details}.{again}")


def addresses(pod: PodPlan, result: Mapping[str, Any]) -> tuple[IPAddress, ...]:
    """The pod's own in ADD's result, IPv4 first. KernelError where there is none."""
    inside = {
        index for index, one in enumerate(result.get("interfaces", ())) if one.get("sandbox") and one["name"] == IFNAME
    }
    ips = [ip for ip in result.get("ips", ()) if ip.get("interface") in inside]
    found = sorted((ipaddress.ip_interface(ip["address"]).ip for ip in ips), key=lambda one: one.version)
    if not found:
        raise KernelError(f"Pod {pod.name} has no address after ADD.", operation="ADD", subject=pod.container_id)
    return tuple(found)
