"""What ``GET /v1/monitor`` of a host's agent says, collected in a thread."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode

from testbed.host import SOCKET, Host
from testbed.rows import need

TIMEOUT_S = 60.0


class Watch:
    """Events as they came; those of all threads."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.lost = 0
        self.ended = False
        self._changed = threading.Condition()

    def put(self, event: dict[str, Any]) -> None:
        """One line."""
        with self._changed:
            if "lost" in event:
                self.lost += event["lost"]
            else:
                self.events.append(event)
            self._changed.notify_all()

    def end(self) -> None:
        """There will be no more."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def ended_within(self, timeout_s: float = TIMEOUT_S) -> bool:
        """Whether the agent ends it."""
        with self._changed:
            return self._changed.wait_for(lambda: self.ended, timeout_s)

    def wait(self, done: Callable[[list[dict[str, Any]]], bool], sentence: str) -> None:
        """Returns when the events so far are enough; StepError with ``sentence`` after a minute without."""
        with self._changed:
            enough = self._changed.wait_for(lambda: self.ended or done(self.events), TIMEOUT_S)
            last = self.events[-3:]
            need(enough and done(self.events), f"{sentence}: {len(self.events)} events, the last {last}")


@contextlib.contextmanager
def watching(host: Host, **words: str) -> Iterator[Watch]:
    """Watches until the block ends; it begins when the programs show events. ``words`` filter: pod, reason, verdict."""
    watch = Watch()
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as sock:
        sock.connect(str(host.path(SOCKET)))
        sock.sendall(f"GET /v1/monitor?{urlencode(words)} HTTP/1.0\r\n\r\n".encode())
        lines = sock.makefile("rb")
        status = lines.readline().decode()
        need(" 200 " in status, f"GET /v1/monitor: {status}")
        while lines.readline().strip():
            pass

        def read() -> None:
            with contextlib.suppress(ConnectionError):  # the agent was killed
                for line in lines:
                    watch.put(json.loads(line))
            watch.end()

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield watch
        finally:
            with contextlib.suppress(OSError):  # the agent has ended it
                sock.shutdown(socket.SHUT_RDWR)
            thread.join(TIMEOUT_S)
            lines.close()


def until(condition: Callable[[], bool], sentence: str) -> None:
    """Returns when it holds, looked at ten times a second; StepError after a minute."""
    end_s = time.monotonic() + TIMEOUT_S
    while not condition():
        need(time.monotonic() < end_s, sentence)
        time.sleep(0.1)
