"""The agent dies and comes back: pods notice nothing, what went wrong is put right, what is gone is released."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rdmanet.adoption import AT_ONCE
from rdmanet.datapath.layout import EndpointEntry
from rdmanet.model import address_key
from testbed import breaking
from testbed.container import CommandError, Process
from testbed.host import diff
from testbed.outside import FAR_IPV4
from testbed.world import Attached, World, config, refused, succeeded

STREAM_WAIT_S = 30.0


@pytest.fixture
def world() -> Iterator[World]:
    with World.start("restart", {"network": {"mtu_bytes": 9000}}) as world:
        yield world


def ping(world: World, source: Attached, target: str) -> None:
    """One packet there and back."""
    source.pod.exec(["ping", "-c", "1", "-W", "5", target])


def namespaces(world: World) -> dict[int, int]:
    """Whose sockets reach services."""
    with world.datapath() as datapath:
        return datapath.namespaces()


def lost(pinging: Process) -> tuple[int, int]:
    """Ends a running ``ping -q``: packets sent and packets lost."""
    pinging.signal(signal.SIGINT)
    assert pinging.stdout is not None
    text = pinging.stdout.read().decode()
    pinging.wait()
    found = re.search(r"(\d+) packets transmitted, (\d+) received", text)
    assert found is not None, text
    return int(found[1]), int(found[1]) - int(found[2])


def test_nothing_is_lost_and_nothing_is_rewritten(world: World) -> None:
    one, two = world.add(world.pod("one")), world.add(world.pod("two"))
    for attached in (one, two):
        attached.pod.start()
    assert world.host.outside is not None
    inside = world.traffic("two", two.pod.running)
    outside = world.traffic("outside", world.host.outside)
    streams = []
    for number, (sink, address) in enumerate(((inside, two.address(4)), (inside, two.address(6)), (outside, FAR_IPV4))):
        port = sink.ask("serve", address=address)["port"]
        stream = world.traffic(f"one-{number}", one.pod.running)
        stream.ask("stream_begin", address=address, port=port, pause_s=0.002)
        streams.append(stream)
    pings = [
        one.pod.popen(["ping", "-q", "-i", "0.02", target], stdout=subprocess.PIPE)
        for target in (two.address(4), two.address(6), FAR_IPV4, "10.213.0.1")
    ]

    def go_on(rounds: int) -> None:
        for stream in streams:
            done = stream.ask("stream_reach", rounds=0, within_s=STREAM_WAIT_S)["rounds"]
            stream.ask("stream_reach", rounds=done + rounds, within_s=STREAM_WAIT_S)

    go_on(20)
    before = world.snapshot()
    world.host.kill_agent()
    go_on(50)
    world.start_agent()
    go_on(50)
    assert diff(before, world.snapshot()) == []
    for stream in streams:
        ended = stream.ask("stream_end")
        assert ended["equal"], "bytes were lost or changed"
    for pinging in pings:
        sent, missing = lost(pinging)
        assert sent > 20
        assert missing == 0
    assert {row["state"] for row in world.status()["attachments"]} == {"ready"}
    for attached in (one, two):
        succeeded(world.check(attached))
    # And the agent goes on as before: the next address, not one that has just been used.
    three = world.add(world.pod("three"))
    assert three.address(4) == "10.213.0.4"
    three.pod.start()
    ping(world, three, one.address(6))
    world.delete(one)
    assert "default/one" not in {row["pod"] for row in world.status()["attachments"]}


def test_an_orderly_stop_leaves_pods_their_network(world: World) -> None:
    one, two = world.add(), world.add()
    one.pod.start()
    before = world.snapshot()
    assert world.host.stop_agent() == 0
    ping(world, one, two.address(4))
    refused(world.host.cni("ADD", world.pod(), config({})), 11, "The rdmanet agent does not answer")
    refused(world.host.cni("STATUS", None, config({})), 50, "The rdmanet agent does not answer")
    world.start_agent()
    assert diff(before, world.snapshot()) == []


def test_a_second_agent_is_refused(world: World) -> None:
    with pytest.raises(CommandError, match="ended with status 1") as caught:
        world.command("agent")
    assert "An agent is running already with /var/lib/rdmanet; stop it first." in caught.value.completed.stderr
    succeeded(world.host.cni("STATUS", None, config({})))


def test_what_went_wrong_is_put_right(world: World) -> None:
    """Each pod loses something else while the agent is away; afterwards all is as it was and all reach all."""
    attached = [world.add() for _ in range(5)]
    for one in attached:
        one.pod.start()
    before = world.snapshot()
    world.host.kill_agent()
    no_filter, wrong_endpoint, no_endpoint, no_entry, whole = attached
    world.host.exec(["tc", "qdisc", "del", "dev", no_filter.host_ifname, "clsact"])
    with world.datapath() as datapath:
        wrong = EndpointEntry(ifindex=1, mac=bytes(6), attachment_id=99, device=True, enforce=True)
        datapath.set_endpoint(address_key(wrong_endpoint.address(4)), wrong)
        datapath.delete_endpoint(address_key(no_endpoint.address(6)))
        (ifindex,) = [k for k, v in datapath.attachments().items() if v.ipv4 == address_key(no_entry.address(4))]
        datapath.delete_attachment(ifindex)
        # As if its link had been made anew meanwhile.
        (known,) = [v for v in datapath.attachments().values() if v.ipv4 == address_key(whole.address(4))]
        datapath.set_attachment(4711, known)
    world.host.ip("address delete 10.213.0.1/32 dev rdmanet0", "route delete fd72:646d:616e::/64 dev rdmanet0")
    world.host.exec(["tc", "qdisc", "del", "dev", "rdmanet1", "clsact"])
    world.host.exec(["tc", "qdisc", "del", "dev", "uplink0", "clsact"])
    world.host.exec(["sh", "-c", "echo 0 > /proc/sys/net/ipv4/conf/rdmanet0/forwarding"])
    world.start_agent()
    assert diff(before, world.snapshot()) == []
    for one in attached:
        succeeded(world.check(one))
        for target in (whole.address(4), whole.address(6), "10.213.0.1", FAR_IPV4):
            ping(world, one, target)
        world.host.exec(["ping", "-c", "1", "-W", "5", one.address(6)])
    assert world.host.agent is not None
    assert f"{no_filter.host_ifname}: the filter was missing and is put back" in world.host.agent.log
    for one in (wrong_endpoint, no_endpoint, no_entry):
        assert f"{one.host_ifname}: datapath entries differed and are written again" in world.host.agent.log
    assert f"{whole.host_ifname}:" not in world.host.agent.log


def test_more_pods_than_are_looked_at_together(world: World) -> None:
    with ThreadPoolExecutor(10) as threads:
        attached = list(threads.map(lambda _: world.add(), range(AT_ONCE + 7)))
        before = world.snapshot()
        world.host.kill_agent()
        gone, *rest = attached
        gone.pod.destroy()
        world.start_agent()
        assert {row["container_id"] for row in world.status()["attachments"]} == {a.pod.container_id for a in rest}
        for outcome in threads.map(world.check, rest[::10]):
            succeeded(outcome)
        world.add()
        world.host.kill_agent()
        world.start_agent()
        assert len(world.status()["attachments"]) == len(before["attachments"]) == len(attached)
        assert world.host.agent is not None
        assert "differed" not in world.host.agent.log
        assert "missing" not in world.host.agent.log


def test_pins_that_are_gone(world: World) -> None:
    """The agent's bpffs may go with its container: the next one begins with empty maps, and old pods get into them."""
    old = world.add()
    old.pod.start()
    world.host.kill_agent()
    world.host.exec(["rm", "-r", "/sys/fs/bpf/rdmanet"])
    world.start_agent()
    new = world.add()
    new.pod.start()
    succeeded(world.check(old))
    for one, other in ((old, new), (new, old)):
        for version in (4, 6):
            ping(world, one, other.address(version))
        ping(world, one, FAR_IPV4)
    for row in world.status()["attachments"]:
        assert row["counters"]["from_pod_ip"]["packets"] > 0, "an old filter counts in maps that nobody reads"


