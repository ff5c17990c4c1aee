"""What the kernel enforces on pods' cgroups, with real devices: whose nodes open, how many objects there are.

In the order of a life: before the cgroup is known, limited, the agent killed, a new agent, DEL, uninstall.
"""

from __future__ import annotations

import errno
import os
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from rdmanet.datapath import devices
from rdmanet.lease import PROTOCOL_VERSION
from rdmanet.model import RdmaMode
from testbed import adversary
from testbed.container import Cgroup, cgroup2_root
from testbed.paths import REPOSITORY
from testbed.peer import Peer
from testbed.pod import CAPABILITIES, Pod, rdma_nodes
from testbed.world import Attached, World

MAX_HANDLES, MAX_OBJECTS = 2, 40
MKNOD = 27
REACHED = "limit of RDMA objects is reached (rdma.max of its cgroup)"

#: Makes completion queues until one is refused; says how many, and errno.
EXHAUST = """
import sys
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.pyverbs_error import PyverbsRDMAError
context = Context(name=sys.argv[1])
made = []
try:
    for _ in range(int(sys.argv[2])):
        made.append(CQ(context, 1))
    print(len(made), 0)
except PyverbsRDMAError as error:
    print(len(made), error.error_code)
for cq in made:
    cq.close()
"""
#: Opens the device again and again, through the library.
OPEN = """
import sys
from rdmanet.errors import RdmanetError
from rdmanet.verbs.device import OpenDevice
made = []
try:
    while True:
        made.append(OpenDevice(sys.argv[1]))
except RdmanetError as error:
    print(len(made), type(error).__name__, error.errno, error.sentence)
"""
#: Leases to itself until the library says why not.
LEASE = """
import asyncio
from rdmanet import verbs
from rdmanet.errors import RdmanetError

async def main():
    async with await verbs.listen("mine") as listener:
        made = 0
        try:
            while True:
                made += len(await verbs.connect("one:mine", count=4))
        except RdmanetError as error:
            print(made, error.sentence, flush=True)

asyncio.run(main())
"""


@dataclass
class Stage:
    """Pod one, found when it speaks; pod two, whose cgroup the runtime has made as the kubelet does."""

    world: World
    one: Attached
    two: Attached
    uid: str
    before: dict[str, str]
    peers: dict[str, Peer] = field(default_factory=dict)

    def row(self, attached: Attached) -> dict[str, Any]:
        (row,) = [r for r in self.world.status()["attachments"] if r["container_id"] == attached.pod.container_id]
        return dict(row)

    def errno(self, pod: str, node: str) -> int:
        return int(self.peers[pod].ask("open", path=f"/dev/infiniband/{node}")["errno"])

    def programs(self, attached: Attached) -> set[str]:
        return devices.restricted(attached.pod.cgroup.path)

    def limit(self, attached: Attached) -> str:
        return (attached.pod.cgroup.path / "rdma.max").read_text()

    def refused(self, pod: str, resource: str) -> float:
        for line in self.world.host.api("GET", "/metrics").splitlines():
            name, _, labels = line.partition("{")
            if name == "rdmanet_rdma_refused_objects_total" and f'pod="default/{pod}",resource="{resource}"' in labels:
                return float(line.rpartition(" ")[2])
        return 0.0


def controllers() -> dict[str, str]:
    """What each cgroup hands down."""
    root = cgroup2_root()
    return {str(path): path.read_text() for path in root.rglob("cgroup.subtree_control")}


