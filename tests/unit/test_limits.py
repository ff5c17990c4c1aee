"""rdmanet.limits: when a pod's cgroup becomes known, what is recorded first, and that all of it is taken back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from rdmanet import limits
from rdmanet.config import RdmaConfig
from rdmanet.datapath.maps import Datapath
from rdmanet.errors import BpfError
from rdmanet.limits import PodLimits
from rdmanet.model import Attachment, Backend, Device, NetnsId, RdmaMode
from rdmanet.netlink import namespace
from rdmanet.store import Store
from tests.unit.cgroup_tree import Tree
from tests.unit.test_store import wanted

UID = "6f2d3c1e-8a4b-4c0d-9e5f-0123456789ab"


class Programs:
    """The datapath's part: which cgroups are restricted to what; and, when that was asked, what the rows said."""

    def __init__(self, store: Store):
        self.restricted: dict[Path, set[tuple[int, int]]] = {}
        self.recorded: list[str | None] = []
        self.failure: BpfError | None = None
        self.majors: set[int] = set()
        self._store = store

    def restrict_devices(self, cgroup: Path, numbers: Collection[tuple[int, int]]) -> None:
        rows = self._store.attachments()
        self.recorded.append(rows[-1].cgroup.path if rows[-1].cgroup else None)
        if self.failure is not None:
            raise self.failure
        self.restricted[cgroup] = set(numbers)

    def set_rdma_majors(self, majors: Collection[int]) -> None:
        self.majors = set(majors)


