"""Packets for the datapath's tests: built from their parts, with right checksums unless told otherwise."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

ETHERTYPE_IPV4, ETHERTYPE_ARP, ETHERTYPE_IPV6, ETHERTYPE_VLAN = 0x0800, 0x0806, 0x86DD, 0x8100
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
ROCE_PORT = 4791


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pseudo_header(source: str, destination: str, protocol: int, length: int) -> bytes:
    """What TCP, UDP and ICMPv6 checksums cover beside the packet (RFC 9293 3.1, RFC 8200 8.1)."""
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(destination).packed
    if len(addresses) == 8:
        return addresses + struct.pack("!BBH", 0, protocol, length)
    return addresses + struct.pack("!I3xB", length, protocol)


def ethernet(destination: bytes, source: bytes, ethertype: int, payload: bytes) -> bytes:
    """A frame without its check sequence."""
    return destination + source + struct.pack("!H", ethertype) + payload


def tcp(source: int, destination: int, flags: int = ACK, payload: bytes = b"data") -> bytes:
    """A segment, its checksum (offset 16) zero."""
    return struct.pack("!HHIIBBHHH", source, destination, 1, 1, 5 << 4, flags, 1000, 0, 0) + payload


def udp(source: int, destination: int, payload: bytes = b"data") -> bytes:
    """A datagram, its checksum (offset 6) zero."""
    return struct.pack("!HHHH", source, destination, 8 + len(payload), 0) + payload


def icmp(kind: int, identifier: int, payload: bytes = b"ping") -> bytes:
    """ICMP or ICMPv6, its checksum (offset 2) zero."""
    return struct.pack("!BBHHH", kind, 0, 0, identifier, 1) + payload


def roce(qpn: int, *, source: int = 0xC000, payload: bytes = b"write", opcode: int = 4) -> bytes:
    """A RoCEv2 datagram: UDP to 4791, base transport header (InfiniBand 9.2), an ICRC that nobody checks here."""
    header = struct.pack("!BBHII", opcode, 0x40, 0xFFFF, qpn, 1)
    return udp(source, ROCE_PORT, header + payload + b"ICRC")


def datagram(qpn: int, source_qpn: int, *, opcode: int = 0x64) -> bytes:
    """``roce`` of an unreliable datagram (SEND only): with the datagram header (InfiniBand 9.3.1)."""
    return roce(qpn, payload=struct.pack("!II", 0x11111111, source_qpn) + b"message", opcode=opcode)


@dataclass(frozen=True)
class Ip:
    """A network header of either family around a transport packet; ``bytes()`` gives the IP packet."""

    source: str
    destination: str
    protocol: int
    payload: bytes
    hop_limit: int = 64
    options: bytes = b""  # IPv4: options; IPv6: extension headers, of which the first has the type `first`
    first: int = 0
    dont_fragment: bool = False
    more: bool = False
    offset: int = 0  # of a fragment, in bytes
    udp_checksum: bool = True

    @property
    def version(self) -> int:
        return ipaddress.ip_address(self.source).version

    def transport(self) -> bytes:
        """The payload with its checksum filled in."""
        places = {TCP: 16, UDP: 6, ICMP: 2, ICMPV6: 2}
        place = places.get(self.protocol)
        if place is None or self.offset or len(self.payload) < place + 2:
            return self.payload
        if self.protocol == UDP and not self.udp_checksum:
            return self.payload
        covered = self.payload
        if self.protocol != ICMP:
            header = pseudo_header(self.source, self.destination, self.protocol, len(self.payload))
            covered = header + covered
        value = checksum(covered)
        if self.protocol == UDP and value == 0:
            value = 0xFFFF
        return self.payload[:place] + struct.pack("!H", value) + self.payload[place + 2 :]

    def __bytes__(self) -> bytes:
        source = ipaddress.ip_address(self.source).packed
        destination = ipaddress.ip_address(self.destination).packed
        payload = self.transport()
        if self.version == 6:
            first = self.first if self.options else self.protocol
            length = len(self.options) + len(payload)
            return struct.pack("!IHBB", 6 << 28, length, first, self.hop_limit) + (
                source + destination + self.options + payload
            )
        words = 5 + len(self.options) // 4
        place = (0x4000 if self.dont_fragment else 0) | (0x2000 if self.more else 0) | self.offset // 8
        total = words * 4 + len(payload)
        fields = (4 << 4 | words, 0, total, 7, place, self.hop_limit, self.protocol)
        header = struct.pack("!BBHHHBB", *fields) + b"\0\0" + source + destination + self.options
        return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload


def extension(following: int, kind: int = DESTINATION, *, offset: int = 0, more: bool = False) -> bytes:
    """An IPv6 extension header of 8 bytes: a fragment header (RFC 8200 4.5), or options that are padding."""
    if kind == FRAGMENT:
        return struct.pack("!BBHI", following, 0, offset | more, 77)
    return struct.pack("!BB", following, 0) + b"\x01\x04\0\0\0\0"


def fragment(
    source: str, destination: str, payload: bytes, *, offset: int = 0, more: bool = False, protocol: int = UDP
) -> Ip:
    """A part of a packet of either family; all have the same identification. The first part's checksum is wrong."""
    if ipaddress.ip_address(source).version == 4:
        return Ip(source, destination, protocol, payload, more=more, offset=offset)
    header = extension(protocol, FRAGMENT, offset=offset, more=more)
    return Ip(source, destination, protocol, payload, options=header, first=FRAGMENT, offset=offset)


