"""Ranks' output: cut into lines with the rank in front, written without ever blocking the event loop."""

from __future__ import annotations

import asyncio
import os
import queue
import threading

#: A longer line is cut; nobody has to keep all of what a rank prints without a line's end.
LINE_MAX_BYTES = 64 << 10


class Lines:
    """Cuts a stream into lines, each with ``prefix`` in front. A carriage return ends a line as well: that is how
    progress bars write."""

    def __init__(self, prefix: bytes):
        self._prefix = prefix
        self._rest = b""
        self._after_return = False

    def feed(self, data: bytes) -> bytes:
        """What can be written now."""
        if self._after_return and data:
            data = data.removeprefix(b"\n")
            self._after_return = False
        if data:
            self._after_return = data.endswith(b"\r")
        *whole, self._rest = (self._rest + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        written = b"".join(self._piece(line, at) for line in whole for at in range(0, len(line) or 1, LINE_MAX_BYTES))
        while len(self._rest) > LINE_MAX_BYTES:
            written += self._piece(self._rest, 0)
            self._rest = self._rest[LINE_MAX_BYTES:]
        return written

    def end(self) -> bytes:
        """A last line that has no end of its own."""
        rest, self._rest = self._rest, b""
        return self._piece(rest, 0) if rest else b""

    def _piece(self, line: bytes, at: int) -> bytes:
        return self._prefix + line[at : at + LINE_MAX_BYTES] + b"\n"


class Printer:
    """Writes to a descriptor from a thread of its own: whoever reads it may be slow, or stop."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._waiting: queue.SimpleQueue[tuple[bytes, asyncio.AbstractEventLoop, asyncio.Future[None]]] = (
            queue.SimpleQueue()
        )
        # A daemon: a reader that has stopped for good must not keep the launcher from ending.
        threading.Thread(target=self._work, name="rdmanet-run-output", daemon=True).start()

    def write(self, data: bytes) -> asyncio.Future[None]:
        """Done when it is written, or has an OSError, such as BrokenPipeError."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._waiting.put((data, loop, done))
        return done

    def _work(self) -> None:
        while True:
            data, loop, done = self._waiting.get()
            failure: OSError | None = None
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                failure = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, done, failure)


def _settle(done: asyncio.Future[None], failure: OSError | None) -> None:
    if done.cancelled():
        return
    if failure is None:
        done.set_result(None)
    else:
        done.set_exception(failure)
