"""Servers that say their name, and clients that ask for it, inside a container: what `testbed.peer.Peer` talks to where
services are shown. Standard library only, run without site packages.

Requests: ``serve`` {name, port}: TCP and UDP, both families, every address; ``many`` {kind, address, port, count,
source, pause_s, wait_s} → {names: {name: times}, refused: {error: times}, seen: addresses that servers saw}, each
over a socket of its own, after a pause; ``open`` {id, kind, address, port, family, connected, source} → {peername,
refused}; ``say`` {id} → {name, seen, source, peername, refused}: over the open socket, the server's name, the address
that the server saw, where the answer came from; ``send`` {id}: the same, and nobody waits for an answer; ``close``
{id}; ``pour`` {address, port, size} → {equal, size}: so many random bytes there and back in one TCP stream; ``pulse``
{id, address, port}: a datagram every 2 ms from now on; ``pulsed`` {id} → {answers}: when answers have come since it was
asked last, in seconds of the monotonic clock; ``answer_raw`` {name}: SCTP as well, packet by packet, on every port;
``attempt`` {ends: [{kind, address, port, source}], wanted: [true or false], timeout_s} → {answers}: a flow to each end,
all at once, until the wanted ones have an answer: the server's name, "echo", an error's name, or null; ``attempting`` →
{answers}: the same by now; ``attempted`` → {answers}: and everything is closed. Here kinds are ``sctp`` and ``icmp`` as
well, which the kernel need not know. ``load`` {id, kind, address, port, fresh, pause_s, again}: asks one question after
the other from now on, ``fresh``: each over a socket of its own, and so many that get no answer ``again``; ``loaded``
{id, asked} → {asked, failures}: waits for so many answers, or a failure; ``unload`` {id} → the same, at its end.
Kinds are ``tcp`` and ``udp``; ``family`` 6 with an IPv4 address makes an IPv6 socket and a mapped address; ``source``
is the client's own address. ``refused`` is the error's name, null where there was none.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any

TIMEOUT_S = 30.0
#: One datagram may be lost to a table that is just being changed; a client asks again, as resolvers do.
DATAGRAM_TIMEOUT_S = 5.0
CHUNK_BYTES = 1 << 18
PULSE_S = 0.002
#: What asks for a datagram's own destination, what says it, and what makes it an answer's source (ip.7, ipv6.7).
PACKET_INFORMATION: dict[int, tuple[int, int, int, Callable[[bytes], bytes]]] = {
    4: (socket.IPPROTO_IP, 8, 8, lambda asked: bytes(4) + asked[8:12] + bytes(4)),
    6: (socket.IPPROTO_IPV6, 49, 50, lambda asked: asked[:16] + bytes(4)),
}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


def said(name: str, peer: tuple[Any, ...]) -> bytes:
    """What a server answers."""
    return json.dumps({"name": name, "seen": [peer[0], peer[1]]}).encode() + b"\n"


def serve(name: str, port: int) -> None:
    """Answers every line and every datagram, in threads of their own."""
    for version, family in FAMILIES.items():
        anywhere = "::" if version == 6 else "0.0.0.0"
        listener = socket.create_server((anywhere, port), family=family, backlog=1024)
        datagrams = socket.socket(family, socket.SOCK_DGRAM)
        if version == 6:
            datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        datagrams.bind((anywhere, port))
        threading.Thread(target=accept, args=(name, listener), daemon=True).start()
        threading.Thread(target=answer_datagrams, args=(name, datagrams, version), daemon=True).start()


def accept(name: str, listener: socket.socket) -> None:
    while True:
        connection, peer = listener.accept()
        threading.Thread(target=answer_lines, args=(name, connection, peer), daemon=True).start()


def answer_lines(name: str, connection: socket.socket, peer: tuple[Any, ...]) -> None:
    with connection, connection.makefile("rb") as lines:
        try:
            for line in lines:
                if line.startswith(b"pour"):
                    send_back(connection, lines, int(line.split()[1]))
                else:
                    connection.sendall(said(name, peer))
        except OSError:
            return  # the client has gone


def send_back(connection: socket.socket, stream: IO[bytes], size: int) -> None:
    left = size
    while left:
        piece = stream.read(min(left, CHUNK_BYTES))
        if not piece:
            return
        connection.sendall(piece)
        left -= len(piece)


def answer_datagrams(name: str, sock: socket.socket, version: int) -> None:
    """From the address that was asked: of several the kernel would take another."""
    for _, peer, source in received(sock, version):
        sock.sendmsg([said(name, peer)], [source], 0, peer)


def received(sock: socket.socket, version: int) -> Iterator[tuple[bytes, tuple[Any, ...], tuple[int, int, bytes]]]:
    """Datagrams, whose they are, and what makes their destination an answer's source."""
    level, wanted, kind, form = PACKET_INFORMATION[version]
    sock.setsockopt(level, wanted, 1)
    while True:
        data, control, _, peer = sock.recvmsg(65535, 128)
        asked = next(data for own, type_, data in control if (own, type_) == (level, kind))
        yield data, peer, (level, kind, form(asked))


