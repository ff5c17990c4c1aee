"""Datagrams, echoes, ICMP errors and frames inside a container: what `testbed.peer.Peer` talks to where single packets
count. Standard library only, run without site packages.

Requests: ``reflect`` {address, port, order} → {port}: a UDP server that sends back what it gets, with whom it saw, in
parts where an order is named; ``reflected`` {address, port, size, source_port, count, source, order} → {seen, equal}:
datagrams of random bytes to such a server, sent again when lost; ``echo`` {address, identifier, size, count} →
{answers}: ICMP echo; ``scatter`` {address, first, count}: an echo request of each identifier, whatever is answered;
``error`` {address, port, size, hop_limit, dont_fragment, source_port} → {error, type, code, mtu_bytes, offender}: the
ICMP error about one datagram, as its socket gets it; ``neighbours`` {ifname, source, targets} → {answers}: ARP requests
or neighbour solicitations, and who was told of before the last one was; ``watch`` {ifname}, ``watched`` {verify} →
{sources, ports, packets, checked, large, wrong, lost}: the IP packets that came in between, by sender and protocol, and
those whose checksums are wrong; ``checksums`` {ifname, on}: whether the device fills in checksums. An order is that of
a datagram's parts: ``forward``, ``first`` (then the others backwards), ``backward``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

ETH_P_ALL, ETH_P_IP, ETH_P_ARP, ETH_P_IPV6 = 3, 0x0800, 0x0806, 0x86DD
PACKET_OUTGOING, PACKET_STATISTICS = 4, 6  # packet(7)
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
IP_MTU_DISCOVER, IP_RECVERR, IPV6_MTU_DISCOVER, IPV6_RECVERR = 10, 11, 23, 25  # ip(7), ipv6(7)
PMTUDISC_DONT, PMTUDISC_PROBE = 0, 3
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17  # include/uapi/linux/ethtool.h
ICMP, TCP, UDP, FRAGMENT, ICMPV6 = 1, 6, 17, 44, 58
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
TIMEOUT_S = 30.0
#: A datagram may be lost; its answer comes at once, or not at all.
AGAIN_S, TRIES = 2.0, 5
#: Of a datagram's parts that are made by hand: they fit through every link.
PART_BYTES = 1200
BUFFER_BYTES = 64 << 20


def version_of(address: str) -> int:
    return 6 if ":" in address else 4


def datagram_socket(address: str, source_port: int = 0) -> socket.socket:
    """A socket for an address's family."""
    sock = socket.socket(FAMILIES[version_of(address)], socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    if source_port:
        sock.bind(("", source_port))
    return sock


def reflect(address: str, port: int = 0, order: str | None = None) -> dict[str, Any]:
    """Answers from a thread of its own."""
    sock = datagram_socket(address)
    sock.bind((address, port))
    port = sock.getsockname()[1]

    def answer() -> None:
        while True:
            data, peer = sock.recvfrom(1 << 16)
            said = {"seen": peer[:2], "sha256": hashlib.sha256(data).hexdigest()}
            back = json.dumps(said).encode() + b"\n" + data
            if order is None:
                sock.sendto(back, peer)
            else:
                send_parts((address, port), peer, back, order)

    threading.Thread(target=answer, daemon=True).start()
    return {"port": port}


def send_parts(source: tuple[str, int], destination: tuple[str, int], data: bytes, order: str) -> None:
    """One datagram in parts made by hand, on one processor, whose queue keeps their order."""
    version = version_of(source[0])
    ends = [socket.inet_pton(FAMILIES[version], address) for address in (source[0], destination[0])]
    length = 8 + len(data)
    datagram = struct.pack("!HHHH", source[1], destination[1], length, 0) + data
    pseudo = struct.pack("!BBH", 0, UDP, length) if version == 4 else struct.pack("!I3xB", length, UDP)
    datagram = datagram[:6] + struct.pack("!H", checksum(b"".join(ends) + pseudo + datagram) or 0xFFFF) + data
    identification = int.from_bytes(os.urandom(2), "big") or 1
    parts = []
    for offset in range(0, length, PART_BYTES):
        piece, more = datagram[offset : offset + PART_BYTES], offset + PART_BYTES < length
        if version == 4:  # the kernel fills in length and checksum (raw(7))
            place = offset // 8 | (0x2000 if more else 0)
            head = struct.pack("!BBHHHBBH", 0x45, 0, 0, identification, place, 64, UDP, 0)
        else:
            head = struct.pack("!IHBB", 6 << 28, 8 + len(piece), FRAGMENT, 64)
            piece = struct.pack("!BBHI", UDP, 0, offset | more, identification) + piece
        parts.append(head + b"".join(ends) + piece)
    if order == "first":
        parts[1:] = parts[:0:-1]
    elif order == "backward":
        parts.reverse()
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with socket.socket(FAMILIES[version], socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            for part in parts:
                raw.sendto(part, (destination[0], 0))
    finally:
        os.sched_setaffinity(0, before)


def reflected(
    address: str,
    port: int,
    size: int,
    source_port: int = 0,
    count: int = 1,
    source: str = "",
    order: str | None = None,
) -> dict[str, Any]:
    """Whether both ends got what the other one sent; whom the server saw, null for nobody."""
    seen: set[tuple[str, int]] = set()
    with datagram_socket(address) as sock:
        sock.bind((source, source_port))
        sock.connect((address, port))
        sock.settimeout(AGAIN_S)
        for _ in range(count):
            data = os.urandom(size)
            said = ask(sock, data, order)
            if said is None:
                return {"seen": None, "equal": False}
            line, _, back = said.partition(b"\n")
            answer = json.loads(line)
            seen.add(tuple(answer["seen"]))
            if back != data or answer["sha256"] != hashlib.sha256(data).hexdigest():
                return {"seen": sorted(seen), "equal": False}
    return {"seen": sorted(seen), "equal": True}


def ask(sock: socket.socket, data: bytes, order: str | None) -> bytes | None:
    """The answer to a datagram; None after some tries."""
    for _ in range(TRIES):
        try:
            if order is None:
                sock.send(data)
            else:
                send_parts(sock.getsockname()[:2], sock.getpeername()[:2], data, order)
            return sock.recv(1 << 16)
        except TimeoutError:
            continue
        except OSError as failure:
            if failure.errno != errno.EMSGSIZE:  # the path's MTU was learned just now
                raise
    return None


def echo(address: str, identifier: int, size: int = 56, count: int = 1) -> dict[str, Any]:
    """Echo requests, one after the other; a lost one is sent again."""
    version, answers = version_of(address), 0
    kind, reply = (8, 0) if version == 4 else (128, 129)
    deadline = time.monotonic() + TIMEOUT_S
    with socket.socket(FAMILIES[version], socket.SOCK_RAW, ICMP if version == 4 else ICMPV6) as raw:
        for number in range(count):
            head = struct.pack("!BBHHH", kind, 0, 0, identifier, number)
            body = os.urandom(size)
            if version == 4:
                head = head[:2] + struct.pack("!H", checksum(head + body)) + head[4:]
            answered = False
            while not answered and time.monotonic() < deadline:
                raw.sendto(head + body, (address, 0))
                answered = echo_answered(raw, version, reply, head[4:] + body, address)
            answers += answered
    return {"answers": answers}


def scatter(address: str, first: int, count: int) -> dict[str, Any]:
    """An echo request of each identifier; nobody waits for answers."""
    version = version_of(address)
    with socket.socket(FAMILIES[version], socket.SOCK_RAW, ICMP if version == 4 else ICMPV6) as raw:
        for identifier in range(first, first + count):
            head = struct.pack("!BBHHH", 8 if version == 4 else 128, 0, 0, identifier, 1)
            if version == 4:
                head = head[:2] + struct.pack("!H", checksum(head)) + head[4:]
            raw.sendto(head, (address, 0))
    return {}


def echo_answered(raw: socket.socket, version: int, reply: int, rest: bytes, address: str) -> bool:
    while select.select([raw], [], [], AGAIN_S)[0]:
        data, sender = raw.recvfrom(1 << 16)
        if version == 4:
            data = data[(data[0] & 15) * 4 :]
        if data[0] == reply and data[4:] == rest and sender[0] == address:
            return True
    return False


def error(
    address: str,
    port: int,
    size: int = 100,
    hop_limit: int = 0,
    dont_fragment: bool | None = None,
    source_port: int = 0,
) -> dict[str, Any]:
    """Sends one datagram; what the kernel says about it (ip(7), IP_RECVERR)."""
    version = version_of(address)
    level = socket.IPPROTO_IP if version == 4 else socket.IPPROTO_IPV6
    with datagram_socket(address, source_port) as sock:
        sock.setsockopt(level, IP_RECVERR if version == 4 else IPV6_RECVERR, 1)
        if hop_limit:
            sock.setsockopt(level, socket.IP_TTL if version == 4 else socket.IPV6_UNICAST_HOPS, hop_limit)
        if dont_fragment is not None:
            value = PMTUDISC_PROBE if dont_fragment else PMTUDISC_DONT
            sock.setsockopt(level, IP_MTU_DISCOVER if version == 4 else IPV6_MTU_DISCOVER, value)
        sock.connect((address, port))
        sock.send(bytes(size))
        poll = select.poll()
        poll.register(sock, 0)  # POLLERR is always reported
        if not poll.poll(TIMEOUT_S * 1000):
            return {"error": None}
        _, ancillary, _, _ = sock.recvmsg(1 << 16, 512, socket.MSG_ERRQUEUE)
    for _, _, data in ancillary:
        # struct sock_extended_err, then the offender's address
        number, _, kind, code, _, info, _ = struct.unpack_from("=IBBBBII", data)
        place = data[16:]
        offender = socket.inet_ntop(FAMILIES[version], place[4:8] if version == 4 else place[8:24])
        return {
            "error": errno.errorcode[number],
            "type": kind,
            "code": code,
            "mtu_bytes": info,
            "offender": offender,
        }
    return {"error": None}


def packet_socket(ifname: str) -> socket.socket:
    """What comes in and goes out there."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    sock.bind((ifname, ETH_P_ALL))
    return sock


def neighbours(ifname: str, source: str, targets: list[str]) -> dict[str, Any]:
    """Asks for one after the other; [target, MAC] of each answer until the last one's, or none any more."""
    version, answers = version_of(source), []
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sock:
        sock.bind((ifname, ETH_P_ALL))
        own = sock.getsockname()[4]
        for target in targets:
            sock.send(arp_request(own, source, target) if version == 4 else solicitation(own, source, target))
        while select.select([sock], [], [], TIMEOUT_S)[0]:
            data, (_, ethertype, kind, _, _) = sock.recvfrom(1 << 16)
            if kind == PACKET_OUTGOING:
                continue
            if ethertype == ETH_P_ARP and data[20:22] == b"\0\2":
                answers.append([socket.inet_ntoa(data[28:32]), data[22:28].hex(":")])
            elif ethertype == ETH_P_IPV6 and (data[20], data[54]) == (ICMPV6, 136):
                answers.append([socket.inet_ntop(socket.AF_INET6, data[62:78]), data[80:86].hex(":")])
            if answers and answers[-1][0] == targets[-1]:
                break
    return {"answers": answers}


def arp_request(mac: bytes, source: str, target: str) -> bytes:
    """RFC 826."""
    head = b"\xff" * 6 + mac + struct.pack("!HHHBBH", ETH_P_ARP, 1, ETH_P_IP, 6, 4, 1)
    return head + mac + socket.inet_aton(source) + bytes(6) + socket.inet_aton(target)


def solicitation(mac: bytes, source: str, target: str) -> bytes:
    """RFC 4861 4.3, to the target's group (RFC 4291 2.7.1)."""
    wanted = socket.inet_pton(socket.AF_INET6, target)
    group = socket.inet_pton(socket.AF_INET6, "ff02::1:ff00:0")[:13] + wanted[13:]
    ends = socket.inet_pton(socket.AF_INET6, source) + group
    message = struct.pack("!BBHI", 135, 0, 0, 0) + wanted + b"\1\1" + mac
    total = checksum(ends + struct.pack("!I3xB", len(message), ICMPV6) + message)
    message = message[:2] + struct.pack("!H", total) + message[4:]
    head = struct.pack("!IHBB", 6 << 28, len(message), ICMPV6, 255)
    return b"\x33\x33" + group[12:] + mac + struct.pack("!H", ETH_P_IPV6) + head + ends + message


def set_checksums(ifname: str, on: bool) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        value = ctypes.create_string_buffer(struct.pack("=II", ETHTOOL_STXCSUM, on))
        fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("16sP", ifname.encode(), ctypes.addressof(value)))


def checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


class Packet:
    """An IP packet as it came: sender, protocol, ports (echo: its identifier, twice), and what is wrong with it."""

    def __init__(self, data: bytes, verify: bool):
        self.wrong = ""
        self.fragment = False
        self.ports = (0, 0)
        if data[0] >> 4 == 4:
            head_bytes = (data[0] & 15) * 4
            self.protocol = data[9]
            self.source, self.destination = (socket.inet_ntoa(data[at : at + 4]) for at in (12, 16))
            self.fragment = bool(int.from_bytes(data[6:8], "big") & 0x3FFF)
            later = int.from_bytes(data[6:8], "big") & 0x1FFF
            payload = data[head_bytes : int.from_bytes(data[2:4], "big")]
            if verify and checksum(data[:head_bytes]):
                self.wrong = "the header's checksum"
            pseudo = data[12:20] + struct.pack("!BBH", 0, self.protocol, len(payload))
        else:
            self.protocol = data[6]
            self.source, self.destination = (socket.inet_ntop(socket.AF_INET6, data[at : at + 16]) for at in (8, 24))
            payload, later = data[40 : 40 + int.from_bytes(data[4:6], "big")], 0
            if self.protocol == FRAGMENT:
                self.fragment = True
                self.protocol, later = payload[0], int.from_bytes(payload[2:4], "big") & 0xFFF8
                payload = payload[8:]
            pseudo = data[8:40] + struct.pack("!I3xB", len(payload), self.protocol)
        if later or len(payload) < 8:
            return
        if self.protocol in (TCP, UDP):
            self.ports = struct.unpack_from("!HH", payload)
        elif (self.protocol, payload[0]) in ((ICMP, 0), (ICMP, 8), (ICMPV6, 128), (ICMPV6, 129)):
            self.ports = struct.unpack_from("!4xH", payload) * 2
        if not verify or self.fragment or self.protocol not in (TCP, UDP, ICMP, ICMPV6):
            return
        if self.protocol == UDP and payload[6:8] == b"\0\0":
            self.wrong = self.wrong or ("no UDP checksum" if data[0] >> 4 == 6 else "")
        elif checksum((b"" if self.protocol == ICMP else pseudo) + payload):
            self.wrong = self.wrong or f"the checksum of protocol {self.protocol}"


class Watch:
    """The IP packets that come in at an interface."""

    def __init__(self, ifname: str):
        self.sock = packet_socket(ifname)
        self.frames: list[bytes] = []
        self.ended, self.ending = os.pipe()
        self.waits: list[Any] = [self.sock, self.ended]
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        """Until the end was called for and nothing waits any more."""
        while self.sock in select.select(self.waits, [], [])[0]:
            data, (_, ethertype, kind, _, _) = self.sock.recvfrom(1 << 17)
            # Groups have extension headers and nothing to do with flows.
            if kind != PACKET_OUTGOING and ethertype in (ETH_P_IP, ETH_P_IPV6) and not data[0] & 1:
                self.frames.append(data[14:])

    def end(self, verify: bool) -> dict[str, Any]:
        os.close(self.ending)
        self.thread.join()
        os.close(self.ended)
        _, lost = struct.unpack("=II", self.sock.getsockopt(263, PACKET_STATISTICS, 8))  # SOL_PACKET
        self.sock.close()
        sources: dict[str, dict[str, int]] = {}
        ports: set[tuple[str, int, int]] = set()
        wrong, large, checked = [], 0, 0
        for data in self.frames:
            big = len(data) > 1500
            large += big
            packet = Packet(data, verify and not big)
            checked += verify and not big
            by_protocol = sources.setdefault(packet.source, {})
            by_protocol[str(packet.protocol)] = by_protocol.get(str(packet.protocol), 0) + 1
            ports.add((packet.source, packet.protocol, packet.ports[0]))
            if packet.wrong:
                wrong.append(f"{packet.wrong} of {len(data)} bytes from {packet.source}")
        return {
            "sources": sources,
            "ports": sorted(ports),
            "packets": len(self.frames),
            "checked": checked,
            "large": large,
            "wrong": wrong[:20],
            "lost": lost,
        }


def main() -> None:
    watch: Watch | None = None
    plain: dict[str, Callable[..., dict[str, Any]]] = {
        "reflect": reflect,
        "reflected": reflected,
        "echo": echo,
        "scatter": scatter,
        "error": error,
        "neighbours": neighbours,
    }
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        answer: dict[str, Any] = {}
        try:
            if do in plain:
                answer = plain[do](**request)
            elif do == "watch":
                watch = Watch(**request)
            elif do == "watched" and watch:
                answer, watch = watch.end(request.get("verify", False)), None
            elif do == "checksums":
                set_checksums(**request)
            else:
                raise ValueError(f"nothing to do for {do!r}")
            answer["ok"] = True
        except (OSError, ValueError, TypeError) as failure:
            answer = {"ok": False, "sentence": f"{do}: {failure}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
