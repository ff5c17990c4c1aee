"""The first process of a testbed container, and the way commands get into it. Standard library only.

Started as ``python -I -S -E container_init.py FD`` where FD is a SOCK_SEQPACKET socket. The first message is the
specification (``testbed.container.Specification`` as JSON); every later one is a request. Each answer is JSON:
``{"ok": true, ...}`` or ``{"ok": false, "errno": N|null, "sentence": "..."}``. When the other end closes, the
container ends: a test that crashes leaves no process behind.

A file of its own, run without site packages, because a container starts often and inside an emulated machine
where every import costs.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any, NoReturn

# include/uapi/linux/sched.h; os.unshare and os.setns exist from Python 3.12 only.
CLONE_FLAGS = {
    "mnt": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_MOUNT_SETATTR = 442  # the same number on every architecture (asm-generic/unistd.h)
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_CAPBSET_DROP = 1, 24
FIRST_SPARE_DESCRIPTOR = 200
MESSAGE_MAX_BYTES = 1 << 20
DESCRIPTORS_MAX = 16

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    _check(
        _libc.mount(source.encode(), target.encode(), fstype.encode(), ctypes.c_ulong(flags), data.encode()),
        f"mount {fstype or source} on {target}",
    )


def _unmount(target: str) -> None:
    if _libc.umount2(target.encode(), MNT_DETACH) < 0 and ctypes.get_errno() != errno.EINVAL:  # nothing was mounted
        _check(-1, f"unmount {target}")


def _read_only(target: str, recursive: bool) -> None:
    attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)  # struct mount_attr
    result = _libc.syscall(
        SYS_MOUNT_SETATTR,
        ctypes.c_int(AT_FDCWD),
        target.encode(),
        ctypes.c_uint(AT_RECURSIVE if recursive else 0),
        attributes,
        ctypes.c_size_t(len(attributes)),
    )
    _check(result, f"make {target} read-only")


def _new_netns(path: str) -> None:
    """Bind a new network namespace at `path`; a child makes it, as unsharing would move this process."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o444))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 0
        try:
            _check(_libc.unshare(CLONE_FLAGS["net"]), "unshare a network namespace")
            _mount("/proc/self/ns/net", path, "", MS_BIND, "")
        except OSError as error:
            os.write(writer, f"{error.errno} {error.strerror}".encode())
            status = 1
        os._exit(status)
    os.close(writer)
    complaint = os.read(reader, 4096).decode()
    os.close(reader)
    os.waitpid(pid, 0)
    if complaint:
        os.unlink(path)  # noqa: PTH108 - pathlib would double the start time here
        number, _, sentence = complaint.partition(" ")
        raise OSError(int(number), sentence)


def act(actions: list[list[Any]]) -> None:
    """Carry out ``[verb, argument...]`` lists in order; OSError on the first that fails."""
    for verb, *arguments in actions:
        if verb == "mount":
            _mount(*arguments)
        elif verb == "read_only":
            _read_only(*arguments)
        elif verb == "umount":
            _unmount(arguments[0])
        elif verb == "mask":
            if os.path.isdir(arguments[0]):  # noqa: PTH112
                _mount("tmpfs", arguments[0], "tmpfs", MS_RDONLY, "mode=700")
        elif verb == "mkdir":
            os.makedirs(arguments[0], mode=0o755, exist_ok=True)  # noqa: PTH103
        elif verb == "mknod":
            path, mode, major, minor = arguments
            os.mknod(path, mode, os.makedev(major, minor))
            os.chmod(path, mode & 0o7777)  # noqa: PTH101 - mknod obeys the umask, a runtime's nodes do not
        elif verb == "symlink":
            os.symlink(*arguments)  # noqa: PTH211
        elif verb == "write":
            with open(arguments[0], "w", encoding="utf-8") as file:  # noqa: PTH123
                file.write(arguments[1])
        elif verb == "unlink":
            os.unlink(arguments[0])  # noqa: PTH108
        elif verb == "netns":
            _new_netns(arguments[0])
        else:
            raise ValueError(f"unknown action {verb!r}")


