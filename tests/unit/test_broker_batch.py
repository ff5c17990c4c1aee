"""Batches of leases in the broker: granted together or not at all, on their own afterwards."""

from __future__ import annotations

import pytest

from rdmanet import lease as wire
from rdmanet.broker.values import FindHolders, Limits, SetGuard
from rdmanet.model import GuardEntry, GuardState
from tests.unit.broker_world import Process, World, pod, refusal, restarted

GRANTED, REVOKED = GuardState.GRANTED, GuardState.REVOKED
CONNECTING, ACCEPTING = range(100, 164), range(200, 264)


@pytest.fixture
def world() -> World:
    return World(pod("train-0", 2, max_leases=100), pod("train-1", 3, max_leases=100), limits=Limits())


@pytest.fixture
def train_0(world: World) -> Process:
    return world.connection(100, pid=1000)


@pytest.fixture
def train_1(world: World) -> Process:
    process = world.connection(101, pid=1001)
    process.listen()
    return process


def batch(train_0: Process, train_1: Process) -> range:
    """64 granted leases; their ids."""
    asked = train_0.connect("train-1:params", *CONNECTING)
    train_1.accept(*ACCEPTING)
    answer = train_0.answer(asked)
    assert isinstance(answer, wire.Reply), answer
    first = wire.ConnectReply.from_json(answer.values).lease
    return range(first, first + 64)


def test_one_message_each_way_and_one_guard_write(world: World, train_0: Process, train_1: Process) -> None:
    before = len(train_0.messages), len(train_1.messages)
    leases = batch(train_0, train_1)
    assert (len(train_0.messages) - before[0], len(train_1.messages) - before[1]) == (1, 2)
    assert [len(e.entries) for e in world.log if isinstance(e, SetGuard)] == [128]
    for lease, own, peer in zip(leases, CONNECTING, ACCEPTING, strict=True):
        assert world.guard[train_0.key(own)] == GuardEntry(lease, *train_1.key(peer), GRANTED, connects=True)
        assert world.guard[train_1.key(peer)] == GuardEntry(lease, *train_0.key(own), GRANTED)
    assert [view.state for view in world.core.snapshot(0)] == ["granted"] * 64
    assert world.core.counts.granted == 64
    assert len(world.granted) == 1


def test_nobody_hears_of_a_batch_that_is_half_written(world: World, train_0: Process, train_1: Process) -> None:
    world.guard_failure = "the guard map is full"
    asked = train_0.connect("train-1:params", *CONNECTING)
    accepted = train_1.accept(*ACCEPTING)
    for answer in (train_0.answer(asked), train_1.answer(accepted)):
        assert refusal(answer).kind == "unavailable"
    assert world.core.snapshot(0) == []
    last = [e for e in world.log if isinstance(e, SetGuard)][-1]
    assert {entry.state for _, entry in last.entries} == {REVOKED}
    assert len(last.entries) == 128


@pytest.mark.parametrize(
    ("qpns", "sentence"),
    [
        (ACCEPTING[:-1], "64 queue pairs were asked for and 63 accepted"),
        ([*ACCEPTING[:-1], 300], "queue pair 300 of train-1 has a lease already"),
    ],
)
def test_a_wrong_answer_refuses_the_whole_batch(
    world: World, train_0: Process, train_1: Process, qpns: list[int], sentence: str
) -> None:
    train_0.connect("train-1:params", 50)
    train_1.accept(300)
    before = dict(world.guard)
    asked = train_0.connect("train-1:params", *CONNECTING)
    assert refusal(train_1.answer(train_1.accept(*qpns))).sentence == sentence
    assert refusal(train_0.answer(asked)).kind == "rejected"
    assert world.guard == before
    assert len(world.core.snapshot(0)) == 1


def test_a_queue_pair_with_a_lease_refuses_the_whole_batch(world: World, train_0: Process, train_1: Process) -> None:
    train_0.connect("train-1:params", CONNECTING[-1])
    train_1.accept()
    answer = refusal(train_0.answer(train_0.connect("train-1:params", *CONNECTING)))
    assert (answer.kind, answer.sentence) == (
        "conflict",
        "queue pair 163 of train-0 has a lease already; create another",
    )


@pytest.mark.parametrize("limited", [0, 1])
def test_the_limit_refuses_the_whole_batch(limited: int) -> None:
    views = [pod(f"train-{number}", 2 + number, max_leases=63 if number == limited else 500) for number in (0, 1)]
    world = World(*views)
    train_0, train_1 = world.connection(100, pid=1), world.connection(101, pid=2)
    train_1.listen()
    answer = refusal(train_0.answer(train_0.connect("train-1:params", *CONNECTING)))
    assert answer.kind == "limit"
    assert answer.sentence == f"train-{limited} has 63 of its 63 leases left, and 64 are needed"
    assert world.core.snapshot(0) == []
    assert train_0.answer(train_0.connect("train-1:params", *CONNECTING[:63])) is None
    assert len(world.core.snapshot(0)) == 63


