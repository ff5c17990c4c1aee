"""Batches of leases on real Soft-RoCE devices: many queue pairs by one connect, each a queue pair like any other."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from rdmanet import verbs
from rdmanet.errors import InputError, LeaseRefusedError, LeaseRevokedError, VerbsError
from rdmanet.model import GuardState, address_key
from rdmanet.netlink.nldev import RdmaSocket
from rdmanet.verbs import RemoteRegion
from rdmanet.verbs.queue_pair import QueuePair
from tests.rdma.lease_lab import Baton, Lab

T = TypeVar("T")
U = TypeVar("U")
COUNT = 64


@pytest.fixture(autouse=True)
def room_for_batches(pods: Lab) -> None:
    """More leases than the lab's pods may have otherwise."""
    pods.directory.max_leases = 2 * COUNT


async def batch(
    lab: Lab,
    listening: Callable[[list[QueuePair]], Awaitable[T]],
    connecting: Callable[[list[QueuePair]], Awaitable[U]],
    *,
    count: int = COUNT,
    version: int = 4,
) -> tuple[T, U]:
    """Lease ``count`` queue pairs at once from train-0 to train-1 and run a program on each side; their results."""
    listens = Baton()
    own = lab.pods[0].attachment.ipv4 if version == 4 else lab.pods[0].attachment.ipv6

    async def listener() -> T:
        async with await verbs.listen("batch", timeout_s=60) as found:
            listens.pass_on()
            qps = await found.accept_batch()
            try:
                return await listening(qps)
            finally:
                await asyncio.gather(*(qp.close() for qp in qps))

    async def connector() -> U:
        await listens.taken()
        qps = await verbs.connect("train-1:batch", count=count, address=own, timeout_s=60)
        try:
            return await connecting(qps)
        finally:
            await asyncio.gather(*(qp.close() for qp in qps))

    first, second = await asyncio.gather(lab.pods[1].run(listener), lab.pods[0].run(connector))
    return first, second


def queue_pairs(lab: Lab) -> int:
    """How many queue pairs of processes there are on both devices."""
    found = 0
    for pod in lab.pods[:2]:
        assert pod.device is not None
        with RdmaSocket.inside(pod.descriptor) as rdma:
            found += sum(1 for qp in rdma.queue_pairs(pod.device.index) if qp.pid is not None)
    return found


@pytest.mark.both_modes
@pytest.mark.parametrize("version", [4, 6])
async def test_64_at_once_in_the_same_order_on_both_sides(lab: Lab, version: int) -> None:
    own = lab.pods[0].ipv4 if version == 4 else lab.pods[0].ipv6

    async def listener(qps: list[QueuePair]) -> list[tuple[bytes, int]]:
        async def answer(qp: QueuePair) -> tuple[bytes, int]:
            message = await qp.recv()
            await qp.send(message + b"!")
            return message, qp.lease

        return await asyncio.gather(*map(answer, qps))

    async def connector(qps: list[QueuePair]) -> list[int]:
        granted = [key for key, entry in lab.guard.guards().items() if entry.state is GuardState.GRANTED]
        assert len(granted) == 2 * COUNT
        assert {qpn for address, qpn in granted if address == address_key(own)} == {qp.qpn for qp in qps}
        for number, qp in enumerate(qps):
            await qp.send(b"%d" % number)
        for number, qp in enumerate(qps):
            assert await qp.recv() == b"%d!" % number
        return [qp.lease for qp in qps]

    heard, leases = await batch(lab, listener, connector, version=version)
    assert heard == [(b"%d" % number, lease) for number, lease in enumerate(leases)]
    assert lab.broker.counts.granted == COUNT
    assert lab.broker.snapshot() == []
    assert GuardState.GRANTED not in {entry.state for entry in lab.guard.guards().values()}
    assert await asyncio.to_thread(queue_pairs, lab) == 0


async def test_each_moves_its_own_data(lab: Lab) -> None:
    count, size = 8, 100_000

    async def listener(qps: list[QueuePair]) -> list[bytes]:
        regions = [qp.allocate(size, remote_write=True) for qp in qps]
        for qp, region in zip(qps, regions, strict=True):
            await qp.send(region.remote.to_bytes())
        for qp in qps:
            assert await qp.recv() == b"written"
        return [bytes(region.buffer) for region in regions]

    async def connector(qps: list[QueuePair]) -> list[bytes]:
        payloads = [os.urandom(size) for _ in qps]

        async def write(qp: QueuePair, payload: bytes) -> None:
            remote = RemoteRegion.from_bytes(await qp.recv())
            await qp.write(qp.register(bytearray(payload)), remote)
            await qp.send(b"written")

        await asyncio.gather(*map(write, qps, payloads))
        return payloads

    seen, payloads = await batch(lab, listener, connector, count=count)
    assert seen == payloads