def test_what_is_gone_is_released(world: World) -> None:
    before = world.snapshot()
    kept, netns_gone, other_netns = (world.add() for _ in range(3))
    world.host.kill_agent()
    netns_gone.pod.destroy()
    other_netns.pod.destroy()
    world.pod(other_netns.pod.name)
    world.start_agent()
    assert [row["container_id"] for row in world.status()["attachments"]] == [kept.pod.container_id]
    with world.datapath() as datapath:
        assert set(datapath.endpoints()) == {address_key(address) for address in kept.addresses}
    for gone in (netns_gone, other_netns):
        world.delete(gone)
    world.delete(kept)
    assert diff(before, world.snapshot()) == []


def test_where_the_folder_of_namespaces_is_hidden_pods_keep_their_network(world: World) -> None:
    """As in a container that the folder is not mounted into: of what was in there nobody can tell that it is gone."""
    one, two = world.add(world.pod("one")), world.add(world.pod("two"))
    for attached in (one, two):
        attached.pod.start()
    before, known = world.snapshot(), namespaces(world)
    folder = str(Path(one.pod.netns).parent)
    world.host.kill_agent()
    world.host.exec(["mv", folder, f"{folder}-hidden"])
    world.start_agent()
    assert [row["state"] for row in world.status()["attachments"]] == ["ready", "ready"]
    assert world.host.agent is not None
    assert f"{one.pod.netns} is hidden" in world.host.agent.log
    for target in two.addresses:
        ping(world, one, target)
    world.host.exec(["mv", f"{folder}-hidden", folder])
    assert diff(before, world.snapshot()) == []
    assert namespaces(world) == known
    world.host.kill_agent()
    world.start_agent()
    assert diff(before, world.snapshot()) == []
    for attached in (one, two):
        succeeded(world.check(attached))
        world.delete(attached)


