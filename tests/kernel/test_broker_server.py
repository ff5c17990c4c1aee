"""The broker's server on real abstract sockets in real network namespaces, with a guard in memory.

No RDMA is needed: the pods' processes here speak the protocol without having queue pairs.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from rdmanet import lease as wire
from rdmanet.broker.server import BrokerServer
from rdmanet.broker.values import DatagramKey, Key, PodView
from rdmanet.errors import BpfError, ConflictError, NetlinkError
from rdmanet.model import DatagramEntry, Device, GuardEntry, GuardState, PodName, Transport, address_key
from rdmanet.netlink import namespace
from tests.unit.broker_world import device

NAME = wire.SOCKET_NAME.removeprefix("\0")


@dataclass
class Netns:
    """A network namespace and its cookie."""

    path: Path
    descriptor: int
    cookie: int

    def listener(self) -> socket.socket:
        return namespace.run_inside(self.descriptor, lambda: namespace.abstract_listener(NAME))

    def connected(self) -> socket.socket:
        """A socket that a process of this namespace has connected to the agent."""

        def connect() -> socket.socket:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(wire.SOCKET_NAME)
            except OSError:
                sock.close()
                raise
            return sock

        return namespace.run_inside(self.descriptor, connect)


@pytest.fixture
def namespaces() -> Iterator[list[Netns]]:
    """Two, for as long as the test."""
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    made = []
    for number in range(2):
        path = Path(f"/run/netns/broker-{os.getpid()}-{number}")
        subprocess.run(["ip", "netns", "add", path.name], check=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with namespace.run_inside(descriptor, lambda: namespace.abstract_listener("cookie")) as sock:
            made.append(Netns(path, descriptor, namespace.cookie(sock)))
    yield made
    for netns in made:
        os.close(netns.descriptor)
        subprocess.run(["ip", "netns", "delete", netns.path.name], check=True)


class MemoryGuard:
    """The guard map's interface over a dict; writes can be held up and can fail."""

    def __init__(self) -> None:
        self.entries: dict[Key, GuardEntry] = {}
        self.pairs: dict[DatagramKey, DatagramEntry] = {}
        self.may_write = threading.Event()
        self.may_write.set()
        self.failure: str | None = None
        self.threads: set[str] = set()
        self.calls = 0

    def set_guards(self, entries: Sequence[tuple[Key, GuardEntry]]) -> None:
        self.calls += 1
        for key, entry in entries:
            self.set_guard(*key, entry)

    def set_guard(self, address: bytes, qpn: int, entry: GuardEntry) -> None:
        self.threads.add(threading.current_thread().name)
        assert self.may_write.wait(30)
        if self.failure is not None:
            raise BpfError(self.failure)
        self.entries[address, qpn] = entry

    def delete_guards(self, keys: Sequence[Key]) -> None:
        self.entries = {key: entry for key, entry in self.entries.items() if key not in keys}

    def guards(self) -> Mapping[Key, GuardEntry]:
        return dict(self.entries)

    def set_datagrams(self, entries: Sequence[tuple[DatagramKey, DatagramEntry]]) -> None:
        if self.failure is not None:
            raise BpfError(self.failure)
        self.pairs.update(entries)

    def delete_datagrams(self, keys: Sequence[DatagramKey]) -> None:
        self.pairs = {key: entry for key, entry in self.pairs.items() if key not in keys}

    def datagrams(self) -> Mapping[DatagramKey, DatagramEntry]:
        return dict(self.pairs)


class Pods:
    """Directory and QueuePairs: one pod per namespace, every queue pair held by this process."""

    def __init__(self, namespaces: list[Netns]):
        self.views = {
            netns.cookie: PodView(
                PodName("default", f"train-{number}"), (address_key(f"10.0.0.{number}"),), device(number), 8
            )
            for number, netns in enumerate(namespaces)
        }
        self.pid: int | None = os.getpid()
        self.broken = 0
        self.looks = 0

    def by_cookie(self, cookie: int) -> PodView | None:
        return self.views.get(cookie)

    def by_name(self, name: PodName) -> PodView | None:
        return next((view for view in self.views.values() if view.name == name), None)

    def by_address(self, address: bytes) -> PodView | None:
        return next((view for view in self.views.values() if address in view.addresses), None)

    async def holders(self, device: Device) -> Mapping[int, int]:
        self.looks += 1
        if self.broken:
            self.broken -= 1
            raise NetlinkError("no answer")
        return {} if self.pid is None else dict.fromkeys(range(1 << 10), self.pid)


