"""Whatever happens in whatever order, the broker's promises hold."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rdmanet import lease as wire
from rdmanet.broker.values import DatagramKey, Limits
from rdmanet.model import GuardState, Transport
from tests.unit.broker_world import Process, World, claim, pod, restarted

COOKIES = st.sampled_from([100, 101, 102])
QPNS = st.integers(17, 21)
#: Of connected queue pairs two, of datagrams one.
SERVICES = st.sampled_from(["a", "b", "gossip", "gossip"])
LIMITS = Limits(connections_per_pod=6, listeners_per_pod=3, pending_per_pod=3)


def transport_of(service: str) -> Transport:
    return Transport.UD if service == "gossip" else Transport.RC


class Broker(RuleBasedStateMachine):
    """Three pods whose processes come, go, lease and misbehave; guard writes may be late; the agent may be replaced."""

    def __init__(self) -> None:
        super().__init__()
        views = (pod("train-0", 2, max_leases=4), pod("train-1", 3, max_leases=4), pod("train-2", 4, max_leases=4))
        self.world = World(*views, limits=LIMITS)
        self.processes: list[Process] = []
        self.next_pid = 1000

    def pick(self, data: st.DataObject) -> Process:
        return data.draw(st.sampled_from(self.processes))

    @rule(cookie=COOKIES)
    def start(self, cookie: int) -> None:
        if cookie in self.world.pods and len(self.processes) < 12:
            self.next_pid += 1
            process = self.world.connection(cookie, pid=self.next_pid)
            if process.number not in self.world.closed:
                self.processes.append(process)

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), service=SERVICES)
    def listen(self, data: st.DataObject, service: str) -> None:
        self.pick(data).listen(service, transport_of(service))

    @precondition(lambda self: self.processes)
    @rule(
        data=st.data(),
        service=SERVICES,
        listener=st.integers(0, 2),
        qpn=QPNS,
        more=st.integers(0, 2),
        other=st.integers(0, 9),
    )
    def connect(self, data: st.DataObject, service: str, listener: int, qpn: int, more: int, other: int) -> None:
        transport = transport_of(service)
        if not other:
            transport = Transport.RC if transport is Transport.UD else Transport.UD
        qpns = range(qpn, qpn + more + 1 if transport is Transport.RC else qpn + 1)
        self.pick(data).connect(f"train-{listener}:{service}", *qpns, transport=transport)

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), qpn=QPNS)
    def accept(self, data: st.DataObject, qpn: int) -> None:
        process = self.pick(data)
        for message in [m for m in process.messages if isinstance(m, wire.Incoming)]:
            count = len(message.ends.qpns) if data.draw(st.integers(0, 9)) else 1
            ends = process.ends(*range(qpn, qpn + count), transport=message.ends.transport)
            process.tell(wire.Accept(process.id(), message.lease, ends))

    @precondition(lambda self: self.processes)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        process = self.pick(data)
        leases = [int(view.lease, 16) for view in self.world.core.snapshot(0)]
        if leases:
            process.tell(wire.Release(process.id(), tuple(data.draw(st.lists(st.sampled_from(leases), min_size=1)))))

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), died=st.booleans())
    def leave(self, data: st.DataObject, died: bool) -> None:
        process = self.pick(data)
        self.processes.remove(process)
        process.disconnect(died=died)

    @rule(late=st.booleans())
    def guard_writes(self, late: bool) -> None:
        self.world.writes_wait = late
        if not late:
            while self.world.waiting:
                self.world.write(self.world.waiting.pop(0))

    @rule(seconds=st.floats(0.1, 100))
    def wait(self, seconds: float) -> None:
        self.world.advance(seconds)

    @precondition(lambda self: len(self.world.pods) > 2)
    @rule(cookie=COOKIES)
    def delete_pod(self, cookie: int) -> None:
        view = self.world.pods.pop(cookie, None)
        if view is None:
            return
        self.guard_writes(late=False)
        self.world.delete_pod(cookie, view)
        self.processes = [p for p in self.processes if p.number not in self.world.closed]
        assert all(address not in view.addresses for address, _ in self.world.guard)

    @rule(data=st.data())
    def replace_agent(self, data: st.DataObject) -> None:
        self.guard_writes(late=False)
        held = [(v, s.number) for v in self.world.core.snapshot(0) for s in self.processes]
        self.world = restarted(self.world)
        old, self.processes = self.processes, []
        for process in old:
            assert process.view is not None
            cookie = next(c for c, view in self.world.pods.items() if view.name == process.view.name)
            again = self.world.connection(cookie, pid=process.pid)
            if again.number in self.world.closed:
                continue
            self.processes.append(again)
            for view, number in held:
                for end in (view.connector, view.listener):
                    if number == process.number and end.key is not None and data.draw(st.booleans()):
                        claim(again, int(view.lease, 16), end.key[1])

    @invariant()
    def granted_entries_are_exactly_the_granted_leases(self) -> None:
        if self.world.waiting:
            return
        views = [v for v in self.world.core.snapshot(0) if v.state != "pending"]
        expected = {}
        datagrams: dict[DatagramKey, int] = {}
        for view in views:
            assert view.connector.key is not None
            assert view.listener.key is not None
            if view.transport is Transport.UD:
                pair = (view.connector.key, view.listener.key)
                assert pair not in datagrams, "two leases of the same two queue pairs"
                datagrams |= {pair: int(view.lease, 16), pair[::-1]: int(view.lease, 16)}
                continue
            expected[view.connector.key] = (int(view.lease, 16), *view.listener.key)
            expected[view.listener.key] = (int(view.lease, 16), *view.connector.key)
        found = {
            key: (entry.lease, entry.peer_address, entry.peer_qpn)
            for key, entry in self.world.guard.items()
            if entry.state is GuardState.GRANTED
        }
        assert found == expected
        assert {key: entry.lease for key, entry in self.world.datagrams.items()} == datagrams
        own = {key for key, entry in self.world.guard.items() if entry.state is GuardState.DATAGRAM}
        assert own == {key for pair in datagrams for key in pair}

    @invariant()
    def batches_are_granted_whole(self) -> None:
        pending = [int(v.lease, 16) for v in self.world.core.snapshot(0) if v.state == "pending"]
        asked = {m.lease: len(m.ends.qpns) for p in self.processes for m in p.messages if isinstance(m, wire.Incoming)}
        for first, count in asked.items():
            if first in pending:
                assert {*range(first, first + count)} <= {*pending}

    @invariant()
    def no_pod_has_more_leases_than_it_may(self) -> None:
        for view in self.world.pods.values():
            name = str(view.name)
            ends = [e for v in self.world.core.snapshot(0) for e in (v.connector, v.listener) if e.pod == name]
            assert len(ends) <= view.max_leases

    def teardown(self) -> None:
        """When every process and every pod is gone, nothing is left, in the core or in the guard."""
        self.guard_writes(late=False)
        for process in self.processes:
            process.disconnect()
        self.world.holders.clear()
        self.world.advance(1000)
        for cookie in list(self.world.pods):
            self.world.delete_pod(cookie)
        assert self.world.core.snapshot(0) == []
        assert self.world.core.next_deadline_s() is None
        assert (self.world.guard, self.world.datagrams) == ({}, {})


TestBroker = Broker.TestCase
TestBroker.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
