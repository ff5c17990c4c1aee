"""Devices that somebody takes away come back, with their links too, and RDMA goes on: in both modes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from rdmanet.model import RdmaMode
from testbed import breaking
from testbed.demo.rdma import messages, wait_for_line
from testbed.host import diff
from testbed.pod import rdma_nodes
from testbed.rdma_tools import TIMEOUT_S, tool, unhealthy, until
from testbed.world import Attached, World, config, succeeded

pytestmark = pytest.mark.both_modes


@pytest.fixture(scope="module")
def world(rdma_mode: RdmaMode) -> Iterator[World]:
    machine = os.environ.get("RDMANET_IN_VM") == "1"
    if rdma_mode is RdmaMode.EXCLUSIVE and not machine:
        pytest.skip("in exclusive mode the agent needs the initial network namespace, which is not the tests' here")
    with World.start("reconcile", {"network": {"mtu_bytes": 9000}}, agent=False, machine=machine) as world:
        before = world.host.dump()
        world.start_agent()
        yield world
        # The machine is others' afterwards.
        for pod in world.pods:
            pod.stop()
            succeeded(world.host.cni("DEL", pod, config({"rdma": True})))
            pod.destroy()
        world.host.settle()
        world.host.stop_agent()
        world.command("uninstall")
        assert diff(before, world.host.dump()) == []


@pytest.fixture(scope="module")
def pair(world: World) -> tuple[Attached, Attached]:
    """Two pods with devices, started."""
    attached = world.add(world.pod("one"), rdma=True), world.add(world.pod("two"), rdma=True)
    for one in attached:
        device = row(world, one)["device"]
        one.pod.start(rdma_nodes(device["uverbs"], device["major"], device["minor"]))
    return attached


def row(world: World, attached: Attached) -> dict[str, Any]:
    """The attachment, as `rdmanet status` shows it."""
    (found,) = [r for r in world.status()["attachments"] if r["container_id"] == attached.pod.container_id]
    return dict(found)


def writes(world: World, one: Attached, two: Attached) -> None:
    """A real tool over both devices."""
    names = [row(world, attached)["device"]["name"] for attached in (one, two)]
    done = tool(
        two.pod,
        one.pod,
        ["ib_write_bw", "-d", names[1], "-F", "-n", "100"],
        ["ib_write_bw", "-d", names[0], "-F", "-n", "100", two.address(4)],
        "Waiting for client",
    )
    assert messages(done) == 100


@pytest.mark.parametrize("name", ["rxe-device", "pod-end", "host-end", "pod-down"])
def test_the_device_is_back_and_rdma_goes_on(world: World, pair: tuple[Attached, Attached], name: str) -> None:
    one, two = pair
    before = row(world, one)["device"]
    target = breaking.target_of(world.host, one.pod)
    breaking.forgive(world.host, target.pod)
    breaking.break_and_wait(target, name)
    until(lambda: unhealthy(world, one) is None and not breaking.repairs(world.host)["broken"], "the device is well")
    after = row(world, one)["device"]
    assert {**after, "index": 0} == {**before, "index": 0}, "the pod has the node of that device"
    succeeded(world.check(one))
    writes(world, one, two)
    writes(world, two, one)


def test_a_device_that_is_held_comes_back_when_it_is_let_go(world: World, pair: tuple[Attached, Attached]) -> None:
    """rxe waits for the processes that have it open: until they end it can neither be used nor made."""
    one, two = pair
    target = breaking.target_of(world.host, one.pod)
    breaking.forgive(world.host, target.pod)
    name = row(world, one)["device"]["name"]
    holder = one.pod.popen(["stdbuf", "-oL", "ib_write_bw", "-d", name, "-F"], stdout=subprocess.PIPE)
    wait_for_line(holder, "Waiting for client", TIMEOUT_S)
    inside = ["nsenter", f"--net={one.pod.netns}", "rdma", "link", "delete", name]
    with world.host.popen(inside) as deleting:
        until(lambda: unhealthy(world, one) == f"its RDMA device {name} is missing", "the device that is going")
        until(lambda: any(b["kind"] == "device" for b in breaking.repairs(world.host)["broken"]), "shown as broken")
        assert breaking.repairs(world.host)["given_up"] == []
        holder.signal(9)
        holder.wait()
        holder.close()
        assert deleting.wait(TIMEOUT_S) == 0
    until(lambda: unhealthy(world, one) is None, "the device that is back")
    writes(world, one, two)
