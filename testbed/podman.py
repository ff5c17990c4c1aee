"""podman on a scratch host: Debian's, with the CNI back end, its files in places of its own.

The host's mounts hide the machine's: podman finds its configuration, storage and networks where it always looks, and
the machine's own are never touched.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdmanet.errors import UnavailableError
from testbed import images
from testbed.container import Completed, Process
from testbed.host import CNI_EXECUTABLE, Host

#: Hidden behind empty directories: configuration, networks, plugins, storage.
PLACES = ("/etc/containers", "/etc/cni", "/opt/cni", "/var/lib/containers", "/var/lib/cni")
PLUGINS = "/opt/cni/bin"
NETWORKS = "/etc/cni/net.d"
IMAGE = "localhost/busybox:1"
#: A root file system of nothing but places for the machine's own programs.
USR_IMAGE = "localhost/usr:1"
#: The machine's own programs and what libibverbs reads, inside a container of USR_IMAGE.
USR_MOUNTS = ("-v", "/usr:/usr:ro", "-v", "/etc/libibverbs.d:/etc/libibverbs.d:ro")
#: For machines that give their root less than podman takes for granted, as those where tests run may be: no systemd,
#: no controllers in the unified hierarchy, hard limits that cannot be raised. runc: crun refuses hybrid cgroups.
SETTINGS = """
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=1024:4096"]
pids_limit = 0
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""
BACK_END = '[network]\nnetwork_backend = "cni"\n'
#: Of podman that was built without it.
NO_BACK_END = "cni support is not enabled"
POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}'
#: podman, with its containers in a group of the host's: they end when the host does, however podman ended.
WRAPPER = "/run/podman-testbed/podman"
PROGRAM = """#!/bin/sh
command=$1
shift
case $command in run | create) set -- --cgroup-parent "/rdmanet-testbed/GROUP" "$@" ;; esac
exec /usr/bin/podman "$command" "$@"
"""


def prepare(host: Host) -> None:
    """Hides the machine's podman behind an empty one: settings for this machine, no networks, no images.

    UnavailableError where a program is missing.
    """
    _require_programs()
    actions: list[tuple[Any, ...]] = []
    for place in PLACES:
        actions += [("mkdir", place), ("mount", "tmpfs", place, "tmpfs", 0, "mode=755")]
    actions += [("mkdir", path) for path in ("/etc/containers/containers.conf.d", NETWORKS, PLUGINS)]
    actions.append(("mkdir", str(Path(WRAPPER).parent)))
    actions.append(("write", "/etc/containers/policy.json", POLICY))
    actions.append(("write", "/etc/containers/containers.conf.d/testbed.conf", SETTINGS))
    actions.append(("write", WRAPPER, PROGRAM.replace("GROUP", host.group("podman").path.name)))
    host.container.act(*actions)
    host.path(WRAPPER).chmod(0o755)


def _require_programs() -> None:
    for program in ("podman", "runc", "conmon"):
        if shutil.which(program) is None:
            raise UnavailableError(f"{program} is missing; run: make setup")


def why_no_networks(host: Host) -> str:
    """Why podman has no CNI networks: the sentence that names what is missing; empty where it has them.

    UnavailableError where podman does not work at all.
    """
    _require_programs()
    settings, storage = "/run/podman-asked.conf", "/run/podman-asked"
    host.container.act(("write", settings, BACK_END))
    places = ("--root", f"{storage}/root", "--runroot", f"{storage}/run", "--storage-driver", "vfs")
    # Not `info`: it asks dpkg for packages by their files, which takes a minute where reading files is slow.
    asked = host.exec(["podman", *places, "network", "ls"], environment={"CONTAINERS_CONF": settings}, check=False)
    host.exec(["rm", "-r", "-f", settings, storage])
    if NO_BACK_END in asked.stderr:
        return f"podman has no CNI back end: {asked.stderr.strip().splitlines()[-1]}"
    if asked.returncode != 0:
        raise UnavailableError(f"podman does not work: {asked.stderr.strip()}", operation="podman network ls")
    return ""


@dataclass
class Podman:
    """podman on a host; `start` makes it ready, with our plugin in its place and an image of busybox."""

    host: Host

    @classmethod
    @contextlib.contextmanager
    def start(cls, host: Host) -> Iterator[Podman]:
        """Ready to run; afterwards its containers are gone. UnavailableError where podman has no CNI back end."""
        if missing := why_no_networks(host):
            raise UnavailableError(missing)
        prepare(host)
        podman = cls(host)
        host.container.act(("write", "/etc/containers/containers.conf.d/cni.conf", BACK_END))
        podman.install_plugin()
        podman.load(IMAGE, images.busybox_layer())
        try:
            yield podman
        finally:
            if not host.stopped:
                podman.remove_all()

    def install_plugin(self) -> None:
        """Our executable into the plugins' directory."""
        self.host.exec(["cp", str(CNI_EXECUTABLE), PLUGINS])

    def load(self, name: str, layer: bytes) -> None:
        """An image from a tar archive of its root file system."""
        archive = "/run/image.tar"
        self.host.path(archive).write_bytes(layer)
        self("import", archive, name)
        self.host.container.act(("unlink", archive))

    def network(self, name: str, plugins: Sequence[Mapping[str, Any]], version: str = "1.0.0") -> None:
        """A CNI network of these plugins."""
        conflist = {"cniVersion": version, "name": name, "plugins": list(plugins)}
        self.host.container.act(("write", f"{NETWORKS}/{name}.conflist", json.dumps(conflist)))

    def __call__(self, *words: str, check: bool = True, timeout_s: float = 60.0) -> Completed:
        """A podman command, to its end."""
        return self.host.exec([WRAPPER, *words], check=check, timeout_s=timeout_s)

    def popen(self, *words: str, **options: Any) -> Process:
        """A podman command that goes on."""
        return self.host.popen([WRAPPER, *words], **options)

    def addresses(self, container: str, network: str) -> dict[int, str]:
        """A container's addresses in a network, by family."""
        found = self("inspect", "--format", "{{json .NetworkSettings.Networks}}", container).json()[network]
        return {4: found["IPAddress"], 6: found["GlobalIPv6Address"]}

    def containers(self) -> list[str]:
        """The ids of all containers that podman knows."""
        return self("ps", "--all", "--quiet", "--no-trunc").stdout.split()

    def remove_all(self) -> None:
        """Every container; those that are in another one's network first."""
        for id in self.containers():
            self("rm", "--force", "--ignore", "--depend", "--time", "0", id)
