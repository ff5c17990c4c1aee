"""A scratch host with an agent, its pods, and everything that a test may ask about them.

What ``host`` fixtures are for tests of the testbed, ``World`` is for tests of the agent: module-wide where tests leave
it as they found it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rdmanet.datapath.artifact import Artifact
from rdmanet.datapath.maps import Datapath
from testbed.cni_spec import validate_error, validate_result
from testbed.container import Completed, Process
from testbed.host import ARTIFACT, CniOutcome, Dump, Host, diff
from testbed.paths import REPOSITORY
from testbed.peer import Peer
from testbed.pod import Pod

PROBER = Path(__file__).with_name("prober.py")
NETWORK: dict[str, Any] = {"cniVersion": "1.1.0", "name": "net", "type": "rdmanet"}
PINS = "/sys/fs/bpf/rdmanet"
DATABASE = "/var/lib/rdmanet/state.db"

_numbers = itertools.count(1)

_SQL = """
import json, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
rows = [database.execute(statement).fetchall() for statement in sys.argv[2:]]
print(json.dumps(rows, default=bytes.hex))
"""

_HOLDER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""
#: A process of another user in a network namespace, which says its pid.
_OTHER_USER = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "sh", "-c", "echo $$; exec sleep 600"]


def config(value: Mapping[str, Any]) -> dict[str, Any]:
    """The network configuration with changes."""
    return {**NETWORK, **value}


@dataclass
class Attached:
    """A pod that ADD has attached."""

    pod: Pod
    result: dict[str, Any]
    conf: dict[str, Any]

    def address(self, version: int) -> str:
        """Its IPv4 or IPv6 address."""
        (found,) = [a for a in self.addresses if (":" in a) == (version == 6)]
        return found

    @property
    def addresses(self) -> list[str]:
        """All of them, as in the result."""
        return [ip["address"].split("/")[0] for ip in self.result["ips"]]

    @property
    def mac(self) -> str:
        """Of the pod's interface."""
        (found,) = [i["mac"] for i in self.result["interfaces"] if i.get("sandbox")]
        return str(found)

    @property
    def host_ifname(self) -> str:
        """The host's end."""
        (found,) = [i["name"] for i in self.result["interfaces"] if i["name"].startswith("rn-")]
        return str(found)


