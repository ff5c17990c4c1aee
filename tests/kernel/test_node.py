"""What a start does to the host, and what it refuses to start on; nothing else on the host changes."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from testbed.container import CommandError
from testbed.host import Host, diff
from testbed.outside import FAR_IPV4, FAR_IPV6, HOST_IPV4
from testbed.paths import REPOSITORY
from testbed.world import World

OURS = ("rdmanet0", "rdmanet1", "/sys/fs/bpf/rdmanet", "/run/rdmanet", "/var/lib/rdmanet")


def refused(world: World, config: dict[str, dict[str, Any]]) -> str:
    """The last words of an agent that does not start."""
    world.agent_config = config
    with pytest.raises(CommandError, match="ended before it was ready") as caught:
        world.start_agent()
    return caught.value.sentence


def test_a_start_changes_what_it_says_and_nothing_else() -> None:
    with World.start("node", agent=False) as world:
        before = world.host.dump()
        world.start_agent()
        changes = diff(before, world.host.dump())
        foreign = [line for line in changes if not any(word in line for word in OURS)]
        # On the uplink: one qdisc and one filter.
        assert [line.split(":")[0] for line in foreign] == ["filters", "qdiscs"]
        assert all("uplink0" in line for line in foreign)
        assert not [line for line in changes if ": - " in line], "something of the host's is gone"
        forwarding = [line for line in changes if line.endswith('forwarding = "1"')]
        assert sorted(forwarding) == [
            'sysctls: + net/ipv4/conf/rdmanet0/forwarding = "1"',
            'sysctls: + net/ipv6/conf/rdmanet0/forwarding = "1"',
        ]
        # A second start finds everything as it should be.
        during = world.snapshot()
        world.host.stop_agent()
        world.start_agent()
        assert diff(during, world.snapshot()) == []


def test_starts_that_are_refused() -> None:
    with World.start("refused", agent=False) as world:
        before = world.host.dump()
        words = refused(world, {"network": {"ipv4_range": "198.51.100.0/25"}})
        assert "network.ipv4_range 198.51.100.0/25 overlaps 198.51.100.0/24, which this host already reaches" in words
        words = refused(world, {"network": {"ipv6_range": "2001:db8::/32"}})
        assert "network.ipv6_range 2001:db8::/32 overlaps 2001:db8:100::/64" in words
        words = refused(world, {"network": {"uplinks": ["uplink0", "eth9"]}})
        assert "network.uplinks names eth9, which this host does not have; it has" in words
        words = refused(world, {"datapath": {"artifact_dir": "/var/empty/none"}})
        assert "There is no compiled datapath at /var/empty/none" in words
        words = refused(world, {"datapath": {"bpffs_dir": "/var/empty/none/rdmanet"}})
        assert "/var/empty/none does not exist" in words
        words = refused(world, {"agent": {"state_dir": "/proc/rdmanet"}})
        assert "The state directory /proc/rdmanet cannot be used" in words
        words = refused(world, {"network": {"mtu": 9000}})
        assert "unknown key network.mtu; did you mean mtu_bytes?" in words
        left = [line for line in diff(before, world.host.dump()) if not line.startswith(("state:", "run:", "bpffs"))]
        assert left == [], "apart from its own files a refused agent leaves nothing"
        world.host.ip("link add rdmanet0 type veth peer name rdmanet1")
        words = refused(world, {})
        assert "A netdev rdmanet0 exists that this agent did not make" in words
        world.host.ip("link delete rdmanet0")
        world.start_agent()


def test_a_host_without_an_uplink() -> None:
    with World.start("alone", outside=False) as world:
        assert world.status()["agent"]["mtu_bytes"] == 1500
        one, two = world.add(), world.add()
        one.pod.start()
        for target in (two.address(4), two.address(6), "10.213.0.1", "fd72:646d:616e::1"):
            one.pod.exec(["ping", "-c", "1", "-W", "5", target])
        for far in (FAR_IPV4, FAR_IPV6):
            # The host's stack has no route either, and says so.
            said = one.pod.exec(["ping", "-c", "1", "-W", "5", far], check=False).stdout
            assert "nreachable" in said


def test_the_smallest_uplink_gives_the_mtu_and_the_configured_ones_count() -> None:
    with World.start("mtu", outside=False, agent=False) as world:
        world.host.connect_outside(mtu_bytes=1400)
        world.host.ip("link add spare mtu 1300 type veth peer name other", "link set spare up", "link set other up")
        world.start_agent()
        assert world.status()["agent"]["mtu_bytes"] == 1400
        attached = world.add()
        attached.pod.start()
        attached.pod.exec(["ping", "-c", "1", "-W", "5", "-M", "do", "-s", "1372", FAR_IPV4])
        world.delete(attached)
        world.host.stop_agent()
        world.agent_config = {"network": {"uplinks": ["uplink0", "spare"]}}
        world.start_agent()
        assert world.status()["agent"]["mtu_bytes"] == 1300
        with world.datapath() as datapath:
            assert len(datapath.uplinks()) == 2
        # And back: what is no uplink any more does not masquerade.
        world.host.stop_agent()
        world.agent_config = {"network": {"uplinks": ["spare"]}}
        world.start_agent()
        with world.datapath() as datapath:
            assert len(datapath.uplinks()) == 1
        attached = world.add()
        attached.pod.start()
        attached.pod.exec(["ping", "-c", "1", "-W", "1", FAR_IPV4], check=False)
        assert world.drops(f"default/{attached.pod.name}").get("not_uplink", 0) > 0


def test_without_masquerade_pods_keep_their_address() -> None:
    with World.start("routed", {"masquerade": {"enabled": False}}) as world:
        assert world.host.outside is not None
        attached = world.add()
        attached.pod.start()
        # The outside knows the way back, and the host forwards: as an administrator would have it.
        world.host.outside.ip(f"route add 10.213.0.0/20 via {HOST_IPV4} dev eth0")
        world.host.exec(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/uplink0/forwarding"])
        sink = world.traffic("outside", world.host.outside)
        port = sink.ask("serve", address=FAR_IPV4)["port"]
        source = world.traffic("pod", attached.pod.running)
        sent = source.ask("send", address=FAR_IPV4, port=port, bytes=100_000, verify=True)
        assert (sent["equal"], sent["peer"]) == (True, attached.address(4))


NEW_MOUNTS = "unshare --mount"
WITH_SHELL = "sh -e -c '{}; exec \"$@\"' sh"


def pins(host: Host, change: str, first: str) -> str:
    """What doctor says of the bpffs when something was done in a mount namespace of its own, as a container has it.

    ``first`` stands for the machine's first process.
    """
    asked = f"pins(Path('/sys/fs/bpf'), Path('/proc/{first}'))"
    program = f"from pathlib import Path; from rdmanet.doctor import pins; print(*{asked})"
    script = f'exec {change} "$0" -c "$1"'
    return host.exec(["sh", "-e", "-c", script, sys.executable, program], cwd=str(REPOSITORY)).stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("", "ok pins are the host's own at /sys/fs/bpf"),
        (NEW_MOUNTS, "ok /sys/fs/bpf is the host's bpffs"),
        (f"{NEW_MOUNTS} {WITH_SHELL.format('mount -t bpf bpf /sys/fs/bpf')}", "warning /sys/fs/bpf is not the host's"),
        (f"{NEW_MOUNTS} {WITH_SHELL.format('umount /sys/fs/bpf')}", "warning /sys/fs/bpf is not the host's"),
    ],
)
def test_doctor_knows_the_hosts_bpffs_from_a_containers(host: Host, change: str, said: str) -> None:
    """The scratch host's first process is the host's."""
    assert pins(host, change, str(host.container.pid)).startswith(said)


def test_doctor_does_not_guess_whose_bpffs_it_is(host: Host) -> None:
    """Without the host's process ids."""
    assert pins(host, "unshare --pid --fork --mount-proc", "1").startswith("warning it cannot be told")


def test_doctor_on_a_scratch_host() -> None:
    with World.start("doctor", agent=False) as world:
        before = world.host.dump()
        world.start_agent()
        world.host.stop_agent()
        world.command("uninstall")
        done = world.command("doctor", check=False)
        found = {line.split()[0]: line for line in done.stdout.splitlines()[1:]}
        assert " ok " in found["privileges"]
        assert " ok " in found["kernel"]
        assert " ok " in found["artifact"]
        assert "uplink uplink0: pods leave behind 198.51.100.2 and 2001:db8:100::2" in done.stdout
        assert diff(before, world.host.dump()) == [], "doctor changes nothing"
