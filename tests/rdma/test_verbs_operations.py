"""Every operation of a queue pair, and what is left of one that was cancelled or took too long."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Awaitable, Callable

import pytest

from rdmanet import verbs
from rdmanet.broker.values import PodView
from rdmanet.errors import InputError, TimedOutError, VerbsError
from rdmanet.verbs import MemoryRegion, Options, RemoteRegion
from rdmanet.verbs.queue_pair import QueuePair
from tests.rdma.lease_lab import Baton, Lab, pair

TIMEOUT_S = 60.0
BOTH = {"remote_read": True, "remote_write": True, "remote_atomic": True}


async def test_atomics_count_exactly(lab: Lab) -> None:
    async def listener(qp: QueuePair) -> list[int]:
        region = qp.allocate(16, remote_atomic=True)
        words = region.buffer.cast("Q")
        words[1] = 7
        await qp.send(region.remote.to_bytes())
        assert await qp.recv() == b"done"
        return words.tolist()

    async def connector(qp: QueuePair) -> list[int]:
        remote = RemoteRegion.from_bytes(await qp.recv())
        seen = await asyncio.gather(*(qp.fetch_add(remote, 3) for _ in range(40)))
        assert await qp.compare_swap(remote, compare=7, swap=2**64 - 1, offset=8) == 7
        assert await qp.compare_swap(remote, compare=7, swap=1, offset=8) == 2**64 - 1
        assert await qp.fetch_add(remote, -2, offset=8) == 2**64 - 1
        await qp.send(b"done")
        return seen

    words, seen = await pair(lab, listener, connector)
    assert words == [120, 2**64 - 3]
    assert seen == list(range(0, 120, 3))


async def test_mistakes_with_atomics(lab: Lab) -> None:
    told = Baton()

    async def listener(qp: QueuePair) -> None:
        await qp.send(qp.allocate(24, remote_write=True).remote.to_bytes())
        await told.taken()

    async def connector(qp: QueuePair) -> VerbsError:
        remote = RemoteRegion.from_bytes(await qp.recv())
        with pytest.raises(InputError, match="a multiple of 8"):
            await qp.fetch_add(remote, 1, offset=4)
        with pytest.raises(InputError, match="bytes 24 to 32 are not in the 24"):
            await qp.fetch_add(remote, 1, offset=24)
        with pytest.raises(InputError, match="add must have 64 bits"):
            await qp.fetch_add(remote, 2**64)
        with pytest.raises(InputError, match="compare must have 64 bits"):
            await qp.compare_swap(remote, compare=-1, swap=0)
        assert not qp.broken
        with pytest.raises(VerbsError) as caught:
            await qp.fetch_add(remote, 1)
        told.pass_on()
        return caught.value

    _, error = await pair(lab, listener, connector)
    assert (error.operation, error.status, error.peer) == ("fetch_add", 10, "train-1")


async def test_a_session_polls_where_it_is_asked_to(lab: Lab) -> None:
    payload = os.urandom(3 << 20)

    async def listener(qp: QueuePair) -> bytes:
        region = qp.allocate(len(payload), remote_write=True)
        await qp.send(region.remote.to_bytes())
        assert await qp.recv() == b"written"
        # As long as nobody waits nobody looks, and then what has come is there.
        await qp.send(b"seen")
        assert [await qp.recv() for _ in range(40)] == [bytes([number]) for number in range(40)]
        return bytes(region.buffer)

    async def connector(qp: QueuePair) -> None:
        assert qp._completions._channel is None
        remote = RemoteRegion.from_bytes(await qp.recv())
        await qp.write(qp.register(bytearray(payload)), remote)
        await qp.send(b"written")
        assert await qp.recv() == b"seen"
        await asyncio.gather(*(qp.send(bytes([number])) for number in range(40)))
        with pytest.raises(TimedOutError):
            await qp.recv(timeout_s=0.01)
        assert not qp._completions._waiting

    seen, _ = await pair(lab, listener, connector, options=Options(polling=True), listener_options=Options())
    assert seen == payload


async def test_a_channel_that_cannot_be_found_is_polled(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from rdmanet.verbs import compat

    monkeypatch.setattr(compat, "completion_channel", lambda context: None)

    async def program(qp: QueuePair) -> bytes:
        await qp.send(b"hello")
        return await qp.recv()

    assert await pair(lab, program, program) == (b"hello", b"hello")


class Blocked:
    """A queue pair whose peer does not receive for now: its second message stays under way, and all that is begun
    after it stays behind it. The window has room for three."""

    WINDOW = 3

    def __init__(self, qp: QueuePair):
        self.qp = qp
        self.tasks: list[asyncio.Task[object]] = []

    async def begin(self, work: Awaitable[object]) -> asyncio.Task[object]:
        """Begin, and let it get as far as it gets."""
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        for _ in range(5):
            await asyncio.sleep(0)
        self.tasks.append(task)
        return task

    async def block(self) -> None:
        await self.qp.send(b"taken")
        await self.begin(self.qp.send(b"under way"))


#: Operation → what it does to the 8 bytes at an offset, with one or the other value.
Operate = Callable[[QueuePair, MemoryRegion, RemoteRegion, int, float | None], Awaitable[object]]
OPERATIONS: dict[str, Operate] = {
    "write": lambda qp, local, remote, offset, timeout_s: qp.write(
        local, remote, local_offset=offset, remote_offset=offset, length=8, timeout_s=timeout_s
    ),
    "read": lambda qp, local, remote, offset, timeout_s: qp.read(
        local, remote, local_offset=offset, remote_offset=offset, length=8, timeout_s=timeout_s
    ),
    "fetch_add": lambda qp, local, remote, offset, timeout_s: qp.fetch_add(
        remote, 1, offset=offset, timeout_s=timeout_s
    ),
    "compare_swap": lambda qp, local, remote, offset, timeout_s: qp.compare_swap(
        remote, compare=0, swap=1, offset=offset, timeout_s=timeout_s
    ),
    "send": lambda qp, local, remote, offset, timeout_s: qp.send(b"%d" % offset, timeout_s=timeout_s),
}


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_what_is_given_up_in_each_phase(lab: Lab, operation: str) -> None:
    """Posted, waiting for room in the window, and waiting for its turn; cancelled or timed out, by turns. Only what was
    posted is carried out."""
    go = Baton()
    operate, place = OPERATIONS[operation], list(OPERATIONS).index(operation)
    timeouts_s = [0.5 if (place + phase) % 2 else None for phase in range(3)]

    async def listener(qp: QueuePair) -> tuple[list[bytes], bytes]:
        region = qp.allocate(32, **BOTH)
        region.buffer[:] = bytes(32) if operation != "read" else b"R" * 32
        await qp.send(region.remote.to_bytes())
        await go.taken()
        messages: list[bytes] = []
        while not messages or messages[-1] != b"last":
            messages.append(await qp.recv(timeout_s=TIMEOUT_S))
        await qp.send(b"bye")
        return messages, bytes(region.buffer)

    async def connector(qp: QueuePair) -> bytes:
        remote = RemoteRegion.from_bytes(await qp.recv())
        local = qp.register(bytearray(b"W" * 32))
        blocked = Blocked(qp)
        await blocked.block()
        posted = await blocked.begin(operate(qp, local, remote, 0, timeouts_s[0]))
        filler = await blocked.begin(qp.send(b"filler"))
        assert len(qp._transfers) == Blocked.WINDOW
        windowed = await blocked.begin(operate(qp, local, remote, 8, timeouts_s[1]))
        waiting = await blocked.begin(operate(qp, local, remote, 16, timeouts_s[2]))
        assert len(qp._transfers) == Blocked.WINDOW
        assert not filler.done()
        for task, timeout_s in zip((posted, windowed, waiting), timeouts_s, strict=True):
            if timeout_s is None:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                with pytest.raises(TimedOutError) as caught:
                    await task
                assert (caught.value.operation, caught.value.peer) == (operation, "train-1")
        with pytest.raises(TimedOutError):
            await qp.drain(timeout_s=0.01)
        go.pass_on()
        await qp.drain(timeout_s=TIMEOUT_S)
        async with asyncio.timeout(1):
            await filler  # it was completed before
        assert not qp.broken
        # And it works as before.
        await operate(qp, local, remote, 24, TIMEOUT_S)
        await qp.send(b"last")
        assert await qp.recv() == b"bye"
        assert qp.idle
        return bytes(local.buffer)

    options = Options(window=Blocked.WINDOW, messages=1)
    (messages, there), here = await pair(lab, listener, connector, options=options)
    words = [b"taken", b"under way", *([b"0"] if operation == "send" else []), b"filler"]
    assert messages == [*words, *([b"24"] if operation == "send" else []), b"last"]
    one = (1).to_bytes(8, "little")
    expected = {
        "write": b"W" * 8 + bytes(16) + b"W" * 8,
        "fetch_add": one + bytes(16) + one,
        "compare_swap": one + bytes(16) + one,
    }
    if operation == "read":
        assert here == b"R" * 8 + b"W" * 16 + b"R" * 8
    else:
        assert there == expected.get(operation, bytes(32))


async def test_whoever_gives_up_receiving_has_taken_nothing(lab: Lab) -> None:
    given_up = Baton()

    async def listener(qp: QueuePair) -> None:
        await given_up.taken()
        await qp.send(b"one")
        await qp.send(b"two")
        await qp.recv()

    async def connector(qp: QueuePair) -> list[bytes]:
        waiting = asyncio.create_task(qp.recv())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(TimedOutError, match=r"recv was not done within 0\.01 s"):
            await qp.recv(timeout_s=0.01)
        given_up.pass_on()
        messages = [await qp.recv(timeout_s=TIMEOUT_S), await qp.recv()]
        await qp.send(b"bye")
        return messages

    assert (await pair(lab, listener, connector))[1] == [b"one", b"two"]


async def test_memory_of_a_cancelled_write_is_kept_until_it_is_done(lab: Lab) -> None:
    go = Baton()

    async def listener(qp: QueuePair) -> bytes:
        region = qp.allocate(8, remote_write=True)
        await qp.send(region.remote.to_bytes())
        await go.taken()
        while await qp.recv() != b"last":
            pass
        return bytes(region.buffer)

    async def connector(qp: QueuePair) -> None:
        remote = RemoteRegion.from_bytes(await qp.recv())
        blocked, buffer = Blocked(qp), bytearray(b"whole on")
        await blocked.block()
        with qp.register(buffer) as region:
            (await blocked.begin(qp.write(region, remote))).cancel()
        with pytest.raises(InputError, match="the local memory region is closed"):
            await qp.write(region, remote)
        with pytest.raises(BufferError):  # the device has its address
            buffer.append(0)
        go.pass_on()
        await qp.drain()
        await qp.send(b"last")
        region.buffer.release()
        buffer.append(0)

    there, _ = await pair(lab, listener, connector, options=Options(messages=1))
    assert there == b"whole on"


async def test_closing_never_waits_for_the_peer(lab: Lab) -> None:
    closed = Baton()

    async def listener(qp: QueuePair) -> None:
        await closed.taken()

    async def connector(qp: QueuePair) -> None:
        blocked = Blocked(qp)
        await blocked.block()
        await blocked.begin(qp.send(b"behind"))
        began = time.monotonic()
        await qp.close()
        assert time.monotonic() - began < TIMEOUT_S
        for task in blocked.tasks:
            with pytest.raises(verbs.UnavailableError, match="has been closed"):
                await task
        with pytest.raises(verbs.UnavailableError, match="has been closed"):
            await qp.drain()
        closed.pass_on()

    await pair(lab, listener, connector, options=Options(messages=1))


async def test_the_pods_bandwidth_class_is_in_the_address_vector(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for pod in lab.pods:
        view = pod.view
        monkeypatch.setattr(pod, "view", lambda most, view=view: _with_class(view(most)))

    async def program(qp: QueuePair) -> tuple[int, bytes]:
        await qp.send(b"hello")
        attributes, _ = qp.verbs_qp.query(1 << 7)  # IBV_QP_AV
        return int(attributes.ah_attr.traffic_class), await qp.recv()

    assert await pair(lab, program, program) == ((0x68, b"hello"), (0x68, b"hello"))


def _with_class(view: PodView) -> PodView:
    return dataclasses.replace(view, traffic_class=0x68, service_level=3)


async def test_a_service_is_served_again(lab: Lab) -> None:
    """By the process that served it before, whose queue pairs outlive their listener; also after it gave up asking."""
    first, closed, again = Baton(), Baton(), Baton()

    async def listener() -> bytes:
        async with verbs.Session() as session:
            async with await session.listen("again") as found:
                first.pass_on()
                qp = await found.accept(timeout_s=TIMEOUT_S)
            closed.pass_on()
            assert await qp.recv(timeout_s=TIMEOUT_S) == b"refused"
            asking = asyncio.create_task(session.listen("again"))
            await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            async with await session.listen("again") as found:
                again.pass_on()
                async with await found.accept(timeout_s=TIMEOUT_S) as other:
                    await other.recv(timeout_s=TIMEOUT_S)
                with pytest.raises(TimedOutError, match="nobody connected within"):
                    await found.accept(timeout_s=0.01)
            return await qp.recv(timeout_s=TIMEOUT_S)

    async def connector() -> None:
        await first.taken()
        async with await verbs.connect("train-1:again") as qp:
            await closed.taken()
            with pytest.raises(verbs.LeaseRefusedError, match="no process of train-1 listens on again"):
                await verbs.connect("train-1:again")
            await qp.send(b"refused")
            await again.taken()
            async with await verbs.connect("train-1:again") as other:
                await other.send(b"other")
                await qp.send(b"the first")
                with pytest.raises(verbs.LeaseRevokedError):
                    await qp.recv(timeout_s=TIMEOUT_S)

    received, _ = await asyncio.gather(lab.pods[1].run(listener), lab.pods[0].run(connector))
    assert received == b"the first"
