"""A world of pods, connections and queue pairs in memory, to drive the broker's core without I/O."""

from __future__ import annotations

import itertools

from rdmanet import lease as wire
from rdmanet.broker.core import BrokerCore
from rdmanet.broker.judging import Permits
from rdmanet.broker.values import (
    Close,
    DatagramKey,
    DeleteGuard,
    Effect,
    FindHolders,
    Granted,
    Greeted,
    Key,
    Limits,
    PodView,
    Send,
    SetGuard,
)
from rdmanet.model import Backend, DatagramEntry, Device, GuardEntry, PodName, RdmaMode, Transport, address_key

LIMITS = Limits(connections_per_pod=4, listeners_per_pod=2, pending_per_pod=2)


def device(number: int) -> Device:
    return Device(f"rxe_rn{number}", Backend.RXE, RdmaMode.SHARED, number, f"uverbs{number}", 231, 192 + number)


def pod(name: str, number: int, *, rdma: bool = True, ipv6_only: bool = False, max_leases: int = 8) -> PodView:
    ipv4 = () if ipv6_only else (address_key(f"10.0.0.{number}"),)
    addresses = (*ipv4, address_key(f"fd00::{number}"))
    return PodView(PodName("default", name), addresses, device(number) if rdma else None, max_leases)


class World:
    """Does the core's effects: sends into lists, guard entries into a dict, answers about queue pairs from a dict."""

    def __init__(
        self,
        *pods: PodView,
        limits: Limits = LIMITS,
        guard: dict[Key, GuardEntry] | None = None,
        datagrams: dict[DatagramKey, DatagramEntry] | None = None,
    ):
        self.pods = dict(enumerate(pods, start=100))  # by cookie
        self.guard = guard if guard is not None else {}
        self.datagrams = datagrams if datagrams is not None else {}
        self.holders: dict[tuple[str, int], int] = {}
        self.holder_known = True
        self.guard_failure: str | None = None
        self.writes_wait = False
        self.waiting: list[SetGuard | DeleteGuard] = []
        self.inbox: dict[int, list[wire.Answer]] = {}
        self.closed: dict[int, str] = {}
        self.granted: list[float] = []
        self.greeted: list[tuple[int, int]] = []
        self.asked: list[FindHolders] = []
        self.log: list[Effect] = []
        self.now_s = 0.0
        self.denied: str | None = None
        self.permits: Permits = lambda connector, listener: self.denied
        self.core = BrokerCore(self, limits=limits, permits=lambda *ends: self.permits(*ends))
        self._connections = itertools.count(1)
        self._ids = itertools.count(1)

    def by_cookie(self, cookie: int) -> PodView | None:
        return self.pods.get(cookie)

    def by_name(self, name: PodName) -> PodView | None:
        return next((view for view in self.pods.values() if view.name == name), None)

    def by_address(self, address: bytes) -> PodView | None:
        return next((view for view in self.pods.values() if address in view.addresses), None)

    def do(self, effects: list[Effect]) -> None:
        for effect in effects:
            self.log.append(effect)
            match effect:
                case Send(connection, message):
                    wire.parse_answer(wire.dump(message))
                    self.inbox.setdefault(connection, []).append(message)
                case SetGuard() | DeleteGuard():
                    if self.writes_wait:
                        self.waiting.append(effect)
                    else:
                        self.write(effect)
                case FindHolders(found, queries):
                    self.asked.append(effect)
                    if self.holder_known:
                        holders = {query: self.holders.get((found.name, qpn)) for query, qpn in queries}
                        self.do(self.core.holders_found(holders, self.now_s))
                    else:
                        self.do(self.core.holders_unknown([query for query, _ in queries], self.now_s))
                case Close(connection, sentence):
                    self.closed[connection] = sentence
                    self.do(self.core.disconnected(connection, self.now_s))
                case Granted(seconds):
                    self.granted.append(seconds)
                case Greeted(cookie, pid):
                    self.greeted.append((cookie, pid))

    def write(self, effect: SetGuard | DeleteGuard) -> None:
        if isinstance(effect, DeleteGuard):
            for key in effect.keys:
                self.guard.pop(key, None)
            for pair in effect.datagrams:
                self.datagrams.pop(pair, None)
            return
        if self.guard_failure is None:
            self.guard.update(effect.entries)
            self.datagrams.update(effect.datagrams)
        self.do(self.core.guard_written(effect.lease, self.guard_failure, self.now_s))

    def advance(self, seconds: float) -> None:
        """Let time pass, ticking whenever the core has asked for it."""
        end_s = self.now_s + seconds
        while (due_s := self.core.next_deadline_s()) is not None and due_s <= end_s:
            self.now_s = max(self.now_s, due_s)
            self.do(self.core.tick(self.now_s))
        self.now_s = end_s

    def delete_pod(self, cookie: int, view: PodView | None = None) -> None:
        """What the agent reports when it deletes a pod; the directory is the test's business."""
        view = view or self.pods[cookie]
        self.do(self.core.pod_gone(view.name, view.addresses, cookie, self.now_s))

    def connection(self, cookie: int, pid: int = 1, *, hello: bool = True) -> Process:
        number = next(self._connections)
        self.do(self.core.connected(number, cookie, pid, self.now_s))
        process = Process(self, number, self.pods.get(cookie), pid)
        if hello and number not in self.closed:
            process.ask(wire.Hello(process.id()))
        return process

    def id(self) -> int:
        return next(self._ids)


