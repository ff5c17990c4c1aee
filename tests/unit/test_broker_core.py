"""The broker grants and refuses leases."""

from __future__ import annotations

import pytest

from rdmanet import lease as wire
from rdmanet.broker.core import BrokerCore
from rdmanet.model import GuardEntry, GuardState, PodName, address_key
from tests.unit.broker_world import LIMITS, Process, World, leased, pod, refusal

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


# Granting


def test_hello_says_who_the_caller_is(world: World) -> None:
    process = world.connection(100, hello=False)
    answer = process.ask(wire.Hello(1))
    assert isinstance(answer, wire.Reply)
    hello = wire.HelloReply.from_json(answer.values)
    assert hello.pod == PodName("default", "train-0")
    assert hello.device == "rxe_rn2"
    assert [str(a) for a in hello.addresses] == ["10.0.0.2", "fd00::2"]
    assert hello.max_leases == 8


def test_a_lease_is_granted_when_its_guard_is_written(world: World, train_0: Process, train_1: Process) -> None:
    world.writes_wait = True
    asked = train_0.connect()
    incoming = train_1.incoming()
    assert (incoming.peer, incoming.service, incoming.ends) == (
        PodName("default", "train-0"),
        "params",
        train_0.ends(17),
    )
    world.now_s = 2.0
    accepted = train_1.accept()
    assert train_0.answer(asked) is None
    assert train_1.answer(accepted) is None
    world.write(world.waiting.pop())
    assert world.guard == {
        train_0.key(17): GuardEntry(incoming.lease, *train_1.key(18), GRANTED, connects=True),
        train_1.key(18): GuardEntry(incoming.lease, *train_0.key(17), GRANTED),
    }
    answer = train_0.answer(asked)
    assert isinstance(answer, wire.Reply)
    granted = wire.ConnectReply.from_json(answer.values)
    assert granted == wire.ConnectReply(incoming.lease, train_1.ends(18), PodName("default", "train-1"))
    assert isinstance(train_1.answer(accepted), wire.Reply)
    assert world.granted == [2.0]
    assert world.core.counts.granted == 1
    assert [view.state for view in world.core.snapshot(world.now_s)] == ["granted"]


def test_ids_are_random_and_never_zero(world: World) -> None:
    numbers = iter([0, 5, 5, 6])
    core = BrokerCore(world, random_id=lambda: next(numbers))
    world.core = core
    listener = world.connection(101, pid=3)
    listener.listen()
    for qpn in (17, 18):
        world.connection(100, pid=qpn).connect(qpn=qpn)
    assert [m.lease for m in listener.messages if isinstance(m, wire.Incoming)] == [5, 6]


def test_ipv6_ends_make_ipv6_entries(world: World, train_0: Process, train_1: Process) -> None:
    train_0.tell(wire.Connect(9000, wire.Target.parse("train-1:params"), train_0.ends(17, address=1)))
    train_1.tell(wire.Accept(9001, train_1.incoming().lease, train_1.ends(18, address=1)))
    assert isinstance(train_0.answer(9000), wire.Reply)
    assert set(world.guard) == {(address_key("fd00::2"), 17), (address_key("fd00::3"), 18)}


def test_a_process_can_lease_to_itself(world: World, train_1: Process) -> None:
    asked = train_1.connect(qpn=17)
    train_1.accept(18)
    assert isinstance(train_1.answer(asked), wire.Reply)
    lease = train_1.incoming().lease
    train_1.release(lease)
    assert train_1.lost() == [lease]
    assert world.core.snapshot(0) == []


# Refusing


def test_nothing_before_hello(world: World) -> None:
    process = world.connection(100, hello=False)
    assert refusal(process.listen()).kind == "order"


def test_hello_once_and_in_our_version(world: World, train_0: Process) -> None:
    assert refusal(train_0.ask(wire.Hello(train_0.id()))).kind == "order"
    other = world.connection(100, hello=False)
    answer = refusal(other.ask(wire.Hello(other.id(), 1)))
    assert answer.kind == "version"
    assert "install the same rdmanet" in answer.sentence


