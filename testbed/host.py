"""The host that the agent runs on: the machine itself, or a scratch host with its own network on the same kernel.

A scratch host has its own network and mount namespaces, /run, /var/lib/rdmanet, sysfs and bpffs: nothing that the agent
does there reaches the machine. Both kinds look the same to callers.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rdmanet.errors import UnavailableError
from testbed.container import (
    Cgroup,
    CommandError,
    Completed,
    Container,
    Process,
    Specification,
    require_root,
)
from testbed.outside import Outside
from testbed.paths import BUILD, REPOSITORY
from testbed.pod import Pod
from testbed.session import session

CNI_EXECUTABLE = BUILD / "cni" / "rdmanet"
#: Where Debian's containernetworking-plugins has them.
REFERENCE_PLUGINS = Path("/usr/lib/cni")
ARTIFACT = BUILD / "artifact"
SOCKET = "/run/rdmanet/agent.sock"
#: Emulated on a busy machine, importing the agent alone takes half a minute.
READY_TIMEOUT_S = 300.0
DUMP = Path(__file__).with_name("dump.py")

Dump = dict[str, Any]


@dataclass(frozen=True, slots=True)
class CniOutcome:
    """What a runtime sees of one execution: status, standard output as JSON (None when empty), time."""

    command: str
    returncode: int
    output: dict[str, Any] | None
    stderr: str
    elapsed_s: float

    @property
    def sentence(self) -> str:
        """An error's code and message, for people."""
        if self.output is None or "code" not in self.output:
            return ""
        details = f" ({self.output['details']})" if self.output.get("details") else ""
        return f"code {self.output['code']}: {self.output.get('msg', '')}{details}"


