"""TCP inside a container: what `testbed.peer.Peer.traffic` talks to. Standard library only, run without site packages.

Requests: ``serve`` {address} → {port}; ``send`` {address, port, bytes, verify} → {elapsed_s, peer, equal};
``stream_begin`` {address, port, pause_s}, ``stream_reach`` {rounds, within_s} → {rounds}, ``stream_end`` → {rounds,
bytes, equal};
``served`` → {connections, bytes}; ``counters`` {ifname} → the interface's own.

Every connection begins with a line of JSON that says what comes, and ends with a line from the receiver: how many bytes
arrived, their SHA-256 where asked for, and the address that the receiver saw as its peer's.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
import time
from typing import Any

BLOCK_BYTES = 1 << 18
ROUND_BYTES = 1 << 16
TIMEOUT_S = 60.0


class Stream:
    """A paced stream that runs until told to end: every round's bytes differ, and the receiver acknowledges each."""

    def __init__(self, address: str, port: int, pause_s: float):
        self._connection = connect(address, port)
        self._pause_s = pause_s
        self._changed = threading.Condition()
        self._ending = threading.Event()
        self._failure: OSError | None = None
        self.rounds = 0
        self._digest = hashlib.sha256()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._connection.sendall(json.dumps({"round_bytes": ROUND_BYTES}).encode() + b"\n")
            noise = os.urandom(ROUND_BYTES - 8)
            while not self._ending.wait(self._pause_s):  # the pace of the load, nothing waits on it
                data = self.rounds.to_bytes(8, "big") + noise
                self._connection.sendall(data)
                self._digest.update(data)
                if receive_exactly(self._connection, 8) != data[:8]:
                    raise OSError("the receiver acknowledged another round")
                with self._changed:
                    self.rounds += 1
                    self._changed.notify_all()
        except OSError as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def reach(self, rounds: int, within_s: float) -> int:
        """Wait until so many rounds are done; returns how many are."""
        with self._changed:
            self._changed.wait_for(lambda: self.rounds >= rounds or self._failure is not None, within_s)
            if self._failure is not None:
                raise OSError(f"the stream broke after {self.rounds} rounds: {self._failure}")
            if self.rounds < rounds:
                raise OSError(f"the stream stands at {self.rounds} of {rounds} rounds for {within_s:g} s")
            return self.rounds

    def end(self) -> dict[str, Any]:
        """Finish; what was sent, and whether the receiver has the same."""
        self._ending.set()
        self._thread.join(TIMEOUT_S)
        if self._failure is not None:
            raise OSError(f"the stream broke after {self.rounds} rounds: {self._failure}")
        self._connection.shutdown(socket.SHUT_WR)
        with self._connection, self._connection.makefile("rb") as lines:
            answer = json.loads(lines.readline())
        sent_bytes = self.rounds * ROUND_BYTES
        equal = answer == {**answer, "bytes": sent_bytes, "sha256": self._digest.hexdigest()}
        return {"rounds": self.rounds, "bytes": sent_bytes, "equal": equal}


class Server:
    """Receives on every address that it was asked to serve."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.connections = 0
        self.bytes = 0

    def serve(self, address: str) -> int:
        """Listen on a free port of `address`; returns it."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family, backlog=16)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        port: int = listener.getsockname()[1]
        return port

    def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, peer = listener.accept()
            threading.Thread(target=self._receive, args=(connection, peer[0]), daemon=True).start()

    def _receive(self, connection: socket.socket, peer: str) -> None:
        connection.settimeout(TIMEOUT_S)
        with connection:
            header = json.loads(receive_line(connection))
            if "round_bytes" in header:
                size, digest = self._rounds(connection, header["round_bytes"])
            else:
                size, digest = self._whole(connection, header["bytes"], header["verify"])
            with self._lock:
                self.connections += 1
                self.bytes += size
            answer = {"bytes": size, "sha256": digest, "peer": peer}
            connection.sendall(json.dumps(answer).encode() + b"\n")

    def _whole(self, connection: socket.socket, size: int, verify: bool) -> tuple[int, str]:
        buffer, received, digest = bytearray(BLOCK_BYTES), 0, hashlib.sha256()
        view = memoryview(buffer)
        while received < size:
            count = connection.recv_into(view)
            if count == 0:
                break
            if verify:
                digest.update(view[:count])
            received += count
        return received, digest.hexdigest()

    def _rounds(self, connection: socket.socket, size: int) -> tuple[int, str]:
        received, digest = 0, hashlib.sha256()
        while data := receive_exactly(connection, size, or_nothing=True):
            digest.update(data)
            received += len(data)
            connection.sendall(data[:8])
        return received, digest.hexdigest()


