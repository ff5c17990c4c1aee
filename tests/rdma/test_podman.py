"""podman's containers with RDMA: attached first, then given the pod's own device (docs/podman.md)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from benchmarks.peers import namespaces
from rdmanet.model import RdmaMode
from testbed import images
from testbed.paths import REPOSITORY
from testbed.podman import IMAGE, USR_IMAGE, USR_MOUNTS, Podman, why_no_networks
from tests.rdma import in_containers
from tests.rdma.in_containers import NAMES

TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def podman(rdma_mode: RdmaMode) -> Iterator[Podman]:
    """Two pods, each with a container that has the pod's device."""
    if rdma_mode is not RdmaMode.SHARED:
        pytest.skip(f"the RDMA subsystem's namespace mode here is {rdma_mode}, not shared")
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(namespaces.agent_host("podman"))
        if missing := why_no_networks(host):
            pytest.skip(missing)
        podman = stack.enter_context(Podman.start(host))
        podman.load(USR_IMAGE, images.usr_layer())
        podman.network("rdma", [{"type": "rdmanet", "rdma": True}])
        for name in NAMES:
            words = ("--name", f"{name}-pod", "--hostname", name, "--network", "rdma", IMAGE, "sleep", "100000")
            # CNI_ARGS has this name, and leases know the pod by it.
            podman("run", "-d", *words)
        nodes = {row["pod"]: row["device"]["uverbs"] for row in host.api("GET", "/v1/status")["attachments"]}
        for name in NAMES:
            podman(
                *("run", "-d", "--name", name, "--network", f"container:{name}-pod"),
                *("--device", f"/dev/infiniband/{nodes[f'default/{name}-pod']}", "--ulimit", "memlock=-1"),
                *(*USR_MOUNTS, "-v", f"{REPOSITORY}:{REPOSITORY}:ro", "-e", "PYTHONDONTWRITEBYTECODE=1"),
                *(USR_IMAGE, "sleep", "100000"),
            )
        yield podman


def run(podman: Podman) -> in_containers.Run:
    def carry_out(name: str, words: tuple[str, ...]) -> str:
        return podman("exec", name, *words, timeout_s=TIMEOUT_S).stdout

    return carry_out


@pytest.mark.parametrize("family", [4, 6])
def test_perftest_between_containers(podman: Podman, family: int) -> None:
    in_containers.perftest(run(podman), podman.addresses("train-1-pod", "rdma"), family)


def test_leases_between_containers(podman: Podman) -> None:
    in_containers.leases(run(podman), "train-1-pod")


def test_a_container_has_its_own_device_alone(podman: Podman) -> None:
    in_containers.own_device_alone(run(podman))
