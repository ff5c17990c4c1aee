"""Leases of UD queue pairs: one per peer, all of one connection, with entries of their own in the guard."""

from __future__ import annotations

import pytest

from rdmanet import lease as wire
from rdmanet.broker.core import DATAGRAM
from rdmanet.broker.values import DatagramKey
from rdmanet.model import DatagramEntry, GuardState, Transport
from tests.unit.broker_world import LIMITS, Process, World, claim, leased, pod, refusal, restarted

UD, RC = Transport.UD, Transport.RC
REVOKED = GuardState.REVOKED


@pytest.fixture
def world() -> World:
    return World(*(pod(f"train-{number}", number + 2) for number in range(3)))


def member(world: World, number: int, *, pid: int | None = None) -> Process:
    """A process that takes part in the gossip."""
    process = world.connection(100 + number, pid=pid or 1000 + number)
    assert isinstance(process.listen("gossip", UD), wire.Reply)
    return process


@pytest.fixture
def members(world: World) -> list[Process]:
    return [member(world, number) for number in range(3)]


def lease(one: Process, other: Process, qpn: int = 20, peer_qpn: int = 30) -> int:
    assert other.view is not None
    return leased(one, other, qpn, peer_qpn, target=f"{other.view.name.name}:gossip", transport=UD)


def pairs(*ends: tuple[Process, int, Process, int, int]) -> dict[DatagramKey, DatagramEntry]:
    """Both directions of each lease."""
    found: dict[DatagramKey, DatagramEntry] = {}
    for one, qpn, other, peer_qpn, number in ends:
        connecting, listening = one.key(qpn), other.key(peer_qpn)
        found[connecting, listening] = DatagramEntry(number, connects=True)
        found[listening, connecting] = DatagramEntry(number)
    return found


def test_one_queue_pair_is_leased_to_many(world: World, members: list[Process]) -> None:
    one, two, three = members
    first, second = lease(one, two, 20, 30), lease(one, three, 20, 40)
    assert world.guard == dict.fromkeys((one.key(20), two.key(30), three.key(40)), DATAGRAM)
    assert world.datagrams == pairs((one, 20, two, 30, first), (one, 20, three, 40, second))
    assert [view.transport for view in world.core.snapshot(0)] == [UD, UD]
    incoming = two.incoming()
    assert (incoming.ends.transport, incoming.ends.qkey) == (UD, 1020)


def test_answer_waits_for_all_entries(world: World, members: list[Process]) -> None:
    one, two, _ = members
    world.writes_wait = True
    asked = one.connect("train-1:gossip", 20, transport=UD)
    two.accept(30, transport=UD)
    assert one.answer(asked) is None
    world.write(world.waiting.pop())
    assert isinstance(one.answer(asked), wire.Reply)


def test_write_that_fails_grants_nothing(world: World, members: list[Process]) -> None:
    one, two, _ = members
    world.guard_failure = "the map is full"
    asked = one.connect("train-1:gossip", 20, transport=UD)
    two.accept(30, transport=UD)
    assert refusal(one.answer(asked)).kind == "unavailable"
    assert world.datagrams == {}
    world.guard_failure = None
    assert lease(one, two)


@pytest.mark.parametrize(("transport", "service", "use"), [(UD, "params", "connect"), (RC, "gossip", "datagram")])
def test_services_are_of_one_transport(
    world: World, members: list[Process], transport: Transport, service: str, use: str
) -> None:
    members[1].listen("params")
    refused = refusal(members[0].answer(members[0].connect(f"train-1:{service}", transport=transport)))
    assert refused.kind == "transport"
    assert f"rdmanet.verbs.{use}" in refused.sentence
    assert world.core.counts.refused == {"transport": 1}


def test_accepting_with_the_other_transport_is_refused(world: World, members: list[Process]) -> None:
    one, two, _ = members
    asked = one.connect("train-1:gossip", 20, transport=UD)
    assert refusal(two.answer(two.accept(30, transport=RC))).kind == "conflict"
    assert refusal(one.answer(asked)).sentence == "a ud queue pair was asked for and a rc one accepted"


