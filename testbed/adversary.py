"""What a pod can try against others, as a program for `testbed.peer`: standard library only, run without site packages.

Requests: ``open`` {path}, ``mknod`` {path, major, minor} → {errno}, 0 where it succeeds; ``devices`` → {devices}:
what a library that lists RDMA devices finds in sysfs, name → [uverbs name, major, minor]; ``dial`` {line} opens a lease
connection under a name, ``say`` {line, message} → {answer} sends a message and waits for what answers it, ``tell`` does
not wait, ``hear`` {line} → {message} is the next that comes in, ``hang_up`` {line}; ``watch_classes`` begins to look at
RoCE packets that come in, ``classes`` {count} → {classes}: traffic class bytes of so many; ``send_class`` {address,
traffic_class, count} sends RoCE packets with that byte; ``flood_begin`` {kind, processes}, ``flood_end`` → {done}: see
`FLOODS`.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

LEASE_SOCKET = "\0rdmanet"
TEXT, CLOSE = 1, 8
TIMEOUT_S = 60.0
SYSFS = "/sys/class/infiniband_verbs"


class Refused(OSError):
    """The agent hung up."""


class Line:
    """A WebSocket to the agent (RFC 6455), so small that nothing is checked but what is asked."""

    def __init__(self, timeout_s: float = TIMEOUT_S):
        self._socket = socket.socket(socket.AF_UNIX)
        self._pending = b""
        try:
            self._socket.connect(LEASE_SOCKET)  # waits where the queue of new connections is full
            self._socket.settimeout(timeout_s)
            key = base64.b64encode(os.urandom(16)).decode()
            self._socket.sendall(
                b"GET /v1/leases HTTP/1.1\r\nHost: rdmanet\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key.encode() + b"\r\n\r\n"
            )
            while b"\r\n\r\n" not in self._pending:
                self._more()
        except OSError:
            self._socket.close()
            raise
        head, _, self._pending = self._pending.partition(b"\r\n\r\n")
        if b" 101 " not in head.splitlines()[0]:
            raise Refused(0, head.decode(errors="replace"))

    def _more(self) -> None:
        data = self._socket.recv(1 << 16)
        if not data:
            raise Refused(0, "the agent has hung up")
        self._pending += data

    def send(self, text: str) -> None:
        """One text message. Its mask is zero, as nothing is between us and the agent."""
        self._socket.sendall(frame(text.encode()))

    def send_raw(self, data: bytes) -> None:
        """Whatever it is."""
        self._socket.sendall(data)

    def receive(self) -> dict[str, Any]:
        """The next message."""
        while True:
            if len(self._pending) >= 2:
                length, begin = self._pending[1] & 127, 2
                if length == 126 and len(self._pending) >= 4:
                    length, begin = struct.unpack_from("!H", self._pending, 2)[0], 4
                if length < 126 or begin == 4:
                    end = begin + length
                    if len(self._pending) >= end:
                        kind, body = self._pending[0] & 15, self._pending[begin:end]
                        self._pending = self._pending[end:]
                        if kind == CLOSE:
                            raise Refused(0, body[2:].decode(errors="replace") or "closed")
                        if kind == TEXT:
                            found: dict[str, Any] = json.loads(body)
                            return found
                        continue
            self._more()

    def ask(self, message: dict[str, Any], or_closed: bool = False) -> dict[str, Any]:
        """Sends a request and returns what answers it; pushed messages in between are passed over. With `or_closed` an
        error that answers no request will do: the agent is about to hang up."""
        with contextlib.suppress(*((BrokenPipeError,) if or_closed else ())):  # what it said before can be read
            self.send(json.dumps(message))
        while True:
            answer = self.receive()
            if answer.get("id") == message["id"] or (or_closed and answer["type"] == "error"):
                return answer

    def close(self) -> None:
        self._socket.close()


def frame(payload: bytes, kind: int = TEXT) -> bytes:
    """A client's frame, whole and masked with zeros."""
    if len(payload) < 126:
        return struct.pack("!BB4x", 0x80 | kind, 0x80 | len(payload)) + payload
    return struct.pack("!BBH4x", 0x80 | kind, 0x80 | 126, len(payload)) + payload


def hello(number: int = 1) -> dict[str, Any]:
    """The first message of the lease protocol."""
    return {"type": "hello", "id": number, "version": VERSION}


#: Of the lease protocol; the caller says it, as this program imports nothing of the project.
VERSION = 0


