"""RDMA traffic whose packets can be counted on paper: a program for `testbed.peer`, one in each of two pods.

Requests: ``hello``; ``serve`` {service, bytes}; ``connect`` {target, address} → {qpn, mtu_bytes}; ``write`` {times},
each an RDMA WRITE of all those bytes, acknowledged before the next; ``send`` {times}, messages that the listener does
not take yet; ``receive`` {times}, the listener takes them; ``next`` → {sentence}, what the connector's next message
ends with; ``close``.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from typing import TYPE_CHECKING, Any

from rdmanet import verbs
from rdmanet.errors import RdmanetError
from testbed.answering import Requests, answer_requests

if TYPE_CHECKING:
    from rdmanet.verbs.queue_pair import QueuePair

#: Emulated machines take seconds to import pyverbs and open the device, which the first connection includes.
CONNECT_TIMEOUT_S = 90.0
WITHIN_S = 60.0


class Peer:
    """Either side."""

    def __init__(self) -> None:
        self._listener: verbs.Listener | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._served: list[QueuePair] = []
        self._qp: QueuePair | None = None
        self._local: verbs.MemoryRegion | None = None
        self._remote: verbs.RemoteRegion | None = None
        self._sending: list[asyncio.Task[None]] = []

    async def hello(self) -> dict[str, Any]:
        return {}

    async def serve(self, service: str, bytes: int) -> dict[str, Any]:
        self._listener = await verbs.listen(service, timeout_s=CONNECT_TIMEOUT_S)
        self._accepting = asyncio.create_task(self._accept(self._listener, bytes))
        return {}

    async def _accept(self, listener: verbs.Listener, size: int) -> None:
        async for qp in listener:
            region = qp.allocate(size, remote_write=True)
            await qp.send(region.remote.to_bytes())
            self._served.append(qp)

    async def connect(self, target: str, address: str) -> dict[str, Any]:
        self._qp = await verbs.connect(target, address=ipaddress.ip_address(address), timeout_s=CONNECT_TIMEOUT_S)
        self._remote = verbs.RemoteRegion.from_bytes(await self._qp.recv())
        self._local = self._qp.allocate(self._remote.length)
        return {"qpn": self._qp.qpn, "mtu_bytes": self._qp.mtu_bytes}

    async def write(self, times: int) -> dict[str, Any]:
        assert self._qp, "not connected"
        assert self._local
        assert self._remote
        async with asyncio.timeout(WITHIN_S):
            for _ in range(times):
                await self._qp.write(self._local, self._remote)
        return {}

    async def send(self, times: int) -> dict[str, Any]:
        assert self._qp, "not connected"
        qp = self._qp
        self._sending = [asyncio.create_task(qp.send(bytes([number % 256]))) for number in range(times)]
        return {}

    async def receive(self, times: int) -> dict[str, Any]:
        async with asyncio.timeout(WITHIN_S):
            for number in range(times):
                message = await self._served[-1].recv()
                assert bytes(message) == bytes([number % 256]), f"message {number} is {bytes(message)!r}"
        return {}

    async def next(self) -> dict[str, Any]:
        assert self._qp, "not connected"
        try:
            async with asyncio.timeout(WITHIN_S):
                await self._qp.send(b"next")
        except RdmanetError as error:
            return {"sentence": str(error)}
        return {"sentence": ""}

    async def close(self) -> dict[str, Any]:
        await asyncio.gather(*self._sending)
        self._sending = []
        if self._qp is not None:
            await self._qp.close()
        if self._listener is not None:
            await self._listener.close()
            if self._accepting is not None:
                with contextlib.suppress(RdmanetError):  # it has ended already where the device is gone
                    await self._accepting
        for qp in self._served:
            await qp.close()
        self._served, self._qp, self._listener = [], None, None
        return {}

    @property
    def requests(self) -> Requests:
        """What can be asked."""
        return {
            name: getattr(self, name)
            for name in ("hello", "serve", "connect", "write", "send", "receive", "next", "close")
        }


if __name__ == "__main__":
    asyncio.run(answer_requests(Peer().requests))
