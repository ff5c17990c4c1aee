"""Row `upgrade`: another version's agent takes over, and hands back, under TCP and leased RDMA transfers.

The other versions: the last release (or the last commit that had another agent), where the history has one; the same
sources with a datapath of another hash and maps of other sizes; a database of every older schema. Bytes are compared at
both ends; leases are the same ones after each change.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accept.rdma import faults
from benchmarks.accept.rdma.faults import CONFIGURATION, LEASES, WITHIN_S, Scene
from rdmanet.store import SCHEMA_VERSION
from testbed.host import Host
from testbed.progress import say
from testbed.rows import Figure, need
from testbed.streams import Streams, streams
from testbed.upgrades import OTHER_SIZES, SCHEMAS, Tree, downgrade_on, older_tree, other_artifact

STATE_DATABASE = "/var/lib/rdmanet/state.db"
#: An emulated machine is busy with the start of an agent for half a minute.
STREAM_WITHIN_S = 240.0
#: There the streams leave it some of its time, and it may take minutes all the same.
PAUSE_S = 0.5
ROUNDS = 3
READY_TIMEOUT_S = 600.0


@dataclass
class Upgrades:
    """A host under load, and what has been done to it."""

    host: Host
    at: Scene
    running: Streams
    done: list[str]

    def replaced(self, name: str, start: Callable[[], object], *, kill: bool = False) -> None:
        """The agent ends, something else comes, and everything goes on."""
        say(f"upgrade: {name}")
        if kill:
            self.host.kill_agent()
        elif self.host.agent is not None:
            need(self.host.stop_agent() == 0, f"the agent before {name} did not end well")
        self.go_on()
        start()
        self.go_on()
        leases = self.host.api("GET", "/v1/status")["leases"]
        need(len(leases) == LEASES, f"{name}: {len(leases)} of {LEASES} leases are known")
        self.done.append(name)

    def go_on(self) -> None:
        """Every stream has done some rounds more."""
        self.running.go_on(ROUNDS, within_s=STREAM_WITHIN_S)
        self.at.run_on(ROUNDS)


def measure() -> Figure:
    """Bytes lost: none, or StepError."""
    tree = older_tree()
    with _loaded(tree) as upgrades, tempfile.TemporaryDirectory() as directory:
        host = upgrades.host
        other: dict[str, Any] = {
            **CONFIGURATION,
            **OTHER_SIZES,
            "datapath": {"artifact_dir": other_artifact(Path(directory))},
        }
        if tree is not None:
            upgrades.replaced("this version", lambda: _start(host))
            if tree.schema == SCHEMA_VERSION:
                upgrades.replaced(f"back to {tree.commit}", lambda: _start(host, tree))
                upgrades.replaced("this version again", lambda: _start(host), kill=True)
        upgrades.replaced("another datapath and other sizes", lambda: _start(host, configuration=other))
        upgrades.replaced("this datapath and its sizes", lambda: _start(host), kill=True)
        for schema in SCHEMAS:

            def from_older(version: int = schema) -> None:
                downgrade_on(host, STATE_DATABASE, version)
                _start(host)

            upgrades.replaced(f"from schema {schema}", from_older)
        at = upgrades.at
        outcomes = at.client.ask("end", within_s=WITHIN_S, timeout_s=WITHIN_S + 30)
        received = at.server.ask("received", within_s=WITHIN_S, timeout_s=WITHIN_S + 30)
        result = faults.verdict("upgrade", True, outcomes, received)
        need(not any(result["told"].values()), f"somebody was told of an error: {result['told']}")
    rdma_bytes = sum(result["bytes"].values())
    detail = (
        f"lost in {len(upgrades.done)} changes of the agent ({', '.join(upgrades.done)}), beginning with"
        f" {tree.commit if tree else 'this version'}: {upgrades.running.rounds} rounds of TCP in both families and"
        f" {rdma_bytes} bytes over {LEASES} leases arrived as sent"
    )
    more = {"changes": upgrades.done, "tcp_rounds": upgrades.running.rounds, **result}
    return Figure(float(result["lost_bytes"]), "bytes", detail, more)


def _start(
    host: Host, tree: Tree | None = None, *, configuration: Mapping[str, Mapping[str, Any]] = CONFIGURATION
) -> float:
    if tree is None:
        return host.start_agent(configuration, timeout_s=READY_TIMEOUT_S)
    return host.start_agent(
        configuration, timeout_s=READY_TIMEOUT_S, program=tree.program, environment=tree.environment
    )


@contextlib.contextmanager
def _loaded(tree: Tree | None) -> Iterator[Upgrades]:
    """A host on which the older version has made two pods, with TCP and RDMA between them."""
    with Host.scratch("upgrade") as host:
        _start(host, tree)
        with faults.scene(host, "upgrade") as at:
            client, server = at.ends
            sinks = [(server.pod.running, list(server.addresses.values()))]
            with streams(host, client.pod.running, sinks, pause_s=PAUSE_S) as running:
                faults.begin(at)
                yield Upgrades(host, at, running, [])
        host.stop_agent()