def test_a_pod_with_itself_needs_two_ends_of_each() -> None:
    world = World(pod("train-0", 2, max_leases=7))
    train_0 = world.connection(100, pid=1)
    train_0.listen()
    assert (
        "7 of its 7 leases left, and 8 are needed"
        in refusal(train_0.answer(train_0.connect("train-0:params", 17, 18, 19, 20))).sentence
    )
    train_0.connect("train-0:params", 17, 18, 19)
    train_0.accept(27, 28, 29)
    leases = [int(view.lease, 16) for view in world.core.snapshot(0)]
    train_0.release(leases[1])
    assert train_0.lost() == [leases[1]]


def test_a_batch_waits_as_one(world: World, train_0: Process, train_1: Process) -> None:
    asked = train_0.connect("train-1:params", *CONNECTING)
    first = train_1.incoming().lease
    second = wire.Accept(train_1.id(), first + 1, train_1.ends(*ACCEPTING))
    assert refusal(train_1.ask(second)).kind == "unknown_lease"
    world.advance(30.1)
    assert refusal(train_0.answer(asked)).kind == "timed_out"
    assert train_1.lost() == [*range(first, first + 64)]
    assert world.core.counts.refused == {"timed_out": 1}
    assert world.core.snapshot(0) == []


def test_one_of_a_batch_is_closed_alone(world: World, train_0: Process, train_1: Process) -> None:
    leases = batch(train_0, train_1)
    train_0.release(leases[7])
    assert train_1.lost() == [leases[7]]
    states = [entry.state for entry in world.guard.values()]
    assert (states.count(GRANTED), states.count(REVOKED)) == (126, 2)
    assert world.core.counts.revoked == {"released": 1}


def test_many_are_given_back_at_once(world: World, train_0: Process, train_1: Process) -> None:
    leases = batch(train_0, train_1)
    assert isinstance(train_0.release(*leases[:40]), wire.Reply)
    assert [len(m.leases) for m in train_1.revoked()] == [40]
    # What has ended is passed over, and what is not the caller's.
    assert isinstance(train_0.release(leases[0], 12345, leases[63]), wire.Reply)
    assert train_1.lost() == [*leases[:40], leases[63]]
    assert refusal(train_0.release(leases[0])).kind == "unknown_lease"
    other = world.connection(100, pid=5)
    assert refusal(other.release(*leases[41:50])).kind == "unknown_lease"
    assert len(world.core.snapshot(0)) == 23


def test_a_dead_process_ends_all_with_few_messages(world: World, train_0: Process, train_1: Process) -> None:
    leases = batch(train_0, train_1)
    train_0.connect("train-1:params", 300, 301)
    train_1.accept(400, 401)
    before = len(world.log)
    train_0.disconnect()
    assert [len(m.leases) for m in train_1.revoked()] == [64, 2]
    assert {*leases} < {*train_1.lost()}
    assert [len(e.entries) for e in world.log[before:] if isinstance(e, SetGuard)] == [132]
    assert {entry.state for entry in world.guard.values()} == {REVOKED}


def test_a_deleted_pod_ends_all(world: World, train_0: Process, train_1: Process) -> None:
    leases = batch(train_0, train_1)
    world.delete_pod(101)
    assert train_0.lost() == [*leases]
    assert set(world.guard) == {train_0.key(qpn) for qpn in CONNECTING}


def test_the_kernel_is_asked_once_per_device(world: World, train_0: Process, train_1: Process) -> None:
    batch(train_0, train_1)
    train_0.disconnect()
    train_1.disconnect()
    world.advance(0.6)
    assert [len(e.queries) for e in world.asked] == [64, 64]
    assert all(isinstance(e, FindHolders) for e in world.asked)
    assert world.guard == {}


def test_each_is_claimed_on_its_own(world: World, train_0: Process, train_1: Process) -> None:
    leases = batch(train_0, train_1)
    new = restarted(world)
    again_0, again_1 = new.connection(100, pid=1000), new.connection(101, pid=1001)
    items_0 = tuple(wire.ClaimItem(lease, qpn) for lease, qpn in zip(leases, CONNECTING, strict=True))
    items_1 = tuple(wire.ClaimItem(lease, qpn) for lease, qpn in zip(leases, ACCEPTING, strict=True))
    answer = again_0.ask(wire.Claim(again_0.id(), items_0))
    assert isinstance(answer, wire.Reply)
    assert wire.ClaimReply.from_json(answer.values).claimed == tuple(leases)
    again_1.ask(wire.Claim(again_1.id(), items_1[:60]))
    new.advance(31)
    assert again_0.lost() == [*leases[60:]]
    assert [view.state for view in new.core.snapshot(0)] == ["granted"] * 60


def test_one_look_answers_for_what_is_due_soon(world: World, train_0: Process, train_1: Process) -> None:
    for qpn in (50, 51, 52):
        train_0.connect("train-1:params", qpn)
        train_1.accept(qpn + 300)
    leases = sorted(int(view.lease, 16) for view in world.core.snapshot(0))
    for lease in leases:
        train_0.release(lease)
        world.advance(0.2)
    assert [len(e.queries) for e in world.asked] == [3, 3]  # per device, when the first was due
    assert len(world.guard) == 6
    world.holders.clear()
    world.advance(1.1)
    assert [len(e.queries) for e in world.asked] == [3, 3, 3, 3]
    assert world.guard == {}
