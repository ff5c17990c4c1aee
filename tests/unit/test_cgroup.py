"""rdmanet.rdma.cgroup: names as runtimes give them, and which cgroups are left alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rdmanet.errors import NotFoundError, UnavailableError
from rdmanet.model import PodCgroup
from rdmanet.rdma import cgroup
from tests.unit.cgroup_tree import Tree

UID = "6f2d3c1e-8a4b-4c0d-9e5f-0123456789ab"
UNDERSCORED = UID.replace("-", "_")
ID = "4a" * 32
OTHER_ID = "b7" * 32

#: A process's path, whether the uid is known, and the pod's part of it.
PATHS = [
    (f"/kubepods/burstable/pod{UID}/{ID}", True, f"/kubepods/burstable/pod{UID}"),
    (f"/kubepods/pod{UID}/{OTHER_ID}/init", True, f"/kubepods/pod{UID}"),
    (
        f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UNDERSCORED}.slice/cri-containerd-{ID}.scope",
        True,
        f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UNDERSCORED}.slice",
    ),
    (
        f"/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/crio-{OTHER_ID}.scope/container",
        True,
        f"/kubepods.slice/kubepods-pod{UNDERSCORED}.slice",
    ),
    (f"/kubepods/burstable/pod{UID}/{ID}/deeper", False, f"/kubepods/burstable/pod{UID}/{ID}"),
    (f"/system.slice/docker-{ID}.scope", False, f"/system.slice/docker-{ID}.scope"),
    (f"/docker/{ID}/own/below", False, f"/docker/{ID}"),
    (f"/machine.slice/libpod-{ID}.scope/container", False, f"/machine.slice/libpod-{ID}.scope"),
    (f"/libpod_parent/libpod-{ID}", False, f"/libpod_parent/libpod-{ID}"),
    (
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container",
        False,
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope",
    ),
    (f"/system.slice/nerdctl-{ID}.scope", False, f"/system.slice/nerdctl-{ID}.scope"),
    # Made by the pod itself below: the topmost counts.
    (f"/docker/{ID}/docker/{ID}", False, f"/docker/{ID}"),
    # Another container of the pod, of whose name nothing is known.
    (f"/system.slice/docker-{OTHER_ID}.scope", False, None),
    ("/rdmanet-testbed/0123-pod", False, None),
    ("/", True, None),
]


@pytest.mark.parametrize(("path", "uid_known", "part"), PATHS)
def test_the_pods_part_of_a_path(path: str, uid_known: bool, part: str | None) -> None:
    assert cgroup.named_part(path, ID, UID if uid_known else None) == part


def test_a_short_container_id_names_nothing() -> None:
    assert cgroup.named_part("/system.slice/c1-service", "c1", None) is None


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("0::/user.slice/a b\n", "/user.slice/a b"),
        ("9:name=systemd:/x\n4:memory:/process/1\n0::/\n", "/"),
        ("4:memory:/x\n", None),
        ("0::/docker/1 (deleted)\n", None),
    ],
)
def test_a_process_in_pure_and_hybrid_hierarchies(text: str, path: str | None) -> None:
    assert cgroup.path_of(text) == path


def test_the_last_mount_of_the_hierarchy_counts() -> None:
    hybrid = (
        "24 18 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
        "30 24 0:27 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
        "31 24 0:28 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw\n"
    )
    assert cgroup.hierarchy(hybrid) == "/sys/fs/cgroup/unified"
    assert cgroup.hierarchy(hybrid + "40 24 0:28 / /mnt rw - cgroup2 cgroup2 rw\n") == "/mnt"
    assert cgroup.hierarchy("24 18 0:22 / / rw - ext4 /dev/vda rw\n") is None


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("/kubepods/burstable/pod1", "/kubepods/burstable/pod1"),
        ("kubepods/pod1/", "/kubepods/pod1"),
        (
            "kubepods-burstable-pod1_2.slice",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
        ),
        ("/machine.slice/a-b.slice", "/machine.slice/a-b.slice"),
    ],
)
def test_a_path_that_the_runtime_passes_on(given: str, path: str) -> None:
    assert cgroup.expanded(given) == path


@pytest.mark.parametrize(
    ("path", "own", "words"),
    [
        ("/", "/system.slice/rdmanet.service", "the root cgroup"),
        ("/system.slice/rdmanet.service", "/system.slice/rdmanet.service", "the agent's own"),
        ("/system.slice", "/system.slice/rdmanet.service", "or above it"),
        ("/../pod", "/", "cgroup namespace"),
    ],
)
def test_cgroups_that_are_left_alone(path: str, own: str, words: str) -> None:
    assert words in (cgroup.refusal(path, own) or "")


@pytest.mark.parametrize("own", ["/", "/system.slice/rdmanet.service", "/system.slice/docker-1.scopes"])
def test_others_are_not(own: str) -> None:
    assert cgroup.refusal("/system.slice/docker-1.scope", own) is None


def test_majors_of_rdma_devices() -> None:
    devices = (
        "Character devices:\n  1 mem\n231 infiniband_mad\n231 infiniband_verbs\n243 infiniband_verbs\n\n"
        "Block devices:\n259 infiniband_x\n"
    )
    assert cgroup.character_majors(devices) == {231, 243}
    assert cgroup.character_majors("Character devices:\n  1 mem\n") == {231}


# Looking, in a tree of plain directories


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        f"/kubepods/pod{UID}",
        f"/kubepods/besteffort/pod{UID}",
        f"/kubepods.slice/kubepods-pod{UNDERSCORED}.slice",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDERSCORED}.slice",
        f"/kubelet/kubepods/burstable/pod{UID}",
        f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UNDERSCORED}.slice",
    ],
)
def test_the_kubelets_cgroup_of_a_uid(tree: Tree, path: str) -> None:
    (tree.root / "kubepods/burstable/podffffffff-0000-0000-0000-000000000000").mkdir(parents=True)
    assert tree.cgroups.of_pod_uid(UID) is None
    (tree.root / path.removeprefix("/")).mkdir(parents=True)
    assert tree.cgroups.of_pod_uid(UID) == path


def test_a_cgroup_that_goes_while_it_is_looked_at(tree: Tree) -> None:
    (tree.root / "kubepods/burstable").mkdir(parents=True)
    found = tree.cgroups._kubelets(tree.root, 0)
    assert next(found) == tree.root / "kubepods"
    shutil.rmtree(tree.root / "kubepods")
    assert list(found) == []


def test_a_pod_cannot_make_a_cgroup_that_is_taken_for_anothers(tree: Tree) -> None:
    (tree.root / f"kubepods/pod1/kubepods/pod{UID}").mkdir(parents=True)
    (tree.root / f"docker/{ID}/kubepods/pod{UID}").mkdir(parents=True)
    assert tree.cgroups.of_pod_uid(UID) is None


def test_the_cgroup_of_a_process(tree: Tree) -> None:
    pid, netns = os.getpid(), tree.netns("pod")
    tree.process(pid, f"/docker/{ID}/below", "pod")
    assert tree.cgroups.of_process(pid, netns, ID, None) == (f"/docker/{ID}", True)
    assert tree.cgroups.of_process(pid, netns, OTHER_ID, None) == (f"/docker/{ID}/below", False)


def test_a_process_of_another_pod_speaks_for_nobody(tree: Tree) -> None:
    """A pid that another process has by now."""
    tree.process(os.getpid(), f"/docker/{ID}", "another")
    with pytest.raises(UnavailableError, match="has ended or is not in the pod's network namespace"):
        tree.cgroups.of_process(os.getpid(), tree.netns("pod"), ID, None)


def test_a_process_that_has_ended_speaks_for_nobody(tree: Tree) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
        tree.process(child.pid, f"/docker/{ID}", "pod")
        with pytest.raises(UnavailableError, match="has ended"):
            tree.cgroups.of_process(child.pid, tree.netns("pod"), ID, None)


def test_a_process_whose_cgroup_is_deleted(tree: Tree) -> None:
    tree.process(os.getpid(), "/docker/1", "pod")
    (tree.proc / str(os.getpid()) / "cgroup").write_text("0::/docker/1 (deleted)\n")
    with pytest.raises(UnavailableError, match="is in no cgroup2 cgroup"):
        tree.cgroups.of_process(os.getpid(), tree.netns("pod"), ID, None)


def test_checked_with_only_the_pods_processes(tree: Tree) -> None:
    own = tree.netns("pod")
    tree.process(100, "/pods/a", "pod")
    tree.process(101, "/pods/a/below", "pod")
    found = tree.cgroups.checked("/pods/a", lambda netns: netns != own)
    assert (found.path, found.id) == ("/pods/a", (tree.root / "pods/a").stat().st_ino)
    assert tree.cgroups.exists(found)
    assert not tree.cgroups.exists(PodCgroup("/pods/a", found.id + 1))
    assert not tree.cgroups.exists(PodCgroup("/pods/b", found.id))


def test_a_foreign_process_below_is_found(tree: Tree) -> None:
    own = tree.netns("pod")
    tree.process(100, "/pods/a", "pod")
    tree.process(102, "/pods/a/below", "host")
    with pytest.raises(UnavailableError, match="process 102, which is not the pod's, is in its cgroup /pods/a"):
        tree.cgroups.checked("/pods/a", lambda netns: netns != own)


def test_processes_that_end_meanwhile_are_nobody(tree: Tree) -> None:
    tree.process(100, "/pods/a", "pod")
    (tree.root / "pods/a/cgroup.procs").write_text("100\n4000000\n")
    assert tree.cgroups.checked("/pods/a", lambda netns: netns != tree.netns("pod")).path == "/pods/a"


def test_checked_refuses_by_name_before_it_looks(tree: Tree) -> None:
    with pytest.raises(UnavailableError, match="the root cgroup"):
        tree.cgroups.checked("/", lambda netns: True)
    with pytest.raises(UnavailableError, match="or above it"):
        tree.cgroups.checked("/system.slice", lambda netns: False)
    with pytest.raises(NotFoundError, match="is gone"):
        tree.cgroups.checked("/nowhere", lambda netns: False)
