"""What the ring needs of a network, and two networks: RDMA over leased queue pairs, and TCP.

Both put data straight into the right neighbour's memory and wait for what the left one puts into ours; neither copies
in this process. Over RDMA the device does the putting while the receiver's processor does something else.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import ipaddress
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rdmanet import verbs
from rdmanet.verbs import LeaseRefusedError, LeaseRevokedError, RemoteRegion, VerbsError

Vector = NDArray[np.float64]

SERVICE = "ring"
PORT = 7471
#: The processes of a job do not start at the same moment.
START_TIMEOUT_S = 120.0
AGAIN_S = 0.05


class Area(enum.IntEnum):
    """The two pieces of memory that neighbours put data into."""

    VECTOR = 0  # what is being reduced
    INBOX = 1  # partial sums, until they are added


class Part(NamedTuple):
    """Elements ``start`` to ``stop`` of an area."""

    area: Area
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Memory:
    """The areas of one process; both stay where they are for as long as a transport uses them."""

    vector: Vector
    inbox: Vector

    def bytes_of(self, part: Part) -> memoryview:
        """A part as bytes, not copied."""
        return (self.vector, self.inbox)[part.area].data.cast("B")[part.start * 8 : part.stop * 8]


class Transport(Protocol):
    """Between this process and its two neighbours in the ring."""

    async def put(self, source: Part, target: Part) -> None:
        """Copy our ``source`` to the right neighbour's ``target``. When it returns, ``source`` may change."""

    async def arrival(self, target: Part) -> None:
        """Wait until the left neighbour's next put, which goes to our ``target``, is there."""


@dataclass(frozen=True, slots=True)
class Place:
    """Who is where: the pods of the ring in its order, and which of them this is.

    ``addresses`` are the pods' in the same order. RDMA finds pods by name and needs none (given, it uses its own to
    choose between IPv4 and IPv6); TCP looks names up where there are none.
    """

    pods: Sequence[str]
    rank: int
    addresses: Sequence[str] = ()

    @property
    def left(self) -> int:
        return (self.rank - 1) % len(self.pods)

    @property
    def right(self) -> int:
        return (self.rank + 1) % len(self.pods)


@contextlib.asynccontextmanager
async def _start(place: Place) -> AsyncIterator[None]:
    """The time that finding both neighbours may take."""
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            yield
    except TimeoutError as error:
        left, right = place.pods[place.left], place.pods[place.right]
        raise TimeoutError(f"{left} and {right} were not both there within {START_TIMEOUT_S:g} s") from error


class LeasedTransport:
    """A queue pair to the right neighbour, and one from the left. Data goes by RDMA WRITE; one message says that it is
    there."""

    def __init__(self, right: verbs.QueuePair, left: verbs.QueuePair, memory: Memory):
        self._right = right
        self._left = left
        # Registered once for both: all queue pairs of a session share a protection domain.
        self._regions = [left.register(area, remote_write=True) for area in (memory.vector, memory.inbox)]
        self._remote: list[RemoteRegion] = []

    async def exchange(self) -> None:
        """Tell the left neighbour where our memory is; learn the same from the right one."""
        for region in self._regions:
            await self._left.send(region.remote.to_bytes())
        self._remote = [RemoteRegion.from_bytes(await self._right.recv()) for _ in self._regions]

    async def put(self, source: Part, target: Part) -> None:
        write = self._right.write(
            self._regions[source.area],
            self._remote[target.area],
            local_offset=source.start * 8,
            remote_offset=target.start * 8,
            length=(source.stop - source.start) * 8,
        )
        # Begun together, carried out in this order: the message arrives behind the data.
        await asyncio.gather(write, self._right.send(b"there"))

    async def arrival(self, target: Part) -> None:
        await self._left.recv()

    async def finish(self) -> None:
        """Leave when the right neighbour has got everything, acknowledgements included."""
        await asyncio.gather(self._farewell(), self._right.recv())

    async def _farewell(self) -> None:
        # A neighbour that hears this may be gone before its device has acknowledged it.
        with contextlib.suppress(LeaseRevokedError, VerbsError):
            await self._left.send(b"done")


