"""The launcher's side of a pod's first process (``pod_init.py``)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rdmanet.errors import KernelError
from rdmanet.run.job import Ending
from rdmanet.run.lines import Lines, Printer
from rdmanet.run.pod_init import MESSAGE_MAX_BYTES

T = TypeVar("T")

INIT = Path(__file__).with_name("pod_init.py")
CHUNK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Specification:
    """What the first process makes of itself."""

    netns: str
    cgroup: str | None
    hostname: str
    hosts: str  # /etc/hosts
    nodes: Sequence[tuple[str, int, int]]  # character devices: path, major, minor
    masked: Sequence[str]  # directories that the pod sees empty
    argv: Sequence[str]
    cwd: str
    environment: Mapping[str, str]
    umask: int
    user: tuple[int, int, Sequence[int]] | None  # uid, gid, groups; None: root


#: As root it needs no permission of net.core.wmem_max: environments may be large.
SO_SNDBUFFORCE = 32


class PodProcess:
    """A rank's processes. ``start``, ``prepare``, ``go``, then ``ending``; ``close`` in any case."""

    def __init__(
        self, rank: int, process: asyncio.subprocess.Process, control: socket.socket, printers: tuple[Printer, Printer]
    ):
        self.rank = rank
        #: Set when nothing is written any more: with the failure, or None where nobody wants it.
        self.silent: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
        self._process = process
        self._control = control
        self._pending: set[asyncio.Task[Any]] = set()  # on the control socket
        self._output = [
            asyncio.create_task(self._stream(stream, printer))
            for stream, printer in zip((process.stdout, process.stderr), printers, strict=True)
        ]

    @classmethod
    async def start(cls, rank: int, lock: int, printers: tuple[Printer, Printer]) -> PodProcess:
        """Starts a first process that waits for what it is to be. ``lock`` is a descriptor that it holds for as long
        as it lives."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argv = [sys.executable, "-I", "-S", "-E", str(INIT), str(theirs.fileno()), str(lock)]
            try:
                # A session of its own: Ctrl-C is for the launcher, which passes it on.
                process = await asyncio.create_subprocess_exec(
                    *argv,
                    pass_fds=(theirs.fileno(), lock),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, MESSAGE_MAX_BYTES)
        return cls(rank, process, ours, printers)

    async def prepare(self, specification: Specification) -> None:
        """Returns when the pod is all there but its command. Raises KernelError with what was refused."""
        await self._tell(asdict(specification))
        await self._hear("ready")

    async def go(self) -> None:
        """Starts the command. Raises KernelError when it cannot be executed."""
        await self._tell({"start": True})
        await self._hear("started")

    async def ending(self) -> Ending:
        """How the command ended. The pod's processes have all ended then, and its output is written."""
        try:
            status = int((await self._hear("status"))["status"])
        except KernelError:
            status = -signal.SIGKILL  # the first process was ended, and everything with it
        at_s = asyncio.get_running_loop().time()
        await self._process.wait()
        await asyncio.gather(*self._output)
        return Ending(self.rank, status, at_s)

    async def signal(self, number: int) -> None:
        """To the command and what is in its process group; SIGKILL to everything in the pod."""
        await self._tell({"signal": number})

    def stop_writing(self, failure: OSError | None = None) -> None:
        """Whatever is not written yet is lost: nobody reads it."""
        if not self.silent.done():
            self.silent.set_result(failure)

    async def close(self) -> None:
        """Ends everything in the pod that still runs; idempotent."""
        # The event loop would go on to know the closed descriptor, and hear nothing on the next one of that number.
        for task in self._pending:
            task.cancel()
        await asyncio.gather(*self._pending, return_exceptions=True)
        self._control.close()
        self.stop_writing()
        await self._process.wait()
        await asyncio.gather(*self._output)

    async def _stream(self, stream: asyncio.StreamReader | None, printer: Printer) -> None:
        """Reads to the end, whatever becomes of it: asyncio waits for that with the process's end."""
        assert stream is not None
        lines = Lines(f"[{self.rank}] ".encode())
        while data := await stream.read(CHUNK_BYTES):
            await self._write(printer, lines.feed(data))
        await self._write(printer, lines.end())

    async def _write(self, printer: Printer, data: bytes) -> None:
        if not data or self.silent.done():
            return
        written = printer.write(data)
        both: set[asyncio.Future[Any]] = {written, self.silent}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if written.done() and isinstance(failure := written.exception(), OSError):
            self.stop_writing(failure)

    async def _until_closed(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.get_running_loop().create_task(work)
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        return await task

    async def _tell(self, message: Mapping[str, Any]) -> None:
        data = json.dumps(message).encode()
        with contextlib.suppress(ConnectionError):  # it has ended: what it said before is still to be heard
            await self._until_closed(asyncio.get_running_loop().sock_sendall(self._control, data))

    async def _hear(self, word: str) -> dict[str, Any]:
        try:
            data = await self._until_closed(asyncio.get_running_loop().sock_recv(self._control, MESSAGE_MAX_BYTES))
        except ConnectionError:
            data = b""
        message: dict[str, Any] = json.loads(data) if data else {"refused": "its first process ended", "errno": None}
        if word not in message:
            raise KernelError(
                f"Rank {self.rank} cannot be started: {message['refused']}.", operation="run", errno=message["errno"]
            )
        return message