class Broker:
    """A server with what it needs, restartable."""

    def __init__(self, namespaces: list[Netns]):
        self.namespaces = namespaces
        self.guard = MemoryGuard()
        self.pods = Pods(namespaces)
        self.seconds: list[float] = []
        self.contacts: list[tuple[int, int]] = []
        self.processes: list[Process] = []
        self.server = self._new()

    def _new(self) -> BrokerServer:
        return BrokerServer(
            self.pods,
            self.guard,
            self.pods,
            observe_granted=self.seconds.append,
            on_first_contact=lambda cookie, pid: self.contacts.append((cookie, pid)),
        )

    async def start(self, *, adopt: bool = True) -> None:
        await self.server.start()
        for netns in self.namespaces:
            await self.server.add_listener(netns.listener(), netns.cookie)
        if adopt:
            await self.server.adopt()

    async def restart(self) -> None:
        await self.server.stop()
        self.server = self._new()
        await self.start()


@pytest.fixture
async def broker(namespaces: list[Netns]) -> AsyncIterator[Broker]:
    made = Broker(namespaces)
    await made.start()
    yield made
    for process in made.processes:
        await process.leave()
    await made.server.stop()


class Connected(aiohttp.UnixConnector):
    """A connector for a socket that a thread inside the namespace has connected."""

    def __init__(self, sock: socket.socket):
        super().__init__(path="connected")
        self._sock = sock

    async def _create_connection(self, *arguments: Any, **options: Any) -> Any:
        _, protocol = await asyncio.get_running_loop().create_connection(self._factory, sock=self._sock)
        return protocol


class Process:
    """A pod's process: a WebSocket whose messages are waited for."""

    def __init__(self, number: int, session: aiohttp.ClientSession, ws: aiohttp.ClientWebSocketResponse):
        self.number = number
        self._session = session
        self.ws = ws

    @classmethod
    async def connect(cls, broker: Broker, number: int, *, hello: bool = True) -> Process:
        netns = broker.namespaces[number]
        sock = await asyncio.to_thread(netns.connected)
        sock.setblocking(False)
        session = aiohttp.ClientSession(connector=Connected(sock))
        ws = await session.ws_connect(f"http://rdmanet{wire.HTTP_PATH}", compress=0)
        process = cls(number, session, ws)
        broker.processes.append(process)
        if hello:
            assert isinstance(await process.ask(wire.Hello(1)), wire.Reply)
        return process

    async def receive(self) -> wire.Answer:
        message = await self.ws.receive(timeout=30)
        assert message.type is aiohttp.WSMsgType.TEXT, message
        return wire.parse_answer(message.data)

    async def tell(self, request: wire.Request) -> None:
        await self.ws.send_str(wire.dump(request))

    async def ask(self, request: wire.Request) -> wire.Answer:
        await self.tell(request)
        return await self.receive()

    def ends(self, *qpns: int) -> wire.Ends:
        return wire.Ends(address_key(f"10.0.0.{self.number}"), 1024, qpns, (0,) * len(qpns))

    async def closed(self) -> tuple[int | None, str | None]:
        """Wait for the end of the connection: code and reason."""
        message = await self.ws.receive(timeout=30)
        assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED), message
        # Not ws.close_code, which becomes 1006 when our own answer comes too late for the other side.
        return message.data, message.extra

    async def leave(self) -> None:
        await self._session.close()


