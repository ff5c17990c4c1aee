"""What the service manager hears, on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rdmanet import notify

WAIT_S = 30.0
#: Many times the interval of the feeding.
SILENCE_S = 0.3


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(WAIT_S)
        yield sock


@pytest.mark.parametrize("abstract", [False, True])
def test_states_are_one_datagram(tmp_path: Path, abstract: bool) -> None:
    address = f"@rdmanet-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0", 1))
        sock.settimeout(WAIT_S)
        notify.notify(notify.READY, notify.status("one\nword"), environment={"NOTIFY_SOCKET": address})
        assert sock.recv(4096) == b"READY=1\nSTATUS=one word"


def test_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notify.notify(notify.READY, environment={})
    notify.notify(notify.READY, environment={"NOTIFY_SOCKET": "vsock:2:1"})
    assert not caplog.records
    notify.notify(notify.READY, environment={"NOTIFY_SOCKET": str(tmp_path / "gone")})
    assert "The service manager is not told READY=1" in caplog.text


@pytest.mark.parametrize(
    ("environment", "seconds_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdogs_time(environment: dict[str, str], seconds_s: float | None) -> None:
    assert notify.watchdog_s(environment) == seconds_s


async def test_blocked_workers_stop_the_feeding(manager: socket.socket) -> None:
    """And it goes on when one is free again."""
    environment = {"NOTIFY_SOCKET": str(manager.getsockname())}
    gate = threading.Event()
    with ThreadPoolExecutor(2) as executor:
        feeding = asyncio.create_task(
            notify.feed(executor, 0.01, lambda state: notify.notify(state, environment=environment))
        )
        for _ in range(3):
            assert await asyncio.to_thread(manager.recv, 64) == b"WATCHDOG=1"
        blocked = [executor.submit(gate.wait, WAIT_S) for _ in range(2)]
        await asyncio.to_thread(_drain, manager)
        manager.settimeout(SILENCE_S)
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(manager.recv, 64)
        manager.settimeout(WAIT_S)
        gate.set()
        assert await asyncio.to_thread(manager.recv, 64) == b"WATCHDOG=1"
        feeding.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await feeding
        assert all(one.result() for one in blocked)


def _drain(sock: socket.socket) -> None:
    """What was said before both workers were blocked: until nothing has come for a while."""
    sock.settimeout(SILENCE_S)
    with contextlib.suppress(TimeoutError):
        while sock.recv(64):
            pass
