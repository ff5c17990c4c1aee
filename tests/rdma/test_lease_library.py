"""The verbs library against a real broker, a real guard map and real Soft-RoCE devices."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from rdmanet import verbs
from rdmanet.verbs import RemoteRegion
from tests.rdma import lease_lab
from tests.rdma.lease_lab import Baton, Lab

pytestmark = pytest.mark.exclusive


@pytest.fixture(scope="module")
def pods() -> Iterator[Lab]:
    """Made outside of any event loop: netlink sockets have one of their own."""
    with lease_lab.lab() as made:
        yield made


@pytest.fixture
async def lab(pods: Lab) -> AsyncIterator[Lab]:
    """The pods with a fresh broker."""
    await pods.start_broker()
    yield pods
    await pods.stop_broker()


async def test_write_arrives_whole(lab: Lab) -> None:
    size = 64 << 20
    payload = os.urandom(size)
    listening = Baton()

    async def receiver() -> str:
        async with await verbs.listen("params") as listener:
            listening.pass_on()
            async with await listener.accept() as qp:
                region = qp.allocate(size, remote_write=True)
                await qp.send(region.remote.to_bytes())
                assert await qp.recv() == b"written"
                return hashlib.sha256(region.buffer).hexdigest()

    async def sender() -> tuple[float, float]:
        await listening.taken()
        begun = time.monotonic()
        async with await verbs.connect("train-1:params") as qp:
            ready_s = time.monotonic() - begun
            remote = RemoteRegion.from_bytes(await qp.recv())
            region = qp.register(bytearray(payload))
            begun = time.monotonic()
            await qp.write(region, remote)
            write_s = time.monotonic() - begun
            await qp.send(b"written")
            return ready_s, write_s

    digest, (ready_s, write_s) = await asyncio.gather(lab.pods[1].run(receiver), lab.pods[0].run(sender))
    print(f"ready {ready_s * 1000:.1f} ms, write {size / write_s / 1e6:.1f} MB/s, broker {lab.seconds}")
    assert digest == hashlib.sha256(payload).hexdigest()
