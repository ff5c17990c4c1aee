"""Unmodified programs with two ends, a server in one pod and a client in the other; what of their traffic was RoCE."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.peers.namespaces import End, Pair
from rdmanet.errors import UnavailableError
from testbed.container import CommandError, Completed, Process
from testbed.host import Host
from testbed.paths import BUILD, REPOSITORY

#: What clients say when the server does not listen yet: some servers say that they do just before, some say nothing.
_TOO_EARLY = ("Couldn't connect", "refused", "REJECTED", "CM event")
_CLIENT_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Ended:
    """A run of both ends: what the client left, and the server's status (None: ended at the deadline)."""

    client: Completed
    server_status: int | None
    server_said: str

    @property
    def ok(self) -> bool:
        """Whether both ended well."""
        return self.client.returncode == 0 and self.server_status == 0

    @property
    def words(self) -> str:
        """What a person needs to see of a run that failed."""
        said = (self.client.stdout + self.client.stderr).strip().splitlines()[-3:]
        server = self.server_said.strip().splitlines()[-2:]
        return (
            f"client ended with {self.client.returncode}: {' / '.join(said)[-300:]}; "
            f"server with {self.server_status}: {' / '.join(server)[-200:]}"
        )


def both_ends(
    pair: Pair,
    server: Sequence[str],
    client: Sequence[str],
    listening: str,
    *,
    environments: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
    timeout_s: float = 30.0,
) -> Ended:
    """Run a tool's two ends once; `environments` are the server's and the client's.

    The client starts when the server has printed `listening`, and again while it says that nobody listens. Nothing is
    raised for a tool that fails: the result says so.
    """
    (BUILD / "peers").mkdir(parents=True, exist_ok=True)
    with (
        (BUILD / "peers" / f"{server[0]}.log").open("wb") as complaints,
        # Line by line: what says that the server listens would else stay in its buffer.
        pair.server.pod.popen(
            ["stdbuf", "-oL", *server],
            stdout=subprocess.PIPE,
            stderr=complaints.fileno(),
            environment=environments[0],
        ) as process,
    ):
        said = _read(process, timeout_s, listening)
        done = Completed(tuple(client), None, "", f"the server did not say {listening!r}", 0.0)
        for _ in range(_CLIENT_ATTEMPTS if listening in said else 0):
            try:
                done = pair.client.pod.exec(client, timeout_s=timeout_s, check=False, environment=environments[1])
            except CommandError as error:  # at the deadline
                done = error.completed
            early = any(word in done.stdout + done.stderr for word in _TOO_EARLY)
            if done.returncode in (0, None) or not early or process.poll() is not None:
                break
        # A client that failed leaves a server that waits.
        said += _read(process, timeout_s if done.returncode == 0 else 1.0)
        try:
            status: int | None = process.wait(1.0)
        except TimeoutError:
            status = None
    return Ended(done, status, said + (BUILD / "peers" / f"{server[0]}.log").read_text(errors="replace"))


def _read(process: Process, timeout_s: float, until: str | None = None) -> str:
    """A process's output up to and with the line that has `until`, or to its end; at most `timeout_s`."""
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    seen = ""
    while until is None or until not in seen:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        data = process.stdout.read1() if ready else b""  # type: ignore[attr-defined] # buffered: popen made it
        if not data:
            break
        seen += data.decode(errors="replace")
    return seen


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the datapath has counted of some pods together: packets and bytes from them, RoCE and all else."""

    roce_packets: int
    roce_bytes: int
    other_packets: int
    other_bytes: int

    def since(self, before: Traffic) -> Traffic:
        """What came after `before`."""
        return Traffic(
            self.roce_packets - before.roce_packets,
            self.roce_bytes - before.roce_bytes,
            self.other_packets - before.other_packets,
            self.other_bytes - before.other_bytes,
        )


def traffic(host: Host, ends: Iterable[End]) -> Traffic:
    """The counters of these pods now, by their agent."""
    wanted = {end.pod.container_id for end in ends}
    roce, other = [0, 0], [0, 0]
    for row in host.api("GET", "/v1/status")["attachments"]:
        if row["container_id"] not in wanted:
            continue
        for name, count in row["counters"].items():
            if name.startswith("from_pod_"):
                kind = roce if name == "from_pod_roce" else other
                kind[0] += count["packets"]
                kind[1] += count["bytes"]
    return Traffic(*roce, *other)


def roce_drops(host: Host) -> dict[str, int]:
    """Drop reason → RoCE packets dropped so far, on the whole host."""
    found: dict[str, int] = {}
    for row in host.api("GET", "/v1/status")["drops"]:
        if row["reason"].startswith("roce"):
            found[row["reason"]] = found.get(row["reason"], 0) + row["packets"]
    return found


def told(end: End) -> dict[int, dict[str, str]]:
    """What `python -m rdmanet.verbs env` says inside a pod: by IP version, as its programs would have it after eval."""
    argv = [sys.executable, "-m", "rdmanet.verbs", "env", "--json", "--timeout-s", "60"]
    try:
        done = end.pod.exec(argv, cwd=str(REPOSITORY), timeout_s=120)
    except CommandError as error:
        raise UnavailableError(f"rdmanet.verbs env in {end.pod.name}: {error.sentence}") from error
    return {int(family): variables for family, variables in done.json()["families"].items()}


def told_all(ends: Sequence[End]) -> dict[int, list[dict[str, str]]]:
    """The same of several pods at once: by IP version, in their order."""
    with ThreadPoolExecutor(len(ends)) as threads:
        found = list(threads.map(told, ends))
    return {family: [variables[family] for variables in found] for family in (4, 6)}