class Call:
    """An open socket to a service."""

    def __init__(
        self,
        kind: str,
        address: str,
        port: int,
        family: int | None = None,
        connected: bool = True,
        source: str | None = None,
        source_port: int = 0,
        wait_s: float | None = None,
    ):
        version = 6 if ":" in address else 4
        self.end = (f"::ffff:{address}" if family == 6 and version == 4 else address, port)
        self.kind = kind
        self.connected = connected or kind == "tcp"
        type_ = socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
        self.sock = socket.socket(FAMILIES[family or version], type_)
        self.sock.settimeout(wait_s or (TIMEOUT_S if kind == "tcp" else DATAGRAM_TIMEOUT_S))
        self.refused: str | None = None
        try:
            if source is not None or source_port:
                self.sock.bind((source or "", source_port))
            if self.connected:
                self.sock.connect(self.end)
        except OSError as error:
            self.refused = name_of(error)

    def peername(self) -> list[Any] | None:
        """What getpeername says."""
        try:
            return list(self.sock.getpeername()[:2])
        except OSError:
            return None

    def say(self) -> dict[str, Any]:
        """Ask once."""
        answer: dict[str, Any] = {"refused": self.refused}
        if self.refused:
            return answer
        try:
            if self.connected:
                self.sock.sendall(b"who\n")
            else:
                self.sock.sendto(b"who\n", self.end)
            data, source = self.sock.recvfrom(65535)
        except OSError as error:
            return {"refused": name_of(error)}
        if not data:
            return {"refused": "closed"}
        return {**answer, **json.loads(data), "source": list(source[:2]) if source else None}


def name_of(error: OSError) -> str:
    """ECONNREFUSED and the like."""
    if isinstance(error, TimeoutError):
        return "ETIMEDOUT"
    return errno.errorcode.get(error.errno or 0, str(error))


#: Ports of datagram clients: one that was used before would be the same flow, for minutes.
unused_ports = iter(range(10000, 32768))


def many(
    kind: str,
    address: str,
    port: int,
    count: int,
    source: str | None = None,
    pause_s: float = 0.0,
    wait_s: float | None = None,
) -> dict[str, Any]:
    """Who answers, call by call."""
    names: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    seen: set[str] = set()
    for _ in range(count):
        time.sleep(pause_s)
        source_port = next(unused_ports) if kind == "udp" else 0
        call = Call(kind, address, port, source=source, source_port=source_port, wait_s=wait_s)
        answer = call.say()
        call.sock.close()
        if answer["refused"]:
            refused[answer["refused"]] += 1
        else:
            names[answer["name"]] += 1
            seen.add(answer["seen"][0])
    return {"names": dict(names), "refused": dict(refused), "seen": sorted(seen)}


def pour(address: str, port: int, size: int) -> dict[str, Any]:
    """Whether what comes back is what was sent."""
    sent = os.urandom(size)
    call = Call("tcp", address, port)
    if call.refused:
        raise ValueError(call.refused)
    with call.sock as sock:
        sock.sendall(b"pour %d\n" % size)
        sender = threading.Thread(target=sock.sendall, args=(sent,), daemon=True)
        sender.start()
        back = bytearray()
        while len(back) < size:
            piece = sock.recv(CHUNK_BYTES)
            if not piece:
                break
            back += piece
        sender.join()
    return {"equal": bytes(back) == sent, "size": len(back)}