def test_two_queue_pairs_have_one_lease_with_each_other(world: World, members: list[Process]) -> None:
    """Whichever side asks again: the guard's entries are those of the first."""
    one, two, _ = members
    number = lease(one, two, 20, 30)
    for asking, other, qpn, peer_qpn in ((one, two, 20, 30), (two, one, 30, 20)):
        assert other.view is not None
        asked = asking.connect(f"{other.view.name.name}:gossip", qpn, transport=UD)
        other.accept(peer_qpn, transport=UD)
        assert "leased to each other already" in refusal(asking.answer(asked)).sentence
    assert world.datagrams == pairs((one, 20, two, 30, number))
    assert {view.lease for view in world.core.snapshot(0)} == {wire.lease_text(number)}


def test_queue_pair_belongs_to_one_connection(world: World, members: list[Process]) -> None:
    one, two, _ = members
    lease(one, two, 20, 30)
    other = world.connection(100, pid=1000)
    assert refusal(other.answer(other.connect("train-2:gossip", 20, transport=UD))).kind == "conflict"
    members[2].listen("params")
    assert refusal(one.answer(one.connect("train-2:params", 20))).kind == "conflict"  # a connected one with its number
    leased(one, members[2], 21, 41, target="train-2:params")
    assert refusal(one.answer(one.connect("train-1:gossip", 21, transport=UD))).kind == "conflict"


def test_releasing_one_peer_keeps_the_others(world: World, members: list[Process]) -> None:
    one, two, three = members
    first, second = lease(one, two, 20, 30), lease(one, three, 20, 40)
    one.release(first)
    assert two.lost() == [first]
    assert (three.lost(), one.lost()) == ([], [])
    assert world.datagrams == pairs((one, 20, three, 40, second))
    assert world.guard[one.key(20)] == world.guard[three.key(40)] == DATAGRAM
    assert world.guard[two.key(30)].state is REVOKED  # it has no peer left


def test_last_lease_revokes_the_queue_pair_until_it_is_gone(world: World, members: list[Process]) -> None:
    one, two, _ = members
    one.release(lease(one, two, 20, 30))
    assert {entry.state for entry in world.guard.values()} == {REVOKED}
    world.advance(5)
    assert len(world.guard) == 2, "the queue pairs are still there"
    del world.holders["rxe_rn2", 20]
    world.advance(200)
    assert set(world.guard) == {two.key(30)}


def test_leased_again_after_its_last_lease(world: World, members: list[Process]) -> None:
    """A queue pair that went on without a peer for a while is not revoked under its new one."""
    one, two, three = members
    one.release(lease(one, two, 20, 30))
    number = lease(one, three, 20, 40)
    assert world.guard[one.key(20)] == DATAGRAM
    world.holders.clear()
    world.advance(200)
    assert world.datagrams == pairs((one, 20, three, 40, number))
    assert set(world.guard) == {one.key(20), three.key(40)}


def test_pending_lease_does_not_hide_the_last_ones_end(world: World, members: list[Process]) -> None:
    one, two, _ = members
    number = lease(one, two, 20, 30)
    asked = one.connect("train-2:gossip", 20, transport=UD)
    one.release(number)
    assert world.guard[one.key(20)].state is REVOKED
    members[2].accept(40, transport=UD)
    assert isinstance(one.answer(asked), wire.Reply)
    assert world.guard[one.key(20)] == DATAGRAM


def test_what_ends_while_it_is_written_leaves_nothing(world: World, members: list[Process]) -> None:
    one, two, _ = members
    world.writes_wait = True
    one.connect("train-1:gossip", 20, transport=UD)
    two.accept(30, transport=UD)
    two.disconnect()
    world.writes_wait = False
    while world.waiting:
        world.write(world.waiting.pop(0))
    assert world.datagrams == {}
    assert {entry.state for entry in world.guard.values()} <= {REVOKED}


def test_process_that_leaves_takes_all_its_leases(world: World, members: list[Process]) -> None:
    one, two, three = members
    numbers = [lease(one, two, 20, 30), lease(one, three, 20, 40)]
    one.disconnect()
    assert two.lost() + three.lost() == numbers
    assert world.datagrams == {}
    world.advance(200)
    assert one.key(20) not in world.guard


def test_deleted_pod_leaves_no_entry(world: World, members: list[Process]) -> None:
    one, two, three = members
    lease(one, two, 20, 30)
    other = lease(two, three, 30, 40)
    view = world.pods.pop(100)
    world.delete_pod(100, view)
    assert all(address not in view.addresses for address, _ in world.guard)
    assert world.datagrams == pairs((two, 30, three, 40, other))