class Scene:
    """A host with a tree of cgroups, and what of it is limited."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, **config: Any):
        self.tree = Tree(directory)
        self.store = Store(directory / "state.db")
        self.programs = Programs(self.store)
        monkeypatch.setattr(Datapath, "release_devices", self.release)
        monkeypatch.setattr(namespace, "own", lambda: self.tree.netns("host"))
        monkeypatch.setattr(limits, "RETRY_S", 0.0)
        self.config = config
        self.limits = self.start(**config)
        self._numbers = iter(range(1, 100))

    def start(self, **config: Any) -> PodLimits:
        """As a new agent would."""
        programs: Any = self.programs
        self.limits = PodLimits(self.store, programs, RdmaConfig(**config), self.tree.cgroups, "")
        return self.limits

    def release(self, cgroup: Path) -> None:
        self.programs.restricted.pop(cgroup, None)

    def attachment(self, netns: str = "pod", **changes: Any) -> Attachment:
        """A row with a device, as before the step."""
        number = next(self._numbers)
        one = self.store.reserve(wanted(number, netns_id=self.tree.netns(netns), wants_rdma=True, **changes))
        device = Device(f"rxe{one.id}", Backend.RXE, RdmaMode.SHARED, one.id, f"uverbs{one.id}", 231, 192 + one.id)
        self.store.set_device(one.id, device)
        return self.row(one.id)

    def row(self, number: int) -> Attachment:
        (found,) = [one for one in self.store.attachments() if one.id == number]
        return found

    def cgroup(self, path: str) -> Path:
        directory = self.tree.root / path.removeprefix("/")
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def controller(self, path: str, device: str) -> Path:
        """The controller is enabled for the cgroup; its rdma.max."""
        made = self.cgroup(path) / "rdma.max"
        made.write_text(f"{device} hca_handle=max hca_object=max\n")
        return made


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    made = Scene(tmp_path, monkeypatch)
    yield made
    made.store.close()


def test_known_at_add_by_the_pods_uid(scene: Scene) -> None:
    directory = scene.cgroup(f"/kubepods/burstable/pod{UID}")
    one = scene.limits.add(scene.attachment(pod_uid=UID), None)
    assert one.cgroup is not None
    assert one.cgroup.path == f"/kubepods/burstable/pod{UID}"
    assert scene.programs.restricted == {directory: {(231, 192 + one.id)}}
    assert scene.programs.recorded == [one.cgroup.path], "the row must speak of it before it is done"
    assert 231 in scene.programs.majors
    assert scene.limits.status() == {one.id: (one.cgroup.path, "")}
    for _ in range(2):
        scene.limits.remove(scene.row(one.id))
        assert scene.programs.restricted == {}
        assert scene.row(one.id).cgroup is None
    assert scene.limits.status() == {}


def test_known_at_add_by_the_runtimes_word(scene: Scene) -> None:
    directory = scene.cgroup("/kubepods.slice/kubepods-pod1.slice")
    one = scene.limits.add(scene.attachment(), "kubepods-pod1.slice")
    assert scene.programs.restricted.keys() == {directory}
    assert one.cgroup is not None


@pytest.mark.parametrize("path", ["/", "/system.slice", "/nowhere"])
def test_a_runtimes_word_is_checked(scene: Scene, path: str) -> None:
    scene.cgroup("/system.slice")
    one = scene.limits.add(scene.attachment(), path)
    assert one.cgroup is None
    assert scene.programs.restricted == {}
    assert bool(scene.limits.status()[one.id][1]) is (path != "/nowhere")  # that one may come yet


def test_without_a_device_nothing_is_done(scene: Scene) -> None:
    scene.cgroup(f"/kubepods/pod{UID}")
    one = scene.store.reserve(wanted(1, netns_id=scene.tree.netns("pod"), pod_uid=UID))
    assert scene.limits.add(one, None).cgroup is None
    assert scene.programs.restricted == {}
    scene.limits.remove(one)


def test_known_when_a_process_speaks_and_not_before(scene: Scene) -> None:
    one = scene.limits.add(scene.attachment(), None)
    assert scene.limits.status() == {one.id: (None, "")}
    scene.tree.process(os.getpid(), "/testbed/pod", "pod")
    assert scene.limits.wants_contact(one.netns_id)
    scene.limits.contact(one.netns_id, os.getpid())
    assert scene.limits.status() == {one.id: ("/testbed/pod", "")}
    assert scene.row(one.id).cgroup is not None
    assert not scene.limits.wants_contact(one.netns_id)
    assert not scene.limits.wants_contact(NetnsId(0, 0))


def test_an_unnamed_cgroup_must_be_the_pods_alone(scene: Scene) -> None:
    one = scene.limits.add(scene.attachment(), None)
    scene.tree.process(os.getpid(), "/shared", "pod")
    scene.tree.process(77, "/shared", "somebody")
    scene.limits.contact(one.netns_id, os.getpid())
    path, why = scene.limits.status()[one.id]
    assert path is None
    assert "process 77, which is not the pod's, is in its cgroup /shared as well" in why
    # When it has left, the next word of the pod finds the cgroup.
    (scene.tree.root / "shared/cgroup.procs").write_text(f"{os.getpid()}\n")
    scene.limits.contact(one.netns_id, os.getpid())
    assert scene.limits.status()[one.id] == ("/shared", "")


@pytest.mark.parametrize(("who", "limited"), [("own", True), ("host", False), ("other", False)])
def test_in_a_named_cgroup_only_others_known_pods_and_the_host_are_foreign(
    scene: Scene, who: str, limited: bool
) -> None:
    """A pod that makes a network namespace of its own must not set itself free by that."""
    one = scene.limits.add(scene.attachment(container_id="4a" * 32), None)
    scene.limits.add(scene.attachment("other"), None)
    path = f"/docker/{one.container_id}"
    scene.tree.process(os.getpid(), path, "pod")
    scene.tree.process(77, f"{path}/below", who)
    scene.limits.contact(one.netns_id, os.getpid())
    assert (scene.limits.status()[one.id][0] == path) is limited


def test_two_devices_of_one_pod(scene: Scene) -> None:
    directory = scene.cgroup("/kubepods/pod1")
    first = scene.limits.add(scene.attachment(), "/kubepods/pod1")
    second = scene.limits.add(scene.attachment(ifname="net1"), None)  # the pod's is known already
    numbers = {one.id: (231, 192 + one.id) for one in (first, second)}
    assert scene.programs.restricted == {directory: set(numbers.values())}
    scene.limits.remove(first)
    assert scene.programs.restricted == {directory: {numbers[second.id]}}
    scene.limits.remove(second)
    assert scene.programs.restricted == {}


def test_a_device_that_came_back_with_another_number(scene: Scene) -> None:
    directory = scene.cgroup("/kubepods/pod1")
    one = scene.limits.add(scene.attachment(), "/kubepods/pod1")
    assert one.device is not None
    scene.limits.changed(one.id, dataclasses.replace(one.device, minor=250))
    assert scene.programs.restricted == {directory: {(231, 250)}}
    scene.limits.changed(99, one.device)
    scene.limits.remove(one)
    assert scene.programs.restricted == {}


def test_what_the_kernel_refuses_is_said_and_taken_back(scene: Scene) -> None:
    scene.programs.failure = BpfError("The kernel refused.", errno=1)
    scene.cgroup("/kubepods/pod1")
    one = scene.limits.add(scene.attachment(), "/kubepods/pod1")
    assert one.cgroup is None
    assert scene.row(one.id).cgroup is None
    assert scene.limits.status()[one.id] == (None, "The kernel refused.")


def test_a_cgroup_that_went_leaves_nothing_to_take_back(scene: Scene) -> None:
    directory = scene.cgroup("/kubepods/pod1")
    one = scene.limits.add(scene.attachment(), "/kubepods/pod1")
    directory.rmdir()
    scene.limits.remove(one)
    assert scene.row(one.id).cgroup is None


def test_limits_are_written_and_restored(scene: Scene) -> None:
    scene.start(max_handles=2, max_objects=30)
    one = scene.attachment()
    assert one.device is not None
    file = scene.controller("/kubepods/pod1", one.device.name)
    one = scene.limits.add(one, "/kubepods/pod1")
    assert file.read_text().split() == [f"rxe{one.id}", "hca_handle=2", "hca_object=30"]
    assert scene.limits.status()[one.id] == ("/kubepods/pod1", "")
    scene.limits.remove(scene.row(one.id))
    assert file.read_text().split() == [f"rxe{one.id}", "hca_handle=max", "hca_object=max"]


def test_limits_without_the_controller_are_a_sentence(scene: Scene) -> None:
    scene.start(max_objects=30)
    scene.cgroup("/kubepods/pod1")
    one = scene.limits.add(scene.attachment(), "/kubepods/pod1")
    path, why = scene.limits.status()[one.id]
    assert path == "/kubepods/pod1", "its devices are restricted all the same"
    assert "rdma.cgroup_controller = true" in why


def test_the_controller_is_recorded_before_it_is_enabled(scene: Scene) -> None:
    scene.start(max_objects=30, cgroup_controller=True)
    (scene.tree.root / "cgroup.controllers").write_text("rdma\n")
    one = scene.attachment()
    assert one.device is not None
    scene.controller("/kubepods/pod1", one.device.name)
    for path in ("/", "/kubepods"):
        (scene.cgroup(path) / "cgroup.subtree_control").write_text("cpu\n")
    scene.limits.add(one, "/kubepods/pod1")
    assert {name for name in scene.store.effects() if "controller" in name} == {
        "rdma-controller:/",
        "rdma-controller:/kubepods",
    }
    limits.undo_controller(scene.store, scene.tree.cgroups)
    assert scene.store.effects() == {}
    for path in ("/", "/kubepods"):
        assert (scene.cgroup(path) / "cgroup.subtree_control").read_text() == "-rdma"


def test_usage_and_refusals(scene: Scene) -> None:
    scene.start(max_objects=30)
    one = scene.attachment()
    assert one.device is not None
    name = one.device.name
    directory = scene.controller("/kubepods/pod1", name).parent
    scene.limits.add(one, "/kubepods/pod1")
    (directory / "rdma.current").write_text(f"{name} hca_handle=1 hca_object=9\n")
    (directory / "rdma.events").write_text(f"{name} hca_handle.alloc_fail=0 hca_object.alloc_fail=5\nrxe9 x=1\n")
    usage = scene.limits.usage()[one.id]
    assert usage.used == {"hca_handle": 1, "hca_object": 9}
    assert usage.limits == {"hca_handle": None, "hca_object": 30}
    assert usage.refused == {"hca_handle": 0, "hca_object": 5}
    (directory / "rdma.events").unlink()  # an older kernel
    assert scene.limits.usage()[one.id].refused == {}


def test_a_new_agent_adopts_and_puts_right(scene: Scene) -> None:
    directory = scene.cgroup("/kubepods/pod1")
    one = scene.limits.add(scene.attachment(), "/kubepods/pod1")
    scene.programs.restricted.clear()  # somebody took it away
    scene.start().adopt([scene.row(one.id)])
    assert scene.programs.restricted == {directory: {(231, 192 + one.id)}}
    assert scene.limits.status() == {one.id: ("/kubepods/pod1", "")}


def test_a_new_agent_does_not_take_a_later_cgroup_of_that_name_for_it(scene: Scene) -> None:
    directory = scene.cgroup("/kubepods/pod1")
    one = scene.limits.add(scene.attachment(), "/kubepods/pod1")
    (directory.parent / "other").mkdir()  # so that the inode number is not used again at once
    directory.rmdir()
    (directory.parent / "third").mkdir()
    directory.mkdir()
    scene.programs.restricted.clear()
    scene.start().adopt([scene.row(one.id)])
    assert scene.programs.restricted == {}
    assert scene.limits.status() == {one.id: (None, "")}
    assert scene.row(one.id).cgroup is None


def test_a_host_without_the_hierarchy(scene: Scene) -> None:
    programs: Any = scene.programs
    alone = PodLimits(scene.store, programs, RdmaConfig(), None, "no cgroup2 here")
    one = alone.add(scene.attachment(pod_uid=UID), "/x")
    assert alone.status() == {one.id: (None, "no cgroup2 here")}
    assert not alone.wants_contact(one.netns_id)
    assert alone.usage() == {}
    alone.remove(one)
