"""What a DEL leaves to the background: harmless while there, waited for where it is in the way, gone in the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from rdmanet.errors import UnavailableError
from rdmanet.model import address_key
from testbed.crashes.crashing import ORDER, PROGRAM, RECORD
from testbed.host import CniOutcome, diff
from testbed.pod import Pod
from testbed.world import Attached, World, config, refused, succeeded
from tests.kernel.test_crash import CUT

GATE = "/run/removal-gate"
WAIT_S = 60.0


@pytest.fixture
def world() -> Iterator[World]:
    with World.start("removal", agent=False) as world:
        world.start_agent("-m", PROGRAM, ORDER, RECORD)
        yield world


@contextlib.contextmanager
def held(world: World, attached: Attached) -> Iterator[None]:
    """DEL, and the removal of its link held until the block ends."""
    world.host.exec(["mkfifo", GATE])
    world.host.container.act(("write", ORDER, f"{len(CUT) + 1} hold {GATE}"))
    world.delete(attached)
    with world.host.path(GATE).open("wb"):  # returns when the agent has come to the gate, which opens with the end
        yield
        world.host.exec(["rm", ORDER, GATE])
    world.host.settle()


def releasing(world: World) -> dict[str, Any]:
    """What status says of removals, without waiting for them."""
    found: dict[str, Any] = world.host.api("GET", "/v1/status")["releasing"]
    return found


def links(world: World) -> set[str]:
    """The host's links."""
    return {link["ifname"] for link in world.host.exec(["ip", "-json", "link"]).json()}


def begun(threads: ThreadPoolExecutor, world: World, pod: Pod, **options: Any) -> Future[CniOutcome]:
    """An ADD that is under way."""
    return threads.submit(world.host.cni, "ADD", pod, config({}), **options)


def test_traffic_is_cut_when_del_answers(world: World) -> None:
    one, two = world.add(), world.add()
    for attached in (one, two):
        attached.pod.start()
    two.pod.exec(["ping", "-c", "1", "-W", "5", one.address(4)])
    with held(world, one):
        assert releasing(world) == {"count": 1, "failing": {}}
        assert one.host_ifname in links(world), "the link is there still"
        for version in (4, 6):
            for source, target in ((two, one), (one, two)):
                ping = ["ping", "-c", "1", "-W", "1", target.address(version)]
                assert source.pod.exec(ping, check=False).returncode == 1
            assert world.host.exec(["ping", "-c", "1", "-W", "1", one.address(version)], check=False).returncode == 1
        with world.datapath() as datapath:
            assert set(datapath.endpoints()) == {address_key(address) for address in two.addresses}
            assert len(datapath.attachments()) == 1
        refused(world.check(one), 3, "There is no attachment")
        started = time.monotonic()
        world.delete(one)  # runtimes repeat it
        world.delete(one, netns="")
        assert time.monotonic() - started < WAIT_S
        with pytest.raises(UnavailableError, match=r"Links are still being removed after 0\.1 s"):
            world.host.api("GET", "/v1/settled?timeout_s=0.1")
    assert releasing(world) == {"count": 0, "failing": {}}
    assert one.host_ifname not in links(world)
    succeeded(world.check(two))


def test_nothing_is_given_away_before_the_link_is_gone(world: World) -> None:
    first = world.add(args="IgnoreUnknown=1;IP=10.213.14.1")
    other = world.pod()
    with ThreadPoolExecutor(3) as threads:
        with held(world, first):
            same_address = begun(threads, world, other, args="IgnoreUnknown=1;IP=10.213.14.1")
            same_pod = begun(threads, world, first.pod, args="")
            # Two ADDs wait: each has been seen, as an unrelated one that came later is done.
            unrelated = world.add()
            assert unrelated.address(4) not in first.addresses
            world.delete(unrelated)
            assert not same_address.done()
            assert not same_pod.done()
        results = [future.result(WAIT_S) for future in (same_address, same_pod)]
    for outcome in results:
        assert outcome.returncode == 0, outcome.sentence
    assert results[0].output is not None
    assert results[0].output["ips"][0]["address"] == "10.213.14.1/32"
    for pod in (other, first.pod):
        succeeded(world.host.cni("DEL", pod, config({})))


def test_another_container_waits_for_the_same_namespace_and_interface(world: World) -> None:
    first = world.add()
    again = Pod(first.pod.host, "again", "default", first.pod.netns, "another", first.pod.cgroup)
    with ThreadPoolExecutor(1) as threads:
        with held(world, first):
            waiting = begun(threads, world, again)
            world.delete(world.add())
            assert not waiting.done()
        outcome = waiting.result(WAIT_S)
    assert outcome.returncode == 0, outcome.sentence
    succeeded(world.host.cni("DEL", again, config({})))


def test_the_namespace_goes_first(world: World) -> None:
    """As with runtimes, which delete it right after DEL: the kernel removes the link, and the removal finds none."""
    before = world.snapshot()
    first = world.add()
    with held(world, first):
        first.pod.destroy()
    assert diff(before, world.snapshot()) == []


def test_many_at_once(world: World) -> None:
    before = world.snapshot()
    with ThreadPoolExecutor(12) as threads:
        added = list(threads.map(lambda _: world.add(), range(36)))
        list(threads.map(world.delete, added))
        assert diff(before, world.snapshot()) == []
        again = list(threads.map(world.add, [attached.pod for attached in added]))
        assert {a.host_ifname for a in again}.isdisjoint(a.host_ifname for a in added)
        list(threads.map(lambda a: a.pod.destroy(), again[::2]))
        list(threads.map(world.delete, again))
    assert diff(before, world.snapshot()) == []


def test_a_stop_ends_what_is_under_way(world: World) -> None:
    before = world.snapshot()
    for attached in [world.add() for _ in range(3)]:
        world.delete(attached)
    assert world.host.stop_agent() == 0
    assert diff(before, world.snapshot()) == []


def test_a_refused_removal_is_shown_and_tried_again(world: World) -> None:
    first = world.add()
    world.host.container.act(("write", ORDER, f"{len(CUT) + 1} raise"))
    world.delete(first)
    world.host.settle()
    assert "A test wants it so." in (world.host.agent.log if world.host.agent else "")
    metrics = world.host.api("GET", "/metrics")
    assert "rdmanet_removals_failed_total 1.0" in metrics
    assert 'rdmanet_attachments{state="releasing"} 0.0' in metrics
