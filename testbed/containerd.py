"""containerd on a scratch host: Debian's, spoken to as kubelet does (CRI), its files in places of its own.

The host's mounts hide the machine's, as in `testbed.podman`: configuration, networks, storage and sockets are where
containerd always has them, and the machine's own are never touched.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rdmanet.errors import UnavailableError
from testbed import images
from testbed.container import Process
from testbed.cri import TIMEOUT_S, Cri, CriError
from testbed.host import CNI_EXECUTABLE, REFERENCE_PLUGINS, Host
from testbed.progress import say

#: Hidden behind empty directories: configuration, networks, plugins, storage.
PLACES = ("/etc/containerd", "/etc/cni", "/opt/cni", "/var/lib/containerd", "/var/lib/cni")
PLUGINS = "/opt/cni/bin"
NETWORKS = "/etc/cni/net.d"
#: Also what keeps a pod's namespaces while no container runs.
IMAGE = "localhost/busybox:1"
#: A root file system of nothing but places for the machine's own programs.
USR_IMAGE = "localhost/usr:1"
EXEC_TIMEOUT_S = 300
#: Of a container whose first process was killed before it had done anything. Seen once, with Debian 13's runc, under
#: load and just behind containerd's own cleaning up; by whom is not known. Kubelet tries again.
RUNC_INIT_KILLED = "read init-p: connection reset by peer"
CONTAINER_ATTEMPTS = 3
SOCKET = "/run/containerd/containerd.sock"
CONFIGURATION = "/etc/containerd/config.toml"
#: For machines that give their root less than containerd takes for granted: without CAP_SYS_RESOURCE runc cannot lower
#: oom_score_adj, without controllers in the unified hierarchy it cannot set shares. Containers are then in the group of
#: the host's own processes, and end with them.
MACHINE = f"""
[plugins."io.containerd.internal.v1.opt"]
path = "/var/lib/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{IMAGE}"
restrict_oom_score_adj = true
disable_cgroup = true
"""
CNI = f"""
version = 2
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{PLUGINS}"
conf_dir = "{NETWORKS}"
"""


def prepare(host: Host) -> None:
    """Hides the machine's containerd behind an empty one: no configuration, no networks, no images.

    UnavailableError where a program is missing.
    """
    for program in ("containerd", "ctr", "runc"):
        if shutil.which(program) is None:
            raise UnavailableError(f"{program} is missing; run: make setup")
    actions: list[tuple[Any, ...]] = []
    for place in PLACES:
        actions += [("mkdir", place), ("mount", "tmpfs", place, "tmpfs", 0, "mode=755")]
    actions += [("mkdir", path) for path in (NETWORKS, PLUGINS)]
    host.container.act(*actions)


@dataclass
class Pod:
    """A pod as kubelet asks for it: its sandbox, and the containers in it by name."""

    id: str
    config: dict[str, Any]
    containers: dict[str, str] = field(default_factory=dict)


@dataclass
class Containerd:
    """containerd on a host; `start` runs it, with our plugin in its place and an image of busybox."""

    host: Host
    process: Process | None = None

    @property
    def cri(self) -> Cri:
        """Its socket, as this process reaches it."""
        return Cri(str(self.host.path(SOCKET)))

    @classmethod
    @contextlib.contextmanager
    def start(cls, host: Host) -> Iterator[Containerd]:
        """Running; afterwards its pods are gone, and it is."""
        prepare(host)
        containerd = cls(host)
        host.container.act(("write", CONFIGURATION, CNI + MACHINE))
        containerd.install_plugin()
        try:
            containerd.run()
            containerd.load_image()
            yield containerd
        finally:
            if not host.stopped:
                containerd.close()

    def install_plugin(self) -> None:
        """Our executable into the plugins' directory, where containerd looks for loopback and portmap as well."""
        self.host.exec(["sh", "-c", f"ln -s {REFERENCE_PLUGINS}/* {PLUGINS}; cp {CNI_EXECUTABLE} {PLUGINS}"])

    def run(self) -> None:
        """Start the daemon; it listens when the first call is answered."""
        self.process = self.host.popen(["containerd", "--log-level", "warn"])
        self.cri.call("Status")

    def load_image(self) -> None:
        """The image of all pods here."""
        self._load(images.busybox_layer(), IMAGE)

    def load_usr_image(self) -> None:
        """The image of containers with the machine's own programs."""
        self._load(images.usr_layer(), USR_IMAGE)

    def _load(self, layer: bytes, name: str) -> None:
        archive = "/run/image.tar"
        content = images.oci_archive(layer, name, ("sleep", "1000000"))
        self.host.path(archive).write_bytes(content)
        self.host.exec(["ctr", "--namespace", "k8s.io", "images", "import", archive])
        self.host.container.act(("unlink", archive))

    def kill(self) -> None:
        """SIGKILL, as a crash does. Shims and containers go on. Idempotent."""
        if self.process is not None:
            self.process.kill()
            self.process.close()
            self.process = None

    def close(self) -> None:
        """Every pod, then the daemon."""
        if self.process is None:
            self.run()
        self.remove_all()
        assert self.process is not None
        self.process.signal(15)
        self.process.wait()
        self.process.close()
        self.process = None

    def network(self, name: str, plugins: Sequence[Mapping[str, Any]], version: str = "1.0.0") -> None:
        """The CNI network of pods that come from now on; the one before is replaced.

        containerd hears of it by inotify: returns when it says that it has this one.
        """
        conflist = json.dumps({"cniVersion": version, "name": name, "plugins": list(plugins)})
        self.host.container.act(("write", f"{NETWORKS}/10-net.conflist", conflist))
        deadline = time.monotonic() + TIMEOUT_S
        while conflist not in self._networks():
            if time.monotonic() > deadline:
                raise UnavailableError(f"containerd does not take the network {name}")

    def _networks(self) -> list[str]:
        """The network configurations that it uses, as they were read."""
        found = json.loads(self.cri.call("Status", verbose=True)["info"]["cniconfig"])
        return [network["Config"]["Source"] for network in found["Networks"]]

    def conditions(self) -> dict[str, tuple[bool, str]]:
        """RuntimeReady and NetworkReady, each with its message."""
        found = self.cri.call("Status")["status"]["conditions"]
        return {row["type"]: (row.get("status", False), row.get("message", "")) for row in found}

    # Pods

    @staticmethod
    def config(
        name: str,
        *,
        ports: Mapping[int, int] | None = None,
        uid: str | None = None,
        annotations: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """A pod's configuration; `ports` are host ports and the pod's."""
        return {
            "metadata": {"name": name, "uid": uid or str(uuid.uuid4()), "namespace": "default"},
            "hostname": name,
            "port_mappings": [{"host_port": host, "container_port": own} for host, own in (ports or {}).items()],
            "annotations": dict(annotations or {}),
            "linux": {},
        }

    def run_pod(self, name: str, **options: Any) -> Pod:
        """A sandbox, ready; CriError."""
        config = self.config(name, **options)
        return Pod(self.cri.call("RunPodSandbox", config=config)["pod_sandbox_id"], config)

    def run_container(
        self, pod: Pod, name: str, *command: str, usr: Sequence[str] = (), devices: Sequence[str] = ()
    ) -> str:
        """A container of a pod, running; its id. `usr` are directories of the machine's, for USR_IMAGE, and `devices`
        nodes of it. Made anew, as kubelet does, where runc's first process is killed before it has done anything."""
        config: dict[str, Any] = {
            "metadata": {"name": name},
            "image": {"image": USR_IMAGE if usr else IMAGE},
            "command": list(command),
            "mounts": [{"container_path": path, "host_path": path, "readonly": True} for path in usr],
            "devices": [{"container_path": path, "host_path": path, "permissions": "rw"} for path in devices],
            "linux": {},
        }
        for attempt in range(CONTAINER_ATTEMPTS):
            config["metadata"]["attempt"] = attempt
            answer = self.cri.call("CreateContainer", pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
            pod.containers[name] = answer["container_id"]
            try:
                self.cri.call("StartContainer", container_id=answer["container_id"])
                break
            except CriError as error:
                if RUNC_INIT_KILLED not in error.sentence or attempt + 1 == CONTAINER_ATTEMPTS:
                    raise
                say(f"{name} is made anew: {error.sentence}")
                self.cri.call("RemoveContainer", container_id=answer["container_id"])
        return pod.containers[name]

    def exec(self, pod: Pod, name: str, *command: str) -> str:
        """A command's output in a container; CriError where it fails."""
        answer = self.cri.call(
            "ExecSync",
            EXEC_TIMEOUT_S + TIMEOUT_S,
            container_id=pod.containers[name],
            cmd=list(command),
            timeout=EXEC_TIMEOUT_S,
        )
        if answer.get("exit_code", 0) != 0:
            words = base64.b64decode(answer.get("stderr", "")).decode().strip()
            raise CriError(f"{' '.join(command)}: status {answer['exit_code']}: {words}", operation="ExecSync")
        return base64.b64decode(answer.get("stdout", "")).decode()

    def addresses(self, pod: Pod) -> dict[int, str]:
        """A pod's addresses, by family."""
        network = self.cri.call("PodSandboxStatus", pod_sandbox_id=pod.id)["status"]["network"]
        found = [network["ip"], *(row["ip"] for row in network.get("additional_ips", ()))]
        return {6 if ":" in address else 4: address for address in found}

    def pods(self) -> dict[str, bool]:
        """Every sandbox that it knows, and whether it is ready."""
        items = self.cri.call("ListPodSandbox").get("items", ())
        return {item["id"]: item.get("state", 0) == 0 for item in items}

    def stop_pod(self, id: str) -> None:
        """As kubelet does, again and again until it succeeds: here once."""
        self.cri.call("StopPodSandbox", pod_sandbox_id=id)

    def remove_pod(self, id: str) -> None:
        """Stop and remove."""
        self.stop_pod(id)
        self.cri.call("RemovePodSandbox", pod_sandbox_id=id)

    def remove_all(self) -> None:
        """Every pod."""
        for id in self.pods():
            self.remove_pod(id)
