"""Network namespaces: what a path leads to, and doing something inside one."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rdmanet.errors import ConflictError, KernelError, NotFoundError, RequestError
from rdmanet.model import NetnsId

T = TypeVar("T")

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_SLAVE = 1, 2, 4, 8, 0x4000, 0x80000  # mount(2)
MS_BIND, MNT_DETACH = 0x1000, 2
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1  # netdevice(7)
NS_GET_NSTYPE = 0xB703  # ioctl_ns(2)
SO_NETNS_COOKIE = 71  # socket(7); kernel commit e8b9eab99232, 5.14
#: Paths that go with their process, and their folder with them.
_PROC = "/proc/"

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def opened(path: str) -> Iterator[int]:
    """A descriptor of the network namespace at ``path``, closed on leaving.

    Raises NotFoundError when nothing is there, RequestError when it is something else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESRCH):
            raise NotFoundError(
                f"There is no network namespace at {path}: it is gone or was never made.",
                operation="open",
                subject=path,
                errno=error.errno,
            ) from error
        raise KernelError(
            f"The network namespace at {path} cannot be opened; the agent must run as root in the host's namespaces.",
            operation="open",
            subject=path,
            errno=error.errno,
        ) from error
    try:
        try:
            kind = fcntl.ioctl(descriptor, NS_GET_NSTYPE)
        except OSError:
            kind = 0
        if kind != CLONE_NEWNET:
            raise RequestError(f"{path} is not a network namespace.", operation="NS_GET_NSTYPE", subject=path)
        yield descriptor
    finally:
        os.close(descriptor)


def identify(descriptor: int) -> NetnsId:
    """Which namespace an open descriptor stands for."""
    status = os.fstat(descriptor)
    return NetnsId(dev=status.st_dev, ino=status.st_ino)


@contextmanager
def entered(path: str, identity: NetnsId) -> Iterator[int | None]:
    """A descriptor of that namespace, or None where its path leads nowhere or to another one."""
    with ExitStack() as stack:
        descriptor: int | None
        try:
            descriptor = stack.enter_context(opened(path))
        except (NotFoundError, RequestError):
            descriptor = None
        if descriptor is not None and identify(descriptor) != identity:
            descriptor = None
        yield descriptor


def told(path: str) -> bool:
    """Whether a path that leads nowhere tells that its namespace is gone: not where its folder is not there either, as
    that may be unmounted under living pods, or hidden from the agent's container. With a process its folder goes."""
    return path.startswith(_PROC) or Path(path).parent.is_dir()


def own() -> NetnsId:
    """The namespace that the agent itself is in: the host's."""
    status = Path("/proc/self/ns/net").stat()
    return NetnsId(dev=status.st_dev, ino=status.st_ino)


def run_inside(descriptor: int, function: Callable[[], T]) -> T:
    """Runs ``function`` in a fresh thread inside the namespace and returns its result, or raises what it raised.

    The thread ends afterwards, so no thread of a pool is ever left in a pod's namespace.
    """

    def inside() -> T:
        _enter(descriptor)
        return function()

    return _in_fresh_thread(inside)