def test_each_lease_counts(members: list[Process]) -> None:
    small = World(pod("train-0", 2, max_leases=1), pod("train-1", 3))
    one = small.connection(100, pid=1000)
    two = member(small, 1)
    lease(one, two, 20, 30)
    refused = refusal(one.answer(one.connect("train-1:gossip", 20, transport=UD)))
    assert (refused.kind, refused.sentence) == ("limit", "train-0 has all its 1 leases in use; close some")


# After a restart


def test_leases_are_claimed_one_by_one(world: World, members: list[Process]) -> None:
    one, two, three = members
    first, second = lease(one, two, 20, 30), lease(one, three, 20, 40)
    before = dict(world.guard), dict(world.datagrams)
    new = restarted(world)
    assert (new.guard, new.datagrams) == before
    assert new.core.counts.adopted == 2
    again = new.connection(100, pid=1000)
    assert claim(again, first, 20).claimed == (first,)
    assert claim(again, second, 20).claimed == (second,)
    for number, (process, qpn, held) in enumerate(((two, 30, first), (three, 40, second)), 1):
        assert claim(new.connection(100 + number, pid=process.pid), held, qpn).claimed == (held,)
    new.advance(LIMITS.grace_s + 1)
    assert (new.guard, new.datagrams) == before
    assert [view.state for view in new.core.snapshot(0)] == ["granted", "granted"]


def test_claims_of_one_queue_pair_come_from_one_connection(world: World, members: list[Process]) -> None:
    one, two, three = members
    first, second = lease(one, two, 20, 30), lease(one, three, 20, 40)
    new = restarted(world)
    assert claim(new.connection(100, pid=1000), first, 20).claimed == (first,)
    assert claim(new.connection(100, pid=1000), second, 20).lost == (second,)


def test_what_nobody_claims_ends_alone(world: World, members: list[Process]) -> None:
    one, two, three = members
    first, second = lease(one, two, 20, 30), lease(one, three, 20, 40)
    new = restarted(world)
    again, other = new.connection(100, pid=1000), new.connection(101, pid=1001)
    claim(again, first, 20)
    claim(again, second, 20)
    claim(other, first, 30)
    new.advance(LIMITS.grace_s)
    assert again.lost() == [second]
    assert new.datagrams == pairs((one, 20, two, 30, first))
    assert new.guard[one.key(20)] == DATAGRAM
    assert new.guard[three.key(40)].state is REVOKED


def test_new_lease_of_an_unclaimed_queue_pair_ends_its_old_ones(world: World, members: list[Process]) -> None:
    """A new process has a queue pair with a number of before: none of the old one's peers may reach it."""
    one, two, three = members
    lease(one, two, 20, 30)
    lease(one, three, 20, 40)
    new = restarted(world)
    listener = member(new, 1)
    asked = new.connection(100, pid=2000).connect("train-1:gossip", 20, transport=UD)
    assert new.datagrams == {}
    assert asked
    listener.accept(31, transport=UD)
    assert {qpn for (_, qpn), _ in new.datagrams} == {20, 31}


@pytest.mark.parametrize("half", ["a direction", "an end", "a state"])
def test_half_a_lease_is_taken_back(world: World, members: list[Process], half: str) -> None:
    one, two, three = members
    number = lease(one, two, 20, 30)
    other = lease(one, three, 20, 40)
    if half == "a direction":
        del world.datagrams[one.key(20), two.key(30)]
    elif half == "an end":
        del world.guard[two.key(30)]
    else:
        world.guard[two.key(30)] = DATAGRAM._replace(state=REVOKED)
    new = restarted(world)
    assert new.datagrams == pairs((one, 20, three, 40, other))
    assert new.guard[one.key(20)] == DATAGRAM
    assert claim(new.connection(100, pid=1000), number, 20).lost == (number,)
    if half == "a direction":
        assert new.guard[two.key(30)].state is REVOKED
    new.holders.clear()
    new.advance(200)
    assert two.key(30) not in new.guard


def test_entries_of_pods_that_are_gone_are_deleted(world: World, members: list[Process]) -> None:
    one, two, _ = members
    lease(one, two, 20, 30)
    gone = world.pods.pop(101)
    new = restarted(world)
    assert new.datagrams == {}
    assert all(address not in gone.addresses for address, _ in new.guard)
    assert new.guard[one.key(20)].state is REVOKED
