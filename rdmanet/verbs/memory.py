"""Memory that a queue pair may read and write, and what the peer must know to reach it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import resource
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from rdmanet.errors import InputError, VerbsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rdmanet.verbs.compat import RecvRequest

#: Anything that memoryview() takes; collections.abc.Buffer is of Python 3.12.
Buffer: TypeAlias = Any
#: What atomics work on (InfiniBand 9.4.5).
ATOMIC_BYTES = 8
_deregistering = threading.Lock()
_REMOTE = struct.Struct("!QIQ")


@dataclass(frozen=True, slots=True)
class RemoteRegion:
    """Memory of the peer: its virtual address there, the key that opens it, and its length in bytes."""

    address: int
    rkey: int
    length: int

    def to_bytes(self) -> bytes:
        """20 bytes, network byte order: address u64, rkey u32, length u64. Send them to the peer."""
        return _REMOTE.pack(self.address, self.rkey, self.length)

    @classmethod
    def from_bytes(cls, data: bytes) -> RemoteRegion:
        """What the peer's ``to_bytes`` made; raises InputError when it is not 20 bytes."""
        if len(data) != _REMOTE.size:
            raise InputError(f"a remote region is {_REMOTE.size} bytes, not {len(data)}")
        return cls(*_REMOTE.unpack(data))


