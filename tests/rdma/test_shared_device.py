"""One rxe device of the host shared by pods: leases and perftest over it, the host's own way to the pods, health, and
nothing left behind.

The same on a kernel that cannot give pods a device of their own (docs/testing.md, "The virtual machine": --kernel).
"""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from benchmarks.peers import host_device
from benchmarks.peers.host_device import DEVICE, NETDEV
from rdmanet.model import RdmaMode, address_key
from testbed.host import Dump, diff
from testbed.kernel import namespace_mode
from testbed.paths import REPOSITORY
from testbed.peer import Peer, PeerError
from testbed.pod import rdma_nodes
from testbed.rdma_tools import tool, until
from testbed.world import Attached, World, succeeded

FAMILIES = (4, 6)
pytestmark = pytest.mark.any_kernel
TIMEOUT_S = 60.0


@dataclass
class Stage:
    """Two started pods that share the host's device, with a program of the library in each."""

    world: World
    before: Dump
    pods: dict[str, Attached] = field(default_factory=dict)
    verbs: dict[str, Peer] = field(default_factory=dict)

    def row(self, name: str) -> dict[str, Any]:
        """The pod in `rdmanet status`."""
        rows = self.world.host.api("GET", "/v1/status")["attachments"]
        (row,) = [row for row in rows if row["container_id"] == self.pods[name].pod.container_id]
        return dict(row)

    def until_unhealthy(self, words: str) -> None:
        until(lambda: all(words in (self.row(name)["unhealthy"] or "") for name in self.pods), words)

    def until_well(self) -> None:
        until(lambda: all(self.row(name)["unhealthy"] is None for name in self.pods), "well again")

    def sent_packets(self) -> int:
        """What the device has sent, by itself."""
        (device,) = self.world.host.api("GET", "/v1/rdma")["devices"]
        return int(device["events"]["sent_pkts"])

    def gid_index(self, name: str, version: int) -> int:
        """Where the device's GID table has the pod's address."""
        wanted = ipaddress.IPv6Address(address_key(self.pods[name].address(version)))
        gids = self.world.host.exec(["sh", "-c", f"cd /sys/class/infiniband/{DEVICE}/ports/1/gids; tail -qn1 $(ls -v)"])
        return [ipaddress.IPv6Address(line) for line in gids.stdout.split()].index(wanted)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    if os.environ.get("RDMANET_IN_VM") != "1":
        pytest.skip("before Linux 7.1 rxe works in the initial network namespace alone: needs a throwaway machine")
    mode = namespace_mode(subprocess.run(["rdma", "system"], capture_output=True, text=True, check=True).stdout)
    if mode != RdmaMode.SHARED:
        pytest.skip(f"the RDMA subsystem's namespace mode here is {mode}, and pods see no device of the host in it")
    with (
        World.start("lent", host_device.CONFIG, agent=False, machine=True) as world,
        host_device.host_device(world.host),
    ):
        stage = Stage(world, world.host.dump())
        try:
            world.start_agent()
            for name in ("one", "two"):
                attached = stage.pods[name] = world.add(world.pod(name), rdma=True)
                device = stage.row(name)["device"]
                attached.pod.start(rdma_nodes(device["uverbs"], device["major"], device["minor"]))
                argv = [sys.executable, "-m", "testbed.demo.verbs_peer"]
                peer = Peer.start(f"{name}-lent", attached.pod.popen, argv, cwd=str(REPOSITORY))
                stage.verbs[name] = peer
                world.peers.append(peer)
            yield stage
        finally:
            for attached in stage.pods.values():
                attached.pod.stop()


def test_what_pods_have(stage: Stage) -> None:
    agent = stage.world.status()["agent"]
    assert (agent["rdma_mode"], agent["rdma_backend"], agent["rdma_missing"]) == ("shared", "shared", None)
    devices = [stage.row(name)["device"] for name in stage.pods]
    assert devices[0] == devices[1]
    assert (devices[0]["name"], devices[0]["backend"]) == (DEVICE, "shared")
    for attached in stage.pods.values():
        succeeded(stage.world.check(attached))


def test_perftest_by_address(stage: Stage) -> None:
    one, two = (str(stage.gid_index(name, 4)) for name in ("one", "two"))
    assert one != two
    before = stage.sent_packets()
    tool(
        stage.pods["two"].pod,
        stage.pods["one"].pod,
        ["ib_send_lat", "-d", DEVICE, "-x", two, "-F", "-n", "100"],
        ["ib_send_lat", "-d", DEVICE, "-x", one, "-F", "-n", "100", stage.pods["two"].address(4)],
        "Waiting for client",
    )
    # A message and an acknowledgement each way and round. Not its figures: an old kernel's clock, emulated, may have
    # none for it.
    assert stage.sent_packets() - before >= 4 * 100


