"""Who is speaking, by what the kernel says: nothing that a pod sends is believed about it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from pathlib import Path

#: include/uapi/asm-generic/socket.h, since Linux 5.14 (e8b9eab99232); the socket module has no name for it.
SO_NETNS_COOKIE = 71


def netns_cookie(sock: socket.socket) -> int:
    """The cookie of the network namespace that a socket belongs to: unique until the next boot."""
    return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0])


def peer_pid(sock: socket.socket) -> int:
    """The pid, as this process sees pids, of whoever connected a unix socket (unix(7), SO_PEERCRED)."""
    return int(struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def processes_of(threads: Mapping[int, int | None]) -> dict[int, int | None]:
    """The process of each thread: the kernel records who made a queue pair by thread
    (drivers/infiniband/core/restrack.c), and who connected a socket by process. 0 when the thread has ended."""
    processes: dict[int, int] = {}
    for thread in {thread for thread in threads.values() if thread}:
        try:
            status = Path(f"/proc/{thread}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            processes[thread] = 0
        else:
            processes[thread] = int(status.split("\nTgid:", 1)[1].split(None, 1)[0])
    return {query: processes[thread] if thread else thread for query, thread in threads.items()}
