"""containerd's pods with RDMA: the sandbox is attached first, and its container given the pod's own device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.peers import namespaces
from rdmanet.model import RdmaMode
from testbed.containerd import Containerd, Pod
from testbed.paths import REPOSITORY
from tests.rdma import in_containers
from tests.rdma.in_containers import NAMES

MOUNTS = ("/usr", "/etc/libibverbs.d", str(REPOSITORY))


@pytest.fixture(scope="module")
def pods(rdma_mode: RdmaMode) -> Iterator[tuple[Containerd, dict[str, Pod]]]:
    """Two pods, each with a container that has the pod's device."""
    if rdma_mode is not RdmaMode.SHARED:
        pytest.skip(f"the RDMA subsystem's namespace mode here is {rdma_mode}, not shared")
    with namespaces.agent_host("containerd") as host, Containerd.start(host) as containerd:
        containerd.load_usr_image()
        containerd.network("rdma", [{"type": "rdmanet", "rdma": True}])
        found = {name: containerd.run_pod(name) for name in NAMES}
        nodes = {row["pod"]: row["device"]["uverbs"] for row in host.api("GET", "/v1/status")["attachments"]}
        for name, pod in found.items():
            device = f"/dev/infiniband/{nodes[f'default/{name}']}"
            containerd.run_container(pod, "main", "sleep", "100000", usr=MOUNTS, devices=(device,))
        yield containerd, found


Pods = tuple[Containerd, dict[str, Pod]]


def run(pods: Pods) -> in_containers.Run:
    containerd, found = pods

    def carry_out(name: str, words: tuple[str, ...]) -> str:
        return containerd.exec(found[name], "main", *words)

    return carry_out


@pytest.mark.parametrize("family", [4, 6])
def test_perftest_between_pods(pods: Pods, family: int) -> None:
    containerd, found = pods
    in_containers.perftest(run(pods), containerd.addresses(found["train-1"]), family)


def test_leases_between_pods(pods: Pods) -> None:
    in_containers.leases(run(pods))


def test_a_container_has_its_own_device_alone(pods: Pods) -> None:
    in_containers.own_device_alone(run(pods))