@pytest.mark.parametrize("version", FAMILIES)
def test_a_lease(stage: Stage, version: int) -> None:
    service = f"params-{version}"
    stage.verbs["two"].ask("serve", service=service)
    address = stage.pods["one"].address(version)
    written = stage.verbs["one"].ask("write", target=f"two:{service}", bytes=1 << 20, address=address)
    assert written["equal"]


@pytest.mark.parametrize("version", FAMILIES)
def test_the_host_and_pods_reach_each_other(stage: Stage, version: int) -> None:
    """Pods' addresses are on a netdev of the host, and still lead to the pods."""
    world, one = stage.world, stage.pods["one"]
    gateway = {4: "10.213.0.1", 6: "fd72:646d:616e::1"}[version]
    programs = {"one": (world.traffic("one", one.pod.running), one.address(version))}
    programs["host"] = (world.traffic("host", world.host), gateway)
    for sender, receiver in (("host", "one"), ("one", "host")):
        listener, address = programs[receiver]
        port = listener.ask("serve", address=address)["port"]
        sent = programs[sender][0].ask("send", address=address, port=port, bytes=1 << 16, verify=True)
        assert sent["equal"]
    routed = world.host.exec(["ip", "-j", "route", "get", one.address(version)]).json()
    assert routed[0]["dev"] == "rdmanet0"


def test_a_netdev_that_goes_down_and_comes_back(stage: Stage) -> None:
    world, verbs = stage.world, stage.verbs
    verbs["two"].ask("serve", service="held")
    verbs["one"].ask("stream_begin", target="two:held", pause_s=0.02)
    verbs["one"].ask("stream_reach", rounds=3, within_s=TIMEOUT_S)
    world.host.ip(f"link set {NETDEV} down")
    stage.until_unhealthy(f"its RDMA device {DEVICE} is down: {NETDEV} is down")
    with pytest.raises(PeerError):  # the device's own error, or the agent's word: what comes first
        verbs["one"].ask("stream_end")
    with pytest.raises(PeerError, match=f"{NETDEV} is down"):
        verbs["one"].ask("connect", target="two:held")
    assert f'rdmanet_device_healthy{{device="{DEVICE}",pod="default/one"}} 0.0' in world.host.api("GET", "/metrics")
    assert f"(its RDMA device {DEVICE} is down: {NETDEV} is down)" in world.command("status").stdout
    world.host.ip(f"link set {NETDEV} up")
    stage.until_well()
    verbs["two"].ask("serve", service="after")
    for version in FAMILIES:
        address = stage.pods["one"].address(version)
        assert verbs["one"].ask("write", target="two:after", bytes=4096, address=address)["equal"]
        test_the_host_and_pods_reach_each_other(stage, version)


def test_a_device_that_goes_and_comes_back(stage: Stage) -> None:
    world = stage.world
    before = stage.row("one")["device"]
    # Without a module's help (Linux 6.1) this waits for everybody who has the device open; it is noticed before that.
    with world.host.popen(["rdma", "link", "delete", DEVICE]) as deleting:
        stage.until_unhealthy(f"its RDMA device {DEVICE} is missing")
        for peer in stage.verbs.values():
            peer.close()
        assert deleting.wait() == 0
    table = world.command("rdma").stdout
    assert "missing" in table
    host_device.make_device(world.host)
    stage.until_well()
    again = stage.row("one")["device"]
    assert again["uverbs"] == before["uverbs"]
    assert again["index"] != before["index"]


def test_addresses_that_somebody_takes_are_put_back(stage: Stage) -> None:
    world, address = stage.world, stage.pods["one"].address(4)

    def lent() -> bool:
        return f" {address}/32" in world.host.exec(["ip", "address", "show", "dev", NETDEV]).stdout

    assert lent()
    world.host.ip(f"address delete {address}/32 dev {NETDEV}")
    until(lent, "lent again")
    world.host.kill_agent()
    world.host.ip(f"address delete {address}/32 dev {NETDEV}")
    world.start_agent()
    until(lent, "lent again by the next agent")


def test_the_end(stage: Stage) -> None:
    """Last: DEL of all, uninstall, and the host is as it was."""
    world = stage.world
    for peer in world.peers:
        peer.close()
    for attached in stage.pods.values():
        attached.pod.stop()
        world.delete(attached)
    assert "10.213" not in world.host.exec(["ip", "address", "show", "dev", NETDEV]).stdout
    world.host.stop_agent()
    for pod in world.pods:
        pod.destroy()
    world.command("uninstall")
    assert diff(stage.before, world.host.dump()) == []
