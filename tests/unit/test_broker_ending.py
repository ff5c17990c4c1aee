"""How leases end, and what becomes of them when the agent is replaced."""

from __future__ import annotations

import pytest

from rdmanet import lease as wire
from rdmanet.broker.values import Send, SetGuard
from rdmanet.model import GuardEntry, GuardState
from tests.unit.broker_world import LIMITS, Process, World, claim, leased, pod, refusal, restarted

GRANTED, REVOKED = GuardState.GRANTED, GuardState.REVOKED


@pytest.fixture
def world() -> World:
    return World(pod("train-0", 2), pod("train-1", 3), pod("web-0", 4, rdma=False), pod("six-0", 5, ipv6_only=True))


@pytest.fixture
def train_0(world: World) -> Process:
    return world.connection(100, pid=1000)


@pytest.fixture
def train_1(world: World) -> Process:
    process = world.connection(101, pid=1001)
    assert isinstance(process.listen(), wire.Reply)
    return process


# Ending


def test_release_revokes_and_tells_the_peer(world: World, train_0: Process, train_1: Process) -> None:
    lease = leased(train_0, train_1)
    del world.holders["rxe_rn2", 17]  # the library destroys the queue pair first
    assert isinstance(train_0.ask(wire.Release(train_0.id(), (lease,))), wire.Reply)
    assert [(m.leases, m.sentence) for m in train_1.revoked()] == [((lease,), "train-0 closed its end")]
    assert train_0.revoked() == []
    assert {entry.state for entry in world.guard.values()} == {REVOKED}
    world.advance(1)
    assert set(world.guard) == {train_1.key(18)}  # as long as that queue pair is there
    del world.holders["rxe_rn3", 18]
    world.advance(60)
    assert world.guard == {}
    assert world.core.next_deadline_s() is None
    assert world.core.counts.revoked == {"released": 1}


def test_packets_are_dropped_before_anybody_is_told(world: World, train_0: Process, train_1: Process) -> None:
    lease = leased(train_0, train_1)
    world.log.clear()
    train_0.ask(wire.Release(train_0.id(), (lease,)))
    kinds = [type(effect) for effect in world.log]
    assert kinds[0] is SetGuard
    assert kinds[1:] == [Send, Send]


def test_a_dead_process_loses_its_leases(world: World, train_0: Process, train_1: Process) -> None:
    lease = leased(train_0, train_1)
    train_0.disconnect()
    assert train_1.lost() == [lease]
    assert "train-0 closed its end" in train_1.revoked()[0].sentence
    world.advance(1)
    assert {key: entry.state for key, entry in world.guard.items()} == {train_1.key(18): REVOKED}
    assert world.core.counts.revoked == {"disconnected": 1}


def test_a_dead_connector_is_forgotten_before_it_is_accepted(world: World, train_0: Process, train_1: Process) -> None:
    train_0.connect()
    train_0.disconnect()
    assert len(train_1.revoked()) == 1
    assert refusal(train_1.answer(train_1.accept())).kind == "unknown_lease"
    assert world.core.next_deadline_s() is None


def test_a_dead_listener_refuses_what_waits(world: World, train_0: Process, train_1: Process) -> None:
    asked = train_0.connect()
    train_1.disconnect()
    assert refusal(train_0.answer(asked)).kind == "peer_gone"
    assert refusal(train_0.answer(train_0.connect(qpn=19))).kind == "not_listening"


@pytest.mark.parametrize("who", ["connector", "listener"])
def test_death_while_the_guard_is_written(world: World, train_0: Process, train_1: Process, who: str) -> None:
    world.writes_wait = True
    asked = train_0.connect()
    accepted = train_1.accept()
    (train_0 if who == "connector" else train_1).disconnect()
    world.writes_wait = False
    for effect in list(world.waiting):
        world.write(effect)
    assert {entry.state for entry in world.guard.values()} == {REVOKED}
    left, number = (train_1, accepted) if who == "connector" else (train_0, asked)
    assert refusal(left.answer(number)).kind == "peer_gone"
    assert world.core.counts.granted == 0


def test_a_full_guard_map_refuses_the_lease(world: World, train_0: Process, train_1: Process) -> None:
    world.guard_failure = "the guard map is full"
    asked = train_0.connect()
    accepted = train_1.accept()
    for answer in (train_0.answer(asked), train_1.answer(accepted)):
        assert refusal(answer).kind == "unavailable"
        assert "the guard map is full" in refusal(answer).sentence
    assert world.core.snapshot(0) == []


def test_a_revoked_entry_gives_way_to_a_new_lease(world: World, train_0: Process, train_1: Process) -> None:
    old = leased(train_0, train_1)
    train_0.disconnect()
    again = world.connection(100, pid=1002)
    asked = again.connect(qpn=17)
    train_1.accept(40)
    assert isinstance(again.answer(asked), wire.Reply)
    world.advance(120)
    assert world.guard[again.key(17)].state is GRANTED
    assert world.guard[again.key(17)].lease != old
    assert world.guard[train_1.key(18)].state is REVOKED