class Pulse:
    """Datagrams, one after the other, and when each answer came."""

    def __init__(self, address: str, port: int):
        self.call = Call("udp", address, port)
        self.call.sock.setblocking(False)
        self.answers: list[float] = []
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while True:
            # Refused, or told so by ICMP: nothing comes back then.
            with contextlib.suppress(OSError):
                self.call.sock.send(b"who")
            time.sleep(PULSE_S)
            with contextlib.suppress(OSError):
                while self.call.sock.recv(65535):
                    self.answers.append(time.monotonic())

    def take(self) -> list[float]:
        """What has come, once."""
        taken, self.answers = self.answers, []
        return taken


SCTP = 132
#: Where SCTP has its verification tag (RFC 9260 3.1).
QUESTION, ANSWER = 1, 2
#: Protocol, and the types of question and answer (RFC 792, RFC 4443).
ECHO = {4: (1, 8, 0), 6: (58, 128, 129)}


def answer_raw(name: str) -> None:
    """Answers SCTP's questions whatever the port, in threads of their own: no kernel module is needed for that."""
    for version, family in FAMILIES.items():
        raw = socket.socket(family, socket.SOCK_RAW, SCTP)
        threading.Thread(target=answer_packets, args=(name, raw, version), daemon=True).start()


def answer_packets(name: str, raw: socket.socket, version: int) -> None:
    for data, peer, from_asked in received(raw, version):
        packet = payload(data, version)
        if len(packet) < 12:
            continue
        source, destination, tag, _ = struct.unpack_from("!HHII", packet)
        if tag == QUESTION:
            with contextlib.suppress(OSError):  # what may not be answered is not
                answer = struct.pack("!HHII", destination, source, ANSWER, 0) + name.encode()
                raw.sendmsg([answer], [from_asked], 0, (peer[0], 0))


def payload(data: bytes, version: int) -> bytes:
    """What is in a packet as a raw socket gives it: with IPv4's header, without IPv6's."""
    return data[(data[0] & 15) * 4 :] if version == 4 else data


def checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Attempt:
    """A flow that is begun, and what comes back."""

    def __init__(self, kind: str, address: str, port: int, source: str | None = None):
        self.kind = kind
        self.version = 6 if ":" in address else 4
        self.answer: str | None = None
        self.own = next(unused_ports) if kind != "tcp" else 0
        type_ = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}.get(kind, socket.SOCK_RAW)
        protocol = {"sctp": SCTP, "icmp": ECHO[self.version][0]}.get(kind, 0)
        self.sock = socket.socket(FAMILIES[self.version], type_, protocol)
        self.sock.setblocking(False)
        self.asked = kind != "tcp"
        try:
            if source is not None or kind == "udp":
                self.sock.bind((source or "", self.own if kind == "udp" else 0))
            with contextlib.suppress(BlockingIOError):
                self.sock.connect((address, port if kind in ("tcp", "udp") else 0))
            if self.asked:
                self.sock.send(self.question(port))
        except OSError as error:
            self.answer = name_of(error)

    def question(self, port: int) -> bytes:
        if self.kind == "sctp":
            return struct.pack("!HHII", self.own, port, QUESTION, 0)
        if self.kind == "icmp":
            # IPv6's sum is the kernel's work (RFC 3542 3.1).
            unsummed = struct.pack("!BBHHH", ECHO[self.version][1], 0, 0, self.own, 1)
            return unsummed[:2] + struct.pack("!H", checksum(unsummed)) + unsummed[4:]
        return b"who\n"

    def events(self) -> int:
        """What to wait for; 0: nothing any more."""
        if self.answer is not None:
            return 0
        return selectors.EVENT_READ if self.asked else selectors.EVENT_WRITE

    def go_on(self) -> None:
        """The socket is ready."""
        try:
            if not self.asked:
                self.sock.send(self.question(0))
                self.asked = True
                return
            self.answer = self.read(self.sock.recv(65535))
        except BlockingIOError:
            return
        except OSError as error:
            self.answer = name_of(error)

    def read(self, data: bytes) -> str | None:
        """Who answered; None for what is no answer to this question."""
        if self.kind in ("tcp", "udp"):
            return str(json.loads(data)["name"]) if data else "closed"
        packet = payload(data, self.version)
        if self.kind == "sctp":
            _, own, tag, _ = struct.unpack_from("!HHII", packet)
            return packet[12:].decode() if (own, tag) == (self.own, ANSWER) else None
        mine = packet[0] == ECHO[self.version][2] and struct.unpack_from("!H", packet, 4)[0] == self.own
        return "echo" if mine else None