def connect(address: str, port: int) -> socket.socket:
    """A connection without Nagle's delays."""
    connection = socket.create_connection((address, port), timeout=TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def receive_exactly(connection: socket.socket, size: int, *, or_nothing: bool = False) -> bytes:
    """`size` bytes; nothing at the end of the stream if that is allowed."""
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            if or_nothing and not data:
                return b""
            raise OSError(f"the connection ended after {len(data)} of {size} bytes")
        data += part
    return data


def receive_line(connection: socket.socket) -> bytes:
    """A line, byte by byte: what follows belongs to somebody else."""
    line = b""
    while not line.endswith(b"\n"):
        line += receive_exactly(connection, 1)
    return line


def send(address: str, port: int, size: int, verify: bool) -> dict[str, Any]:
    """Send `size` bytes; the time until the receiver has confirmed all of them, and the address it saw."""
    block, digest, sent = os.urandom(min(BLOCK_BYTES, size)), hashlib.sha256(), 0
    with connect(address, port) as connection, connection.makefile("rb") as lines:
        own = connection.getsockname()[0]
        connection.sendall(json.dumps({"bytes": size, "verify": verify}).encode() + b"\n")
        started = time.monotonic()
        while sent < size:
            data = memoryview(block)[: size - sent]
            connection.sendall(data)
            if verify:
                digest.update(data)
            sent += len(data)
        answer = json.loads(lines.readline())
        elapsed_s = time.monotonic() - started
    equal = answer == {**answer, "bytes": size, "sha256": digest.hexdigest()}
    return {"elapsed_s": elapsed_s, "own": own, "peer": answer["peer"], "equal": equal}


def counters(ifname: str) -> dict[str, int]:
    """Packets of an interface as the kernel counted them (/proc/net/dev, netdevice(7))."""
    with open("/proc/net/dev", encoding="ascii") as file:  # noqa: PTH123
        for line in file:
            name, _, numbers = line.partition(":")
            if name.strip() == ifname:
                fields = [int(n) for n in numbers.split()]
                return {"rx_bytes": fields[0], "rx_packets": fields[1], "tx_bytes": fields[8], "tx_packets": fields[9]}
    raise OSError(f"there is no interface {ifname}")


def main() -> None:
    server, stream = Server(), None
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        answer: dict[str, Any] = {}
        try:
            if do == "serve":
                answer = {"port": server.serve(**request)}
            elif do == "send":
                answer = send(request["address"], request["port"], request["bytes"], request["verify"])
            elif do == "stream_begin":
                stream = Stream(**request)
            elif do == "stream_reach" and stream:
                answer = {"rounds": stream.reach(**request)}
            elif do == "stream_end" and stream:
                answer, stream = stream.end(), None
            elif do == "served":
                answer = {"connections": server.connections, "bytes": server.bytes}
            elif do == "counters":
                answer = counters(**request)
            else:
                raise ValueError(f"nothing to do for {do!r}")
            answer["ok"] = True
        except (OSError, ValueError, TypeError) as error:
            answer = {"ok": False, "sentence": f"{do}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
