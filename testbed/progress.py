"""Progress lines on stderr: a person should never look at silence."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator


def say(sentence: str) -> None:
    """One line on stderr, at once."""
    print(f"testbed: {sentence}", file=sys.stderr, flush=True)


class Ticker:
    """Rewrites one line on a terminal, and prints a line every ``every_s`` seconds where there is none."""

    def __init__(self, what: str, every_s: float = 10.0):
        self.what = what
        self.started = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._every_s = 0.25 if self._terminal else every_s
        self._next = self.started + self._every_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the ticker was made."""
        return time.monotonic() - self.started

    def tick(self, detail: str = "") -> None:
        """Say how far it is, if it is time to."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._every_s
        line = f"{self.what}: {self.elapsed_s:.0f} s{' ' + detail if detail else ''}"
        if self._terminal:
            print(f"\rtestbed: {line}\033[K", end="", file=sys.stderr, flush=True)
        else:
            say(line)

    def clear(self) -> None:
        """Take the line off a terminal, where it is rewritten."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def done(self, detail: str = "") -> None:
        """The last line."""
        self.clear()
        say(f"{self.what}: {self.elapsed_s:.1f} s{', ' + detail if detail else ''}")


@contextlib.contextmanager
def heartbeat(what: str, every_s: float = 10.0) -> Iterator[None]:
    """Say every ``every_s`` seconds that ``what`` goes on, for work that has nothing to say of its own."""
    ticker = Ticker(what, every_s)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.25):
            ticker.tick()
        ticker.clear()

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