# Floods: each is a loop that never ends, and counts.


def flood_connections(count: Callable[[], None]) -> None:
    """New lease connections, greeted and closed again."""
    while True:
        with contextlib.suppress(OSError):
            line = Line()
            try:
                line.ask(hello())
            finally:
                line.close()
        count()


def flood_half_open(count: Callable[[], None]) -> None:
    """Connections that begin a request and say no more; as many as the agent keeps, replaced when it closes one."""
    held: list[socket.socket] = []
    while True:
        with contextlib.suppress(OSError):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(TIMEOUT_S)
            sock.connect(LEASE_SOCKET)
            sock.sendall(b"GET /v1/leases HTTP/1.1\r\nHost: ")
            held.append(sock)
        if len(held) > 500:
            held.pop(0).close()
        count()


def flood_requests(count: Callable[[], None]) -> None:
    """Asking for leases that nobody gives, without waiting for the answers."""
    _pour(count, lambda n: frame(json.dumps(_connect(n)).encode()), answers=True)


def flood_unread(count: Callable[[], None]) -> None:
    """The same, and the answers are never read."""
    _pour(count, lambda n: frame(json.dumps(_connect(n)).encode()), answers=False)


def flood_empty(count: Callable[[], None]) -> None:
    """Frames of six bytes with nothing in them."""
    _pour(count, lambda n: frame(b""), answers=True)


def flood_pings(count: Callable[[], None]) -> None:
    """WebSocket pings, each of which wants an answer."""
    _pour(count, lambda n: frame(b"", 9), answers=True)


def flood_huge(count: Callable[[], None]) -> None:
    """Messages of a mebibyte, in frames of 60,000 bytes."""
    part = b"x" * 60_000
    first = struct.pack("!BBH4x", TEXT, 0x80 | 126, len(part)) + part
    more = struct.pack("!BBH4x", 0, 0x80 | 126, len(part)) + part
    while True:
        with contextlib.suppress(OSError):
            line = Line()
            try:
                line.send_raw(first)
                for _ in range(17):
                    line.send_raw(more)
            finally:
                line.close()
        count()


def flood_http(count: Callable[[], None]) -> None:
    """Requests for what is not there, many in one write."""
    while True:
        with contextlib.suppress(OSError), contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.settimeout(TIMEOUT_S)
            sock.connect(LEASE_SOCKET)
            sock.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
            while sock.recv(1 << 16):
                count()


def flood_nothing(count: Callable[[], None]) -> None:
    """No flood: a loop that only uses the processor, to compare with."""
    while True:
        json.dumps(_connect(1))
        count()


def _connect(number: int) -> dict[str, Any]:
    ends = {"gid": "00" * 16, "mtu_bytes": 1024, "qpns": [17], "psns": [1], "transport": "rc", "qkey": None}
    return {"type": "connect", "id": number, "target": "nobody:nothing", "ends": ends}


def _pour(count: Callable[[], None], make: Callable[[int], bytes], *, answers: bool) -> None:
    while True:
        with contextlib.suppress(OSError):
            line = Line()
            try:
                line.ask(hello())
                sock = line._socket
                sock.setblocking(False)
                for number in itertools.count(2):
                    data = b"".join(make(number) for _ in range(100))
                    while data:
                        with contextlib.suppress(BlockingIOError):
                            data = data[sock.send(data) :]
                        if answers:
                            with contextlib.suppress(BlockingIOError):
                                if not sock.recv(1 << 16):
                                    raise Refused(0, "closed")
                        elif data:
                            time.sleep(0.001)
                    count()
            finally:
                line.close()
        count()


FLOODS: dict[str, Callable[[Callable[[], None]], None]] = {
    "nothing": flood_nothing,
    "connections": flood_connections,
    "half_open": flood_half_open,
    "requests": flood_requests,
    "unread": flood_unread,
    "empty": flood_empty,
    "pings": flood_pings,
    "huge": flood_huge,
    "http": flood_http,
}


