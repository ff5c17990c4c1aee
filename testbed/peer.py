"""Programs that the testbed talks to while they run inside containers: one JSON object per line, in and out.

A request is ``{"do": name, ...}``; the answer has ``"ok"``, and ``"sentence"`` where it is false. One Python process
per place serves a whole test: starting one costs a second in an emulated machine.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rdmanet.errors import RdmanetError
from testbed.container import Process
from testbed.paths import BUILD

TRAFFIC = Path(__file__).with_name("traffic.py")
#: Emulated on a busy machine, the imports of a program that has just started take half a minute.
DEFAULT_TIMEOUT_S = 150.0


class PeerError(RdmanetError):
    """The program refused a request, or does not answer."""


class Peer:
    """One such program; ``place`` names it in errors."""

    def __init__(self, place: str, process: Process, log: IO[bytes]):
        self.place = place
        self.process = process
        self._log = log
        self._pending = b""

    @classmethod
    def start(
        cls,
        place: str,
        popen: Callable[..., Process],
        argv: list[str],
        *,
        cwd: str = "/",
        environment: Mapping[str, str] | None = None,
    ) -> Peer:
        """Start `argv` with a container's `popen`; its standard error goes to build/peers/PLACE.log."""
        directory = BUILD / "peers"
        directory.mkdir(parents=True, exist_ok=True)
        log = (directory / f"{place}.log").open("wb")
        process = popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.fileno(), cwd=cwd, environment=environment
        )
        return cls(place, process, log)

    @classmethod
    def traffic(cls, place: str, popen: Callable[..., Process]) -> Peer:
        """The TCP program (testbed/traffic.py); it needs no site packages."""
        return cls.start(place, popen, [sys.executable, "-I", "-S", "-E", str(TRAFFIC)])

    def ask(self, do: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, **request: Any) -> dict[str, Any]:
        """One request; the answer. PeerError with the program's sentence when it refuses or ends."""
        self.tell(do, **request)
        return self.answer(timeout_s=timeout_s)

    def tell(self, do: str, **request: Any) -> None:
        """Send a request without waiting; `answer` fetches what comes back, in order."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
        except BrokenPipeError as error:
            raise PeerError(f"the program in {self.place} has ended{self._last_words()}") from error

    def answer(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> dict[str, Any]:
        """The next answer; PeerError as with `ask`."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise PeerError(f"the program in {self.place} has not answered within {timeout_s:g} s")
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise PeerError(f"the program in {self.place} has ended{self._last_words()}")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise PeerError(answer["sentence"], subject=self.place)
        return answer

    def _last_words(self) -> str:
        words = Path(self._log.name).read_text(errors="replace").strip().splitlines()[-1:]
        return f": {words[0]}" if words else ""

    def close(self) -> None:
        """End the program; idempotent."""
        self.process.close()
        self._log.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
