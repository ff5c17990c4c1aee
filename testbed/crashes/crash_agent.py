"""The agent, ended by SIGKILL at a chosen fault point (`rdmanet.steps.FaultPoint`), as `tests.kernel.test_crash` asks.

The file named first says so: its number k kills at the k-th fault point from when it is there, 0 at none; with "raise"
after it an error is raised there instead, with "break" one that nobody expects, and with "hold PATH" the agent stops
there until the FIFO at PATH is written to. Every point that was reached is written to the file named second. Like
``rdmanet agent`` otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from rdmanet import config
from rdmanet.agent import Agent
from rdmanet.errors import KernelError
from rdmanet.store import owned


class Reaper:
    """Counts the fault points, in whatever threads they are reached."""

    def __init__(self, order: Path, record: Path):
        self._order = order
        self._record = record
        self._lock = threading.Lock()
        self._reached = 0
        self._given_ns = 0  # when the order that is being obeyed was given

    def __call__(self, point: str) -> None:
        with self._lock:
            try:
                given_ns = self._order.stat().st_mtime_ns
                fatal, _, how = self._order.read_text(encoding="ascii").partition(" ")
            except FileNotFoundError:
                return
            self._reached = self._reached + 1 if given_ns == self._given_ns else 1
            self._given_ns = given_ns
            with self._record.open("a", encoding="utf-8") as record:
                record.write(point + "\n")
            if self._reached != int(fatal):
                return
        if how.startswith("hold "):
            Path(how.removeprefix("hold ")).read_bytes()  # until a writer has come and gone
            return
        if how == "raise":
            raise KernelError("A test wants it so.", operation=point)
        if how == "break":
            raise RuntimeError(point)
        os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: Sequence[str] | None = None) -> None:
    """With these arguments, or the process's own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("order", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--config", type=Path)
    chosen = parser.parse_args(arguments)
    loaded = config.load(chosen.config)
    with owned(loaded.agent.state_dir):
        asyncio.run(Agent(loaded, Reaper(chosen.order, chosen.record)).serve())


if __name__ == "__main__":
    main()
