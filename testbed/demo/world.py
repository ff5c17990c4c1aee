"""The demo's host, pods and the programs in them: what the steps share."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rdmanet.errors import UnavailableError
from testbed.host import Dump, Host
from testbed.outside import Outside
from testbed.paths import REPOSITORY
from testbed.peer import Peer
from testbed.pod import DeviceNode, Pod, rdma_nodes

TRAINERS = ("train-0", "train-1")
PODS = (*TRAINERS, "web-0")
#: The configuration's version per pod: both results are checked against their own specification.
VERSIONS = {"train-0": "1.1.0", "train-1": "1.1.0", "web-0": "1.0.0"}
SERVICE = "params"
FAMILIES = ("ipv4", "ipv6")


@dataclass
class World:
    """Grows from step to step; `close` takes everything back."""

    host: Host
    outside: Outside
    before: Dump
    pods: dict[str, Pod] = field(default_factory=dict)
    #: By pod: its addresses by family, and its RDMA device's name or None.
    addresses: dict[str, dict[str, str]] = field(default_factory=dict)
    devices: dict[str, str | None] = field(default_factory=dict)
    traffic: dict[str, Peer] = field(default_factory=dict)
    verbs: dict[str, Peer] = field(default_factory=dict)

    @classmethod
    def make(cls) -> World:
        """A host with an uplink and the world behind it: this machine in the virtual machine, else a scratch host."""
        with contextlib.ExitStack() as stack:
            machine = os.environ.get("RDMANET_IN_VM") == "1"
            host = stack.enter_context(Host.machine("demo") if machine else Host.scratch("demo"))
            outside = host.connect_outside()
            world = cls(host, outside, host.dump())
            stack.pop_all()
        return world

    def configuration(self, pod: str) -> dict[str, Any]:
        """The CNI network configuration of a pod, as libcni hands it to the plugin."""
        return {"cniVersion": VERSIONS[pod], "name": "demo", "type": "rdmanet", "rdma": pod in TRAINERS}

    def status(self) -> dict[str, Any]:
        """The agent's status document."""
        status: dict[str, Any] = self.host.api("GET", "/v1/status")
        return status

    def attachment(self, pod: str, status: dict[str, Any] | None = None) -> dict[str, Any]:
        """A pod's part of the status."""
        for attachment in (status or self.status())["attachments"]:
            if attachment["container_id"] == self.pods[pod].container_id:
                return dict(attachment)
        raise UnavailableError(f"the agent's status does not show {pod}")

    def start_pods(self) -> None:
        """Start the containers with the devices that the agent gave them, and the programs in them, side by side."""
        status = self.status()
        nodes: dict[str, tuple[DeviceNode, ...]] = {}
        for name in self.pods:
            attachment = self.attachment(name, status)
            self.addresses[name] = {family: attachment[family] for family in FAMILIES}
            device = attachment["device"]
            self.devices[name] = device["name"] if device else None
            nodes[name] = rdma_nodes(device["uverbs"], device["major"], device["minor"]) if device else ()
        hosts = {name: addresses["ipv4"] for name, addresses in self.addresses.items()}

        def start(name: str) -> None:
            pod = self.pods[name].start(nodes[name], hosts=hosts)
            # The library first: its imports take longest.
            self.verbs[name] = Peer.start(
                f"{name}-verbs",
                pod.popen,
                [sys.executable, "-m", "testbed.demo.verbs_peer"],
                cwd=str(REPOSITORY),
            )
            self.traffic[name] = Peer.traffic(name, pod.popen)

        with ThreadPoolExecutor(len(self.pods)) as executor:
            list(executor.map(start, self.pods))
        self.traffic["host"] = Peer.traffic("host", self.host.popen)
        self.traffic["outside"] = Peer.traffic("outside", self.outside.popen)

    def need_pods(self) -> None:
        """UnavailableError unless all pods are there with their programs."""
        missing = [name for name in PODS if name not in self.traffic]
        if missing:
            raise UnavailableError(f"not started, as `add` failed: {', '.join(missing)}")

    def stop_pods(self) -> None:
        """End the programs and the containers, as a runtime does before DEL; idempotent."""
        for peers in (self.traffic, self.verbs):
            for peer in peers.values():
                peer.close()
            peers.clear()
        for pod in self.pods.values():
            pod.stop()

    def close(self) -> None:
        """Everything, whatever state it is in."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.host.stop)
            for pod in self.pods.values():
                stack.callback(pod.destroy)
            stack.callback(self.stop_pods)


class Clock:
    """Milliseconds since it was made."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def elapsed_ms(self) -> float:
        """Until now."""
        return (time.monotonic() - self._started) * 1000