class Agent:
    """A running agent: its process, and its log (standard error and output) as it grows."""

    def __init__(self, process: Process, log: IO[bytes]):
        self.process = process
        self._log = log
        self._ready = threading.Event()
        self._said_so = False
        self._reader = threading.Thread(target=self._read, name="agent-log", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._log.write(line)
            self._log.flush()
            if line == b"ready\n":  # rdmanet.agent prints it when the world may ask
                self._said_so = True
                self._ready.set()
        self._ready.set()  # the agent ended: `wait_ready` finds out how

    def wait_ready(self, timeout_s: float) -> None:
        """Return when the agent says that it is ready; CommandError with its last words otherwise."""
        waited = self._ready.wait(timeout_s)
        if waited and not self._said_so:
            self.process.wait()  # its output has ended, its status is on the way
        if not self._said_so or self.process.poll() is not None:
            completed = Completed(self.process.argv, self.process.poll(), "", self.log, timeout_s)
            words = " / ".join(self.log.strip().splitlines()[-3:])
            state = "ended before it was ready" if waited else f"is not ready after {timeout_s:g} s"
            raise CommandError(f"the agent {state}: {words}", completed)

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return Path(self._log.name).read_text(errors="replace")

    def end(self, number: int, timeout_s: float = READY_TIMEOUT_S) -> int:
        """Send a signal, wait for the end, return the status."""
        self.process.signal(number)
        status = self.process.wait(timeout_s)
        self._reader.join()
        self.process.close()
        self._log.close()
        return status


class Host:
    """Where an agent runs; made by `machine` or `scratch`, ended by `stop`."""

    def __init__(self, name: str, kind: str, container: Container, cgroup: Cgroup):
        self.name = name
        self.kind = kind
        self.container = container
        self.agent: Agent | None = None
        self.outside: Outside | None = None
        self._cgroup = cgroup
        self._groups: list[Cgroup] = []
        self.stopped = False

    @classmethod
    def machine(cls, name: str = "machine") -> Host:
        """The machine itself, in this process's own namespaces: for throwaway machines only."""
        return cls._start(name, "machine", Specification())

    @classmethod
    def scratch(cls, name: str, *, bpffs: bool = True) -> Host:
        """A host with its own network and mount namespaces and only lo. `bpffs` False leaves it unmounted."""
        actions: list[tuple[Any, ...]] = [
            ("mount", "tmpfs", "/run", "tmpfs", 0, "mode=755"),
            # The mount point may have to be made, and stays: another scratch host may be using it.
            ("mkdir", "/var/lib/rdmanet"),
            ("mount", "tmpfs", "/var/lib/rdmanet", "tmpfs", 0, "mode=755"),
            ("umount", "/sys"),
            ("mount", "sysfs", "/sys", "sysfs", 0, ""),
            ("mount", "cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""),
        ]
        if bpffs:
            actions.append(("mount", "bpf", "/sys/fs/bpf", "bpf", 0, "mode=700"))
        host = cls._start(name, "scratch", Specification(unshare=("net", "mnt"), actions=tuple(actions)))
        host.ip("link set lo up")
        return host

    @classmethod
    def _start(cls, name: str, kind: str, specification: Specification) -> Host:
        require_root()
        cgroup = session().cgroup(name).create()
        try:
            container = Container.start(name, specification, cgroup=cgroup)
        except BaseException:
            cgroup.remove()
            raise
        container.environment = dict(os.environ)
        host = cls(name, kind, container, cgroup)
        container.act(("mkdir", str(session().netns)))
        return host

    def group(self, name: str) -> Cgroup:
        """A cgroup without processes, for a runtime that puts its containers below; they end with the host."""
        self._groups.append(session().cgroup(f"{self.name}-{name}").create())
        return self._groups[-1]

    def path(self, inside: str | Path) -> Path:
        """A path of the host as this process reaches it."""
        return Path(f"/proc/{self.container.pid}/root{inside}")

    def exec(self, argv: Sequence[str], **options: Any) -> Completed:
        """Run a command on the host to its end (testbed.container.Container.exec)."""
        return self.container.exec(argv, **options)

    def popen(self, argv: Sequence[str], **options: Any) -> Process:
        """Start a command on the host (testbed.container.Container.popen)."""
        return self.container.popen(argv, **options)

    def ip(self, *lines: str) -> None:
        """Run ip commands (``ip -batch``) on the host."""
        self.exec(["ip", "-batch", "-"], input="\n".join(lines) + "\n")

    def connect_outside(self, *, mtu_bytes: int = 1500) -> Outside:
        """Give the host an uplink, default routes and a world behind them (testbed.outside)."""
        self.outside = Outside.connect(self, mtu_bytes=mtu_bytes)
        return self.outside

    def create_netns(self, name: str) -> str:
        """Bind a new network namespace; returns its path on the host."""
        path = str(session().netns / f"{self.name}-{name}")
        self.container.act(("netns", path))
        return path

    def delete_netns(self, path: str) -> None:
        """Remove a bound network namespace; idempotent."""
        if not self.stopped and self.path(path).exists():
            self.container.act(("umount", path), ("unlink", path))

    def start_agent(
        self,
        config: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        timeout_s: float = READY_TIMEOUT_S,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "rdmanet", "agent"),
    ) -> float:
        """Start the agent and wait until it says that it is ready; returns the seconds that took.

        `config` is its TOML file as sections of keys; unless it says otherwise the artifact is the one that
        ``make setup`` built. `program` is what Python runs: another way to start the same agent.
        """
        if self.agent is not None:
            raise UnavailableError(f"an agent runs on {self.name} already")
        file = self.write_config(config)
        return self.run_agent(
            [sys.executable, *program, "--config", file], environment=environment, timeout_s=timeout_s
        )

    def write_config(self, config: Mapping[str, Mapping[str, Any]] | None) -> str:
        """The agent's configuration file, as `start_agent` writes it; returns its path."""
        sections = {**{k: dict(v) for k, v in (config or {}).items()}}
        sections.setdefault("datapath", {}).setdefault("artifact_dir", str(ARTIFACT))
        file = self._config_file()
        self.container.act(("write", file, toml(sections)))
        return file

    def run_agent(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = READY_TIMEOUT_S,
    ) -> float:
        """Start the agent by a command of another's, such as a container runtime's, as `start_agent` does."""

        def begin(output: int) -> Process:
            variables = {"PYTHONUNBUFFERED": "1", **(environment or {})}
            return self.popen(argv, cwd=str(REPOSITORY), stdout=output, stderr=output, environment=variables)

        return self.begin_agent(begin, timeout_s=timeout_s)

    def begin_agent(self, begin: Callable[[int], Process], *, timeout_s: float = READY_TIMEOUT_S) -> float:
        """Start the agent by a function that is told to which descriptor it prints, as `start_agent` does."""
        if self.agent is not None:
            raise UnavailableError(f"an agent runs on {self.name} already")
        started = time.monotonic()
        log = tempfile.NamedTemporaryFile(prefix=f"rdmanet-{self.name}-", suffix=".log", dir=session().path)  # noqa: SIM115
        reader, writer = os.pipe()
        process = begin(writer)
        os.close(writer)
        process.stdout = os.fdopen(reader, "rb")
        self.agent = Agent(process, log)
        try:
            self.agent.wait_ready(timeout_s)
        except CommandError:
            self.kill_agent()
            raise
        return time.monotonic() - started

    def kill_agent(self) -> None:
        """End the agent with SIGKILL, as a crash does; idempotent."""
        if self.agent is not None:
            self.agent.end(9)
            self.agent = None

    def stop_agent(self) -> int:
        """End the agent with SIGTERM, as a service manager does; returns its exit status."""
        if self.agent is None:
            raise UnavailableError(f"no agent runs on {self.name}")
        status = self.agent.end(15)
        self.agent = None
        return status

    def cni(
        self,
        command: str,
        pod: Pod | None,
        conf: Mapping[str, Any],
        *,
        args: str | None = None,
        netns: str | None = None,
        ifname: str | None = None,
        executable: Path = CNI_EXECUTABLE,
        timeout_s: float = 90.0,
    ) -> CniOutcome:
        """Execute the CNI plugin as a runtime does; never raises for an error that the plugin reports.

        `args` is CNI_ARGS (by default the pod's Kubernetes names); `netns` and `ifname` override the pod's, "" is a
        pod that is gone. `executable` is another plugin than ours.
        """
        environment = {"CNI_COMMAND": command, "CNI_PATH": f"{CNI_EXECUTABLE.parent}:{REFERENCE_PLUGINS}"}
        if pod is not None:
            environment |= {
                "CNI_CONTAINERID": pod.container_id,
                "CNI_NETNS": pod.netns if netns is None else netns,
                "CNI_IFNAME": pod.ifname if ifname is None else ifname,
                "CNI_ARGS": kubernetes_args(pod) if args is None else args,
            }
        if not executable.exists():
            raise UnavailableError(f"{executable} is missing; run: make setup")
        done = self.exec(
            [str(executable)], input=json.dumps(conf), environment=environment, check=False, timeout_s=timeout_s
        )
        try:
            output = done.json() if done.stdout.strip() else None
        except ValueError as error:
            raise CommandError(f"the CNI plugin printed no JSON: {done.stdout[:200]!r}", done) from error
        return CniOutcome(command, done.returncode or 0, output, done.stderr, done.elapsed_s)

    def api(self, method: str, path: str, body: Any = None, *, timeout_s: float = 30.0) -> Any:
        """One request to the agent's API; the answer as JSON, or as text where it is not JSON."""
        connection = _UnixConnection(str(self.path(SOCKET)), timeout_s)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status >= 400:
            raise UnavailableError(
                f"the agent answered {response.status}: {text.strip()}", operation=method, subject=path
            )
        return json.loads(text) if "json" in (response.getheader("Content-Type") or "") else text

    def settle(self, *, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Return when the agent, if one runs, has removed every link that DELs have left to it."""
        if self.agent is not None and self.agent.process.poll() is None:
            self.api("GET", f"/v1/settled?timeout_s={timeout_s:g}", timeout_s=timeout_s + 5)

    def uninstall(self, *, timeout_s: float = READY_TIMEOUT_S) -> Completed:
        """``rdmanet uninstall`` with the last agent's configuration; no agent may run."""
        return self.exec(
            [sys.executable, "-m", "rdmanet", "uninstall", "--config", self._config_file()],
            cwd=str(REPOSITORY),
            timeout_s=timeout_s,
        )

    def _config_file(self) -> str:
        return f"/run/rdmanet-testbed/{session().id}/{self.name}.toml"

    def dump(self) -> Dump:
        """Everything that must be as before once rdmanet is gone (testbed.dump says what), when all has settled."""
        self.settle()
        dump: Dump = self.exec([sys.executable, "-I", "-S", "-E", str(DUMP)], timeout_s=120).json()
        if self.kind == "scratch":
            del dump["cgroups"]  # the machine's, where others come and go
        return dump

    def stop(self) -> None:
        """End the agent, the world and the host, with every process in them. Idempotent."""
        if self.stopped:
            return
        self.kill_agent()
        if self.outside is not None:
            self.outside.disconnect()
            self.outside = None
        self.stopped = True
        self.container.stop()
        for group in (*self._groups, self._cgroup):
            group.remove()

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def kubernetes_args(pod: Pod) -> str:
    """CNI_ARGS as the kubelet's runtimes send them."""
    return f"IgnoreUnknown=1;K8S_POD_NAMESPACE={pod.namespace};K8S_POD_NAME={pod.name}"


def toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """A TOML document of one level; JSON's texts, numbers, truths and lists are TOML's."""
    lines = []
    for section, keys in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def diff(before: Dump, after: Dump) -> list[str]:
    """Every difference as a line ``section: - value`` (gone) or ``+ value`` (new); empty when equal byte for byte."""
    lines = []
    for section in sorted({*before, *after}):
        old, new = (_flat(dump.get(section)) for dump in (before, after))
        lines += [f"{section}: - {value}" for value in old if value not in new]
        lines += [f"{section}: + {value}" for value in new if value not in old]
    if not lines and before != after:
        lines.append("the dumps differ in order or number only")
    return lines


def _flat(value: Any) -> dict[str, None]:
    """The comparable parts of a section, in order."""
    if isinstance(value, dict):
        parts = [f"{key} = {json.dumps(item, sort_keys=True)}" for key, item in value.items()]
    elif isinstance(value, list):
        parts = [json.dumps(item, sort_keys=True) for item in value]
    else:
        parts = [json.dumps(value)]
    return dict.fromkeys(parts)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float):
        super().__init__("agent", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