async def test_device_that_goes_is_told_after_the_guard_is_written(broker: Broker) -> None:
    train_0, train_1 = [await Process.connect(broker, number) for number in (0, 1)]
    cookies = [netns.cookie for netns in broker.namespaces[:2]]
    assert broker.contacts == [(cookie, os.getpid()) for cookie in cookies]
    number = await leased(train_0, train_1)
    gone = "the device of train-1 has gone"
    broker.server.device_gone(cookies[1], gone)
    assert await train_0.receive() == wire.Revoked((number,), gone)
    assert {entry.state for entry in broker.guard.entries.values()} == {GuardState.REVOKED}
    assert [await train_1.receive() for _ in range(2)] == [wire.DeviceState(gone), wire.Revoked((number,), gone)]
    broker.server.device_back(cookies[1])
    assert await train_1.receive() == wire.DeviceState(None)


async def test_datagrams_have_entries_of_their_own(broker: Broker) -> None:
    train_0, train_1 = [await Process.connect(broker, number) for number in (0, 1)]
    await train_1.ask(wire.Listen(2, "gossip", Transport.UD))
    ends = [replace(p.ends(qpn), transport=Transport.UD, qkey=7) for p, qpn in ((train_0, 17), (train_1, 18))]
    await train_0.tell(wire.Connect(3, wire.Target.parse("train-1:gossip"), ends[0]))
    incoming = await train_1.receive()
    assert isinstance(incoming, wire.Incoming)
    assert incoming.ends == ends[0]
    await train_1.ask(wire.Accept(4, incoming.lease, ends[1]))
    assert isinstance(await train_0.receive(), wire.Reply)
    one, two = ends[0].keys[0], ends[1].keys[0]
    assert broker.guard.pairs == {
        (one, two): DatagramEntry(incoming.lease, connects=True),
        (two, one): DatagramEntry(incoming.lease),
    }
    assert {entry.state for entry in broker.guard.entries.values()} == {GuardState.DATAGRAM}
    broker.guard.pairs[two, one] = DatagramEntry(incoming.lease, 5, 600)
    (row,) = await broker.server.status()
    assert (row["transport"], row["packets"], row["bytes"]) == ("ud", 5, 600)
    await broker.restart()
    assert broker.server.states() == {"pending": 0, "granted": 0, "unclaimed": 1}
    again = await Process.connect(broker, 0)
    claimed = await again.ask(wire.Claim(2, (wire.ClaimItem(incoming.lease, 17),)))
    assert isinstance(claimed, wire.Reply)
    assert wire.ClaimReply.from_json(claimed.values).claimed == (incoming.lease,)
    await again.ask(wire.Release(3, (incoming.lease,)))
    assert broker.guard.pairs == {}
    assert {entry.state for entry in broker.guard.entries.values()} == {GuardState.REVOKED}


async def leased(train_0: Process, train_1: Process) -> int:
    """A lease from 17 of train-0 to 18 of train-1."""
    assert isinstance(await train_1.ask(wire.Listen(2, "params")), wire.Reply)
    await train_0.tell(wire.Connect(3, wire.Target.parse("train-1:params"), train_0.ends(17)))
    incoming = await train_1.receive()
    assert isinstance(incoming, wire.Incoming)
    assert isinstance(await train_1.ask(wire.Accept(4, incoming.lease, train_1.ends(18))), wire.Reply)
    answer = await train_0.receive()
    assert isinstance(answer, wire.Reply)
    return wire.ConnectReply.from_json(answer.values).lease


async def test_the_namespace_says_who_speaks(broker: Broker) -> None:
    for number in (0, 1):
        process = await Process.connect(broker, number, hello=False)
        answer = await process.ask(wire.Hello(1))
        assert isinstance(answer, wire.Reply)
        assert wire.HelloReply.from_json(answer.values).pod.name == f"train-{number}"


async def test_a_lease_from_asking_to_releasing(broker: Broker) -> None:
    train_0, train_1 = await Process.connect(broker, 0), await Process.connect(broker, 1)
    lease = await leased(train_0, train_1)
    assert {entry.state for entry in broker.guard.entries.values()} == {GuardState.GRANTED}
    assert broker.guard.threads == {"guard_0"}
    assert len(broker.seconds) == 1
    (status,) = await broker.server.status()
    assert status["state"] == "granted"
    assert status["connector"] == {
        "pod": "default/train-0",
        "address": "10.0.0.0",
        "qpn": 17,
        "received": {"packets": 0, "bytes": 0},
    }
    assert broker.server.states() == {"pending": 0, "granted": 1, "unclaimed": 0}
    assert isinstance(await train_0.ask(wire.Release(5, (lease,))), wire.Reply)
    revoked = await train_1.receive()
    assert isinstance(revoked, wire.Revoked)
    assert {entry.state for entry in broker.guard.entries.values()} == {GuardState.REVOKED}


