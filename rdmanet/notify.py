"""What the agent tells the service manager (sd_notify(3)): that it is ready, that it is alive, that it stops.

Own code, as it is one datagram: of the packages there are, sdnotify has had no release since 2017 and hides failures,
cysystemd and systemd-python compile against libsystemd, for which a node would need a compiler or a wheel of its kind.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Executor

log = logging.getLogger(__name__)

READY, STOPPING, ALIVE = "READY=1", "STOPPING=1", "WATCHDOG=1"
#: Of the watchdog's time: one late answer is none too many.
SHARE = 3


def notify(*states: str, environment: Mapping[str, str] = os.environ) -> None:
    """Sends states to the service manager, where there is one ($NOTIFY_SOCKET). What cannot be sent is logged: the
    agent does not end for that."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)  # a manager that does not read must not stop the loop
            sock.sendto("\n".join(states).encode(), address)
    except OSError as error:
        log.warning("The service manager is not told %s: %s", ", ".join(states), error)


def status(sentence: str) -> str:
    """What `systemctl status` shows."""
    return f"STATUS={' '.join(sentence.split())}"


def watchdog_s(environment: Mapping[str, str] = os.environ) -> float | None:
    """Within how many seconds the manager wants to hear of us (sd_watchdog_enabled(3)); None: not at all."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        found = int(environment.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return found / 1e6 if found > 0 else None


async def feed(executor: Executor, within_s: float, send: Callable[[str], None] = notify) -> None:
    """Says that the agent is alive, again and again: as long as the event loop turns and a worker answers. For ever;
    to be cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        await loop.run_in_executor(executor, _answer)
        send(ALIVE)
        await asyncio.sleep(within_s / SHARE)


def _answer() -> None:
    """A worker is free, and works."""
