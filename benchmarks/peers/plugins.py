"""CNI plugins as contenders: ours, and Debian's reference plugins, each on a scratch host of its own.

All do the same work: an interface, an address of each family and default routes in a pod's network namespace; traffic
to the outside is masqueraded by ours and where the name says ipMasq. They are called alike (`benchmarks.peers.caller`).
Duplicate address detection is off in every namespace: with the kernel's default, ADD of ptp waits 1.8 s for it, which
would say nothing about the plugins.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.question import OURS
from rdmanet.config import DEFAULT_IPV4_RANGE, DEFAULT_IPV6_RANGE
from rdmanet.errors import RdmanetError, UnavailableError
from testbed.container import ENVIRONMENT, Process
from testbed.host import CNI_EXECUTABLE, REFERENCE_PLUGINS, SOCKET, Host
from testbed.session import session

#: The same ranges as the agent's own, so that all have as many addresses to choose from.
_IPAM = {
    "type": "host-local",
    "dataDir": "/run/host-local",
    "ranges": [[{"subnet": str(subnet)}] for subnet in (DEFAULT_IPV4_RANGE, DEFAULT_IPV6_RANGE)],
    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
}
#: The contenders: name → (executable, what its network configuration has besides the common keys).
PLUGINS: Mapping[str, tuple[Path, Mapping[str, Any]]] = {
    OURS: (CNI_EXECUTABLE, {"type": "rdmanet"}),
    "ptp": (REFERENCE_PLUGINS / "ptp", {"type": "ptp", "ipMasq": False, "ipam": _IPAM}),
    "ptp+ipMasq": (REFERENCE_PLUGINS / "ptp", {"type": "ptp", "ipMasq": True, "ipam": _IPAM}),
    "bridge": (REFERENCE_PLUGINS / "bridge", {"type": "bridge", "isGateway": True, "ipMasq": False, "ipam": _IPAM}),
    "bridge+ipMasq": (
        REFERENCE_PLUGINS / "bridge",
        {"type": "bridge", "isGateway": True, "ipMasq": True, "ipam": _IPAM},
    ),
}
#: A process that does nothing, called the same way: what the measuring itself costs.
EMPTY = "an empty process"
#: As the kernel's documentation has it (ip-sysctl.rst): `default` is for interfaces that come later.
NO_DETECTION = {f"/proc/sys/net/ipv6/conf/{name}/accept_dad": "0" for name in ("all", "default")}
DETECTION = {"/proc/sys/net/ipv6/conf/default/accept_dad": "1"}
#: So many namespaces are made with one request.
_BATCH = 100


class PluginError(RdmanetError):
    """A plugin refused, or left something."""


@dataclass
class Pod:
    """A network namespace of a scratch host, and the container that has it now."""

    netns: str
    number: int
    container_id: str = ""
    result: Any = None

    def renew(self) -> None:
        """A new container in the same namespace."""
        self.container_id = uuid.uuid4().hex
        self.result = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One call: its time, and what went wrong, or nothing."""

    elapsed_s: float
    error: str


@dataclass(frozen=True, slots=True)
class Calls:
    """What `Runtime.call` measured: every call by pod, the time of all together, and until nothing was left to do."""

    outcomes: tuple[tuple[Outcome, ...], ...]
    wall_s: float
    settled_s: float

    @property
    def errors(self) -> list[str]:
        """What went wrong, each sentence once."""
        return list(dict.fromkeys(o.error for outcomes in self.outcomes for o in outcomes if o.error))

    def elapsed_s(self, position: int = 0) -> list[float]:
        """The times of every pod's first, second … call that was made."""
        return [outcomes[position].elapsed_s for outcomes in self.outcomes if len(outcomes) > position]


