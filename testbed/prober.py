"""UDP and raw frames inside a container, for `testbed.peer.Peer`: standard library only, run without site packages.

Requests: ``serve`` {address} → {port}: answers every datagram with the address it came from; ``ask`` {address, port,
wait_s, size} → {seen}, null when nothing answers; ``frames`` {ifname, frames: hex texts, times}: sends Ethernet frames
as they are, all of them so often; ``sink`` {address} → {port}: counts what comes and answers nothing; ``sunk`` {port,
datagrams, within_s} → {datagrams}: how many, when it is so many or the time is over; ``pour`` {address, port, size,
count}: sends datagrams. TCP is testbed/traffic.py's.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from typing import Any

ETH_P_ALL = 0x0003


def serve(address: str) -> int:
    """Answers datagrams on a free port of `address` from a thread of its own; returns the port."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, 0))

    def answer() -> None:
        while True:
            data, peer = sock.recvfrom(65535)
            sock.sendto(json.dumps({"from": peer[0], "bytes": len(data)}).encode(), peer)

    threading.Thread(target=answer, daemon=True).start()
    port: int = sock.getsockname()[1]
    return port


def ask(address: str, port: int, wait_s: float, size: int) -> dict[str, Any] | None:
    """The answer to one datagram of `size` bytes, or None."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(wait_s)
        sock.connect((address, port))
        sock.send(b"x" * size)
        try:
            found: dict[str, Any] = json.loads(sock.recv(65535))
        except TimeoutError:
            return None
    return found


def send_frames(ifname: str, frames: list[str], times: int = 1) -> None:
    """Sends whole Ethernet frames through an interface."""
    whole = [bytes.fromhex(text) for text in frames]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sock:
        sock.bind((ifname, 0))
        for _ in range(times):
            for frame in whole:
                sock.send(frame)


class Sink:
    """Datagrams to one port, counted. net.core.rmem_max has room for some 150 of 1000 bytes."""

    def __init__(self, address: str):
        self._socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        self._socket.bind((address, 0))
        self.port: int = self._socket.getsockname()[1]
        self._changed = threading.Condition()
        self._datagrams = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._socket.recv(65535)
            with self._changed:
                self._datagrams += 1
                self._changed.notify_all()

    def reached(self, datagrams: int, within_s: float) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._datagrams >= datagrams, within_s)
            return self._datagrams


def pour(address: str, port: int, size: int, count: int) -> None:
    """Sends datagrams of `size` bytes, one after another."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(count):
            sock.sendto(bytes(size), (address, port))


def main() -> None:
    sinks: dict[int, Sink] = {}
    # One CPU: its backlog is a queue, so a later datagram's answer says that the frames before it have been judged.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        answer: dict[str, Any] = {}
        try:
            if do == "serve":
                answer = {"port": serve(**request)}
            elif do == "ask":
                answer = {"seen": ask(request["address"], request["port"], request["wait_s"], request["size"])}
            elif do == "frames":
                send_frames(**request)
            elif do == "sink":
                sink = Sink(**request)
                sinks[sink.port] = sink
                answer = {"port": sink.port}
            elif do == "sunk":
                answer = {"datagrams": sinks[request.pop("port")].reached(**request)}
            elif do == "pour":
                pour(**request)
            else:
                raise ValueError(f"nothing to do for {do!r}")
            answer["ok"] = True
        except (OSError, ValueError, TypeError) as error:
            answer = {"ok": False, "sentence": f"{do}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
