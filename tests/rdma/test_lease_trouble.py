"""The verbs library when things go wrong: refusals, errors of the device, deaths, and an agent that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from rdmanet import lease as wire
from rdmanet import verbs
from rdmanet.errors import InputError, LeaseRefusedError, LeaseRevokedError, UnavailableError, VerbsError
from rdmanet.model import GuardState
from rdmanet.verbs import Options, RemoteRegion
from rdmanet.verbs.queue_pair import QueuePair
from tests.rdma.lease_lab import Baton, Lab, PodProcess, pair

#: A peer in a process of its own, which listens and then waits to be killed.
LISTENING_PEER = """
import asyncio
from rdmanet import verbs

async def main():
    listener = await verbs.listen("mortal")
    print("listening", flush=True)
    qp = await listener.accept()
    region = qp.allocate(64 << 20, remote_write=True)
    await qp.send(region.remote.to_bytes())
    print("accepted", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
#: A process that says how its attempt to connect ended.
CONNECTING_PEER = """
import asyncio
from rdmanet import verbs
from rdmanet.errors import RdmanetError

async def main():
    try:
        await verbs.connect("train-1:params", timeout_s=60)
    except RdmanetError as error:
        print(type(error).__name__, error.sentence, flush=True)

asyncio.run(main())
"""


# Refusals


async def test_a_pod_without_a_device_is_told_so(lab: Lab) -> None:
    async def connector() -> None:
        await verbs.connect("train-1:params")

    async def listener() -> None:
        await verbs.listen("params")

    for program in (connector, listener):
        with pytest.raises(LeaseRefusedError, match=r'web-0 has no RDMA device; ask for one with "rdma": true'):
            await lab.pods[2].run(program)


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("train-1:params", "no process of train-1 listens on params"),
        ("train-9:params", "there is no pod train-9 on this host"),
        ("web-0:params", "web-0 has no RDMA device"),
    ],
)
async def test_refusals_have_the_brokers_sentence(lab: Lab, target: str, sentence: str) -> None:
    async def connector() -> None:
        await verbs.connect(target)

    with pytest.raises(LeaseRefusedError, match=sentence):
        await lab.pods[0].run(connector)
    assert lab.broker.snapshot() == []


async def test_a_listener_that_never_answers_is_not_waited_for(lab: Lab) -> None:
    listening, done = Baton(), Baton()

    async def listener() -> None:
        connector = aiohttp.UnixConnector(path=wire.SOCKET_NAME)
        async with aiohttp.ClientSession(connector=connector) as http:
            socket = await http.ws_connect(f"http://rdmanet{wire.HTTP_PATH}")
            for request in (wire.Hello(1), wire.Listen(2, "mute")):
                await socket.send_str(wire.dump(request))
                await socket.receive()
            listening.pass_on()
            await done.taken()

    async def connector() -> None:
        await listening.taken()
        try:
            await verbs.connect("train-1:mute", timeout_s=3)
        finally:
            done.pass_on()

    results = await asyncio.gather(lab.pods[1].run(listener), lab.pods[0].run(connector), return_exceptions=True)
    assert isinstance(results[1], LeaseRefusedError)
    assert "train-1:mute did not answer within 3 s" in str(results[1])


async def test_without_an_agent_there_is_a_sentence(lab: Lab) -> None:
    await lab.stop_broker()

    async def connector() -> None:
        await verbs.connect("train-1:params", timeout_s=0.5)

    with pytest.raises(UnavailableError, match="no rdmanet agent serves this pod"):
        await lab.pods[0].run(connector)


async def test_a_container_without_the_node_is_told_which(lab: Lab) -> None:
    device = lab.pods[0].device
    assert device is not None
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/infiniband && exec "$@"', "sh"]
    with PodProcess(lab.pods[0], CONNECTING_PEER, wrapper=hide) as process:
        said = await process.line()
    assert said.startswith("UnavailableError")
    assert f"does not have /dev/infiniband/{device.uverbs}" in said


