"""Random rounds of the row `kill`: calls of several containers at once, a kill in their middle, what holds then."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rdmanet.cni import CniCode
from testbed import breaking
from testbed.cni_spec import validate_error
from testbed.container import CommandError
from testbed.crashes.crashing import DYING, Crashes
from testbed.host import CNI_EXECUTABLE, CniOutcome, diff, kubernetes_args
from testbed.pod import Pod
from testbed.progress import say
from testbed.rows import need
from testbed.world import World

#: Containers that calls are about, and those that none is about.
PLAYERS = 4
BYSTANDERS = 2
CALLS = 8
#: Within which the calls of a round begin, and a moment to kill at is chosen.
SPREAD_S = 0.12
#: How many fault points a round may pass before the fatal one.
FARTHEST_POINT = 40
#: A repair begins a moment after its break; an executable is done after 20 ms.
REPAIR_S = 1.2
EXECUTABLE_S = 0.03
BUSY_S = 0.5
#: Rows, links, namespaces and queued DELs are compared after each round, everything after so many.
DUMP_EVERY = 5
PENDING = "/var/lib/rdmanet/pending"
#: Until the kernel has let go of a namespace that nobody holds.
GONE_TIMEOUT_S = 30.0
#: What may go wrong: with an agent that dies (11, or DEL's queue), with what is there already (100) or not (3), with a
#: namespace that goes meanwhile (103) and a database that is held (104).
CODES = {int(CniCode.UNKNOWN_CONTAINER), int(CniCode.TRY_AGAIN), 100, 103, 104}


class Chaos:
    """Counts what it does; goes on after something was left behind, which is in ``left``."""

    def __init__(self, crashes: Crashes, chance: random.Random, conf: Mapping[str, Any]):
        self._crashes = crashes
        self._world: World = crashes.world
        self._chance = chance
        self._conf = conf
        self._bystanders = [self._world.add(conf=conf) for _ in range(BYSTANDERS)]
        self._before = self._world.snapshot()
        self._named = self._names()
        self._gone: set[str] = set()  # containers whose namespaces have been removed
        self._world.host.kill_agent()
        self._start_s = self._crashes.start()
        self._ways: dict[str, Callable[[list[Pod]], None]] = {
            "at a point": self._at_a_point,
            "at a moment": self._at_a_moment,
            "of a start": self._of_a_start,
            "of executables": self._of_executables,
            "without a namespace": self._without_a_namespace,
            "with a busy database": self._with_a_busy_database,
            "of a repair": self._of_a_repair,
        }
        if conf.get("rdma"):  # of the others nothing is in their cgroups
            self._ways["without a cgroup"] = self._without_a_cgroup
        self.agents = self.executables = self.rounds = self.calls = 0
        self.ways: Counter[str] = Counter()
        self.codes: Counter[tuple[str, int]] = Counter()
        self.left: list[str] = []

    def round(self) -> None:
        """One of them."""
        self.rounds += 1
        way = self._chance.choice(list(self._ways))
        self.ways[way] += 1
        where = f"round {self.rounds}, {way}"
        players = [Pod.create(self._world.host, f"player-{self.rounds}-{n}") for n in range(PLAYERS)]
        for pod in self._chance.sample(players, 2):
            outcome = self._call("ADD", pod)
            need(outcome.returncode == 0, f"{where}: ADD: {outcome.sentence}")
        self._ways[way](players)
        if self._world.host.agent is None:
            self._crashes.start()
        if self._chance.random() < 0.5:
            self._again(where, players)
        else:
            self._collected(where)
        for pod in players:
            pod.destroy()
        self._gone.clear()
        self._nothing_left(where)

    def end(self) -> None:
        """The others go, too."""
        left = diff(self._before, self._world.snapshot())
        self.left += [f"at last: {line}" for line in left]
        for one in self._bystanders:
            self._world.delete(one)
            one.pod.destroy()

    # What happens in the middle

    def _at_a_point(self, players: list[Pod]) -> None:
        self._crashes.order(self._chance.randint(1, FARTHEST_POINT))
        with self._calling(players):
            pass
        with contextlib.suppress(*DYING):
            self._world.host.settle()
        self._kill()  # now, where that point has not been reached

    def _at_a_moment(self, players: list[Pod]) -> None:
        with self._calling(players):
            self._wait(SPREAD_S)
            self._kill()

    def _of_a_start(self, players: list[Pod]) -> None:
        self._at_a_point(players)
        timeout_s = self._chance.uniform(0.02, 1.2 * self._start_s)
        try:
            self._crashes.start(timeout_s)
        except CommandError:
            self.agents += 1  # it was not ready in time, and killed for that
        else:
            self._kill()

    def _of_executables(self, players: list[Pod]) -> None:
        with ThreadPoolExecutor(CALLS) as threads:
            plans = [
                (self._chance.choice(["ADD", "DEL", "GC"]), pod, self._chance.uniform(0, EXECUTABLE_S))
                for pod in players
                for _ in range(2)
            ]
            list(threads.map(lambda plan: self._cut_short(*plan), plans))
        self._kill_perhaps()

    def _without_a_namespace(self, players: list[Pod]) -> None:
        pod = self._chance.choice(players)
        with self._calling(players):
            self._wait(SPREAD_S)
            self._gone.add(pod.container_id)
            pod.destroy()
        self._kill_perhaps()

    def _without_a_cgroup(self, players: list[Pod]) -> None:
        pod = self._chance.choice(players)
        pod.start()
        with self._calling(players):
            self._wait(SPREAD_S)
            pod.stop()
        self._kill_perhaps()

    def _with_a_busy_database(self, players: list[Pod]) -> None:
        with self._world.hold_database() as holder, self._calling(players):
            self._wait(BUSY_S)
            if self._chance.random() < 0.5:
                self._kill()
            holder.kill()
        self._kill_perhaps()

    def _of_a_repair(self, players: list[Pod]) -> None:
        known = [row["container_id"] for row in self._world.host.api("GET", "/v1/status")["attachments"]]
        pod = next(pod for pod in players if pod.container_id in known)
        target = breaking.target_of(self._world.host, pod)
        name = self._chance.choice(["host-end", "pod-down", "pod-clsact", "address-4", "route-6", "gateway-4"])
        if self._chance.random() < 0.5:
            self._crashes.order(self._chance.randint(1, 4))
        breaking.BREAKS[name].work(target)
        self._wait(REPAIR_S)
        self._kill()

    # Calls

    @contextlib.contextmanager
    def _calling(self, players: list[Pod]) -> Iterator[None]:
        """Random calls of these containers are under way, and have ended afterwards."""
        with ThreadPoolExecutor(CALLS) as threads:
            calls: list[Future[CniOutcome]] = []
            for _ in range(CALLS):
                command = self._chance.choice(["ADD", "ADD", "ADD", "DEL", "DEL", "GC"])
                pod, later_s = self._chance.choice(players), self._chance.uniform(0, SPREAD_S)
                calls.append(threads.submit(self._later, later_s, command, pod))
            yield
            for call in calls:
                self._judge(call.result())

    def _later(self, later_s: float, command: str, pod: Pod) -> CniOutcome:
        time.sleep(later_s)
        return self._collect() if command == "GC" else self._call(command, pod)

    def _call(self, command: str, pod: Pod, **more: Any) -> CniOutcome:
        netns = "" if pod.container_id in self._gone and command == "DEL" else None
        return self._world.host.cni(command, pod, {**self._conf, **more}, netns=netns)

    def _collect(self) -> CniOutcome:
        return self._world.host.cni("GC", None, {**self._conf, **self._valid()})

    def _valid(self) -> dict[str, Any]:
        kept = [{"containerID": one.pod.container_id, "ifname": one.pod.ifname} for one in self._bystanders]
        return {"cni.dev/valid-attachments": kept}

    def _judge(self, outcome: CniOutcome) -> None:
        self.calls += 1
        if outcome.returncode:
            validate_error(outcome.output, "1.1.0", command=outcome.command)
            assert outcome.output is not None
            need(outcome.output["code"] in CODES, f"round {self.rounds}: {outcome.command}: {outcome.sentence}")
            self.codes[outcome.command, outcome.output["code"]] += 1

    def _cut_short(self, command: str, pod: Pod, later_s: float) -> None:
        """An execution that is killed in its middle, if it is not done before."""
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod.container_id,
            "CNI_NETNS": pod.netns,
            "CNI_IFNAME": pod.ifname,
            "CNI_ARGS": kubernetes_args(pod),
            "CNI_PATH": str(CNI_EXECUTABLE.parent),
        }
        with self._world.host.popen(
            [str(CNI_EXECUTABLE)], environment=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps({**self._conf, **self._valid()}).encode())
            process.stdin.close()
            time.sleep(later_s)
            process.kill()
            self.executables += process.returncode == -9

    # Kills

    def _wait(self, most_s: float) -> None:
        time.sleep(self._chance.uniform(0, most_s))

    def _kill(self) -> None:
        """SIGKILL, where a fault point has not been the end already."""
        agent = self._world.host.agent
        if agent is not None:
            need("Traceback" not in agent.log, f"round {self.rounds}: the agent's log has a traceback")
            self._world.host.kill_agent()
            self.agents += 1
        self._crashes.forget_order()

    def _kill_perhaps(self) -> None:
        if self._chance.random() < 0.75:
            self._kill()

    # Afterwards

    def _again(self, where: str, players: list[Pod]) -> None:
        """Every call again: each pod can be added, is whole, and goes."""
        for pod in players:
            if pod.container_id not in self._gone:
                outcome = self._call("ADD", pod)
                if outcome.returncode:
                    need(outcome.sentence.startswith("code 100"), f"{where}: ADD again: {outcome.sentence}")
                    self._deleted(where, pod)
                    outcome = self._call("ADD", pod)
                need(outcome.returncode == 0, f"{where}: ADD again: {outcome.sentence}")
                checked = self._call("CHECK", pod, prevResult=outcome.output)
                need(checked.returncode == 0, f"{where}: CHECK: {checked.sentence}")
            self._deleted(where, pod)

    def _deleted(self, where: str, pod: Pod) -> None:
        outcome = self._call("DEL", pod)
        need(outcome.returncode == 0, f"{where}: DEL again: {outcome.sentence}")

    def _collected(self, where: str) -> None:
        outcome = self._collect()
        need(outcome.returncode == 0, f"{where}: GC: {outcome.sentence}")

    def _nothing_left(self, where: str) -> None:
        """As before the round; what is not is remembered, and the next round begins with it."""
        for one in self._bystanders:
            checked = self._world.check(one)
            need(checked.returncode == 0, f"{where}: CHECK of a pod that took no part: {checked.sentence}")
        host = self._world.host
        rows = {row["container_id"] for row in self._world.status()["attachments"]}
        found = [f"a row of {row}" for row in rows - {one.pod.container_id for one in self._bystanders}]
        queue = host.path(PENDING)
        found += [f"queued: {path.name}" for path in (queue.iterdir() if queue.exists() else ()) if path.name != "lock"]
        deadline_s = time.monotonic() + GONE_TIMEOUT_S
        while (names := self._names()) != self._named and time.monotonic() < deadline_s:
            time.sleep(0.02)  # nobody says when the kernel has taken a namespace down
        found += [f"{name} is there" for name in names - self._named] + [
            f"{n} is not there" for n in self._named - names
        ]
        if found or self.rounds % DUMP_EVERY == 0:
            after = self._world.snapshot()
            found += diff(self._before, after)
            self._before, self._named = after, names
        if found:
            self.left += [f"{where}: {line}" for line in found]
            say(f"kill: {where}: left behind: {found[:3]}")

    def _names(self) -> set[str]:
        """Of links and network namespaces that the host has, or has numbers for."""
        done = self._world.host.exec(["sh", "-c", "ip netns list-id; ls /sys/class/net"])
        return set(done.stdout.splitlines())
