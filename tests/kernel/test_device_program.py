"""The device program of pods' cgroups, live: the kernel has no test run for its kind.

Memory devices (major 1) stand for RDMA ones here: every machine has them, and opening them really succeeds.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest

from rdmanet.datapath import bpf, devices
from rdmanet.datapath.artifact import Artifact
from rdmanet.datapath.maps import Datapath
from rdmanet.errors import BpfError, NotFoundError
from testbed.bpf import lab
from testbed.container import Cgroup
from testbed.session import session

Nodes: TypeAlias = dict[tuple[int, int], Path]

NULL, ZERO, FULL, UVERBS0 = (1, 3), (1, 5), (1, 7), (231, 192)
MAJORS = [1, 231]

_OPEN = """
import os, sys
for path in sys.argv[1:]:
    try:
        os.close(os.open(path, os.O_RDWR))
        print(0)
    except OSError as error:
        print(error.errno)
"""
#: Restricts the cgroup, then is killed.
_AGENT = """
import os, sys
from pathlib import Path
from rdmanet.datapath.maps import Datapath
from testbed.bpf import lab
with lab.private_bpffs() as pins:
    datapath = Datapath.open(lab.artifact(), pins / "rdmanet")
    datapath.set_rdma_majors([1])
    datapath.restrict_devices(Path(sys.argv[1]), [(1, 3)])
    print("done", flush=True)
    os.read(0, 1)
