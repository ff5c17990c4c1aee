"""podman's containers with RDMA: attached first, then given the pod's own device (docs/podman.md)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from benchmarks.peers import namespaces
from rdmanet.model import RdmaMode
from testbed import images
from testbed.container import CommandError
from testbed.demo.rdma import wait_for_line
from testbed.host import Host
from testbed.paths import REPOSITORY
from testbed.podman import IMAGE, USR_IMAGE, USR_MOUNTS, Podman

TIMEOUT_S = 120.0
ATTEMPTS = 5
NAMES = ("train-0", "train-1")
ENV = f'eval "$({sys.executable} -m rdmanet.verbs env --family FAMILY)" && exec '
SERVER = """
from rdmanet.verbs import sync
with sync.listen("counter") as listener:
    print("ready", flush=True)
    with listener.accept() as qp:
        counter = qp.allocate(8, remote_atomic=True)
        qp.send(counter.remote.to_bytes())
        qp.recv()
        print("from", qp.peer)
"""
CLIENT = """
from rdmanet.verbs import RemoteRegion, sync
with sync.connect("train-1:counter") as qp:
    counter = RemoteRegion.from_bytes(qp.recv())
    print(qp.fetch_add(counter, 5), qp.fetch_add(counter, 1))
    qp.send(b"done")
"""


@dataclass
class Containers:
    """Two pods on a host, each with a container that has the pod's device."""

    host: Host
    podman: Podman
    addresses: dict[str, dict[int, str]]

    def words(self, name: str, *command: str) -> list[str]:
        """Of podman, to carry out a command in a container."""
        return ["exec", "--workdir", str(REPOSITORY), name, *command]


@pytest.fixture(scope="module")
def containers(rdma_mode: RdmaMode) -> Iterator[Containers]:
    if rdma_mode is not RdmaMode.SHARED:
        pytest.skip(f"the RDMA subsystem's namespace mode here is {rdma_mode}, not shared")
    with namespaces.agent_host("podman") as host, Podman.start(host) as podman:
        podman.load(USR_IMAGE, images.usr_layer())
        podman.network("rdma", [{"type": "rdmanet", "rdma": True}])
        repository = ("-v", f"{REPOSITORY}:{REPOSITORY}:ro", "-e", "PYTHONDONTWRITEBYTECODE=1")
        for name in NAMES:
            podman(
                "run", "-d", "--name", f"{name}-pod", "--hostname", name, "--network", "rdma", IMAGE, "sleep", "100000"
            )
        nodes = {
            row["container_id"]: f"/dev/infiniband/{row['device']['uverbs']}"
            for row in host.api("GET", "/v1/status")["attachments"]
        }
        ids = dict(
            zip(
                NAMES, (podman("inspect", "--format", "{{.Id}}", f"{n}-pod").stdout.strip() for n in NAMES), strict=True
            )
        )
        for name in NAMES:
            podman(
                *("run", "-d", "--name", name, "--network", f"container:{name}-pod", "--device", nodes[ids[name]]),
                *("--ulimit", "memlock=-1", *USR_MOUNTS, *repository, USR_IMAGE, "sleep", "100000"),
            )
        yield Containers(host, podman, {name: podman.addresses(f"{name}-pod", "rdma") for name in NAMES})


@pytest.mark.parametrize("family", [4, 6])
def test_perftest_between_containers(containers: Containers, family: int) -> None:
    """Unmodified, told by the environment which device and GID are its own."""
    env = ENV.replace("FAMILY", str(family))
    line = env + 'stdbuf -oL ib_send_bw -d "$RDMANET_DEVICE" -x "$RDMANET_GID_INDEX" -s 4096 -n 100'
    words = containers.words("train-1", "sh", "-c", line)
    with containers.podman.popen(*words, stdout=subprocess.PIPE) as server:
        wait_for_line(server, "Waiting for client to connect", TIMEOUT_S)
        for attempt in range(ATTEMPTS):
            words = containers.words("train-0", "sh", "-c", f"{line} {containers.addresses['train-1'][family]}")
            try:
                done = containers.podman(*words, timeout_s=TIMEOUT_S)
                break
            except CommandError as error:  # it says that it waits just before it listens
                if "connect" not in str(error) or attempt + 1 == ATTEMPTS:
                    raise
        assert server.wait(TIMEOUT_S) == 0
    assert " 4096 " in done.stdout


def test_leases_between_containers(containers: Containers) -> None:
    """The library: atomics on memory that the other container offers."""
    python = [sys.executable, "-c"]
    with containers.podman.popen(*containers.words("train-1", *python, SERVER), stdout=subprocess.PIPE) as server:
        wait_for_line(server, "ready", TIMEOUT_S)
        said = containers.podman(*containers.words("train-0", *python, CLIENT), timeout_s=TIMEOUT_S).stdout
        assert said == "0 5\n"
        assert server.stdout is not None
        assert server.stdout.read().decode().startswith("from ")
        assert server.wait(TIMEOUT_S) == 0


def test_a_container_has_its_own_device_alone(containers: Containers) -> None:
    listed = [containers.podman("exec", name, "ls", "/dev/infiniband").stdout.split() for name in NAMES]
    assert [len(names) for names in listed] == [1, 1]
    assert listed[0] != listed[1]