class MemoryRegion:
    """A buffer of this process that the device may use; the buffer is not copied.

    ``buffer`` is it as a memoryview of bytes (``numpy.frombuffer(region.buffer, dtype)`` is an array in it). While
    registered, the buffer cannot be resized. ``close`` deregisters it, once transfers that use it are done.
    """

    def __init__(self, registration: Any, buffer: memoryview, address: int, pin: object, *, remote: bool):
        self._registration = registration
        self._pin: object | None = pin
        self._remote = remote
        self._uses = 0  # requests under way
        self._closed = False
        self.buffer = buffer
        self.address = address
        self.lkey = int(registration.lkey)
        self._rkey = int(registration.rkey)
        self.on_close: Callable[[MemoryRegion], None] | None = None

    @property
    def length(self) -> int:
        """Bytes."""
        return self.buffer.nbytes

    @property
    def remote(self) -> RemoteRegion:
        """What the peer needs; InputError when it was registered for local use only."""
        if not self._remote:
            raise InputError(
                "this memory is registered for local use; pass remote_write, remote_read or remote_atomic to register"
            )
        return RemoteRegion(self.address, self._rkey, self.length)

    @property
    def closed(self) -> bool:
        return self._closed

    def use(self) -> None:
        """A request that needs it is under way."""
        self._uses += 1

    def unuse(self) -> None:
        """A request that needed it has been completed, or its queue pair is gone."""
        self._uses -= 1
        if self._closed and self._uses == 0:
            self._deregister()

    def close(self) -> None:
        """Deregister; the buffer is free again. Where a cancelled transfer is still under way, the device keeps the
        memory until it is done. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._uses == 0:
            self._deregister()

    def _deregister(self) -> None:
        # Twice at a time where it is closed in one thread and its last transfer is completed in another's loop.
        with _deregistering:
            if self._pin is None:
                return
            from rdmanet.verbs import compat

            with compat.destroyed("memory could not be deregistered", "ibv_dereg_mr"):
                self._registration.close()
            self._pin = None
        if self.on_close is not None:
            self.on_close(self)

    def __enter__(self) -> MemoryRegion:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(slots=True, eq=False)
class Place:
    """A piece of a region, where one message goes, with the request that receives into it once there is one."""

    region: MemoryRegion
    offset: int
    address: int
    lkey: int
    request: RecvRequest | None = None

    def read(self, length: int) -> bytes:
        """A copy of its first bytes."""
        return bytes(self.region.buffer[self.offset : self.offset + length])


def places(region: MemoryRegion, length: int) -> list[Place]:
    """A region in pieces of ``length`` bytes."""
    return [Place(region, o, region.address + o, region.lkey) for o in range(0, region.length, length)]


class PlacePool:
    """Places for the first messages of queue pairs. Locking memory for a device costs more than making a queue pair, so
    what one queue pair leaves the next one gets; all of it is freed with the device."""

    def __init__(self, pd: Any):
        self._pd = pd
        self._free: dict[int, list[Place]] = {}
        self._regions: list[MemoryRegion] = []

    def take(self, count: int, length: int) -> list[Place]:
        """``count`` places of ``length`` bytes; raises as ``register``."""
        free = self._free.setdefault(length, [])
        missing = count - len(free)
        if missing > 0:
            region = register(self._pd, allocate(missing * length))
            self._regions.append(region)
            free += places(region, length)
        taken = free[-count:]
        del free[-count:]
        return taken

    def give(self, length: int, returned: list[Place]) -> None:
        """Places of ``length`` bytes that no queue pair uses any more."""
        self._free.setdefault(length, []).extend(returned)

    def close(self) -> None:
        """After all queue pairs."""
        for free in self._free.values():
            for place in free:
                if place.request is not None:
                    place.request.close()
            free.clear()
        for region in self._regions:
            region.close()


def allocate(length: int) -> memoryview:
    """``length`` zero bytes, aligned to pages."""
    if length <= 0:
        raise InputError("memory to register has at least one byte")
    return memoryview(mmap.mmap(-1, length))[:length]


def message_bytes(message: Buffer) -> memoryview:
    """A message as bytes; raises InputError for what has none. Copied where it is not contiguous or of NumPy's own
    element types."""
    try:
        view = memoryview(message)
    except (TypeError, ValueError) as error:
        raise InputError(f"a message is bytes, or any other object with a buffer: {error}") from error
    try:
        return view.cast("B")
    except (TypeError, ValueError):
        return memoryview(view.tobytes())


def register(
    pd: Any, buffer: Any, *, remote_read: bool = False, remote_write: bool = False, remote_atomic: bool = False
) -> MemoryRegion:
    """Register ``buffer`` (writable, contiguous: bytearray, memoryview, mmap, array, NumPy) in a protection domain.

    Raises InputError for other buffers; VerbsError with a sentence about the limit when memory cannot be locked.
    """
    from rdmanet.verbs import compat

    try:
        source = memoryview(buffer)
        # Through ctypes, which minds no element types: memoryview.cast refuses those of structured NumPy arrays.
        pin = (ctypes.c_ubyte * source.nbytes).from_buffer(source)
        view = memoryview(pin).cast("B")
    except (TypeError, ValueError, BufferError) as error:
        raise InputError(f"only writable, contiguous and non-empty memory can be registered: {error}") from error
    if not view.nbytes:
        raise InputError("only writable, contiguous and non-empty memory can be registered: it is empty")
    address = ctypes.addressof(pin)
    access = compat.enums.IBV_ACCESS_LOCAL_WRITE
    if remote_read:
        access |= compat.enums.IBV_ACCESS_REMOTE_READ
    if remote_write:
        access |= compat.enums.IBV_ACCESS_REMOTE_WRITE
    if remote_atomic:
        access |= compat.enums.IBV_ACCESS_REMOTE_ATOMIC
    try:
        with compat.call(f"{view.nbytes} bytes of memory could not be registered", "ibv_reg_mr"):
            registration = compat.MR(pd, view.nbytes, access, address)
    except VerbsError as error:
        if error.errno in (errno.ENOMEM, errno.EAGAIN):
            raise _locked_memory_error(view.nbytes, error) from error
        raise
    return MemoryRegion(registration, view, address, pin, remote=remote_read or remote_write or remote_atomic)


def _locked_memory_error(length: int, error: VerbsError) -> VerbsError:
    if error.errno == errno.EAGAIN:
        return VerbsError(
            "the pod's limit of RDMA objects is reached (rdma.max of its cgroup); close memory regions or queue pairs",
            operation=error.operation,
            errno=error.errno,
        )
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft // 1024} KiB"
    return VerbsError(
        f"{length} bytes of memory could not be locked for the device: this process may lock {limit}; "
        "raise the container's memlock limit (ulimit -l, --ulimit memlock=-1, LimitMEMLOCK=infinity)",
        operation=error.operation,
        errno=error.errno,
    )