@contextlib.asynccontextmanager
async def leased(place: Place, memory: Memory) -> AsyncIterator[Transport]:
    """RDMA, by leases that are taken here and given back at the end."""
    async with verbs.Session() as session:
        async with await session.listen(SERVICE) as listener, _start(place):
            right, left = await asyncio.gather(_lease(session, place), _accept(session, listener, place))
            transport = LeasedTransport(right, left, memory)
            await transport.exchange()
        yield transport
        await transport.finish()


async def _lease(session: verbs.Session, place: Place) -> verbs.QueuePair:
    """A queue pair to the right neighbour, as soon as it listens."""
    own = ipaddress.ip_address(place.addresses[place.rank]) if place.addresses else None
    while True:
        try:
            return await session.connect(f"{place.pods[place.right]}:{SERVICE}", address=own)
        except LeaseRefusedError as error:
            if error.operation not in ("no_such_pod", "not_listening"):
                raise
            await asyncio.sleep(AGAIN_S)


async def _accept(session: verbs.Session, listener: verbs.Listener, place: Place) -> verbs.QueuePair:
    """The queue pair from the left neighbour. Who speaks is known from the broker, not from what it says."""
    assert session.pod is not None
    wanted = dataclasses.replace(session.pod, name=place.pods[place.left])
    while True:
        qp = await listener.accept()
        if qp.peer == wanted:
            return qp
        await qp.close()


class TcpTransport:
    """A connection to the right neighbour, and one from the left. Both know what comes next: data needs no header."""

    def __init__(self, right: socket.socket, left: socket.socket, memory: Memory):
        self._right = right
        self._left = left
        self._memory = memory

    async def put(self, source: Part, target: Part) -> None:
        await asyncio.get_running_loop().sock_sendall(self._right, self._memory.bytes_of(source))

    async def arrival(self, target: Part) -> None:
        missing = self._memory.bytes_of(target)
        while missing:
            received = await asyncio.get_running_loop().sock_recv_into(self._left, missing)
            if received == 0:
                raise ConnectionError("the left neighbour is gone")
            missing = missing[received:]


@contextlib.asynccontextmanager
async def tcp(place: Place, memory: Memory) -> AsyncIterator[Transport]:
    """The same over TCP sockets."""
    addresses = place.addresses or [await _look_up(pod) for pod in place.pods]
    own, from_left = (addresses[rank] for rank in (place.rank, place.left))
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    with contextlib.ExitStack() as stack:
        with socket.create_server((own, PORT), family=family) as server:
            server.setblocking(False)
            async with _start(place):
                sockets = await asyncio.gather(_connect(own, addresses[place.right]), _answer(server, from_left))
        for sock in sockets:
            stack.enter_context(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield TcpTransport(*sockets, memory)


async def _look_up(pod: str) -> str:
    found = await asyncio.get_running_loop().getaddrinfo(pod, PORT, type=socket.SOCK_STREAM)
    return str(found[0][4][0])


async def _connect(own: str, address: str) -> socket.socket:
    """A connection to the right neighbour, as soon as it listens."""
    while True:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        sock.setblocking(False)
        try:
            sock.bind((own, 0))
            await asyncio.get_running_loop().sock_connect(sock, (address, PORT))
            return sock
        except ConnectionRefusedError:
            sock.close()
            await asyncio.sleep(AGAIN_S)
        except BaseException:
            sock.close()
            raise


async def _answer(server: socket.socket, wanted: str) -> socket.socket:
    """The connection from the left neighbour; others are turned away."""
    while True:
        sock, peer = await asyncio.get_running_loop().sock_accept(server)
        if ipaddress.ip_address(peer[0]) == ipaddress.ip_address(wanted):
            return sock
        sock.close()