def arp(operation: int, sender_mac: bytes, sender: str, target: str) -> bytes:
    """ARP for Ethernet and IPv4 (RFC 826)."""
    head = struct.pack("!HHBBH", 1, ETHERTYPE_IPV4, 6, 4, operation)
    return head + sender_mac + ipaddress.ip_address(sender).packed + bytes(6) + ipaddress.ip_address(target).packed


@dataclass(frozen=True)
class Seen:
    """What a frame without options or extension headers turns out to be."""

    destination_mac: bytes
    source_mac: bytes
    source: str
    destination: str
    hop_limit: int
    protocol: int
    transport: bytes

    @property
    def source_port(self) -> int:
        """ICMP echo: its identifier."""
        place = 4 if self.protocol in (ICMP, ICMPV6) else 0
        return int.from_bytes(self.transport[place : place + 2], "big")

    @property
    def destination_port(self) -> int:
        return int.from_bytes(self.transport[2:4], "big")


def look(frame: bytes) -> Seen:
    """Takes a frame apart and checks its checksums (AssertionError); UDP without one is allowed for IPv4."""
    ethertype = int.from_bytes(frame[12:14], "big")
    if ethertype == ETHERTYPE_IPV4:
        header, total = frame[14:34], int.from_bytes(frame[16:18], "big")
        assert checksum(header) == 0, "IPv4 header checksum"
        transport = frame[34 : 14 + total]
        source, destination = str(ipaddress.ip_address(header[12:16])), str(ipaddress.ip_address(header[16:20]))
        protocol, hop_limit = header[9], header[8]
    else:
        assert ethertype == ETHERTYPE_IPV6
        transport = frame[54 : 54 + int.from_bytes(frame[18:20], "big")]
        source, destination = str(ipaddress.ip_address(frame[22:38])), str(ipaddress.ip_address(frame[38:54]))
        protocol, hop_limit = frame[20], frame[21]
    covered = transport
    if protocol != ICMP:
        covered = pseudo_header(source, destination, protocol, len(transport)) + transport
    unchecked = protocol == UDP and ethertype == ETHERTYPE_IPV4 and transport[6:8] == b"\0\0"
    assert unchecked or checksum(covered) == 0, f"transport checksum of protocol {protocol}"
    return Seen(frame[:6], frame[6:12], source, destination, hop_limit, protocol, transport)
