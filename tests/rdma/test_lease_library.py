"""The verbs library against a real broker, a real guard map and real Soft-RoCE devices: what works."""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import hashlib
import ipaddress
import os
from collections import Counter
from pathlib import Path

import pytest

from rdmanet import verbs
from rdmanet.model import address_key
from rdmanet.netlink.nldev import RdmaSocket
from rdmanet.verbs import Options, RemoteRegion
from rdmanet.verbs.queue_pair import QueuePair
from tests.rdma.lease_lab import Baton, Lab, pair

pytestmark = pytest.mark.both_modes


async def test_a_write_arrives_whole(lab: Lab) -> None:
    payload = os.urandom(8 << 20)

    async def listener(qp: QueuePair) -> str:
        region = qp.allocate(len(payload), remote_write=True)
        await qp.send(region.remote.to_bytes())
        assert await qp.recv() == b"written"
        return hashlib.sha256(region.buffer).hexdigest()

    async def connector(qp: QueuePair) -> None:
        remote = RemoteRegion.from_bytes(await qp.recv())
        await qp.write(qp.register(bytearray(payload)), remote)
        await qp.send(b"written")

    digest, _ = await pair(lab, listener, connector)
    assert digest == hashlib.sha256(payload).hexdigest()
    assert lab.broker.counts.granted == 1
    assert len(lab.seconds) == 1


async def test_parts_of_regions_in_odd_chunks(lab: Lab) -> None:
    payload = os.urandom(100_000)

    async def listener(qp: QueuePair) -> bytes:
        region = qp.allocate(200_000, remote_write=True, remote_read=True)
        region.buffer[150_000:150_010] = b"0123456789"
        await qp.send(region.remote.to_bytes())
        await qp.recv()
        return bytes(region.buffer[:150_000])

    async def connector(qp: QueuePair) -> bytes:
        remote = RemoteRegion.from_bytes(await qp.recv())
        region = qp.register(bytearray(payload))
        await qp.write(region, remote, local_offset=7, remote_offset=11, length=99_991)
        assert bytes(region.buffer) == payload
        await qp.read(region, remote, local_offset=3, remote_offset=150_000, length=10)
        await qp.write(region, remote, length=0)
        await qp.send(b"written")
        return bytes(region.buffer)

    options = Options(window=3, chunk_bytes=4099)
    there, here = await pair(lab, listener, connector, options=options)
    assert there == bytes(11) + payload[7:99_998] + bytes(150_000 - 11 - 99_991)
    assert here == payload[:3] + b"0123456789" + payload[13:]


async def test_messages_arrive_in_order_and_wait_for_the_receiver(lab: Lab) -> None:
    messages = [bytes([number]) * (1 + number * 7 % 512) for number in range(200)]
    options = Options(window=8, messages=4, message_bytes=512)

    async def listener(qp: QueuePair) -> list[bytes]:
        await qp.send(b"go")
        # Four fit; the sender's device tries the fifth again until somebody receives.
        return [await qp.recv() for _ in messages]

    async def connector(qp: QueuePair) -> None:
        await qp.recv()
        await asyncio.gather(*(qp.send(message) for message in messages))

    received, _ = await pair(lab, listener, connector, options=options)
    assert received == messages


async def test_both_send_at_once(lab: Lab) -> None:
    async def program(qp: QueuePair) -> bytes:
        async with asyncio.TaskGroup() as group:
            receiving = [group.create_task(qp.recv()) for _ in range(50)]
            for number in range(50):
                await qp.send(bytes([number]))
        return b"".join(task.result() for task in receiving)

    assert await pair(lab, program, program) == (bytes(range(50)), bytes(range(50)))


async def test_a_write_then_a_message_arrive_in_that_order(lab: Lab) -> None:
    async def listener(qp: QueuePair) -> list[bytes]:
        region = qp.allocate(1 << 16, remote_write=True)
        await qp.send(region.remote.to_bytes())
        seen = []
        for number in range(20):
            assert await qp.recv() == bytes([number])
            seen.append(bytes(region.buffer[-1:]))
            await qp.send(b"next")
        return seen

    async def connector(qp: QueuePair) -> None:
        remote = RemoteRegion.from_bytes(await qp.recv())
        for number in range(20):
            region = qp.register(bytearray([number]) * remote.length)
            await asyncio.gather(qp.write(region, remote), qp.send(bytes([number])))
            await qp.recv()
            region.close()

    seen, _ = await pair(lab, listener, connector)
    assert seen == [bytes([number]) for number in range(20)]


