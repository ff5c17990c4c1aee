"""The library without an event loop, in threads and after a fork, and with NumPy."""

from __future__ import annotations

import asyncio
import os

import pytest

from rdmanet.verbs import RemoteRegion
from rdmanet.verbs.queue_pair import QueuePair
from tests.rdma.lease_lab import Lab, PodProcess, pair

#: A listening script.
LISTENING = """
import array
from rdmanet.verbs import Options, sync

with sync.listen("script", timeout_s=60) as listener:
    print("listening", flush=True)
    qp, other = listener.accept_batch(timeout_s=60)
    memory = array.array("Q", bytes(8000))
    region = qp.register(memory, remote_write=True, remote_read=True, remote_atomic=True)
    qp.send(region.remote.to_bytes())
    assert qp.recv(timeout_s=60) == b"done"
    print(sum(memory), memory[0], flush=True)
    other.send(b"bye")
    print(other.recv(timeout_s=60).decode(), flush=True)
    # What is open is closed at the end.
"""
#: A connecting script, with every operation, a thread, a pool, and Ctrl-C.
CONNECTING = """
import array, signal, threading
from rdmanet.errors import TimedOutError
from rdmanet.verbs import RemoteRegion, sync

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started this may have it ignored
with sync.Session() as session:
    qp, other = session.connect("train-1:script", count=2, timeout_s=60)
    remote = RemoteRegion.from_bytes(qp.recv(timeout_s=60))
    numbers = array.array("Q", range(1000))
    with qp.register(numbers) as region:
        qp.write(region, remote)
        numbers[:] = array.array("Q", bytes(8000))
        qp.read(region, remote, timeout_s=60)
        assert numbers[999] == 999
    threads = [threading.Thread(target=qp.fetch_add, args=(remote, 1)) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert qp.compare_swap(remote, compare=8, swap=100) == 8
    qp.send(b"done")
    try:
        qp.recv(timeout_s=0.01)
    except TimedOutError as error:
        print(error.operation, error.peer, flush=True)
    assert other.recv(timeout_s=60) == b"bye"
    threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
    try:
        other.recv()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    other.send(b"closing")
    print("sent", flush=True)
"""


async def test_two_scripts(lab: Lab) -> None:
    with PodProcess(lab.pods[1], LISTENING) as listener:
        assert await listener.line() == "listening"
        with PodProcess(lab.pods[0], CONNECTING) as connector:
            assert await connector.line() == "recv train-1"
            assert await listener.line() == f"{sum(range(1000)) + 100} 100"
            assert await connector.line() == "interrupted"
            assert await connector.line() == "sent"
            assert await listener.line() == "closing"
            assert await asyncio.to_thread(connector.child.wait, 60) == 0
            assert await asyncio.to_thread(listener.child.wait, 60) == 0
    await lab.wait_for_states()


#: A process that ends with all open that it has, in a loop that is over: with its own status and in silence.
LEFT_OPEN = """
import asyncio
from rdmanet import verbs

async def main():
    listener = await verbs.listen("mine", timeout_s=60)
    there = await verbs.connect("train-0:mine", timeout_s=60)
    here = await listener.accept()
    region = here.allocate(100)
    await there.send(b"hello")
    assert await here.recv() == b"hello"
    print("done", flush=True)

asyncio.run(main())
"""


async def test_a_process_may_end_with_everything_open(lab: Lab) -> None:
    """The interpreter's last collection must not take pyverbs' objects in an order of its own."""
    with PodProcess(lab.pods[0], LEFT_OPEN) as process:
        assert await process.line() == "done"
        assert await asyncio.to_thread(process.child.wait, 60) == 0
    await lab.wait_for_states()


#: A process that forks: its child cannot use what it has, leases for itself, and ends without taking anything along.
FORKING = """
import os, sys
from rdmanet.errors import UnavailableError
from rdmanet.verbs import sync

qp = sync.connect("train-1:service", timeout_s=60)
assert qp.recv(timeout_s=60) == b"hello"
region = qp.allocate(100)
child = os.fork()
if child == 0:
    for attempt in (lambda: qp.send(b"from the child"), lambda: qp.allocate(100)):
        try:
            attempt()
        except UnavailableError as error:
            assert "before the process forked" in error.sentence, error
        else:
            sys.exit(1)
    qp.close()
    files = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if number.isdigit()
             and os.path.exists(f"/proc/self/fd/{number}")]
    assert not [name for name in files if "uverbs" in name], files
    with sync.connect("train-1:service", timeout_s=60) as own:
        assert own.recv(timeout_s=60) == b"hello"
        own.send(b"from the child")
    del qp, region
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
qp.send(b"from the parent")
print("done", flush=True)
qp.close()
"""


async def test_a_forked_child_leaves_its_parents_queue_pairs_alone(lab: Lab) -> None:
    from rdmanet import verbs
    from tests.rdma.lease_lab import Baton

    listening = Baton()

    async def listener() -> list[bytes]:
        async with await verbs.listen("service", timeout_s=60) as found:
            listening.pass_on()
            async with await found.accept() as parents:
                await parents.send(b"hello")
                async with await found.accept() as childs:
                    await childs.send(b"hello")
                    return [await childs.recv(timeout_s=60), await parents.recv(timeout_s=60)]

    async def process() -> None:
        await listening.taken()
        with PodProcess(lab.pods[0], FORKING) as forking:
            assert await forking.line() == "done"
            assert await asyncio.to_thread(forking.child.wait, 60) == 0

    received, _ = await asyncio.gather(lab.pods[1].run(listener), process())
    assert received == [b"from the child", b"from the parent"]


async def test_numpy_arrays_are_registered_and_sent_without_copies(lab: Lab) -> None:
    numpy = pytest.importorskip("numpy", reason="needs NumPy")
    kinds = numpy.dtype([("weight", "f4"), ("step", "i8")])
    matrix = numpy.frombuffer(os.urandom(4 * 600), "f4").reshape(20, 30).copy()
    records = numpy.zeros(5, kinds)
    records["step"] = range(5)

    async def listener(qp: QueuePair) -> None:
        there = numpy.zeros((20, 30), "f4")
        rows = numpy.zeros(5, kinds)
        for array in (there, rows):
            await qp.send(qp.register(array, remote_write=True).remote.to_bytes())
        row = numpy.frombuffer(await qp.recv(), "f4")
        assert there.tobytes() == matrix.tobytes()
        assert (rows == records).all()
        assert row.tobytes() == matrix[3].tobytes()
        view = numpy.frombuffer(qp.allocate(80).buffer, "i8")
        assert view.sum() == 0

    async def connector(qp: QueuePair) -> None:
        for array in (matrix, records):
            await qp.write(qp.register(array), RemoteRegion.from_bytes(await qp.recv()))
        await qp.send(matrix[3])

    await pair(lab, listener, connector)