@pytest.fixture(scope="module")
def stage(rdma_mode: RdmaMode) -> Iterator[Stage]:
    if rdma_mode is not RdmaMode.SHARED:
        pytest.skip(f"in {rdma_mode} mode pods see no other pod's device; this mode's limits are the same")
    if os.environ.get("RDMANET_IN_VM") != "1":
        pytest.skip("makes cgroups as the kubelet does: needs the virtual machine")
    root, uid = cgroup2_root(), str(uuid.uuid4())
    rdma = {"cgroup_controller": True, "max_handles": MAX_HANDLES, "max_objects": MAX_OBJECTS}
    kubelets = Cgroup("two")
    kubelets.path = root / "kubepods" / f"pod{uid}" / "container"
    with World.start("limits", {"rdma": rdma}, outside=False, machine=True) as world:
        before = controllers()
        one = world.add(world.pod("one"), rdma=True)
        kubelets.path.parent.mkdir(parents=True)
        second = world.pod("two")
        second.cgroup = kubelets
        args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=two;K8S_POD_UID={uid}"
        two = world.add(second, args=args, rdma=True)
        stage = Stage(world, one, two, uid, before)
        # A runtime that puts everybody's nodes everywhere.
        nodes = {n for a in (one, two) for n in rdma_nodes(*_node(stage.row(a)))}
        for attached in (one, two):
            pod = attached.pod
            pod.start(sorted(nodes, key=lambda n: n.path), capabilities=(*CAPABILITIES, MKNOD))
            argv = [sys.executable, "-I", "-S", "-E", adversary.__file__, str(PROTOCOL_VERSION)]
            stage.peers[pod.name] = Peer.start(f"limits-{pod.name}", pod.popen, argv)
            world.peers.append(stage.peers[pod.name])
        yield stage
    if (root / "kubepods").exists():
        (root / "kubepods").rmdir()


def _node(row: dict[str, Any]) -> tuple[str, int, int]:
    device = row["device"]
    return device["uverbs"], device["major"], device["minor"]


def exhaust(pod: Pod, device: str, wanted: int) -> tuple[int, int]:
    """How many completion queues a process got, and the errno of the next."""
    done = pod.exec([sys.executable, "-c", EXHAUST, device, str(wanted)], timeout_s=150)
    made, number = done.stdout.split()
    return int(made), int(number)


def test_a_pod_that_the_runtime_names_is_limited_before_its_first_process(stage: Stage) -> None:
    row = stage.row(stage.two)
    assert (row["cgroup"], row["not_limited"]) == (f"/kubepods/pod{stage.uid}", None)
    own, others = (_node(stage.row(attached))[0] for attached in (stage.two, stage.one))
    assert (stage.errno("two", own), stage.errno("two", others)) == (0, errno.EPERM)
    limit = (cgroup2_root() / f"kubepods/pod{stage.uid}/rdma.max").read_text()
    assert f"{row['device']['name']} hca_handle={MAX_HANDLES} hca_object={MAX_OBJECTS}" in limit


def test_another_pod_is_limited_from_its_first_word_on(stage: Stage) -> None:
    peer, world = stage.peers["one"], stage.world
    own, others = (_node(stage.row(attached))[0] for attached in (stage.one, stage.two))
    row = stage.row(stage.one)
    assert (row["cgroup"], row["not_limited"]) == (None, None)
    assert (stage.errno("one", own), stage.errno("one", others)) == (0, 0)
    peer.ask("dial", line="a")
    answer = peer.ask("say", line="a", message={"type": "hello", "id": 1, "version": PROTOCOL_VERSION})["answer"]
    assert (answer["type"], answer["pod"]) == ("reply", "default/one")
    # The hook runs on a thread; `status` is answered by another. Its own word, said again, comes after.
    for attempt in range(200):
        row = stage.row(stage.one)
        if row["cgroup"] is not None:
            break
        peer.ask("dial", line=f"b{attempt}")
    peer.ask("hang_up", line="a")
    path = "/" + str(stage.one.pod.cgroup.path.relative_to(cgroup2_root()))
    assert (row["cgroup"], row["not_limited"]) == (path, None)
    assert (stage.errno("one", own), stage.errno("one", others)) == (0, errno.EPERM)
    assert f"hca_object={MAX_OBJECTS}" in stage.limit(stage.one)
    assert "not limited" not in world.command("status").stdout