def run_with_sysfs(descriptor: int, function: Callable[[], T]) -> T:
    """As ``run_inside``, with a /sys that shows the namespace's own devices, to this thread alone."""

    def inside() -> T:
        _enter(descriptor)
        # A mount namespace that ends with the thread, and does not tell the host of its mounts.
        if (
            _libc.unshare(CLONE_NEWNS) != 0
            or _libc.mount(None, b"/", None, MS_REC | MS_SLAVE, None) != 0
            or _libc.mount(b"sysfs", b"/sys", b"sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, None) != 0
        ):
            raise KernelError(
                "The pod's sysfs cannot be mounted; the agent needs CAP_SYS_ADMIN.",
                operation="mount",
                errno=ctypes.get_errno(),
            )
        return function()

    return _in_fresh_thread(inside)


def visit(places: Iterable[tuple[str, NetnsId]], function: Callable[[NetnsId], T]) -> list[T | None]:
    """Runs ``function`` inside each namespace, one after another in one fresh thread; raises what it raises.

    None where the path leads nowhere (any more), or to another namespace.
    """

    def round_trip() -> list[T | None]:
        results: list[T | None] = []
        for path, identity in places:
            try:
                with opened(path) as descriptor:
                    right = identify(descriptor) == identity
                    if right:
                        _enter(descriptor)
                    results.append(function(identity) if right else None)
            except (NotFoundError, RequestError):
                results.append(None)
        return results

    return _in_fresh_thread(round_trip)


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise KernelError(
            "The pod's network namespace cannot be entered; the agent needs CAP_SYS_ADMIN.",
            operation="setns",
            errno=number,
        )


def _in_fresh_thread(function: Callable[[], T]) -> T:
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - carried over to the calling thread, which raises it
            failures.append(error)

    thread = threading.Thread(target=run, name="rdmanet-netns")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def create(path: Path) -> None:
    """A new network namespace with its lo up, bound at ``path``, as `ip netns add` makes them.

    Raises ConflictError where something is there, KernelError where the kernel refuses; nothing is left then.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        path.touch(mode=0o444, exist_ok=False)
    except FileExistsError as error:
        raise ConflictError(
            f"There is something at {path} already.", operation="create", subject=str(path), errno=error.errno
        ) from error

    def inside() -> None:
        if (
            _libc.unshare(CLONE_NEWNET) != 0
            or _libc.mount(b"/proc/thread-self/ns/net", os.fsencode(path), None, MS_BIND, None) != 0
        ):
            raise KernelError(
                "A network namespace cannot be made; it takes root (CAP_SYS_ADMIN).",
                operation="unshare",
                subject=str(path),
                errno=ctypes.get_errno(),
            )
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            request = fcntl.ioctl(sock, SIOCGIFFLAGS, struct.pack("=16sH14x", b"lo", 0))
            flags = struct.unpack("=16sH14x", request)[1]
            fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("=16sH14x", b"lo", flags | IFF_UP))

    try:
        _in_fresh_thread(inside)
    except BaseException:
        remove(path)
        raise


def remove(path: Path) -> None:
    """Takes ``create`` back; idempotent. The namespace ends with its last process. Raises KernelError."""
    while _libc.umount2(os.fsencode(path), MNT_DETACH) == 0:
        pass
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOENT):  # nothing is mounted there, or nothing is there
        raise KernelError(
            "A network namespace cannot be unmounted.", operation="umount2", subject=str(path), errno=number
        )
    path.unlink(missing_ok=True)


def netlink_socket(family: int) -> socket.socket:
    """A bound netlink socket of the calling thread's namespace (SOCK_DGRAM: asyncio takes no SOCK_RAW)."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, family)
    try:
        sock.bind((0, 0))
        # Sentences of the kernel (NLM_EXT_ACK) are left off: pyroute2 raises on their presence in plain acks.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    except OSError:
        sock.close()
        raise
    return sock


def abstract_listener(name: str) -> socket.socket:
    """A listening unix socket under an abstract name, visible in the calling thread's network namespace only.

    Raises OSError with EADDRINUSE when somebody else took the name.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind("\0" + name)
        sock.listen(64)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


@dataclass(frozen=True, slots=True)
class Listening:
    """What came of wanting a listening socket: the socket, or that somebody else has the name, or (neither) that none
    was needed."""

    sock: socket.socket | None = None
    taken: bool = False

    def close(self) -> None:
        """Gives the socket back, if there is one that nobody has taken over."""
        if self.sock is not None:
            self.sock.close()


def listen(name: str) -> Listening:
    """``abstract_listener`` without its one expected failure. Raises KernelError for others."""
    try:
        return Listening(abstract_listener(name))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return Listening(taken=True)
        raise KernelError(
            "The lease socket cannot be made inside the pod.", operation="listen", errno=error.errno
        ) from error


def cookie(sock: socket.socket) -> int:
    """The kernel's number for the socket's network namespace; never reused while the host is up."""
    return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0])


def own_cookie() -> int:
    """The number of the calling thread's network namespace, as ``cookie``."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        return cookie(sock)
