"""A program in a pod that tries what it must not be able to do, or counts what comes in: for `testbed.peer`.

Requests: ``hello`` {device, addresses} opens the device.

Of who is attacked: ``serve`` leases to whoever asks and makes queue pairs without a lease → {unleased: {rc, ud, qkey}};
``leased`` → {rc, ud, qkey} once somebody has leased both kinds (again); ``watch`` counts RoCE packets by source from
here on; ``seen`` {token} → {packets: {source: count}} when the datagram with that token, sent last, has come in.

Of who attacks: ``lease`` {target, source} → {rc, ud}, its own numbers; ``release``; ``connect_unleased`` {source,
destination, qpn} and ``send_unleased`` {destination, qpn, qkey, count} use real queue pairs that nobody leased.
``packets`` {source, destination, qpns, source_qpns, count} and ``frames`` {the same, mac, gateway_mac} write RoCE
packets by hand: each of ``qpns`` (``[first, count]``) with each of ``source_qpns`` (null: those of a reliable
connection) → {packets}; ``fence`` {destination, token} is what ``seen`` waits for.

No packet written by hand has a right ICRC: what counts is whether it gets as far as the pod's interface.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rdmanet import verbs
from rdmanet.errors import VerbsError
from rdmanet.lease import Ends, Target
from rdmanet.model import PodName, Transport, address_key
from rdmanet.verbs.batch import Batch
from rdmanet.verbs.device import OpenDevice
from rdmanet.verbs.ud import DATAGRAM_OPTIONS, Datagram, Peer
from testbed.answering import Requests, answer_requests

TIMEOUT_S = 60.0
ROCE_PORT, FENCE_PORT = 4791, 4790
_ETH_P_ALL = 0x0003
#: InfiniBand table 38: SEND only, of a reliable connection and of an unreliable datagram.
_RC_SEND_ONLY, _UD_SEND_ONLY = 0x04, 0x64
_SMALL = verbs.Options(window=1, messages=1, message_bytes=64)

Ranges = list[int]  # first, count


class NoLease:
    """What a datagram without leases has for a session."""

    async def lease(self, target: Target, ends: Ends, answered: object, timeout_s: float | None) -> None:
        raise AssertionError("nobody asks for a lease here")

    def held(self, peer: Peer) -> None:
        """Nobody holds it."""

    async def ended(self, peers: list[Peer]) -> None:
        """There is nothing to give back."""

    async def closed(self, datagram: Datagram) -> None:
        """There is nothing to give back."""


class Watch:
    """Counts RoCE packets that come in through an interface, by source, from a thread of its own."""

    def __init__(self, ifname: str = "eth0"):
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self._socket.bind((ifname, 0))
        self._changed = threading.Condition()
        self._packets: Counter[str] = Counter()
        self._tokens: set[str] = set()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            frame, (_, _, kind, *_) = self._socket.recvfrom(65535)
            if kind == socket.PACKET_OUTGOING or (found := _udp(frame)) is None:
                continue
            source, port, payload = found
            with self._changed:
                if port == ROCE_PORT:
                    self._packets[source] += 1
                elif port == FENCE_PORT:
                    self._tokens.add(payload.decode(errors="replace"))
                    self._changed.notify_all()

    def reset(self) -> None:
        """Count from here on."""
        with self._changed:
            self._packets.clear()

    def seen(self, token: str) -> dict[str, int]:
        """How many came from each source until the datagram with that token did; TimeoutError when it does not."""
        with self._changed:
            if not self._changed.wait_for(lambda: token in self._tokens, TIMEOUT_S):
                raise TimeoutError
            return dict(self._packets)


def _udp(frame: bytes) -> tuple[str, int, bytes] | None:
    """Source, destination port and payload of a UDP packet; None for any other."""
    kind = frame[12:14]
    if kind == b"\x08\x00" and frame[23] == socket.IPPROTO_UDP:
        start, source = 14 + (frame[14] & 15) * 4, frame[26:30]
    elif kind == b"\x86\xdd" and frame[20] == socket.IPPROTO_UDP:
        start, source = 54, frame[22:38]
    else:
        return None
    port = int.from_bytes(frame[start + 2 : start + 4], "big")
    return str(ipaddress.ip_address(source)), port, frame[start + 8 :]


def _roce(qpn: int, source_qpn: int | None) -> bytes:
    """Base transport header, and a datagram's (InfiniBand 9.2, 9.3.1), a message, and a wrong ICRC."""
    opcode = _RC_SEND_ONLY if source_qpn is None else _UD_SEND_ONLY
    header = struct.pack("!BBHII", opcode, 0x40, 0xFFFF, qpn, 1)
    return header + (b"" if source_qpn is None else struct.pack("!II", 0x1234, source_qpn)) + b"intruder" + bytes(4)