def test_a_qpn_of_another_process_does_not_inherit_a_revocation(
    world: World, train_0: Process, train_1: Process
) -> None:
    leased(train_0, train_1)
    train_0.disconnect(died=False)
    world.holders["rxe_rn2", 17] = 4444
    world.advance(1)
    assert train_0.key(17) not in world.guard


def test_an_unreadable_list_of_queue_pairs_deletes_nothing(world: World, train_0: Process, train_1: Process) -> None:
    leased(train_0, train_1)
    world.holder_known = False
    train_0.disconnect()
    world.advance(300)
    assert len(world.guard) == 2
    assert 5 < len(world.asked) < 40  # less and less often
    world.holder_known = True
    world.advance(120)
    assert set(world.guard) == {train_1.key(18)}


def test_nothing_of_a_deleted_pod_stays(world: World, train_0: Process, train_1: Process) -> None:
    lease = leased(train_0, train_1)
    waiting = train_0.connect(qpn=30)
    world.delete_pod(101)
    assert train_0.lost() == [lease]
    assert train_0.revoked()[0].sentence == "train-1 has been deleted"
    assert refusal(train_0.answer(waiting)).kind == "peer_gone"
    assert train_1.number in world.closed
    assert {key: entry.state for key, entry in world.guard.items()} == {train_0.key(17): REVOKED}
    assert refusal(train_0.answer(train_0.connect(qpn=31))).kind == "not_listening"


def test_another_pod_of_the_name_stays(world: World, train_0: Process, train_1: Process) -> None:
    lease = leased(train_0, train_1)
    old = pod("train-1", 9)
    world.delete_pod(199, old)
    assert train_1.number not in world.closed
    assert [int(view.lease, 16) for view in world.core.snapshot(0)] == [lease]
    assert {entry.state for entry in world.guard.values()} == {GRANTED}


def test_an_interface_goes_and_the_pod_stays(world: World, train_0: Process, train_1: Process) -> None:
    leased(train_0, train_1)
    assert train_1.view is not None
    world.do(world.core.pod_gone(train_1.view.name, train_1.view.addresses, None, world.now_s))
    assert train_1.number not in world.closed
    assert len(train_1.revoked()) == len(train_0.revoked()) == 1
    assert set(world.guard) == {train_0.key(17)}


def test_a_deleted_pods_revoked_entries_go_too(world: World, train_0: Process, train_1: Process) -> None:
    leased(train_0, train_1)
    train_0.disconnect(died=False)
    assert len(world.guard) == 2
    world.delete_pod(101)
    world.delete_pod(100)
    assert world.guard == {}
    assert world.core.next_deadline_s() is None


def test_a_connection_of_a_pod_that_is_gone_is_hung_up_on(world: World, train_0: Process) -> None:
    del world.pods[100]
    train_0.tell(wire.Listen(1, "x"))
    assert "not a pod" in world.closed[train_0.number]
    train_0.tell(wire.Listen(2, "x"))
    assert train_0.answer(2) is None


# After the agent was away


def test_leases_are_adopted_and_claimed(world: World, train_0: Process, train_1: Process) -> None:
    lease = leased(train_0, train_1)
    new = restarted(world)
    assert {entry.state for entry in new.guard.values()} == {GRANTED}
    assert [view.state for view in new.core.snapshot(0)] == ["unclaimed"]
    again_0, again_1 = new.connection(100, pid=1000), new.connection(101, pid=1001)
    new.advance(29)
    assert claim(again_0, lease, 17) == wire.ClaimReply((lease,), ())
    assert claim(again_1, lease, 18) == wire.ClaimReply((lease,), ())
    new.advance(100)
    assert {entry.state for entry in new.guard.values()} == {GRANTED}
    assert [view.state for view in new.core.snapshot(0)] == ["granted"]
    assert (new.core.counts.adopted, new.core.counts.claimed) == (1, 2)
    again_0.disconnect()
    assert again_1.lost() == [lease]


@pytest.mark.parametrize(
    ("cookie", "pid", "qpn", "change"),
    [
        (101, 1000, 17, 0),  # the peer's pod claims the other end
        (100, 1999, 17, 0),  # another process of the pod
        (100, 1000, 18, 0),  # the peer's QPN
        (100, 1000, 17, 1),  # another lease
    ],
)
def test_nobody_else_can_claim(
    world: World, train_0: Process, train_1: Process, cookie: int, pid: int, qpn: int, change: int
) -> None:
    lease = leased(train_0, train_1) ^ change
    new = restarted(world)
    assert claim(new.connection(cookie, pid=pid), lease, qpn) == wire.ClaimReply((), (lease,))


def test_a_queue_pair_of_a_thread_that_has_ended_can_be_claimed(
    world: World, train_0: Process, train_1: Process
) -> None:
    lease = leased(train_0, train_1)
    world.holders["rxe_rn2", 17] = 0
    new = restarted(world)
    assert claim(new.connection(100, pid=1000), lease, 17).claimed == (lease,)