class Process:
    """A pod's process with one connection; answers to its requests come back from ``ask``."""

    def __init__(self, world: World, number: int, view: PodView | None, pid: int):
        self.world, self.number, self.view, self.pid = world, number, view, pid

    def id(self) -> int:
        return self.world.id()

    def tell(self, request: wire.Request) -> int:
        self.world.do(self.world.core.receive(self.number, wire.dump(request), self.world.now_s))
        return request.id

    def ask(self, request: wire.Request) -> wire.Reply | wire.Refusal:
        answer = self.answer(self.tell(request))
        assert answer is not None, f"no answer to {request}"
        return answer

    def answer(self, number: int) -> wire.Reply | wire.Refusal | None:
        for message in self.messages:
            if isinstance(message, wire.Reply | wire.Refusal) and message.id == number:
                return message
        return None

    @property
    def messages(self) -> list[wire.Answer]:
        return self.world.inbox.setdefault(self.number, [])

    def incoming(self) -> wire.Incoming:
        return [m for m in self.messages if isinstance(m, wire.Incoming)][-1]

    def revoked(self) -> list[wire.Revoked]:
        return [m for m in self.messages if isinstance(m, wire.Revoked)]

    def ends(self, *qpns: int, address: int = 0, transport: Transport = Transport.RC) -> wire.Ends:
        assert self.view is not None
        if self.view.device is not None:
            self.world.holders |= {(self.view.device.name, qpn): self.pid for qpn in qpns}
        qkey = 1000 + qpns[0] if transport is Transport.UD else None
        return wire.Ends(self.view.addresses[address], 1024, qpns, (7,) * len(qpns), transport, qkey)

    def key(self, qpn: int) -> Key:
        assert self.view is not None
        return self.view.addresses[0], qpn

    def listen(self, service: str = "params", transport: Transport = Transport.RC) -> wire.Reply | wire.Refusal:
        return self.ask(wire.Listen(self.id(), service, transport))

    def connect(
        self, target: str = "train-1:params", qpn: int = 17, *more: int, transport: Transport = Transport.RC
    ) -> int:
        ends = self.ends(qpn, *more, transport=transport)
        return self.tell(wire.Connect(self.id(), wire.Target.parse(target), ends))

    def accept(self, qpn: int = 18, *more: int, transport: Transport = Transport.RC) -> int:
        return self.tell(wire.Accept(self.id(), self.incoming().lease, self.ends(qpn, *more, transport=transport)))

    def release(self, *leases: int) -> wire.Reply | wire.Refusal:
        return self.ask(wire.Release(self.id(), leases))

    def lost(self) -> list[int]:
        """Leases that were revoked."""
        return [lease for message in self.revoked() for lease in message.leases]

    def disconnect(self, *, died: bool = True) -> None:
        if died:
            self.world.holders = {key: pid for key, pid in self.world.holders.items() if pid != self.pid}
        self.world.do(self.world.core.disconnected(self.number, self.world.now_s))


def refusal(answer: wire.Reply | wire.Refusal | None) -> wire.Refusal:
    assert isinstance(answer, wire.Refusal), answer
    return answer


def leased(
    train_0: Process,
    train_1: Process,
    qpn: int = 17,
    peer_qpn: int = 18,
    *,
    target: str = "train-1:params",
    transport: Transport = Transport.RC,
) -> int:
    """A granted lease between queue pairs 17 and 18; its id."""
    asked = train_0.connect(target, qpn, transport=transport)
    train_1.accept(peer_qpn, transport=transport)
    answer = train_0.answer(asked)
    assert isinstance(answer, wire.Reply), answer
    return wire.ConnectReply.from_json(answer.values).lease


def restarted(world: World) -> World:
    """A new agent with the same pods, queue pairs and guard map."""
    new = World(limits=LIMITS, guard=world.guard, datagrams=world.datagrams)
    new.pods, new.holders = world.pods, world.holders
    new.do(new.core.adopt(dict(world.guard), dict(world.datagrams), new.now_s))
    return new


def claim(process: Process, lease: int, qpn: int) -> wire.ClaimReply:
    answer = process.ask(wire.Claim(process.id(), (wire.ClaimItem(lease, qpn),)))
    assert isinstance(answer, wire.Reply), answer
    return wire.ClaimReply.from_json(answer.values)