@dataclass
class Runtime:
    """A scratch host with one plugin on it, and the caller that executes it as a runtime does."""

    name: str
    host: Host
    executable: Path
    configuration: Mapping[str, Any]
    caller: Process
    pods: list[Pod] = field(default_factory=list)

    @property
    def ours(self) -> bool:
        """Whether it has an agent."""
        return self.name == OURS

    # Namespaces

    def ensure(self, count: int) -> list[Pod]:
        """So many pods, with the namespaces that are missing made: a runtime's work, not the plugin's."""
        while (missing := count - len(self.pods)) > 0:
            first = len(self.pods)
            paths = [str(session().netns / f"{self.host.name}-{first + n}") for n in range(min(missing, _BATCH))]
            self.host.container.act(*(("netns", path) for path in paths))
            self.pods += [Pod(path, first + number) for number, path in enumerate(paths)]
            self.settings(paths, NO_DETECTION)
        return self.pods[:count]

    def drop(self, pods: Sequence[Pod]) -> None:
        """Deletes namespaces; the kernel takes what is in them."""
        gone = list(pods)
        for first in range(0, len(gone), _BATCH):
            some = gone[first : first + _BATCH]
            self.host.container.act(*(a for pod in some for a in (("umount", pod.netns), ("unlink", pod.netns))))
        self.pods = [pod for pod in self.pods if pod not in gone]

    def settings(self, netns: Sequence[str], values: Mapping[str, str]) -> None:
        """Writes sysctls inside namespaces and on the scratch host."""
        self._ask({"do": "settings", "netns": list(netns), "values": dict(values)})

    # Calls

    def call(
        self, commands: Sequence[str], pods: Sequence[Pod], at_once: int, configuration: Mapping[str, Any] | None = None
    ) -> Calls:
        """Each pod's calls one after another, so many pods at a time. After DELs, waits until all is removed.

        Where ADD is the first, it is of a new container. A chain ends with the call that fails; its outcome says so.
        """
        conf = {**self.configuration, **(configuration or {})}
        chains = []
        for pod in pods:
            if commands[0] == "ADD":
                pod.renew()
            chains.append([self._call(command, pod, conf, previous=i > 0) for i, command in enumerate(commands)])
        settled = SOCKET if self.ours and commands[-1] == "DEL" else None
        answer = self._ask({"do": "call", "chains": chains, "at_once": at_once, "settled": settled})
        outcomes = []
        for pod, results in zip(pods, answer["chains"], strict=True):
            outcomes.append(tuple(self._outcome(c, r) for c, r in zip(commands, results, strict=False)))
            if commands[-1] == "ADD" and not outcomes[-1][-1].error:
                pod.result = json.loads(results[-1]["output"])
        return Calls(tuple(outcomes), answer["wall_s"], answer["settled_s"])

    def execute(
        self, argv: Sequence[str], count: int, at_once: int, environment: Mapping[str, str] | None = None
    ) -> Calls:
        """Any other executable, by the same way; reads the configuration as all do."""
        document = {**self.configuration, "cniVersion": "1.1.0"}
        one = {"argv": list(argv), "environment": {**ENVIRONMENT, **(environment or {})}, "input": document}
        answer = self._ask({"do": "call", "chains": [[one]] * count, "at_once": at_once, "settled": None})
        outcomes = tuple((self._outcome(argv[0], results[0]),) for results in answer["chains"])
        return Calls(outcomes, answer["wall_s"], answer["settled_s"])

    def _call(self, command: str, pod: Pod, conf: Mapping[str, Any], previous: bool) -> dict[str, Any]:
        document = {**conf, "prevResult": pod.result} if pod.result and command != "ADD" else dict(conf)
        names = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod-{pod.number}"
        return {
            "argv": [str(self.executable)],
            "environment": {
                **ENVIRONMENT,
                "CNI_COMMAND": command,
                "CNI_PATH": str(self.executable.parent),
                "CNI_CONTAINERID": pod.container_id,
                "CNI_NETNS": pod.netns,
                "CNI_IFNAME": "eth0",
                "CNI_ARGS": names,
            },
            "input": document,
            "previous": previous,
        }

    def _outcome(self, what: str, result: Mapping[str, Any]) -> Outcome:
        error = ""
        if result["status"] != 0:
            error = f"{what} ended with status {result['status']}: {' '.join(result['output'].split())[:300]}"
        return Outcome(result["elapsed_s"], error)

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self.caller.stdin is not None
        assert self.caller.stdout is not None
        self.caller.stdin.write(json.dumps(request).encode() + b"\n")
        self.caller.stdin.flush()
        line = self.caller.stdout.readline()
        if not line:
            raise UnavailableError(f"the caller on {self.host.name} ended", operation=str(request["do"]))
        answer = json.loads(line)
        if "error" in answer:
            raise PluginError(f"{self.name}: {answer['error']}", operation=str(request["do"]))
        return answer


@contextlib.contextmanager
def runtime(
    name: str, host_name: str = "", *, agent: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[Runtime]:
    """A scratch host with an uplink and the contender of that name on it; ours with an agent (its configuration)."""
    executable, configuration = PLUGINS[name]
    if not executable.exists():
        hint = "run: make setup" if name == OURS else "install containernetworking-plugins"
        raise UnavailableError(f"{executable} is missing; {hint}", subject=name)
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(Host.scratch(host_name or name.replace("+", "-").lower()))
        host.connect_outside()
        script = str(Path(__file__).with_name("caller.py"))
        caller = stack.enter_context(
            host.popen([sys.executable, "-I", "-S", "-E", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        common = {"cniVersion": "1.0.0", "name": "bench"}
        found = Runtime(name, host, executable, {**common, **configuration}, caller)
        found.settings([], NO_DETECTION)
        if found.ours:
            host.start_agent(agent)
        yield found


@contextlib.contextmanager
def runtimes(names: Sequence[str]) -> Iterator[dict[str, Runtime]]:
    """The contenders of those names, all alive at the same time."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(runtime(name)) for name in names}
