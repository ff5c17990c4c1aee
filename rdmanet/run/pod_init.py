"""The first process of a job's pod: its namespaces, its /dev, its limits; then it starts the command, passes signals
on and reaps. Standard library only.

Started as ``python -I -S -E pod_init.py CONTROL`` where CONTROL is a SOCK_SEQPACKET socket to the launcher. Messages
are JSON. It gets the specification (``rdmanet.run.process.Specification``), answers ``{"ready": true}``, gets
``{"start": true}``, answers ``{"started": true}``, then takes ``{"signal": N}`` until it says ``{"status": N}``, and
ends, and with it every process in the pod. What fails is ``{"refused": sentence, "errno": N}``. When the launcher's end
closes, the pod ends: nothing outlives its launcher.

A file of its own, run without site packages and without the user's environment: it has all privileges of root.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
from typing import Any, NoReturn

# include/uapi/linux/sched.h; os.unshare and os.setns exist from Python 3.12 only.
NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000  # mnt, cgroup, uts, ipc, pid
CLONE_NEWNET = 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_SLAVE = 4096, 16384, 1 << 19
MNT_DETACH = 2
QUIET = MS_NOSUID | MS_NODEV | MS_NOEXEC
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 24, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
CAPABILITY_VERSION_3 = 0x20080522
MESSAGE_MAX_BYTES = 1 << 22

#: capabilities(7) by number: what container runtimes give by default, less mknod (27).
CAPABILITIES = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 29, 31}
#: Documentation/admin-guide/devices.txt
COMMON_NODES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
LINKS = {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
#: Root may write there whatever its capabilities.
READ_ONLY = ("/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus")

_libc = ctypes.CDLL(None, use_errno=True)


class Refusal(Exception):
    """Something that cannot be done, as a sentence for the launcher."""

    def __init__(self, sentence: str, number: int | None):
        super().__init__(sentence)
        self.message = {"refused": sentence, "errno": number}


def check(result: int, what: str) -> None:
    """Raises OSError with what was tried."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, fstype: str, flags: int, data: str = "") -> None:
    arguments = source.encode(), target.encode(), fstype.encode(), ctypes.c_ulong(flags), data.encode()
    check(_libc.mount(*arguments), f"mount {fstype or source} on {target}")


def unmount(target: str) -> None:
    """Everything that is mounted there, one over the other."""
    while _libc.umount2(target.encode(), MNT_DETACH) == 0:
        pass
    if ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):  # nothing is mounted there
        check(-1, f"unmount {target}")


def let_go_of_namespaces() -> None:
    """Unmounts the namespaces that the copied mount table holds: bound in it they would outlive their pods."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:  # noqa: PTH123
        lines = file.read().splitlines()
    for line in lines:
        fields, _, rest = line.partition(" - ")
        if rest.startswith("nsfs "):
            unmount(fields.split()[4].encode().decode("unicode_escape"))


def make_dev(nodes: list[tuple[str, int, int]], hosts: str) -> None:
    """A /dev of the pod's own, and its /etc/hosts."""
    unmount("/dev")
    mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=64k")
    for name in ("pts", "shm", "mqueue"):
        os.mkdir(f"/dev/{name}")  # noqa: PTH102
    wanted = {f"/dev/{name}": numbers for name, numbers in COMMON_NODES.items()}
    wanted |= {path: (major, minor) for path, major, minor in nodes}
    for path, (major, minor) in wanted.items():
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)  # noqa: PTH103, PTH120
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))
        os.chmod(path, 0o666)  # noqa: PTH101 - mknod obeys the umask
    for name, target in LINKS.items():
        os.symlink(target, f"/dev/{name}")  # noqa: PTH211
    mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
    mount("tmpfs", "/dev/shm", "tmpfs", QUIET, "mode=1777")
    with contextlib.suppress(OSError):  # a kernel without POSIX message queues
        mount("mqueue", "/dev/mqueue", "mqueue", QUIET)
    with open("/dev/hosts", "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(hosts)
    mount("/dev/hosts", "/etc/hosts", "", MS_BIND)
    os.unlink("/dev/hosts")  # noqa: PTH108 - it stays at /etc/hosts


def make_mounts(specification: dict[str, Any]) -> None:
    """The host's files, with the pod's own /dev, /proc and /sys, and nothing of the agent's."""
    # What the host unmounts later goes here too; what is mounted here stays here.
    mount("none", "/", "", MS_REC | MS_SLAVE)
    let_go_of_namespaces()
    for path in specification["masked"]:
        if os.path.isdir(path):  # noqa: PTH112
            mount("tmpfs", path, "tmpfs", MS_RDONLY | QUIET, "mode=700")
    make_dev(specification["nodes"], specification["hosts"])
    unmount("/proc")
    mount("proc", "/proc", "proc", QUIET)
    for path in READ_ONLY:
        if os.path.exists(path):  # noqa: PTH110
            mount(path, path, "", MS_BIND)
            mount("none", path, "", MS_REMOUNT | MS_BIND | MS_RDONLY | QUIET)
    # Shows the pod's own network and, in exclusive mode, RDMA devices.
    unmount("/sys")
    mount("sysfs", "/sys", "sysfs", QUIET | MS_RDONLY)


def lift_memlock() -> None:
    """Memory that RDMA devices use is locked."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, PermissionError):  # no CAP_SYS_RESOURCE here: as far as it goes
        hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def limit_capabilities() -> None:
    """What the command can have at most, whatever it executes. This process keeps its own: so the command cannot trace
    it."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:  # noqa: PTH123
        last = int(file.read())
    for capability in range(last + 1):
        if capability not in CAPABILITIES:
            check(_libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0), f"drop capability {capability}")
    check(_libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "clear the ambient capabilities")
    check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "set no_new_privs")
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable; twice 32 of each
    check(_libc.capget(header, sets), "read capabilities")
    effective, permitted, _, more_effective, more_permitted, _ = struct.unpack("=6I", sets.raw)
    check(
        _libc.capset(header, struct.pack("=6I", effective, permitted, 0, more_effective, more_permitted, 0)),
        "clear the inheritable capabilities",
    )


