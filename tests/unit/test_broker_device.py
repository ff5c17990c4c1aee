"""What the broker tells of a pod's device and class, and what happens to leases when the device goes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rdmanet import lease as wire
from rdmanet.model import GuardState
from tests.unit.broker_world import Process, World, leased, pod, refusal, restarted

GONE = "the RDMA device rxe_rn2 of train-0 has been removed"


@pytest.fixture
def world() -> World:
    return World(pod("train-0", 2), pod("train-1", 3), pod("train-2", 4))


@pytest.fixture
def train_0(world: World) -> Process:
    return world.connection(100, pid=1000)


@pytest.fixture
def train_1(world: World) -> Process:
    process = world.connection(101, pid=1001)
    process.listen()
    return process


def breaks(world: World, cookie: int = 100) -> None:
    world.pods[cookie] = replace(world.pods[cookie], unhealthy=GONE)
    world.do(world.core.device_gone(cookie, GONE, world.now_s))


def heals(world: World, cookie: int = 100) -> None:
    world.pods[cookie] = replace(world.pods[cookie], unhealthy=None)
    world.do(world.core.device_back(cookie))


def states(process: Process) -> list[str | None]:
    return [m.sentence for m in process.messages if isinstance(m, wire.DeviceState)]


def test_hello_carries_class_and_health(world: World) -> None:
    world.pods[100] = replace(world.pods[100], traffic_class=96, service_level=3, unhealthy=GONE)
    process = world.connection(100, hello=False)
    answer = process.ask(wire.Hello(1))
    assert isinstance(answer, wire.Reply)
    hello = wire.HelloReply.from_json(answer.values)
    assert (hello.traffic_class, hello.service_level, hello.unhealthy) == (96, 3, GONE)


def test_hello_is_reported(world: World, train_0: Process, train_1: Process) -> None:
    assert world.greeted == [(100, 1000), (101, 1001)]
    world.connection(102, hello=False)
    assert len(world.greeted) == 2


def test_leases_end_with_the_device(world: World, train_0: Process, train_1: Process) -> None:
    number = leased(train_0, train_1)
    breaks(world)
    assert states(train_0) == [GONE]
    assert states(train_1) == []
    assert [(m.leases, m.sentence) for m in train_1.revoked()] == [((number,), GONE)]
    assert {entry.state for entry in world.guard.values()} == {GuardState.REVOKED}
    assert world.core.counts.revoked == {"device_gone": 1}
    # Its processes hear of the device first: that is why.
    kinds = [type(m) for m in train_0.messages if isinstance(m, wire.DeviceState | wire.Revoked)]
    assert kinds == [wire.DeviceState, wire.Revoked]


def test_nothing_is_leased_without_the_device(world: World, train_0: Process, train_1: Process) -> None:
    breaks(world)
    assert [refusal(train_0.answer(train_0.connect())).kind, refusal(train_0.listen("x")).kind] == ["no_device"] * 2
    assert refusal(train_0.listen("x")).sentence == GONE
    heals(world)
    assert states(train_0) == [GONE, None]
    assert leased(train_0, train_1)


def test_nothing_is_leased_to_it_either(world: World, train_0: Process, train_1: Process) -> None:
    breaks(world, 101)
    refused = refusal(train_0.answer(train_0.connect()))
    assert (refused.kind, refused.sentence) == ("peer_no_device", GONE)
    heals(world, 101)
    assert leased(train_0, train_1)  # it went on listening


def test_connect_that_waits_is_refused(world: World, train_0: Process, train_1: Process) -> None:
    asked = train_0.connect()
    breaks(world, 101)
    assert refusal(train_0.answer(asked)).kind == "no_device"
    assert world.core.snapshot(0) == []
    assert refusal(train_1.answer(train_1.accept())).kind == "unknown_lease"


def test_unclaimed_leases_end_too(world: World, train_0: Process, train_1: Process) -> None:
    leased(train_0, train_1)
    new = restarted(world)
    breaks(new)
    assert new.core.snapshot(0) == []


def test_others_keep_theirs(world: World, train_0: Process, train_1: Process) -> None:
    other = world.connection(102, pid=1002)
    number = leased(other, train_1, 17, 19)
    leased(train_0, train_1)
    breaks(world)
    assert [view.lease for view in world.core.snapshot(0)] == [wire.lease_text(number)]
    assert (states(other), other.lost()) == ([], [])