@pytest.mark.parametrize("directory", ["/dev", "/dev/infiniband"])
def test_a_node_of_its_own_making_does_not_open_either(stage: Stage, directory: str) -> None:
    _, major, minor = _node(stage.row(stage.two))
    peer, path = stage.peers["one"], f"{directory}/stolen"
    assert peer.ask("mknod", path=path, major=major, minor=minor)["errno"] == 0
    assert peer.ask("open", path=path)["errno"] == errno.EPERM
    # Nor from a cgroup below, if it could make one.
    below = stage.one.pod.cgroup.path / "own"
    below.mkdir()
    join = f"echo $$ > {below}/cgroup.procs && exec 3<>{path}"
    pid = str(stage.one.pod.running.pid)
    done = stage.world.host.exec(["nsenter", "-t", pid, "-m", "sh", "-c", f"exec 3<>{path}"], check=False)
    assert done.returncode == 0, "from outside of the cgroup it is the runtime's business"
    join = f'echo $$ > {below}/cgroup.procs && exec nsenter -t {pid} -m sh -c "exec 3<>{path}"'
    done = stage.world.host.exec(["sh", "-c", join], check=False)
    assert done.returncode != 0
    assert "Operation not permitted" in done.stderr
    below.rmdir()


def test_verbs_objects_have_a_bound_and_refusals_are_counted(stage: Stage) -> None:
    names = [stage.row(attached)["device"]["name"] for attached in (stage.one, stage.two)]
    before = stage.refused("one", "hca_object")
    assert exhaust(stage.one.pod, names[0], MAX_OBJECTS + 10) == (MAX_OBJECTS, errno.EAGAIN)
    assert stage.refused("one", "hca_object") == before + 1
    # Given back with the process; and the other pod has its own.
    assert exhaust(stage.one.pod, names[0], MAX_OBJECTS) == (MAX_OBJECTS, 0)
    assert exhaust(stage.two.pod, names[1], MAX_OBJECTS) == (MAX_OBJECTS, 0)
    assert stage.refused("two", "hca_object") == 0


def test_a_process_that_leases_is_told(stage: Stage) -> None:
    before = stage.refused("one", "hca_object")
    done = stage.one.pod.exec([sys.executable, "-c", LEASE], cwd=str(REPOSITORY), timeout_s=150)
    made, sentence = done.stdout.split(maxsplit=1)
    assert 0 < int(made) < MAX_OBJECTS
    assert REACHED in sentence
    assert stage.refused("one", "hca_object") > before


def test_device_contexts_have_a_bound_too(stage: Stage) -> None:
    name = stage.row(stage.one)["device"]["name"]
    done = stage.one.pod.exec([sys.executable, "-c", OPEN, name], cwd=str(REPOSITORY), timeout_s=150)
    made, kind, number, sentence = done.stdout.split(maxsplit=3)
    assert (int(made), kind, int(number)) == (MAX_HANDLES, "VerbsError", errno.EAGAIN)
    assert REACHED in sentence
    assert stage.refused("one", "hca_handle") == 1


def test_it_holds_when_the_agent_is_killed_and_with_the_next_one(stage: Stage) -> None:
    others = _node(stage.row(stage.two))[0]
    rows = {name: stage.row(getattr(stage, name))["cgroup"] for name in ("one", "two")}
    programs = stage.programs(stage.one)
    stage.world.host.kill_agent()
    assert stage.errno("one", others) == errno.EPERM
    assert f"hca_object={MAX_OBJECTS}" in stage.limit(stage.one)
    stage.world.start_agent()
    assert {name: stage.row(getattr(stage, name))["cgroup"] for name in ("one", "two")} == rows
    assert stage.programs(stage.one) == programs
    assert len(programs) == 1
    assert stage.errno("one", others) == errno.EPERM


def test_del_takes_it_back_and_uninstall_the_rest(stage: Stage) -> None:
    world = stage.world
    handing = str(cgroup2_root() / "kubepods/cgroup.subtree_control")
    assert "rdma" in controllers()[handing].split()
    world.delete(stage.one)
    assert stage.programs(stage.one) == set()
    kubelets = cgroup2_root() / f"kubepods/pod{stage.uid}"
    assert len(devices.restricted(kubelets)) == 1
    world.host.kill_agent()
    world.command("uninstall")
    assert devices.restricted(kubelets) == set()
    assert not (kubelets / "rdma.max").exists()
    for path, text in controllers().items():
        assert text == stage.before.get(path, ""), f"{path} hands down what it did not before"
