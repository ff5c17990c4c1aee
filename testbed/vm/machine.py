"""One QEMU process: its ports are sockets of ours, its end is the command's status, a panic or a time-out."""

from __future__ import annotations

import contextlib
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from rdmanet.errors import RdmanetError
from testbed.progress import Ticker

_CONSOLE_TAIL_LINES = 40
_PORTS = ("stdout", "stderr", "status")
_PANIC_SIGNS = ("Kernel panic", "BUG:", "Oops:", "general protection fault")


class GuestFailure(RdmanetError):
    """The guest ended without the command's exit status: panic, time-out, or QEMU itself.

    ``operation`` is ``boot`` (the command never started), ``time-out`` or ``guest``.
    """


def console_tail(text: str, lines: int = _CONSOLE_TAIL_LINES) -> str:
    """What a person needs of the kernel's console: from a panic's first sign on, else the last lines."""
    rows = text.replace("\r", "").splitlines()
    for number, row in enumerate(rows):
        if any(sign in row for sign in _PANIC_SIGNS):
            return "\n".join(rows[number : number + 2 * lines])
    return "\n".join(rows[-lines:])


class StatusReader:
    """The guest's status port: lines ``booted`` and ``exit N``, in any pieces."""

    def __init__(self) -> None:
        self._pending = b""
        self.booted = False
        self.exit_status: int | None = None

    def feed(self, data: bytes) -> None:
        """Take what arrived."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word == "booted":
                self.booted = True
            elif word == "exit":
                self.exit_status = int(rest)


class Machine:
    """Runs QEMU once. ``timeout_s`` counts from the command's start, ``boot_timeout_s`` until then."""

    def __init__(self, console: Path, out: BinaryIO, err: BinaryIO, *, timeout_s: float | None, boot_timeout_s: float):
        self._console = console
        self._out = out
        self._err = err
        self._timeout_s = timeout_s
        self._boot_timeout_s = boot_timeout_s

    def run(self, arguments: Callable[[dict[str, int]], list[str]], title: str, initrd: int) -> int:
        """Start QEMU with ``arguments(descriptors by port name)``; the command's exit status.

        ``initrd`` is a descriptor that QEMU inherits.
        """
        ticker = Ticker(f"booting {title}", every_s=5.0)
        with contextlib.ExitStack() as stack:
            ours: dict[str, socket.socket] = {}
            theirs: dict[str, socket.socket] = {}
            for name in _PORTS:
                near, far = socket.socketpair()
                ours[name], theirs[name] = stack.enter_context(near), stack.enter_context(far)
            words = stack.enter_context(tempfile.TemporaryFile())
            argv = arguments({name: far.fileno() for name, far in theirs.items()})
            if setpriv := shutil.which("setpriv"):
                argv = [setpriv, "--pdeathsig", "KILL", *argv]  # QEMU never outlives us, whatever ends us
            qemu = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                pass_fds=[initrd, *(far.fileno() for far in theirs.values())],
                start_new_session=True,  # Ctrl-C comes to us alone
            )
            reader = StatusReader()
            try:
                for far in theirs.values():
                    far.close()
                status = self._pass_through(ours, reader, ticker)
            finally:
                qemu.kill()
                qemu.wait()
            if status is None:
                words.seek(0)
                operation = "guest" if reader.booted else "boot"
                raise self._failure(ticker, words.read().decode(errors="replace"), qemu.returncode, operation)
            return status

    def _failure(self, ticker: Ticker, words: str, returncode: int, operation: str) -> GuestFailure:
        tail = console_tail(self._console.read_text(errors="replace")) if self._console.is_file() else ""
        ended = "" if returncode == -signal.SIGKILL else f" (QEMU ended with {returncode})"
        return GuestFailure(
            f"The virtual machine ended after {ticker.elapsed_s:.0f} s without the command's status{ended}. "
            f"{words.strip()}\nThe end of its console ({self._console}):\n{tail}",
            operation=operation,
        )

    def _pass_through(self, ports: dict[str, socket.socket], reader: StatusReader, ticker: Ticker) -> int | None:
        sinks = {"stdout": self._out, "stderr": self._err}
        announced = False
        deadline = time.monotonic() + self._boot_timeout_s
        with selectors.DefaultSelector() as selector:
            for name, near in ports.items():
                selector.register(near, selectors.EVENT_READ, name)
            while selector.get_map():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    self._time_out(reader.booted)
                for key, _ in selector.select(min(left_s, 60.0 if announced else 0.25)):
                    data = ports[key.data].recv(65536)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data == "status":
                        reader.feed(data)
                    else:
                        sinks[key.data].write(data)
                        sinks[key.data].flush()
                if reader.exit_status is not None:
                    self._drain(ports, sinks)
                    return reader.exit_status
                if reader.booted and not announced:
                    announced = True
                    ticker.done()
                    deadline = time.monotonic() + (self._timeout_s or float("inf"))
                elif not announced:
                    ticker.tick()
        return None

    def _drain(self, ports: dict[str, socket.socket], sinks: dict[str, BinaryIO]) -> None:
        """The guest's pumps have ended before the status was sent: what there is, is in the sockets."""
        for name, sink in sinks.items():
            ports[name].setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while data := ports[name].recv(65536):
                    sink.write(data)
            sink.flush()

    def _time_out(self, booted: bool) -> None:
        limit_s = self._timeout_s if booted else self._boot_timeout_s
        tail = console_tail(self._console.read_text(errors="replace")) if self._console.is_file() else ""
        what = "command did not end" if booted else "virtual machine did not boot"
        raise GuestFailure(
            f"The {what} within {limit_s:g} s: ended it. The end of its console ({self._console}):\n{tail}",
            operation="time-out" if booted else "boot",
        )
