"""The host reboots under running containers: state directory and runtimes' storage kept, kernel state gone."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from testbed import containerd as containerds
from testbed import podman as podmans
from testbed.containerd import Containerd
from testbed.host import Host
from testbed.podman import IMAGE, Podman
from testbed.reboot import reboot
from testbed.world import World, config
from tests.kernel.test_containerd import served
from tests.kernel.test_podman import fetch, serve

OURS: dict[str, Any] = {"type": "rdmanet"}
#: Room for 13 pods: the network's own, the gateway's and the last address are not given away.
SMALL: dict[str, dict[str, Any]] = {"network": {"ipv4_range": "10.213.0.0/28"}}
ROOM = 13


def restarted(host: Host) -> World:
    """An agent on what the reboot left."""
    world = World(host, SMALL)
    world.start_agent()
    return world


def test_addresses_are_not_leaked() -> None:
    """Every address was taken; after the reboot nobody has called DEL, and every one can be had again."""
    with World.start("reboot", SMALL) as world:
        for _ in range(ROOM):
            world.add()
        assert len(world.status()["attachments"]) == ROOM
        with reboot(world.host, ()) as host:
            again = restarted(host)
            assert again.status()["attachments"] == []
            assert again.sql("SELECT count(*) FROM addresses")[0] == [[0]]
            attached = [again.add() for _ in range(ROOM)]
            # A runtime's late DEL of a pod from before the reboot.
            stale = host.cni("DEL", world.pods[0], config({}))
            assert (stale.returncode, stale.output) == (0, None)
            for one in attached:
                assert again.check(one).returncode == 0
                again.delete(one)
                one.pod.destroy()


def test_podman_starts_its_containers_again() -> None:
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(World.start("reboot-podman", SMALL))
        if missing := podmans.why_no_networks(world.host):
            pytest.skip(missing)
        podman = stack.enter_context(Podman.start(world.host))
        podman.network("net", [OURS])
        for name in ("one", "two"):
            serve(podman, name)
        podman("run", "-d", "--name", "idle", "--network", "net", IMAGE, "sleep", "1000")
        with reboot(world.host, podmans.PLACES, podmans.prepare) as host:
            again, podman_again = restarted(host), Podman(host)
            assert again.status()["attachments"] == []
            podman_again("start", "one", "two")
            for name in ("one", "two"):
                for address in podman_again.addresses(name, "net").values():
                    assert fetch(host, address).stdout == f"from {name}\n"
            assert {row["pod"] for row in again.status()["attachments"]} == {"default/one", "default/two"}
            podman_again.remove_all()
            assert again.status()["attachments"] == []


def test_containerd_removes_its_old_pods_and_runs_others() -> None:
    with World.start("reboot-containerd", SMALL) as world, Containerd.start(world.host) as containerd:
        containerd.network("net", [OURS])
        old = served(containerd, "one")
        containerd.kill()
        with reboot(world.host, containerds.PLACES, containerds.prepare) as host:
            again, later = restarted(host), Containerd(host)
            try:
                assert again.status()["attachments"] == []
                later.run()
                assert later.pods() == {old.id: False}  # not ready
                new = served(later, "one")
                later.remove_pod(old.id)
                assert [row["container_id"] for row in again.status()["attachments"]] == [new.id]
                for address in later.addresses(new).values():
                    assert fetch(host, address).stdout == "from one\n"
            finally:
                later.close()
            assert again.status()["attachments"] == []


@pytest.mark.parametrize("kept", [True, False])
def test_a_reboot_is_told_from_a_restart(kept: bool) -> None:
    """What was there goes with a reboot, and stays with a restart of the agent alone."""
    with World.start("told", SMALL) as world:
        attached = world.add()
        if kept:
            world.host.kill_agent()
            world.start_agent()
            assert world.check(attached).returncode == 0
            world.delete(attached)
            return
        with reboot(world.host, ()) as host:
            assert restarted(host).status()["attachments"] == []