async def test_a_low_memlock_limit_is_named(lab: Lab) -> None:
    limited = ["prlimit", "--memlock=4096", "setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
    with PodProcess(lab.pods[0], CONNECTING_PEER, wrapper=limited) as process:
        said = await process.line()
    assert said.startswith("VerbsError")
    assert "may lock 4 KiB; raise the container's memlock limit" in said


# Errors


async def test_mistakes_are_caught_before_they_reach_the_device(lab: Lab) -> None:
    async def listener(qp: QueuePair) -> None:
        await qp.recv()

    async def connector(qp: QueuePair) -> None:
        region = qp.allocate(100)
        with pytest.raises(InputError, match="writable"):
            qp.register(b"constant")
        with pytest.raises(InputError, match="non-empty"):
            qp.register(bytearray())
        with pytest.raises(InputError, match="registered for local use"):
            _ = region.remote
        with pytest.raises(InputError, match="are not in the 100 of local"):
            await qp.write(region, RemoteRegion(0, 0, 1000), length=101)
        with pytest.raises(InputError, match="are not in the 50 of the remote region"):
            await qp.write(region, RemoteRegion(0, 0, 50))
        for message in (b"", bytes(4097)):
            with pytest.raises(InputError, match="a message has 1 to 4096 bytes"):
                await qp.send(message)
        region.close()
        with pytest.raises(InputError, match="closed"):
            await qp.write(region, RemoteRegion(0, 0, 1000))
        await qp.send(b"still alive")

    await pair(lab, listener, connector)


async def test_a_region_opens_only_as_far_as_it_says(lab: Lab) -> None:
    seen = Baton()

    async def listener(qp: QueuePair) -> None:
        region = qp.allocate(4096, remote_read=True)
        await qp.send(region.remote.to_bytes())
        with pytest.raises(VerbsError):
            await qp.recv()
        assert bytes(region.buffer) == bytes(4096)
        await seen.taken()

    async def connector(qp: QueuePair) -> None:
        remote = RemoteRegion.from_bytes(await qp.recv())
        region = qp.register(bytearray(b"x" * 4096))
        with pytest.raises(VerbsError) as caught:
            await qp.write(region, remote)
        assert caught.value.status == 10
        assert "rights of the remote region" in caught.value.sentence
        with pytest.raises(VerbsError, match="rights of the remote region"):
            await qp.send(b"after")
        assert qp.broken
        seen.pass_on()

    await pair(lab, listener, connector)


async def test_a_message_longer_than_the_peer_takes_breaks_both(lab: Lab) -> None:
    seen = Baton()

    async def listener(qp: QueuePair) -> None:
        # InfiniBand says status 1, rxe 2.
        with pytest.raises(VerbsError, match=r"more bytes than this end's Options\.message_bytes"):
            await qp.recv()
        seen.pass_on()

    async def connector(qp: QueuePair) -> None:
        with pytest.raises((VerbsError, LeaseRevokedError)):
            await qp.send(bytes(2000))
        await seen.taken()  # closing before that would be a reason of its own

    await pair(lab, listener, connector, options=Options(), listener_options=Options(message_bytes=1000))


@pytest.mark.parametrize("length", [3, 2000], ids=["message", "too-long"])
async def test_a_connector_that_is_done_before_the_listeners_turn_is_accepted(
    lab: Lab, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the connector's doings reach the listening process at once: an event loop that is late."""
    listening, connected = Baton(), threading.Event()

    async def listener() -> bytes:
        async with verbs.Session() as session:
            ask = session._link.request

            async def late(make: Callable[[int], wire.Request], **options: Any) -> wire.Json:
                answer = asyncio.ensure_future(ask(make, **options))
                await asyncio.sleep(0)  # it is written
                if isinstance(make(0), wire.Accept):
                    assert connected.wait(60), "the connector did not come so far within 60 s"
                return await answer

            monkeypatch.setattr(session._link, "request", late)
            async with await session.listen("late", options=Options(message_bytes=1000)) as found:
                listening.pass_on()
                async with asyncio.timeout(60), await found.accept() as qp:
                    assert qp.broken
                    message = await qp.recv() if length < 1000 else b""
                    with pytest.raises((LeaseRevokedError, VerbsError)):
                        await qp.recv()
                    return message

    async def connector() -> None:
        await listening.taken()
        try:
            async with await verbs.connect("train-1:late") as qp:
                with contextlib.suppress(VerbsError):
                    await qp.send(b"x" * length)
        finally:
            connected.set()

    message, _ = await asyncio.gather(lab.pods[1].run(listener), lab.pods[0].run(connector))
    assert message == (b"xxx" if length == 3 else b"")
    assert lab.broker.snapshot() == []


# Ends


async def test_what_has_arrived_can_be_received_after_the_peer_has_closed(lab: Lab) -> None:
    closed = Baton()

    async def listener(qp: QueuePair) -> list[bytes]:
        await closed.taken()
        messages = [await qp.recv(), await qp.recv()]
        with pytest.raises(LeaseRevokedError, match="train-0 closed its end"):
            await qp.recv()
        with pytest.raises(LeaseRevokedError, match="train-0 closed its end"):
            await qp.send(b"too late")
        return messages

    async def connector(qp: QueuePair) -> None:
        await qp.send(b"one")
        await qp.send(b"two")
        await qp.close()
        closed.pass_on()

    messages, _ = await pair(lab, listener, connector)
    assert messages == [b"one", b"two"]


@pytest.mark.parametrize("waiting", ["recv", "write"])
async def test_a_killed_peer_ends_the_lease(lab: Lab, waiting: str) -> None:
    with PodProcess(lab.pods[1], LISTENING_PEER) as peer:
        assert await peer.line() == "listening"

        async def connector() -> None:
            async with await verbs.connect("train-1:mortal", timeout_s=60) as qp:
                remote = RemoteRegion.from_bytes(await qp.recv())
                assert await peer.line() == "accepted"
                region = qp.allocate(remote.length)
                operation = asyncio.create_task(qp.recv() if waiting == "recv" else endless(qp, region, remote))
                peer.child.kill()
                with pytest.raises((LeaseRevokedError, VerbsError)):
                    await operation
                # Whatever came first, the lease is the cause that operations name from then on.
                with pytest.raises(LeaseRevokedError, match="train-1 closed its end: its process ended"):
                    await until_revoked(qp)

        async def until_revoked(qp: QueuePair) -> None:
            while True:
                with contextlib.suppress(VerbsError):
                    await qp.recv()
                await asyncio.sleep(0)

        async def endless(qp: QueuePair, region: verbs.MemoryRegion, remote: RemoteRegion) -> bytes:
            while True:
                await qp.write(region, remote)

        await lab.pods[0].run(connector)


async def test_a_cancelled_connect_gives_everything_back(lab: Lab) -> None:
    async def program() -> None:
        async with await verbs.listen("mine") as listener:
            connecting = asyncio.create_task(verbs.connect("train-0:mine"))
            qp = await listener.accept()  # the connector's answer is on its way
            connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await (await connecting).close()
            with pytest.raises(LeaseRevokedError):
                await qp.recv()
            await qp.close()

    await lab.pods[0].run(program)
    assert lab.broker.snapshot() == []


# The agent


async def test_data_flows_while_the_agent_is_away_and_leases_are_claimed(lab: Lab) -> None:
    size = 1 << 20
    away, back = Baton(), Baton()

    async def listener(qp: QueuePair) -> bytes:
        region = qp.allocate(size, remote_write=True)
        await qp.send(region.remote.to_bytes())
        assert await qp.recv() == b"while away"
        seen = bytes(region.buffer)
        assert await qp.recv() == b"after"
        return seen

    async def connector(qp: QueuePair) -> bytes:
        remote = RemoteRegion.from_bytes(await qp.recv())
        await away.taken()
        payload = os.urandom(size)
        await qp.write(qp.register(bytearray(payload)), remote)
        await qp.send(b"while away")
        await back.taken()
        await qp.send(b"after")
        return payload

    async def agent() -> None:
        await lab.wait_for_states(granted=1)
        await lab.stop_broker()
        away.pass_on()
        await lab.start_broker()
        await lab.wait_for_states(granted=1)
        assert lab.broker.counts.claimed == 2
        # Beside entries of earlier leases that wait for their queue pairs to go.
        assert [entry.state for entry in lab.guard.guards().values()].count(GuardState.GRANTED) == 2
        back.pass_on()

    (seen, payload), _ = await asyncio.gather(pair(lab, listener, connector), agent())
    assert seen == payload
    await lab.wait_for_states()
    assert lab.broker.counts.revoked == {"released": 1}


async def test_listeners_come_back_with_the_agent(lab: Lab) -> None:
    listening, back, listening_again = Baton(), Baton(), Baton()

    async def listener() -> bytes:
        async with await verbs.listen("steady") as listener:
            listening.pass_on()
            async with await listener.accept() as qp:
                return await qp.recv()

    async def connector() -> None:
        await listening.taken()
        await lab_stopped.taken()
        # Asked while nobody is there to answer.
        connecting = asyncio.create_task(verbs.connect("train-1:steady", timeout_s=60))
        back.pass_on()
        with contextlib.suppress(LeaseRefusedError):  # this process may be back before the one that listens
            async with await connecting as qp:
                await qp.send(b"again")
                return
        await listening_again.taken()
        async with await verbs.connect("train-1:steady", timeout_s=60) as qp:
            await qp.send(b"again")

    async def agent() -> None:
        await listening.taken()
        await lab.stop_broker()
        lab_stopped.pass_on()
        await back.taken()
        await lab.start_broker()
        await lab.wait_for_listener("steady")
        listening_again.pass_on()

    lab_stopped = Baton()
    received, _, _ = await asyncio.gather(lab.pods[1].run(listener), lab.pods[0].run(connector), agent())
    assert received == b"again"


async def test_a_lease_that_the_new_agent_does_not_know_is_lost(lab: Lab) -> None:
    async def program(qp: QueuePair) -> None:
        with pytest.raises(LeaseRevokedError, match="does not know the lease any more"):
            await qp.recv()

    async def agent() -> None:
        await lab.wait_for_states(granted=1)
        for key in lab.guard.guards():
            lab.guard.delete_guard(*key)
        await lab.stop_broker()
        await lab.start_broker()

    await asyncio.gather(pair(lab, program, program), agent())
