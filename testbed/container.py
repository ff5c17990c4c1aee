"""Containers of the testbed: processes with namespaces of their own, and commands run inside them.

One mechanism for hosts, pods and the world outside. A container's first process (``container_init.py``) makes the
namespaces and starts every command as its own child, so that nothing has to be entered from outside: a command
gets its descriptors over a socket and costs one fork and one exec. The first process ends when its socket
closes, and takes everything with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rdmanet.errors import KernelError, RdmanetError, UnavailableError
from testbed.container_init import receive

INIT = Path(__file__).with_name("container_init.py")
DEFAULT_TIMEOUT_S = 60.0
#: How long a container may take to build or to end; generous, as emulated machines start Python in a second.
LIFE_TIMEOUT_S = 60.0
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/",
}


class CommandError(RdmanetError):
    """A command ended with another status than 0, or not in time; ``completed`` has what it printed."""

    def __init__(self, sentence: str, completed: Completed):
        super().__init__(sentence, operation="run", subject=" ".join(completed.argv[:4]))
        self.completed = completed


@dataclass(frozen=True, slots=True)
class Completed:
    """What a finished command left: its status (negative: the signal that ended it; None: it was ended at the
    deadline), its output, and how long it ran."""

    argv: tuple[str, ...]
    returncode: int | None
    stdout: str
    stderr: str
    elapsed_s: float

    def json(self) -> Any:
        """Standard output as JSON; ValueError otherwise."""
        return json.loads(self.stdout)


@dataclass(frozen=True, slots=True)
class Specification:
    """What a container is made of. `actions` run in order inside, after the namespaces exist (container_init.act)."""

    unshare: tuple[str, ...] = ()  # of: net mnt ipc uts pid cgroup
    join_netns: str | None = None  # path of a network namespace to enter first
    actions: tuple[tuple[Any, ...], ...] = ()
    hostname: str | None = None
    memlock_unlimited: bool = False
    capabilities: tuple[int, ...] | None = None  # numbers (capabilities(7)) that commands keep; None: all


class Process:
    """A running command inside a container; ``pid`` is its number in this process's pid namespace."""

    def __init__(self, argv: Sequence[str], pidfd: int, status: int, stdout: IO[bytes] | None, stdin: IO[bytes] | None):
        self.argv = tuple(argv)
        self.pidfd = pidfd
        self.pid = _pid_of(pidfd)
        self.stdout = stdout
        self.stdin = stdin
        self.returncode: int | None = None
        self._status = status
        self._lock = threading.Lock()

    def wait(self, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> int:
        """The exit status, negative for a signal; TimeoutError after `timeout_s`."""
        with self._lock:
            if self.returncode is None:
                poll = select.poll()
                poll.register(self._status, select.POLLIN)
                if not poll.poll(None if timeout_s is None else timeout_s * 1000):
                    raise TimeoutError(f"{' '.join(self.argv[:4])} still runs after {timeout_s} s")
                data = os.read(self._status, 4)
                # Nothing to read: the container's first process went away, and its children with it.
                self.returncode = struct.unpack("=i", data)[0] if data else -signal.SIGKILL
                os.close(self._status)
            return self.returncode

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        try:
            return self.wait(0)
        except TimeoutError:
            return None

    def signal(self, number: int) -> None:
        """Send a signal to the command itself; nothing happens when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.signal(signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """End the command if it runs and release all descriptors; idempotent."""
        if self.pidfd < 0:
            return
        if self.poll() is None:
            self.kill()
        os.close(self.pidfd)
        self.pidfd = -1
        for file in (self.stdin, self.stdout):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):
                    file.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Container:
    """A running container; made by `start`, ended by `stop` or by the end of this process."""

    def __init__(self, name: str, control: socket.socket, launcher: subprocess.Popen[bytes] | Process):
        self.name = name
        self.environment: Mapping[str, str] = ENVIRONMENT
        self.notes: tuple[str, ...] = ()
        self.pid = 0
        self._control = control
        self._launcher = launcher
        self._pidfd = -1
        self._lock = threading.Lock()

    @classmethod
    def start(
        cls,
        name: str,
        specification: Specification,
        *,
        inside: Container | None = None,
        cgroup: Cgroup | None = None,
    ) -> Container:
        """Make a container on this machine, or within the mount and network namespaces of another one, in `cgroup`.

        Raises KernelError with the kernel's reason where a namespace or a mount was refused.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        argv = [sys.executable, "-I", "-S", "-E", str(INIT), str(3 if inside else theirs.fileno())]
        launcher: subprocess.Popen[bytes] | Process
        try:
            if inside is None:
                # A session of its own: Ctrl-C is for the test, which then ends its containers in order.
                launcher = subprocess.Popen(
                    argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
                )
            else:
                launcher = inside.popen(argv, descriptors={3: theirs.fileno()})
        finally:
            theirs.close()
        container = cls(name, ours, launcher)
        try:
            ours.settimeout(LIFE_TIMEOUT_S)
            if cgroup is not None:
                cgroup.join(launcher.pid)  # it waits for its specification: everything it starts will be in it
            answer, descriptors = container._exchange(dataclasses.asdict(specification))
        except BaseException:
            container.stop()
            raise
        container.notes = tuple(answer["notes"])
        container._pidfd = descriptors[0]
        container.pid = _pid_of(descriptors[0])
        return container

    def _exchange(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        with self._lock:
            try:
                socket.send_fds(self._control, [json.dumps(request).encode()], list(descriptors))
                data, received = receive(self._control)
            except OSError as error:
                raise UnavailableError(
                    f"container {self.name} is not there any more", operation="request", errno=error.errno
                ) from error
        if not data:
            raise UnavailableError(f"container {self.name} ended", operation="request")
        answer: dict[str, Any] = json.loads(data)
        if not answer["ok"]:
            raise KernelError(answer["sentence"], subject=f"container {self.name}", errno=answer["errno"])
        return answer, received

    def act(self, *actions: Sequence[Any]) -> None:
        """Carry out actions (container_init.act) in the container's namespaces; KernelError if one fails."""
        self._exchange({"do": "act", "actions": [list(a) for a in actions]})

    def popen(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: str = "/",
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        descriptors: Mapping[int, int] | None = None,
    ) -> Process:
        """Start a command.

        `stdin` and `stdout` are descriptors, ``subprocess.PIPE`` or None for nothing; `stderr` is a descriptor or None
        for this process's own. `environment` is added to the container's; `descriptors` are further ones, by their
        number inside. KernelError when the command cannot be executed.
        """
        closing: list[int] = []
        files: list[IO[bytes] | None] = [None, None]
        given = {2: 2 if stderr is None else stderr, **(descriptors or {})}
        for target, choice in ((0, stdin), (1, stdout)):
            if choice is None:
                given[target] = os.open(os.devnull, os.O_RDWR)
                closing.append(given[target])
            elif choice == subprocess.PIPE:
                reader, writer = os.pipe()
                given[target], own = (reader, writer) if target == 0 else (writer, reader)
                closing.append(given[target])
                files[target] = os.fdopen(own, "wb" if target == 0 else "rb", buffering=0 if target == 0 else -1)
            else:
                given[target] = choice
        status_reader, status_writer = os.pipe()
        closing.append(status_writer)
        try:
            _, received = self._exchange(
                {
                    "do": "spawn",
                    "argv": list(argv),
                    "env": {**self.environment, **(environment or {})},
                    "cwd": cwd,
                    "targets": list(given),
                },
                [*given.values(), status_writer],
            )
        except BaseException:
            os.close(status_reader)
            for file in files:
                if file is not None:
                    file.close()
            raise
        finally:
            for descriptor in closing:
                os.close(descriptor)
        return Process(argv, received[0], status_reader, stdin=files[0], stdout=files[1])

    def exec(
        self,
        argv: Sequence[str],
        *,
        input: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
        cwd: str = "/",
    ) -> Completed:
        """Run a command to its end; CommandError when it fails (unless not `check`) or is not done in `timeout_s`."""
        started = time.monotonic()
        # Files in memory instead of pipes: nothing has to be read while the command runs.
        with contextlib.ExitStack() as stack:
            stdin, stdout, stderr = (
                stack.enter_context(os.fdopen(os.memfd_create(name), "w+b")) for name in ("stdin", "stdout", "stderr")
            )
            stdin.write(input.encode())
            stdin.seek(0)
            process = stack.enter_context(
                self.popen(
                    argv,
                    environment=environment,
                    cwd=cwd,
                    stdin=stdin.fileno(),
                    stdout=stdout.fileno(),
                    stderr=stderr.fileno(),
                )
            )
            returncode: int | None
            try:
                returncode = process.wait(timeout_s)
            except TimeoutError:
                returncode = None
                process.kill()
            elapsed_s = time.monotonic() - started
            output = []
            for file in (stdout, stderr):
                file.seek(0)
                output.append(file.read().decode(errors="replace"))
        completed = Completed(tuple(argv), returncode, output[0], output[1], elapsed_s)
        last = (output[1].strip() or output[0].strip()).splitlines()[-3:]
        said = ": " + " / ".join(last) if last else ""
        if returncode is None:
            raise CommandError(f"not done after {timeout_s:g} s in {self.name}{said}", completed)
        if check and returncode != 0:
            raise CommandError(f"ended with status {returncode} in {self.name}{said}", completed)
        return completed

    def stop(self) -> None:
        """End the container and every process in it, and wait until they are gone; idempotent."""
        self._control.close()
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1
        if isinstance(self._launcher, Process):
            self._launcher.wait(LIFE_TIMEOUT_S)
            self._launcher.close()
        else:
            self._launcher.wait(LIFE_TIMEOUT_S)

    def __enter__(self) -> Container:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _pid_of(pidfd: int) -> int:
    """The number of a pidfd's process in this process's pid namespace (proc(5), fdinfo)."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            return int(line.split()[1])
    raise KernelError("the kernel does not say which process a pidfd is", operation="fdinfo")


def cgroup2_root() -> Path:
    """Where the cgroup2 hierarchy is mounted, pure or hybrid; UnavailableError without one."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        fields, _, rest = line.partition(" - ")
        if rest.split()[0] == "cgroup2":  # the last: earlier ones may lie hidden below later mounts
            return Path(fields.split()[4])
    raise UnavailableError("no cgroup2 hierarchy is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup")


@dataclass
class Cgroup:
    """A cgroup2 group for one container, below ``rdmanet-testbed``; `remove` ends what still runs in it."""

    name: str
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.path = cgroup2_root() / "rdmanet-testbed" / self.name

    def create(self) -> Cgroup:
        """Make it; the parent is shared by all and stays until the last one goes."""
        self.path.mkdir(parents=True)
        return self

    def join(self, pid: int) -> None:
        """Move a process into it."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def pids(self) -> list[int]:
        """The processes in it now."""
        return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]

    def remove(self, timeout_s: float = LIFE_TIMEOUT_S) -> None:
        """End its processes, wait until it is empty (cgroup.events wakes the poll), remove it; idempotent."""
        try:
            events = (self.path / "cgroup.events").open()
        except FileNotFoundError:
            return
        with events:
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            deadline = time.monotonic() + timeout_s
            (self.path / "cgroup.kill").write_text("1")
            while "populated 1" in events.read():
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise TimeoutError(f"processes of {self.path} did not end within {timeout_s} s")
                events.seek(0)
        for group in sorted(self.path.rglob("*/"), key=lambda p: -len(p.parts)):
            group.rmdir()
        self.path.rmdir()
        with contextlib.suppress(OSError):  # not empty: other containers are still there
            self.path.parent.rmdir()


def require_root() -> None:
    """UnavailableError unless this process can make namespaces."""
    if os.geteuid() != 0:
        raise UnavailableError("the testbed makes namespaces and needs root")
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise UnavailableError(f"{program} is missing; install iproute2")