async def test_ipv6(lab: Lab) -> None:
    async def listener(qp: QueuePair) -> bytes:
        return await qp.recv()

    async def connector(qp: QueuePair) -> set[bytes]:
        await qp.send(b"six")
        return {address for (address, qpn), entry in lab.guard.guards().items() if entry.lease == qp.lease}

    own = ipaddress.IPv6Address(lab.pods[0].ipv6)
    received, addresses = await pair(lab, listener, connector, address=own)
    assert received == b"six"
    assert addresses == {address_key(own), address_key(lab.pods[1].ipv6)}


async def test_a_listener_serves_many(lab: Lab) -> None:
    count, listening = 6, Baton()

    async def listener() -> list[bytes]:
        found = []
        async with await verbs.listen("many") as listener:
            listening.pass_on()
            async for qp in listener:
                found.append(await qp.recv())
                await qp.send(b"seen")
                await qp.close()
                if len(found) == count:
                    break
        return found

    async def one(number: int) -> None:
        async with await verbs.connect("train-1:many") as qp:
            await qp.send(bytes([number]))
            assert await qp.recv() == b"seen"

    async def connector() -> None:
        await listening.taken()
        await asyncio.gather(*(one(number) for number in range(count)))

    found, _ = await asyncio.gather(lab.pods[1].run(listener), lab.pods[0].run(connector))
    assert sorted(found) == [bytes([number]) for number in range(count)]
    assert lab.broker.counts.granted == count


async def test_a_process_leases_to_itself(lab: Lab) -> None:
    async def program() -> bytes:
        async with await verbs.listen("self") as listener:
            connecting = asyncio.create_task(verbs.connect("train-0:self"))
            async with await listener.accept() as accepted, await connecting as connected:
                await connected.send(b"to myself")
                return await accepted.recv()

    assert await lab.pods[0].run(program) == b"to myself"


async def test_nothing_is_left_behind(lab: Lab) -> None:
    def descriptors() -> Counter[str]:
        gc.collect()  # transports of loops that have ended are in cycles
        found: Counter[str] = Counter()
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the one that lists the directory
                found[str(entry.readlink()).split(":[0")[0].rstrip("0123456789[]")] += 1
        return found

    def queue_pairs() -> int:
        found = 0
        for pod in lab.pods[:2]:
            assert pod.device is not None
            with RdmaSocket.inside(pod.descriptor) as rdma:
                found += sum(1 for qp in rdma.queue_pairs(pod.device.index) if qp.pid is not None)
        return found

    async def program(qp: QueuePair) -> None:
        region = qp.allocate(100_000)
        await qp.send(b"x")
        await qp.recv()
        region.close()

    await pair(lab, program, program)
    before = descriptors()
    for _ in range(5):
        await pair(lab, program, program)
    assert descriptors() - before == Counter()
    assert await asyncio.to_thread(queue_pairs) == 0
    assert lab.broker.snapshot() == []


async def test_any_writable_buffer_is_registered_without_a_copy(lab: Lab) -> None:
    weights = array.array("f", bytes(4000))

    async def listener(qp: QueuePair) -> None:
        await qp.send(qp.register(weights, remote_write=True).remote.to_bytes())
        await qp.recv()

    async def connector(qp: QueuePair) -> None:
        remote = RemoteRegion.from_bytes(await qp.recv())
        gradients = array.array("f", range(1000))
        with pytest.raises(BufferError), qp.register(gradients):
            gradients.append(0.0)  # it cannot move while the device has its address
        gradients.append(0.0)
        await qp.write(qp.register(memoryview(gradients)[:1000]), remote)
        await qp.send(b"written")

    await pair(lab, listener, connector)
    assert weights.tolist() == list(range(1000))