class Attempts:
    """Many at once."""

    def __init__(self) -> None:
        self.begun: list[Attempt] = []

    def begin(self, ends: list[dict[str, Any]], wanted: list[bool], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        self.begun = [Attempt(**end) for end in ends]
        deadline = time.monotonic() + timeout_s
        while any(want and one.events() for one, want in zip(self.begun, wanted, strict=True)):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self.turn(left)
        return self.answers()

    def turn(self, timeout_s: float) -> bool:
        """Waits until something comes; whether something has."""
        with selectors.DefaultSelector() as selector:
            for one in self.begun:
                if one.events():
                    selector.register(one.sock, one.events(), one)
            ready = selector.select(timeout_s) if selector.get_map() else []
        for key, _ in ready:
            key.data.go_on()
        return bool(ready)

    def answers(self) -> dict[str, Any]:
        return {"answers": [one.answer for one in self.begun]}

    def go_on(self) -> dict[str, Any]:
        while self.turn(0.0):
            pass
        return self.answers()

    def end(self) -> dict[str, Any]:
        self.go_on()
        for one in self.begun:
            one.sock.close()
        return self.answers()


class Load:
    """Question and answer, again and again; what fails is kept, and the next one is asked."""

    def __init__(self, kind: str, address: str, port: int, fresh: bool, pause_s: float, again: int = 0):
        self.pause_s, self.again = pause_s, again
        self.end = (kind, address, port)
        self.fresh = fresh
        self.asked = 0
        self.failures: list[str] = []
        self.ending = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        call: Call | None = None
        while not self.ending:
            if call is None or self.fresh:
                call = Call(*self.end)
            refused = call.say()["refused"]
            if refused == "ETIMEDOUT" and self.again:
                self.again -= 1
                refused = call.say()["refused"]
            if self.fresh:
                call.sock.close()
            with self.changed:
                self.asked += 1
                if refused:
                    self.failures.append(f"question {self.asked}: {refused}")
                self.changed.notify_all()
            time.sleep(self.pause_s)

    def told(self, asked: int = 0) -> dict[str, Any]:
        """When it has asked so often, or something has failed."""
        with self.changed:
            self.changed.wait_for(lambda: self.asked >= asked or self.failures, 2 * TIMEOUT_S)
            return {"asked": self.asked, "failures": self.failures[:5]}

    def end_it(self) -> dict[str, Any]:
        """After the last answer."""
        self.ending = True
        self.thread.join(2 * TIMEOUT_S)
        return self.told()


def main() -> None:
    attempts = Attempts()
    loads: dict[str, Load] = {}
    pulses: dict[str, Pulse] = {}
    calls: dict[str, Call] = {}
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        answer: dict[str, Any] = {}
        try:
            if do == "serve":
                serve(**request)
            elif do == "many":
                answer = many(**request)
            elif do == "answer_raw":
                answer_raw(**request)
            elif do == "attempt":
                answer = attempts.begin(**request)
            elif do == "attempting":
                answer = attempts.go_on()
            elif do == "attempted":
                answer = attempts.end()
            elif do == "pulse":
                pulses[request["id"]] = Pulse(request["address"], request["port"])
            elif do == "pulsed":
                answer = {"answers": pulses[request["id"]].take()}
            elif do == "load":
                number = request.pop("id")
                loads[number] = Load(**request)
            elif do == "loaded":
                answer = loads[request["id"]].told(request["asked"])
            elif do == "unload":
                answer = loads.pop(request["id"]).end_it()
            elif do == "pour":
                answer = pour(**request)
            elif do == "open":
                number = request.pop("id")
                call = calls[number] = Call(**request)
                answer = {"peername": call.peername(), "refused": call.refused}
            elif do == "say":
                call = calls[request["id"]]
                answer = {**call.say(), "peername": call.peername()}
            elif do == "send":
                calls[request["id"]].sock.send(b"who\n")
            elif do == "close":
                calls.pop(request["id"]).sock.close()
            else:
                raise ValueError(f"nothing to do for {do!r}")
            answer["ok"] = True
        except (OSError, ValueError, TypeError, KeyError) as error:
            answer = {"ok": False, "sentence": f"{do}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
