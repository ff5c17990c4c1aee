"""Datagrams against a real broker, a real guard map and real Soft-RoCE devices. No steering programs here: what the
guard drops is in test_guard.py."""

from __future__ import annotations

import asyncio
import ipaddress

import pytest

from rdmanet import verbs
from rdmanet.errors import InputError
from rdmanet.lease import Ends
from rdmanet.model import GuardState, address_key
from rdmanet.verbs import LeaseRefusedError, LeaseRevokedError, Listener, Options, UnavailableError
from rdmanet.verbs.ud import Datagram, Peer
from tests.rdma.lease_lab import Baton, Lab

pytestmark = pytest.mark.both_modes

#: Datagrams may be lost; between two idle pods of a machine they are not, but it is slow.
WAIT_S = 60.0


@pytest.mark.parametrize("version", [4, 6])
async def test_messages_between_pods_by_name(lab: Lab, version: int) -> None:
    ready, done = Baton(), Baton()
    one, two = lab.pods[:2]
    addresses = [ipaddress.ip_address(pod.ipv4 if version == 4 else pod.ipv6) for pod in (one, two)]

    async def server() -> tuple[list[str], int]:
        async with await verbs.datagram("gossip", timeout_s=WAIT_S) as datagram:
            ready.pass_on()
            names = []
            for _ in range(40):
                message, peer = await datagram.recv(timeout_s=WAIT_S)
                names.append(str(peer))
                await datagram.send(message[::-1], peer)
            await done.taken()
            return names, datagram.strangers

    async def client() -> None:
        await ready.taken()
        async with await verbs.datagram(timeout_s=WAIT_S) as datagram:
            peer = await datagram.connect("train-1:gossip", address=addresses[0], timeout_s=WAIT_S)
            assert (str(peer), peer.mtu_bytes) == ("train-1:gossip", 1024)
            assert datagram.peers == (peer,)
            for number in range(40):
                message = bytes([number]) * (1 + number * 1023 // 39)
                await datagram.send(message, peer)
                assert await datagram.recv(timeout_s=WAIT_S) == (message[::-1], peer)
            with pytest.raises(InputError, match="to train-1:gossip has 1 to 1024 bytes"):
                await datagram.send(bytes(1025), peer)
            entries = lab.guard.datagrams()
            done.pass_on()
            own, others = (address_key(address) for address in addresses)
            assert {(owner, sender) for (owner, _), (sender, _) in entries} == {(own, others), (others, own)}
            assert {entry.lease for entry in entries.values()} == {peer.lease}

    (names, strangers), _ = await asyncio.gather(two.run(server), one.run(client))
    assert (names, strangers) == (["train-0:gossip"] * 40, 0)
    await lab.wait_for_states()
    assert lab.guard.datagrams() == {}
    assert {entry.state for entry in lab.guard.guards().values()} <= {GuardState.REVOKED}


async def test_a_peer_that_goes_takes_only_its_own_lease(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, left, done = Baton(), Baton(), Baton()

    async def servers() -> None:
        async with await verbs.datagram("stays", timeout_s=WAIT_S) as stays:
            goes = await verbs.datagram("goes", timeout_s=WAIT_S)
            ready.pass_on()
            _, peer = await goes.recv(timeout_s=WAIT_S)
            await goes.send(b"farewell", peer)
            await goes.close()
            left.pass_on()
            message, peer = await stays.recv(timeout_s=WAIT_S)
            await stays.send(message, peer)
            await done.taken()

    async def client() -> None:
        await ready.taken()
        async with await verbs.datagram(options=Options(window=2), timeout_s=WAIT_S) as datagram:
            goes = await datagram.connect("train-1:goes", timeout_s=WAIT_S)
            stays = await datagram.connect("train-1:stays", timeout_s=WAIT_S)
            told = asyncio.Event()

            def revoked(sentence: str) -> None:
                Peer.revoke(goes, sentence)
                told.set()

            monkeypatch.setattr(goes, "revoke", revoked)
            with pytest.raises(LeaseRefusedError, match="it has this peer already"):
                await datagram.connect("train-1:stays", timeout_s=WAIT_S)
            await datagram.send(b"hello", goes)
            await left.taken()
            await asyncio.wait_for(told.wait(), WAIT_S)
            with pytest.raises(LeaseRevokedError, match="train-1 closed its end"):
                await datagram.send(b"again", goes)
            # What had arrived before is still there.
            assert await datagram.recv(timeout_s=WAIT_S) == (b"farewell", goes)
            assert datagram.peers == (stays,)
            await datagram.send(b"still there?", stays)
            assert await datagram.recv(timeout_s=WAIT_S) == (b"still there?", stays)
            await stays.close()
            with pytest.raises(UnavailableError):
                await datagram.send(b"closed", stays)
            done.pass_on()

    await asyncio.gather(lab.pods[1].run(servers), lab.pods[0].run(client))


async def test_strangers_are_not_delivered(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who knows address, number and even the queue key, and has no lease."""
    ready, done = Baton(), Baton()
    ends: list[Ends] = []

    async def server() -> tuple[list[bytes], int]:
        async with await verbs.datagram("gossip", timeout_s=WAIT_S) as datagram:
            ends.append(datagram.ends(ipaddress.ip_address(lab.pods[1].ipv4)))
            ignored = asyncio.Semaphore(0)

            def ignore(slot: int) -> None:
                Datagram._ignore(datagram, slot)
                ignored.release()

            monkeypatch.setattr(datagram, "_ignore", ignore)
            ready.pass_on()
            messages = [(await datagram.recv(timeout_s=WAIT_S))[0] for _ in range(2)]
            for _ in range(3):
                await asyncio.wait_for(ignored.acquire(), WAIT_S)
            await done.taken()
            return messages, datagram.strangers

    async def client() -> None:
        await ready.taken()
        async with (
            await verbs.datagram(timeout_s=WAIT_S) as datagram,
            await verbs.datagram(timeout_s=WAIT_S) as stranger,
        ):
            peer = await datagram.connect("train-1:gossip", timeout_s=WAIT_S)
            forged = Peer(stranger, ends[0], 1, peer.pod, "gossip")
            await datagram.send(b"first", peer)
            for _ in range(3):
                await stranger.send(b"of a stranger", forged)
            await datagram.send(b"second", peer)
            forged.fail(lambda: UnavailableError("not needed any more"))
            done.pass_on()

    (messages, strangers), _ = await asyncio.gather(lab.pods[1].run(server), lab.pods[0].run(client))
    assert (messages, strangers) == ([b"first", b"second"], 3)


async def test_leases_outlive_the_agent(lab: Lab) -> None:
    """Messages flow while it is away; the next one gives the leases back, and others can connect again."""
    ready, leased, away, back, done = Baton(), Baton(), Baton(), Baton(), Baton()

    async def server() -> None:
        async with await verbs.datagram("gossip", timeout_s=WAIT_S) as datagram:
            ready.pass_on()
            for _ in range(4):
                message, peer = await datagram.recv(timeout_s=WAIT_S)
                await datagram.send(message, peer)
            await done.taken()

    async def client() -> None:
        await ready.taken()
        async with await verbs.datagram(timeout_s=WAIT_S) as datagram:
            peer = await datagram.connect("train-1:gossip", timeout_s=WAIT_S)

            async def echo(message: bytes) -> None:
                await datagram.send(message, peer)
                assert await datagram.recv(timeout_s=WAIT_S) == (message, peer)

            await echo(b"before")
            leased.pass_on()
            await away.taken()
            await echo(b"while it is away")
            await back.taken()
            await echo(b"after")
            async with await verbs.datagram(timeout_s=WAIT_S) as second:
                other = await second.connect("train-1:gossip", timeout_s=WAIT_S)
                await second.send(b"new", other)
                assert (await second.recv(timeout_s=WAIT_S))[0] == b"new"
            done.pass_on()

    async def agent() -> None:
        await leased.taken()
        before = lab.guard.datagrams()
        await lab.stop_broker()
        away.pass_on()
        await lab.start_broker()
        await lab.wait_for_states(granted=1)
        await lab.wait_for_listener("gossip")
        assert lab.broker.counts.claimed == 2
        assert set(lab.guard.datagrams()) == set(before)
        back.pass_on()

    await asyncio.gather(lab.pods[1].run(server), lab.pods[0].run(client), agent())


async def test_a_device_that_goes_is_said_to_all_and_opened_anew(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker is told that train-1's device has gone, and that it is back."""
    ready, leased, gone, back, healed = Baton(), Baton(), Baton(), Baton(), Baton()
    sentence = "the RDMA device of train-1 has gone; a test wants it so"
    pod = lab.pods[1]

    async def server() -> None:
        listener = await verbs.listen("params", timeout_s=WAIT_S)
        datagram = await verbs.datagram("gossip", timeout_s=WAIT_S)
        ready.pass_on()
        async with listener, datagram:
            qp = await listener.accept()
            await leased.taken()
            for waiting in (listener.accept(), qp.recv(), datagram.recv()):
                with pytest.raises(UnavailableError, match="a test wants it so"):
                    await asyncio.wait_for(waiting, WAIT_S)
            for asking in (verbs.connect("train-0:params"), verbs.datagram("more")):
                with pytest.raises(LeaseRefusedError, match="a test wants it so"):
                    await asyncio.wait_for(asking, WAIT_S)
            await qp.close()
            told = asyncio.Event()

            def device_state(sentence: str | None) -> None:
                Listener.device_state(listener, sentence)
                told.set()

            monkeypatch.setattr(listener, "device_state", device_state)
            gone.pass_on()
            await asyncio.wait_for(told.wait(), WAIT_S)
            async with await listener.accept() as again:
                assert await again.recv() == b"again"

    async def client() -> None:
        await ready.taken()
        async with (
            await verbs.connect("train-1:params", timeout_s=WAIT_S) as qp,
            await verbs.datagram(timeout_s=WAIT_S) as datagram,
        ):
            peer = await datagram.connect("train-1:gossip", timeout_s=WAIT_S)
            leased.pass_on()
            await gone.taken()
            with pytest.raises(LeaseRevokedError, match="a test wants it so"):
                await qp.recv()
            with pytest.raises(LeaseRevokedError, match="a test wants it so"):
                await datagram.send(b"x", peer)
            with pytest.raises(LeaseRefusedError, match="a test wants it so"):
                await verbs.connect("train-1:params", timeout_s=WAIT_S)
            back.pass_on()
            await healed.taken()
            async with await verbs.connect("train-1:params", timeout_s=WAIT_S) as again:
                await again.send(b"again")

    async def agent() -> None:
        await leased.taken()
        pod.unhealthy = sentence
        lab.broker.device_gone(pod.cookie, sentence)
        await back.taken()
        pod.unhealthy = None
        lab.broker.device_back(pod.cookie)
        healed.pass_on()

    await asyncio.gather(pod.run(server), lab.pods[0].run(client), agent())
