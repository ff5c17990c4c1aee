"""An agent that dies when told to (``crash_agent``), on a host of its own: for tests of crashes and the row `kill`."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rdmanet.errors import RdmanetError
from testbed.crashes.nursery import Nursery
from testbed.host import READY_TIMEOUT_S, CniOutcome, Dump, diff
from testbed.pod import Pod
from testbed.world import World, config

PROGRAM = "testbed.crashes.crash_agent"
ORDER, RECORD = "/run/crash-order", "/run/crash-record"
#: What whoever asks an agent meets while it dies.
DYING = (OSError, http.client.HTTPException, RdmanetError)


@dataclass
class Crashes:
    """A host whose agent dies when told to."""

    world: World
    pristine: Dump
    nursery: Nursery

    @classmethod
    @contextlib.contextmanager
    def begin(cls, name: str) -> Iterator[Crashes]:
        """A host of that name, with such an agent."""
        with World.start(name, agent=False) as world:
            world.host.write_config(world.agent_config)
            with contextlib.closing(Nursery(world.host)) as nursery:
                found = cls(world, {}, nursery)
                found.start()
                found.pristine = world.snapshot()
                yield found

    def start(self, timeout_s: float = READY_TIMEOUT_S) -> float:
        """An agent that obeys ORDER; returns the seconds that took."""
        host = self.world.host
        arguments = [ORDER, RECORD, "--config", host._config_file()]
        return host.begin_agent(lambda output: self.nursery.begin(arguments, output), timeout_s=timeout_s)

    def order(self, fatal: int, how: str = "") -> None:
        """From now on: count, and die at this point (0: at none), or ``raise`` or ``break``."""
        self.world.host.container.act(("write", ORDER, f"{fatal} {how}".strip()))

    def forget_order(self) -> list[str]:
        """Live on; what was recorded meanwhile."""
        host = self.world.host
        recorded = host.exec(["cat", RECORD], check=False).stdout.split("\n")[:-1]
        host.exec(["rm", "-f", ORDER, RECORD])
        return recorded

    def points(self, act: Callable[[], object]) -> list[str]:
        """The fault points of a call and of what it leaves to the background, by doing it."""
        self.order(0)
        act()
        self.world.host.settle()
        return self.forget_order()

    def die(self, fatal: int, points: list[str], act: Callable[[], CniOutcome]) -> CniOutcome:
        """A call during which the agent is killed at that point."""
        agent = self.world.host.agent
        assert agent is not None
        self.order(fatal)
        outcome = act()
        assert agent.process.wait() == -9, f"the agent survived point {fatal}"
        assert self.forget_order() == points[:fatal]
        self.world.host.kill_agent()
        return outcome

    def nothing_left(self, where: str) -> None:
        """As at first."""
        assert self.world.status()["attachments"] == [], where
        assert diff(self.pristine, self.world.snapshot()) == [], where


def add(world: World, pod: Pod) -> CniOutcome:
    """ADD, whatever comes of it."""
    return world.host.cni("ADD", pod, config({}))


def delete(world: World, pod: Pod) -> CniOutcome:
    """DEL, and what it leaves to the background."""
    outcome = world.host.cni("DEL", pod, config({}))
    with contextlib.suppress(*DYING):  # the agent dies meanwhile, where a test wants it so
        world.host.settle()
    return outcome