async def test_more_messages_than_a_new_queue_pair_has_receives(lab: Lab) -> None:
    """The receives that are missing at first come with the first message."""
    messages = [bytes([number]) * 50 for number in range(100)]

    async def listener(qps: list[QueuePair]) -> list[list[bytes]]:
        return [[await qp.recv() for _ in messages] for qp in qps]

    async def connector(qps: list[QueuePair]) -> None:
        await asyncio.gather(*(qp.send(message) for qp in qps for message in messages))

    received, _ = await batch(lab, listener, connector, count=3)
    assert received == [messages] * 3


async def test_one_of_a_batch_closes_and_breaks_alone(lab: Lab) -> None:
    closed = Baton()

    async def listener(qps: list[QueuePair]) -> None:
        with pytest.raises(LeaseRevokedError, match="train-0 closed its end"):
            await qps[3].recv()
        with pytest.raises(VerbsError):
            await qps[5].recv()
        for qp in (*qps[:3], qps[4], *qps[6:]):
            assert await qp.recv() == b"still here"
            await qp.send(b"so am I")
        closed.pass_on()

    async def connector(qps: list[QueuePair]) -> None:
        await qps[3].close()
        region = qps[5].allocate(4096)
        with pytest.raises(VerbsError, match="rights of the remote region"):
            await qps[5].write(region, RemoteRegion(1 << 40, 12345, 4096))
        others = [*qps[:3], qps[4], *qps[6:]]
        await asyncio.gather(*(qp.send(b"still here") for qp in others))
        for qp in others:
            assert await qp.recv() == b"so am I"
        await closed.taken()

    await batch(lab, listener, connector, count=8)


@pytest.mark.parametrize("count", [0, -1, 65, 1 << 40])
async def test_hostile_counts_never_reach_the_agent(lab: Lab, count: int) -> None:
    async def connector() -> None:
        await verbs.connect("train-1:batch", count=count)

    with pytest.raises(InputError, match=f"a batch has 1 to 64 queue pairs, not {count}"):
        await lab.pods[0].run(connector)


async def test_a_batch_beyond_the_limit_leaves_nothing(lab: Lab) -> None:
    lab.directory.max_leases = COUNT - 1
    listens, refused = Baton(), Baton()
    guard = dict(lab.guard.guards())

    async def listener() -> None:
        async with await verbs.listen("batch") as found:
            listens.pass_on()
            await refused.taken()
            # The listening side was never asked, and can be.
            qp = await found.accept()
            assert await qp.recv() == b"one"
            await qp.close()

    async def connector() -> int:
        await listens.taken()
        async with verbs.Session() as session:
            with pytest.raises(LeaseRefusedError, match="has 63 of its 63 leases left, and 64 are needed"):
                await session.connect("train-1:batch", count=COUNT)
            left = await asyncio.to_thread(queue_pairs, lab)
            refused.pass_on()
            async with await session.connect("train-1:batch") as qp:
                await qp.send(b"one")
        return left

    _, left = await asyncio.gather(lab.pods[1].run(listener), lab.pods[0].run(connector))
    assert left == 0
    assert lab.broker.counts.refused == {"limit": 1}
    assert lab.broker.snapshot() == []
    lives = {key for key, entry in lab.guard.guards().items() if key not in guard}
    assert len(lives) <= 2


async def test_a_listener_that_cannot_make_them_refuses_them_all(lab: Lab) -> None:
    listens, done = Baton(), Baton()

    async def listener() -> None:
        options = verbs.Options(window=4000, messages=4000)  # 64 times this is more than a completion queue holds
        async with await verbs.listen("batch", options=options):
            listens.pass_on()
            await done.taken()

    async def connector() -> None:
        await listens.taken()
        try:
            await verbs.connect("train-1:batch", count=COUNT)
        finally:
            done.pass_on()

    results = await asyncio.gather(lab.pods[1].run(listener), lab.pods[0].run(connector), return_exceptions=True)
    assert isinstance(results[1], LeaseRefusedError)
    assert "train-1:batch refused: " in results[1].sentence
    assert "choose smaller Options or fewer queue pairs" in results[1].sentence
    assert lab.broker.snapshot() == []
    assert await asyncio.to_thread(queue_pairs, lab) == 0


async def test_accept_takes_a_batch_one_by_one(lab: Lab) -> None:
    listens, done = Baton(), Baton()

    async def listener() -> tuple[list[int], int]:
        async with await verbs.listen("batch") as found:
            listens.pass_on()
            singles = [await found.accept() for _ in range(3)]
            rest = await found.accept_batch()
            await done.taken()
            await asyncio.gather(*(qp.close() for qp in (*singles, *rest)))
            return [qp.lease for qp in (*singles, *rest)], len(rest)

    async def connector() -> list[int]:
        await listens.taken()
        qps = await verbs.connect("train-1:batch", count=5)
        leases = [qp.lease for qp in qps]
        done.pass_on()
        await asyncio.gather(*(qp.close() for qp in qps))
        return leases

    (accepted, rest), leases = await asyncio.gather(lab.pods[1].run(listener), lab.pods[0].run(connector))
    assert accepted == leases
    assert rest == 2


