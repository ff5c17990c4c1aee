"""UDP and raw frames inside a container, for `testbed.peer.Peer`: standard library only, run without site packages.

Requests: ``serve`` {address} → {port}: answers every datagram with the address it came from; ``ask`` {address, port,
wait_s, size} → {seen}, null when nothing answers; ``frames`` {ifname, frames: hex texts, times}: sends Ethernet frames
as they are, all of them so often. TCP is testbed/traffic.py's.
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


def main() -> None:
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
            else:
                raise ValueError(f"nothing to do for {do!r}")
            answer["ok"] = True
        except (OSError, ValueError, TypeError) as error:
            answer = {"ok": False, "sentence": f"{do}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