def test_a_link_that_went_while_no_agent_ran_is_made_again(world: World) -> None:
    """Its pod lives, and nobody else would give it a network again."""
    before = world.snapshot()
    broken, other = world.add(), world.add()
    broken.pod.start()
    world.host.kill_agent()
    world.host.ip(f"link delete {broken.host_ifname}")
    world.start_agent()
    breaking.forgive(world.host, f"{broken.pod.namespace}/{broken.pod.name}")  # asks for a repair, and waits for it
    assert breaking.repairs(world.host)["broken"] == []
    succeeded(world.check(broken))
    for version in (4, 6):
        ping(world, broken, other.address(version))
    broken.pod.stop()
    world.delete(broken)
    world.delete(other)
    assert diff(before, world.snapshot()) == []


def test_dels_while_away_are_done_when_it_is_back(world: World) -> None:
    before = world.snapshot()
    gone, again, kept = (world.add() for _ in range(3))
    world.host.kill_agent()
    for attached in (gone, again):
        world.delete(attached, netns="")
        world.delete(attached)  # runtimes repeat it
    world.start_agent()
    assert {row["container_id"] for row in world.status()["attachments"]} == {kept.pod.container_id}
    succeeded(world.check(world.add(again.pod)))
    world.delete(again)
    world.delete(kept)
    assert diff(before, world.snapshot()) == []


def test_after_a_reboot_everything_is_released(world: World) -> None:
    """A reboot is a host with the old database and nothing else: here another scratch host with its copy."""
    attached = world.add()
    world.host.kill_agent()
    world.sql("UPDATE meta SET value = 'another' WHERE key = 'boot_id'")
    database = world.host.path("/var/lib/rdmanet/state.db").read_bytes()
    with World.start("rebooted", world.agent_config, agent=False) as fresh:
        # Somebody else has pinned there since: it is theirs, whatever the last boot's agent had recorded.
        fresh.host.exec(["mkdir", "/sys/fs/bpf/theirs"])
        before = fresh.host.dump()
        fresh.host.path("/var/lib/rdmanet/state.db").write_bytes(database)
        fresh.sql("INSERT OR REPLACE INTO host_effects VALUES ('bpffs', '/sys/fs/bpf')")
        fresh.start_agent()
        assert fresh.status()["attachments"] == []
        addresses, effects = fresh.sql("SELECT * FROM addresses", "SELECT name FROM host_effects ORDER BY name")
        assert addresses == []
        assert effects == [["host-link"], ["uplink:uplink0"]]
        succeeded(fresh.host.cni("DEL", attached.pod, config({})))
        first = fresh.add()
        assert first.address(4) == "10.213.0.3", "the search goes on behind the last boot's addresses"
        fresh.delete(first)
        fresh.host.stop_agent()
        fresh.command("uninstall")
        assert diff(before, fresh.host.dump()) == []


def test_a_lost_database_may_be_given_up(world: World) -> None:
    """Who does not want it repaired (tests/kernel/test_database.py) removes its links, and the runtime makes the pods
    anew."""
    old = world.add()
    old.pod.start()
    world.host.kill_agent()
    world.host.exec(["sh", "-c", "rm /var/lib/rdmanet/state.db*"])
    with pytest.raises(CommandError, match=r"has lost rows: this host has 1 attachment\(s\) .* \(rn-1\)"):
        world.start_agent()
    world.host.ip(f"link delete {old.host_ifname}")
    with pytest.raises(CommandError, match="A netdev rdmanet0 exists that this agent did not make"):
        world.start_agent()
    world.host.ip("link delete rdmanet0")
    world.start_agent()
    with world.datapath() as datapath:
        assert datapath.endpoints() == {}
        assert datapath.attachments() == {}
    new = world.add()
    assert (new.host_ifname, new.addresses) == (old.host_ifname, old.addresses)
    new.pod.start()
    ping(world, new, FAR_IPV4)
