"""A host with kubelet (``testbed.kubelet``), the agent and the device plugin, and pods as kubelet has them made.

The order is kubelet's: Allocate, the sandbox's network namespace, CNI ADD, then the container, which gets what the CDI
files say of the devices that Allocate named.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rdmanet.errors import NotFoundError
from rdmanet.model import PodName
from testbed.cdi_spec import validate
from testbed.container import Process
from testbed.host import CniOutcome, Host
from testbed.kubelet import Loop, running
from testbed.paths import REPOSITORY
from testbed.pod import DeviceNode, Pod
from testbed.session import session

RESOURCE = "rdmanet.io/rdma"
ROOT, CDI = "/run/kubelet", "/run/cdi-test"
NETWORK: dict[str, Any] = {"cniVersion": "1.1.0", "name": "net", "type": "rdmanet"}
AGENT = ("-m", "rdmanet", "agent")
PLUGIN = ("-m", "rdmanet", "device-plugin")


@dataclass(frozen=True, slots=True)
class Edits:
    """What a container gets of CDI devices."""

    nodes: tuple[DeviceNode, ...]
    environment: dict[str, str]


@dataclass
class Sandbox:
    """A pod of kubelet's: its network namespace and container, what Allocate answered, and what ADD said."""

    name: PodName
    pod: Pod
    devices: list[str]  # CDI devices
    added: CniOutcome | None = None


@dataclass
class KubeletHost:
    """Made by ``begin``."""

    host: Host
    loop: Loop
    sections: dict[str, dict[str, Any]]
    plugin: Process | None = None
    sandboxes: list[Sandbox] = field(default_factory=list)
    _log: IO[bytes] | None = None

    @classmethod
    @contextlib.contextmanager
    def begin(
        cls,
        host: Host,
        *,
        slots: int = 4,
        kubernetes: Mapping[str, Any] | None = None,
        program: Sequence[str] = AGENT,
        more: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Iterator[KubeletHost]:
        """Kubelet, agent and plugin run when this is entered. ``more`` are further sections of the configuration."""
        asked = {
            "slots": slots,
            "plugin_dir": f"{ROOT}/device-plugins",
            "pod_resources": f"{ROOT}/pod-resources/kubelet.sock",
            "cdi_dir": CDI,
            **(kubernetes or {}),
        }
        sections = {**{name: dict(keys) for name, keys in (more or {}).items()}, "kubernetes": asked}
        with running(host.path(ROOT)) as loop:
            made = cls(host, loop, sections)
            try:
                made.start_agent(program)
                made.start_plugin()
                yield made
            finally:
                made.stop_plugin()
                for sandbox in made.sandboxes:
                    sandbox.pod.destroy()

    # Processes

    def start_agent(self, program: Sequence[str] = AGENT) -> None:
        """With the sections of this host."""
        self.host.start_agent(self.sections, program=program)

    def start_plugin(self, program: Sequence[str] = PLUGIN) -> None:
        """``rdmanet device-plugin``, as a process of its own."""
        self._log = tempfile.NamedTemporaryFile(  # noqa: SIM115
            prefix=f"plugin-{self.host.name}-", suffix=".log", dir=session().path
        )
        self.plugin = self.host.popen(
            [sys.executable, *program, "--config", self.host._config_file()],
            cwd=str(REPOSITORY),
            stdout=self._log.fileno(),
            stderr=self._log.fileno(),
        )

    def stop_plugin(self, number: int = signal.SIGTERM) -> int | None:
        """Its exit status; None where none runs."""
        if self.plugin is None:
            return None
        self.plugin.signal(number)
        status = self.plugin.wait()
        self.plugin.close()
        self.plugin = None
        if self._log is not None:
            print(Path(self._log.name).read_text(errors="replace"))
            self._log.close()
        return status

    # What kubelet believes

    def healthy(self, *ids: str) -> None:
        """Waits until kubelet believes exactly these slots to be healthy."""
        kubelet, wanted = self.loop.kubelet, sorted(ids)
        self.loop.do(kubelet.until(lambda: sorted(kubelet.healthy(RESOURCE)) == wanted, f"{ids} to be healthy"))

    def slots(self) -> dict[str, dict[str, Any]]:
        """What the agent says of each."""
        return {one["id"]: one for one in self.host.api("GET", "/v1/slots")["slots"]}

    # Pods

    def admit(self, name: str, count: int = 1) -> Sandbox:
        """Kubelet gives the pod's container slots, and the runtime makes a sandbox."""
        pod_name = PodName("default", name)
        devices: list[str] = []
        if count:
            answer = self.loop.do(self.loop.kubelet.admit(pod_name, RESOURCE, count))
            devices = [device.name for device in answer.cdi_devices]
        else:
            self.loop.call(lambda: self.loop.kubelet.run_without(pod_name))
        self.sandboxes.append(Sandbox(pod_name, Pod.create(self.host, name), devices))
        return self.sandboxes[-1]

    def add(self, sandbox: Sandbox, **changes: Any) -> CniOutcome:
        """CNI ADD as containerd calls it; ``changes`` are of the network configuration."""
        sandbox.added = self.host.cni("ADD", sandbox.pod, {**NETWORK, **changes})
        return sandbox.added

    def delete(self, sandbox: Sandbox) -> CniOutcome:
        """The pod ends: kubelet lets go of it when its sandbox has ended."""
        sandbox.pod.stop()
        outcome = self.host.cni("DEL", sandbox.pod, NETWORK)
        self.loop.call(lambda: self.loop.kubelet.forget(sandbox.name))
        return outcome

    def edits(self, sandbox: Sandbox) -> Edits:
        """What the runtime finds for the container. NotFoundError as runtimes say it: unresolvable."""
        nodes: list[DeviceNode] = []
        environment: dict[str, str] = {}
        known = {}
        for path in sorted(self.host.path(CDI).glob("*.json")):
            document = json.loads(path.read_text())
            validate(document)
            for device in document["devices"]:
                known[f"{document['kind']}={device['name']}"] = device["containerEdits"]
        for name in sandbox.devices:
            if name not in known:
                raise NotFoundError(f"unresolvable CDI devices {name}")
            for node in known[name]["deviceNodes"]:
                nodes.append(DeviceNode(node["path"].removeprefix("/dev/"), node["major"], node["minor"]))
            environment |= dict(text.split("=", 1) for text in known[name]["env"])
        return Edits(tuple(nodes), environment)

    def start(self, sandbox: Sandbox) -> Edits:
        """The container, with what its devices are; like a runtime, without knowing anything of rdmanet."""
        edits = self.edits(sandbox)
        sandbox.pod.start(edits.nodes)
        container = sandbox.pod.running
        container.environment = {**container.environment, **edits.environment}
        return edits

    def files(self) -> list[str]:
        """Names in the directory of CDI files."""
        directory = self.host.path(CDI)
        return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