def test_malformed_messages_are_answered_with_their_id(world: World, train_0: Process) -> None:
    world.do(world.core.receive(train_0.number, '{"type":"listen","id":77,"service":"?"}', 0))
    assert refusal(train_0.answer(77)).kind == "malformed"
    world.do(world.core.receive(train_0.number, "{", 0))
    last = train_0.messages[-1]
    assert isinstance(last, wire.Refusal)
    assert last.id is None


@pytest.mark.parametrize(
    ("cookie", "target", "kind", "part"),
    [
        (102, "train-1:params", "no_device", 'web-0 has no RDMA device; ask for one with "rdma": true'),
        (100, "web-0:params", "peer_no_device", 'web-0 has no RDMA device; ask for one with "rdma": true'),
        (100, "nobody:params", "no_such_pod", "there is no pod nobody on this host"),
        (100, "other/train-1:params", "no_such_pod", "there is no pod other/train-1 on this host"),
        (100, "train-1:other", "not_listening", "no process of train-1 listens on other"),
    ],
)
def test_refusals_say_why(world: World, train_1: Process, cookie: int, target: str, kind: str, part: str) -> None:
    process = world.connection(cookie, pid=55)
    answer = refusal(process.answer(process.connect(target)))
    assert answer.kind == kind
    assert part in answer.sentence
    assert world.core.counts.refused == {kind: 1}
    assert world.guard == {}


def test_a_pod_without_a_device_does_not_listen(world: World) -> None:
    assert refusal(world.connection(102).listen()).kind == "no_device"


def test_the_gid_must_be_the_pods_own(world: World, train_0: Process, train_1: Process) -> None:
    ends = wire.Ends(address_key("10.0.0.3"), 1024, (17,), (0,))
    answer = refusal(train_0.ask(wire.Connect(train_0.id(), wire.Target.parse("train-1:params"), ends)))
    assert answer.kind == "foreign_gid"
    assert answer.sentence == "GID 10.0.0.3 is not an address of train-0, which has 10.0.0.2 and fd00::2"
    asked = train_0.connect()
    stolen = wire.Accept(train_1.id(), train_1.incoming().lease, train_0.ends(18))
    assert refusal(train_1.ask(stolen)).kind == "conflict"
    assert refusal(train_0.answer(asked)).kind == "rejected"
    assert world.guard == {}


def test_both_ends_have_one_address_family(world: World, train_0: Process, train_1: Process) -> None:
    six = world.connection(103, pid=60)
    six.listen()
    answer = refusal(train_0.answer(train_0.connect("six-0:params")))
    assert answer.kind == "address_family"
    assert "six-0 has no IPv4 address" in answer.sentence
    train_0.connect()
    mixed = wire.Accept(train_1.id(), train_1.incoming().lease, train_1.ends(18, address=1))
    assert "different families" in refusal(train_1.ask(mixed)).sentence


def test_a_queue_pair_has_one_lease(world: World, train_0: Process, train_1: Process) -> None:
    leased(train_0, train_1)
    assert refusal(train_0.answer(train_0.connect(qpn=17))).kind == "conflict"
    asked = train_0.connect(qpn=19)
    assert refusal(train_1.answer(train_1.accept(18))).kind == "conflict"
    assert refusal(train_0.answer(asked)).kind == "rejected"
    assert len(world.guard) == 2


def test_policy_is_asked_before_a_lease(world: World, train_0: Process, train_1: Process) -> None:
    world.denied = "policy trains does not let train-0 reach train-1"
    answer = refusal(train_0.answer(train_0.connect()))
    assert (answer.kind, answer.sentence) == ("policy", world.denied)


def test_a_listener_rejects_with_its_own_words(world: World, train_0: Process, train_1: Process) -> None:
    asked = train_0.connect()
    train_1.ask(wire.Reject(train_1.id(), train_1.incoming().lease, "too busy"))
    answer = refusal(train_0.answer(asked))
    assert (answer.kind, answer.sentence) == ("rejected", "train-1:params refused: too busy")
    assert world.core.snapshot(0) == []