def test_a_queue_pair_of_nobody_knows_whom_stays_revoked(world: World, train_0: Process, train_1: Process) -> None:
    leased(train_0, train_1)
    train_0.disconnect(died=False)
    world.holders["rxe_rn2", 17] = 0
    world.advance(100)
    assert world.guard[train_0.key(17)].state is REVOKED
    world.holders["rxe_rn2", 17] = 4444
    world.advance(100)
    assert train_0.key(17) not in world.guard


def test_an_end_is_claimed_once(world: World, train_0: Process, train_1: Process) -> None:
    lease = leased(train_0, train_1)
    new = restarted(world)
    assert claim(new.connection(100, pid=1000), lease, 17).claimed == (lease,)
    assert claim(new.connection(100, pid=1000), lease, 17).lost == (lease,)


def test_a_lease_of_a_living_agent_cannot_be_claimed(world: World, train_0: Process, train_1: Process) -> None:
    lease = leased(train_0, train_1)
    assert claim(world.connection(100, pid=1000), lease, 17).lost == (lease,)
    assert train_1.revoked() == []


def test_what_nobody_claims_is_revoked(world: World, train_0: Process, train_1: Process) -> None:
    lease = leased(train_0, train_1)
    new = restarted(world)
    again = new.connection(100, pid=1000)
    claim(again, lease, 17)
    new.advance(LIMITS.grace_s)
    assert [m.sentence for m in again.revoked()] == ["nobody claimed the other end within 30 s of the agent's start"]
    assert {entry.state for entry in new.guard.values()} == {REVOKED}
    assert new.core.counts.revoked == {"unclaimed": 1}


def test_a_claim_is_asked_again_when_the_kernel_cannot_be_read(
    world: World, train_0: Process, train_1: Process
) -> None:
    lease = leased(train_0, train_1)
    new = restarted(world)
    again = new.connection(100, pid=1000)
    new.holder_known = False
    request = wire.Claim(again.id(), (wire.ClaimItem(lease, 17), wire.ClaimItem(lease ^ 1, 17)))
    assert refusal(again.ask(request)).kind == "unavailable"
    new.holder_known = True
    assert claim(again, lease, 17).claimed == (lease,)


def test_an_unclaimed_queue_pair_can_be_leased_anew(world: World, train_0: Process, train_1: Process) -> None:
    old = leased(train_0, train_1)
    new = restarted(world)
    again_1 = new.connection(101, pid=1001)
    claim(again_1, old, 18)
    again_1.listen()
    other = new.connection(100, pid=1005)
    asked = other.connect(qpn=17)
    assert again_1.lost() == [old]
    again_1.accept(19)
    assert isinstance(other.answer(asked), wire.Reply)
    assert new.guard[other.key(17)].state is GRANTED
    assert new.core.counts.revoked == {"superseded": 1}


def test_half_a_lease_is_revoked(world: World, train_0: Process, train_1: Process) -> None:
    lease = leased(train_0, train_1)
    del world.guard[train_1.key(18)]
    new = restarted(world)
    assert {key: entry.state for key, entry in new.guard.items()} == {train_0.key(17): REVOKED}
    assert new.core.snapshot(0) == []
    assert claim(new.connection(100, pid=1000), lease, 17).lost == (lease,)
    assert new.core.counts.revoked == {"incomplete": 1}


def test_ends_that_disagree_are_revoked(world: World, train_0: Process, train_1: Process) -> None:
    lease = leased(train_0, train_1)
    world.guard[train_1.key(18)] = GuardEntry(lease ^ 1, *train_0.key(17), GRANTED)
    new = restarted(world)
    assert [entry.state for entry in new.guard.values()] == [REVOKED, REVOKED]


def test_an_entry_of_its_own_peer_is_revoked(world: World, train_0: Process) -> None:
    world.guard[train_0.key(17)] = GuardEntry(5, *train_0.key(17), GRANTED)
    new = restarted(world)
    assert [entry.state for entry in new.guard.values()] == [REVOKED]


def test_entries_of_pods_that_are_gone_are_deleted(world: World, train_0: Process, train_1: Process) -> None:
    leased(train_0, train_1)
    del world.pods[101]
    new = restarted(world)
    assert {key: entry.state for key, entry in new.guard.items()} == {train_0.key(17): REVOKED}


def test_revoked_entries_stay_revoked_until_their_queue_pair_goes(
    world: World, train_0: Process, train_1: Process
) -> None:
    leased(train_0, train_1)
    train_0.disconnect(died=False)
    new = restarted(world)
    new.advance(10)
    assert [entry.state for entry in new.guard.values()] == [REVOKED, REVOKED]
    new.holders.clear()
    new.advance(60)
    assert new.guard == {}


def test_counters_of_an_adopted_lease_are_left_alone(world: World, train_0: Process, train_1: Process) -> None:
    leased(train_0, train_1)
    new = restarted(world)
    assert not [effect for effect in new.log if isinstance(effect, SetGuard)]
