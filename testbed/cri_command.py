"""``cri``: what the tests of docs/containerd.md have in crictl's place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from rdmanet.errors import InputError
from testbed.cri import Cri


def status(cri: Cri) -> str:
    """The conditions, one a line."""
    conditions = cri.call("Status")["status"]["conditions"]
    return "\n".join(f"{row['type']} {row.get('status', False)}" for row in conditions)


def config(name: str, *words: str) -> dict[str, Any]:
    """A pod's; `words` are ports, HOST:POD, and annotations, KEY=VALUE."""
    pairs = [word.split(":") for word in words if "=" not in word]
    return {
        "metadata": {"name": name, "uid": name, "namespace": "default"},
        "port_mappings": [{"host_port": int(host), "container_port": int(own)} for host, own in pairs],
        "annotations": dict(word.split("=", 1) for word in words if "=" in word),
        "linux": {},
    }


def pod_of(cri: Cri, name: str) -> str:
    """Its id."""
    for item in cri.call("ListPodSandbox").get("items", ()):
        if item["metadata"]["name"] == name:
            return str(item["id"])
    raise InputError(f"there is no pod {name}")


def run_pod(cri: Cri, name: str, *words: str) -> str:
    """A sandbox; nothing to say."""
    cri.call("RunPodSandbox", config=config(name, *words))
    return ""


def run_container(cri: Cri, image: str, pod: str, name: str, *command: str) -> str:
    """A container that runs; nothing to say."""
    own = {"metadata": {"name": name}, "image": {"image": image}, "command": list(command), "linux": {}}
    answer = cri.call("CreateContainer", pod_sandbox_id=pod_of(cri, pod), config=own, sandbox_config=config(pod))
    cri.call("StartContainer", container_id=answer["container_id"])
    return ""


def addresses(cri: Cri, pod: str) -> str:
    """A pod's, the first one first."""
    network = cri.call("PodSandboxStatus", pod_sandbox_id=pod_of(cri, pod))["status"]["network"]
    return " ".join([network["ip"], *(row["ip"] for row in network.get("additional_ips", ()))])


def main(arguments: Sequence[str]) -> int:
    """Carries out one command."""
    socket, image, command, *words = arguments
    cri = Cri(socket)

    def end(method: str) -> str:
        cri.call(method, pod_sandbox_id=pod_of(cri, words[0]))
        return ""

    commands: dict[str, Callable[[], str]] = {
        "Status": lambda: status(cri),
        "RunPod": lambda: run_pod(cri, *words),
        "RunContainer": lambda: run_container(cri, image, *words),
        "Addresses": lambda: addresses(cri, *words),
        "StopPod": lambda: end("StopPodSandbox"),
        "RemovePod": lambda: end("RemovePodSandbox"),
    }
    said = commands[command]()
    if said:
        print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