def test_a_listener_has_its_time_to_answer(world: World, train_0: Process, train_1: Process) -> None:
    asked = train_0.connect()
    world.advance(LIMITS.pending_s - 0.1)
    assert train_0.answer(asked) is None
    world.advance(0.2)
    answer = refusal(train_0.answer(asked))
    assert (answer.kind, answer.sentence) == ("timed_out", "train-1:params did not answer within 30 s")
    assert len(train_1.revoked()) == 1
    assert refusal(train_1.answer(train_1.accept())).kind == "unknown_lease"
    assert world.guard == {}


def test_only_the_listener_that_was_asked_can_accept(world: World, train_0: Process, train_1: Process) -> None:
    asked = train_0.connect()
    lease = train_1.incoming().lease
    other = world.connection(101, pid=2000)
    assert refusal(other.ask(wire.Accept(other.id(), lease, other.ends(30)))).kind == "unknown_lease"
    assert refusal(train_0.ask(wire.Accept(train_0.id(), lease, train_0.ends(31)))).kind == "unknown_lease"
    assert train_0.answer(asked) is None


# Limits


def test_one_process_listens_on_a_service_until_it_stops(world: World, train_1: Process) -> None:
    other = world.connection(101, pid=2000)
    assert refusal(other.listen()).kind == "conflict"
    train_1.ask(wire.Unlisten(train_1.id(), "params"))
    assert isinstance(other.listen(), wire.Reply)


def test_another_process_cannot_stop_a_listener(world: World, train_0: Process, train_1: Process) -> None:
    other = world.connection(101, pid=2000)
    other.ask(wire.Unlisten(other.id(), "params"))
    train_0.connect()
    assert train_1.incoming().peer.name == "train-0"


def test_services_are_limited_per_pod(world: World, train_1: Process) -> None:
    assert isinstance(train_1.listen("two"), wire.Reply)
    assert refusal(world.connection(101).listen("three")).kind == "limit"
    assert isinstance(world.connection(100).listen("three"), wire.Reply)


def test_connections_are_limited_per_pod(world: World) -> None:
    first = [world.connection(100) for _ in range(4)]
    extra = world.connection(100, hello=False)
    last = extra.messages[-1]
    assert isinstance(last, wire.Refusal)
    assert (last.id, last.kind) == (None, "limit")
    assert "train-0 has 4 connections" in world.closed[extra.number]
    first[0].disconnect()
    assert world.connection(100).number not in world.closed


def test_a_namespace_without_a_pod_is_hung_up_on(world: World) -> None:
    stranger = world.connection(999, hello=False)
    assert "not a pod" in world.closed[stranger.number]


def test_waiting_connects_are_limited_per_pod(world: World, train_0: Process, train_1: Process) -> None:
    train_0.connect(qpn=17)
    second = train_0.connect(qpn=18)
    assert refusal(train_0.answer(train_0.connect(qpn=19))).kind == "limit"
    train_1.accept(30)
    assert isinstance(train_0.answer(second), wire.Reply)
    assert train_0.answer(train_0.connect(qpn=19)) is None


def test_leases_are_limited_per_pod_on_both_sides() -> None:
    world = World(pod("train-0", 2, max_leases=1), pod("train-1", 3, max_leases=2))
    train_0, train_1 = world.connection(100, pid=1000), world.connection(101, pid=1001)
    train_1.listen()
    lease = leased(train_0, train_1)
    answer = refusal(train_0.answer(train_0.connect(qpn=20)))
    assert (answer.kind, answer.sentence) == ("limit", "train-0 has all its 1 leases in use; close some")
    train_0.listen("back")
    assert "train-0 has all its 1" in refusal(train_1.answer(train_1.connect("train-0:back", 21))).sentence
    train_0.release(lease)
    assert train_0.answer(train_0.connect(qpn=20)) is None
