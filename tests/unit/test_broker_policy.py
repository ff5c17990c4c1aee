"""Leases under policy: refused, revoked when it changes, in every state and after a restart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from rdmanet import lease as wire
from rdmanet.broker.values import PodView
from rdmanet.model import GuardState, PodName, Transport, address_key
from tests.unit.broker_world import Process, World, claim, leased, pod, refusal, restarted

GRANTED, REVOKED = GuardState.GRANTED, GuardState.REVOKED
SENTENCE = "policy does not let them"


@pytest.fixture
def world() -> World:
    return World(pod("train-0", 1), pod("train-1", 2))


@pytest.fixture
def train_0(world: World) -> Process:
    return world.connection(100, pid=1000)


@pytest.fixture
def train_1(world: World) -> Process:
    process = world.connection(101, pid=1001)
    assert isinstance(process.listen(), wire.Reply)
    return process


def change(world: World, permits: Callable[[PodView, PodView], str | None]) -> None:
    world.permits = permits
    world.do(world.core.policy_changed(world.now_s))


def deny_all(connector: PodView, listener: PodView) -> str | None:
    return SENTENCE


def only(connector: str, listener: str) -> Callable[[PodView, PodView], str | None]:
    """Permits this direction alone."""

    def permits(one: PodView, other: PodView) -> str | None:
        return None if (one.name.name, other.name.name) == (connector, listener) else SENTENCE

    return permits


def test_a_lease_is_judged_from_its_connector_by_the_addresses_in_use(
    world: World, train_0: Process, train_1: Process
) -> None:
    asked: list[tuple[PodName, tuple[bytes, ...], PodName, tuple[bytes, ...]]] = []

    def permits(connector: PodView, listener: PodView) -> str | None:
        asked.append((connector.name, connector.addresses, listener.name, listener.addresses))
        return None

    world.permits = permits
    leased(train_0, train_1)
    one, other = PodName("default", "train-0"), PodName("default", "train-1")
    ipv4 = [(address_key(f"10.0.0.{number}"),) for number in (1, 2)]
    assert asked == [(one, ipv4[0], other, ipv4[1])] * 2  # when it was asked for, and when it was accepted


def test_the_address_that_accepts_is_judged(world: World, train_0: Process, train_1: Process) -> None:
    assert train_1.view is not None
    second = address_key("10.0.0.99")
    world.pods[101] = dataclasses.replace(train_1.view, addresses=(*train_1.view.addresses, second))
    world.permits = lambda connector, listener: None if second in listener.addresses else SENTENCE
    asked = train_0.connect()  # one of the addresses is allowed
    accepted = train_1.accept(18)  # from another one
    assert refusal(train_0.answer(asked)).kind == "policy"
    assert refusal(train_1.answer(accepted)).sentence == SENTENCE
    assert world.guard == {}


def test_a_change_takes_leases_away_and_tells_both_ends(world: World, train_0: Process, train_1: Process) -> None:
    lease = leased(train_0, train_1)
    change(world, only("train-0", "train-1"))
    assert [entry.state for entry in world.guard.values()] == [GRANTED, GRANTED]
    change(world, only("train-1", "train-0"))
    assert [entry.state for entry in world.guard.values()] == [REVOKED, REVOKED]
    for process in (train_0, train_1):
        assert process.lost() == [lease]
        assert process.revoked()[0].sentence == SENTENCE
    assert world.core.counts.revoked == {"policy": 1}
    assert refusal(train_0.answer(train_0.connect(qpn=19))).kind == "policy"


def test_a_change_ends_what_waits_to_be_accepted(world: World, train_0: Process, train_1: Process) -> None:
    asked = train_0.connect("train-1:params", 17, 21)
    change(world, deny_all)
    answer = refusal(train_0.answer(asked))
    assert (answer.kind, answer.sentence) == ("policy", SENTENCE)
    assert len(train_1.lost()) == 2
    assert refusal(train_1.answer(train_1.accept(18, 22))).kind == "unknown_lease"
    assert world.guard == {}


def test_a_change_ends_what_is_being_written(world: World, train_0: Process, train_1: Process) -> None:
    world.writes_wait = True
    asked = train_0.connect()
    accepted = train_1.accept()
    change(world, deny_all)
    for effect in world.waiting:
        world.write(effect)
    assert refusal(train_0.answer(asked)).kind == "policy"
    assert refusal(train_1.answer(accepted)).kind == "policy"
    assert [entry.state for entry in world.guard.values()] == [REVOKED, REVOKED]


def test_datagrams_lose_the_peers_that_they_may_not_have() -> None:
    world = World(*(pod(f"train-{number}", number + 1) for number in range(3)))
    one, *others = (world.connection(100 + number, pid=1000 + number) for number in range(3))
    for other in others:
        other.listen("gossip", Transport.UD)
    leases = [
        leased(one, other, 20, qpn, target=f"train-{number}:gossip", transport=Transport.UD)
        for number, (other, qpn) in enumerate(zip(others, (30, 40), strict=True), start=1)
    ]
    change(world, only("train-0", "train-2"))
    assert one.lost() == others[0].lost() == leases[:1]
    assert {key[0] for key in world.datagrams} == {one.key(20), others[1].key(40)}
    assert world.guard[one.key(20)].state is GuardState.DATAGRAM
    assert world.guard[others[0].key(30)].state is REVOKED


@pytest.mark.parametrize("transport", list(Transport))
@pytest.mark.parametrize("connector", [0, 1])
def test_after_a_restart_the_direction_is_still_known(transport: Transport, connector: int) -> None:
    world = World(pod("train-0", 1), pod("train-1", 2))
    processes = [world.connection(100, pid=1000), world.connection(101, pid=1001)]
    one, other = processes[connector], processes[1 - connector]
    other.listen("params", transport)
    lease = leased(one, other, 17, 18, target=f"train-{1 - connector}:params", transport=transport)
    names = f"train-{connector}", f"train-{1 - connector}"
    kept = restarted(world)
    change(kept, only(*names))
    assert [view.state for view in kept.core.snapshot(0)] == ["unclaimed"]
    new = restarted(world)
    change(new, only(*reversed(names)))
    assert new.core.snapshot(0) == []
    assert {entry.state for entry in new.guard.values()} == {REVOKED}
    assert claim(new.connection(100 + connector, pid=1000 + connector), lease, 17).lost == (lease,)


def test_entries_that_do_not_say_who_connected_may_be_of_either_direction(
    world: World, train_0: Process, train_1: Process
) -> None:
    leased(train_0, train_1)
    for key, entry in world.guard.items():
        world.guard[key] = entry._replace(connects=False)
    new = restarted(world)
    change(new, only("train-1", "train-0"))
    assert len(new.core.snapshot(0)) == 1
    change(new, deny_all)
    assert new.core.snapshot(0) == []
