"""RDMA between pods for programs in containers: lease a queue pair, move data past the kernel.

::

    # in pod train-1                                       # in pod train-0
    listener = await verbs.listen("params")                qp = await verbs.connect("train-1:params")
    qp = await listener.accept()                           ...
    region = qp.register(weights, remote_write=True)       remote = RemoteRegion.from_bytes(await qp.recv())
    await qp.send(region.remote.to_bytes())                await qp.write(qp.register(gradients), remote)
    await qp.recv()                                        await qp.send(b"written")
    await qp.close()                                       await qp.close()

Everything is a coroutine of the running event loop. Errors are rdmanet.errors: LeaseRefusedError and LeaseRevokedError
from the broker, VerbsError from the device, UnavailableError when agent, device or pyverbs are not there. docs/verbs.md
tells the whole story.

Importing this needs aiohttp; pyverbs (the distribution's python3-pyverbs) is imported with the first queue pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdmanet.errors import LeaseRefusedError, LeaseRevokedError, TimedOutError, UnavailableError, VerbsError
from rdmanet.verbs.listener import Listener
from rdmanet.verbs.memory import MemoryRegion, RemoteRegion
from rdmanet.verbs.options import Options
from rdmanet.verbs.pool import Pool, PoolStatistics
from rdmanet.verbs.session import Session
from rdmanet.verbs.shared import connect, datagram, listen

if TYPE_CHECKING:
    from rdmanet.verbs.queue_pair import QueuePair
    from rdmanet.verbs.ud import Datagram, Peer

__all__ = [
    "Datagram",
    "LeaseRefusedError",
    "LeaseRevokedError",
    "Listener",
    "MemoryRegion",
    "Options",
    "Peer",
    "Pool",
    "PoolStatistics",
    "QueuePair",
    "RemoteRegion",
    "Session",
    "TimedOutError",
    "UnavailableError",
    "VerbsError",
    "close",
    "connect",
    "datagram",
    "listen",
]


async def close(*qps: QueuePair) -> None:
    """Close many queue pairs at once, for much less than one by one: what a batch leased goes back in one message."""
    from rdmanet.verbs.queue_pair import close_all

    await close_all(qps)


def __getattr__(name: str) -> object:
    """What needs pyverbs, when it is asked for."""
    if name == "QueuePair":
        from rdmanet.verbs.queue_pair import QueuePair

        return QueuePair
    if name in ("Datagram", "Peer"):
        from rdmanet.verbs import ud

        return getattr(ud, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
