"""The datapath between real stacks in real namespaces: pods, host, and a world behind the uplink; both IP families.

No agent: the lab does by hand what an agent would, so a failure here is the datapath's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from rdmanet.model import GuardEntry, GuardState, address_key
from testbed.bpf import lab as labs
from testbed.bpf import packets
from testbed.bpf.lab import FAR, FIRST_PORT, GATEWAY_MAC, GATEWAYS, LAST_PORT, OUTSIDE, UPLINK, Lab, Namespace, Pod

VERSIONS = (4, 6)
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
ETH_P_ALL = 3
IP_RECVERR = 11  # ip(7); missing in Python's socket module before 3.14
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17  # include/uapi/linux/ethtool.h
#: A fence takes a round trip; so many of them is more than any queue holds.
FENCES = 200


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    labs.require_root()
    with Lab.build(labs.artifact()) as built:
        for device in (True, True, False):
            built.add_pod(device=device)
        yield built


@pytest.fixture
def train_0(lab: Lab) -> Pod:
    return lab.pods[0]


@pytest.fixture
def train_1(lab: Lab) -> Pod:
    return lab.pods[1]


@pytest.fixture
def web(lab: Lab) -> Pod:
    return lab.pods[2]


def stream(server: Namespace, address: str, client: Namespace, version: int, size: int = 2_000_000) -> tuple[str, int]:
    """Sends bytes over TCP both ways at once, compares them, and returns whom the server saw."""
    data = os.urandom(size)
    with (
        server.socket(FAMILIES[version], socket.SOCK_STREAM) as listener,
        client.socket(FAMILIES[version], socket.SOCK_STREAM) as near,
    ):
        listener.bind((address, 0))
        listener.listen()
        near.connect((address, listener.getsockname()[1]))
        far, peer = listener.accept()
        with far, ThreadPoolExecutor(4) as pool:
            far.settimeout(10)
            sending = [pool.submit(end.sendall, data) for end in (near, far)]
            received = [pool.submit(_receive, end, size) for end in (near, far)]
            for sent in sending:
                sent.result()
            assert all(got.result() == data for got in received)
        return str(peer[0]), int(peer[1])


def _receive(sock: socket.socket, size: int) -> bytes:
    chunks = []
    while size:
        chunk = sock.recv(min(size, 1 << 16))
        assert chunk, "the connection ended early"
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def datagram(
    server: Namespace, address: str, client: Namespace, version: int, payload: bytes = b"question", port: int = 0
) -> tuple[str, int]:
    """One UDP question and its answer; returns whom the server saw."""
    with (
        server.socket(FAMILIES[version], socket.SOCK_DGRAM) as there,
        client.socket(FAMILIES[version], socket.SOCK_DGRAM) as here,
    ):
        there.bind((address, port))
        here.connect((address, there.getsockname()[1]))
        here.send(payload)
        got, peer = there.recvfrom(1 << 16)
        assert got == payload
        there.sendto(payload[::-1], peer)
        assert here.recv(1 << 16) == payload[::-1]
        return str(peer[0]), int(peer[1])


def ping(client: Namespace, address: str, version: int) -> None:
    """Echo request and reply through a raw socket."""
    protocol = packets.ICMP if version == 4 else packets.ICMPV6
    kind, reply = (8, 0) if version == 4 else (128, 129)
    request = packets.icmp(kind, 4242, b"echo of the datapath's test")
    if version == 4:
        request = request[:2] + struct.pack("!H", packets.checksum(request)) + request[4:]
    with client.socket(FAMILIES[version], socket.SOCK_RAW, protocol) as raw:
        raw.sendto(request, (address, 0))
        while True:
            answer, sender = raw.recvfrom(2048)
            if version == 4:
                answer = answer[20:]
            if answer[0] == reply and sender[0] == address and answer[4:] == request[4:]:
                return


def until(lab: Lab, condition: Callable[[], bool]) -> None:
    """Waits until packets sent before have been dealt with: each fence is a round trip through the same queues."""
    for _ in range(FENCES):
        if condition():
            return
        datagram(lab.pods[1].namespace, lab.pods[1].addresses[4], lab.pods[0].namespace, 4)
    pytest.fail(f"this did not become true within {FENCES} round trips; drops: {lab.datapath.drops()}")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("talk", [stream, datagram])
def test_pod_to_pod(web: Pod, train_0: Pod, version: int, talk: Callable[..., tuple[str, int]]) -> None:
    seen, _ = talk(train_0.namespace, train_0.addresses[version], web.namespace, version)
    assert seen == web.addresses[version]


@pytest.mark.parametrize("version", VERSIONS)
def test_fragments_between_pods(web: Pod, train_0: Pod, version: int) -> None:
    address = train_0.addresses[version]
    seen, _ = datagram(train_0.namespace, address, web.namespace, version, os.urandom(20_000))
    assert seen == web.addresses[version]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("talk", [stream, datagram])
def test_host_to_pod(lab: Lab, web: Pod, version: int, talk: Callable[..., tuple[str, int]]) -> None:
    seen, _ = talk(web.namespace, web.addresses[version], lab.host, version)
    assert seen == GATEWAYS[version]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("address", [GATEWAYS, UPLINK], ids=["gateway", "uplink-address"])
@pytest.mark.parametrize("talk", [stream, datagram])
def test_pod_to_host(
    lab: Lab, web: Pod, version: int, address: dict[int, str], talk: Callable[..., tuple[str, int]]
) -> None:
    seen, _ = talk(lab.host, address[version], web.namespace, version)
    assert seen == web.addresses[version]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("address", [OUTSIDE, FAR], ids=["on-link", "behind-a-router"])
@pytest.mark.parametrize("talk", [stream, datagram])
def test_pod_to_outside_is_masqueraded(
    lab: Lab, web: Pod, version: int, address: dict[int, str], talk: Callable[..., tuple[str, int]]
) -> None:
    seen, port = talk(lab.outside, address[version], web.namespace, version)
    assert seen == UPLINK[version]
    assert FIRST_PORT <= port <= LAST_PORT


@pytest.mark.parametrize("version", VERSIONS)
def test_ping(lab: Lab, web: Pod, train_0: Pod, version: int) -> None:
    ping(web.namespace, train_0.addresses[version], version)
    ping(web.namespace, GATEWAYS[version], version)
    ping(web.namespace, UPLINK[version], version)
    ping(web.namespace, OUTSIDE[version], version)
    ping(web.namespace, FAR[version], version)
    ping(lab.host, web.addresses[version], version)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_hosts_own_connections_are_untouched(lab: Lab, version: int) -> None:
    seen, port = stream(lab.outside, FAR[version], lab.host, version)
    assert seen == UPLINK[version]
    assert not FIRST_PORT <= port <= LAST_PORT
    seen, _ = stream(lab.host, UPLINK[version], lab.outside, version)
    assert seen == OUTSIDE[version]


@pytest.mark.parametrize("version", VERSIONS)
def test_counters_account_for_the_packets(lab: Lab, web: Pod, train_0: Pod, version: int) -> None:
    lab.datapath.forget(web.id)
    lab.datapath.forget(train_0.id)
    rounds, payload = 300, b"exactly"
    frame_bytes = 14 + (20 if version == 4 else 40) + 8 + len(payload)
    with (
        train_0.namespace.socket(FAMILIES[version], socket.SOCK_DGRAM) as there,
        web.namespace.socket(FAMILIES[version], socket.SOCK_DGRAM) as here,
    ):
        there.bind((train_0.addresses[version], 0))
        here.connect(there.getsockname())
        for _ in range(rounds):
            here.send(payload)
            got, peer = there.recvfrom(100)
            there.sendto(got, peer)
            assert here.recv(100) == payload
    counters = lab.datapath.counters()
    for pod in (web, train_0):
        for direction in ("from_pod", "to_pod"):
            count = counters[pod.id, direction, "ip"]
            assert (count.packets, count.bytes) == (rounds, rounds * frame_bytes)


@pytest.mark.parametrize("version", VERSIONS)
def test_roce_between_pods_is_counted_and_can_be_revoked(lab: Lab, train_0: Pod, train_1: Pod, version: int) -> None:
    """As UDP to 4791 with a base transport header; the real thing needs a kernel with rxe (tests/rdma)."""
    key = address_key(train_1.addresses[version])
    entry = GuardEntry(7, address_key(train_0.addresses[version]), 18, GuardState.GRANTED)
    lab.datapath.forget(train_0.id)
    with (
        train_1.namespace.socket(FAMILIES[version], socket.SOCK_DGRAM) as there,
        train_0.namespace.socket(FAMILIES[version], socket.SOCK_DGRAM) as here,
    ):
        there.bind((train_1.addresses[version], packets.ROCE_PORT))
        write = packets.roce(17)[8:]
        lab.datapath.set_guard(key, 17, entry)
        for _ in range(5):
            here.sendto(write, there.getsockname())
            assert there.recv(100) == write
        assert lab.datapath.guards()[key, 17].packets == 5
        lab.datapath.set_guard(key, 17, entry._replace(state=GuardState.REVOKED))
        here.sendto(write, there.getsockname())
        until(lab, lambda: lab.datapath.drops().get((train_0.id, "roce_revoked")) == 1)
        lab.datapath.delete_guard(key, 17)
        here.sendto(write, there.getsockname())
        assert there.recv(100) == write
    assert lab.datapath.counters()[train_0.id, "from_pod", "roce"].packets == 6


@pytest.mark.parametrize("version", VERSIONS)
def test_checksums_are_right_when_they_leave_the_host(lab: Lab, web: Pod, version: int) -> None:
    """Pods leave checksums to the device (CHECKSUM_PARTIAL); here the uplink cannot, so the stack fills them in."""
    _set_transmit_checksumming(lab.host, "uplink0", on=False)
    with lab.outside.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sniffer:
        sniffer.bind(("eth0", ETH_P_ALL))
        try:
            stream(lab.outside, FAR[version], web.namespace, version, size=20_000)
            datagram(lab.outside, FAR[version], web.namespace, version)
            ping(web.namespace, FAR[version], version)
            protocols: set[int] = set()
            wanted = {packets.TCP, packets.UDP, packets.ICMP if version == 4 else packets.ICMPV6}
            while not wanted <= protocols:
                frame, (_, _, kind, _, _) = sniffer.recvfrom(1 << 17)
                if kind == socket.PACKET_OUTGOING or int.from_bytes(frame[12:14], "big") not in (0x0800, 0x86DD):
                    continue
                # Multicast reports have options and extension headers, which look() does not know.
                if frame[0] & 1:
                    continue
                seen = packets.look(frame)
                if seen.source == UPLINK[version] and seen.destination == FAR[version]:
                    protocols.add(seen.protocol)
        finally:
            _set_transmit_checksumming(lab.host, "uplink0", on=True)


def _set_transmit_checksumming(inside: Namespace, name: str, *, on: bool) -> None:
    with inside.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        value = ctypes.create_string_buffer(struct.pack("=II", ETHTOOL_STXCSUM, on))
        fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("16sP", name.encode(), ctypes.addressof(value)))


@pytest.mark.parametrize("version", VERSIONS)
def test_errors_from_the_host_reach_the_pod(lab: Lab, web: Pod, version: int) -> None:
    with web.namespace.socket(FAMILIES[version], socket.SOCK_DGRAM) as sock:
        sock.connect((GATEWAYS[version], 9))
        sock.send(b"nobody listens there")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(100)


def test_a_hop_limit_of_one_is_answered(web: Pod) -> None:
    """IPv4 only: for IPv6 the kernel sends time exceeded only where the whole host forwards."""
    with web.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        sock.connect((FAR[4], 33434))
        sock.send(b"traceroute")
        with pytest.raises(OSError, match=os.strerror(errno.EHOSTUNREACH)):
            sock.recv(100)


@pytest.mark.parametrize("version", VERSIONS)
def test_spoofed_packets_go_nowhere(lab: Lab, web: Pod, train_0: Pod, train_1: Pod, version: int) -> None:
    """By hand through a packet socket, as any pod with CAP_NET_RAW can; the victim must not see it."""
    lab.datapath.forget(web.id)
    port = 5353
    with (
        train_0.namespace.socket(FAMILIES[version], socket.SOCK_DGRAM) as victim,
        web.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw,
    ):
        victim.bind((train_0.addresses[version], port))
        raw.bind(("eth0", 0))

        def send(source: str, mac: bytes, payload: bytes) -> None:
            ip = packets.Ip(source, train_0.addresses[version], packets.UDP, packets.udp(1, port, payload))
            ethertype = packets.ETHERTYPE_IPV4 if version == 4 else packets.ETHERTYPE_IPV6
            raw.send(packets.ethernet(GATEWAY_MAC, mac, ethertype, bytes(ip)))

        send(train_1.addresses[version], web.mac, b"another's address")
        send(train_1.addresses[version], train_1.mac, b"another's everything")
        send(web.addresses[version], web.mac, b"honest")
        assert victim.recv(100) == b"honest"
    drops = lab.datapath.drops()
    assert drops[web.id, "spoofed_address"] == 1
    assert drops[web.id, "spoofed_mac"] == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_packets_are_routed_whatever_their_destination_mac(web: Pod, train_0: Pod, version: int) -> None:
    """The host's end classifies them as another host's (PACKET_OTHERHOST), which the receiver's stack would ignore."""
    with (
        train_0.namespace.socket(FAMILIES[version], socket.SOCK_DGRAM) as there,
        web.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw,
    ):
        there.bind((train_0.addresses[version], 5354))
        raw.bind(("eth0", 0))
        ip = packets.Ip(
            web.addresses[version], train_0.addresses[version], packets.UDP, packets.udp(1, 5354, b"to whom?")
        )
        ethertype = packets.ETHERTYPE_IPV4 if version == 4 else packets.ETHERTYPE_IPV6
        raw.send(packets.ethernet(bytes.fromhex("02aabbccddee"), web.mac, ethertype, bytes(ip)))
        assert there.recv(100) == b"to whom?"