async def test_nobody_hears_of_a_lease_before_its_guard_is_written(broker: Broker) -> None:
    train_0, train_1 = await Process.connect(broker, 0), await Process.connect(broker, 1)
    broker.guard.may_write.clear()
    leasing = asyncio.create_task(leased(train_0, train_1))
    # The loop turns meanwhile: a third process gets its connection (and its answers after what is being written).
    await Process.connect(broker, 0, hello=False)
    assert not leasing.done()
    assert broker.guard.entries == {}
    broker.guard.may_write.set()
    await leasing
    assert len(broker.guard.entries) == 2


async def test_a_guard_that_cannot_be_written_refuses(broker: Broker) -> None:
    train_0, train_1 = await Process.connect(broker, 0), await Process.connect(broker, 1)
    broker.guard.failure = "the guard map is full"
    await train_1.ask(wire.Listen(2, "params"))
    await train_0.tell(wire.Connect(3, wire.Target.parse("train-1:params"), train_0.ends(17)))
    incoming = await train_1.receive()
    assert isinstance(incoming, wire.Incoming)
    await train_1.tell(wire.Accept(4, incoming.lease, train_1.ends(18)))
    for process in (train_0, train_1):
        answer = await process.receive()
        assert isinstance(answer, wire.Refusal)
        assert "the guard map is full" in answer.sentence
    assert broker.server.guard_failures >= 2


