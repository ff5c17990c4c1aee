"""TCP that goes on while something is done to the host: paced streams whose every byte is compared at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from testbed.host import Host
from testbed.peer import Peer

WITHIN_S = 30.0
PAUSE_S = 0.002


@dataclass
class Streams:
    """Running ones. ``rounds`` is what all have done when they have ended."""

    running: list[Peer]
    rounds: int = 0

    def go_on(self, rounds: int = 20, within_s: float = WITHIN_S) -> None:
        """Returns when each has done so many rounds more; raises where one broke or stands."""
        for stream in self.running:
            done = stream.ask("stream_reach", rounds=0, within_s=within_s)["rounds"]
            stream.ask("stream_reach", rounds=done + rounds, within_s=within_s)


@contextlib.contextmanager
def streams(
    host: Host, source: Any, sinks: Sequence[tuple[Any, Sequence[str]]], *, pause_s: float = PAUSE_S
) -> Iterator[Streams]:
    """From one container, or the host, to each of the sinks at each of its addresses, with a pause after each round;
    AssertionError at the end where bytes were lost or changed."""
    with contextlib.ExitStack() as stack:
        running: list[Peer] = []
        for number, (sink, addresses) in enumerate(sinks):
            server = stack.enter_context(Peer.traffic(f"{host.name}-sink-{number}", sink.popen))
            for address in addresses:
                port = server.ask("serve", address=address)["port"]
                name = f"{host.name}-stream-{len(running)}"
                running.append(stack.enter_context(Peer.traffic(name, source.popen)))
                running[-1].ask("stream_begin", address=address, port=port, pause_s=pause_s)
        found = Streams(running)
        yield found
        for stream in running:
            ended = stream.ask("stream_end")
            assert ended["equal"], "bytes were lost or changed"
            found.rounds += int(ended["rounds"])