@dataclass
class World:
    """One host and what lives on it."""

    host: Host
    agent_config: dict[str, dict[str, Any]]
    pods: list[Pod] = field(default_factory=list)
    peers: list[Peer] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def start(
        cls,
        name: str,
        agent_config: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        outside: bool = True,
        agent: bool = True,
        bpffs: bool = True,
        machine: bool = False,
    ) -> Iterator[World]:
        """A host of that name, with an uplink and a running agent unless said otherwise.

        A scratch host, or with `machine` this machine itself: a throwaway one.
        """
        if os.geteuid() != 0:
            pytest.skip("needs root: network namespaces")
        name = f"{name}{next(_numbers)}"
        with Host.machine(name) if machine else Host.scratch(name, bpffs=bpffs) as host:
            world = cls(host, {section: dict(keys) for section, keys in (agent_config or {}).items()})
            if outside:
                host.connect_outside()
            try:
                if agent:
                    world.start_agent()
                yield world
            finally:
                if host.agent is not None:
                    print(host.agent.log)
                for peer in world.peers:
                    peer.close()
                for pod in world.pods:
                    pod.destroy()

    # The agent

    def start_agent(self, *program: str) -> float:
        """Starts it as configured; `program` is another way to start it (testbed.crashes.crash_agent)."""
        return self.host.start_agent(self.agent_config, program=program or ("-m", "rdmanet", "agent"))

    def command(self, *words: str, check: bool = True) -> Completed:
        """A `rdmanet` command on the host, with the agent's own configuration."""
        if words == ("uninstall",) and check:
            return self.host.uninstall()
        argv = [sys.executable, "-m", "rdmanet", *words, "--config", self.host._config_file()]
        return self.host.exec(argv, cwd=str(REPOSITORY), check=check)

    def hold_database(self) -> Process:
        """Another process has the database locked for writing, until its input ends."""
        argv = [sys.executable, "-I", "-S", "-E", "-c", _HOLDER, DATABASE]
        process = self.host.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        return process

    @contextlib.contextmanager
    def other_users_namespace(self, netns: str) -> Iterator[str]:
        """The path of a namespace as a runtime without bound ones gives it, of a process of another user."""
        process = self.host.popen(["nsenter", f"--net={netns}", *_OTHER_USER], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            yield f"/proc/{int(process.stdout.readline())}/ns/net"
        finally:
            process.kill()
            process.close()

    def status(self) -> dict[str, Any]:
        """GET /v1/status, when nothing is being removed any more."""
        self.host.settle()
        found: dict[str, Any] = self.host.api("GET", "/v1/status")
        return found

    def drops(self, pod: str | None) -> dict[str, int]:
        """Drop reason → packets of one pod (namespace/name; None: those without a pod)."""
        return {row["reason"]: row["packets"] for row in self.status()["drops"] if row["pod"] == pod}

    def sql(self, *statements: str) -> list[list[list[Any]]]:
        """Rows of each statement, from the agent's database on the host."""
        done = self.host.exec([sys.executable, "-I", "-S", "-E", "-c", _SQL, DATABASE, *statements])
        found: list[list[list[Any]]] = json.loads(done.stdout)
        return found

    @contextlib.contextmanager
    def datapath(self) -> Iterator[Datapath]:
        """The host's pinned maps, from this process."""
        with Datapath.open(Artifact.load(ARTIFACT), self.host.path(PINS)) as datapath:
            yield datapath

    # Pods

    def pod(self, name: str | None = None, **options: Any) -> Pod:
        """A network namespace as a runtime makes it before ADD."""
        self.pods.append(Pod.create(self.host, name or f"pod-{next(_numbers)}", **options))
        return self.pods[-1]

    def add(
        self,
        pod: Pod | None = None,
        *,
        args: str | None = None,
        conf: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Attached:
        """ADD, which must succeed and be as the specification says. `args` is CNI_ARGS."""
        pod = pod or self.pod()
        conf = config({**changes, **(conf or {})})
        outcome = self.host.cni("ADD", pod, conf, args=args)
        assert outcome.returncode == 0, outcome.sentence
        validate_result(outcome.output, conf["cniVersion"], ifname=pod.ifname, netns=pod.netns)
        assert outcome.output is not None
        return Attached(pod, outcome.output, conf)

    def check(self, attached: Attached) -> CniOutcome:
        """CHECK with ADD's result as prevResult."""
        return self.host.cni("CHECK", attached.pod, {**attached.conf, "prevResult": attached.result})

    def delete(self, attached: Attached, **options: Any) -> None:
        """DEL, which must succeed and print nothing."""
        succeeded(self.host.cni("DEL", attached.pod, {**attached.conf, "prevResult": attached.result}, **options))

    def traffic(self, place: str, container: Any) -> Peer:
        """TCP (testbed/traffic.py) inside a pod, the host or the outside."""
        self.peers.append(Peer.traffic(f"{self.host.name}-{place}", container.popen))
        return self.peers[-1]

    def prober(self, place: str, container: Any) -> Peer:
        """UDP and raw frames (prober.py) there."""
        argv = [sys.executable, "-I", "-S", "-E", str(PROBER)]
        self.peers.append(Peer.start(f"{self.host.name}-{place}-prober", container.popen, argv))
        return self.peers[-1]

    # Before and after

    def snapshot(self) -> Dump:
        """The host's dump without the agent's own files, its maps, and the database's rows but for used-up ids."""
        dump = self.host.dump()
        del dump["state"], dump["run"]
        with self.datapath() as datapath:
            dump["attachments"] = {str(k): repr(v) for k, v in datapath.attachments().items()}
            dump["endpoints"] = {k.hex(): repr(v) for k, v in datapath.endpoints().items()}
            dump["guards"] = {repr(k): repr(v) for k, v in datapath.guards().items()}
            dump["datagrams"] = {repr(k): repr(v) for k, v in datapath.datagrams().items()}
        tables = ("attachments", "addresses", "host_effects")
        for table, rows in zip(tables, self.sql(*(f"SELECT * FROM {t} ORDER BY 1" for t in tables)), strict=True):
            dump[f"table {table}"] = rows
        return dump

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Asserts that the block left nothing behind on the host, in the maps or in the database."""
        before = self.snapshot()
        yield
        assert diff(before, self.snapshot()) == []


def succeeded(outcome: CniOutcome) -> None:
    """A call that answers nothing."""
    assert (outcome.returncode, outcome.output) == (0, None), outcome.sentence


def refused(outcome: CniOutcome, code: int, words: str, version: str | None = "1.1.0") -> None:
    """An error with that code, whose sentence has these words, once, on standard output."""
    assert outcome.returncode != 0
    validate_error(outcome.output, version, command=outcome.command)
    assert outcome.output is not None
    assert (outcome.output["code"], words in outcome.output["msg"]) == (code, True), outcome.sentence