async def test_a_killed_process_loses_its_lease(broker: Broker) -> None:
    train_1 = await Process.connect(broker, 1)
    await train_1.ask(wire.Listen(2, "params"))
    program = (
        "import asyncio, aiohttp, sys\n"
        "from rdmanet import lease as wire\n"
        "from rdmanet.model import address_key\n"
        "async def main():\n"
        " async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=wire.SOCKET_NAME)) as session:\n"
        "  ws = await session.ws_connect('http://rdmanet' + wire.HTTP_PATH)\n"
        "  await ws.send_str(wire.dump(wire.Hello(1)))\n"
        "  ends = wire.Ends(address_key('10.0.0.0'), 1024, (17,), (0,))\n"
        "  await ws.send_str(wire.dump(wire.Connect(2, wire.Target.parse('train-1:params'), ends)))\n"
        "  async for message in ws:\n"
        "   print(message.data, flush=True)\n"
        "asyncio.run(main())\n"
    )
    inside = ["ip", "netns", "exec", broker.namespaces[0].path.name, sys.executable, "-c", program]
    child = await asyncio.create_subprocess_exec(*inside, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    incoming = await train_1.receive()
    assert isinstance(incoming, wire.Incoming)
    await train_1.ask(wire.Accept(4, incoming.lease, train_1.ends(18)))
    await child.stdout.readline()  # hello
    await child.stdout.readline()  # connect
    child.kill()
    revoked = await train_1.receive()
    assert isinstance(revoked, wire.Revoked)
    assert "train-0 closed its end" in revoked.sentence
    await child.wait()


async def test_leases_survive_a_restart_and_are_claimed(broker: Broker) -> None:
    train_0, train_1 = await Process.connect(broker, 0), await Process.connect(broker, 1)
    lease = await leased(train_0, train_1)
    before = dict(broker.guard.entries)
    await broker.restart()
    assert (await train_0.closed())[0] == aiohttp.WSCloseCode.GOING_AWAY
    assert broker.guard.entries == before
    assert broker.server.states()["unclaimed"] == 1
    broker.pods.broken = 1  # the first look at the queue pairs fails
    for number, qpn in ((0, 17), (1, 18)):
        process = await Process.connect(broker, number)
        request = wire.Claim(2, (wire.ClaimItem(lease, qpn),))
        answer = await process.ask(request)
        if isinstance(answer, wire.Refusal):
            assert answer.kind == "unavailable"
            answer = await process.ask(request)
        assert isinstance(answer, wire.Reply)
        assert wire.ClaimReply.from_json(answer.values).claimed == (lease,)
    assert broker.server.states()["granted"] == 1
    assert broker.guard.entries == before


async def test_nobody_is_served_before_leases_are_adopted(namespaces: list[Netns]) -> None:
    broker = Broker(namespaces)
    await broker.start(adopt=False)
    connecting = asyncio.create_task(Process.connect(broker, 0))
    done, _ = await asyncio.wait({connecting}, timeout=0.3)
    assert not done
    await broker.server.adopt()
    await (await connecting).leave()
    await broker.server.stop()


async def test_pod_gone_returns_when_nothing_is_left(broker: Broker) -> None:
    train_0, train_1 = await Process.connect(broker, 0), await Process.connect(broker, 1)
    await leased(train_0, train_1)
    await broker.server.remove_listener(broker.namespaces[1].cookie)
    view = broker.pods.views.pop(broker.namespaces[1].cookie)
    await broker.server.pod_gone(view.name, view.addresses, broker.namespaces[1].cookie)
    assert [(key[1], entry.state) for key, entry in broker.guard.entries.items()] == [(17, GuardState.REVOKED)]
    for process in (train_1, train_0):
        assert isinstance(await process.receive(), wire.Revoked)
    code, reason = await train_1.closed()
    assert (code, reason) == (aiohttp.WSCloseCode.GOING_AWAY, "train-1 has been deleted")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.to_thread(broker.namespaces[1].connected)


async def test_messages_are_bounded_and_text(broker: Broker) -> None:
    long = await Process.connect(broker, 0)
    await long.ws.send_str('"' + "x" * wire.MAX_MESSAGE_BYTES + '"')
    assert (await long.closed())[0] == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
    binary = await Process.connect(broker, 0)
    await binary.ws.send_bytes(b"{}")
    await binary.closed()
    exact = await Process.connect(broker, 0)
    text = wire.dump(wire.Listen(2, "a"))
    await exact.ws.send_str(text + " " * (wire.MAX_MESSAGE_BYTES - len(text)))
    assert isinstance(await exact.receive(), wire.Reply)


async def test_a_pod_that_opens_too_many_connections_harms_only_itself(broker: Broker) -> None:
    held = []
    for _ in range(64 + 16):
        held.append(await asyncio.to_thread(broker.namespaces[0].connected))
    extra = await asyncio.to_thread(broker.namespaces[0].connected)
    extra.settimeout(30)
    assert await asyncio.to_thread(extra.recv, 1) == b""
    await Process.connect(broker, 1)
    for sock in (*held, extra):
        sock.close()


async def test_a_pod_that_does_not_read_is_dropped(broker: Broker) -> None:
    train_0, train_1 = await Process.connect(broker, 0), await Process.connect(broker, 1)
    sock = await asyncio.to_thread(broker.namespaces[0].connected)
    sock.setblocking(False)
    _, writer = await asyncio.open_connection(sock=sock, limit=1)
    upgrade = (
        f"GET {wire.HTTP_PATH} HTTP/1.1\r\nHost: rdmanet\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    writer.write(upgrade.encode())
    # Requests whose answers nobody reads, masked with zeroes as a client must (RFC 6455 5.3).
    text = b'{"type":"nonsense"}'
    frame = bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text

    async def flood() -> None:
        for _ in range(100_000):
            writer.write(frame * 16)
            await writer.drain()

    with pytest.raises(ConnectionError):
        await flood()
    writer.close()
    await leased(train_0, train_1)  # the others are served


async def test_one_listener_per_namespace(broker: Broker) -> None:
    sock = namespace.run_inside(broker.namespaces[0].descriptor, lambda: namespace.abstract_listener("other"))
    with sock, pytest.raises(ConflictError):
        await broker.server.add_listener(sock, broker.namespaces[0].cookie)
    await broker.server.remove_listener(12345)