async def test_a_cancelled_batch_gives_everything_back(lab: Lab) -> None:
    listens, done = Baton(), Baton()

    async def listener() -> None:
        async with await verbs.listen("batch") as found:
            listens.pass_on()
            accepting = asyncio.create_task(found.accept_batch())
            await done.taken()
            accepting.cancel()  # nothing comes where the cancellation was faster than the acceptance
            with contextlib.suppress(asyncio.CancelledError):
                for qp in await accepting:
                    with pytest.raises(LeaseRevokedError):
                        await qp.recv()
                    await qp.close()

    async def connector() -> None:
        await listens.taken()
        connecting = asyncio.create_task(verbs.connect("train-1:batch", count=COUNT))
        await lab_has_asked.taken()
        connecting.cancel()
        try:
            qps = await connecting
        except asyncio.CancelledError:
            pass
        else:
            await asyncio.gather(*(qp.close() for qp in qps))
        done.pass_on()

    async def watch() -> None:
        while not lab.broker.snapshot():
            lab.broker.changed.clear()
            await lab.broker.changed.wait()
        lab_has_asked.pass_on()

    lab_has_asked = Baton()
    await asyncio.gather(lab.pods[1].run(listener), lab.pods[0].run(connector), watch())
    await lab.wait_for_states()
    assert await asyncio.to_thread(queue_pairs, lab) == 0


async def test_all_are_claimed_after_the_agents_return(lab: Lab) -> None:
    away, back = Baton(), Baton()

    async def listener(qps: list[QueuePair]) -> None:
        for qp in qps:
            assert await qp.recv() == b"while away"
        for qp in qps:
            assert await qp.recv() == b"after"

    async def connector(qps: list[QueuePair]) -> None:
        await away.taken()
        await asyncio.gather(*(qp.send(b"while away") for qp in qps))
        await back.taken()
        await asyncio.gather(*(qp.send(b"after") for qp in qps))

    async def agent() -> None:
        await lab.wait_for_states(granted=COUNT)
        await lab.stop_broker()
        away.pass_on()
        await lab.start_broker()
        await lab.wait_for_states(granted=COUNT)
        assert lab.broker.counts.claimed == 2 * COUNT
        back.pass_on()

    await asyncio.gather(batch(lab, listener, connector), agent())
    await lab.wait_for_states()


async def test_a_deleted_pod_ends_them_all(lab: Lab) -> None:
    async def listener(qps: list[QueuePair]) -> None:
        for qp in qps:
            with pytest.raises(LeaseRevokedError, match="train-1 has been deleted"):
                await qp.recv()

    async def connector(qps: list[QueuePair]) -> None:
        for qp in qps:
            with pytest.raises(LeaseRevokedError, match="train-1 has been deleted"):
                await qp.recv()

    async def agent() -> None:
        await lab.wait_for_states(granted=COUNT)
        view = lab.directory.by_cookie(lab.pods[1].cookie)
        assert view is not None
        await lab.broker.remove_listener(lab.pods[1].cookie)
        await lab.broker.pod_gone(view.name, view.addresses, lab.pods[1].cookie)
        assert not any(address in view.addresses for address, _ in lab.guard.guards())

    await asyncio.gather(batch(lab, listener, connector), agent())


async def test_completion_queues_are_shared_and_used_again(lab: Lab) -> None:
    listens, done = Baton(), Baton()

    async def listener() -> None:
        async with verbs.Session() as session, await session.listen("batch") as found:
            listens.pass_on()
            accepting = asyncio.create_task(_accept_for_ever(found))
            await done.taken()
            accepting.cancel()

    async def connector() -> None:
        await listens.taken()
        async with verbs.Session() as session:
            singles = [await session.connect("train-1:batch") for _ in range(3)]
            device = session._device
            assert device is not None
            queues = device.completions._queues
            assert len(queues) == 1
            for _ in range(3):
                qps = await session.connect("train-1:batch", count=COUNT)
                assert len(queues) == 2
                await asyncio.gather(*(qp.send(b"unread") for qp in qps[::2]))
                await verbs.close(*qps)
            await verbs.close(*singles)
            assert [queue.empty for queue in queues] == [True]
            assert queues[0]._room == queues[0].entries
        done.pass_on()

    await asyncio.gather(lab.pods[1].run(listener), lab.pods[0].run(connector))
    assert await asyncio.to_thread(queue_pairs, lab) == 0


async def _accept_for_ever(listener: verbs.Listener) -> None:
    """Receive what comes until the peer closes, then close too."""

    async def serve(qps: list[QueuePair]) -> None:
        for qp in qps:
            with contextlib.suppress(LeaseRevokedError):
                while True:
                    await qp.recv()
        await verbs.close(*qps)

    async with asyncio.TaskGroup() as group:
        while True:
            group.create_task(serve(await listener.accept_batch()))