class Flood:
    """A flood from some processes, each of which says when it is ended how often it came round."""

    def __init__(self, kind: str, processes: int):
        self._children: list[tuple[int, int]] = []
        for _ in range(processes):
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                self._child(FLOODS[kind], writer)
            os.close(writer)
            self._children.append((pid, reader))
        for _, reader in self._children:
            os.read(reader, 1)  # the flood is running

    @staticmethod
    def _child(flood: Callable[[Callable[[], None]], None], writer: int) -> None:
        done = 0

        def end(number: int, frame: object) -> None:
            os.write(writer, struct.pack("=Q", done))
            os._exit(0)

        def count() -> None:
            nonlocal done
            done += 1
            if done == 1:
                os.write(writer, b"r")

        signal.signal(signal.SIGTERM, end)
        flood(count)

    def end(self) -> int:
        """Ends all; how often they came round."""
        done = 0
        for pid, _ in self._children:
            os.kill(pid, signal.SIGTERM)
        for pid, reader in self._children:
            with os.fdopen(reader, "rb") as file:
                done += struct.unpack("=Q", file.read(8))[0]
            os.waitpid(pid, 0)
        return done


# Devices


def open_device(path: str) -> int:
    """0, or the errno that it met."""
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError as error:
        return error.errno or 0
    return 0


def make_node(path: str, major: int, minor: int) -> int:
    """0, or the errno that it met."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))
    except OSError as error:
        return error.errno or 0
    return 0


def devices() -> dict[str, list[Any]]:
    """What ibv_get_device_list() has to go by."""
    found: dict[str, list[Any]] = {}
    for name in os.listdir(SYSFS) if os.path.isdir(SYSFS) else []:  # noqa: PTH112, PTH208
        if not name.startswith("uverbs"):
            continue
        with open(f"{SYSFS}/{name}/ibdev") as ibdev, open(f"{SYSFS}/{name}/dev") as dev:  # noqa: PTH123
            major, minor = dev.read().split(":")
            found[ibdev.read().strip()] = [name, int(major), int(minor)]
    return found


# Traffic classes

ROCE_PORT = 4791
ETH_P_ALL = 3


class Classes:
    """The traffic class bytes of RoCE packets that come in through eth0."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.bind(("eth0", 0))
        self._socket.settimeout(TIMEOUT_S)

    def next(self, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            data, (_, _, kind, *_) = self._socket.recvfrom(2048)
            packet = data[14:]
            if kind == socket.PACKET_OUTGOING:
                continue
            if packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_UDP:
                traffic_class, udp = packet[1], packet[(packet[0] & 15) * 4 :]
            elif packet[0] >> 4 == 6 and packet[6] == socket.IPPROTO_UDP:
                traffic_class, udp = (packet[0] & 15) << 4 | packet[1] >> 4, packet[40:]
            else:
                continue
            if struct.unpack_from("!H", udp, 2)[0] == ROCE_PORT:
                found.append(traffic_class)
        return found


def send_class(address: str, traffic_class: int, count: int) -> None:
    """UDP to RoCE's port, with a base transport header (InfiniBand 9.2) to a queue pair that nobody has."""
    ipv6 = ":" in address
    with socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, traffic_class)
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, traffic_class)
        for _ in range(count):
            sock.sendto(struct.pack("!BBHII", 4, 0, 0xFFFF, 0xABCDE, 1) + b"icrc", (address, ROCE_PORT))


class Adversary:
    """Carries requests out."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}
        self._flood: Flood | None = None
        self._watch: Classes | None = None

    def answer(self, do: str, request: dict[str, Any]) -> dict[str, Any]:
        match do:
            case "open":
                return {"errno": open_device(**request)}
            case "mknod":
                return {"errno": make_node(**request)}
            case "devices":
                return {"devices": devices()}
            case "dial":
                self._lines[request["line"]] = Line()
                return {}
            case "say":
                return {"answer": self._lines[request["line"]].ask(request["message"], request.get("or_closed", False))}
            case "tell":
                self._lines[request["line"]].send(json.dumps(request["message"]))
                return {}
            case "hear":
                return {"message": self._lines[request["line"]].receive()}
            case "watch_classes":
                self._watch = Classes()
                return {}
            case "classes" if self._watch is not None:
                return {"classes": self._watch.next(**request)}
            case "send_class":
                send_class(**request)
                return {}
            case "hang_up":
                self._lines.pop(request["line"]).close()
                return {}
            case "flood_begin":
                self._flood = Flood(**request)
                return {}
            case "flood_end" if self._flood is not None:
                flood, self._flood = self._flood, None
                return {"done": flood.end()}
        raise ValueError(f"nothing to do for {do!r}")


def main() -> None:
    global VERSION
    VERSION = int(sys.argv[1])
    adversary = Adversary()
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            answer = {**adversary.answer(do, request), "ok": True}
        except (OSError, ValueError, LookupError) as error:
            answer = {"ok": False, "sentence": f"{do}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