@pytest.mark.parametrize("version", VERSIONS)
def test_frames_shorter_than_their_network_header(lab: Lab, web: Pod, version: int) -> None:
    """Shorter than BPF_PROG_TEST_RUN takes them (tests/bpf/test_fuzz.py has the longer ones)."""
    lab.datapath.forget(web.id)
    ip = packets.Ip(web.addresses[version], lab.pods[0].addresses[version], packets.UDP, packets.udp(1, 2))
    ethertype = packets.ETHERTYPE_IPV4 if version == 4 else packets.ETHERTYPE_IPV6
    frame = packets.ethernet(GATEWAY_MAC, web.mac, ethertype, bytes(ip))
    sent = 0
    with web.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        for length in range(15, 14 + (20 if version == 4 else 40)):
            raw.send(frame[:length])
            sent += 1
    until(lab, lambda: lab.datapath.drops().get((web.id, "malformed")) == sent)


def test_a_deleted_endpoint_receives_nothing(lab: Lab, web: Pod) -> None:
    lab.datapath.forget(web.id)
    gone = lab.add_pod()
    key = address_key(gone.addresses[4])
    datagram(gone.namespace, gone.addresses[4], web.namespace, 4)
    lab.datapath.delete_endpoint(key)
    lab.datapath.delete_attachment(gone.ifindex)
    with web.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"anybody?", (gone.addresses[4], 9))
    until(lab, lambda: lab.datapath.drops().get((web.id, "no_endpoint")) == 1)
    with gone.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"let me out", (web.addresses[4], 9))
    until(lab, lambda: lab.datapath.drops().get((0, "no_attachment"), 0) >= 1)


def test_a_swap_under_traffic_loses_nothing(lab: Lab, web: Pod, train_0: Pod) -> None:
    """UDP, which would not repair a loss, while the programs are swapped to and fro."""
    one = labs.artifact()
    other = replace(one, hash="f" * 64)
    stop = threading.Event()
    swaps = 0

    def swap() -> None:
        nonlocal swaps
        while not stop.is_set():
            lab.datapath.swap(other if swaps % 2 == 0 else one)
            swaps += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        with (
            train_0.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as there,
            web.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as here,
        ):
            there.bind((train_0.addresses[4], 0))
            here.connect(there.getsockname())
            number = 0
            while swaps < 5 or number < 2000:
                here.send(struct.pack("!I", number))
                assert struct.unpack("!I", there.recv(4)) == (number,)
                number += 1
    finally:
        stop.set()
        thread.join()
        lab.datapath.swap(one)
    assert set(lab.datapath.running().values()) == {f"{hook}_{one.hash[:8]}" for hook in ("pod", "host", "uplink")}