"""


@pytest.fixture
def datapath() -> Iterator[Datapath]:
    lab.require_root()
    with lab.private_bpffs() as pins, Datapath.open(lab.artifact(), pins / "rdmanet") as datapath:
        datapath.set_rdma_majors(MAJORS)
        yield datapath


@pytest.fixture
def cgroup() -> Iterator[Path]:
    lab.require_root()
    made: Cgroup = session().cgroup("device-program").create()
    yield made.path
    made.remove()


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    """As a runtime, or a pod that may, makes them."""
    found = {}
    for number in (NULL, ZERO, FULL, UVERBS0):
        found[number] = tmp_path / f"{number[0]}-{number[1]}"
        os.mknod(found[number], stat.S_IFCHR | 0o666, os.makedev(*number))
    return found


def outcomes(cgroup: Path, paths: Sequence[Path]) -> list[int]:
    """What a process of the cgroup gets for opening each: 0 or errno."""
    join = f'echo $$ > {cgroup}/cgroup.procs && exec "$@"'
    argv = ["sh", "-c", join, "sh", sys.executable, "-I", "-S", "-c", _OPEN, *map(str, paths)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    return list(map(int, done.stdout.split()))


def refused(cgroup: Path, nodes: Nodes) -> set[tuple[int, int]]:
    """The numbers that a process of the cgroup may not open. (uverbs0 may be missing: not refused is enough.)"""
    found = zip(nodes, outcomes(cgroup, list(nodes.values())), strict=True)
    return {number for number, outcome in found if outcome == errno.EPERM}


def test_only_its_own_numbers_can_be_opened(datapath: Datapath, cgroup: Path, nodes: Nodes) -> None:
    assert refused(cgroup, nodes) == set()
    datapath.restrict_devices(cgroup, [NULL])
    assert refused(cgroup, nodes) == {ZERO, FULL, UVERBS0}
    assert outcomes(cgroup, [nodes[NULL]]) == [0]
    datapath.restrict_devices(cgroup, [UVERBS0])
    assert refused(cgroup, nodes) == {NULL, ZERO, FULL}
    datapath.restrict_devices(cgroup, [])
    assert refused(cgroup, nodes) == {NULL, ZERO, FULL, UVERBS0}


def test_other_majors_are_the_runtimes_business(datapath: Datapath, cgroup: Path, nodes: Nodes) -> None:
    datapath.set_rdma_majors([231])
    datapath.restrict_devices(cgroup, [])
    assert refused(cgroup, nodes) == {UVERBS0}
    # A module that is loaded later brings a major, and it is guarded in cgroups that are restricted already.
    datapath.set_rdma_majors([231, 1])
    assert refused(cgroup, nodes) == set(nodes)


def test_cgroups_below_inherit_it_and_others_do_not(datapath: Datapath, cgroup: Path, nodes: Nodes) -> None:
    below, beside = cgroup / "own" / "deeper", cgroup.parent / f"{cgroup.name}-beside"
    below.mkdir(parents=True)
    beside.mkdir()
    try:
        datapath.restrict_devices(cgroup, [NULL])
        assert refused(below, nodes) == {ZERO, FULL, UVERBS0}
        assert refused(beside, nodes) == set()
        # What is allowed further below cannot give back what is taken away above.
        datapath.restrict_devices(below, [NULL, ZERO])
        assert refused(below, nodes) == {ZERO, FULL, UVERBS0}
    finally:
        beside.rmdir()


def test_a_runtimes_own_program_still_counts(datapath: Datapath, cgroup: Path, nodes: Nodes) -> None:
    """All must say yes: theirs refuses what ours would allow, and both stay."""
    refuse_all = bytes.fromhex("b7000000000000009500000000000000")  # r0 = 0; exit
    program = bpf.load_program("runtime", refuse_all, "GPL", bpf.PROG_TYPE_CGROUP_DEVICE)
    descriptor = os.open(cgroup, os.O_RDONLY)
    try:
        bpf.attach_to_cgroup(descriptor, program, bpf.ATTACH_CGROUP_DEVICE)
        datapath.restrict_devices(cgroup, [NULL])
        assert refused(cgroup, nodes) == set(nodes)
        assert len(bpf.programs_of_cgroup(descriptor, bpf.ATTACH_CGROUP_DEVICE)) == 2
        datapath.release_devices(cgroup)
        assert refused(cgroup, nodes) == set(nodes)
        assert bpf.detach_from_cgroup(descriptor, program, bpf.ATTACH_CGROUP_DEVICE)
        assert not bpf.detach_from_cgroup(descriptor, program, bpf.ATTACH_CGROUP_DEVICE)
        assert refused(cgroup, nodes) == set()
    finally:
        os.close(descriptor)
        os.close(program)


def test_again_changes_nothing_and_release_is_idempotent(datapath: Datapath, cgroup: Path, nodes: Nodes) -> None:
    def ids() -> list[int]:
        descriptor = os.open(cgroup, os.O_RDONLY)
        try:
            return bpf.programs_of_cgroup(descriptor, bpf.ATTACH_CGROUP_DEVICE)
        finally:
            os.close(descriptor)

    datapath.restrict_devices(cgroup, [NULL, ZERO])
    first = ids()
    datapath.restrict_devices(cgroup, [ZERO, NULL])
    assert ids() == first
    assert len(first) == 1
    datapath.restrict_devices(cgroup, [NULL])
    assert len(ids()) == 1
    assert ids() != first
    for _ in range(2):
        datapath.release_devices(cgroup)
        assert ids() == []
    assert refused(cgroup, nodes) == set()


def test_a_newer_artifact_replaces_the_program(datapath: Datapath, cgroup: Path) -> None:
    def name(artifact: Artifact) -> set[str]:
        return {devices.program_name(artifact, [NULL])}

    datapath.restrict_devices(cgroup, [NULL])
    assert devices.restricted(cgroup) == name(lab.artifact())
    newer = replace(lab.artifact(), hash=f"{7:064x}")
    datapath.swap(newer)
    datapath.restrict_devices(cgroup, [NULL])
    assert devices.restricted(cgroup) == name(newer)


def test_it_stays_when_the_agent_is_killed(cgroup: Path, nodes: Nodes) -> None:
    agent = subprocess.Popen(
        [sys.executable, "-c", _AGENT, str(cgroup)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "done\n"
        agent.send_signal(signal.SIGKILL)
    assert refused(cgroup, nodes) == {ZERO, FULL}
    devices.release(cgroup)
    assert refused(cgroup, nodes) == set()


def test_a_cgroup_that_is_gone(datapath: Datapath, cgroup: Path) -> None:
    gone = cgroup / "gone"
    with pytest.raises(NotFoundError, match="is gone"):
        datapath.restrict_devices(gone, [])
    datapath.release_devices(gone)


def test_a_cgroup_that_goes_meanwhile(datapath: Datapath, cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a runtime removes it during a DEL: after it was opened, and before the kernel is asked."""
    datapath.restrict_devices(cgroup, [NULL])
    opened = devices._opened

    @contextmanager
    def removed(path: Path) -> Iterator[int]:
        with opened(path) as descriptor:
            path.rmdir()
            yield descriptor

    monkeypatch.setattr(devices, "_opened", removed)
    datapath.release_devices(cgroup)
    cgroup.mkdir()
    with pytest.raises(NotFoundError, match="is gone"):
        datapath.restrict_devices(cgroup, [NULL])
    cgroup.mkdir()


def test_a_program_above_that_lets_none_follow(datapath: Datapath, cgroup: Path) -> None:
    """Attached without BPF_F_ALLOW_MULTI, as an old runtime may: the sentence has the kernel's reason."""
    below = cgroup / "below"
    below.mkdir()
    allow_all = bytes.fromhex("b7000000010000009500000000000000")
    program = bpf.load_program("exclusive", allow_all, "GPL", bpf.PROG_TYPE_CGROUP_DEVICE)
    descriptor = os.open(cgroup, os.O_RDONLY)
    try:
        flags, bpf._F_ALLOW_MULTI = bpf._F_ALLOW_MULTI, 0
        try:
            bpf.attach_to_cgroup(descriptor, program, bpf.ATTACH_CGROUP_DEVICE)
        finally:
            bpf._F_ALLOW_MULTI = flags
        with pytest.raises(BpfError) as caught:
            datapath.restrict_devices(below, [NULL])
        assert caught.value.errno == errno.EPERM
    finally:
        os.close(descriptor)
        os.close(program)