def _let_go_of_namespaces() -> None:
    """Unmount the namespaces that the copied mount table holds: bound in it they would outlive their pods."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:  # noqa: PTH123
        lines = file.read().splitlines()
    for line in lines:
        fields, _, rest = line.partition(" - ")
        if rest.startswith("nsfs "):
            _unmount(fields.split()[4])


def _enter(specification: dict[str, Any]) -> None:
    if specification["join_netns"]:
        descriptor = os.open(specification["join_netns"], os.O_RDONLY | os.O_CLOEXEC)
        _check(_libc.setns(descriptor, CLONE_FLAGS["net"]), f"enter {specification['join_netns']}")
        os.close(descriptor)
    flags = 0
    for name in specification["unshare"]:
        flags |= CLONE_FLAGS[name]
    if flags:
        _check(_libc.unshare(flags), "unshare " + " ".join(specification["unshare"]))


def _prepare(specification: dict[str, Any]) -> list[str]:
    """Mounts, name, limits, capabilities; returns notes on what this machine did not allow."""
    notes = []
    if "mnt" in specification["unshare"]:
        _mount("none", "/", "", MS_REC | MS_PRIVATE, "")
        _let_go_of_namespaces()
    act(specification["actions"])
    if specification["hostname"]:
        name = specification["hostname"].encode()
        _check(_libc.sethostname(name, len(name)), "set the host name")
    if specification["memlock_unlimited"]:
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        except (ValueError, PermissionError):
            # Raising the hard limit takes CAP_SYS_RESOURCE, which some sandboxes withhold.
            hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
            notes.append(f"memlock stays at {hard} bytes: no CAP_SYS_RESOURCE")
    if specification["capabilities"] is not None:
        with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:  # noqa: PTH123
            last = int(file.read())
        for capability in range(last + 1):
            if capability not in specification["capabilities"]:
                _check(_libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0), f"drop capability {capability}")
    return notes


class Init:
    """Serves requests, reaps children, and ends when its control socket closes."""

    def __init__(self, control: socket.socket):
        self._control = control
        self._status_descriptors: dict[int, int] = {}
        self._wakeup_reader, wakeup_writer = os.pipe()
        os.set_blocking(wakeup_writer, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup_writer, warn_on_full_buffer=False)

    def serve(self) -> None:
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wakeup_reader, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self._wakeup_reader:
                    os.read(self._wakeup_reader, 4096)
                    self._reap()
                elif not self._answer():
                    return

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            # Orphans of commands arrive here too: nobody asked for their status.
            descriptor = self._status_descriptors.pop(pid, None)
            if descriptor is not None:
                with contextlib.suppress(BrokenPipeError):  # whoever started it is no longer interested
                    os.write(descriptor, struct.pack("=i", os.waitstatus_to_exitcode(status)))
                os.close(descriptor)

    def _answer(self) -> bool:
        data, descriptors = receive(self._control)
        if not data:
            return False
        attached: list[int] = []
        try:
            request = json.loads(data)
            answer: dict[str, Any] = {"ok": True}
            if request["do"] == "spawn":
                attached = [self._spawn(request, descriptors)]
            else:
                act(request["actions"])
        except OSError as error:
            answer = refusal(error)
        except ValueError as error:
            answer = {"ok": False, "errno": None, "sentence": str(error)}
        for descriptor in descriptors:
            os.close(descriptor)
        socket.send_fds(self._control, [json.dumps(answer).encode()], attached)
        for descriptor in attached:
            os.close(descriptor)
        return True

    def _spawn(self, request: dict[str, Any], descriptors: list[int]) -> int:
        """Start a command; returns a pidfd. The last descriptor is where its status goes, the others are its own."""
        complaint_reader, complaint_writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._become(request, descriptors, complaint_writer)
        os.close(complaint_writer)
        complaint = os.read(complaint_reader, 4)  # empty when exec succeeded: the pipe is close-on-exec
        os.close(complaint_reader)
        if complaint:
            number = struct.unpack("=i", complaint)[0]
            os.waitpid(pid, 0)
            raise OSError(number, f"execute {request['argv'][0]}: {os.strerror(number)}")
        pidfd = os.pidfd_open(pid)
        self._status_descriptors[pid] = os.dup(descriptors[-1])
        return pidfd

    def _become(self, request: dict[str, Any], descriptors: list[int], complaint: int) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            # As a terminal's commands expect it. Python ignores SIGPIPE; and where the tests themselves are in the
            # background, the shell had SIGINT and SIGQUIT ignored in everything that they start.
            for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            # Out of the way first: a source's number may be another one's target.
            spare = [fcntl.fcntl(d, fcntl.F_DUPFD_CLOEXEC, FIRST_SPARE_DESCRIPTOR) for d in descriptors[:-1]]
            complaint = fcntl.fcntl(complaint, fcntl.F_DUPFD_CLOEXEC, FIRST_SPARE_DESCRIPTOR)
            for descriptor, target in zip(spare, request["targets"], strict=True):
                os.dup2(descriptor, target)
            os.chdir(request["cwd"])
            os.execvpe(request["argv"][0], request["argv"], request["env"])
        except OSError as error:
            os.write(complaint, struct.pack("=i", error.errno or 0))
        finally:
            os._exit(127)


def refusal(error: OSError) -> dict[str, Any]:
    """The answer to a request that the kernel refused."""
    sentence = error.strerror or str(error)
    return {
        "ok": False,
        "errno": error.errno,
        "sentence": f"{error.filename}: {sentence}" if error.filename else sentence,
    }


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One message with its descriptors, close-on-exec."""
    space = socket.CMSG_SPACE(DESCRIPTORS_MAX * array.array("i").itemsize)
    data, ancillary, _, _ = sock.recvmsg(MESSAGE_MAX_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(payload)
    return data, list(descriptors)


def _wait_for(pid: int) -> NoReturn:
    _, status = os.waitpid(pid, 0)
    os._exit(max(os.waitstatus_to_exitcode(status), 0))


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    data, _ = receive(control)
    if not data:
        return
    specification = json.loads(data)
    try:
        _enter(specification)
        if "pid" in specification["unshare"]:
            pid = os.fork()
            if pid:
                control.close()
                _wait_for(pid)
            # Not without a pid namespace: there the parent may be a thread, and its end would end the container.
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        notes = _prepare(specification)
        pidfd = os.pidfd_open(os.getpid())
    except OSError as error:
        control.send(json.dumps(refusal(error)).encode())
        return
    init = Init(control)
    socket.send_fds(control, [json.dumps({"ok": True, "notes": notes}).encode()], [pidfd])
    os.close(pidfd)
    init.serve()


if __name__ == "__main__":
    main()