class Init:
    """Starts the command, reaps, passes signals on, and ends when the launcher's end closes."""

    def __init__(self, control: socket.socket, specification: dict[str, Any]):
        self._control = control
        self._specification = specification
        self._command = 0
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        os.set_blocking(self._reader, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python's own handler would let the command end this process
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def start(self) -> None:
        """Starts the command; Refusal when it cannot be executed."""
        complaint_reader, complaint_writer = os.pipe()
        self._command = os.fork()
        if self._command == 0:
            self._become(complaint_writer)
        os.close(complaint_writer)
        complaint = os.read(complaint_reader, 4096).decode()  # empty: the pipe was closed by exec
        os.close(complaint_reader)
        if complaint:
            number, _, sentence = complaint.partition(" ")
            raise Refusal(sentence, int(number))

    def _become(self, complaint: int) -> NoReturn:
        wanted = self._specification
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            os.setsid()
            os.umask(wanted["umask"])
            if wanted["user"] is not None:
                user, group, groups = wanted["user"]
                os.setgroups(groups)
                os.setresgid(group, group, group)
                os.setresuid(user, user, user)
            os.chdir(wanted["cwd"])
            os.execvpe(wanted["argv"][0], wanted["argv"], wanted["environment"])
        except OSError as error:
            what = f"{wanted['argv'][0]} cannot be started in {wanted['cwd']}: {error.strerror}"
            os.write(complaint, f"{error.errno} {what}".encode())
        finally:
            os._exit(127)

    def serve(self) -> int | None:
        """The command's status, negative for a signal; None where the launcher is gone."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._reader, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self._reader:
                    os.read(self._reader, 4096)
                    status = self._reap()
                    if status is not None:
                        return status
                elif not self._obey():
                    return None

    def _reap(self) -> int | None:
        found = None
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._command:
                    found = os.waitstatus_to_exitcode(ended[1])
        return found

    def _obey(self) -> bool:
        message = receive(self._control)
        if message is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            if message["signal"] == signal.SIGKILL:
                os.kill(-1, signal.SIGKILL)  # everything in the pod but this process
            else:
                os.killpg(self._command, message["signal"])  # as a terminal does
        return True


def receive(control: socket.socket) -> dict[str, Any] | None:
    """One message; None where the launcher is gone."""
    try:
        data = control.recv(MESSAGE_MAX_BYTES)
    except ConnectionError:
        return None
    message: dict[str, Any] | None = json.loads(data) if data else None
    return message


def tell(control: socket.socket, message: dict[str, Any]) -> None:
    """To the launcher, if it is there."""
    with contextlib.suppress(ConnectionError):
        control.send(json.dumps(message).encode())


def enter(specification: dict[str, Any]) -> None:
    """Cgroup, then the namespaces."""
    if specification["cgroup"]:
        with open(f"{specification['cgroup']}/cgroup.procs", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write("0")
    descriptor = os.open(specification["netns"], os.O_RDONLY | os.O_CLOEXEC)
    check(_libc.setns(descriptor, CLONE_NEWNET), f"enter {specification['netns']}")
    os.close(descriptor)
    check(_libc.unshare(NEW_NAMESPACES), "unshare namespaces")


def first(control: socket.socket, specification: dict[str, Any]) -> None:
    """The pod's process 1."""
    make_mounts(specification)
    name = specification["hostname"].encode()
    check(_libc.sethostname(name, len(name)), "set the host name")
    lift_memlock()
    limit_capabilities()
    init = Init(control, specification)
    tell(control, {"ready": True})
    if receive(control) is None:
        return
    init.start()
    tell(control, {"started": True})
    status = init.serve()
    if status is not None:
        tell(control, {"status": status})


def main() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    control = socket.socket(fileno=int(sys.argv[1]))
    for descriptor in map(int, sys.argv[1:]):  # the others are locks that last as long as this process
        os.set_inheritable(descriptor, False)
    specification = receive(control)
    if specification is None:
        return
    try:
        enter(specification)
        pid = os.fork()
        if pid:
            control.close()
            os.waitpid(pid, 0)
            os._exit(0)
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        first(control, specification)
    except Refusal as error:
        tell(control, error.message)
    except OSError as error:
        sentence = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        tell(control, {"refused": sentence, "errno": error.errno})
    os._exit(0)  # with a pid namespace's first process everything in it ends


if __name__ == "__main__":
    main()
