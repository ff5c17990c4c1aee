"""Pools of queue pairs with real devices: a peer's death and return, limits, and what is given back."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from rdmanet import verbs
from rdmanet.errors import LeaseRefusedError
from rdmanet.verbs import Pool, Session
from rdmanet.verbs.queue_pair import QueuePair
from tests.rdma.lease_lab import Baton, Lab, PodProcess

TIMEOUT_S = 60.0
#: A process that answers every message of every queue pair with its own name.
ANSWERING_PEER = """
import asyncio, contextlib, sys
from rdmanet import verbs
from rdmanet.errors import RdmanetError

async def serve(qp):
    with contextlib.suppress(RdmanetError):
        async with qp:
            while True:
                await qp.recv()
                await qp.send(b"%s")

async def main():
    async with await verbs.listen("pooled", timeout_s=60) as listener, asyncio.TaskGroup() as group:
        print("listening", flush=True)
        async for qp in listener:
            group.create_task(serve(qp))

asyncio.run(main())
"""


async def ask(qp: QueuePair) -> bytes:
    """What its peer calls itself."""
    await qp.send(b"who", timeout_s=TIMEOUT_S)
    return await qp.recv(timeout_s=TIMEOUT_S)


async def exhaust(pool: Pool) -> None:
    """Take what is ready until nothing comes any more; the broker may still have to tell of the end of some."""
    while True:
        await (await pool.acquire(timeout_s=1)).close()


async def full(pool: Pool) -> None:
    """Until the pool has leased all that it should have, by acquiring all of it."""
    taken = [await pool.acquire(timeout_s=TIMEOUT_S) for _ in range(pool.size)]
    for qp in taken:
        await pool.release(qp)


async def test_a_peer_that_comes_back_is_connected_again(lab: Lab) -> None:
    async with contextlib.AsyncExitStack() as stack:
        first = stack.enter_context(PodProcess(lab.pods[1], ANSWERING_PEER % "first"))
        assert await first.line() == "listening"

        async def connector() -> tuple[list[bytes], list[bytes], set[int]]:
            async with Session() as session, await session.pool("train-1:pooled", size=4) as pool:
                async with pool.queue_pair() as one, pool.queue_pair() as other:
                    before = [await ask(one), await ask(other)]
                assert (pool.statistics.at_once, pool.statistics.leased, pool.statistics.ready) == (2, 4, 4)
                first.kill()
                with pytest.raises(LeaseRefusedError, match="no process of train-1 listens on pooled"):
                    await exhaust(pool)
                second = stack.enter_context(PodProcess(lab.pods[1], ANSWERING_PEER % "second"))
                assert await second.line() == "listening"
                await full(pool)
                async with pool.queue_pair(timeout_s=TIMEOUT_S) as qp:
                    after = [await ask(qp)]
                assert pool.statistics.failures > 0
                leases = {qp.lease for qp in session._qps}
            return before, after, leases

        before, after, leases = await lab.pods[0].run(connector)
        assert (before, after) == ([b"first", b"first"], [b"second"])
        assert len(leases) == 4
        await lab.wait_for_states()


async def test_a_pool_stays_within_the_limit_and_gives_all_back(lab: Lab) -> None:
    lab.directory.max_leases = 6
    listens, done = Baton(), Baton()

    async def listener() -> None:
        async with await verbs.listen("pooled", timeout_s=TIMEOUT_S) as found:
            listens.pass_on()
            accepting = asyncio.create_task(accept_all(found))
            await done.taken()
            accepting.cancel()
            await verbs.close(*accepted)

    accepted: list[QueuePair] = []

    async def accept_all(found: verbs.Listener) -> None:
        async for qp in found:
            accepted.append(qp)

    async def connector() -> None:
        await listens.taken()
        async with Session() as session:
            with pytest.raises(LeaseRefusedError, match="has 6 of its 6 leases left, and 7 are needed"):
                await session.pool("train-1:pooled", size=7)
            pool = await session.pool("train-1:pooled", size=5)
            async with await session.connect("train-1:pooled"):
                await (await pool.acquire()).close()
                with contextlib.suppress(LeaseRefusedError):  # the last lease may be free for a moment
                    await session.connect("train-1:pooled", count=2)
                    pytest.fail("more leases than the limit")
                await full(pool)
            assert pool.statistics.lost == 1
            taken = await pool.acquire()
            await pool.close()
            assert taken.closed
            assert not session._qps
        done.pass_on()

    await asyncio.gather(lab.pods[1].run(listener), lab.pods[0].run(connector))
    await lab.wait_for_states()
    lab.directory.max_leases = 64


async def test_unread_messages_are_not_the_next_users(lab: Lab) -> None:
    with PodProcess(lab.pods[1], ANSWERING_PEER % "peer") as peer:
        assert await peer.line() == "listening"

        async def connector() -> None:
            async with Session() as session, await session.pool("train-1:pooled", size=1) as pool:
                async with pool.queue_pair() as qp:
                    await qp.send(b"who")
                    await qp.send(b"who")
                    await qp.recv()
                    async with asyncio.timeout(TIMEOUT_S), qp._arrivals:  # waits for the second and leaves it there
                        assert not qp.idle
                assert qp.closed
                async with pool.queue_pair(timeout_s=TIMEOUT_S) as other:
                    assert other is not qp
                    assert await ask(other) == b"peer"

        await lab.pods[0].run(connector)
