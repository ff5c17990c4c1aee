"""Row `leaks`: 10,000 leases opened and closed leave nothing in the kernel, in the agent or in the library.

In batches and one by one, some used and some not. What counts objects must be as before, to the last one; memory may
grow in the second half by less than a lease could ever need. Of the agent that is what Python has allocated
(tracemalloc): its resident memory goes up by single steps of allocators, of 0.8 MB at once somewhere in 10,000 leases
during which what was allocated grew by 5 bytes for each.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accept.rdma.faults import PINS
from benchmarks.peers import namespaces
from benchmarks.peers.allocated import TRACED, allocated_bytes
from benchmarks.peers.namespaces import Pair
from rdmanet.datapath.artifact import Artifact
from rdmanet.datapath.maps import Datapath
from testbed.host import ARTIFACT, Host
from testbed.paths import REPOSITORY
from testbed.peer import Peer
from testbed.process import descriptors, rss_bytes
from testbed.rows import Figure, need

PROGRAM = ("-m", "benchmarks.peers.churn")
LEASES = 10_000
BATCH = 64
#: One lease after another costs ten times as much as one of a batch: a tenth of them comes so.
SINGLE_SHARE = 10
CHURN_TIMEOUT_S = 1800.0
#: Revoked entries stay until the kernel says that the queue pair is gone, asked at most every 60 s.
GONE_TIMEOUT_S = 90.0
#: Growth in the second half, per lease. What a leaked queue pair, request or table entry costs is more.
GROWTH_BYTES = 100
KERNEL_GROWTH_BYTES = 500
#: Of the agent's resident memory, in the second half: allocators' steps.
STEPS_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class State:
    """What there is of everything that leases make."""

    objects: dict[str, int]  # exactly as before: queue pairs, regions, descriptors, entries …
    memory_bytes: dict[str, int]


class Churn:
    """Two pods with a program each, and what they have done."""

    def __init__(self, host: Host, pair: Pair, client: Peer, server: Peer, traced: bool):
        self._host, self._pair, self._client, self._server = host, pair, client, server
        self._traced = traced
        self.leases = 0

    @classmethod
    @contextlib.contextmanager
    def begin(cls, host: Host, *, traced: bool = False) -> Iterator[Churn]:
        """Fresh pods on `host`. ``traced``: its agent says what it has allocated."""
        with contextlib.ExitStack() as stack:
            pair = stack.enter_context(namespaces.ours(host, "churn"))
            client, server = (
                stack.enter_context(
                    Peer.start(f"{end.pod.name}-churn", end.pod.popen, [sys.executable, *PROGRAM], cwd=str(REPOSITORY))
                )
                for end in (pair.client, pair.server)
            )
            server.ask("serve", service="churn")
            yield cls(host, pair, client, server, traced)

    def run(self, leases: int, count: int | None, *, used: bool) -> float:
        """Open and close at least so many leases; the seconds that took."""
        done = self._client.ask(
            "churn",
            target=f"{self._pair.server.pod.name}:churn",
            times=-(-leases // (count or 1)),
            count=count,
            used=used,
            timeout_s=CHURN_TIMEOUT_S,
        )
        self.leases += done["leases"]
        return float(done["elapsed_s"])

    def every_way(self, leases: int) -> dict[str, float]:
        """About so many in all, in batches and one by one; the seconds of each way."""
        singles = leases // SINGLE_SHARE
        batches = (leases - singles) // 2
        return {
            "batches": self.run(batches, BATCH, used=False),
            "batches, used": self.run(batches, BATCH, used=True),
            "single": self.run(singles // 2, None, used=False),
            "single, used": self.run(singles - singles // 2, None, used=True),
        }

    def state(self) -> State:
        """When the listener has closed all, and the kernel and the guard have let go."""
        processes = {
            "client": self._client.ask("state", ended=0),
            "server": self._server.ask("state", ended=self.leases),
        }
        agent = self._agent_pid()
        deadline = time.monotonic() + GONE_TIMEOUT_S
        while (left := self._entries()) and any(left.values()) and time.monotonic() < deadline:
            time.sleep(0.5)  # nobody says when the kernel is done
        objects = {**left, **self._resources(), "agent descriptors": descriptors(agent)}
        for name, found in processes.items():
            objects |= {f"{name} {key}": found[key] for key in ("descriptors", "tasks")}
        memory = {
            **({"agent": allocated_bytes(self._host)} if self._traced else {}),
            "agent, resident": rss_bytes(agent),
            **{name: found["rss_bytes"] for name, found in processes.items()},
            "kernel slab": _slab_bytes(),
        }
        return State(objects, memory)

    def _agent_pid(self) -> int:
        assert self._host.agent is not None
        return self._host.agent.process.pid

    def _entries(self) -> dict[str, int]:
        """Leases and guard entries."""
        with Datapath.open(Artifact.load(ARTIFACT), self._host.path(PINS)) as datapath:
            entries = len(datapath.guards()) + len(datapath.datagrams())
        return {"leases": len(self._host.api("GET", "/v1/status")["leases"]), "guard entries": entries}

    def _resources(self) -> dict[str, int]:
        """rdma resource: of both devices, how many of each kind."""
        devices = {self._pair.client.device, self._pair.server.device}
        found: dict[str, int] = {}
        for row in self._host.exec(["rdma", "-j", "resource"]).json():
            if row["ifname"] in devices:
                kinds = {key: value for key, value in row.items() if key not in ("ifindex", "ifname")}
                found |= {f"{row['ifname']} {kind}": int(value) for kind, value in kinds.items()}
        return found


def _slab_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("SUnreclaim:"):
            return int(line.split()[1]) << 10
    return 0


def nothing_left(before: State, after: State) -> None:
    """StepError when an object is left."""
    left = {key: (before.objects.get(key), value) for key, value in after.objects.items()}
    left = {key: counts for key, counts in left.items() if counts[0] != counts[1]}
    need(not left, f"left behind (before, after): {left}")
    need(not after.objects["leases"] and not after.objects["guard entries"], f"left behind: {after.objects}")


def growth_bytes(before: State, after: State, leases: int) -> dict[str, float]:
    """Of each memory, per lease."""
    return {key: round((value - before.memory_bytes[key]) / leases, 1) for key, value in after.memory_bytes.items()}


def measure() -> Figure:
    """A tenth to warm up, then all of them in two halves."""
    with namespaces.agent_host("leaks", TRACED) as host, Churn.begin(host, traced=True) as churn:
        churn.every_way(LEASES // 10)
        states, leases, elapsed_s = [churn.state()], [churn.leases], []
        for _ in range(2):
            elapsed_s.append(churn.every_way(LEASES // 2))
            states.append(churn.state())
            leases.append(churn.leases)
    total = leases[2] - leases[0]
    need(total >= LEASES, f"{total} leases were made")
    nothing_left(states[0], states[2])
    halves = [growth_bytes(states[n], states[n + 1], leases[n + 1] - leases[n]) for n in range(2)]
    limits = {"kernel slab": KERNEL_GROWTH_BYTES, "agent, resident": STEPS_BYTES / (leases[2] - leases[1])}
    for key, grown in halves[1].items():
        most = limits.get(key, GROWTH_BYTES)
        need(grown < most, f"{key} grew by {grown:g} bytes per lease: {[state.memory_bytes for state in states]}")
    return Figure(
        total,
        "leases",
        f"opened and closed in {sum(sum(ways.values()) for ways in elapsed_s):.0f} s, in batches of {BATCH} and one by "
        "one; not a queue pair, region, descriptor, lease or guard entry is left; growth per lease in the second half: "
        + ", ".join(f"{key} {value:g} bytes" for key, value in halves[1].items()),
        {
            "elapsed_s": elapsed_s,
            "growth_bytes_per_lease": {"first half": halves[0], "second half": halves[1]},
            "objects": states[2].objects,
            "memory_bytes": [state.memory_bytes for state in states],
        },
    )
