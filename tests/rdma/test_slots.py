"""Whole ADDs of pods with a slot: what their containers get by CDI, whose slots are when, and what kubelet is told."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rdmanet.errors import NotFoundError
from rdmanet.model import RdmaMode
from testbed.crashes.crashing import ORDER, PROGRAM, RECORD
from testbed.host import CniOutcome, Host, diff
from testbed.kubelet_host import CDI, NETWORK, KubeletHost, Sandbox
from testbed.rdma_tools import tool
from testbed.world import refused, succeeded

pytestmark = pytest.mark.both_modes

SLOTS = tuple(f"slot-{number}" for number in range(4))
FAILING = ("-m", PROGRAM, ORDER, RECORD)


@pytest.fixture(scope="module")
def stage(rdma_mode: RdmaMode) -> Iterator[KubeletHost]:
    machine = os.environ.get("RDMANET_IN_VM") == "1"
    with Host.machine("slots") if machine else Host.scratch("slots") as host:
        before = host.dump()
        # The agent that the tests can tell to fail.
        with KubeletHost.begin(host, program=FAILING) as stage:
            stage.healthy(*SLOTS)
            yield stage
            print(host.agent.log if host.agent else "")
        if host.agent is not None:
            host.stop_agent()
        host.uninstall()
        assert diff(before, host.dump()) == []
        assert not host.path(CDI).exists()


def added(stage: KubeletHost, sandbox: Sandbox, **changes: object) -> CniOutcome:
    outcome = stage.add(sandbox, **changes)
    assert outcome.returncode == 0, outcome.sentence
    return outcome


def ended(stage: KubeletHost, *sandboxes: Sandbox) -> None:
    for sandbox in sandboxes:
        succeeded(stage.delete(sandbox))
        sandbox.pod.destroy()
    stage.host.settle()
    assert stage.files() == []
    assert {one["pod"] for one in stage.slots().values()} == {None}


def test_two_containers_talk_by_what_cdi_gives_them(stage: KubeletHost) -> None:
    one, two = stage.admit("train-0"), stage.admit("train-1")
    assert one.devices == ["rdmanet.io/rdma=slot-0"]
    with pytest.raises(NotFoundError, match="unresolvable CDI devices"):
        stage.edits(one)
    for sandbox in (one, two):
        outcome = added(stage, sandbox)
        edits = stage.start(sandbox)
        row = next(r for r in stage.host.api("GET", "/v1/status")["attachments"] if r["pod"] == str(sandbox.name))
        device = row["device"]
        assert row["slot"] == sandbox.devices[0]
        assert edits.environment["RDMANET_DEVICE"] == device["name"]
        assert edits.environment["NCCL_IB_HCA"] == f"={device['name']}:1"
        assert edits.nodes[0].path == f"infiniband/{device['uverbs']}"
        succeeded(stage.host.cni("CHECK", sandbox.pod, {**NETWORK, "prevResult": outcome.output}))
    assert stage.files() == ["rdmanet.io-rdma-slot-0.json", "rdmanet.io-rdma-slot-1.json"]
    # What the library says inside is what the file said.
    done = one.pod.exec(["sh", "-c", 'test "$RDMANET_GID_INDEX" = "$NCCL_IB_GID_INDEX" && printenv RDMANET_ADDRESS'])
    address = done.stdout.strip()
    assert address in str(one.added.output if one.added else "")
    command = 'exec ib_send_lat -d "$RDMANET_DEVICE" -x "$RDMANET_GID_INDEX" -F -n 50 {}'
    tool(
        one.pod,
        two.pod,
        ["sh", "-c", command.format("")],
        ["sh", "-c", command.format(address)],
        "Waiting for client",
    )
    ended(stage, one, two)


def test_whose_slot_it_is(stage: KubeletHost) -> None:
    one, other = stage.admit("train-2"), stage.admit("train-3", count=0)
    added(stage, one)
    stolen = {"deviceID": one.devices[0].partition("=")[2]}
    refused(stage.add(other, **stolen), 100, f"The slot {one.devices[0]} is default/train-2's still")
    assert stage.slots()["slot-0"]["pod"] == "default/train-2"
    # A pod ends without a DEL, and kubelet gives its slot to the next: before, while and after the reconciler notices.
    for pause_ms in (0, 100, 120, 140, 160, 500):
        stage.loop.call(functools.partial(stage.loop.kubelet.forget, one.name))
        one.pod.destroy()
        time.sleep(pause_ms / 1000)
        added(stage, other, **stolen)
        assert stage.slots()["slot-0"]["pod"] == str(other.name)
        assert stage.files() == ["rdmanet.io-rdma-slot-0.json"]
        one, other = other, stage.admit(f"heir-{pause_ms}", count=0)
    other.pod.destroy()
    ended(stage, one)


def test_a_slot_comes_back_by_gc_and_at_a_start(stage: KubeletHost) -> None:
    one = stage.admit("train-4")
    added(stage, one)
    stage.loop.call(lambda: stage.loop.kubelet.forget(one.name))
    succeeded(stage.host.cni("GC", None, {**NETWORK, "cni.dev/valid-attachments": []}))
    assert stage.files() == []
    two, left = stage.admit("train-5"), stage.admit("train-6")
    added(stage, two)
    added(stage, left)
    kept = Path(stage.host.path(CDI), "rdmanet.io-rdma-slot-0.json").read_text()
    stage.host.kill_agent()
    stage.loop.call(lambda: stage.loop.kubelet.forget(left.name))
    left.pod.destroy()
    stage.host.path(CDI).joinpath("rdmanet.io-rdma-slot-3.json").touch()
    stage.host.path(CDI).joinpath("rdmanet.io-rdma-slot-0.json").unlink()
    stage.start_agent(FAILING)
    assert stage.files() == ["rdmanet.io-rdma-slot-0.json"]
    assert stage.host.path(CDI).joinpath("rdmanet.io-rdma-slot-0.json").read_text() == kept
    stage.healthy(*SLOTS)
    ended(stage, two)


def test_kubelet_is_told_of_a_device_that_goes(stage: KubeletHost) -> None:
    one = stage.admit("train-7")
    added(stage, one)
    enter = ["nsenter", f"--net={one.pod.netns}", "ip", "link", "set", "eth0"]
    stage.host.exec([*enter, "down"])
    stage.healthy(*SLOTS[1:])
    stage.host.exec([*enter, "up"])
    stage.healthy(*SLOTS)
    ended(stage, one)


def test_killed_at_any_point_of_a_slots_life(stage: KubeletHost) -> None:
    host = stage.host

    def killed(fatal: int, work: Callable[[], CniOutcome]) -> None:
        host.container.act(("write", ORDER, str(fatal)))
        work()
        assert host.agent is not None
        assert host.agent.process.wait() == -9
        host.kill_agent()
        host.exec(["rm", "-f", ORDER, RECORD])
        stage.start_agent(FAILING)

    one = stage.admit("train-8")
    host.container.act(("write", ORDER, "0"))
    added(stage, one)
    points = host.exec(["cat", RECORD]).stdout.split("\n")[:-1]
    host.exec(["rm", "-f", ORDER, RECORD])
    host.container.act(("write", ORDER, "0"))
    succeeded(host.cni("DEL", one.pod, NETWORK))
    host.settle()
    undoing = host.exec(["cat", RECORD]).stdout.split("\n")[:-1]
    host.exec(["rm", "-f", ORDER, RECORD])
    for point in ("apply slot", "apply limits", "commit ready"):
        killed(points.index(point) + 1, lambda: stage.add(one))
        assert stage.files() == [], point
        assert stage.slots()["slot-0"]["pod"] is None
    for point in ("undo slot", "undo device", "free slot"):
        added(stage, one)
        killed(undoing.index(point) + 1, lambda: host.cni("DEL", one.pod, NETWORK))
        host.settle()
        assert stage.files() == [], point
        assert stage.slots()["slot-0"]["pod"] is None
    added(stage, one)
    ended(stage, one)