def _payloads(qpns: Ranges, source_qpns: Ranges | None, count: int) -> Iterator[bytes]:
    sources: list[int | None] = [None] if source_qpns is None else list(range(source_qpns[0], sum(source_qpns)))
    for qpn, source_qpn in itertools.product(range(qpns[0], sum(qpns)), sources):
        yield from itertools.repeat(_roce(qpn, source_qpn), count)


def _frame(mac: str, gateway_mac: str, source: str, destination: str, payload: bytes) -> bytes:
    """As the pod's stack would send it, but for its source. The UDP checksum is left out: nobody on the way looks."""
    one, two = ipaddress.ip_address(source), ipaddress.ip_address(destination)
    datagram = struct.pack("!HHHH", 0xC000, ROCE_PORT, 8 + len(payload), 0) + payload
    if one.version == 4:
        kind = 0x0800
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0x4000, 64, socket.IPPROTO_UDP, 0)
        header += one.packed + two.packed
        total = sum(struct.unpack("!10H", header))
        total = (total & 0xFFFF) + (total >> 16)
        header = header[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + header[12:]
    else:
        kind = 0x86DD
        header = struct.pack("!IHBB", 6 << 28, len(datagram), socket.IPPROTO_UDP, 64) + one.packed + two.packed
    macs = bytes.fromhex((gateway_mac + mac).replace(":", ""))
    return macs + struct.pack("!H", kind) + header + datagram


class Program:
    """Carries out requests, one at a time."""

    def __init__(self) -> None:
        # One CPU: its backlog is a queue, so the fence comes after what was sent before it.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        self._device: OpenDevice | None = None
        self._addresses: list[Any] = []
        self._kept: list[Any] = []
        self._listener: verbs.Listener | None = None
        self._datagram: verbs.Datagram | None = None
        self._watch: Watch | None = None

    async def hello(self, device: str, addresses: list[str]) -> dict[str, Any]:
        self._device = OpenDevice(device)
        self._addresses = [ipaddress.ip_address(address) for address in addresses]
        return {}

    # Who is attacked

    async def serve(self) -> dict[str, Any]:
        self._listener = await verbs.listen("params", timeout_s=TIMEOUT_S)
        self._datagram = await verbs.datagram("gossip", timeout_s=TIMEOUT_S)
        connected, datagram = self._batch(self._addresses[0]), self._own_datagram()
        self._kept += [connected, datagram]
        qkey = datagram.ends(self._addresses[0]).qkey
        return {"unleased": {"rc": connected.qps[0].qpn, "ud": datagram.qpn, "qkey": qkey}}

    async def leased(self) -> dict[str, Any]:
        assert self._listener is not None
        assert self._datagram is not None
        connected = await self._listener.accept(timeout_s=TIMEOUT_S)
        self._kept.append(connected)
        message, _ = await self._datagram.recv(timeout_s=TIMEOUT_S)
        assert message == b"leased"
        qkey = self._datagram.ends(self._addresses[0]).qkey
        return {"rc": connected.qpn, "ud": self._datagram.qpn, "qkey": qkey}

    async def watch(self) -> dict[str, Any]:
        self._watch = self._watch or Watch()
        self._watch.reset()
        return {}

    async def seen(self, token: str) -> dict[str, Any]:
        assert self._watch is not None
        return {"packets": await asyncio.to_thread(self._watch.seen, token)}

    # Who attacks

    async def lease(self, target: str, source: str) -> dict[str, Any]:
        address = ipaddress.ip_address(source)
        connected = await verbs.connect(f"{target}:params", address=address, timeout_s=TIMEOUT_S)
        datagram = await verbs.datagram(timeout_s=TIMEOUT_S)
        peer = await datagram.connect(f"{target}:gossip", address=address, timeout_s=TIMEOUT_S)
        await datagram.send(b"leased", peer)
        self._kept += [connected, datagram]
        return {"rc": connected.qpn, "ud": datagram.qpn}

    async def release(self) -> dict[str, Any]:
        for held in self._kept:
            await held.close()
        self._kept.clear()
        return {}

    async def connect_unleased(self, source: str, destination: str, qpn: int) -> dict[str, Any]:
        batch = self._batch(ipaddress.ip_address(source))
        batch.ready(Ends(address_key(destination), 1024, (qpn,), (0,)))
        try:
            await batch.qps[0].send(b"intruder", timeout_s=TIMEOUT_S)
        except VerbsError as error:
            return {"status": error.status}
        finally:
            batch.destroy()
        return {"status": 0}

    async def send_unleased(self, destination: str, qpn: int, qkey: int, count: int) -> dict[str, Any]:
        datagram = self._own_datagram()
        ends = Ends(address_key(destination), 1024, (qpn,), (0,), Transport.UD, qkey)
        victim = Peer(datagram, ends, 1, PodName("default", "victim"), "gossip")
        try:
            for _ in range(count):
                await datagram.send(b"intruder", victim, timeout_s=TIMEOUT_S)
        finally:
            victim.fail(lambda: VerbsError("it was an attempt"))
            datagram.destroy()
        return {}

    async def packets(
        self, source: str, destination: str, qpns: Ranges, source_qpns: Ranges | None = None, count: int = 1
    ) -> dict[str, Any]:
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        sent = 0
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((source, 0))
            for payload in _payloads(qpns, source_qpns, count):
                sock.sendto(payload, (destination, ROCE_PORT))
                sent += 1
        return {"packets": sent}

    async def frames(
        self,
        mac: str,
        gateway_mac: str,
        source: str,
        destination: str,
        qpns: Ranges,
        source_qpns: Ranges | None = None,
        count: int = 1,
    ) -> dict[str, Any]:
        sent = 0
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as sock:
            sock.bind(("eth0", 0))
            for payload in _payloads(qpns, source_qpns, count):
                sock.send(_frame(mac, gateway_mac, source, destination, payload))
                sent += 1
        return {"packets": sent}

    async def fence(self, destination: str, token: str) -> dict[str, Any]:
        family = socket.AF_INET6 if ":" in destination else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.sendto(token.encode(), (destination, FENCE_PORT))
        return {}

    # Queue pairs without a lease

    def _batch(self, address: Any) -> Batch:
        assert self._device is not None
        return Batch(self._device, address_key(address), _SMALL, 1)

    def _own_datagram(self) -> Datagram:
        assert self._device is not None
        options = DATAGRAM_OPTIONS
        return Datagram(NoLease(), self._device, self._addresses, None, options, traffic_class=0, service_level=0)

    @property
    def requests(self) -> Requests:
        """What can be asked."""
        names = ("hello", "serve", "leased", "watch", "seen", "lease", "release", "connect_unleased", "send_unleased")
        return {name: getattr(self, name) for name in (*names, "packets", "frames", "fence")}


async def main() -> None:
    """Until the input ends."""
    await answer_requests(Program().requests)


if __name__ == "__main__":
    asyncio.run(main())
